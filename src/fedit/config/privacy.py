"""What differential privacy a run gives its clients, and what it cannot be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

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
    """Client-level differential privacy (DP-FedAvg, 1710.06963): whatever a client holds changes what is learned by a
    bounded amount, which noise hides. Each round adds up the updates of a Poisson-sampled cohort, each clipped to
    `clip_norm`, with noise of `noise_multiplier` times that, and divides by the expected size of the cohort.
    """

    target_epsilon: float | None = Field(default=None, gt=0)
    """Of all rounds together: the noise follows from it. With a `noise_multiplier` it is a budget: the run ends before
    the round that would exceed it."""
    noise_multiplier: float | None = Field(default=None, ge=0.3)
    """Standard deviation of the noise on the sum, in clip norms; less than 0.3 promises nothing that is worth its name
    (clipping alone is `[aggregation] name = "norm-clipping"`)."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """None: N^-1.1 for N clients."""
    clip_norm: float = Field(default=1.0, gt=0)
    """L2 bound of a client's whole update; with `clip_quantile`, that of the first round."""
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    """Adaptive clipping (1905.03871): the bound follows this quantile of the updates' norms, estimated with noise."""
    clip_rate: float = Field(default=0.2, gt=0)
    """How fast it follows: C <- C exp(-rate (share of updates within C - quantile))."""

    @model_validator(mode="after")
    def _some_noise(self) -> Self:
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError("give target_epsilon, noise_multiplier, or both")
        return self

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError for what would void the guarantee."""
        rule, cohort = run.aggregation, run.cohort
        uniform = getattr(rule, "weighting", "uniform") == "uniform"
        reasons = {
            f'[cohort] sampling = "{cohort.sampling}": the guarantee counts on clients that are drawn by themselves, '
            'which nobody can foresee. Use sampling = "poisson"': cohort.sampling != "poisson",
            "[cohort] availability: who is online is nobody's random draw. Leave it out": cohort.availability != 1.0,
            f"[cohort] min_updates = {cohort.min_updates}: a run that ends for lack of clients tells how many there "
            "were. Leave it out": cohort.min_updates != 1,
            f"[aggregation] weighting = {getattr(rule, 'weighting', '')!r}: a client with many rows would count for "
            'more than the noise hides. Use weighting = "uniform"': not uniform,
            f"[aggregation] name = {rule.name!r}: it needs each client's update, and noise hides a sum. Use one of "
            "fedit, ffa-lora, rolora, fedsa-lora, fedsvd, fed-sb, tinylora": not run.sums_suffice,
            "[adapter] rank: ranks that differ. Use one": not isinstance(run.adapter.rank, int),
            '[upload] mask = "top-k": which numbers travel depends on the rows. Use dense': run.upload.mask == "top-k",
            f"[aggregation] name = {rule.name!r}: which numbers travel depends on the rows. Use another rule": (
                rule.sparse or rule.ranks_kept < 1
            ),
            "[engine] merge_clients: a mean of clients cannot be clipped client by client": run.engine.merge_clients,
            f"[objective] name = {run.objective.name!r}: its clients send more than an update": (
                run.objective.control_variates or bool(run.objective.shrinkage)
            ),
        }  # fmt: skip
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(f"[privacy] cannot be had with {reason}.")


def read_privacy(value: object) -> object:
    """Return the table that a preset's name stands for; anything else as it is."""
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}. {did_you_mean(value, PRESETS)}")
        return PRESETS[value]
    return value
