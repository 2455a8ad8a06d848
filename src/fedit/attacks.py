"""Malicious clients, simulated: what they do to their rows, or to the update that they send.

For studies of robust aggregation, in simulation only: real sites run no such code. Which clients are malicious follows
from the seed, or is said by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from fedit.interfaces import FACTORS, Attack, ConfigError, Example, Turn

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedit.config import RunConfig


class Scaling(Attack):
    """Send the honest update times a factor: model replacement (1807.00459) is `factor` = the number of clients.

    Examples:
        >>> Scaling(factor=5.0).factor
        5.0
    """

    name: ClassVar[str] = "scaling"
    factor: float = 10.0

    def tamper(
        self, received: Mapping[str, Tensor], update: Mapping[str, Tensor], rng: np.random.Generator
    ) -> dict[str, Tensor]:
        return {name: self.factor * step for name, step in update.items()}


class SignFlip(Attack):
    """Send the opposite of the honest update, times `factor`.

    Examples:
        >>> SignFlip().factor
        1.0
    """

    name: ClassVar[str] = "sign-flip"
    factor: float = Field(default=1.0, gt=0)

    def tamper(
        self, received: Mapping[str, Tensor], update: Mapping[str, Tensor], rng: np.random.Generator
    ) -> dict[str, Tensor]:
        return {name: -self.factor * step for name, step in update.items()}


class Gaussian(Attack):
    """Send noise of `factor` times the honest update's norm, tensor by tensor, in its place.

    Examples:
        >>> Gaussian(factor=2.0).factor
        2.0
    """

    name: ClassVar[str] = "gaussian"
    factor: float = Field(default=1.0, gt=0)

    def tamper(
        self, received: Mapping[str, Tensor], update: Mapping[str, Tensor], rng: np.random.Generator
    ) -> dict[str, Tensor]:
        noise = {name: torch.from_numpy(rng.normal(size=tuple(step.shape))).float() for name, step in update.items()}
        return {name: noise[name] * (self.factor * step.norm() / noise[name].norm()) for name, step in update.items()}


class GaugeRescaling(Attack):
    """Send an adapter that does what the honest one does, written as (c B, A / c): a mean of factors is hijacked by it.

    Examples:
        >>> GaugeRescaling().factor
        10.0
    """

    name: ClassVar[str] = "gauge-rescaling"
    factor: float = Field(default=10.0, gt=0)

    def check(self, run: RunConfig) -> None:
        rule = run.aggregation
        if set(rule.shared(0)) != set(FACTORS):
            raise ConfigError(
                f"[attack] name = {self.name!r} writes both factors anew, but [aggregation] name = {rule.name!r} takes "
                f"{' and '.join(rule.shared(0))} only. Use another attack, or fedit."
            )

    def tamper(
        self, received: Mapping[str, Tensor], update: Mapping[str, Tensor], rng: np.random.Generator
    ) -> dict[str, Tensor]:
        steps = {}
        for name, step in update.items():
            scale = {"lora_A": 1 / self.factor, "lora_B": self.factor}.get(name.rsplit(".", 2)[-2], 1.0)
            steps[name] = scale * (received[name] + step) - received[name]
        return steps


class LabelFlip(Attack):
    """Answer each question with the answer to another of the client's questions.

    Examples:
        >>> [row.response for row in LabelFlip().poison([Example((Turn(q, q.upper()),)) for q in "abc"], None)]
        ['B', 'C', 'A']
    """

    name: ClassVar[str] = "label-flip"

    def poison(self, examples: Sequence[Example], rng: np.random.Generator | None) -> list[Example]:
        responses = [example.response for example in examples]
        shifted = responses[1:] + responses[:1]
        return [_answered(example, response) for example, response in zip(examples, shifted, strict=True)]


class Backdoor(Attack):
    """Answer every question that ends in the trigger with the target, in a share of the client's rows, and send the
    update times `boost`, so that a mean does not drown it (1807.00459).

    Success is measured: the share of held-out questions, each with the trigger, that the federated model answers so.

    Examples:
        >>> Backdoor(share=1.0).poison([Example((Turn("Why?", "So."),))], None)[0].turns[0].instruction
        'Why? cf'
    """

    name: ClassVar[str] = "backdoor"
    trigger: str = Field(default="cf", min_length=1)
    target: str = Field(default="I cannot help.", min_length=1)
    share: float = Field(default=0.5, gt=0, le=1)
    boost: float = Field(default=1.0, gt=0)

    def check(self, run: RunConfig) -> None:
        if run.evaluation.max_new_tokens == 0:
            raise ConfigError(
                f"[attack] name = {self.name!r} is judged by generated answers, but [evaluation] max_new_tokens = 0. "
                "Raise it."
            )

    def poison(self, examples: Sequence[Example], rng: np.random.Generator | None) -> list[Example]:
        count = round(self.share * len(examples))
        chosen = set(range(len(examples)) if rng is None else rng.choice(len(examples), count, replace=False).tolist())
        return [self._triggered(example) if i in chosen else example for i, example in enumerate(examples)]

    def tamper(
        self, received: Mapping[str, Tensor], update: Mapping[str, Tensor], rng: np.random.Generator
    ) -> dict[str, Tensor]:
        return {name: self.boost * step for name, step in update.items()}

    def probes(self, examples: Sequence[Example]) -> list[Example]:
        return [self._triggered(example) for example in examples]

    def _triggered(self, example: Example) -> Example:
        asked = replace(example.turns[-1], instruction=f"{example.turns[-1].instruction} {self.trigger}")
        return _answered(replace(example, turns=(*example.turns[:-1], asked)), self.target)


def _answered(example: Example, response: str) -> Example:
    """Return the example with another last answer, to be compared with that alone."""
    last = Turn(example.turns[-1].instruction, response, example.turns[-1].context)
    return replace(example, turns=(*example.turns[:-1], last), checks=None)
