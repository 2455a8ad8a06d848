"""What every registered partition must satisfy, for any rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedit.config import load_plugins
from fedit.interfaces import DataError, Example, Partition, Turn, derive_rng, plugins
from fedit.partition import partition_statistics

load_plugins()


@pytest.fixture(scope="module", params=plugins("partition"))
def chosen(request: pytest.FixtureRequest) -> type[Partition]:
    return plugins("partition")[request.param]  # type: ignore[return-value]


def configured(chosen: type[Partition], num_clients: int) -> Partition:
    return chosen.model_validate({"num_clients": num_clients} if "num_clients" in chosen.model_fields else {})


@st.composite
def rows(draw: st.DrawFn, min_size: int) -> list[Example]:
    """Return distinct rows of at least two categories and of clients that the data names."""
    categories = draw(st.lists(st.sampled_from("abcdefgh"), min_size=min_size, max_size=120))
    categories[:2] = ["a", "b"]
    return [
        Example((Turn(f"Ask {index}?", "yes"),), category=category, client=f"site_{index % 7}")
        for index, category in enumerate(categories)
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_clients=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_disjoint_complete_and_none_empty(chosen, data, num_clients, seed) -> None:
    examples = data.draw(rows(min_size=2 * num_clients))
    split = configured(chosen, num_clients).split(examples, derive_rng(seed, "partition"))
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(len(examples)))
    assert all(len(indices) for indices in split.values())
    assert all(indices.dtype == np.int64 and isinstance(client, str) for client, indices in split.items())
    if "num_clients" in chosen.model_fields:
        assert list(split) == [str(client) for client in range(num_clients)]


@settings(max_examples=20, deadline=None)
@given(data=st.data(), num_clients=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_the_order_of_the_rows_does_not_matter(chosen, data, num_clients, seed) -> None:
    examples = data.draw(rows(min_size=2 * num_clients))
    shuffled = data.draw(st.permutations(examples))
    owners = []
    for order in (examples, examples, shuffled):
        split = configured(chosen, num_clients).split(order, derive_rng(seed, "partition"))
        owners.append([(client, {order[index].turns for index in indices}) for client, indices in split.items()])
    assert owners[0] == owners[1] == owners[2]


def test_another_seed_gives_another_split(chosen) -> None:
    if "num_clients" not in chosen.model_fields:
        pytest.skip("the data decides")
    examples = [Example((Turn(f"Ask {index}?", "yes"),), category="ab"[index % 2]) for index in range(60)]
    splits = [configured(chosen, 5).split(examples, derive_rng(seed, "partition")) for seed in (0, 1)]
    assert {k: v.tolist() for k, v in splits[0].items()} != {k: v.tolist() for k, v in splits[1].items()}


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_fewer_rows_than_clients(chosen, num_rows: int) -> None:
    if num_rows and "num_clients" not in chosen.model_fields:
        pytest.skip("the data decides")
    examples = [Example((Turn(f"Ask {index}?", "yes"),), category="ab"[index % 2]) for index in range(num_rows)]
    with pytest.raises(DataError, match=rf"need at least \d+ rows, got {num_rows}"):
        configured(chosen, 10).split(examples, derive_rng(0, "partition"))


def test_statistics_count_every_row(chosen) -> None:
    examples = [
        Example((Turn(f"Ask {index}?", "yes"),), category="abc"[index % 3], client=str(index % 2))
        for index in range(50)
    ]
    split = configured(chosen, 4).split(examples, derive_rng(0, "partition"))
    clients = partition_statistics(examples, split)["clients"]
    assert {client: entry["rows"] for client, entry in clients.items()} == {k: len(v) for k, v in split.items()}
    assert all(sum(entry["categories"].values()) == entry["rows"] for entry in clients.values())


def test_serialises_and_loads_back(chosen) -> None:
    partition = configured(chosen, 4)
    assert Partition.resolve(partition.model_dump(mode="json")) == partition
