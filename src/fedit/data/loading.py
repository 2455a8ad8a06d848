"""`load_examples`: the training and the held-out examples that a run's `[data]` table names."""

from __future__ import annotations

import logging
from collections import defaultdict

from fedit.config import DataConfig
from fedit.data.reading import read_path
from fedit.data.rows import make_examples
from fedit.interfaces import DataError, Example, derive_rng

logger = logging.getLogger(__name__)


def load_examples(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the training and the test examples.

    The test examples are those of `config.test_path`, else those that the folder, the Hub dataset or the builtin
    names, else `config.test_per_category` drawn from each category. A training row that is also a test row (same
    turns) is removed from training, and the number of these is logged.

    Raises:
        DataError: a file, line, row or column cannot be used, or nothing is left to train on.
    """
    rows = read_path(config.path, seed)
    train = make_examples(rows.train, config.columns)
    named = dict.fromkeys(example.client for example in train)
    of_test = {part: name for part, name in config.columns.items() if part != "client"}  # held-out rows need no owner
    if config.test_path is not None:
        test_rows = read_path(config.test_path, seed, key="test_path")
        test = make_examples(test_rows.test or test_rows.train, of_test)
    elif rows.test is not None:
        test = make_examples(rows.test, of_test)
    else:
        train, test = _hold_out(train, config.test_per_category, seed)
    train = _remove_duplicates(train, test)
    kept = {example.client for example in train}
    if gone := [str(client) for client in named if client not in kept]:
        logger.warning("All rows of these clients are held out, none is left to train on: %s.", ", ".join(gone))
    return train, test


def _hold_out(examples: list[Example], per_category: int, seed: int) -> tuple[list[Example], list[Example]]:
    by_category: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_category[example.category].append(index)
    rng = derive_rng(seed, "test")
    held_out: set[int] = set()
    for category, indices in sorted(by_category.items()):
        if len(indices) <= per_category:
            raise DataError(
                f"Category {category!r} has {len(indices)} rows: holding out {per_category} leaves none to train on. "
                "Lower [data] test_per_category, or name the held-out rows in [data] test_path."
            )
        held_out.update(rng.permutation(indices)[:per_category].tolist())
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def _remove_duplicates(train: list[Example], test: list[Example]) -> list[Example]:
    held_out = {example.turns for example in test}
    kept = [example for example in train if example.turns not in held_out]
    if not kept:
        raise DataError(f"All {len(train)} training rows are also test rows. Give other rows in [data] test_path.")
    if len(kept) < len(train):
        logger.warning("%d training rows removed because they are also test rows.", len(train) - len(kept))
    return kept
