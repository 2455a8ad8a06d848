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

    Examples:
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
        if self.learning_rate != 1 and (reason := _needs_whole_steps(run)):
            raise ConfigError(
                f"[server_optimizer] learning_rate = {self.learning_rate} stretches the step from the old factors to "
                f"the new, but {reason}, so that only the whole step means anything. Use learning_rate = 1 with it."
            )


class FedAvgM(ServerOptimizer):
    """Server momentum (1909.06335): v <- momentum v + D; theta <- theta + learning_rate v.

    With momentum 0.9 and learning_rate 1 the steps grow up to tenfold: lower one of the rates. The velocity is kept in
    float64. Refused with an aggregation that changes the factors' basis, since the velocity would be of another basis.

    Examples:
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
        step = {name: self._direction(d, velocity[name]) for name, d in delta.items()}
        return _moved(adapter, step, self.learning_rate), {**state, **velocity}

    def _direction(self, d: Tensor, velocity: Tensor) -> Tensor:
        """Return where to step for the aggregate D and the new velocity."""
        return velocity

    def check(self, run: RunConfig) -> None:
        _needs_one_basis(self, run)


class Nesterov(FedAvgM):
    """The outer optimizer of DiLoCo (2311.08105): v <- momentum v + D; theta <- theta + learning_rate (D + momentum v).

    Its clients run AdamW with moments of their own, `[client] moments = "keep"`. Refused where `fedavgm` is.

    Examples:
        >>> Nesterov().learning_rate
        0.7
    """

    name: ClassVar[str] = "nesterov"
    learning_rate: float = Field(default=0.7, gt=0)

    def _direction(self, d: Tensor, velocity: Tensor) -> Tensor:
        return d + self.momentum * velocity


class FedAdagrad(ServerOptimizer):
    """Adagrad at the server (2003.00295): v <- v + D^2; theta <- theta + learning_rate m / (sqrt(v) + tau).

    m <- beta1 m + (1 - beta1) D; with the paper's beta1 of 0 it is D. As in the paper's Algorithm 2, v begins at tau^2,
    squares are those of D (not of m), and nothing is corrected for its bias. m and v are kept in float64. Refused where
    `fedavgm` is.

    Examples:
        >>> FedAdagrad().beta1
        0.0
    """

    name: ClassVar[str] = "fedadagrad"
    learning_rate: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.0, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    def apply(
        self, adapter: Adapter, delta: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[Adapter, Mapping[str, Tensor]]:
        moments, step = dict(state), {}
        for name, d in delta.items():
            first, second = moments.get(f"first/{name}", d * 0), moments.get(f"second/{name}", d * 0 + self.tau**2)
            first = self.beta1 * first + (1 - self.beta1) * d
            second = self._second(second, d.square())
            moments[f"first/{name}"], moments[f"second/{name}"] = first, second
            step[name] = first / (second.sqrt() + self.tau)
        return _moved(adapter, step, self.learning_rate), moments

    def _second(self, second: Tensor, square: Tensor) -> Tensor:
        """Return the next v for the square of D."""
        return second + square

    def check(self, run: RunConfig) -> None:
        _needs_one_basis(self, run)


class FedAdam(FedAdagrad):
    """Adam at the server (2003.00295): v <- beta2 v + (1 - beta2) D^2.

    m <- beta1 m + (1 - beta1) D; theta <- theta + learning_rate m / (sqrt(v) + tau). A larger tau adapts less.

    Examples:
        >>> FedAdam().beta2
        0.99
    """

    name: ClassVar[str] = "fedadam"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)

    def _second(self, second: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * second + (1 - self.beta2) * square


class FedYogi(FedAdagrad):
    """Yogi at the server (2003.00295): v <- v - (1 - beta2) D^2 sign(v - D^2), so that v falls slowly.

    m <- beta1 m + (1 - beta1) D; theta <- theta + learning_rate m / (sqrt(v) + tau).

    Examples:
        >>> FedYogi(tau=1e-2).tau
        0.01
    """

    name: ClassVar[str] = "fedyogi"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)

    def _second(self, second: Tensor, square: Tensor) -> Tensor:
        return second - (1 - self.beta2) * square * (second - square).sign()


def _needs_one_basis(optimizer: ServerOptimizer, run: RunConfig) -> None:
    if reason := _needs_whole_steps(run):
        raise ConfigError(
            f"[server_optimizer] name = {optimizer.name!r} remembers past updates, but {reason}. Use fedavg with it."
        )


def _needs_whole_steps(run: RunConfig) -> str | None:
    rule = run.aggregation
    if rule.refactors:
        return f"[aggregation] name = {rule.name!r} changes the basis of the factors in every round"
    if rule.keeps_side:
        return f"[aggregation] name = {rule.name!r} leaves the rest of each step beside the adapter"
    return None


def _moved(adapter: Adapter, step: Mapping[str, Tensor], learning_rate: float) -> Adapter:
    """Return the adapter after the step; tensors that the step lacks stay as they are."""
    moved = {
        name: (adapter.tensors[name].double() + learning_rate * direction).to(adapter.tensors[name].dtype)
        for name, direction in step.items()
    }
    return adapter.with_tensors({**adapter.tensors, **moved})
