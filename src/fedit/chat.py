"""A conversation with a run's model."""

from __future__ import annotations

from collections.abc import Iterator

from fedit.interfaces import Example, Turn
from fedit.run_models import RunModels


class Conversation:
    """Turns so far with one of a run's models, under the template that it was tuned with."""

    def __init__(self, models: RunModels, name: str, max_new_tokens: int) -> None:
        self._models = models
        self._name = name
        self._max_new_tokens = max_new_tokens
        self._turns: list[Turn] = []

    def clear(self) -> None:
        """Forget the turns so far."""
        self._turns.clear()

    def answer(self, instruction: str) -> Iterator[str]:
        """Yield the answer so far to the next turn, and remember both once it is whole.

        Raises:
            DataError: the instruction is too long.
        """
        asked = Example((*self._turns, Turn(instruction, "")))
        text = ""
        for answers in self._models.answer({self._name: asked}, self._max_new_tokens):
            text = answers[self._name]
            yield text
        self._turns.append(Turn(instruction, text))
