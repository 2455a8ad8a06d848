"""The run description: TOML and overrides -> one frozen `RunConfig`, validated once, before anything is loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

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

from fedit.interfaces import (
    Aggregation,
    ConfigError,
    FeditError,
    Partition,
    Plugin,
    ServerOptimizer,
    Template,
    did_you_mean,
    plugins,
)

P = TypeVar("P", bound=Plugin)

COLUMNS = ("instruction", "context", "response", "category", "client", "system", "messages", "checks")
"""The columns a row can have; `[data] columns` maps foreign names to them."""


DType = Literal["auto", "float32", "bfloat16"]


class Table(BaseModel):
    """One table of the TOML file. TOML has no null: ``"none"`` stands for it where a key may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _none(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name or ""].annotation
        return None if value == "none" and type(None) in get_args(annotation) else value


class ModelConfig(Table):
    """The frozen base model."""

    path: str = "builtin:cria"
    """A folder, a Hub name, or ``builtin:cria``."""
    dtype: DType = "auto"
    """Of the base and the activations; auto: bfloat16 where the hardware multiplies it. Adapters are float32."""


class AdapterConfig(Table):
    """LoRA (2106.09685)."""

    rank: Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = 8
    """One rank for all, or a list that the clients take in turn (the global adapter has the largest)."""
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names (or name endings) of the adapted layers; all-linear: every linear layer of the blocks, not the head."""

    @property
    def max_rank(self) -> int:
        return self.rank if isinstance(self.rank, int) else max(self.rank)


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
    template: Annotated[SerializeAsAny[Template], BeforeValidator(lambda value: _plugin(Template, value))] = Field(
        default_factory=lambda: Template.resolve("alpaca")
    )
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row at most: a longer one loses the end of its context, and is dropped where that is not enough."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"unknown column {name!r}. {did_you_mean(name, COLUMNS)}")
        return columns


class ClientConfig(Table):
    """Local tuning at every client: AdamW on the mean loss per response token."""

    local_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps per round; a client goes on in its own data where the round before stopped."""
    local_epochs: int | None = Field(default=None, ge=1)
    """Passes over the client's data per round; exactly one of the two is given."""
    batch_size: int = Field(default=8, ge=1)
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

    def num_steps(self, num_examples: int) -> int:
        """Return the optimizer steps per round of a client with `num_examples` rows."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * -(-num_examples // self.batch_size)


class CohortConfig(Table):
    """The clients sampled, uniformly without replacement, in each round."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    size: int | None = Field(default=None, ge=1)
    """Fraction or number of the clients; neither: all of them."""
    min_updates: int = Field(default=1, ge=1)
    """Fewer usable updates than this end the run."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError('give fraction or size, not both (fraction = "none" unsets it)')
        if self.size is not None and self.min_updates > self.size:
            raise ValueError(f"min_updates = {self.min_updates} can never be reached by a cohort of {self.size}")
        return self

    def num_sampled(self, num_clients: int) -> int:
        """Return the cohort's size among `num_clients`, at least 1."""
        if self.size is not None:
            return self.size
        return max(1, round((1.0 if self.fraction is None else self.fraction) * num_clients))


class EvaluationConfig(Table):
    """What is measured on the held-out rows."""

    every: int = Field(default=1, ge=0)
    """Rounds between two measurements of the global adapter's held-out loss; 0: only at the end."""
    baselines: bool = True
    """Train and evaluate local-only and centralised models at the same token budget."""
    max_new_tokens: int = Field(default=64, ge=0)
    """Of a generated answer; 0: measure losses only."""


class EngineConfig(Table):
    """Where the clients live."""

    name: Literal["simulation"] = "simulation"
    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Clients tuned at the same time; auto: the whole cohort, at most 16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""


class RunConfig(Table):
    """Everything that determines a run's result."""

    seed: int = 0
    rounds: int = Field(default=10, ge=1)
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = Field(default_factory=DataConfig)
    partition: Annotated[SerializeAsAny[Partition], BeforeValidator(lambda value: _plugin(Partition, value))] = Field(
        default_factory=lambda: Partition.resolve("category_shards")
    )
    client: ClientConfig = Field(default_factory=lambda: ClientConfig(local_epochs=1))
    cohort: CohortConfig = CohortConfig()
    aggregation: Annotated[SerializeAsAny[Aggregation], BeforeValidator(lambda value: _plugin(Aggregation, value))] = (
        Field(default_factory=lambda: Aggregation.resolve("fedit"))
    )
    server_optimizer: Annotated[
        SerializeAsAny[ServerOptimizer], BeforeValidator(lambda value: _plugin(ServerOptimizer, value))
    ] = Field(default_factory=lambda: ServerOptimizer.resolve("fedavg"))
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()

    def check(self) -> None:
        """Raise ConfigError for combinations that no data or hardware could make work."""
        num_clients = getattr(self.partition, "num_clients", None)
        if num_clients is not None:
            if self.cohort.size is not None and self.cohort.size > num_clients:
                raise ConfigError(
                    f"[cohort] size = {self.cohort.size} is more than [partition] num_clients = {num_clients}."
                )
            sampled = self.cohort.num_sampled(num_clients)
            if self.cohort.min_updates > sampled:
                raise ConfigError(
                    f"[cohort] min_updates = {self.cohort.min_updates} can never be reached: a cohort has {sampled} "
                    "clients. Lower it, or sample more."
                )
        if not isinstance(self.adapter.rank, int) and not self.aggregation.mixed_ranks:
            able = [name for name, plugin in plugins("aggregation").items() if getattr(plugin, "mixed_ranks", False)]
            raise ConfigError(
                f"[aggregation] name = {self.aggregation.name!r} needs clients of equal rank, got [adapter] rank = "
                f"{list(self.adapter.rank)}. Use one rank, or one of: {', '.join(able)}."
            )
        for plugin in (self.data.template, self.partition, self.aggregation, self.server_optimizer):
            plugin.check(self)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as `parse_config` reads it."""
        return self.model_dump(mode="json")


# --------------------------------------------------------------------------------------------------------- loading


def load_plugins(files: Sequence[Path] = ()) -> None:
    """Import every module of the entry-point group ``fedit.plugins`` (fedit's own among them) and `files`.

    Raises:
        ConfigError: a file is missing, a module does not import, or a plug-in takes another's name.
    """
    for entry_point in importlib.metadata.entry_points(group="fedit.plugins"):
        _import(f"The plug-in module {entry_point.value}", entry_point.load)
    for file in files:
        path = file.resolve()
        module_name = f"fedit_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if module_name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(module_name, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ConfigError(f"--plugin {file}: no such Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            _import(f"--plugin {file}", partial(spec.loader.exec_module, module))
        except ConfigError:
            del sys.modules[module_name]
            raise


def _import(what: str, execute: Callable[[], object]) -> None:
    try:
        execute()
    except FeditError as error:
        raise ConfigError(f"{what}: {error}") from error
    except Exception as error:  # this code is not ours, so it may raise anything
        raise ConfigError(f"{what} does not import: {type(error).__name__}: {error}") from error


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with fedit, by name."""
    folder = Path(str(importlib.resources.files("fedit") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_config(recipe: str, overrides: Sequence[str] = (), plugin_files: Sequence[Path] = ()) -> RunConfig:
    """Read a recipe (a TOML file, or the name of a shipped one), apply ``key.sub=value`` overrides and check it.

    Raises:
        ConfigError: naming each wrong key with what was got and expected.
    """
    load_plugins(plugin_files)
    path = Path(recipe) if recipe.endswith(".toml") else shipped_recipes().get(recipe)
    if path is None:
        raise ConfigError(f"No shipped recipe is named {recipe!r}. {did_you_mean(recipe, shipped_recipes())}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Recipe {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Recipe {path} is not valid TOML: {error}.") from error
    return parse_config(apply_overrides(tables, overrides))


def parse_config(tables: Mapping[str, Any]) -> RunConfig:
    """Return the checked configuration of TOML (or `RunConfig.to_json`) tables."""
    try:
        config = RunConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(_explain(error, RunConfig)) from error
    config.check()
    return config


def apply_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `tables` with each ``key.sub=value`` set; the value is read as TOML, or as text where it is none.

    Choosing another plug-in (``partition.name=dirichlet``) drops the parameters that the table gave to the former.
    """
    result: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in tables.items()
    }
    # A whole table, or the name that empties it, comes before its parameters, in whatever order they are given.
    outer_first = sorted(overrides, key=lambda item: item.partition("=")[0].strip().removesuffix(".name").count("."))
    for item in outer_first:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"-o {item}: expected key.sub=value, e.g. -o client.learning_rate=1e-3.")
        table = result
        for part in parts[:-1]:
            inner = table.get(part)
            table[part] = dict(inner) if isinstance(inner, Mapping) else {} if inner is None else {"name": inner}
            table = table[part]
        value = _toml_value(text.strip())
        if parts[-1] == "name" and table.get("name", value) != value:
            table.clear()
        table[parts[-1]] = value
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plugin(base: type[P], value: object) -> P:
    try:
        return base.resolve(value)
    except ValidationError as error:
        name = value.get("name") if isinstance(value, Mapping) else value
        raise ConfigError(_explain(error, plugins(base.kind)[str(name)], f"[{base.kind}] {name}: ")) from error


def _explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return one line per wrong key: where, what was expected, what was got."""
    lines = []
    for problem in error.errors():
        if problem["type"] == "extra_forbidden":
            where = [str(part) for part in problem["loc"]]
            fields = _fields_at(model, where[:-1])
            lines.append(f"unknown key {'.'.join(where)!r}. {did_you_mean(where[-1], fields)}")
            continue
        where = [str(part) for part in problem["loc"] if not _is_union_branch(part)]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "model_type":
            message = "expected a table"
        # A rule about a whole table has said what is wrong; to repeat the table would bury it.
        if problem["type"] != "value_error" or not isinstance(problem["input"], Mapping):
            message += f", got {problem['input']!r}"
        lines.append(f"{'.'.join(where) or 'configuration'}: {message}")
    return "\n".join(prefix + line for line in dict.fromkeys(lines))


def _is_union_branch(part: str | int) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "constrained-int"})


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
