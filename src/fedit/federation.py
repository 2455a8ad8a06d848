"""A run of the rounds across the sites of a real federation."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedit.checkpoints import load_state, save_state
from fedit.cohort import check_clients, most_rounds
from fedit.config import RunConfig
from fedit.deployment import FederationConfig, courier_of, read_federation
from fedit.engines.remote import Remote
from fedit.experiment import (
    Notify,
    PhaseStarted,
    Progressed,
    RoundFinished,
    Watch,
    check_base,
    describe_run,
    shown_to_server,
)
from fedit.export import save_adapter
from fedit.files import append_line, keep_lines, write_json, write_secret
from fedit.interfaces import EngineError, FeditError
from fedit.own_privacy import OwnPrivacy
from fedit.prepare import PreparedModel, prepare_model
from fedit.privacy import Mechanism
from fedit.report import RunFolder, write_report
from fedit.server import RoundRecord, ServerState, train

log = logging.getLogger(__name__)

LAST_RUN = "last-run.json"


def expected_of(prepared: PreparedModel) -> dict[str, str]:
    """Return what every site must have in common with the server."""
    return {
        "fedit": importlib.metadata.version("fedit"),
        "base": prepared.weights_sha256,
        "tokenizer": prepared.tokenizer_sha256,
    }


@dataclass(frozen=True)
class SitesJoined:
    """The sites that take part are known."""

    clients: Mapping[str, int]
    missing: Mapping[str, str]
    """Why the other sites do not take part"""


def run_federation(
    config: RunConfig,
    server: Path,
    folder: Path,
    notify: Notify = lambda event: None,
    joined: Callable[[SitesJoined], None] = lambda event: None,
    *,
    recipe: str = "",
    plugin_files: Sequence[Path] = (),
    stopped: threading.Event | None = None,
) -> RunFolder:
    """Run, or go on with, the rounds of `config` across the sites of `server`; the result is a run folder.

    Once `stopped` is set the round that is under way is finished, and no other begun.

    Raises:
        RoundError: a round could not be completed. Whatever is raised, calling again goes on from what was saved.
        EngineError: nobody joined, or the base is not the one that the run was started on.
    """
    federation = read_federation(server)
    with _only_one(server):
        return _run(
            config, federation, server, folder, notify, joined, recipe, plugin_files, stopped or threading.Event()
        )


def _run(
    config: RunConfig,
    federation: FederationConfig,
    server: Path,
    folder: Path,
    notify: Notify,
    joined: Callable[[SitesJoined], None],
    recipe: str,
    plugin_files: Sequence[Path],
    stopped: threading.Event,
) -> RunFolder:
    config = _with_secret(config, folder)
    prepared = prepare_model(config)
    described = describe_run(config, prepared.model, prepared.weights_sha256, recipe, plugin_files)
    resumed = (folder / "partition.json").is_file()
    if resumed:
        check_base(folder, described)
    before: dict[str, Any] = {"run": secrets.token_hex(8)}
    if resumed:
        before = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
    engine = Remote(config, courier_of(server, federation), federation.sites, expected_of(prepared), before["run"])
    known = {client: about["rows"] for client, about in before.get("clients", {}).items()}
    missing = engine.join(known or None)
    if stopped.is_set():
        raise StoppedError
    clients = engine.clients()
    check_clients(config, clients)
    mechanism = Mechanism.of(config, len(clients))
    joined(SitesJoined(clients, missing))
    if not resumed:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", described)
        write_json(server / LAST_RUN, {"folder": str(folder.absolute())})
        holdings = {client: {"rows": rows, "categories": {}} for client, rows in clients.items()}
        privacy = OwnPrivacy.announcement(config)
        if mechanism is not None:
            privacy = mechanism.statement("the operating system's", most_rounds(config, clients))
        told = {} if privacy is None else {"privacy": privacy}
        write_json(folder / "partition.json", {"run": before["run"], "clients": holdings, **told})
    state = load_state(folder / "checkpoints") or ServerState(0, prepared.initial)
    if mechanism is not None and resumed:
        _check_account(folder, mechanism, state.round_index)
    keep_lines(folder / "rounds.jsonl", state.round_index)
    keep_lines(folder / "timings.jsonl")
    notify(PhaseStarted("sites", config.rounds - state.round_index))
    rounds = _Rounds(config, engine, folder, notify, stopped)
    state = train(config, shown_to_server(config, engine), state, rounds.finish)
    save_adapter(state.adapter, config, prepared.model, folder / "adapter")
    write_report(folder)
    return RunFolder.read(folder)


def _with_secret(config: RunConfig, folder: Path) -> RunConfig:
    """With privacy, let cohorts be drawn by a secret of this run, which stays in its folder."""
    if config.privacy is None:
        return config
    file = folder / ".cohorts.secret"
    if not file.is_file():
        if (folder / "partition.json").is_file():
            raise EngineError(f"{file} is gone, by which the cohorts of this run are drawn. Restore it.")
        write_secret(file, secrets.token_hex(16).encode())
    return config.model_copy(update={"cohort_secret": int(file.read_text(encoding="ascii"), 16)})


def _check_account(folder: Path, mechanism: Mechanism, rounds_saved: int) -> None:
    """Refuse to go on with a run whose rounds would not cost what they are said to cost.

    Raises:
        EngineError: rounds that were told are to be done again, or another accountant wants other noise.
    """
    told = len(RunFolder.read(folder).rounds)
    if told > rounds_saved + 1:
        raise EngineError(
            f"{folder} has told {told} rounds, and its last checkpoint is of round {rounds_saved}: done again with "
            "other noise they would cost more privacy than is accounted for. Restore the checkpoint."
        )
    before = json.loads((folder / "partition.json").read_text(encoding="utf-8"))["privacy"]["noise_multiplier"]
    if before != mechanism.noise_multiplier:
        raise EngineError(
            f"{folder} was started with a noise multiplier of {before}, and the accountant that is installed now asks "
            f"for {mechanism.noise_multiplier}. Install the one that partition.json names."
        )


class StoppedError(FeditError):
    """The run was asked to stop, and its last round is saved."""


class _Rounds:
    """What happens after every round."""

    def __init__(
        self, config: RunConfig, engine: Remote, folder: Path, notify: Notify, stopped: threading.Event
    ) -> None:
        self._config, self._engine, self._folder = config, engine, folder
        self._notify, self._stopped = notify, stopped
        self._watch = Watch()

    def finish(self, state: ServerState, record: RoundRecord) -> None:
        """Evaluate at the sites if it is time to, save everything, tell it."""
        config, every = self._config, self._config.evaluation.every
        is_time = state.round_index == config.rounds or bool(every and state.round_index % every == 0)
        if config.privacy is not None:
            # Sites' losses are exact. And nothing of a round may leave before it is saved: done again it has other
            # noise, and both results together would tell more than one.
            for client, reason in record.failures.items():
                log.warning("round %d: %s failed: %s", record.round, client, reason)
            record, is_time = record.withheld(), False
        timing = self._watch.lap(record.tokens)
        losses: dict[str, tuple[float, int]] = {}
        if is_time:
            losses = self._engine.evaluate(state.adapter, state.round_index - 1, state.step)
            if num_tokens := sum(count for _, count in losses.values()):
                mean = sum(loss * count for loss, count in losses.values()) / num_tokens
                record = replace(record, test_loss=mean)
        line: dict[str, Any] = asdict(record)
        if losses:
            line["site_losses"] = {site: loss for site, (loss, _) in losses.items()}
        timing["aggregation_seconds"] = round(line.pop("aggregation_s"), 6)
        append_line(self._folder / "rounds.jsonl", line)
        save_state(state, self._folder / "checkpoints")
        if config.privacy is None:  # what a round took tells who was there
            append_line(self._folder / "timings.jsonl", {"round": record.round, **timing})
        self._notify(RoundFinished(record, timing["seconds"], config.rounds))
        self._notify(Progressed(1))
        self._watch.lap(0)
        if self._stopped.is_set() and state.round_index < config.rounds:
            raise StoppedError


def check_sites(config: RunConfig, server: Path) -> tuple[Mapping[str, Mapping[str, Any]], Mapping[str, str]]:
    """Let every site get ready for a run, and return what each says of itself, and why the others do not take part.

    Raises:
        EngineError: none is ready.
    """
    federation = read_federation(server)
    with _only_one(server):
        prepared = prepare_model(config)
        engine = Remote(config, courier_of(server, federation), federation.sites, expected_of(prepared))
        missing = engine.join()
    check_clients(config, engine.clients())
    return engine.described(), missing


@contextmanager
def _only_one(server: Path) -> Iterator[None]:
    """Let one process at a time ask the sites, or they would turn from one to the other.

    Raises:
        EngineError: another one does.
    """
    with (server / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EngineError(
                f"Another `fedit federation run` or `check` uses {server}. Wait for it, or interrupt it."
            ) from error
        yield


SHOWN_FAILURES = 10


def federation_status(server: Path) -> dict[str, Any]:
    """Return who is connected, what travelled since the courier started, and how far the last run is."""
    federation = read_federation(server)
    traffic = courier_of(server, federation).sites()
    nothing = {"down": 0, "up": 0, "answered": None}
    sites = {name: {"connected": name in traffic, **traffic.get(name, nothing)} for name in federation.sites}
    run: dict[str, Any] | None = None
    last = server / LAST_RUN
    if last.is_file() and (folder := Path(json.loads(last.read_text())["folder"])).is_dir():
        found = RunFolder.read(folder)
        failures = [
            {"round": line["round"], "client": client, "reason": reason}
            for line in found.rounds
            for client, reason in line["failures"].items()
        ]
        run = {
            "folder": str(folder),
            "rounds": found.run["rounds"],
            "rounds_done": len(found.rounds),
            "failures": failures[-SHOWN_FAILURES:],
            "num_failures": len(failures),
            "train_loss": found.rounds[-1]["train_loss"] if found.rounds else None,
            "test_loss": next((line["test_loss"] for line in reversed(found.rounds) if line["test_loss"]), None),
        }
    return {"engine": federation.engine, "sites": sites, "run": run}
