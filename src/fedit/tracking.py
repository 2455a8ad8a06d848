"""A run's numbers in TensorBoard, MLflow or Weights & Biases: ``rounds.jsonl`` mirrored while it grows, the evaluation
at its end, the configuration. No row, no answer and no client's name goes there.

Of a private federation only what its run folder tells goes there, and only at its end: when a point comes tells what a
round took, and so who was there. Where a tracker is, and who one is to it, it reads from the environment itself
(``MLFLOW_TRACKING_URI``, ``WANDB_API_KEY``, ...). What a run is called there is kept in its folder, so that a resumed
run goes on as the same.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from fedit.experiment import Event, Notify, PhaseStarted, RoundFinished
from fedit.files import write_json
from fedit.interfaces import ConfigError, did_you_mean
from fedit.report import RunFolder
from fedit.report.format import METRIC_LABELS, clip

log = logging.getLogger(__name__)

KEPT = "tracking.json"
MOST_PARAMETERS, LONGEST_PARAMETER = 100, 500
"""Of one call to MLflow, and characters that any of its versions takes"""

Metrics = Mapping[str, float]
T = TypeVar("T")


class Tracker(Protocol):
    """One run at a tracker. Any method may raise anything; the run goes on without it then."""

    rounds_seen: int
    """The last round that it has already"""

    @property
    def id(self) -> str | None:
        """What the tracker knows the run by; None: where it writes is enough."""
        ...

    @property
    def where(self) -> str:
        """Where to look at the run."""
        ...

    def log(self, round_number: int, metrics: Metrics) -> None:
        """Add the metrics of a round."""
        ...

    def close(self, final: Metrics, finished: bool) -> None:
        """Add the metrics of the models that the run made, by name, and say whether it is finished."""
        ...


class TensorBoard:
    """Event files in the run's folder, written afresh whenever they are opened, so that nothing is in them twice."""

    def __init__(self, run: RunFolder, known_as: str | None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = run.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.id, self.rounds_seen = None, 0
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in told_settings(run).items()))
        self.where = f"tensorboard --logdir {shlex.quote(str(folder))}"

    def log(self, round_number: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, round_number)
        self._writer.flush()

    def close(self, final: Metrics, finished: bool) -> None:
        for name, value in final.items():
            self._writer.add_scalar(name, value)
        self._writer.close()


class MLflow:
    """A run of the experiment ``MLFLOW_EXPERIMENT_NAME``, or ``fedit``."""

    def __init__(self, run: RunFolder, known_as: str | None) -> None:
        # It would go on asking a server that is gone for minutes, and nothing is trained meanwhile.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self.rounds_seen = 0
        if known_as is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedit")
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self.id = self._client.create_run(experiment, run_name=run.path.name).info.run_id
            parameters = [Param(key, clip(str(value), LONGEST_PARAMETER)) for key, value in told_settings(run).items()]
            for start in range(0, len(parameters), MOST_PARAMETERS):
                self._client.log_batch(self.id, params=parameters[start : start + MOST_PARAMETERS])
        else:
            self.id = known_as
            self._client.update_run(self.id, status="RUNNING")
            histories = [self._client.get_metric_history(self.id, name) for name in ("tokens", "epsilon", "clip_norm")]
            self.rounds_seen = max((metric.step for history in histories for metric in history), default=0)
        self.where = f"{_without_secrets(self._client.tracking_uri)}, run {self.id}"

    def log(self, round_number: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self.id, [Metric(name, value, now, round_number) for name, value in metrics.items()])

    def close(self, final: Metrics, finished: bool) -> None:
        if final:
            self.log(self.rounds_seen, final)
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class WeightsAndBiases:
    """A run of the project ``WANDB_PROJECT``, or ``fedit``; its files lie in the run's folder."""

    def __init__(self, run: RunFolder, known_as: str | None) -> None:
        import wandb

        self.id = known_as or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedit"),
            id=self.id,
            resume="allow",
            name=run.path.name,
            dir=str(run.path),
            config=told_settings(run),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.where = self._run.url or f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        self.rounds_seen = max(0, self._run.starting_step - 1)

    def log(self, round_number: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=round_number)

    def close(self, final: Metrics, finished: bool) -> None:
        self._run.summary.update(dict(final))
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: Mapping[str, Callable[[RunFolder, str | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""By name, which is that of the package and of the extra of fedit that installs it, too"""


class Mirror:
    """Keeps the trackers of one run up to date: pass it as `notify`, and use it as a context manager."""

    def __init__(self, folder: Path, names: Sequence[str], notify: Notify = lambda event: None) -> None:
        """Mirror the run in `folder`, which need not exist yet, to the trackers `names`; events go on to `notify`."""
        self._folder = folder
        self._names = names
        self._notify = notify
        self._is_withheld = False
        self._open: dict[str, Tracker] = {}
        self.problems: dict[str, str] = {}
        """By tracker: why it does not have everything"""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        final, is_complete = {}, False
        if kind is None and self._open:  # what else ended the run is not to be hidden by what its folder lacks
            run = RunFolder.read(self._folder)
            self._log_rounds(run)
            final, is_complete = final_metrics(run), run.is_complete
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close, final, is_complete)

    def __call__(self, event: Event) -> None:
        self._notify(event)
        match event:
            case PhaseStarted(phase="federated" | "sites"):
                self.catch_up()
            case RoundFinished() if not self._is_withheld:
                self._log(event.record.round, round_metrics(asdict(event.record), event.seconds))

    def catch_up(self) -> None:
        """Open the trackers, and give each the rounds that the folder has and it has not."""
        run = RunFolder.read(self._folder)
        self._is_withheld = run.withholds
        kept = kept_trackers(self._folder)
        for name in self._names:
            tracker = self._try(name, TRACKERS[name], run, kept.get(name))
            if tracker is not None:
                self._open[name], kept[name] = tracker, tracker.id
        write_json(self._folder / KEPT, kept)
        self._log_rounds(run)

    def _log_rounds(self, run: RunFolder) -> None:
        seconds = {timing["round"]: timing["seconds"] for timing in run.timings if "round" in timing}
        for line in run.rounds:
            metrics = withheld_metrics(line) if run.withholds else round_metrics(line, seconds.get(line["round"]))
            self._log(line["round"], metrics)

    def _log(self, round_number: int, metrics: Metrics) -> None:
        for name, tracker in list(self._open.items()):
            if round_number > tracker.rounds_seen:
                self._try(name, tracker.log, round_number, metrics)
                tracker.rounds_seen = round_number

    def _try(self, name: str, act: Callable[..., T], *arguments: Any) -> T | None:
        """Return what a tracker does; one that fails is left alone for the rest of the run."""
        try:
            return act(*arguments)
        except Exception as error:  # noqa: BLE001 (a tracker may raise anything, and no run shall die of it)
            self._open.pop(name, None)
            self.problems[name] = clip(_without_secrets(str(error)).strip() or type(error).__name__, 300)
            log.warning("%s is left alone from now on, the run goes on: %s", name, self.problems[name])
            return None

    def summary(self) -> Iterator[str]:
        """Yield where each tracker shows the run, or what to do about one that does not have everything."""
        for name, tracker in self._open.items():
            yield f"{name}: {tracker.where}"
        for name in self.problems:
            yield f"{name} lacks something; once it works:  fedit track {shlex.quote(str(self._folder))} {name}"


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that the trackers can be used.

    Raises:
        ConfigError: a name is unknown, a package is missing, or there is no key for Weights & Biases.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"Unknown tracker {name!r}. {did_you_mean(name, TRACKERS)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is a package, too, but without an origin
            raise ConfigError(f"Tracking by {name} needs its package. Install it: pip install 'fedit[{name}]'")
    if "wandb" in names:
        import wandb

        is_online = wandb.setup().settings.mode in {"online", "shared"}
        if is_online and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "Weights & Biases knows no key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline."
            )


def wanted_trackers(folder: Path, given: Sequence[str]) -> list[str]:
    """Return the trackers of a run, those that it was mirrored to and those `given`; raises as `check_trackers`."""
    check_trackers(given)
    return list(dict.fromkeys([*kept_trackers(folder), *given]))


def kept_trackers(folder: Path) -> dict[str, str | None]:
    """Return the trackers that the run in `folder` has been mirrored to, and what it is called there."""
    file = folder / KEPT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def told_settings(run: RunFolder) -> dict[str, Any]:
    """Return the configuration, key.sub -> value, with the number of clients in place of their names."""
    settings = run.settings
    for table, key in (("cohort", "availability"), ("attack", "clients")):
        named = (run.run.get(table) or {}).get(key)
        if isinstance(named, Mapping | list | tuple):
            settings = {each: value for each, value in settings.items() if not f"{each}.".startswith(f"{table}.{key}.")}
            settings[f"{table}.{key}"] = f"of {len(named)} clients, by name"
    return settings


def round_metrics(line: Mapping[str, Any], seconds: float | None) -> dict[str, float]:
    """Return the numbers of a round, of its line in ``rounds.jsonl``."""
    names = ("train_loss", "test_loss", "update_norm", "aggregation_loss", "epsilon", "clip_norm")
    found = {name: line.get(name) for name in (*names, "bytes_up", "bytes_down", "tokens")}
    found |= {"clients": len(line["cohort"]), "failures": len(line["failures"]), "seconds": seconds}
    if seconds:
        found["tokens_per_second"] = line["tokens"] / seconds
    return {name: float(value) for name, value in found.items() if value is not None}


def withheld_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what may be told of a round of a private federation; the rest of its line is no number but blank."""
    return {name: line[name] for name in ("epsilon", "clip_norm") if line.get(name) is not None}


def final_metrics(run: RunFolder) -> dict[str, float]:
    """Return the metrics of every model of ``evaluation.json``: ``final/<model>/<metric>``."""
    found = {
        f"final/{model}/{metric}": measured[metric]["all"]
        for model, measured in run.evaluation.get("models", {}).items()
        for metric in METRIC_LABELS
        if metric in measured
    }
    found["final/gap_closed"] = run.evaluation.get("gap_closed")
    return {name: float(value) for name, value in found.items() if value is not None}


def _without_secrets(text: str) -> str:
    """Return a text without what is before the @ of an address: a user's name and password."""
    return re.sub(r"(?<=://)[^/\s]+@", "", text)
