"""A conversation with a run's models."""

from __future__ import annotations

from collections.abc import Generator

from fedit.generation import GREEDY, Sampling
from fedit.interfaces import Example, Turn
from fedit.run_models import RunModels


class Conversation:
    """Turns so far with one of a run's models, under the template that it was tuned with."""

    def __init__(self, models: RunModels, name: str, max_new_tokens: int, sampling: Sampling = GREEDY) -> None:
        self.name = name
        self._models = models
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._turns: list[Turn] = []

    def clear(self) -> None:
        """Forget the turns so far."""
        self._turns.clear()

    def switch(self, name: str) -> None:
        """Let another model of the run go on with the conversation.

        Raises:
            ConfigError: the run has no such model.
        """
        self._models = self._models.with_models([name])
        self.name = name

    def answer(self, instruction: str) -> Generator[str]:
        """Yield the answer so far to the next turn; both are remembered, also of an answer that is not waited for.

        Raises:
            DataError: the instruction is too long.
        """
        asked = Example((*self._turns, Turn(instruction, "")))
        text = None
        try:
            for answers in self._models.answer({self.name: asked}, self._max_new_tokens, self._sampling):
                text = answers[self.name]
                yield text
        finally:
            if text is not None:
                self._turns.append(Turn(instruction, text))
