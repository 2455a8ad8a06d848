"""Partitions: who owns which example. One plug-in per way of splitting, and what a split looks like.

Every split first puts the examples into an order that depends on their content only, then shuffles: the same rows in
another order in the file give the same clients.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fedit.interfaces import DataError, Example, Partition


class CategoryShards(Partition):
    """Sort by category, cut into num_clients * shards_per_client nearly equal shards, deal each client that many.

    A client holds few categories and every client about as many rows (2305.05644, after 1602.05629). A shard that
    lies across the border of two categories holds both, so a client has up to twice shards_per_client of them where
    categories are larger than shards, and more where they are smaller.

    Examples:
        >>> from fedit.interfaces import Example, Turn
        >>> examples = [Example((Turn(str(i), "yes"),), category="ab"[i % 2]) for i in range(8)]
        >>> split = CategoryShards(num_clients=2, shards_per_client=1).split(examples, np.random.default_rng(0))
        >>> [sorted(int(index) % 2 for index in rows) for rows in split.values()]
        [[0, 0, 0, 0], [1, 1, 1, 1]]
    """

    name: ClassVar[str] = "category_shards"
    num_clients: int = Field(default=10, ge=1)
    shards_per_client: int = Field(default=2, ge=1)

    def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
        num_shards = self.num_clients * self.shards_per_client
        _require_rows(examples, num_shards, f"{self.num_clients} clients with {self.shards_per_client} shards each")
        groups = _by_category(examples, rng)
        if len(groups) == 1:
            raise DataError(
                f"[partition] name = {self.name!r}: all {len(examples)} rows have the category "
                f"{examples[0].category!r}. Name the category column in [data] columns, or use partition 'iid' or "
                "'quantity_skew'."
            )
        shards = np.array_split(np.concatenate(groups), num_shards)
        dealt = rng.permutation(num_shards).reshape(self.num_clients, self.shards_per_client)
        return _named([np.concatenate([shards[shard] for shard in hand]) for hand in dealt])


class DirichletPartition(Partition):
    """Each category is divided among the clients in proportions drawn from a symmetric Dirichlet(alpha) (1909.06335).

    alpha towards 0 gives each category to one client; towards infinity every client gets the same mix. A client that
    has fewer than min_rows takes rows, one by one, from the client that is then the largest: the work is bounded,
    where drawing again until every client has enough never ends for many clients.

    Examples:
        >>> from fedit.interfaces import Example, Turn
        >>> examples = [Example((Turn(str(i), "yes"),), category="ab"[i % 2]) for i in range(40)]
        >>> split = DirichletPartition(num_clients=4, alpha=1e6).split(examples, np.random.default_rng(0))
        >>> [len(rows) for rows in split.values()]
        [10, 10, 10, 10]
    """

    name: ClassVar[str] = "dirichlet"
    num_clients: int = Field(default=10, ge=1)
    alpha: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    min_rows: int = Field(default=1, ge=1)

    def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
        _require_rows(examples, self.num_clients * self.min_rows, f"{self.num_clients} clients of {self.min_rows} rows")
        owned: list[list[int]] = [[] for _ in range(self.num_clients)]
        for group in _by_category(examples, rng):
            for client, part in enumerate(_cut(group, rng.dirichlet(np.full(self.num_clients, self.alpha)))):
                owned[client] += part.tolist()
        return _named(_fill(owned, self.min_rows, rng))


class QuantitySkew(Partition):
    """Client sizes in proportions drawn from a symmetric Dirichlet(alpha), contents random (2102.02079).

    alpha towards 0 leaves almost all rows to one client; towards infinity the sizes are equal. Every client has at
    least one row, taken from the largest where needed.

    Examples:
        >>> from fedit.interfaces import Example, Turn
        >>> examples = [Example((Turn(str(i), "yes"),)) for i in range(100)]
        >>> split = QuantitySkew(num_clients=4, alpha=0.3).split(examples, np.random.default_rng(0))
        >>> sum(len(rows) for rows in split.values()), min(len(rows) for rows in split.values()) >= 1
        (100, True)
    """

    name: ClassVar[str] = "quantity_skew"
    num_clients: int = Field(default=10, ge=1)
    alpha: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
        _require_rows(examples, self.num_clients, f"{self.num_clients} clients")
        proportions = rng.dirichlet(np.full(self.num_clients, self.alpha))
        parts = _cut(_shuffled(examples, rng), proportions)
        return _named(_fill([part.tolist() for part in parts], 1, rng))


class Natural(Partition):
    """The clients that the data names: a client column, or one file per client. Nothing is random.

    Examples:
        >>> from fedit.interfaces import Example, Turn
        >>> examples = [Example((Turn("Hm?", "yes"),), client=name) for name in ("site10", "site2", "site10")]
        >>> {client: rows.tolist() for client, rows in Natural().split(examples, np.random.default_rng(0)).items()}
        {'site2': [1], 'site10': [0, 2]}
    """

    name: ClassVar[str] = "natural"

    def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
        _require_rows(examples, 1, "a client")
        owned: dict[str, list[int]] = defaultdict(list)
        for index, example in enumerate(examples):
            if example.client is None:
                raise DataError(
                    f"{example.source or f'row {index + 1}'}: [partition] name = 'natural' needs a client for every "
                    "row. Name the column in [data] columns = { client = ... }, give a folder with one file per "
                    "client, or choose another partition."
                )
            owned[example.client].append(index)
        return {client: np.array(owned[client], dtype=np.int64) for client in sorted(owned, key=_natural_key)}


class IID(Partition):
    """Shuffle and cut into nearly equal parts: no client differs from another but by chance.

    Examples:
        >>> from fedit.interfaces import Example, Turn
        >>> examples = [Example((Turn(str(i), "yes"),)) for i in range(7)]
        >>> split = IID(num_clients=3).split(examples, np.random.default_rng(0))
        >>> [len(rows) for rows in split.values()]
        [3, 2, 2]
    """

    name: ClassVar[str] = "iid"
    num_clients: int = Field(default=10, ge=1)

    def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
        _require_rows(examples, self.num_clients, f"{self.num_clients} clients")
        return _named(np.array_split(_shuffled(examples, rng), self.num_clients))


def partition_statistics(examples: Sequence[Example], split: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return, for JSON, ``{"clients": {client: {"rows": n, "categories": {category: n}}}}``."""
    clients = {}
    for client, rows in split.items():
        categories = Counter(examples[index].category for index in rows)
        clients[client] = {"rows": len(rows), "categories": dict(sorted(categories.items()))}
    return {"clients": clients}


# ---------------------------------------------------------------------------------------------------------- helpers


def _require_rows(examples: Sequence[Example], num_rows: int, purpose: str) -> None:
    if len(examples) < num_rows:
        raise DataError(
            f"[partition] {purpose} need at least {num_rows} rows, got {len(examples)}. Use fewer clients or more data."
        )


def _content(example: Example) -> tuple[str, ...]:
    texts = (text for turn in example.turns for text in (turn.instruction, turn.context, turn.response))
    return (example.category, example.system, *texts)


def _shuffled(examples: Sequence[Example], rng: np.random.Generator) -> np.ndarray:
    """Return all indices in a random order that depends on the examples' content and not on their order."""
    by_content = sorted(range(len(examples)), key=lambda index: _content(examples[index]))
    return rng.permutation(np.array(by_content, dtype=np.int64))


def _by_category(examples: Sequence[Example], rng: np.random.Generator) -> list[np.ndarray]:
    """Return the shuffled indices of each category, categories in alphabetical order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index in _shuffled(examples, rng).tolist():
        groups[examples[index].category].append(index)
    return [np.array(groups[category], dtype=np.int64) for category in sorted(groups)]


def _cut(indices: np.ndarray, proportions: np.ndarray) -> list[np.ndarray]:
    """Cut into consecutive parts of these proportions; rounding the running sum loses no row."""
    ends = np.rint(np.cumsum(proportions)[:-1] * len(indices)).astype(np.int64)
    return np.split(indices, ends)


def _fill(owned: list[list[int]], min_rows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Give every client at least `min_rows`, each row taken at random from the client that is then the largest."""
    sizes = np.array([len(rows) for rows in owned])
    for client in np.flatnonzero(sizes < min_rows).tolist():
        while sizes[client] < min_rows:
            largest = int(sizes.argmax())
            owned[client].append(owned[largest].pop(int(rng.integers(sizes[largest]))))
            sizes[client] += 1
            sizes[largest] -= 1
    return [np.array(rows, dtype=np.int64) for rows in owned]


def _named(parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {str(client): np.sort(part) for client, part in enumerate(parts)}


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
