"""The round loop with an engine of made-up answers, and its checkpoints."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from fedit.checkpoints import load_state, save_state
from fedit.config import RunConfig, load_plugins, parse_config
from fedit.files import append_line, keep_lines
from fedit.interfaces import Adapter, Aggregate, ClientFailure, ClientTask, ClientUpdate, FeditError, RoundError
from fedit.lowrank import LowRank
from fedit.server import RoundRecord, ServerState, download_size, next_side, run_round, train
from fedit.wire import side_tensors, wire_size

load_plugins()

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
CLIENTS = ["c0", "c1", "c2"]
Answer = Callable[[ClientTask], ClientUpdate | ClientFailure]


def random_adapter(seed: int, rank: int = 2) -> Adapter:
    rng = np.random.default_rng(seed)
    tensors = {A: rng.normal(size=(rank, 5)), B: rng.normal(size=(3, rank))}
    return Adapter({name: torch.from_numpy(array.astype(np.float32)) for name, array in tensors.items()}, rank, 4.0)


def good(task: ClientTask) -> ClientUpdate:
    """Answer with an update, and a number of rows, that are this client's own in this round."""
    number = int(task.client.removeprefix("c"))
    update = random_adapter(100 * task.round_index + number, task.adapter.rank)
    return ClientUpdate(
        task.client, update, num_examples=10 + number, num_tokens=100 + number, loss=1.0 + number, num_steps=2
    )


@dataclass
class FakeEngine:
    """Answers by `special[client]`, else well; in the order of `order`, else in that of the tasks."""

    names: Sequence[str] = tuple(CLIENTS)
    special: dict[str, Answer] | None = None
    order: Sequence[str] | None = None

    def clients(self) -> dict[str, int]:
        return dict.fromkeys(self.names, 10)

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        by_client = {task.client: task for task in tasks}
        for client in self.order or by_client:
            yield (self.special or {}).get(client, good)(by_client[client])


def config(**tables: object) -> RunConfig:
    return parse_config({"rounds": 3, "adapter": {"rank": 2, "alpha": 4}, **tables})


def one_round(engine: FakeEngine, **tables: object) -> tuple[ServerState, RoundRecord]:
    return run_round(config(**tables), engine, ServerState(0, random_adapter(0)))


def same_bits(left: Adapter, right: Adapter) -> bool:
    return (left.rank, left.lora_alpha) == (right.rank, right.lora_alpha) and all(
        torch.equal(left.tensors[name], right.tensors[name]) for name in (A, B)
    )


# -------------------------------------------------------------------------------------------------------- a round


def test_a_round_by_hand() -> None:
    """p = 10/33, 11/33, 12/33."""
    state, record = one_round(FakeEngine())
    start, updates = random_adapter(0), [random_adapter(number) for number in range(3)]
    for name in (A, B):
        mean = sum(weight / 33 * u.tensors[name].double() for weight, u in zip((10, 11, 12), updates, strict=True))
        torch.testing.assert_close(state.adapter.tensors[name], (start.tensors[name].double() + mean).float())
    assert state.round_index == 1
    assert (record.round, record.cohort, record.failures) == (1, CLIENTS, {})
    assert record.tokens == 303
    assert record.train_loss == pytest.approx((100 * 1 + 101 * 2 + 102 * 3) / 303)
    assert record.bytes_up == record.bytes_down == 3 * wire_size(start.tensors)
    moved = torch.cat([(state.adapter.tensors[name] - start.tensors[name]).flatten() for name in (A, B)])
    assert record.update_norm == pytest.approx(moved.norm().item(), rel=1e-5)
    assert record.aggregation_loss is not None
    assert 0 < record.aggregation_loss < 2


@pytest.mark.parametrize("order", [["c0", "c1", "c2"], ["c2", "c1", "c0"], ["c1", "c2", "c0"]])
def test_answers_in_any_order_are_aggregated_in_client_order(order: list[str]) -> None:
    """Sums of floats depend on their order: the bits, and the order of what the rule sees, must not change."""
    seen: list[str] = []
    run = config()
    plain = type(run.aggregation)

    class Watched(plain):
        def aggregate(self, adapter, updates, rng):
            return super().aggregate(adapter, (seen.append(update.client) or update for update in updates), rng)

    watched = run.model_copy(update={"aggregation": Watched()})
    state, record = run_round(watched, FakeEngine(order=order), ServerState(0, random_adapter(0)))
    expected, expected_record = one_round(FakeEngine())
    assert seen == CLIENTS
    assert same_bits(state.adapter, expected.adapter)
    assert record == expected_record


def test_answers_are_passed_on_as_they_come() -> None:
    """The first client's update must be aggregated before the last one has answered: nothing is collected."""
    log: list[str] = []

    def logged(task: ClientTask) -> ClientUpdate:
        log.append(f"{task.client} answers")
        return good(task)

    run = config()
    plain = type(run.aggregation)

    class Watched(plain):
        def aggregate(self, adapter, updates, rng):
            return super().aggregate(adapter, (log.append(f"{u.client} counted") or u for u in updates), rng)

    engine = FakeEngine(special=dict.fromkeys(CLIENTS, logged))
    run_round(run.model_copy(update={"aggregation": Watched()}), engine, ServerState(0, random_adapter(0)))
    assert log == [f"{client} {what}" for client in CLIENTS for what in ("answers", "counted")]


def test_every_client_receives_an_adapter_of_its_own_rank() -> None:
    received: dict[str, Adapter] = {}

    def kept(task: ClientTask) -> ClientUpdate:
        received[task.client] = task.adapter
        return good(task)

    start = random_adapter(0)
    run = config(adapter={"rank": [2, 1], "alpha": 4}, aggregation="flexlora")
    _, record = run_round(run, FakeEngine(special=dict.fromkeys(CLIENTS, kept)), ServerState(0, start))
    assert {client: adapter.rank for client, adapter in received.items()} == {"c0": 2, "c1": 1, "c2": 2}
    assert same_bits(received["c1"], start.cut(1))
    assert record.bytes_down == record.bytes_up == 2 * wire_size(start.tensors) + wire_size(start.cut(1).tensors)


def test_a_client_that_prunes_its_rank_is_sent_no_more_from_then_on(tmp_path: Path) -> None:
    received: list[int] = []

    def pruned(task: ClientTask) -> ClientUpdate:
        received.append(task.adapter.rank)
        kept = replace(task, adapter=task.adapter.cut(max(1, task.adapter.rank // 2)))
        return good(kept)

    run = config(
        adapter={"rank": 4, "alpha": 4},
        aggregation="hetlora",
        objective={"name": "self-pruning", "keep": 0.5},
        rounds=3,
    )
    engine = FakeEngine(special={"c1": pruned})
    state, record = run_round(run, engine, ServerState(0, random_adapter(0, rank=4)))
    assert (record.failures, record.ranks, state.ranks) == ({}, {"c1": 2}, {"c1": 2})
    save_state(state, tmp_path)
    loaded = load_state(tmp_path)
    assert loaded is not None
    state, record = run_round(run, engine, loaded)
    assert (record.ranks, state.ranks, received) == ({"c1": 1}, {"c1": 1}, [4, 2])
    state, record = run_round(run, engine, state)
    assert (record.ranks, state.ranks, received) == ({}, {"c1": 1}, [4, 2, 1])


@pytest.mark.parametrize(("objective", "rank"), [("plain", 2), ("self-pruning", 1), ("self-pruning", 3)])
def test_a_rank_that_the_objective_does_not_give_is_its_clients_failure(objective: str, rank: int) -> None:
    def cut(task: ClientTask) -> ClientUpdate:
        return good(replace(task, adapter=task.adapter.cut(rank)))

    run = config(adapter={"rank": 4, "alpha": 4}, aggregation="hetlora", objective={"name": objective})
    if objective == "self-pruning":
        run = run.model_copy(update={"objective": run.objective.model_copy(update={"keep": 0.5})})
    _, record = run_round(run, FakeEngine(special={"c1": cut}), ServerState(0, random_adapter(0, rank=4)))
    assert set(record.failures) == {"c1"}
    assert "shaped" in record.failures["c1"]


# ------------------------------------------------------------------------------------------------------- failures


def broken(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **fields: object) -> Answer:
    def answer(task: ClientTask) -> ClientUpdate:
        update = good(task)
        tensors = change(dict(update.update.tensors))
        return replace(update, update=replace(update.update, tensors=tensors, **fields))

    return answer


def counted(**fields: object) -> Answer:
    return lambda task: replace(good(task), **fields)


FAILURES: dict[str, tuple[Answer, str]] = {
    "failed": (lambda task: ClientFailure(task.client, "out of memory"), "out of memory"),
    "nan": (broken(lambda t: t | {A: t[A] * float("nan")}), f"not finite (1 tensors, first {A}"),
    "one_infinite_number": (
        broken(lambda t: t | {B: t[B].clone().index_fill_(0, torch.tensor([1]), torch.inf)}),
        f"not finite (1 tensors, first {B}",
    ),
    "wrong_shape": (
        broken(lambda t: t | {A: t[A].T}),
        f"not shaped like the adapter that was sent (1 tensors, first ['{A}'",
    ),
    "missing": (broken(lambda t: {A: t[A]}), f"(1 tensors, first ['{B}'"),
    "unexpected": (broken(lambda t: t | {"other": t[A]}), "(1 tensors, first ['other'"),
    "nothing": (broken(lambda t: {}), "(2 tensors"),
    "wrong_rank": (lambda task: replace(good(task), update=random_adapter(1, rank=3)), "(2 tensors"),
    "wrong_scale": (
        broken(lambda t: t, lora_alpha=400.0),
        "another scale: (rank, lora_alpha) (2, 400.0), sent (2, 4.0)",
    ),
    "nan_loss": (counted(loss=float("nan")), "training loss is not finite"),
    "negative_rows": (counted(num_examples=-1), "num_examples -1"),
    "negative_tokens": (counted(num_tokens=-5), "num_tokens -5"),
    "no_step": (counted(num_steps=0), "num_steps is 0"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_an_unusable_answer_fails_its_client_only(case: str) -> None:
    """The round goes on as if the client had not been drawn; nothing of its answer is counted."""
    answer, reason = FAILURES[case]
    state, record = one_round(FakeEngine(special={"c1": answer}))
    assert list(record.failures) == ["c1"]
    assert reason in record.failures["c1"]
    expected, without = one_round(FakeEngine(names=["c0", "c2"]))
    assert same_bits(state.adapter, expected.adapter)
    assert (record.tokens, record.train_loss, record.bytes_up) == (without.tokens, without.train_loss, without.bytes_up)
    assert (record.cohort, record.bytes_down) == (CLIENTS, 3 * wire_size(random_adapter(0).tensors))


def test_a_client_that_never_answers_has_failed() -> None:
    _, record = one_round(FakeEngine(order=["c2", "c0"]))
    assert record.failures == {"c1": "no answer"}


def test_too_few_updates_end_the_run_with_all_reasons() -> None:
    special = {"c0": FAILURES["failed"][0], "c2": FAILURES["nan"][0]}
    with pytest.raises(RoundError) as caught:
        one_round(FakeEngine(special=special), cohort={"min_updates": 2})
    message = str(caught.value)
    assert "Round 1 got 1 usable updates of 3, needs [cohort] min_updates = 2" in message
    assert "c0: out of memory" in message
    assert "c2: the update is not finite" in message
    one_round(FakeEngine(special=special), cohort={"min_updates": 1})


def test_all_clients_failing_ends_the_run() -> None:
    with pytest.raises(RoundError, match=r"got 0 usable updates of 3.*c2: out of memory"):
        one_round(FakeEngine(special=dict.fromkeys(CLIENTS, FAILURES["failed"][0])))


def test_a_global_adapter_that_overflows_ends_the_run() -> None:
    """Every update is finite; their sum with the adapter is not, in float32. It must never become a checkpoint."""
    huge = broken(lambda t: {name: torch.full_like(tensor, 3e38) for name, tensor in t.items()})
    state, _ = one_round(FakeEngine(special=dict.fromkeys(CLIENTS, huge)))
    with pytest.raises(RoundError, match="Round 2: the new global adapter is not finite"):
        run_round(config(), FakeEngine(special=dict.fromkeys(CLIENTS, huge)), state)


def test_training_goes_on_from_any_state_with_the_same_bits() -> None:
    run = config(server_optimizer="fedavgm")
    states: list[ServerState] = []
    train(run, FakeEngine(), ServerState(0, random_adapter(0)), lambda state, record: states.append(state))
    assert [state.round_index for state in states] == [1, 2, 3]
    for state in states:
        resumed = train(run, FakeEngine(), state, lambda state, record: None)
        assert same_bits(resumed.adapter, states[-1].adapter)


# ----------------------------------------------------------------------------------------------------------- cohorts


def test_clients_are_told_how_often_they_took_part() -> None:
    """So that a client goes on in its rows where it stopped, whatever rounds it was left out of."""
    told: dict[str, list[int]] = {}

    class Listening(FakeEngine):
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            for task in tasks:
                told.setdefault(task.client, []).append(task.num_earlier)
            return super().run(tasks)

    engine, settings = Listening(), config(rounds=9, cohort={"size": 2})
    train(settings, engine, ServerState(0, random_adapter(0)), lambda state, record: None)
    assert len(told) == len(engine.clients())
    assert all(counts == list(range(len(counts))) for counts in told.values())


def test_a_round_that_draws_nobody_changes_nothing_but_its_number() -> None:
    run = config(cohort={"fraction": 1e-9, "sampling": "poisson"})
    state = ServerState(1, random_adapter(0), {"x": torch.ones(1)}, 5)
    after, record = run_round(run, FakeEngine(), state)
    assert (after.round_index, after.side_step_bytes) == (2, 5)
    assert after.adapter is state.adapter
    assert after.optimizer_state is state.optimizer_state
    assert (record.round, record.cohort, record.train_loss, record.tokens) == (2, [], None, 0)
    assert record.bytes_up == record.bytes_down == 0


# -------------------------------------------------------------------------------------------------------- wire size


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
    "modules", [["q"], ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up"], ["größe.層"]]
)
def test_wire_size_is_that_of_the_file(rank: int, modules: list[str]) -> None:
    tensors = {}
    for module in modules:
        tensors |= {f"{module}.lora_B.weight": torch.zeros(7, rank), f"{module}.lora_A.weight": torch.zeros(rank, 33)}
    assert wire_size(tensors) == len(save(tensors))


def test_wire_size_of_many_layers() -> None:
    tensors = {f"layers.{k}.lora_{x}.weight": torch.zeros(4 + k, 4) for k in range(40) for x in "AB"}
    assert wire_size(tensors) == len(save(tensors))


# ------------------------------------------------------------------------------------------------------- checkpoints


def state_after(num_rounds: int) -> ServerState:
    return train(
        config(rounds=num_rounds, server_optimizer="fedavgm"),
        FakeEngine(),
        ServerState(0, random_adapter(0)),
        lambda *_: None,
    )


def test_a_checkpoint_is_the_state_bit_by_bit(tmp_path: Path) -> None:
    state = state_after(2)
    assert set(state.optimizer_state) == {A, B}
    save_state(state, tmp_path / "checkpoints")
    loaded = load_state(tmp_path / "checkpoints")
    assert loaded is not None
    assert loaded.round_index == 2
    assert same_bits(loaded.adapter, state.adapter)
    assert {name: tensor.dtype for name, tensor in loaded.optimizer_state.items()} == {
        A: torch.float64,
        B: torch.float64,
    }
    assert all(torch.equal(loaded.optimizer_state[name], state.optimizer_state[name]) for name in (A, B))


def test_a_checkpoint_keeps_the_order_of_the_tensors(tmp_path: Path) -> None:
    """A sum over tensors in another order has other bits."""
    tensors = {f"{name}.lora_{x}.weight": torch.ones(2, 2) for name in ("z", "a", "m") for x in "BA"}
    state = ServerState(1, Adapter(tensors, 2, 1.0), {name: tensor.double() for name, tensor in tensors.items()})
    save_state(state, tmp_path)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert list(loaded.adapter.tensors) == list(loaded.optimizer_state) == list(tensors)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "absent") is None


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    for round_index in (1, 2):
        save_state(ServerState(round_index, random_adapter(round_index)), tmp_path)
    last = tmp_path / "round-00002.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(RoundError, match=r"round-00002.safetensors is damaged.*Delete it to go on from the one before"):
        load_state(tmp_path)
    last.unlink()
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.round_index == 1


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    state = state_after(1)
    for index in [*range(8, 13), 99_999, 100_000]:
        save_state(replace(state, round_index=index), tmp_path, keep=2)
        loaded = load_state(tmp_path)
        assert loaded is not None
        assert loaded.round_index == index
    assert len(list(tmp_path.iterdir())) == 2


def test_half_written_checkpoints_are_not_read(tmp_path: Path) -> None:
    save_state(replace(state_after(1), round_index=4), tmp_path)
    (tmp_path / ".round-00005.safetensors.partial").write_bytes(b"half of a")
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.round_index == 4
    save_state(replace(state_after(1), round_index=5), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["round-00004.safetensors", "round-00005.safetensors"]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from fedit.interfaces import Adapter, FeditError
from fedit.checkpoints import save_state
from fedit.server import ServerState
folder = Path(sys.argv[1])
small, large = (Adapter({"x.lora_A.weight": torch.ones(1, n)}, 1, 1.0) for n in (10, 100_000))
save_state(ServerState(1, small), folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    save_state(ServerState(2, large), folder)
except FeditError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A process whose files may not grow beyond 10 kB: writing really fails half-way."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    assert f"{tmp_path / 'round-00002.safetensors'} could not be written: " in done.stdout
    assert "File too large" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["round-00001.safetensors"]
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.round_index == 1


def test_no_space_left_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(state_after(1), tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FeditError, match=r"round-00002.safetensors could not be written: No space left on device"):
        save_state(state_after(2), tmp_path)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["round-00001.safetensors"]
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert same_bits(loaded.adapter, state_after(1).adapter)


# ------------------------------------------------------------------------------------------------------------- lines


def test_a_line_that_does_not_fit_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    append_line(path, {"round": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))
    try:
        with pytest.raises(FeditError, match=r"rounds.jsonl could not be written: File too large"):
            append_line(path, {"round": 2, "cohort": ["0"] * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == '{"round": 1}\n'


@pytest.mark.parametrize(("num_lines", "kept"), [(None, "1\n2\n"), (5, "1\n2\n"), (1, "1\n"), (0, "")])
def test_keeping_whole_lines(tmp_path: Path, num_lines: int | None, kept: str) -> None:
    path = tmp_path / "lines"
    path.write_text("1\n2\n3 half-writ")
    keep_lines(path, num_lines)
    assert path.read_text() == kept
    keep_lines(tmp_path / "absent", 3)
    assert not (tmp_path / "absent").exists()


# --------------------------------------------------------------------------------------- what lies beside an adapter


def beside(rank: int, value: float = 1.0) -> dict[str, LowRank]:
    return {"layer": LowRank(torch.full((3, rank), value), torch.ones(rank, 5))}


def test_the_side_grows_or_is_replaced() -> None:
    adapter = replace(random_adapter(0), side=beside(1))
    more = {**beside(1, 2.0), "other": LowRank(torch.ones(2, 1), torch.ones(1, 2))}
    grown = next_side(adapter, Aggregate({}, more))
    assert torch.equal(grown["layer"].dense(), torch.full((3, 5), 3.0))
    assert grown.keys() == {"layer", "other"}
    assert grown["layer"].b.dtype == torch.float32
    replaced = next_side(adapter, Aggregate({}, beside(2), replaces_side=True))
    assert torch.equal(replaced["layer"].dense(), torch.full((3, 5), 2.0))
    assert next_side(adapter, Aggregate({}, beside(0), replaces_side=True)) == {}
    assert next_side(adapter, Aggregate({})) == adapter.side


def test_a_client_downloads_what_it_missed() -> None:
    """The last step of the side where it was there, all of it where it was not, and never more than that."""
    run = config(aggregation="fedex-lora")
    adapter = replace(random_adapter(0), side=beside(2))
    whole, plain = wire_size(side_tensors(adapter.side)), wire_size(adapter.tensors)
    for last_step, rounds, expected in ((100, [2], 100), (100, [1], whole), (100, [], whole), (9999, [2], whole)):
        state = ServerState(3, adapter, side_step_bytes=last_step)
        assert download_size(run, state, ClientTask("c0", 3, adapter), rounds) == plain + expected


def test_a_client_downloads_what_the_server_changed() -> None:
    """FedSVD turns the frozen A as well; FLoRA's next adapter is drawn from the seed."""
    adapter = random_adapter(0)
    sizes = {
        "fedsvd": wire_size(adapter.tensors),
        "flora": wire_size({}),
        "ffa-lora": wire_size(adapter.only(["lora_B"])),
    }
    for rule, expected in sizes.items():
        task = ClientTask("c0", 1, adapter)
        assert download_size(config(aggregation=rule), ServerState(1, adapter), task, [0]) == expected


def test_a_side_that_is_not_finite_ends_the_round() -> None:
    run = config(aggregation="fedex-lora")

    class Broken(type(run.aggregation)):
        def aggregate(self, adapter, updates, rng):
            result = super().aggregate(adapter, updates, rng)
            return replace(result, side_step=beside(1, float("inf")))

    with pytest.raises(RoundError, match="not finite"):
        run_round(run.model_copy(update={"aggregation": Broken()}), FakeEngine(), ServerState(0, random_adapter(0)))


def test_a_checkpoint_keeps_the_side(tmp_path: Path) -> None:
    state = ServerState(2, replace(random_adapter(0), side=beside(2)), side_step_bytes=77)
    save_state(state, tmp_path)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.side_step_bytes == 77
    assert torch.equal(loaded.adapter.side["layer"].b, state.adapter.side["layer"].b)
    assert torch.equal(loaded.adapter.side["layer"].a, state.adapter.side["layer"].a)
