"""The vocabulary and the extension points, on one page.

Values that travel:      Example -> EncodedExample;  ClientTask -> ClientUpdate | ClientFailure -> Aggregate
Extension points:        Template, Partition, Objective, Attack, Aggregation, ServerOptimizer (each a `Plugin`); Engine
Errors, one tree:        FeditError > ConfigError, DataError, RoundError, EngineError (`fedit.errors`)
Randomness, one source:  derive_rng(seed, purpose, ...) (`fedit.randomness`)

What travels is an `Adapter`, LoRA tensors by name; ``lora_A`` and ``lora_B`` are its factors (`fedit.adapter`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from fedit.adapter import FACTORS, Adapter
from fedit.errors import ConfigError, DataError, EngineError, FeditError, RoundError, did_you_mean
from fedit.plugin import Plugin, plugin_kinds, plugins
from fedit.randomness import derive_rng, derive_seed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fedit.lowrank import LowRank

__all__ = [
    "FACTORS",
    "Adapter",
    "Aggregate",
    "Aggregation",
    "Attack",
    "ClientFailure",
    "ClientTask",
    "ClientUpdate",
    "ConfigError",
    "DataError",
    "EncodedExample",
    "Engine",
    "EngineError",
    "Example",
    "FeditError",
    "Objective",
    "Partition",
    "Plugin",
    "RoundError",
    "Segment",
    "ServerOptimizer",
    "Template",
    "Turn",
    "derive_rng",
    "derive_seed",
    "did_you_mean",
    "plugin_kinds",
    "plugins",
]


# -------------------------------------------------------------------------------------------------- rows and tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: what the user asks (with an optional context to work on) and what the model should answer."""

    instruction: str
    response: str
    context: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its turns (one, except for chats) and what is known about it."""

    turns: tuple[Turn, ...]
    category: str = "uncategorised"
    system: str = ""
    client: str | None = None
    """The client that the data itself names (a column, or one file per client); used by the natural partition."""
    rejected: str | None = None
    """An answer that the last response is preferred to."""
    checks: Mapping[str, Any] | None = None
    """How a program verifies any generated answer (`fedit.evaluation.checks`); None: compare with the response."""
    source: str = ""
    """Where the row came from, e.g. ``data/train.jsonl:17``."""

    @property
    def response(self) -> str:
        """The last response: what generation is compared with."""
        return self.turns[-1].response


@dataclass(frozen=True, slots=True, eq=False)
class EncodedExample:
    """An example as token ids; every supervised position is part of a response or its end-of-sequence token."""

    input_ids: np.ndarray
    """int32 [T]"""
    supervised: np.ndarray
    """bool [T]: the loss is taken on predicting these tokens"""
    example: Example
    rejected: EncodedExample | None = None
    """The same prompt with the rejected response, where preferences are trained on."""
    reference_margin: float = 0.0
    """How much the frozen base prefers the response to the rejected one: the difference of their log-likelihoods."""

    @property
    def num_supervised(self) -> int:
        return int(self.supervised.sum())

    @property
    def num_trained(self) -> int:
        """Tokens that a pass over the row takes, those of its rejected response's row included."""
        return len(self) + (0 if self.rejected is None else len(self.rejected))

    @property
    def prompt_ids(self) -> np.ndarray:
        """Everything before the last response, int32: what generation starts from."""
        last_unsupervised = np.flatnonzero(~self.supervised)[-1]
        return self.input_ids[: last_unsupervised + 1]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of rendered text. A supervised segment is a response; the tokenizer's EOS is added where it lacks it."""

    text: str
    supervised: bool


# --------------------------------------------------------------------------------------------------- what travels


@dataclass(frozen=True, slots=True, eq=False)
class ClientTask:
    """What the server asks of one client: tune the received adapter in this round."""

    client: str
    round_index: int
    adapter: Adapter
    """The received adapter, of this client's own rank."""
    num_earlier: int = 0
    """Earlier rounds that sampled this client: it goes on in its rows where the last of them stopped."""
    control: Mapping[str, Tensor] = field(default_factory=dict)
    """The mean of all clients' control variates, by tensor name; empty: there are none, or they are zero."""
    step: bytes = b""
    """The compressed message that the global adapter moved by in the last round, for who has the one before it."""
    epsilon: float | None = None
    """What the client's privacy has cost after this round, as the server accounts for it; None: it gives none."""


@dataclass(frozen=True, slots=True, eq=False)
class ClientUpdate:
    """What a client returns."""

    client: str
    update: Adapter
    """tuned adapter - received adapter, the tensors that the aggregation shares in this round"""
    num_examples: int
    """Rows the client holds (the weight of FedAvg)."""
    num_tokens: int
    """Tokens trained on in this round, without padding, repeated passes counted."""
    loss: float
    """Mean training loss per response token over the round's steps, nats."""
    num_steps: int
    """Optimizer steps taken in this round."""
    control_step: Mapping[str, Tensor] = field(default_factory=dict)
    """What the client's control variate changed by; empty: it has none."""
    others: tuple[str, ...] = ()
    """Clients that it stands for as well: it is the mean of all their updates, and its counts are their sums."""
    message: bytes | None = None
    """The compressed message that the update came in; None: it came as float32 tensors."""
    epsilon: float | None = None
    """What the client's privacy has cost it by now, where it adds the noise itself; it is not sent."""
    num_bytes: int | None = None
    """All that came for it, where that is neither the message nor float32 tensors."""
    noise_shares: float = 0.0
    """Variance of the noise that it has from its clients, in parts of what was promised"""


@dataclass(frozen=True, slots=True)
class ClientFailure:
    """A client that returned nothing usable; a value, recorded in the round."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What an aggregation made of a round's updates."""

    delta: Mapping[str, Tensor]
    """The pseudo-gradient by tensor name, float64: what the server optimizer adds to the global adapter. A tensor that
    is left out stays as it is."""
    side_step: Mapping[str, LowRank] = field(default_factory=dict)
    """What is added to the adapter's side; all clients have to be sent it"""
    replaces_side: bool = False
    """Whether `side_step` takes the place of the side instead"""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """``aggregation_loss``: ||M - what was kept||_F / ||M||_F over all layers, with M = sum_k p_k s_k B_k A_k"""


class Engine(Protocol):
    """Where clients live. The server loop sees nothing else of them."""

    def clients(self) -> Mapping[str, int]:
        """Every registered client and the rows that it says it holds, in a fixed order."""
        ...

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield one result per task, in any order, as clients finish."""
        ...


# ------------------------------------------------------------------------------------------------------- plug-ins


class Template(Plugin):
    """How an example becomes text: prompt and response segments in order."""

    kind: ClassVar[str] = "template"
    special_tokens: ClassVar[bool] = False
    """Whether the rendered text spells special tokens, BOS included (chat templates). Otherwise a special token's
    text in a row stays text, and the tokenizer's BOS is added."""

    def render(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        """Return the segments. The last is supervised; joining the texts before it gives the prompt of generation."""
        raise NotImplementedError

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Return Jinja text that renders chats so, for others; BOS is put before it. None: others have none."""
        return None


class Partition(Plugin):
    """Who owns which example."""

    kind: ClassVar[str] = "partition"

    def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the indices into `examples` of every client by its name; disjoint, none empty.

        Raises:
            DataError: the examples cannot be split so (too few rows, one category only, no client column).
        """
        raise NotImplementedError


class Attack(Plugin):
    """What malicious clients do, in simulation. A member overrides `poison`, `tamper`, or both."""

    kind: ClassVar[str] = "attack"
    clients: float | tuple[str, ...] = 0.2
    """The malicious clients: a share of all, drawn from the seed, or their names"""

    def malicious(self, clients: Sequence[str], seed: int) -> list[str]:
        """Return who is malicious, in client order.

        Raises:
            ConfigError: a name is no client's, or the share is none.
        """
        if isinstance(self.clients, tuple):
            for name in self.clients:
                if name not in clients:
                    raise ConfigError(f"[attack] clients: no client is named {name!r}. {did_you_mean(name, clients)}")
            return [client for client in clients if client in self.clients]
        if not 0 <= self.clients <= 1:
            raise ConfigError(f"[attack] clients = {self.clients}: expected names, or a share between 0 and 1.")
        count = round(self.clients * len(clients))
        if not count and self.clients:
            raise ConfigError(f"[attack] clients = {self.clients} of {len(clients)} clients is nobody. Raise it.")
        chosen = derive_rng(seed, "malicious").choice(len(clients), count, replace=False)
        return [clients[int(index)] for index in sorted(chosen)]

    def poison(self, examples: Sequence[Example], rng: np.random.Generator) -> Sequence[Example]:
        """Return what a malicious client trains on in place of its `examples`."""
        return examples

    def tamper(
        self, received: Mapping[str, Tensor], update: Mapping[str, Tensor], rng: np.random.Generator
    ) -> Mapping[str, Tensor]:
        """Return what a malicious client sends in place of its `update` of the adapter that it received."""
        return update

    def probes(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return held-out rows whose response is what the attack wants of the model; none: it wants no answer."""
        return ()


class Objective(Plugin):
    """What a client minimises: the loss of its responses, and what the members below add or put in its place."""

    kind: ClassVar[str] = "objective"
    control_variates: ClassVar[bool] = False
    """Whether gradients are corrected by control variates, which the clients and the server keep."""
    preferences: ClassVar[bool] = False
    """Whether rows have a rejected response too, and `preference_loss` takes the place of the loss."""

    @property
    def pull(self) -> float:
        """The strength p of ``p / 2 ||x - x_0||^2``, which is added to the loss; x_0 is what the round starts from."""
        return 0.0

    @property
    def personal_pull(self) -> float | None:
        """The same of each client's own model, trained beside the shared one; None: there is none."""
        return None

    @property
    def shrinkage(self) -> float:
        """The strength l of ``l sum ||B'||_F ||A'||_F`` over the layers, which is added to the loss; A' and B' are the
        components after the first `kept_rank`.
        """
        return 0.0

    def kept_rank(self, rank: int) -> int:
        """Return the rank that a client's adapter of `rank` is cut to once the components after it have shrunk."""
        return rank

    def preference_loss(self, margin: Tensor) -> Tensor:
        """Return the loss of every row by its margin, float64 [rows].

        The margin is how much more than the base the model prefers the response to the rejected one:
        ``(log p(chosen) - log p_0(chosen)) - (log p(rejected) - log p_0(rejected))``, nats, summed over tokens.
        """
        raise NotImplementedError


class Aggregation(Plugin):
    """Many updates -> one. Computes in float64, in the order in which the updates come (client order)."""

    kind: ClassVar[str] = "aggregation"
    mixed_ranks: ClassVar[bool] = False
    """Whether clients may train adapters of different ranks."""
    refactors: ClassVar[bool] = False
    """Whether A and B come back in another basis, so that no state may refer to the old one."""
    keeps_side: ClassVar[bool] = False
    """Whether part of what was learned goes beside the adapter, so that only the whole step means anything."""
    rotation_invariant: ClassVar[bool] = False
    """Whether a client may turn its factors, (B Q, Q^T A) with orthogonal Q, without changing what comes out."""
    sparse: ClassVar[bool] = False
    """Whether clients move few of the numbers, so that messages name these only, in both directions."""
    sums: ClassVar[bool] = False
    """Whether sums of updates and weights suffice, so that one update may stand for many clients."""
    robust: ClassVar[bool] = False
    """Whether the result is no weighted mean, so that an update may count for nothing, and each has to be seen."""

    @property
    def ranks_kept(self) -> float:
        """The share of the components of all layers that a client sends, those that changed the product most."""
        return 1.0

    def initial(self, adapter: Adapter, weight: Callable[[str], Tensor], rng: np.random.Generator) -> Adapter:
        """Return what the first round starts from: the untrained `adapter`, or one made of it.

        `weight` gives the frozen weight [m, n] of a module, float32.
        """
        return adapter

    def trained(self, round_index: int) -> Collection[str]:
        """Return the factors that clients train in a round."""
        return FACTORS

    def shared(self, round_index: int) -> Collection[str]:
        """Return those of them that travel. The rest is each client's own and stays with it."""
        return self.trained(round_index)

    def returned(self, round_index: int) -> Collection[str]:
        """Return the factors whose new values clients must be sent once a round is aggregated."""
        return self.shared(round_index)

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        """Combine a round's updates to the global `adapter`; consumes `updates` one by one.

        `rng` is of this round alone, for rules that draw.
        """
        raise NotImplementedError


class ServerOptimizer(Plugin):
    """How the server moves the global adapter along the aggregate."""

    kind: ClassVar[str] = "server_optimizer"

    def apply(
        self, adapter: Adapter, delta: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[Adapter, Mapping[str, Tensor]]:
        """Return the next global adapter and optimizer state; `state` is empty in the first round."""
        raise NotImplementedError
