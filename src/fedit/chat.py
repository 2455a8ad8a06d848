"""A conversation with a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedit.base import load_base, load_tokenizer, resolve_device
from fedit.config import RunConfig
from fedit.data import encode_prompt
from fedit.export import load_adapter
from fedit.interfaces import DataError, Example, Turn
from fedit.model import StackedModel

if TYPE_CHECKING:
    import numpy as np


class Conversation:
    """Turns so far, answered greedily under the template that the run was tuned with."""

    def __init__(self, config: RunConfig, adapter_folder: Path | None, max_new_tokens: int) -> None:
        device = resolve_device(config.engine.device)
        self._template = config.data.template
        self._max_new_tokens = max_new_tokens
        self._turns: list[Turn] = []
        self._model = StackedModel(load_base(config.model, device), load_tokenizer(config.model.path), config.adapter)
        if adapter_folder is not None:
            adapter = load_adapter(adapter_folder, config)
            self._model.set_side(adapter.side)
            self._model.write(0, adapter)

    def clear(self) -> None:
        """Forget the turns so far."""
        self._turns.clear()

    def answer(self, instruction: str) -> str:
        """Return the model's answer to the next turn, and remember both."""
        prompt = self._prompt(instruction)
        with torch.inference_mode():
            (text,) = self._model.generate([prompt], [0], self._max_new_tokens)
        self._turns.append(Turn(instruction, text.strip()))
        return text.strip()

    def _prompt(self, instruction: str) -> np.ndarray:
        """Return the prompt's ids; the oldest turns are forgotten where the context would leave no room to answer.

        Raises:
            DataError: the instruction alone is too long.
        """
        context = getattr(self._model.base.config, "max_position_embeddings", None)
        while True:
            example = Example((*self._turns, Turn(instruction, "")))
            prompt = encode_prompt(example, self._template, self._model.tokenizer)
            if context is None or len(prompt) + min(self._max_new_tokens, context // 4) <= context:
                return prompt
            if not self._turns:
                raise DataError(f"The question has {len(prompt)} tokens; the model's context is {context}. Shorten it.")
            del self._turns[0]
