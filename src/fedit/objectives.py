"""Local objectives: what a client minimises in a round, and what of it stays with the client.

An objective says what it adds to the mean loss of the response tokens, or puts in its place; the tuner does it for all
clients of the stack at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedit.interfaces import FACTORS, ConfigError, Objective, plugins

if TYPE_CHECKING:
    from torch import Tensor

    from fedit.config import RunConfig


class Plain(Objective):
    """The mean negative log-likelihood of the response tokens, and nothing else.

    Examples:
        >>> Plain().pull
        0.0
    """

    name: ClassVar[str] = "plain"


class FedProx(Objective):
    """Add mu / 2 ||x - x_received||^2, over all trained tensors of the adapter (1812.06127).

    Clients drift less from what they received. It moves the factors, not the product: (c B, A / c) is farther away.

    Examples:
        >>> FedProx(mu=0.1).pull
        0.1
    """

    name: ClassVar[str] = "fedprox"
    mu: float = Field(default=0.01, ge=0)

    @property
    def pull(self) -> float:
        return self.mu


class Scaffold(Objective):
    """Add c - c_k to every gradient: control variates that correct where this client goes by where all go (1910.06378).

    After a round, c_k <- c_k - c + (x_received - x) / (sum of its learning rates) (the paper's option II), and
    c <- c + (1 / N) sum_k of these changes, N being all clients. c_k stays at the client, c and the changes travel:
    twice the bytes. It is derived for SGD without a clip: the change of x has to be the sum of the gradients.

    Examples:
        >>> Scaffold().control_variates
        True
    """

    name: ClassVar[str] = "scaffold"
    control_variates: ClassVar[bool] = True

    def check(self, run: RunConfig) -> None:
        if run.client.optimizer != "sgd":
            raise ConfigError(
                '[objective] name = "scaffold" is derived for SGD: AdamW\'s steps are not its gradients. Use [client] '
                'optimizer = "sgd".'
            )
        if run.client.clip_norm is not None or run.client.weight_decay:
            raise ConfigError(
                '[objective] name = "scaffold" needs steps that are sums of gradients. Use [client] clip_norm = "none" '
                "and weight_decay = 0."
            )
        rule = run.aggregation
        if (
            rule.refactors
            or set(rule.trained(0)) != set(rule.shared(0))
            or set(rule.trained(0)) != set(rule.trained(1))
        ):
            raise ConfigError(
                f'[objective] name = "scaffold" keeps gradients from one round to the next, but [aggregation] name = '
                f"{rule.name!r} changes the factors' basis, or which of them are trained or shared. Use fedit."
            )
        _needs_equal_ranks(self.name, run)


class Ditto(Objective):
    """Beside the shared model, tune one of the client's own, drawn to the shared one (2012.04221).

    The client minimises its loss plus strength / 2 ||v - x_received||^2 over its own adapter v, which goes on from its
    last round and never travels; the federation is the plain one. Twice the training, evaluated both ways. AdamW starts
    afresh in every round of v.

    Examples:
        >>> Ditto(strength=0.5).personal_pull
        0.5
    """

    name: ClassVar[str] = "ditto"
    strength: float = Field(default=0.1, ge=0)

    @property
    def personal_pull(self) -> float | None:
        return self.strength

    def check(self, run: RunConfig) -> None:
        _needs_equal_ranks(self.name, run)
        rule = run.aggregation
        if rule.refactors or rule.keeps_side or not set(rule.trained(0)) == set(rule.shared(0)) == set(FACTORS):
            raise ConfigError(
                f'[objective] name = "ditto" keeps adapters of clients beside the shared one, but [aggregation] name = '
                f"{rule.name!r} changes the factors' basis, or does not train and share both. Use fedit."
            )


class SelfPruning(Objective):
    """Add strength sum ||B'||_F ||A'||_F over the layers, and give up A', B' where that sum fell (2401.06432).

    A', B' are the last components of a client's factors, those after the first keep r_k of r_k. If a round ends with
    the sum below that of what was received, the client returns the other components alone, and is sent no more from
    then on: clients find their ranks themselves. One component stays; what the others held is lost. With B = 0 the
    sum is zero, so nobody prunes in the first round. It is HetLoRA's, and works with every rule for mixed ranks.

    Examples:
        >>> SelfPruning(keep=0.5).kept_rank(8), SelfPruning(keep=0.9).kept_rank(8), SelfPruning().kept_rank(1)
        (4, 7, 1)
    """

    name: ClassVar[str] = "self-pruning"
    strength: float = Field(default=0.01, ge=0)
    keep: float = Field(default=0.75, gt=0, lt=1)

    @property
    def shrinkage(self) -> float:
        return self.strength

    def kept_rank(self, rank: int) -> int:
        return max(1, math.floor(self.keep * rank + 1e-9))

    def check(self, run: RunConfig) -> None:
        rule = run.aggregation
        if not rule.mixed_ranks:
            able = [name for name, plugin in plugins("aggregation").items() if getattr(plugin, "mixed_ranks", False)]
            raise ConfigError(
                f'[objective] name = "self-pruning" gives clients different ranks, and [aggregation] name = '
                f"{rule.name!r} needs equal ones. Use one of: {', '.join(able)}."
            )
        if run.client.moments == "keep" or not run.upload.is_plain:
            raise ConfigError(
                '[objective] name = "self-pruning" changes the shape of an adapter, so that nothing can be kept for '
                'its next round, nor a message be read that does not say its shape. Use [client] moments = "reset", '
                "and leave [upload] out."
            )


class DPO(Objective):
    """Direct preference optimisation (2305.18290) on rows with a response and a rejected one.

    -log sigmoid(beta ((log p(chosen) - log p_0(chosen)) - (log p(rejected) - log p_0(rejected)))), the mean over the
    rows of a batch; log p sums over the response tokens, and p_0 is the frozen base, which is at hand anyway. Two
    passes through the base: the first without gradients says how much each response counts.

    Examples:
        >>> import torch
        >>> float(DPO(beta=0.1).preference_loss(torch.tensor(0.0)))  # the log of 2
        0.6931471824645996
    """

    name: ClassVar[str] = "dpo"
    preferences: ClassVar[bool] = True
    beta: float = Field(default=0.1, gt=0)

    def preference_loss(self, margin: Tensor) -> Tensor:
        return -logsigmoid(self.beta * margin)


def _needs_equal_ranks(name: str, run: RunConfig) -> None:
    if not isinstance(run.adapter.rank, int):
        raise ConfigError(f"[objective] name = {name!r} needs clients of equal rank: give [adapter] rank a number.")
