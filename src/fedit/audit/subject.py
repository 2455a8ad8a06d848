"""What is audited: a finished run with its rows, its base and its adapter; and what it is compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedit.checkpoints import load_state
from fedit.cohort import participation
from fedit.config import RunConfig, parse_config
from fedit.engines.client_store import ClientStore
from fedit.engines.simulation import Simulation
from fedit.experiment import check_base, describe_run
from fedit.interfaces import (
    Adapter,
    ClientFailure,
    ClientTask,
    ClientUpdate,
    ConfigError,
    DataError,
    EncodedExample,
    Engine,
    FeditError,
    derive_rng,
)
from fedit.model import StackedModel
from fedit.own_privacy import OwnPrivacy
from fedit.prepare import FederatedData, prepare_data, prepare_model
from fedit.privacy import Mechanism
from fedit.report import RunFolder
from fedit.server import ServerState, train

COMPARED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "none": ("without noise", {}),
    "central": ("central, epsilon 8", {"mechanism": "central", "target_epsilon": 8.0, "clip_norm": 0.5}),
    "dp-sgd": ("dp-sgd, epsilon 8", {"mechanism": "dp-sgd", "target_epsilon": 8.0, "clip_norm": 0.1}),
    "local": (
        "local, epsilon 8",
        {"mechanism": "local", "target_epsilon": 8.0, "clip_norm": 0.5, "delta": 1e-5},
    ),
}
"""What every run is audited with and without, by name: how it is called, its ``[privacy]``"""


@dataclass(frozen=True, eq=False)
class Subject:
    """A finished run of the simulation."""

    folder: Path
    config: RunConfig
    """Malicious clients are named in it: where others join, or some are left out, they are the same."""
    data: FederatedData
    model: StackedModel
    initial: Adapter
    final: Adapter
    """The global adapter after the last round"""
    rounds_done: int

    @classmethod
    def open(cls, folder: Path, config: RunConfig) -> Subject:
        """Load what the run in `folder`, of `config`, was made of.

        Raises:
            ConfigError: it is not finished, was made across real sites, or trains on pairs.
            DataError, EngineError: its rows or its base are others now than they were.
        """
        run = RunFolder.read(folder)
        if "fingerprint" not in run.partition:
            raise ConfigError(
                f"{folder} cannot be audited: its partition.json has no fingerprint of rows, so it was made across "
                "real sites, whose rows are not here, or by an older version. Audit a run of `fedit run`, of the same "
                "recipe on rows that are here."
            )
        if not run.evaluation:
            raise ConfigError(
                f"{folder} cannot be audited: {len(run.rounds)} of {config.rounds} rounds are done, and there is no "
                f"evaluation.json. Finish it with `fedit run --resume {folder}`."
            )
        if config.objective.preferences:
            raise ConfigError(
                f"{folder} cannot be audited: [objective] name = {config.objective.name!r} trains on pairs of "
                "responses, and the audits know single ones. Audit a run with another objective."
            )
        data = prepare_data(config)
        if run.partition["fingerprint"] != data.summary["fingerprint"]:
            raise DataError(
                f"{folder} was trained on other rows: what [data] path = {config.data.path!r} gives now has the "
                f"fingerprint {data.summary['fingerprint'][:12]}..., expected {run.partition['fingerprint'][:12]}... "
                "Restore the data, or audit a run on these rows."
            )
        prepared = prepare_model(config, list(data.clients.values()))
        check_base(folder, describe_run(config, prepared.model, prepared.weights_sha256, "", ()))
        state = load_state(folder / "checkpoints")
        if state is None:
            raise ConfigError(f"{folder} cannot be audited: it has no checkpoint. Run the recipe again.")
        config = _with_names(config, list(data.clients))
        return cls(folder, config, data, prepared.model, prepared.initial, state.adapter, state.round_index)

    @property
    def has_one_model(self) -> bool:
        """Whether there is one final model for all."""
        rule = self.config.aggregation
        return set(rule.shared(0)) == set(rule.trained(0))

    @property
    def sizes(self) -> Mapping[str, int]:
        """The clients' numbers of rows."""
        return {client: len(rows) for client, rows in self.data.clients.items()}


@dataclass(frozen=True)
class Setting:
    """A way to run the recipe."""

    name: str
    label: str
    config: RunConfig


def settings(config: RunConfig, sizes: Mapping[str, int]) -> tuple[list[Setting], dict[str, str]]:
    """Return the run as it is, then with and without each kind of noise; and why some cannot be had, by name.

    `sizes` are the clients' numbers of rows.
    """
    own = "none" if config.privacy is None else config.privacy.mechanism
    found, refused = [Setting(own, "this run", config)], {}
    for name, (label, privacy) in COMPARED.items():
        if name == own:
            continue
        try:
            other = with_privacy(config, privacy)
            Mechanism.of(other, len(sizes))
            for size in set(sizes.values()):
                OwnPrivacy.of(other, size)
            found.append(Setting(name, label, other))
        except ConfigError as error:
            refused[label] = str(error)
    return found, refused


def with_privacy(config: RunConfig, privacy: Mapping[str, Any]) -> RunConfig:
    """Return a run with other privacy; empty: none.

    Raises:
        ConfigError: the recipe cannot have it.
    """
    tables = config.to_json()
    tables["privacy"] = dict(privacy) or None
    if privacy:
        if "weighting" in tables["aggregation"]:
            tables["aggregation"]["weighting"] = "uniform"
        if privacy["mechanism"] == "central":
            tables["cohort"] |= {"sampling": "poisson", "fraction": 0.5, "size": None, "min_updates": 1}
    return parse_config(tables)


def _with_names(config: RunConfig, clients: Sequence[str]) -> RunConfig:
    if config.attack is None:
        return config
    names = tuple(config.attack.malicious(clients, config.seed))
    return config.model_copy(update={"attack": config.attack.model_copy(update={"clients": names})})


@contextmanager
def noted(refused: dict[str, str], what: str) -> Iterator[None]:
    """Write down why something cannot be audited, and go on with the rest."""
    try:
        yield
    except FeditError as error:
        refused[what] = str(error)


def drawn(config: RunConfig, sizes: Mapping[str, int], rounds: int) -> frozenset[str]:
    """Return the clients that the first `rounds` rounds ask."""
    return frozenset(client for client, when in participation(config, sizes, rounds).items() if when)


@contextmanager
def simulation(
    config: RunConfig, model: StackedModel, clients: Mapping[str, Sequence[EncodedExample]]
) -> Iterator[Simulation]:
    """Give an engine whose clients have kept nothing yet."""
    with tempfile.TemporaryDirectory() as folder:
        yield Simulation(config, model, clients, ClientStore(Path(folder)))


def trained(
    config: RunConfig,
    model: StackedModel,
    initial: Adapter,
    clients: Mapping[str, Sequence[EncodedExample]],
    sent: Mapping[str, list[tuple[Adapter, Adapter]]] | None = None,
) -> Adapter:
    """Return the global adapter after all rounds. The clients in `sent` get written down, in each of their rounds, what
    they received and what that became at theirs.
    """
    noise = lambda round_index: derive_rng(config.seed, "privacy", round_index).standard_normal
    with simulation(config, model, clients) as engine:
        shown: Engine = _Recorder(engine, {} if sent is None else sent)
        if config.secure_sums is not None:
            from fedit.engines.secure import SecureAggregation, SimulatedParties

            shown = SecureAggregation(config, SimulatedParties(config, shown))
        return train(config, shown, ServerState(0, initial), lambda state, record: None, noise).adapter


@dataclass(frozen=True, eq=False)
class _Recorder:
    """An engine that lets everything through, and writes some of it down."""

    engine: Simulation
    sent: Mapping[str, list[tuple[Adapter, Adapter]]]

    def clients(self) -> Mapping[str, int]:
        return self.engine.clients()

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield what the engine's clients return."""
        received = {task.client: task.adapter for task in tasks}
        for result in self.engine.run(tasks):
            if result.client in self.sent and isinstance(result, ClientUpdate):
                before = received[result.client].cut(result.update.rank)  # a client may give up components
                moved = {name: before.tensors[name] + step for name, step in result.update.tensors.items()}
                after = before.with_tensors({**before.tensors, **moved})
                self.sent[result.client].append((before, after))
            yield result
