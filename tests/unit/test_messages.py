"""Tensors as one array, and updates as messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedit.codec import upload_codec
from fedit.config import load_config
from fedit.engines.messages import digests, pack, pack_adapter, pack_update, unpack, unpack_adapter, unpack_update
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, EngineError
from fedit.lowrank import LowRank

A, B = "x.lora_A.weight", "x.lora_B.weight"


def adapter(value: float = 1.0) -> Adapter:
    tensors = {A: torch.full((2, 3), value), B: torch.arange(8.0).view(4, 2)}
    return Adapter(tensors, 2, 4.0, {"x": LowRank(torch.ones(4, 1), torch.ones(1, 3))})


def test_tensors_lie_one_after_another_as_little_endian_floats() -> None:
    packed = pack({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0)})
    assert packed.layout == [["a", [1, 2]], ["b", []]]
    assert packed.payload == np.array([1, 2, 3], "<f4").tobytes()
    tensors = unpack(packed.layout, packed.payload)
    assert tensors["a"].tolist() == [[1, 2]]
    assert tensors["b"].tolist() == 3


def test_the_key_is_of_names_shapes_and_bits() -> None:
    keys = {
        pack(t).key
        for t in ({"a": torch.ones(2)}, {"b": torch.ones(2)}, {"a": torch.ones(1, 2)}, {"a": -torch.ones(2)})
    }
    assert len(keys) == 4


def test_an_array_of_another_length_is_refused() -> None:
    with pytest.raises(EngineError, match="layout of 2"):
        unpack([["a", [2]]], b"1234")


def test_only_what_a_site_lacks_is_sent() -> None:
    initial = adapter()
    moved = Adapter({**initial.tensors, A: torch.zeros(2, 3)}, 2, 4.0, initial.side)
    packed, about = pack_adapter(moved, {"c": torch.ones(2)}, digests(initial.tensors))
    assert [name for name, _ in packed.layout] == [
        f"adapter/{A}",
        "side/x.side_A.weight",
        "side/x.side_B.weight",
        "control/c",
    ]
    got, control = unpack_adapter(about, packed.payload, initial)
    assert torch.equal(got.tensors[A], torch.zeros(2, 3))
    assert torch.equal(got.tensors[B], initial.tensors[B])
    assert list(got.tensors) == list(initial.tensors)
    assert torch.equal(got.side["x"].a, torch.ones(1, 3))
    assert control["c"].tolist() == [1, 1]


def test_a_tensor_that_the_base_lacks_is_refused() -> None:
    packed, about = pack_adapter(adapter(), {}, {})
    about["layout"][0][0] = "adapter/y.lora_A.weight"
    with pytest.raises(EngineError, match="does not have"):
        unpack_adapter(about, packed.payload, adapter())


def test_an_update_comes_back_as_it_was() -> None:
    codec = upload_codec(load_config("default"))
    task = ClientTask("c", 3, adapter())
    sent = ClientUpdate("c", adapter(0.5), 7, 100, 1.5, 4, {A: torch.ones(2, 3)})
    about, message = pack_update(sent, codec, 3)
    shapes = {name: tensor.shape for name, tensor in task.adapter.tensors.items()}
    got = unpack_update(about, message, task, shapes, codec)
    assert isinstance(got, ClientUpdate)
    assert (got.client, got.num_examples, got.num_tokens, got.loss, got.num_steps) == ("c", 7, 100, 1.5, 4)
    assert all(torch.equal(tensor, got.update.tensors[name]) for name, tensor in sent.update.tensors.items())
    assert torch.equal(got.control_step[A], torch.ones(2, 3))


@pytest.mark.parametrize("spoiled", [{"bytes": "many"}, {"bytes": None}, {"loss": "low"}, {"control": 3}, {"rank": []}])
def test_a_message_that_makes_no_sense_is_its_clients_failure(spoiled: dict[str, object]) -> None:
    codec = upload_codec(load_config("default"))
    about, message = pack_update(ClientUpdate("c", adapter(), 7, 100, 1.5, 4), codec, 0)
    shapes = {name: tensor.shape for name, tensor in adapter().tensors.items()}
    got = unpack_update({**about, **spoiled}, message, ClientTask("c", 0, adapter()), shapes, codec)
    assert isinstance(got, ClientFailure)
    assert "no update of this round" in got.reason
