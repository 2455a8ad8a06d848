"""What every engine must do: the same rounds to the bit, and failures that stay those of a client."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import SITES, Direct, Finished, federate, load, simulate, write_recipe, write_site

from fedit.config import RunConfig
from fedit.engines import remote_site
from fedit.engines.channel import ChannelError, Header
from fedit.engines.remote import Remote
from fedit.engines.simulation import Simulation
from fedit.engines.site_folder import SiteFolder
from fedit.federation import expected_of
from fedit.interfaces import (
    Adapter,
    ClientFailure,
    ClientTask,
    ClientUpdate,
    ConfigError,
    EngineError,
    FeditError,
    RoundError,
)
from fedit.prepare import prepare_model
from fedit.server import RoundRecord, ServerState, train


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Path:
    return write_recipe(tmp_path, tiny_model_folder)


@pytest.fixture
def direct(tmp_path: Path, recipe: Path) -> Iterator[Direct]:
    """Three sites behind a transport in this process."""
    transport = Direct({name: write_site(tmp_path / "sites" / name, name, tmp_path / "rows") for name in SITES})
    yield transport
    transport.close()


def assert_equal(left: Finished, right: Finished) -> None:
    assert left[1] == right[1]
    assert_same_bits(left[0], right[0])


def assert_same_bits(left: Adapter, right: Adapter) -> None:
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("client.moments=keep", "client.schedule=cosine", "cohort.size=2"),
        ("aggregation.name=fedex-lora",),
        ("aggregation.name=fedsa-lora",),
        ("aggregation.name=fed-sb",),
        ("aggregation.name=lora-a2",),
        ("adapter.rank=[1,2,4]", "aggregation.name=hetlora"),
        ("adapter.rank=[4,3,4]", "aggregation.name=hetlora", "objective.name=self-pruning", "objective.strength=10"),
        ("objective.name=scaffold", "client.optimizer=sgd", "client.clip_norm=none"),
        ("objective.name=ditto",),
        ("upload.mask=top-k", "upload.density=0.1", "upload.quantizer=int8", "download.quantizer=int8"),
    ],
    ids=lambda overrides: " ".join(overrides) or "fedit",
)
def test_real_sites_give_the_bits_of_the_simulation(
    recipe: Path, direct: Direct, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = load(recipe, *overrides)
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))


def bytes_down(direct: Direct) -> dict[tuple[int, str], int]:
    """Return, filled as calls come, the bytes of new pieces that each site is sent in each round."""
    sent: dict[tuple[int, str], int] = {}
    rounds: dict[str, int] = dict.fromkeys(SITES, 0)

    def count(site: str, header: Header) -> None:
        if header["do"] in ("train", "evaluate"):
            rounds[site] = header["round"]
        if header["do"] == "put":
            sent[rounds[site], site] = sent.get((rounds[site], site), 0) + header["size"] * (header["offset"] == 0)

    direct.before = count
    return sent


COMPRESSED = ("download.quantizer=int8", "rounds=4", "cohort.size=2")


def test_a_site_that_has_the_adapter_before_is_sent_the_compressed_step(
    recipe: Path, direct: Direct, tmp_path: Path
) -> None:
    """And whoever missed a round the adapter whole; the record counts what was sent."""
    sent = bytes_down(direct)
    config = load(recipe, *COMPRESSED)
    federated = federate(config, direct)
    assert_equal(federated, simulate(config, tmp_path / "store"))
    whole = max(sent.values())
    for number, record in enumerate(federated[1][1:], 1):
        before = federated[1][number - 1].cohort
        for site in record.cohort:
            assert (sent[number, site] < whole / 3) == (site in before), (number, site)
    assert any(size == whole for (number, _), size in sent.items() if number)


def test_a_site_that_lost_the_adapter_before_is_sent_it_whole(recipe: Path, direct: Direct, tmp_path: Path) -> None:
    sent = bytes_down(direct)
    count = direct.before
    restarted = []

    def restart(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "train" and header["round"] == 2 and not restarted:
            restarted.append(site)
            direct.stop("b")
            direct.start("b")
        count(site, header)

    direct.before = restart
    config = load(recipe, "download.quantizer=bf16", "rounds=4")
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))
    assert sent[2, "b"] > 1.9 * sent[2, "a"]
    assert sent[3, "b"] == sent[3, "a"] == sent[2, "a"]


def test_a_step_that_does_not_make_the_adapter_is_made_up_for(
    recipe: Path, direct: Direct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of the whole adapter decides."""
    spoiled = direct.workers["a"]._inbox
    take = spoiled.take

    def take_other(about: Header, apply: Any) -> Any:
        return take(about, lambda *parts: apply(*parts)[:-4] + b"abcd")

    monkeypatch.setattr(spoiled, "take", take_other)
    config = load(recipe, "download.quantizer=bf16")
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))


# ---------------------------------------------------------------------------------------------------------- failures


def federation_config(recipe: Path, *more: str) -> RunConfig:
    return load(recipe, "engine.absent_s=0.5", *more)


def test_a_call_that_is_lost_or_heard_twice_changes_nothing(
    recipe: Path, direct: Direct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of the calls is lost before the site hears them, a fifth of the answers on the way back."""
    monkeypatch.setattr(remote_site, "RETRY_S", (0.01, 0.02))
    chance = random.Random(0)
    lost = []

    def lose(site: str, header: Header) -> None:
        if chance.random() < 0.2:
            lost.append(site)
            raise ChannelError("lost")

    def lose_answer(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        lose(site, header)
        return reply

    direct.before, direct.after = lose, lose_answer
    config = load(recipe)
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))
    assert len(lost) > 10


def test_a_worker_that_restarts_in_a_round_tunes_again_to_the_same_bits(
    recipe: Path, direct: Direct, tmp_path: Path
) -> None:
    restarted = []

    def restart(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "get" and header["round"] == 1 and not restarted:
            restarted.append(site)
            direct.stop("b")
            direct.start("b")

    direct.before = restart
    config = load(recipe)
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))
    assert restarted


def test_a_worker_that_is_stopped_while_it_tunes_says_nothing_of_the_round(
    recipe: Path, direct: Direct, tmp_path: Path
) -> None:
    """Its clients are tuned again once it is back; they have not failed."""
    stopped = []

    def stop(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "train" and header["round"] == 1 and not stopped:
            stopped.append(site)
            threading.Timer(0.1, lambda: (direct.stop("b"), direct.start("b"))).start()

    direct.before = stop
    config = load(recipe, "client.local_steps=40")
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))
    assert stopped


def test_a_site_that_is_gone_is_a_failure_of_its_rounds_until_it_returns(recipe: Path, direct: Direct) -> None:
    def vanish(site: str, header: Header) -> None:
        if header.get("round") == 1 and site == "c":
            raise ChannelError("cut off")

    direct.before = vanish
    _, records = federate(federation_config(recipe), direct)
    assert [list(record.failures) for record in records] == [[], ["c"], []]
    assert "could not be reached" in records[1].failures["c"]


def test_a_slow_site_fails_at_the_deadline_and_its_late_answer_is_not_taken(recipe: Path, direct: Direct) -> None:
    late = threading.Event()

    def wait(site: str, header: Header) -> None:
        if site == "a" and header["do"] == "train" and header["round"] == 0:
            late.wait(3.0)

    direct.before = wait
    _, records = federate(federation_config(recipe, "engine.deadline_s=1.5", "rounds=2"), direct)
    late.set()
    assert list(records[0].failures) == ["a"]
    assert "deadline_s" in records[0].failures["a"]
    assert not records[1].failures


def test_an_answer_of_an_earlier_round_is_not_taken(
    recipe: Path, direct: Direct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its updates are whole and of the right shape, and come where those of this round are asked for."""
    monkeypatch.setattr(remote_site, "RETRY_S", (0.01, 0.02))
    earlier: dict[str, tuple[Header, bytes]] = {}
    repeated = []

    def repeat(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        if header["do"] != "train" or "results" not in reply[0]:
            return reply
        if header["round"] == 0 and reply[0]["results"]:
            earlier[site] = reply
        if header["round"] == 1 and repeated.count(site) < 2:
            repeated.append(site)
            return earlier[site]
        return reply

    direct.after = repeat
    config = load(recipe)
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))
    assert sorted(repeated) == ["a", "a", "b", "b", "c", "c"]


def spoil(direct: Direct, site: str, change: Callable[[Header, bytes], tuple[Header, bytes]]) -> None:
    """Change what a site says of its updates, or their bytes."""

    def after(name: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        return change(*reply) if name == site and header["do"] in ("train", "get") else reply

    direct.after = after


def test_updates_that_are_not_finite_misshaped_or_huge_are_their_clients_failure(recipe: Path, direct: Direct) -> None:
    nan = np.full(1, np.nan, "<f4").tobytes()

    def results(header: Header, **changed: object) -> Header:
        return {**header, "results": [{**result, **changed} for result in header.get("results", ())]}

    changes = {
        "not finite": lambda header, blob: (header, nan + blob[4:] if blob else blob),
        "no update of this round": lambda header, blob: (results(header, bytes=10), blob),
        "too many": lambda header, blob: (results(header, size=10**12, inline=False), blob),
        "ended after": lambda header, blob: (header, b""),
        "scale": lambda header, blob: (results(header, rank=7), blob),
        "cannot be used": lambda header, blob: ({**header, "results": [{"client": "b"}]}, blob),
        "negative counts": lambda header, blob: (results(header, num_examples=-5), blob),
        "out of all bounds": lambda header, blob: (results(header, loss=float("inf")), blob),
    }
    config = federation_config(recipe, "rounds=1")
    for reason, change in changes.items():
        spoil(direct, "b", change)
        _, (record,) = federate(config, direct)
        assert list(record.failures) == ["b"], reason
        assert reason in record.failures["b"], (reason, record.failures)


@pytest.mark.parametrize(
    "error", [MemoryError("no room for /data/rows.jsonl"), FeditError("/x could not be written: full")]
)
def test_training_that_fails_at_a_site_is_its_clients_failure(recipe: Path, direct: Direct, error: Exception) -> None:
    """Out of memory, a full disk: told by its kind; the site goes on in the next round."""

    def fail(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "train" and (joined := direct.workers["b"]._joined) is not None:
            run = type(joined.engine).run
            broken = lambda tasks: throw(error) if header["round"] == 0 else run(joined.engine, tasks)
            joined.engine.run = broken  # type: ignore[method-assign]

    direct.before = fail
    _, records = federate(load(recipe, "rounds=2"), direct)
    assert list(records[0].failures) == ["b"]
    assert records[0].failures["b"] == f"{type(error).__name__} while it tuned; the site's own log says more"
    assert not records[1].failures


def test_a_worker_that_ends_in_every_training_fails_its_clients(recipe: Path, direct: Direct) -> None:
    def restart(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "train" and header["round"] == 0:
            direct.stop("b")
            direct.start("b")

    direct.before = restart
    _, records = federate(load(recipe, "rounds=2"), direct)
    assert records[0].failures == {"b": "its worker ended 4 times in this round"}
    assert not records[1].failures


def throw(error: Exception) -> None:
    raise error


def test_too_few_sites_end_the_run_with_a_reason_for_each(recipe: Path, direct: Direct) -> None:
    direct.before = lambda site, header: cut_off() if header["do"] == "train" and site != "a" else None
    with pytest.raises(RoundError, match=r"1 usable updates of 3, needs .* 2\. b: it could not be reached"):
        federate(federation_config(recipe, "cohort.min_updates=2"), direct)


def cut_off() -> None:
    raise ChannelError("cut off")


def test_nobody_joins_within_the_deadline(recipe: Path, direct: Direct) -> None:
    direct.before = lambda site, header: cut_off()
    with pytest.raises(EngineError, match=r"No site joined within \[engine\] join_s = 1 s"):
        federate(federation_config(recipe, "engine.join_s=1"), direct)


def test_a_run_is_not_resumed_without_a_site_that_it_was_started_with(recipe: Path, direct: Direct) -> None:
    expected = expected_of(prepare_model(load(recipe)))
    with pytest.raises(EngineError, match="no longer names: z"):
        Remote(load(recipe), direct, list(SITES), expected).join({"a": 8, "z/1": 3})


# ---------------------------------------------------------------------------------------------------------- handshake


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("fedit", "fedit .* is installed here, the server has other"),
        ("base", r"another base: SHA-256 [0-9a-f]{16}\.\.\. here, other"),
        ("tokenizer", "another tokenizer"),
    ],
)
def test_a_site_refuses_what_differs_and_names_it(recipe: Path, direct: Direct, what: str, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        federate(load(recipe), direct, **{what: "other"})


def test_a_site_refuses_attackers_and_unknown_rules(recipe: Path, direct: Direct) -> None:
    with pytest.raises(EngineError, match=r"\[attack\] is for simulations"):
        federate(load(recipe, "attack.name=sign-flip", 'attack.clients=["a"]'), direct)
    answer, _ = direct.call(
        "a",
        {
            "do": "hello",
            "config": {"aggregation": {"name": "my-rule"}},
            "expected": {},
            "run": "0" * 16,
            "session": "x",
            "wait_s": 30,
        },
        b"",
        60,
    )
    assert "my-rule" in answer["refused"]


def test_a_site_without_the_memory_refuses_and_says_what_is_needed(recipe: Path, tmp_path: Path) -> None:
    sites = {name: write_site(tmp_path / name, name, tmp_path / "rows") for name in ("a", "b")}
    sites["c"] = write_site(tmp_path / "c", "c", tmp_path / "rows", "memory_gb = 0.0001\n")
    direct = Direct(sites)
    engine = Remote(config := load(recipe), direct, list(sites), expected_of(prepare_model(config)))
    try:
        missing = engine.join()
    finally:
        direct.close()
    assert list(missing) == ["c"]
    assert re.search(r"its memory is too small for the run: 0\.00 GB do not hold the base .* longest row", missing["c"])
    assert list(engine.clients()) == ["a", "b"]


def test_what_leaves_a_site_names_no_file_and_no_row(recipe: Path, direct: Direct, tmp_path: Path) -> None:
    """Neither in answers, nor in the reasons of failures."""
    (tmp_path / "rows" / "a.jsonl").write_text("this is no JSON\n")
    seen: list[str] = []

    def listen(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        seen.append(json.dumps(reply[0]))
        return reply

    direct.after = listen
    _, records = federate(load(recipe, "rounds=1"), direct)
    assert set(records[0].cohort) == {"b", "c"}
    assert any("its own log says more" in line for line in seen)
    for line in seen:
        assert str(tmp_path) not in line
        assert "jsonl" not in line
        assert "say b" not in line


def test_a_sites_policy_decides_what_is_told(recipe: Path, tmp_path: Path) -> None:
    silent = "[policy]\ncounts = false\nlosses = false\nevaluation = false\n"
    folders = {
        name: write_site(tmp_path / "silent" / name, name, tmp_path / "rows", silent if name == "a" else "")
        for name in SITES
    }
    direct = Direct(folders)
    try:
        _, (record,) = federate(load(recipe, "rounds=1"), direct)
    finally:
        direct.close()
    told = [line for line in folders["a"].logged() if line["event"] == "sent"]
    assert told
    assert not record.failures
    _, (whole,) = federate_all(recipe, tmp_path)
    assert record.tokens < whole.tokens


def federate_all(recipe: Path, tmp_path: Path) -> Finished:
    direct = Direct({name: write_site(tmp_path / "open" / name, name, tmp_path / "rows") for name in SITES})
    try:
        return federate(load(recipe, "rounds=1"), direct)
    finally:
        direct.close()


def test_a_site_logs_what_it_was_asked_and_what_it_sent(recipe: Path, direct: Direct) -> None:
    federate(load(recipe, "rounds=1"), direct)
    lines = list(direct.folders["b"].logged())
    assert [line["event"] for line in lines] == ["asked to join", "joined", "asked to train", "sent"]
    sent = lines[-1]
    assert sent["client"] == "b"
    assert sent["bytes"] > 0
    assert sent["norm"] > 0
    assert len(sent["sha256"]) == 64


def test_a_message_that_is_longer_than_the_site_allows_is_refused(recipe: Path, tmp_path: Path) -> None:
    folders = {"a": write_site(tmp_path / "small" / "a", "a", tmp_path / "rows", "[policy]\nmax_message_mb = 0.001\n")}
    direct = Direct(folders)
    try:
        with pytest.raises(RoundError, match="takes 1,000 at most"):
            federate(load(recipe, "rounds=2"), direct)
    finally:
        direct.close()


def test_sites_that_claim_the_clients_of_others_do_not_take_part(recipe: Path, direct: Direct) -> None:
    def claim(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        answer, blob = reply
        return ({**answer, "clients": {"a": 1000}} if site == "c" and "clients" in answer else answer), blob

    direct.after = claim
    _, records = federate(load(recipe, "rounds=1"), direct)
    assert records[0].cohort == ["a", "b"]


def test_a_run_after_another_starts_without_its_state(recipe: Path, direct: Direct, tmp_path: Path) -> None:
    """What clients kept belongs to a run, though sites serve one after another."""
    federate(load(recipe, "client.moments=keep"), direct)
    for overrides in ((), ("client.moments=keep",)):
        config = load(recipe, *overrides)
        assert_equal(federate(config, direct), simulate(config, tmp_path / "store" / "-".join(overrides)))


def test_many_clients_of_several_ranks_at_a_site_whose_worker_restarts(recipe: Path, tmp_path: Path) -> None:
    """Their updates, too long for an answer, are fetched while others are tuned."""
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "site.toml").write_text(
        f'name = "all"\ndata = "{tmp_path / "rows"}"\ntest_data = "{tmp_path / "test.jsonl"}"\ndevice = "cpu"\n'
    )
    adapters = []
    for restarts in (False, True):
        direct = Direct({"all": SiteFolder.read(folder)})
        count = itertools.count()

        def restart(site: str, header: Header, direct: Direct = direct, count: itertools.count = count) -> None:
            if header["do"] == "get" and next(count) == 3:
                direct.stop("all")
                direct.start("all")

        if restarts:
            direct.before = restart
        try:
            adapter, records = federate(load(recipe, "adapter.rank=[1,2]", "aggregation.name=hetlora"), direct)
        finally:
            direct.close()
        assert not any(record.failures for record in records)
        adapters.append(adapter)
    assert_same_bits(*adapters)


def test_a_site_hosts_many_clients(recipe: Path, tmp_path: Path) -> None:
    """A folder of rows at one site is a client for each file."""
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "site.toml").write_text(
        f'name = "all"\ndata = "{tmp_path / "rows"}"\ntest_data = "{tmp_path / "test.jsonl"}"\ndevice = "cpu"\n'
    )
    direct = Direct({"all": SiteFolder.read(folder)})
    try:
        adapter, records = federate(load(recipe), direct)
    finally:
        direct.close()
    assert records[0].cohort == ["all/a", "all/b", "all/c"]
    assert not any(record.failures for record in records)
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.tensors.values())


def hosting_all(folder: Path, rows: Path, more: str = "") -> Direct:
    """Return a transport to one site that hosts the three clients."""
    folder.mkdir()
    (folder / "site.toml").write_text(
        f'name = "all"\ndata = "{rows}"\ntest_data = "{rows.parent / "test.jsonl"}"\ndevice = "cpu"\n{more}'
    )
    return Direct({"all": SiteFolder.read(folder)})


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("aggregation.name=fedit", "aggregation.weighting=uniform"),
        ("aggregation.name=fedit", "aggregation.weighting=tokens"),
        ("aggregation.name=ffa-lora",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_site_that_sends_the_mean_of_its_clients(
    recipe: Path, tmp_path: Path, overrides: tuple[str, ...], lost: bool
) -> None:
    """One update is fetched, also from a worker that restarts meanwhile; the rounds are the same but for rounding."""
    single, merged = [], []
    for seen, option in ((single, ()), (merged, ("engine.merge_clients=true",))):
        direct = hosting_all(tmp_path / f"site{len(option)}", tmp_path / "rows")
        count = itertools.count()

        def restart(site: str, header: Header, direct: Direct = direct, count: Iterator[int] = count) -> None:
            if header["do"] == "get" and next(count) == 1 and lost:
                direct.stop("all")
                direct.start("all")

        direct.before = restart
        try:
            seen.append(federate(load(recipe, *overrides, *option), direct))
        finally:
            direct.close()
    (adapter, records), (merged_adapter, merged_records) = single[0], merged[0]
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(merged_adapter.tensors[name], tensor, rtol=1e-3, atol=1e-5)
    for record, one in zip(records, merged_records, strict=True):
        assert (one.cohort, one.failures, one.tokens) == (record.cohort, {}, record.tokens)
        assert one.train_loss == pytest.approx(record.train_loss)
        assert one.bytes_up == record.bytes_up // 3


def test_whoever_finishes_first_the_mean_is_the_first_clients(recipe: Path, tmp_path: Path) -> None:
    """With as many steps as rows the clients end in another order than they have; every one of them counts."""
    options = ("client.local_steps=none", "client.local_epochs=1", "client.batch_size=1", "engine.slots=3")
    direct = hosting_all(tmp_path / "site", tmp_path / "rows")
    try:
        _, records = federate(load(recipe, *options, "engine.merge_clients=true", "cohort.min_updates=3"), direct)
    finally:
        direct.close()
    assert [(record.cohort, record.failures) for record in records] == [(["all/a", "all/b", "all/c"], {})] * 3


def test_a_mean_that_cannot_be_used_is_the_failure_of_all_that_it_is_of(
    recipe: Path, direct: Direct, tmp_path: Path
) -> None:
    """And the updates of other sites are taken as they come."""
    direct.close()
    (tmp_path / "rows" / "b").mkdir()
    for name in ("b1", "b2"):
        (tmp_path / "rows" / "b" / f"{name}.jsonl").write_text((tmp_path / "rows" / "b.jsonl").read_text())
    file = direct.folders["b"].path / "site.toml"
    file.write_text(file.read_text().replace("b.jsonl", "b"))
    direct = Direct({name: SiteFolder.read(folder.path) for name, folder in direct.folders.items()})
    try:
        spoil(
            direct, "b", lambda header, blob: (header, np.full(1, np.nan, "<f4").tobytes() + blob[4:] if blob else blob)
        )
        _, (record,) = federate(load(recipe, "rounds=1", "engine.merge_clients=true", "cohort.min_updates=2"), direct)
        assert record.cohort == ["a", "b/b1", "b/b2", "c"]
        assert list(record.failures) == ["b/b1", "b/b2"]
        assert all("not finite" in reason for reason in record.failures.values())
        spoil(direct, "b", lambda header, blob: (header, b""))
        _, (record,) = federate(load(recipe, "rounds=1", "engine.merge_clients=true", "cohort.min_updates=2"), direct)
        assert list(record.failures) == ["b/b1", "b/b2"]
        assert all("ended after" in reason for reason in record.failures.values())
    finally:
        direct.close()


def test_a_failed_client_is_nobody_elses_failure_when_the_worker_restarts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = Simulation.run, []

    def fail_first(self: Simulation, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        asked.append([task.client for task in tasks])
        for result in run(self, tasks):
            yield ClientFailure(result.client, "broken") if result.client == "all/a" else result

    monkeypatch.setattr(Simulation, "run", fail_first)
    direct = hosting_all(tmp_path / "site", tmp_path / "rows")
    count = itertools.count()

    def restart(site: str, header: Header) -> None:
        if header["do"] == "get" and next(count) == 3:
            direct.stop("all")
            direct.start("all")

    direct.before = restart
    try:
        _, records = federate(load(recipe, "rounds=1"), direct)
    finally:
        direct.close()
    assert [record.failures for record in records] == [{"all/a": "broken"}]
    assert len(asked) > 1


def test_an_adapter_that_was_evaluated_is_not_sent_again(recipe: Path, direct: Direct) -> None:
    """Whole or as a step: it comes once, for the evaluation or for the next round."""
    for override, per_round in (("download.quantizer=fp32", 1), ("download.quantizer=int8", 1)):
        config = load(recipe, override)
        prepared = prepare_model(config)
        engine = Remote(config, direct, SITES, expected_of(prepared))
        engine.join()
        direct.calls.clear()
        losses = []

        def finish(
            state: ServerState, record: RoundRecord, engine: Remote = engine, losses: list[Any] = losses
        ) -> None:
            losses.append(engine.evaluate(state.adapter, state.round_index - 1, state.step))

        before = direct.before
        sent = bytes_down(direct)
        train(config, engine, ServerState(0, prepared.initial), finish)
        direct.before = before
        assert [set(each) for each in losses] == [set(SITES)] * 3
        pieces = {site: len([key for key in sent if key[1] == site]) for site in SITES}
        assert pieces == dict.fromkeys(SITES, 3 * per_round), "three new adapters, each sent once"
        whole = max(sent.values())
        assert all(size == whole for size in sent.values()) or override.endswith("int8")


def test_a_client_that_fails_is_not_in_the_mean(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = hosting_all(tmp_path / "site", tmp_path / "rows")
    run = Simulation.run

    def fail_first(self: Simulation, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for result in run(self, tasks):
            yield ClientFailure(result.client, "broken") if result.client == "all/a" else result

    monkeypatch.setattr(Simulation, "run", fail_first)
    try:
        _, records = federate(load(recipe, "engine.merge_clients=true", "cohort.min_updates=2"), direct)
    finally:
        direct.close()
    assert [record.failures for record in records] == [{"all/a": "broken"}] * 3


def test_a_site_that_speaks_for_clients_of_others_is_not_heard(recipe: Path, direct: Direct) -> None:
    def claim(header: Header, blob: bytes) -> tuple[Header, bytes]:
        return {**header, "results": [{**one, "others": ["a"]} for one in header.get("results", ())]}, blob

    spoil(direct, "b", claim)
    _, records = federate(load(recipe, "rounds=1", "engine.merge_clients=true"), direct)
    assert list(records[0].failures) == ["b"]
    assert "stands for clients that were not asked for one" in records[0].failures["b"]


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
