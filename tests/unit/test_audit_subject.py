"""What is written down of the clients of a run that is made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
import torch

from fedit.audit.subject import _Recorder
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate


class Pruning:
    """A client that gives up the second of two components."""

    def clients(self) -> Mapping[str, int]:
        return {"a": 1}

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in tasks:
            cut = task.adapter.cut(1)
            yield ClientUpdate(task.client, cut.with_tensors({n: t + 1 for n, t in cut.tensors.items()}), 1, 1, 0.0, 1)


def test_an_update_of_a_lower_rank_is_added_to_what_is_left() -> None:
    adapter = Adapter({"m.lora_A.weight": torch.eye(2), "m.lora_B.weight": torch.eye(2)}, 2, 2.0)
    sent: Any = {"a": []}
    list(_Recorder(cast(Any, Pruning()), sent).run([ClientTask("a", 0, adapter, 0)]))
    ((before, after),) = sent["a"]
    assert before.rank == after.rank == 1
    moved = after.tensors["m.lora_A.weight"] - before.tensors["m.lora_A.weight"]
    assert moved.numpy() == pytest.approx(before.tensors["m.lora_A.weight"].numpy() + 1)
