"""The tables of a run description, validated together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedit.config.explaining import explain
from fedit.interfaces import (
    Aggregation,
    ConfigError,
    Plugin,
    Template,
    did_you_mean,
    plugins,
)

P = TypeVar("P", bound=Plugin)

COLUMNS = ("instruction", "context", "response", "rejected", "category", "client", "system", "messages", "checks")
"""The columns a row can have; `[data] columns` maps foreign names to them."""


IDENTIFIERS = ("EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "US_SSN")
"""What `redact = "identifiers"` stands for."""


DType = Literal["auto", "float32", "bfloat16"]


class Table(BaseModel):
    """One table of the TOML file. TOML has no null: ``"none"`` stands for it where a key may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _none(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name or ""].annotation
        return None if value == "none" and type(None) in get_args(annotation) else value


def read_plugin(base: type[P], value: object) -> P:
    """Return the plug-in that a table, or a name, describes; raise ConfigError naming each wrong key."""
    try:
        return base.resolve(value)
    except ValidationError as error:
        name = value.get("name") if isinstance(value, Mapping) else value
        raise ConfigError(explain(error, plugins(base.kind)[str(name)], f"[{base.kind}] {name}: ")) from error


class ModelConfig(Table):
    """The frozen base model."""

    path: str = "builtin:cria"
    """A folder, a Hub name, or ``builtin:cria``."""
    dtype: DType = "auto"
    """Of the base and the activations; auto: bfloat16 where the hardware multiplies it. Adapters are float32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Of the base's linear layers, by bitsandbytes, on a CUDA GPU: 4 bits as in QLoRA (2305.14314), or 8."""


class RankRange(Table):
    """Ranks from `min` to `max`: drawn for each client, or by its rows, the fewest `min` and the most `max`."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)
    by: Literal["random", "rows"] = "random"

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class AdapterConfig(Table):
    """LoRA (2106.09685)."""

    rank: (
        Annotated[int, Field(ge=1)]
        | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
        | RankRange
    ) = 8
    """One rank for all; a list that the clients take in turn; or a range, ``{ min = 4, max = 16, by = "rows" }``. The
    global adapter has the largest."""
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names (or name endings) of the adapted layers; all-linear: every linear layer of the blocks, not the head."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError('expected "all-linear" or a list of layer names, e.g. ["q_proj", "v_proj"]')
        return value

    @property
    def max_rank(self) -> int:
        if isinstance(self.rank, int):
            return self.rank
        return self.rank.max if isinstance(self.rank, RankRange) else max(self.rank)


class DataConfig(Table):
    """Rows and how they become tokens."""

    path: str = "builtin:pasture"
    """A JSON, JSONL, CSV or Parquet file, a folder with one file per client, a Hub name, or ``builtin:pasture``."""
    test_path: str | None = None
    """Held-out rows; None: what the folder or Hub dataset names as its test split, else `test_per_category`."""
    test_per_category: int = Field(default=10, ge=1)
    """Rows of each category held out before the partition, where there is no test split."""
    columns: dict[str, str] = Field(default_factory=dict)
    """``{ instruction = "question", ... }``: the column that holds each part, where it has another name."""
    template: Annotated[SerializeAsAny[Template], BeforeValidator(lambda value: read_plugin(Template, value))] = Field(
        default_factory=lambda: Template.resolve("alpaca")
    )
    redact: tuple[str, ...] = ()
    """Personal identifiers to replace by what they are, in all rows: names of Presidio's entities that are found by a
    pattern (EMAIL_ADDRESS, PHONE_NUMBER, IBAN_CODE, ...), or ``"identifiers"`` for the usual ones."""
    deduplicate: bool = False
    """Leave out training rows that the same client has already. How many there are is reported in any case."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row at most: a longer one loses the end of its context, and is dropped where that is not enough."""

    @field_validator("redact", mode="before")
    @classmethod
    def _usual_identifiers(cls, value: object) -> object:
        if value == "identifiers":
            return IDENTIFIERS
        if isinstance(value, str):
            raise ValueError('expected "identifiers" or a list of names, e.g. ["EMAIL_ADDRESS"]')  # noqa: TRY004 (pydantic's)
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"unknown column {name!r}. {did_you_mean(name, COLUMNS)}")
        return columns


class ClientConfig(Table):
    """Local tuning at every client, on the mean loss per response token (or what `[objective]` makes of it)."""

    local_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps per round; a client goes on in its own data where the round before stopped."""
    local_epochs: int | None = Field(default=None, ge=1)
    """Passes over the client's data per round; exactly one of the two is given."""
    batch_size: int = Field(default=8, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate over the whole run, not over a round: linear and cosine fall to zero at its end."""
    moments: Literal["reset", "keep"] = "reset"
    """AdamW's, at a client from one of its rounds to the next: start afresh, or go on (private state, on its disk)."""
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    """L2 bound of a step's gradient over all adapter tensors of the client; ``"none"``: unbounded."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError('give exactly one of local_steps and local_epochs (local_epochs = "none" unsets it)')
        return self

    @model_validator(mode="after")
    def _moments_of_adamw(self) -> Self:
        if self.optimizer == "sgd" and self.moments == "keep":
            raise ValueError('moments = "keep" is for adamw: sgd has none')
        return self

    def num_steps(self, num_examples: int) -> int:
        """Return the optimizer steps per round of a client with `num_examples` rows."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * -(-num_examples // self.batch_size)


class CohortConfig(Table):
    """The clients sampled in each round."""

    sampling: Literal["uniform", "weighted", "poisson", "round_robin"] = "uniform"
    """uniform: so many without replacement; weighted: the same, drawn in proportion to their rows (an aggregation that
    weights by rows as well counts them twice); poisson: each client by itself, with this probability, so that cohorts
    vary and may be empty; round_robin: the next so many in client order, over and over."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    size: int | None = Field(default=None, ge=1)
    """Fraction or number of the clients; neither: all of them."""
    availability: Annotated[float, Field(gt=0, le=1)] | dict[str, tuple[tuple[int, int], ...]] = 1.0
    """The clients that a round can draw: each is online with this probability, or in the rounds of a trace, which may
    be a JSON file: ``{"client": [[first, last], ...], ...}``, counted from 1. Who is not in it is always online."""
    min_updates: int = Field(default=1, ge=1)
    """Fewer usable updates than this end the run."""

    @field_validator("availability", mode="before")
    @classmethod
    def _read_trace(cls, value: object) -> object:
        """Read the file, so that the run's description holds the trace itself."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"the trace {value} cannot be read: {error}") from error

    @field_validator("availability")
    @classmethod
    def _rounds_in_order(cls, value: object) -> object:
        for client, ranges in value.items() if isinstance(value, dict) else ():
            for first, last in ranges:
                if not 1 <= first <= last:
                    raise ValueError(f"client {client!r}: rounds {first} to {last} are no range counted from 1")
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError('give fraction or size, not both (fraction = "none" unsets it)')
        if self.size is not None and self.min_updates > self.size:
            raise ValueError(f"min_updates = {self.min_updates} can never be reached by a cohort of {self.size}")
        return self

    def num_sampled(self, num_clients: int) -> int:
        """Return the cohort's size among `num_clients`, at least 1 (of Poisson sampling, about the mean size)."""
        if self.size is not None:
            return self.size
        return max(1, round((1.0 if self.fraction is None else self.fraction) * num_clients))

    def expected_share(self, num_clients: int) -> float:
        """Return the share of `num_clients` that a cohort has, or is expected to have: a client's probability."""
        if self.sampling == "poisson" and self.fraction is not None:
            return self.fraction
        return self.num_sampled(num_clients) / num_clients


class CodecConfig(Table):
    """How messages are compressed, in one direction: a mask, a quantizer, and what is made up for later."""

    mask: Literal["dense", "top-k", "seeded", "round-robin"] = "dense"
    """The numbers that travel: all; the largest; as many drawn in each round; or equal segments, each once in a pass.
    top-k sends their positions too, the last two are the same for all clients and follow from the round."""
    density: float = Field(default=1.0, gt=0, le=1)
    """The share of the numbers that travel, with another mask than dense."""
    quantizer: Literal["fp32", "bf16", "int8", "int4", "2-bit", "sign"] = "fp32"
    """Of each number; from int8 on with a bfloat16 scale for every 256 of them."""
    error_feedback: Literal["auto"] | bool = "auto"
    """Add what was left out or rounded to the sender's next message, and round to nearest; without it, integers are
    rounded at random with the right mean. auto: wherever the aggregation keeps the factors' basis."""

    @model_validator(mode="after")
    def _mask_fits(self) -> Self:
        if (self.mask == "dense") != (self.density == 1):
            raise ValueError("a density below 1 needs another mask than dense, and the other way round")
        if self.mask == "round-robin" and abs(round(1 / self.density) * self.density - 1) > 0.01:
            raise ValueError(
                f"segments are of equal size: round-robin needs a density of 1/2, 1/3, ..., not {self.density}"
            )
        return self

    @property
    def is_plain(self) -> bool:
        """Whether float32 tensors travel as they are."""
        return self.mask == "dense" and self.quantizer == "fp32"

    def feeds_back(self, aggregation: Aggregation) -> bool:
        """Tell whether errors are made up for."""
        return not aggregation.refactors if self.error_feedback == "auto" else self.error_feedback


class EvaluationConfig(Table):
    """What is measured on the held-out rows."""

    every: int = Field(default=1, ge=0)
    """Rounds between two measurements of the global adapter's held-out loss; 0: only at the end."""
    baselines: bool = True
    """Train and evaluate local-only and centralised models at the same token budget."""
    max_new_tokens: int = Field(default=64, ge=0)
    """Of a generated answer; 0: measure losses only."""
    unseen_clients: float = Field(default=0.0, ge=0, lt=1)
    """The share of the clients, drawn from the seed, that no model of the run is trained on; all models are measured on
    up to 20 rows of each."""
    unseen_categories: tuple[str, ...] = ()
    """Categories whose rows no model of the run is trained on, and all models are measured on."""


class EngineConfig(Table):
    """Where the clients live."""

    name: Literal["simulation"] = "simulation"
    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Clients tuned at the same time; auto: as many as fill the batches, if memory holds them."""
    memory_gb: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Memory that tuning may take, in 10^9 bytes; auto: half of the machine's, or nine tenths of the GPU's."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward pass instead of keeping them; auto: where they do not fit."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds that the sites of a real federation have for a round; who has not answered by then is a failure of it."""
    absent_s: float = Field(default=120.0, gt=0)
    """Seconds after which a site that cannot be reached is given up for the round."""
    merge_clients: bool = False
    """A real site sends the mean of its clients' updates and not each: less travels, the server sees none of several
    clients alone, and what the mean of the factors loses within sites (`aggregation_loss`) is unknown."""
    join_s: float = Field(default=600.0, gt=0)
    """Seconds that the sites have to join, from the start of a run, with their models loaded."""
