"""Updates as integers that can be added up exactly, modulo 2^32, and noise that is added in shares.

With C the clip norm, W the largest weight, K the clients of the round and D the grid's step, a client's numbers are

    q = round( min(1, C / ||x||) x * min(w, W) / (W D) ),      D = 2 R / 2^32

so that whatever K clients send that clip, no number of their sum leaves [-R, R), and it is decoded without loss. R is
(K + 1) C, and 20 times the noise. What rounding loses is D / 2 for each client and number at most, that is 2.3e-10 K C
without noise. With noise it is towards zero, so that ||q|| D <= C.

Noise (*distributed* differential privacy): each party adds discrete Gaussian noise of variance (z C)^2 / (t - 1) on the
grid, t of them being enough for a sum. Such sums are discrete Gaussian again but for exp(-pi^2 s^2), s being the
deviation of a share in steps (2102.06387, theorem 1), and so have variance (z C)^2 at least, whoever drops out, also
for a party that takes its own share off.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedit.codec import Message
from fedit.config import RunConfig
from fedit.interfaces import Adapter, ClientUpdate, ConfigError, RoundError
from fedit.privacy import clip

if TYPE_CHECKING:
    from torch import Tensor

Uniform = Callable[[int], np.ndarray]
"""Draws numbers in [0, 1), float64 [size]"""

COUNTS = ("clients", "weight", "clipped", "steps", "tokens", "loss")
"""What is added up beside the updates, modulo 2^64"""
LOSS_STEP = 2.0**-20
"""Of the sum of losses of tokens, nats"""
FINEST = 1000.0
"""Least standard deviation of a share of noise, in steps of the grid; what a server makes coarser is refused."""


@dataclass(frozen=True)
class Encoding:
    """How the clients of a round write their updates, which follows from the run's description and their number."""

    clip_norm: float
    max_weight: int
    """W"""
    step: float
    """D"""
    weighting: str
    noise: float
    """z: standard deviation of the noise of all parties together, in clip norms; 0: they add none"""
    only_updates: bool
    """Whether nothing exact may be told beside the updates"""

    @classmethod
    def of(cls, run: RunConfig, num_clients: int, noise: float) -> Encoding:
        """Return the encoding of a round with so many clients."""
        secure = run.secure_sums
        assert secure is not None
        bound = secure.clip_norm_of(run)
        largest = bound * (num_clients + 1 + 20 * noise)
        weighting = getattr(run.aggregation, "weighting", "uniform")
        max_weight = 1 if weighting == "uniform" else secure.max_weight or 1
        return cls(bound, max_weight, 2 * largest / 2**32, weighting, noise, run.privacy is not None)

    def weight_of(self, result: ClientUpdate) -> int:
        """Return a client's weight, at most W."""
        weight = {"examples": result.num_examples, "tokens": result.num_tokens, "uniform": 1}[self.weighting]
        return min(weight, self.max_weight)

    def noise_deviation(self, threshold: int) -> float:
        """Return the deviation of a party's share of the noise, in steps, when `threshold` parties are enough.

        Raises:
            ConfigError: it is coarser than a party agrees to.
        """
        deviation = self.noise * self.clip_norm / self.step / math.sqrt(max(1, threshold - 1))
        if self.noise and not deviation >= FINEST:
            raise ConfigError(
                f"secure aggregation: the grid is too coarse, a share of the noise is {deviation:.0f} steps wide: "
                f"expected {FINEST:.0f} or more. Sample fewer clients in a round."
            )
        return deviation


@dataclass(eq=False)
class PartySum:
    """The sum of the updates of a party's clients, as they are added one by one."""

    encoding: Encoding
    shapes: Mapping[str, torch.Size]
    """Of the tensors that travel, in their order"""
    tells_losses: bool = True
    """Whether the numbers of tokens and their losses are added up too"""
    clients: list[str] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(COUNTS), "<u8"))
    epsilon: float | None = None
    """The largest that the clients' own noise has cost one of them; it is not sent."""
    num_tokens: int = 0
    loss_sum: float = 0.0
    """Of these tokens, nats; neither is sent but among the counts"""

    def __post_init__(self) -> None:
        self.numbers = np.zeros(sum(shape.numel() for shape in self.shapes.values()), "<u4")

    def add(self, result: ClientUpdate) -> None:
        """Add a client's update."""
        encoding = self.encoding
        clipped, norm = clip({name: result.update.tensors[name] for name in self.shapes}, encoding.clip_norm)
        weight = encoding.weight_of(result)
        factor = weight / (encoding.max_weight * encoding.step)
        start = 0
        for tensor in clipped.values():
            steps = tensor.flatten() * factor
            steps = steps.trunc_() if encoding.noise else steps.round_()  # with noise, its norm must not grow
            self.numbers[start : start + len(steps)] += steps.long().numpy().astype("<u4")
            start += len(steps)
        told = [1, weight, 0, 0, 0, 0]
        if not encoding.only_updates:
            told[2:4] = int(norm > encoding.clip_norm), result.num_steps
            if self.tells_losses:
                told[4:] = result.num_tokens, min(2**53, round(max(0.0, result.loss) * result.num_tokens / LOSS_STEP))
        self.counts += np.array(told, "<u8")
        self.clients.append(result.client)
        self.num_tokens += result.num_tokens
        self.loss_sum += result.loss * result.num_tokens
        if result.epsilon is not None:
            self.epsilon = max(result.epsilon, self.epsilon or 0.0)

    def add_nothing(self, client: str) -> None:
        """Let a client that failed take part with an update of zero: with noise, that it failed is nobody's to know."""
        self.counts[:2] += np.array([1, self.encoding.max_weight], "<u8")
        self.clients.append(client)

    def add_noise(self, threshold: int, uniform: Uniform) -> None:
        """Add the party's share of the noise."""
        deviation = self.encoding.noise_deviation(threshold)
        if not deviation:
            return
        for start in range(0, len(self.numbers), 1 << 20):
            part = self.numbers[start : start + (1 << 20)]
            part += discrete_gaussian(deviation, len(part), uniform).astype("<u4")


@dataclass(frozen=True, eq=False)
class MaskedSum:
    """What a party sends in place of its clients' updates."""

    party: str
    clients: Sequence[str]
    """Whose updates it is the sum of, in the order of the tasks"""
    payload: Message
    epsilon: float | None = None
    """The largest that the clients' own noise has cost one of them"""
    num_tokens: int = 0
    loss_sum: float = 0.0
    """Of these tokens, nats. A simulation shows all three; a real party tells none of them."""


def task_of(run: str, round_index: int, clients: int, registered: int, adapter: str) -> str:
    """Return the name of what parties are asked: of a run and an adapter, by their fingerprints, of so many clients in
    the round and in the run.
    """
    return hashlib.sha256(json.dumps([run, round_index, clients, registered, adapter]).encode()).hexdigest()


def decode(
    encoding: Encoding, clients: Sequence[str], counts: np.ndarray, numbers: np.ndarray, shared: Adapter
) -> ClientUpdate:
    """Return the mean of the `clients`' updates that a sum is of; `shared` has the names and shapes.

    Raises:
        RoundError: the counts are no sum of what these clients can have sent.
    """
    told = dict(zip(COUNTS, counts.tolist(), strict=True))
    most = len(clients) * encoding.max_weight
    if told["clients"] != len(clients) or not (most if encoding.max_weight == 1 else 0) <= told["weight"] <= most:
        raise RoundError(
            f"a secure sum of {len(clients)} clients has counts of {told['clients']} clients and a weight of "
            f"{told['weight']}: a party sent nonsense."
        )
    tensors: dict[str, Tensor] = {}
    factor = encoding.step * encoding.max_weight / max(1, told["weight"])
    start = 0
    for name, tensor in shared.tensors.items():
        part = numbers[start : start + tensor.numel()].view("<i4")
        tensors[name] = torch.from_numpy(part.astype(np.float64) * factor).float().view(tensor.shape)
        start += tensor.numel()
    tokens = told["tokens"]
    return ClientUpdate(
        client=clients[0],
        update=shared.with_tensors(tensors),
        num_examples=told["weight"] if encoding.weighting == "examples" else told["clients"],
        num_tokens=tokens,
        loss=told["loss"] * LOSS_STEP / max(1, tokens),
        num_steps=max(1, told["steps"]),
        others=tuple(clients[1:]),
    )


def discrete_gaussian(deviation: float, size: int, uniform: Uniform) -> np.ndarray:
    """Return integers of probability proportional to exp(-x^2 / (2 deviation^2)), int64 [size].

    Rejection from a discrete Laplace distribution of scale t = floor(deviation) + 1 (2004.00010, algorithm 3), with the
    probabilities in float64.

    Examples:
        >>> discrete_gaussian(1e-3, 3, np.random.default_rng(0).random).tolist()
        [0, 0, 0]
    """
    scale = math.floor(deviation) + 1
    drawn = np.zeros(0, np.int64)
    while len(drawn) < size:
        count = 2 * (size - len(drawn)) + 16
        numbers = uniform(3 * count).reshape(3, count)
        magnitude = np.floor(-scale * np.log1p(-numbers[0])).astype(np.int64)
        negative = numbers[1] < 0.5
        bias = deviation**2 / scale
        kept = numbers[2] < np.exp(-((magnitude - bias) ** 2) / (2 * deviation**2))
        kept &= ~(negative & (magnitude == 0))  # zero once, not twice
        drawn = np.concatenate([drawn, np.where(negative, -magnitude, magnitude)[kept]])
    return drawn[:size]
