"""Cohorts and ranks: who is drawn, how often, and with an adapter of what size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedit.cohort import check_clients, client_rank, mean_share, never_sampled, sample_cohort
from fedit.config import RunConfig, load_plugins, parse_config
from fedit.interfaces import ConfigError

load_plugins()

CLIENTS = {"c0": 1, "c1": 2, "c2": 3}
MANY = {f"client {number}": 10 for number in range(100)}


def config(**tables: object) -> RunConfig:
    return parse_config({"rounds": 3, **tables})


def cohorts(seed: int, num_rounds: int, size: int = 5) -> list[list[str]]:
    run = config(seed=seed, cohort={"size": size}, partition={"name": "iid", "num_clients": 100})
    return [sample_cohort(run, MANY, round_index) for round_index in range(num_rounds)]


def test_cohorts_are_drawn_without_replacement_in_client_order() -> None:
    for cohort in cohorts(seed=0, num_rounds=50):
        assert len(cohort) == 5
        assert cohort == sorted(set(cohort), key=list(MANY).index)


def test_cohorts_depend_on_the_seed_and_the_round_alone() -> None:
    assert cohorts(0, 20) == cohorts(0, 20)
    assert cohorts(0, 20) != cohorts(1, 20)
    assert len({tuple(cohort) for cohort in cohorts(0, 20)}) == 20


def test_cohorts_are_uniform_and_reach_everybody() -> None:
    """2,000 rounds of 5 of 100: 100 draws each, sd 9.7; all within 4.5 sd."""
    counts = Counter(client for cohort in cohorts(0, 2000) for client in cohort)
    assert set(counts) == set(MANY)
    assert max(abs(count - 100) for count in counts.values()) < 44
    pairs = Counter(tuple(cohort[:2]) for cohort in cohorts(0, 2000, size=2))
    assert len(pairs) > 1500  # of 4,950 about 1,645 are seen when the members are drawn independently


def test_over_many_seeds_few_clients_are_never_drawn() -> None:
    """20 rounds of 5 of 100 leave each client out with probability 0.95^20 = 0.36, different ones by seed."""
    left_out = []
    for seed in range(20):
        run = config(seed=seed, rounds=20, cohort={"size": 5}, partition={"name": "iid", "num_clients": 100})
        left_out.append(never_sampled(run, MANY))
    assert np.mean([len(names) for names in left_out]) == pytest.approx(100 * 0.95**20, abs=4)
    assert set.intersection(*map(set, left_out)) == set()


def test_without_a_size_everybody_takes_part() -> None:
    assert sample_cohort(config(), CLIENTS, 0) == list(CLIENTS)


def test_poisson_cohorts_have_each_client_by_itself() -> None:
    """1,000 rounds at rate 0.05 of 100: sizes have the mean 5 and the variance 4.75 of a binomial, not 0."""
    run = config(cohort={"fraction": 0.05, "sampling": "poisson"}, partition={"name": "iid", "num_clients": 100})
    drawn = [sample_cohort(run, MANY, index) for index in range(1000)]
    sizes = [len(cohort) for cohort in drawn]
    assert np.mean(sizes) == pytest.approx(5, abs=0.3)
    assert np.var(sizes) == pytest.approx(4.75, rel=0.2)
    counts = Counter(client for cohort in drawn for client in cohort)
    assert max(abs(counts[client] - 50) for client in MANY) < 32  # 4.6 sd
    by_size = config(cohort={"size": 5, "sampling": "poisson"}, partition={"name": "iid", "num_clients": 100})
    assert [sample_cohort(by_size, MANY, index) for index in range(1000)] == drawn


def test_round_robin_takes_the_next_ones() -> None:
    run = config(cohort={"size": 2, "sampling": "round_robin"})
    assert [sample_cohort(run, CLIENTS, index) for index in range(3)] == [["c0", "c1"], ["c0", "c2"], ["c1", "c2"]]


def test_weighted_cohorts_are_drawn_by_rows() -> None:
    """One of three, 6,000 rounds, rows 1:2:3; sd of the counts below 39. Two of three: exactly by renormalising."""
    run = config(cohort={"size": 1, "sampling": "weighted"})
    counts = Counter(client for index in range(6000) for client in sample_cohort(run, CLIENTS, index))
    assert all(abs(counts[client] - 1000 * rows) < 160 for client, rows in CLIENTS.items())
    run = config(cohort={"size": 2, "sampling": "weighted"})
    counts = Counter(client for index in range(6000) for client in sample_cohort(run, CLIENTS, index))
    # Left out is the last of an order drawn by rows: c0 with 2/6 * 3/4 + 3/6 * 2/3.
    assert abs(counts["c0"] - 6000 * (1 - (2 / 6 * 3 / 4 + 3 / 6 * 2 / 3))) < 160


# ------------------------------------------------------------------------------------------------------ availability


def test_a_trace_says_who_can_be_drawn(tmp_path: Path) -> None:
    trace = {"c0": [[2, 3]], "c2": [[1, 1], [3, 3]]}
    run = config(cohort={"availability": trace})
    assert [sample_cohort(run, CLIENTS, index) for index in range(3)] == [["c1", "c2"], ["c0", "c1"], [*CLIENTS]]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(trace))
    from_file = config(cohort={"availability": str(file)})
    assert from_file == run, "what is recorded is the trace, not where it was"
    assert parse_config(run.to_json()) == run


@pytest.mark.parametrize("sampling", ["uniform", "weighted", "poisson", "round_robin"])
def test_nobody_is_drawn_who_is_offline(sampling: str) -> None:
    trace = {"c0": [[1, 2]], "c1": [[2, 2]], "c2": [[2, 2]]}
    run = config(rounds=4, cohort={"availability": trace, "sampling": sampling, "size": 2})
    assert sample_cohort(run, CLIENTS, 2) == sample_cohort(run, CLIENTS, 3) == []
    assert set(sample_cohort(run, CLIENTS, 0)) <= {"c0"}
    assert len(sample_cohort(run, CLIENTS, 1)) in ((0, 1, 2, 3) if sampling == "poisson" else (2,))


def test_round_robin_passes_over_who_is_offline() -> None:
    run = config(cohort={"availability": {"c1": [[3, 3]]}, "sampling": "round_robin", "size": 1})
    assert [sample_cohort(run, CLIENTS, index) for index in range(3)] == [["c0"], ["c2"], ["c2"]]


def test_with_a_probability_each_is_online_by_itself() -> None:
    run = config(cohort={"availability": 0.7}, partition={"name": "iid", "num_clients": 100})
    sizes = [len(sample_cohort(run, MANY, index)) for index in range(500)]
    assert np.mean(sizes) == pytest.approx(70, abs=0.9)
    assert np.var(sizes) == pytest.approx(21, rel=0.3)
    few = config(cohort={"availability": 0.7, "size": 5}, partition={"name": "iid", "num_clients": 100})
    assert {len(sample_cohort(few, MANY, index)) for index in range(100)} == {5}


def test_the_budget_of_the_baselines_follows_who_took_part() -> None:
    run = config(rounds=4, cohort={"availability": {"c0": [[1, 1]], "c1": [[1, 2]], "c2": [[1, 2]]}})
    assert mean_share(run, CLIENTS) == pytest.approx((3 + 2) / 12)
    assert mean_share(config(cohort={"size": 2}), CLIENTS) == pytest.approx(2 / 3)
    assert never_sampled(config(cohort={"availability": {"c1": []}}), CLIENTS) == ["c1"]


@pytest.mark.parametrize(
    ("availability", "reason"),
    [
        ({"c0": [[3, 2]]}, "rounds 3 to 2 are no range"),
        ({"c0": [[0, 2]]}, "rounds 0 to 2 are no range"),
        ("missing.json", "cannot be read"),
        (0.0, "greater than 0"),
    ],
)
def test_a_trace_that_cannot_be_meant_is_refused(availability: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(cohort={"availability": availability})


def test_a_trace_of_other_clients_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no client is named 'c11'. Did you mean 'c1'"):
        check_clients(config(cohort={"availability": {"c11": [[1, 2]]}}), CLIENTS)


# -------------------------------------------------------------------------------------------------------------- ranks


def ranks(rank: object, clients: dict[str, int] = CLIENTS, seed: int = 0) -> list[int]:
    run = config(seed=seed, adapter={"rank": rank}, aggregation="flexlora")
    return [client_rank(run, clients, client) for client in clients]


def test_ranks_in_turn_and_by_rows() -> None:
    assert ranks(5) == [5, 5, 5]
    assert ranks([4, 8]) == [4, 8, 4]
    assert ranks({"min": 2, "max": 8, "by": "rows"}) == [2, 5, 8]
    assert ranks({"min": 2, "max": 8, "by": "rows"}, {"a": 7, "b": 7}) == [8, 8]
    assert config(adapter={"rank": {"min": 2, "max": 8}}, aggregation="flora").adapter.max_rank == 8


def test_ranks_of_a_range_are_drawn_for_each_client() -> None:
    drawn = ranks({"min": 2, "max": 5}, MANY)
    assert set(drawn) == {2, 3, 4, 5}
    assert drawn == ranks({"min": 2, "max": 5}, MANY)
    assert drawn != ranks({"min": 2, "max": 5}, MANY, seed=1)


def test_a_range_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="min = 4 is more than max = 2"):
        config(adapter={"rank": {"min": 4, "max": 2}}, aggregation="flexlora")
    with pytest.raises(ConfigError, match="needs clients of equal rank"):
        config(adapter={"rank": {"min": 2, "max": 4}})
    with pytest.raises(ConfigError, match=r"adapter.rank.by"):
        config(adapter={"rank": {"min": 2, "max": 4, "by": "row"}}, aggregation="flexlora")


@pytest.mark.parametrize(
    ("cohort", "reason"),
    [
        ({"size": 4}, "size = 4 is more than the 3 clients"),
        ({"min_updates": 4}, "min_updates = 4 can never be reached"),
    ],
)
def test_a_cohort_larger_than_the_clients_that_the_data_names_is_refused(cohort: dict[str, int], reason: str) -> None:
    load_plugins()
    config = RunConfig.model_validate({"partition": "natural", "cohort": cohort})
    config.check()
    with pytest.raises(ConfigError, match=reason):
        check_clients(config, {"a": 1, "b": 2, "c": 3})
    if "size" in cohort:
        check_clients(config, dict.fromkeys("abcd", 1))


def test_a_round_that_must_fail_is_refused() -> None:
    """Six of ten are away in the second round."""
    away = {f"client {number}": [[1, 1], [3, 3]] for number in range(6)}
    clients = {f"client {number}": 10 for number in range(10)}
    check_clients(config(cohort={"size": 5, "min_updates": 4, "availability": away}), clients)
    with pytest.raises(ConfigError, match="min_updates = 5 cannot be reached in round 2, which draws 4"):
        check_clients(config(cohort={"size": 5, "min_updates": 5, "availability": away}), clients)
