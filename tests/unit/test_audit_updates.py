"""What the server sees of updates: without what it adds itself, of one rank, and not nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedit import privacy
from fedit.audit.subject import Setting
from fedit.audit.updates import _look
from fedit.config import load_config
from fedit.interfaces import Adapter, ClientUpdate, EncodedExample, EngineError, Example

NAME = "m.lora_A.weight"
ADAPTER = Adapter({NAME: torch.eye(2), "m.lora_B.weight": torch.eye(2)}, 2, 2.0)
ROWS = [EncodedExample(np.array([0, 1], np.int32), np.array([False, True]), Example(()))]
SUBJECT: Any = SimpleNamespace(data=SimpleNamespace(clients={str(index): ROWS for index in range(100)}, test=ROWS))
EMBEDDINGS: Any = SimpleNamespace(views=lambda update, adapter: [(torch.eye(2).double(), update[NAME])])


def sent(*ranks: int, size: float = 1.0) -> list[tuple[ClientUpdate, list[EncodedExample]]]:
    cut = [ADAPTER.cut(rank) for rank in ranks]
    tensors = [{name: size * tensor for name, tensor in each.tensors.items()} for each in cut]
    updates = [each.with_tensors(tensors) for each, tensors in zip(cut, tensors, strict=True)]
    return [(ClientUpdate(str(index), update, 1, 1, 0.0, 1), ROWS) for index, update in enumerate(updates)]


def look(setting: Setting, made: list[tuple[ClientUpdate, list[EncodedExample]]]) -> list[str]:
    return [seen for seen, _, _ in _look(SUBJECT, EMBEDDINGS, setting, made, ADAPTER)]


PLAIN = Setting("none", "this run", load_config("default"))


def test_updates_of_several_ranks_have_no_sum() -> None:
    assert look(PLAIN, sent(2, 2)) == ["one update", "the sum"]
    looked = _look(SUBJECT, EMBEDDINGS, PLAIN, sent(2, 1), ADAPTER)
    assert next(looked)[0] == "one update"
    with pytest.raises(EngineError, match="factors of several ranks have no sum"):
        next(looked)


def test_an_update_of_zeros_is_no_attack_that_found_nothing() -> None:
    with pytest.raises(EngineError, match="A gets no gradient"):
        look(PLAIN, sent(2, size=0.0))


def test_the_server_sees_the_sum_without_what_it_adds_for_lost_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variances = privacy.Mechanism.mean, list[float]()

    def noted(self: privacy.Mechanism, *args: Any) -> Any:
        variances.append(self.variance)
        return mean(self, *args)

    monkeypatch.setattr(privacy.Mechanism, "mean", noted)
    options = ["cohort.sampling=poisson", "cohort.fraction=0.2", "privacy.mechanism=distributed"]
    options += ["privacy.noise_multiplier=0.8", "privacy.clip_norm=0.5", "aggregation.weighting=uniform"]
    config = load_config("default", options)
    made = privacy.Mechanism.of(config, 100)
    assert made is not None
    assert made.variance > 1
    assert look(Setting("distributed", "this run", config), sent(2, 2)) == ["the noisy sum"]
    assert variances == [1.0]
