"""The suite of engines over calls within one process, and what can be tried there alone: it reaches into workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_suite import *  # noqa: F403 (the suite)
from engine_suite import assert_equal, restart_once, throw
from federations import Direct, federate, load, simulate

from fedit.engines.channel import Header
from fedit.engines.simulation import Simulation
from fedit.interfaces import ClientFailure, ClientTask, ClientUpdate, ConfigError, FeditError


@pytest.fixture
def sites(tmp_path: Path, tiny_model_folder: Path) -> Iterator[Direct]:
    direct = Direct(tmp_path, tiny_model_folder)
    yield direct
    direct.close()


def test_a_step_that_does_not_make_the_adapter_is_made_up_for(
    recipe: Path, sites: Direct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of the whole adapter decides."""
    spoiled = sites.workers["a"]._inbox
    take = spoiled.take

    def take_other(about: Header, apply: Any) -> Any:
        return take(about, lambda *parts: apply(*parts)[:-4] + b"abcd")

    monkeypatch.setattr(spoiled, "take", take_other)
    config = load(recipe, "download.quantizer=bf16")
    assert_equal(federate(config, sites), simulate(config, tmp_path / "store"))


@pytest.mark.parametrize(
    "error", [MemoryError("no room for /data/rows.jsonl"), FeditError("/x could not be written: full")]
)
def test_training_that_fails_at_a_site_is_its_clients_failure(recipe: Path, sites: Direct, error: Exception) -> None:
    """Out of memory, a full disk: told by its kind; the site goes on in the next round."""

    def fail(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "train" and (joined := sites.workers["b"]._joined) is not None:
            run = type(joined.engine).run
            broken = lambda tasks: throw(error) if header["round"] == 0 else run(joined.engine, tasks)
            joined.engine.run = broken  # type: ignore[method-assign]

    sites.before = fail
    _, records = federate(load(recipe, "rounds=2"), sites)
    assert list(records[0].failures) == ["b"]
    assert records[0].failures["b"] == f"{type(error).__name__} while it tuned; the site's own log says more"
    assert not records[1].failures


def test_the_clients_of_a_site_are_numbered_for_good(sites: Direct) -> None:
    """What their files are called stays there, and a file that comes later changes no number."""
    site = sites.folder_of("a")
    assert site.call([None]) == ["a"]
    assert not (site.path / "client-numbers.json").exists()
    assert site.call(["smith", "jones"]) == ["a/1", "a/2"]
    assert site.call(["adams", "jones", "smith"]) == ["a/3", "a/2", "a/1"]
    assert site.call(["adams"]) == ["a/3"]
    (site.path / "client-numbers.json").write_text("[1]")
    with pytest.raises(FeditError, match=r"client-numbers\.json cannot be read"):
        site.call(["adams"])


def test_a_failed_client_is_nobody_elses_failure_when_the_worker_restarts(
    recipe: Path, sites: Direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = Simulation.run, []

    def fail_first(self: Simulation, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        asked.append([task.client for task in tasks])
        for result in run(self, tasks):
            yield ClientFailure(result.client, "broken") if result.client == "a/1" else result

    monkeypatch.setattr(Simulation, "run", fail_first)
    sites.become("a", "many")
    restart_once(sites, "a", 3)
    _, records = federate(load(recipe, "rounds=1"), sites, ["a"])
    assert [record.failures for record in records] == [{"a/1": "broken"}]
    assert len(asked) > 1


def test_a_client_that_fails_is_not_in_the_mean(recipe: Path, sites: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Simulation.run

    def fail_first(self: Simulation, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for result in run(self, tasks):
            yield ClientFailure(result.client, "broken") if result.client == "a/1" else result

    monkeypatch.setattr(Simulation, "run", fail_first)
    sites.become("a", "many")
    _, records = federate(load(recipe, "engine.merge_clients=true", "cohort.min_updates=2"), sites, ["a"])
    assert [record.failures for record in records] == [{"a/1": "broken"}] * 3


@pytest.mark.parametrize(
    "override",
    [
        "aggregation.name=fedex-lora",
        "aggregation.name=median",
        'aggregation={name="fedit", weighting="fednova"}',
        "upload.quantizer=int8",
        "objective.name=scaffold",
    ],
)
def test_what_needs_each_client_refuses_means(recipe: Path, override: str) -> None:
    more = ["client.optimizer=sgd", "client.clip_norm=none"] if "scaffold" in override else []
    with pytest.raises(ConfigError, match="merge_clients sends the mean of a site's clients, but"):
        load(recipe, override, "engine.merge_clients=true", *more)
