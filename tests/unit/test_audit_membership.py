"""Members told from others: rows balanced by category, an overfitted model, the base that knows neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedit.audit.membership import Rows
from fedit.base import load_base, load_tokenizer
from fedit.config import AdapterConfig, ClientConfig, ModelConfig
from fedit.interfaces import DataError, EncodedExample, Example
from fedit.model import StackedModel
from fedit.tuning import TuningTask, tune


def make_rows(count: int, seed: int, category: str = "one") -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    return [
        EncodedExample(rng.integers(2, 250, 12).astype(np.int32), np.arange(12) > 5, Example((), category))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model(tiny_model_folder) -> StackedModel:
    path = str(tiny_model_folder)
    base = load_base(ModelConfig(path=path, dtype="float32"), torch.device("cpu"))
    return StackedModel(base, load_tokenizer(path), AdapterConfig(rank=8, alpha=16))


def test_an_overfitted_model_gives_its_members_away(model) -> None:
    members, others = make_rows(64, 0), make_rows(64, 1)
    task = TuningTask("client", members, model.fresh_adapter(np.random.default_rng(0)), 0, 150, 150, 0)
    (result,) = tune(model, [task], ClientConfig(local_steps=150, batch_size=16, learning_rate=1e-2), 1)
    rows = Rows(model, members, others, 0)
    found = rows.judge(result.adapter)
    assert found.num_rows == 64
    assert found.auc > 0.95
    assert found.true_share > 0.6
    assert found.true_share_interval[0] <= found.true_share <= found.true_share_interval[1]
    assert found.base_interval[0] < 0.5 < found.base_interval[1]
    assert found.curve[0] == (0.0, 0.0)
    assert found.curve[-1] == (1.0, 1.0)
    untouched = rows.judge(task.adapter)  # B = 0: the base itself
    assert untouched.auc == 0.5
    assert untouched.true_share == 0


def test_as_many_rows_of_each_category(model) -> None:
    members = [*make_rows(10, 0, "one"), *make_rows(3, 1, "two"), *make_rows(5, 2, "only here")]
    others = [*make_rows(4, 3, "one"), *make_rows(6, 4, "two")]
    rows = Rows(model, members, others, 0)
    assert rows.num_each == 4 + 3
    chosen = [row.example.category for row in rows._rows]
    assert chosen[:7] == chosen[7:] == ["one"] * 4 + ["two"] * 3


def test_rows_without_a_category_in_common_are_drawn_of_all(model) -> None:
    members = [*make_rows(3, 0, "one"), *make_rows(3, 1, "two")]
    rows = Rows(model, members, make_rows(4, 2, "other"), 0)
    assert rows.num_each == 4
    assert not rows.judge(model.fresh_adapter(np.random.default_rng(0))).by_category
    with pytest.raises(DataError, match="there is no row"):
        Rows(model, [], make_rows(4, 2), 0)
