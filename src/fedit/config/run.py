"""The whole run description, and the combinations that cannot work."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from fedit.config.privacy import PrivacyConfig, SecureAggregationConfig, read_privacy, read_switch
from fedit.config.tables import (
    AdapterConfig,
    ClientConfig,
    CodecConfig,
    CohortConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    Table,
    read_plugin,
)
from fedit.interfaces import Aggregation, Attack, ConfigError, Objective, Partition, ServerOptimizer, plugins


class RunConfig(Table):
    """Everything that determines a run's result."""

    seed: int = 0
    rounds: int = Field(default=10, ge=1)
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = Field(default_factory=DataConfig)
    partition: Annotated[SerializeAsAny[Partition], BeforeValidator(lambda value: read_plugin(Partition, value))] = (
        Field(default_factory=lambda: Partition.resolve("category_shards"))
    )
    client: ClientConfig = Field(default_factory=lambda: ClientConfig(local_epochs=1))
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(lambda value: read_plugin(Objective, value))] = (
        Field(default_factory=lambda: Objective.resolve("plain"))
    )
    cohort: CohortConfig = CohortConfig()
    aggregation: Annotated[
        SerializeAsAny[Aggregation], BeforeValidator(lambda value: read_plugin(Aggregation, value))
    ] = Field(default_factory=lambda: Aggregation.resolve("fedit"))
    server_optimizer: Annotated[
        SerializeAsAny[ServerOptimizer], BeforeValidator(lambda value: read_plugin(ServerOptimizer, value))
    ] = Field(default_factory=lambda: ServerOptimizer.resolve("fedavg"))
    attack: Annotated[
        SerializeAsAny[Attack] | None,
        BeforeValidator(lambda value: None if value is None else read_plugin(Attack, value)),
    ] = None
    """Malicious clients, simulated; ``"none"``: all are honest."""
    privacy: Annotated[PrivacyConfig | None, BeforeValidator(read_privacy)] = None
    """Differential privacy of the clients: a table, or a preset, ``"strong"``, ``"standard"`` or ``"none"``."""
    secure_aggregation: Annotated[SecureAggregationConfig | None, BeforeValidator(read_switch)] = None
    """The server sees sums of updates alone; ``"none"``: it sees each."""
    cohort_secret: int | None = Field(default=None, exclude=True, repr=False)
    """What cohorts are drawn by in place of the seed, which every site knows; a real run with privacy draws it, and no
    description of the run contains it."""
    upload: CodecConfig = CodecConfig()
    download: CodecConfig = CodecConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()

    def check(self) -> None:
        """Raise ConfigError for combinations that no data or hardware could make work."""
        if self.cohort_secret is not None:
            raise ConfigError("cohort_secret is no key of a recipe: a real run with privacy draws it.")
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
                f"{self.to_json()['adapter']['rank']}. Use one rank, or one of: {', '.join(able)}."
            )
        if self.client.moments == "keep" and self.aggregation.refactors:
            raise ConfigError(
                f'[client] moments = "keep" goes on with moments of the old factors, but [aggregation] name = '
                f'{self.aggregation.name!r} changes their basis in every round. Use moments = "reset" with it.'
            )
        factors = [set(self.aggregation.trained(index)) for index in range(min(2, self.rounds))]
        if self.client.moments == "keep" and factors[0] != factors[-1]:
            raise ConfigError(
                f'[client] moments = "keep" counts the steps of an adapter, but [aggregation] name = '
                f'{self.aggregation.name!r} trains its factors in turn. Use moments = "reset" with it.'
            )
        self._check_codecs()
        self._check_what_is_shown()
        for plugin in (
            self.data.template,
            self.partition,
            self.objective,
            self.attack,
            self.aggregation,
            self.server_optimizer,
        ):
            if plugin is not None:
                plugin.check(self)

    def _check_what_is_shown(self) -> None:
        if self.engine.merge_clients:
            self._check_merging("[engine] merge_clients sends the mean of a site's clients")
        if self.privacy is not None:
            self.privacy.check(self)
        if (secure := self.secure_sums) is not None:
            self._check_merging("secure aggregation adds up what clients send")
            secure.check(self)

    @property
    def secure_sums(self) -> SecureAggregationConfig | None:
        """How updates are added up where the server is to see sums alone; None: it sees each."""
        if self.privacy is not None and self.privacy.mechanism == "distributed":
            return self.secure_aggregation or SecureAggregationConfig()
        return self.secure_aggregation

    def _check_merging(self, what_it_does: str) -> None:
        rule, weighting = self.aggregation, getattr(self.aggregation, "weighting", "uniform")
        sends_all = self.upload.is_plain and not rule.sparse and rule.ranks_kept == 1
        problems = {
            f"[aggregation] name = {rule.name!r}": not self.sums_suffice,
            f"[aggregation] weighting = {weighting!r}": weighting not in ("examples", "tokens", "uniform"),
            "[upload], or a rule that sends few numbers,": not sends_all,
            f"[objective] name = {self.objective.name!r}": self.objective.control_variates or self.objective.shrinkage,
            "[adapter] rank with different ranks": not isinstance(self.adapter.rank, int),
        }
        for what, is_one in problems.items():
            if is_one:
                raise ConfigError(
                    f"{what_it_does}, but {what} needs each of them. Leave that out, or use fedit with one rank, plain "
                    "updates and examples, tokens or uniform."
                )

    def _check_codecs(self) -> None:
        rule = self.aggregation
        if not self.download.is_plain and (rule.refactors or rule.keeps_side):
            raise ConfigError(
                f"[download] compresses steps of the global factors, but [aggregation] name = {rule.name!r} sends "
                "factors of a new basis, or more than factors, in every round. Leave [download] out, or use fedit."
            )
        if self.upload.error_feedback is True and rule.refactors:
            raise ConfigError(
                f"[upload] error_feedback adds an earlier round's error, but [aggregation] name = {rule.name!r} "
                "changes the factors' basis in every round. Leave it out."
            )
        if rule.sparse and (self.upload.mask, self.download.mask) != ("dense", "dense"):
            raise ConfigError(
                f"[aggregation] name = {rule.name!r} sends the few numbers that moved. Leave [upload] and [download] "
                "mask out."
            )
        if rule.ranks_kept < 1 and self.upload.mask != "dense":
            raise ConfigError(
                f"[aggregation] name = {rule.name!r} chooses itself what clients send. Leave [upload] mask out."
            )

    @property
    def sums_suffice(self) -> bool:
        """Whether the rule needs no more than sums of updates: the class that defines how it aggregates has to say so;
        another that overrides that cannot inherit it.
        """
        classes = type(self.aggregation).__mro__
        return next((vars(each).get("sums", False) for each in classes if "aggregate" in vars(each)), False)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as `parse_config` reads it."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Return a hash of the configuration: another one has another, whatever keys fedit gains."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()

    def digest(self) -> str:
        """Return a short name of the configuration, the beginning of its fingerprint."""
        return self.fingerprint()[:16]
