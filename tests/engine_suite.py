"""What every engine of real sites must do: the simulation's rounds to the bit, failures that stay a client's.

`tests/conformance` runs it over calls within one process, `tests/deployment` over those of each engine.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import SITES, Finished, Sites, federate, load, simulate

from fedit.config import RunConfig
from fedit.engines import remote_site
from fedit.engines.channel import ChannelError, Header
from fedit.engines.identities import own_identity, public_identity
from fedit.engines.remote import Remote
from fedit.federation import expected_of
from fedit.interfaces import Adapter, EngineError, RoundError
from fedit.prepare import prepare_model
from fedit.server import RoundRecord, ServerState, train


@pytest.fixture
def recipe(sites: Sites) -> Path:
    return sites.recipe


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
    recipe: Path, sites: Sites, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = load(recipe, *overrides)
    assert_equal(federate(config, sites), simulate(config, tmp_path / "store"))


def bytes_down(sites: Sites) -> dict[tuple[int, str], int]:
    """Return, filled as calls come, the bytes of new pieces that each site is sent in each round."""
    sent: dict[tuple[int, str], int] = {}
    rounds: dict[str, int] = dict.fromkeys(SITES, 0)

    def count(site: str, header: Header) -> None:
        if header["do"] in ("train", "evaluate"):
            rounds[site] = header["round"]
        if header["do"] == "put":
            sent[rounds[site], site] = sent.get((rounds[site], site), 0) + header["size"] * (header["offset"] == 0)

    sites.before = count
    return sent


def test_a_site_that_has_the_adapter_before_is_sent_the_compressed_step(
    recipe: Path, sites: Sites, tmp_path: Path
) -> None:
    """And whoever missed a round the adapter whole; the record counts what was sent."""
    sent = bytes_down(sites)
    config = load(recipe, "download.quantizer=int8", "rounds=4", "cohort.size=2")
    federated = federate(config, sites)
    assert_equal(federated, simulate(config, tmp_path / "store"))
    whole = max(sent.values())
    for number, record in enumerate(federated[1][1:], 1):
        before = federated[1][number - 1].cohort
        for site in record.cohort:
            assert (sent[number, site] < whole / 3) == (site in before), (number, site)
    assert any(size == whole for (number, _), size in sent.items() if number)


def test_a_site_that_lost_the_adapter_before_is_sent_it_whole(recipe: Path, sites: Sites, tmp_path: Path) -> None:
    sent = bytes_down(sites)
    count = sites.before
    restarted = []

    def restart(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "train" and header["round"] == 2 and not restarted:
            restarted.append(site)
            sites.restart("b")
        count(site, header)

    sites.before = restart
    config = load(recipe, "download.quantizer=bf16", "rounds=4")
    assert_equal(federate(config, sites), simulate(config, tmp_path / "store"))
    assert sent[2, "b"] > 1.9 * sent[2, "a"]
    assert sent[3, "b"] == sent[3, "a"] == sent[2, "a"]


def federation_config(recipe: Path, *more: str) -> RunConfig:
    return load(recipe, "engine.absent_s=0.5", *more)


def test_a_call_that_is_lost_or_heard_twice_changes_nothing(
    recipe: Path, sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    sites.before, sites.after = lose, lose_answer
    config = load(recipe)
    assert_equal(federate(config, sites), simulate(config, tmp_path / "store"))
    assert len(lost) > 5


def test_a_worker_that_restarts_in_a_round_tunes_again_to_the_same_bits(
    recipe: Path, sites: Sites, tmp_path: Path
) -> None:
    restarted = []

    def restart(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "get" and header["round"] == 1 and not restarted:
            restarted.append(site)
            sites.restart("b")

    sites.before = restart
    config = load(recipe)
    assert_equal(federate(config, sites), simulate(config, tmp_path / "store"))
    assert restarted


def test_a_worker_that_is_stopped_while_it_tunes_says_nothing_of_the_round(
    recipe: Path, sites: Sites, tmp_path: Path
) -> None:
    """Its clients are tuned again once it is back; they have not failed."""
    stopped = []

    def stop(site: str, header: Header) -> None:
        if site == "b" and header["do"] == "train" and header["round"] == 1 and not stopped:
            stopped.append(site)
            threading.Timer(0.1, sites.restart, ["b"]).start()

    sites.before = stop
    config = load(recipe, "client.local_steps=40")
    assert_equal(federate(config, sites), simulate(config, tmp_path / "store"))
    assert stopped


def test_a_site_that_is_gone_is_a_failure_of_its_rounds_until_it_returns(recipe: Path, sites: Sites) -> None:
    def vanish(site: str, header: Header) -> None:
        if header.get("round") == 1 and site == "c":
            raise ChannelError("cut off")

    sites.before = vanish
    _, records = federate(federation_config(recipe), sites)
    assert [list(record.failures) for record in records] == [[], ["c"], []]
    assert "could not be reached" in records[1].failures["c"]


def test_a_slow_site_fails_at_the_deadline_and_its_late_answer_is_not_taken(recipe: Path, sites: Sites) -> None:
    late = threading.Event()

    def wait(site: str, header: Header) -> None:
        if site == "a" and header["do"] == "train" and header["round"] == 0:
            late.wait(6.0)

    sites.before = wait
    _, records = federate(federation_config(recipe, "engine.deadline_s=4", "rounds=2"), sites)
    late.set()
    assert list(records[0].failures) == ["a"]
    assert "deadline_s" in records[0].failures["a"]
    assert not records[1].failures


def test_an_answer_of_an_earlier_round_is_not_taken(
    recipe: Path, sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    sites.after = repeat
    config = load(recipe)
    assert_equal(federate(config, sites), simulate(config, tmp_path / "store"))
    assert sorted(repeated) == ["a", "a", "b", "b", "c", "c"]


def spoil(sites: Sites, site: str, change: Callable[[Header, bytes], tuple[Header, bytes]]) -> None:
    """Change what a site says of its updates, or their bytes."""

    def after(name: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        return change(*reply) if name == site and header["do"] in ("train", "get") else reply

    sites.after = after


def test_updates_that_are_not_finite_misshaped_or_huge_are_their_clients_failure(recipe: Path, sites: Sites) -> None:
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
        spoil(sites, "b", change)
        _, (record,) = federate(config, sites)
        assert list(record.failures) == ["b"], reason
        assert reason in record.failures["b"], (reason, record.failures)


def test_a_worker_that_ends_in_every_training_fails_its_clients(recipe: Path, sites: Sites) -> None:
    def restart(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        if site == "b" and header["do"] == "train" and header["round"] == 0 and reply[0].get("restarted"):
            sites.restart("b")
            raise ChannelError("ended")
        return reply

    sites.after = restart
    _, records = federate(load(recipe, "rounds=2"), sites)
    assert records[0].failures == {"b": "its worker ended 4 times in this round"}
    assert not records[1].failures


def throw(error: Exception) -> None:
    raise error


def test_too_few_sites_end_the_run_with_a_reason_for_each(recipe: Path, sites: Sites) -> None:
    sites.before = lambda site, header: cut_off() if header["do"] == "train" and site != "a" else None
    with pytest.raises(RoundError, match=r"1 usable updates of 3, needs .* 2\. b: it could not be reached"):
        federate(federation_config(recipe, "cohort.min_updates=2"), sites)


def cut_off() -> None:
    raise ChannelError("cut off")


def test_nobody_joins_within_the_deadline(recipe: Path, sites: Sites) -> None:
    sites.before = lambda site, header: cut_off()
    with pytest.raises(EngineError, match=r"No site joined within \[engine\] join_s = 1 s"):
        federate(federation_config(recipe, "engine.join_s=1"), sites)


def test_a_run_is_not_resumed_without_a_site_that_it_was_started_with(recipe: Path, sites: Sites) -> None:
    expected = expected_of(prepare_model(load(recipe)))
    with pytest.raises(EngineError, match="no longer names: z"):
        Remote(load(recipe), sites, list(SITES), expected).join({"a": 8, "z/1": 3})


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("fedit", "fedit .* is installed here, the server has other"),
        ("base", r"another base: SHA-256 [0-9a-f]{16}\.\.\. here, other"),
        ("tokenizer", "another tokenizer"),
    ],
)
def test_a_site_refuses_what_differs_and_names_it(recipe: Path, sites: Sites, what: str, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        federate(load(recipe), sites, **{what: "other"})


def test_a_site_refuses_attackers_and_unknown_rules(recipe: Path, sites: Sites) -> None:
    with pytest.raises(EngineError, match=r"\[attack\] is for simulations"):
        federate(load(recipe, "attack.name=sign-flip", 'attack.clients=["a"]'), sites)
    answer, _ = sites.call(
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


def test_sites_that_claim_the_clients_of_others_do_not_take_part(recipe: Path, sites: Sites) -> None:
    def claim(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        answer, blob = reply
        return ({**answer, "clients": {"a": 1000}} if site == "c" and "clients" in answer else answer), blob

    sites.after = claim
    _, records = federate(load(recipe, "rounds=1"), sites)
    assert records[0].cohort == ["a", "b"]


def test_a_run_after_another_starts_without_its_state(recipe: Path, sites: Sites, tmp_path: Path) -> None:
    """What clients kept belongs to a run, though sites serve one after another."""
    federate(load(recipe, "client.moments=keep"), sites)
    for overrides in ((), ("client.moments=keep",)):
        config = load(recipe, *overrides)
        assert_equal(federate(config, sites), simulate(config, tmp_path / "store" / "-".join(overrides)))


def test_an_adapter_that_was_evaluated_is_not_sent_again(recipe: Path, sites: Sites) -> None:
    """Whole or as a step: it comes once, for the evaluation or for the next round."""
    for override, per_round in (("download.quantizer=fp32", 1), ("download.quantizer=int8", 1)):
        config = load(recipe, override)
        prepared = prepare_model(config)
        engine = Remote(config, sites, SITES, expected_of(prepared))
        engine.join()
        sites.calls.clear()
        losses = []

        def finish(
            state: ServerState, record: RoundRecord, engine: Remote = engine, losses: list[Any] = losses
        ) -> None:
            losses.append(engine.evaluate(state.adapter, state.round_index - 1, state.step))

        before = sites.before
        sent = bytes_down(sites)
        train(config, engine, ServerState(0, prepared.initial), finish)
        sites.before = before
        assert [set(each) for each in losses] == [set(SITES)] * 3
        pieces = {site: len([key for key in sent if key[1] == site]) for site in SITES}
        assert pieces == dict.fromkeys(SITES, 3 * per_round), "three new adapters, each sent once"
        whole = max(sent.values())
        assert all(size == whole for size in sent.values()) or override.endswith("int8")


def test_a_site_that_speaks_for_clients_of_others_is_not_heard(recipe: Path, sites: Sites) -> None:
    def claim(header: Header, blob: bytes) -> tuple[Header, bytes]:
        return {**header, "results": [{**one, "others": ["a"]} for one in header.get("results", ())]}, blob

    spoil(sites, "b", claim)
    _, records = federate(load(recipe, "rounds=1", "engine.merge_clients=true"), sites)
    assert list(records[0].failures) == ["b"]
    assert "stands for clients that were not asked for one" in records[0].failures["b"]


def test_a_site_without_the_memory_refuses_and_says_what_is_needed(recipe: Path, sites: Sites) -> None:
    sites.become("c", "poor")
    engine = Remote(config := load(recipe), sites, SITES, expected_of(prepare_model(config)))
    missing = engine.join()
    assert list(missing) == ["c"]
    assert re.search(r"its memory is too small for the run: 0\.00 GB do not hold the base .* longest row", missing["c"])
    assert list(engine.clients()) == ["a", "b"]


def test_what_leaves_a_site_names_no_file_and_no_row(recipe: Path, sites: Sites) -> None:
    """Neither in answers, nor in the reasons of failures."""
    sites.become("a", "broken")
    sites.become("b", "many")
    seen: list[str] = []

    def listen(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        seen.append(json.dumps(reply[0]))
        return reply

    sites.after = listen
    _, records = federate(load(recipe, "rounds=1"), sites)
    assert set(records[0].cohort) == {"b/1", "b/2", "b/3", "c"}
    assert any("its own log says more" in line for line in seen)
    for line in seen:
        for secret in (str(sites.rows), "jsonl", "say b", "b/a", "b/c"):
            assert secret not in line


def test_a_sites_policy_decides_what_is_told(recipe: Path, sites: Sites) -> None:
    _, (whole,) = federate(load(recipe, "rounds=1"), sites)
    sites.become("a", "silent")
    config = load(recipe, "rounds=1")
    prepared = prepare_model(config)
    engine = Remote(config, sites, SITES, expected_of(prepared))
    engine.join()
    assert engine.clients() == {"a": 1, "b": 9, "c": 10}
    told: list[RoundRecord] = []
    state = train(config, engine, ServerState(0, prepared.initial), lambda state, record: told.append(record))
    assert not told[0].failures
    assert told[0].tokens < whole.tokens
    assert set(engine.evaluate(state.adapter, 0)) == {"b", "c"}


def test_a_site_logs_what_it_was_asked_and_what_it_sent(recipe: Path, sites: Sites) -> None:
    federate(load(recipe, "rounds=1"), sites)
    lines = list(sites.folder_of("b").logged())[-4:]
    assert [line["event"] for line in lines] == ["asked to join", "joined", "asked to train", "sent"]
    sent = lines[-1]
    assert sent["client"] == "b"
    assert sent["bytes"] > 0
    assert sent["norm"] > 0
    assert len(sent["sha256"]) == 64


def test_a_site_logs_what_the_privacy_of_its_clients_has_cost(recipe: Path, sites: Sites) -> None:
    private = (
        "privacy.noise_multiplier=1",
        "aggregation.name=fedit",
        "aggregation.weighting=uniform",
        "cohort.sampling=poisson",
        "rounds=2",
    )
    _, records = federate(load(recipe, *private), sites)
    assert [record.cohort for record in records] == [list(SITES)] * 2, "with a fraction of 1 all are drawn"
    sent = [line for line in sites.folder_of("b").logged() if line["event"] == "sent"][-2:]
    assert [line["epsilon"] for line in sent] == [record.epsilon for record in records]
    assert 0 < sent[0]["epsilon"] < sent[1]["epsilon"]


def test_a_site_adds_noise_of_its_own_and_tells_its_log_alone_what_that_cost(recipe: Path, sites: Sites) -> None:
    own = ("privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1", "aggregation.name=median", "rounds=2")
    told: list[Header] = []

    def listen(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        told.extend(reply[0].get("results", ()) if header["do"] == "train" else ())
        return reply

    sites.after = listen
    federate(load(recipe, *own), sites)
    sent = [line for line in sites.folder_of("b").logged() if line["event"] == "sent"][-2:]
    assert 0 < sent[0]["epsilon"] < sent[1]["epsilon"]
    assert {(about["num_examples"], about["num_tokens"], about["loss"]) for about in told} == {(1, 0, 0.0)}
    assert not any("epsilon" in about for about in told)


def test_a_message_that_is_longer_than_the_site_allows_is_refused(recipe: Path, sites: Sites) -> None:
    sites.become("a", "small")
    with pytest.raises(RoundError, match="takes 1,000 at most"):
        federate(load(recipe, "rounds=2"), sites, ["a"])


def restart_once(sites: Sites, site: str, at: int) -> None:
    """Restart a site's worker when an update, or its `at`-th next piece, is fetched."""
    count = itertools.count()

    def restart(name: str, header: Header) -> None:
        if header["do"] == "get" and next(count) == at:
            sites.restart(site)

    sites.before = restart


def test_many_clients_of_several_ranks_at_a_site_whose_worker_restarts(recipe: Path, sites: Sites) -> None:
    """Their updates, too long for an answer, are fetched while others are tuned."""
    sites.become("a", "many")
    adapters = []
    for restarts in (False, True):
        if restarts:
            restart_once(sites, "a", 3)
        adapter, records = federate(load(recipe, "adapter.rank=[1,2]", "aggregation.name=hetlora"), sites, ["a"])
        assert not any(record.failures for record in records)
        adapters.append(adapter)
    assert_same_bits(*adapters)


def test_a_site_hosts_many_clients(recipe: Path, sites: Sites, tmp_path: Path) -> None:
    """A folder of rows at one site is a client for each file; a simulation of these clients has the same bits."""
    sites.become("a", "many")
    adapter, records = federate(load(recipe), sites, ["a"])
    assert records[0].cohort == ["a/1", "a/2", "a/3"]
    assert not any(record.failures for record in records)
    rows = [
        {**json.loads(line), "client": f"a/{number}"}
        for number, name in enumerate(SITES, 1)
        for line in (sites.rows / f"{name}.jsonl").read_text().splitlines()
    ]
    numbered = tmp_path / "numbered.jsonl"
    numbered.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_equal((adapter, records), simulate(load(recipe, f"data.path={numbered}"), tmp_path / "store"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("aggregation.name=fedit", "aggregation.weighting=uniform"),
        ("aggregation.name=fedit", "aggregation.weighting=tokens"),
        ("aggregation.name=ffa-lora",),
    ],
    ids=lambda overrides: " ".join(overrides) or "fedit",
)
def test_a_site_that_sends_the_mean_of_its_clients(recipe: Path, sites: Sites, overrides: tuple[str, ...]) -> None:
    """One update is fetched; the rounds are the same but for rounding."""
    assert_the_mean_is_the_same(recipe, sites, overrides)


def test_a_mean_from_a_site_whose_worker_restarts(recipe: Path, sites: Sites) -> None:
    assert_the_mean_is_the_same(recipe, sites, ("aggregation.name=fedit", "aggregation.weighting=tokens"), restart=1)


def assert_the_mean_is_the_same(
    recipe: Path, sites: Sites, overrides: tuple[str, ...], restart: int | None = None
) -> None:
    sites.become("a", "many")
    adapter, records = federate(load(recipe, *overrides), sites, ["a"])
    if restart is not None:
        restart_once(sites, "a", restart)
    merged_adapter, merged = federate(load(recipe, *overrides, "engine.merge_clients=true"), sites, ["a"])
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(merged_adapter.tensors[name], tensor, rtol=1e-3, atol=1e-5)
    for record, one in zip(records, merged, strict=True):
        assert (one.cohort, one.failures, one.tokens) == (record.cohort, {}, record.tokens)
        assert one.train_loss == pytest.approx(record.train_loss)
        assert one.bytes_up == record.bytes_up // 3


def test_whoever_finishes_first_the_mean_is_the_first_clients(recipe: Path, sites: Sites) -> None:
    """With as many steps as rows the clients end in another order than they have; every one of them counts."""
    sites.become("a", "many")
    options = ("client.local_steps=none", "client.local_epochs=1", "client.batch_size=1", "engine.slots=3")
    config = load(recipe, *options, "engine.merge_clients=true", "cohort.min_updates=3")
    _, records = federate(config, sites, ["a"])
    assert [(record.cohort, record.failures) for record in records] == [(["a/1", "a/2", "a/3"], {})] * 3


def test_a_mean_that_cannot_be_used_is_the_failure_of_all_that_it_is_of(recipe: Path, sites: Sites) -> None:
    """And the updates of other sites are taken as they come."""
    sites.become("b", "pair")
    config = load(recipe, "rounds=1", "engine.merge_clients=true", "cohort.min_updates=2")
    nan = np.full(1, np.nan, "<f4").tobytes()
    changes: dict[str, Callable[[Header, bytes], tuple[Header, bytes]]] = {
        "not finite": lambda header, blob: (header, nan + blob[4:] if blob else blob),
        "ended after": lambda header, blob: (header, b""),
    }
    for reason, change in changes.items():
        spoil(sites, "b", change)
        _, (record,) = federate(config, sites)
        assert record.cohort == ["a", "b/1", "b/2", "c"]
        assert list(record.failures) == ["b/1", "b/2"]
        assert all(reason in failure for failure in record.failures.values())


def test_updates_of_many_megabytes(recipe: Path, sites: Sites, tmp_path: Path) -> None:
    sites.piece_bytes, sites.inline_bytes = 1 << 20, 1 << 20
    config = load(recipe, "adapter.rank=3000", "rounds=1")
    federated = federate(config, sites)
    assert_equal(federated, simulate(config, tmp_path / "store"))
    assert federated[1][0].bytes_up > 3 * 2 * sites.piece_bytes


# ---------------------------------------------------------------------------------------------- secure aggregation

SECURE = ("secure_aggregation.clip_norm=5", "secure_aggregation.max_weight=20")
HIDDEN = ("privacy.mechanism=distributed", "privacy.noise_multiplier=0.5", "cohort.sampling=poisson", "cohort.size=3")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("aggregation.name=fedit", "aggregation.weighting=tokens", "secure_aggregation.max_weight=200"),
        ("aggregation.name=fed-sb", "aggregation.weighting=uniform"),
        ("aggregation.name=fedsa-lora",),
        ("secure_aggregation.clip_norm=0.001",),
    ],
    ids=lambda overrides: " ".join(overrides) or "fedit",
)
def test_secure_sums_are_those_of_the_simulation(
    recipe: Path, sites: Sites, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """To the bit: sums of integers do not depend on who adds up what, or in which order."""
    assert_equal_sums(load(recipe, *SECURE, *overrides), sites, tmp_path)


def test_a_site_with_several_clients_sends_one_sum(recipe: Path, sites: Sites, tmp_path: Path) -> None:
    (record, *_) = assert_equal_sums(load(recipe, *SECURE), sites, tmp_path)
    sites.become("b", "pair")
    _, (paired, *_) = federate(load(recipe, *SECURE), sites)
    assert (paired.cohort, paired.failures) == (["a", "b/1", "b/2", "c"], {})
    assert paired.tokens > record.tokens


def assert_equal_sums(config: RunConfig, sites: Sites, tmp_path: Path) -> list[RoundRecord]:
    adapter, records = federate(config, sites)
    simulated, expected = simulate(config, tmp_path / "store")
    assert_same_bits(adapter, simulated)
    for record, one in zip(records, expected, strict=True):
        assert (record.cohort, record.failures, record.tokens) == (one.cohort, {}, one.tokens)
        assert record.train_loss == pytest.approx(one.train_loss, abs=1e-5)
        assert record.aggregation_loss is None
        assert record.bytes_up > 0
    return records


def test_of_secure_sums_no_update_count_or_loss_leaves_a_site(recipe: Path, sites: Sites) -> None:
    """What leaves it are public keys, encrypted shares, signatures, and numbers that look drawn at random."""
    seen: dict[str, list[Header]] = {}
    payloads: list[bytes] = []

    def listen(site: str, header: Header, reply: tuple[Header, bytes]) -> tuple[Header, bytes]:
        seen.setdefault(header["do"], []).append(reply[0])
        if header["do"] in ("train", "get") and reply[1]:
            payloads.append(reply[1])
        return reply

    sites.after = listen
    _, records = federate(load(recipe, *SECURE, "rounds=1"), sites)
    assert records[0].failures == {}
    for hello in seen["hello"]:
        assert set(hello.get("clients", {"": 1}).values()) == {1}, "how many rows there are is not told"
        assert "held_out" not in hello
    for news in seen["train"]:
        for result in news.get("results", ()):
            assert set(result) == {"client", "others", "num_examples", "size", "inline"}
            assert result["num_examples"] == 0
    told = {name for answer in seen["secure"] for name in answer["words"]}
    assert told == {"cipher", "mask", "seed", "identity", "signature", "shares", "seeds", "privates"}
    ones = np.unpackbits(np.frombuffer(b"".join(payloads), np.uint8)).mean()
    assert abs(ones - 0.5) < 0.01


@pytest.mark.parametrize("exchange", ["keys", "shares", "mask", "confirm", "unmask"])
def test_a_site_that_is_lost_at_any_exchange_of_four(
    recipe: Path, sites: Sites, monkeypatch: pytest.MonkeyPatch, exchange: str
) -> None:
    """Three of three parties are needed by default, so the threshold is lowered; the sum is that of the others."""
    monkeypatch.setattr(remote_site, "RETRY_S", (0.01, 0.02))
    options = (*SECURE, "rounds=1", "secure_aggregation.threshold=0.5", "secure_aggregation.min_parties=2")
    for site in SITES:
        sites.become(site, "two suffice")

    def lose(site: str, header: Header) -> None:
        asked = header["words"]["exchange"] if header["do"] == "secure" else "mask" if header["do"] == "train" else ""
        if site == "c" and asked == exchange:
            raise ChannelError("unplugged")

    sites.before = lose
    adapter, (record,) = federate(load(recipe, *options, "engine.absent_s=0.2"), sites)
    sites.before = lambda site, header: None
    if exchange in ("confirm", "unmask"):
        assert record.failures == {}
        everybody, _ = federate(load(recipe, *options), sites)
        assert_same_bits(adapter, everybody)
        return
    assert list(record.failures) == ["c"]
    others, (alone,) = federate(load(recipe, *options), sites, ["a", "b"])
    assert alone.failures == {}
    for name, tensor in others.tensors.items():  # of another grid: there are fewer clients
        torch.testing.assert_close(adapter.tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_below_the_threshold_a_secure_round_ends_the_run(
    recipe: Path, sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_site, "RETRY_S", (0.01, 0.02))

    def lose(site: str, header: Header) -> None:
        if site == "c" and header["do"] == "train":
            raise ChannelError("unplugged")

    sites.before = lose
    with pytest.raises(RoundError, match="masked sums of 2 of 3 parties, and needs 3"):
        federate(load(recipe, *SECURE, "engine.absent_s=0.2"), sites)


def test_a_site_whose_worker_restarts_is_lost_to_the_round(recipe: Path, sites: Sites) -> None:
    """Its keys are gone with it: nobody can make it mask twice under the same ones."""
    options = (*SECURE, "rounds=2", "secure_aggregation.threshold=0.5", "secure_aggregation.min_parties=2")
    for site in SITES:
        sites.become(site, "two suffice")
    restart_once(sites, "c", 0)
    _, records = federate(load(recipe, *options), sites)
    assert "has no keys of this round: it was started again" in records[0].failures["c"]
    assert records[1].failures == {}


def test_a_site_that_takes_part_in_sums_alone(recipe: Path, sites: Sites) -> None:
    """With sites that it knows by their identities: an identity that is not theirs is another site's."""
    paths = {site: sites.folder_of(site).path for site in SITES}
    identities = {site: public_identity(own_identity(path)) for site, path in paths.items()}

    def allow(peers: Mapping[str, str]) -> None:
        sites.become("b", "plain")
        lines = "".join(f'{site} = "{identity}"\n' for site, identity in peers.items())
        with (paths["b"] / "site.toml").open("a") as file:
            file.write(f"[policy]\nsums_only = true\n[peers]\n{lines}")

    allow(identities)
    config = load(recipe)
    missing = Remote(config, sites, SITES, expected_of(prepare_model(config))).join()
    assert missing == {"b": "it refuses: it takes part only where the server sees sums alone. Use [secure_aggregation]"}
    _, records = federate(load(recipe, *SECURE, "rounds=1"), sites)
    assert records[0].failures == {}
    allow({**identities, "c": identities["a"]})
    with pytest.raises(RoundError, match=r"got shares of 2 of 3 parties, .* b: it refuses: b does not know c by the"):
        federate(load(recipe, *SECURE, "rounds=2"), sites)


def test_a_threshold_that_is_too_low_for_a_site_is_refused(recipe: Path, sites: Sites) -> None:
    config = load(recipe, *SECURE, "secure_aggregation.threshold=0.5")
    sites.become("a", "two suffice")
    missing = Remote(config, sites, SITES, expected_of(prepare_model(config))).join()
    reason = "it refuses: [secure_aggregation] threshold = 0.5 is too low, it wants 0.667"
    assert missing == dict.fromkeys(("b", "c"), reason)


def test_a_site_that_wants_more_parties_than_there_are_is_lost(recipe: Path, sites: Sites) -> None:
    sites.become("a", "wary")
    with pytest.raises(RoundError, match=r"got shares of 2 of 3 .* a: it refuses: a takes part with 4 parties"):
        federate(load(recipe, *SECURE, "rounds=1"), sites)
    assert "takes part with 4 parties or more, not 3" in json.dumps(list(sites.folder_of("a").logged()))


def test_a_site_gives_no_plain_update_in_a_run_of_secure_sums(recipe: Path, sites: Sites) -> None:
    """A server that forgets to mention masks gets nothing."""
    config = load(recipe, *SECURE, "rounds=1")
    prepared = prepare_model(config)
    engine = Remote(config, sites, SITES, expected_of(prepared))
    engine.join()
    with pytest.raises(RoundError, match="secure aggregation in all that it asks for, or nowhere"):
        train(config, engine, ServerState(0, prepared.initial), lambda state, record: None)


def test_noise_in_shares_at_real_sites(recipe: Path, sites: Sites) -> None:
    """Drawn from the operating system, so that no two runs are the same; each site logs what it costs."""
    options = (*HIDDEN, "aggregation.name=fedit", "aggregation.weighting=uniform", "privacy.clip_norm=0.01", "rounds=2")
    adapters = [federate(load(recipe, *options), sites)[0] for _ in range(2)]
    assert any(not torch.equal(t, adapters[1].tensors[n]) for n, t in adapters[0].tensors.items())
    sent = [line for line in sites.folder_of("a").logged() if "epsilon_against_parties" in line][-4:]
    assert all(line["masked"] and line["epsilon_against_parties"] >= line["epsilon"] for line in sent)
    of_a_run = [line["epsilon_against_parties"] for line in sent[:2]]
    assert of_a_run[0] < of_a_run[1]
    assert sent[0]["registered"] == 3
    assert sent[0]["noise_multiplier"] == 0.5


def test_with_noise_a_client_that_fails_is_there_with_nothing(recipe: Path, sites: Sites) -> None:
    """That its training broke may depend on its rows: neither the server nor the record hears of it."""
    options = (*HIDDEN, "aggregation.name=fedit", "aggregation.weighting=uniform", "privacy.clip_norm=0.01", "rounds=1")
    breaks = ("client.learning_rate=1e30", "client.clip_norm=none")
    with pytest.raises(RoundError, match="loss is not finite"):
        federate(load(recipe, "rounds=1", *breaks), sites)
    _, (record,) = federate(load(recipe, *options, *breaks), sites)
    assert record.failures == {}
