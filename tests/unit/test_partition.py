"""The split of each partition: numbers by hand, and the skew that its parameters promise."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedit.interfaces import DataError, Example, Turn, derive_rng
from fedit.partition import (
    IID,
    CategoryShards,
    DirichletPartition,
    Natural,
    QuantitySkew,
    partition_statistics,
)


def rows(categories: str, clients: list[str] | None = None) -> list[Example]:
    return [
        Example((Turn(f"Ask {index}?", "yes"),), category=category, client=clients[index] if clients else None)
        for index, category in enumerate(categories)
    ]


def rng(seed: int = 0) -> np.random.Generator:
    return derive_rng(seed, "partition")


def categories_of(examples: list[Example], split: dict[str, np.ndarray]) -> list[Counter[str]]:
    return [Counter(examples[index].category for index in indices) for indices in split.values()]


def test_shards_by_hand() -> None:
    """16 rows of 2 categories in 4 shards of 4: none lies across a border, each client is dealt 2."""
    examples = rows("ab" * 8)
    for seed in range(10):
        split = CategoryShards(num_clients=2, shards_per_client=2).split(examples, rng(seed))
        dealt = sorted(tuple(sorted(counts.items())) for counts in categories_of(examples, split))
        assert dealt in ([(("a", 4), ("b", 4))] * 2, [(("a", 8),), (("b", 8),)])


@settings(max_examples=50, deadline=None)
@given(
    num_clients=st.integers(2, 12),
    shards=st.integers(1, 4),
    sizes=st.lists(st.integers(50, 120), min_size=2, max_size=8),
    seed=st.integers(0, 1000),
)
def test_a_client_has_few_categories_and_its_share_of_rows(num_clients, shards, sizes, seed) -> None:
    examples = rows("".join(letter * size for letter, size in zip("abcdefgh", sizes, strict=False)))
    split = CategoryShards(num_clients=num_clients, shards_per_client=shards).split(examples, rng(seed))
    counts = categories_of(examples, split)
    borders = len(sizes) - 1
    if len(examples) // (num_clients * shards) < 50:  # a shard crosses one border at most
        assert all(len(count) <= 2 * shards for count in counts)
        assert sum(len(count) for count in counts) <= num_clients * shards + borders
    assert max(count.total() for count in counts) - min(count.total() for count in counts) <= shards


def test_shards_need_two_categories() -> None:
    with pytest.raises(DataError, match=r"all 40 rows have the category 'a'.*quantity_skew"):
        CategoryShards(num_clients=2).split(rows("a" * 40), rng())


def test_shards_need_rows_for_every_shard() -> None:
    with pytest.raises(DataError, match="10 clients with 2 shards each need at least 20 rows, got 19"):
        CategoryShards().split(rows("ab" * 9 + "a"), rng())


def test_dirichlet_towards_zero_gives_a_category_to_one_client() -> None:
    examples = rows("abcdefgh" * 50)
    split = DirichletPartition(num_clients=4, alpha=1e-4).split(examples, rng())
    owners = Counter(category for count in categories_of(examples, split) for category in count if count[category] > 5)
    assert owners == Counter("abcdefgh")


@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e9, 1e300])
def test_dirichlet_at_its_limits(alpha: float) -> None:
    examples = rows("abcdefgh" * 50)
    split = DirichletPartition(num_clients=5, alpha=alpha).split(examples, rng())
    assert sum(len(indices) for indices in split.values()) == 400
    if alpha > 1:
        assert all(count == Counter(dict.fromkeys("abcdefgh", 10)) for count in categories_of(examples, split))


def test_dirichlet_skew_falls_as_alpha_grows() -> None:
    examples = rows("abcdefgh" * 100)

    def skew(alpha: float) -> float:
        """Total variation between the clients' mixes and the whole's, averaged over clients and seeds."""
        distances = []
        for seed in range(5):
            split = DirichletPartition(num_clients=10, alpha=alpha).split(examples, rng(seed))
            mixes = [[count[c] / count.total() for c in "abcdefgh"] for count in categories_of(examples, split)]
            distances.append(np.abs(np.array(mixes) - 1 / 8).sum(axis=1).mean() / 2)
        return float(np.mean(distances))

    skews = [skew(alpha) for alpha in (0.01, 0.1, 1.0, 10.0, 1000.0)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.6
    assert skews[-1] < 0.05


@settings(max_examples=50, deadline=None)
@given(
    num_clients=st.integers(1, 30),
    min_rows=st.integers(1, 6),
    spare=st.integers(0, 50),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_dirichlet_guarantees_min_rows(num_clients, min_rows, spare, alpha, seed) -> None:
    examples = rows("abc" * ((num_clients * min_rows + spare) // 3 + 1))
    split = DirichletPartition(num_clients=num_clients, alpha=alpha, min_rows=min_rows).split(examples, rng(seed))
    assert min(len(indices) for indices in split.values()) >= min_rows
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(len(examples)))


def test_dirichlet_with_exactly_enough_rows() -> None:
    split = DirichletPartition(num_clients=20, alpha=0.01, min_rows=3).split(rows("ab" * 30), rng())
    assert {len(indices) for indices in split.values()} == {3}
    with pytest.raises(DataError, match="20 clients of 3 rows need at least 60 rows, got 58"):
        DirichletPartition(num_clients=20, min_rows=3).split(rows("ab" * 29), rng())


def test_dirichlet_over_a_thousand_clients_is_quick() -> None:
    examples = rows("abcdefgh" * 1900)
    start = time.perf_counter()
    split = DirichletPartition(num_clients=1000, alpha=0.01, min_rows=5).split(examples, rng())
    assert time.perf_counter() - start < 5
    assert min(len(indices) for indices in split.values()) >= 5


def test_quantity_skew_sizes() -> None:
    examples = rows("ab" * 500)

    def largest_fraction(alpha: float) -> float:
        splits = [QuantitySkew(num_clients=10, alpha=alpha).split(examples, rng(seed)) for seed in range(5)]
        return float(np.mean([max(len(indices) for indices in split.values()) / 1000 for split in splits]))

    assert largest_fraction(1e-3) > 0.9
    assert largest_fraction(1e6) == pytest.approx(0.1, abs=0.002)


def test_quantity_skew_contents_are_random() -> None:
    examples = rows("a" * 2000 + "b" * 2000)
    split = QuantitySkew(num_clients=4, alpha=5.0).split(examples, rng())
    assert all(count["a"] / count.total() == pytest.approx(0.5, abs=0.1) for count in categories_of(examples, split))


def test_iid_sizes_differ_by_one_at_most() -> None:
    split = IID(num_clients=4).split(rows("ab" * 9), rng())
    assert [len(indices) for indices in split.values()] == [5, 5, 4, 4]


def test_natural_keeps_the_datas_names_in_natural_order() -> None:
    examples = rows("aaaaa", ["k10", "k2", "oslo", "k10", "k2"])
    split = Natural().split(examples, rng())
    assert {client: indices.tolist() for client, indices in split.items()} == {"k2": [1, 4], "k10": [0, 3], "oslo": [2]}
    assert list(split) == ["k2", "k10", "oslo"]


def test_natural_needs_a_client_for_every_row() -> None:
    examples = rows("aa", ["k0", "k1"])
    missing = Example((Turn("Ask?", "yes"),), source="rows.jsonl:3")
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*needs a client for every row"):
        Natural().split([*examples, missing], rng())


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), float("nan")])
def test_alpha_is_positive_and_finite(alpha: float) -> None:
    for partition in (DirichletPartition, QuantitySkew):
        with pytest.raises(ValidationError):
            partition(alpha=alpha)


def test_statistics() -> None:
    examples = rows("abba", ["x", "x", "x", "y"])
    statistics = partition_statistics(examples, Natural().split(examples, rng()))
    assert statistics == {
        "clients": {
            "x": {"rows": 3, "categories": {"a": 1, "b": 2}},
            "y": {"rows": 1, "categories": {"a": 1}},
        }
    }
    assert json.loads(json.dumps(statistics)) == statistics
