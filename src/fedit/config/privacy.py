"""What differential privacy a run gives its clients, and what it cannot be combined with."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from fedit.adapter import AMOUNTS
from fedit.config.tables import Table
from fedit.interfaces import ConfigError, did_you_mean

if TYPE_CHECKING:
    from fedit.config.run import RunConfig

PRESETS = {
    "none": None,
    "standard": {"target_epsilon": 8.0, "clip_quantile": 0.5},
    "strong": {"target_epsilon": 1.0, "clip_quantile": 0.5},
}


class PrivacyConfig(Table):
    """Differential privacy: what somebody holds changes what is learned by a bounded amount, which noise hides."""

    mechanism: Literal["central", "distributed", "dp-sgd", "local"] = "central"
    """Who is hidden, and by whom. central (DP-FedAvg, 1710.06963): a client with all its rows, by the server, which
    adds noise to the sum of the clipped updates of a Poisson-sampled cohort and divides by the cohort's expected size.
    distributed (2102.06387): the same, but that the clients clip and add shares of the noise, and the server sees the
    sum alone (secure aggregation). dp-sgd: each row, by its client, in every local step. local: all rows of a client,
    by itself, on its update."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """Of all rounds together: the noise follows from it. With a `noise_multiplier` it is a budget: the run ends before
    the round that would exceed it, or a client that adds its noise itself takes part no more."""
    noise_multiplier: float | None = Field(default=None, ge=0.3)
    """Standard deviation of the noise on the sum (of updates, of a step's gradients) in clip norms; less than 0.3
    promises nothing that is worth its name (clipping alone is `[aggregation] name = "norm-clipping"`)."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """None: N^-1.1 for N clients, with dp-sgd for the N rows of each client; to be given with local."""
    clip_norm: float = Field(default=1.0, gt=0)
    """L2 bound of a client's whole update, with dp-sgd of a row's gradient; with `clip_quantile`, that of the first
    round."""
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    """Adaptive clipping (1905.03871): the bound follows this quantile of the updates' norms, estimated with noise."""
    clip_rate: float = Field(default=0.2, gt=0)
    """How fast it follows: C <- C exp(-rate (share of updates within C - quantile))."""

    @model_validator(mode="after")
    def _some_noise(self) -> Self:
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError("give target_epsilon, noise_multiplier, or both")
        if self.mechanism != "central" and self.clip_quantile is not None:
            raise ValueError('clip_quantile is for mechanism = "central": clients know nothing of the others\' norms')
        if self.mechanism == "local" and self.delta is None:
            raise ValueError('mechanism = "local" needs a delta')
        return self

    @property
    def at_clients(self) -> bool:
        """Whether each client hides by itself, and is accounted for by itself."""
        return self.mechanism in ("dp-sgd", "local")

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError for what would void the guarantee."""
        for reason, holds in (self._reasons_of_clients(run) | self._reasons_of_server(run)).items():
            if holds:
                raise ConfigError(f'[privacy] mechanism = "{self.mechanism}" cannot be had with {reason}.')

    def _reasons_of_clients(self, run: RunConfig) -> dict[str, bool]:
        """Return what nobody's privacy goes with, and whether it holds."""
        weighting = getattr(run.aggregation, "weighting", "uniform")
        own, by_row, objective = self.at_clients, self.mechanism == "dp-sgd", run.objective
        trained = set(run.aggregation.trained(0))
        return {
            f"[aggregation] weighting = {weighting!r}: a client's rows, tokens and steps are nobody's to know, and who "
            'has more would count for more than the noise hides. Use weighting = "uniform"': (
                weighting not in {"uniform", "norm"} or (weighting == "norm" and not own)
            ),
            f"[objective] name = {objective.name!r}: its clients send more than an update": (
                objective.control_variates or bool(objective.shrinkage)
            ),
            "[client] local_epochs: the number of steps tells the number of rows. Use local_steps": (
                own and run.client.local_steps is None
            ),
            f"[objective] name = {objective.name!r}: its rows come in pairs, or a second model is trained on them": (
                by_row and (objective.preferences or objective.personal_pull is not None)
            ),
            "[adapter] dropout: what it drops of a row follows from the rows before it. Use 0": (
                by_row and run.adapter.dropout > 0
            ),
            f"[aggregation] name = {run.aggregation.name!r}: its clients have no gradients of rows": (
                by_row and AMOUNTS in trained
            ),
        }

    def _reasons_of_server(self, run: RunConfig) -> dict[str, bool]:
        """Return what noise on a cohort's sum does not go with, and whether it holds."""
        if self.at_clients:
            return {}
        rule, cohort = run.aggregation, run.cohort
        return {
            f'[cohort] sampling = "{cohort.sampling}": the guarantee counts on clients that are drawn by themselves, '
            'which nobody can foresee. Use sampling = "poisson"': cohort.sampling != "poisson",
            "[cohort] availability: who is online is nobody's random draw. Leave it out": cohort.availability != 1.0,
            f"[cohort] min_updates = {cohort.min_updates}: a run that ends for lack of clients tells how many there "
            "were. Leave it out": cohort.min_updates != 1,
            f"[aggregation] name = {rule.name!r}: it needs each client's update, and noise hides a sum. Use one of "
            "fedit, ffa-lora, rolora, fedsa-lora, fedsvd, fed-sb, tinylora": not run.sums_suffice,
            "[adapter] rank: ranks that differ. Use one": not isinstance(run.adapter.rank, int),
            '[upload] mask = "top-k": which numbers travel depends on the rows. Use dense': run.upload.mask == "top-k",
            f"[aggregation] name = {rule.name!r}: which numbers travel depends on the rows. Use another rule": (
                rule.sparse or rule.ranks_kept < 1
            ),
            "[engine] merge_clients: a mean of clients cannot be clipped client by client": run.engine.merge_clients,
            '[secure_aggregation]: the server could clip no single update. Use mechanism = "distributed"': (
                self.mechanism == "central" and run.secure_aggregation is not None
            ),
        }


def threshold_of(share: float, num_parties: int) -> int:
    """Return how many of so many parties suffice: more than the `share` of them."""
    return min(num_parties, math.floor(share * num_parties) + 1)


class SecureAggregationConfig(Table):
    """The server sees the sum of a cohort's updates and none of them, by pairwise masks (Bonawitz et al. 2017).

    Clients clip their updates, which also bounds what poisoned rows do; the range of the integers follows from that.
    """

    clip_norm: float | None = Field(default=None, gt=0)
    """L2 bound of a client's whole update; with mechanism = "distributed" that of [privacy]"""
    threshold: float = Field(default=2 / 3, ge=0.5, lt=1)
    """A sum needs more than this share of the parties (sites; in a simulation, clients) that began a round. Up to
    2 threshold - 1 of them may be in league with a server that lies, and learn no more than sums."""
    min_parties: int = Field(default=3, ge=2)
    """Parties that a sum is of at least: of two, each knows the other's update"""
    max_weight: int | None = Field(default=None, ge=1)
    """The largest weight of a client, in rows or tokens as [aggregation] weighting says: who has more counts as this.
    To be given unless weights are uniform."""

    @property
    def most_noise(self) -> float:
        """Variance of the noise that a sum has where nobody drops out, at most, in parts of what is promised."""
        counts = range(self.min_parties, self.min_parties + 1000)
        return max(count / max(1, threshold_of(self.threshold, count) - 1) for count in counts)

    def clip_norm_of(self, run: RunConfig) -> float:
        """Return the bound on updates."""
        norm = self.clip_norm if run.privacy is None or run.privacy.at_clients else run.privacy.clip_norm
        assert norm is not None
        return norm

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError for what does not go with it."""
        weighting = getattr(run.aggregation, "weighting", "uniform")
        distributed = run.privacy is not None and run.privacy.mechanism == "distributed"
        problems = {
            "needs the library cryptography, which is not installed: pip install 'fedit[privacy]'": (
                importlib.util.find_spec("cryptography") is None
            ),
            "clip_norm is missing: the L2 bound of a client's update, from which the range of the integers follows "
            "(a run without [secure_aggregation] shows the norms' size as update_norm in rounds.jsonl)": (
                self.clip_norm is None and not distributed
            ),
            "clip_norm: [privacy] has one. Leave it out": self.clip_norm is not None and distributed,
            f"max_weight is missing: the most that a client counts with weighting = {weighting!r}": (
                self.max_weight is None and weighting != "uniform"
            ),
            '[cohort] sampling = "weighted": the server is not told who has how many rows. Use another': (
                run.cohort.sampling == "weighted"
            ),
            "[engine] merge_clients: a site's clients are added up anyway. Leave it out": run.engine.merge_clients,
        }
        for problem, holds in problems.items():
            if holds:
                raise ConfigError(f"[secure_aggregation] {problem}.")


def read_switch(value: object) -> object:
    """Return no table for ``"none"``; anything else as it is."""
    return None if value == "none" else value


def read_privacy(value: object) -> object:
    """Return the table that a preset's name stands for; anything else as it is."""
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}. {did_you_mean(value, PRESETS)}")
        return PRESETS[value]
    return value
