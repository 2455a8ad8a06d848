"""How the server moves the global adapter along the aggregate D, the pseudo-gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedit.interfaces import Adapter, ConfigError, ServerOptimizer

if TYPE_CHECKING:
    from torch import Tensor

    from fedit.config import RunConfig


class FedAvg(ServerOptimizer):
    """theta <- theta + learning_rate D (1602.05629; a rate other than 1: 2003.00295).

    Clients that pull in different directions cancel in D; a rate above 1 makes up for the length that it lost.

    >>> FedAvg().learning_rate
    1.0
    """

    name: ClassVar[str] = "fedavg"
    learning_rate: float = Field(default=1.0, gt=0)

    def apply(
        self, adapter: Adapter, delta: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[Adapter, Mapping[str, Tensor]]:
        return _moved(adapter, delta, self.learning_rate), state

    def check(self, run: RunConfig) -> None:
        if run.aggregation.refactors and self.learning_rate != 1:
            raise ConfigError(
                f"[server_optimizer] learning_rate = {self.learning_rate} stretches the step from the old factors to "
                f"the new, but [aggregation] name = {run.aggregation.name!r} changes their basis in every round, so "
                "that only the whole step means anything. Use learning_rate = 1 with it."
            )


class FedAvgM(ServerOptimizer):
    """Server momentum (1909.06335): v <- momentum v + D; theta <- theta + learning_rate v.

    With momentum 0.9 and learning_rate 1 the steps grow up to tenfold: lower one of the rates. The velocity is kept in
    float64. Refused with an aggregation that changes the factors' basis, since the velocity would be of another basis.

    >>> FedAvgM(momentum=0.5).learning_rate
    1.0
    """

    name: ClassVar[str] = "fedavgm"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    learning_rate: float = Field(default=1.0, gt=0)

    def apply(
        self, adapter: Adapter, delta: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[Adapter, Mapping[str, Tensor]]:
        velocity = {name: self.momentum * state[name] + d if name in state else d for name, d in delta.items()}
        return _moved(adapter, velocity, self.learning_rate), velocity

    def check(self, run: RunConfig) -> None:
        if run.aggregation.refactors:
            raise ConfigError(
                f"[server_optimizer] name = 'fedavgm' remembers past updates, but [aggregation] name = "
                f"{run.aggregation.name!r} changes the basis of the factors in every round. Use fedavg with it."
            )


def _moved(adapter: Adapter, step: Mapping[str, Tensor], learning_rate: float) -> Adapter:
    return adapter.with_tensors(
        {
            name: (tensor.double() + learning_rate * step[name]).to(tensor.dtype)
            for name, tensor in adapter.tensors.items()
        }
    )
