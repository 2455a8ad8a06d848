"""What travels between the server and a site: a JSON header, and all tensors in one packed array of float32.

A message is named by its hash, so that what has arrived is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedit.codec import Codec, Message
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, EngineError, FeditError
from fedit.wire import side_of, side_tensors

LARGEST = 2**53
"""Counts and losses beyond are no such."""
Layout = Sequence[Sequence[Any]]
"""[name, shape] of each tensor, in the order in which they lie in the array"""


@dataclass(frozen=True, eq=False)
class Packed:
    """Tensors as one array."""

    layout: list[list[Any]]
    payload: Message
    """float32, little endian"""

    @cached_property
    def key(self) -> str:
        """The array's name."""
        return name_of(self.layout, self.payload)


def name_of(layout: Layout, payload: Message) -> str:
    """Return a hash of an array's layout and bits."""
    digest = hashlib.sha256(json.dumps(layout).encode())
    digest.update(payload)
    return digest.hexdigest()


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Return tensors as one array, float32."""
    layout = [[name, list(tensor.shape)] for name, tensor in tensors.items()]
    payload = bytearray(4 * sum(tensor.numel() for tensor in tensors.values()))
    start = 0
    for tensor in tensors.values():  # not joined from parts, which would take the memory twice
        payload[start : start + 4 * tensor.numel()] = _bytes(tensor)
        start += 4 * tensor.numel()
    return Packed(layout, payload)


def unpack(layout: Layout, payload: Message) -> dict[str, Tensor]:
    """Return the tensors of an array: views of it where it can be written to, and nobody does.

    Raises:
        EngineError: the array is not as long as its layout says.
    """
    if any(not isinstance(n, int) or n < 0 for _, shape in layout for n in shape):
        raise EngineError("a layout has sizes that are no counts")
    sizes = [math.prod(shape) for _, shape in layout]
    if 4 * sum(sizes) != len(payload):
        raise EngineError(f"a message of {len(payload)} bytes has a layout of {sum(sizes)} float32 numbers")
    tensors, start = {}, 0
    for (name, shape), size in zip(layout, sizes, strict=True):
        numbers = np.frombuffer(payload, "<f4", size, start)
        tensors[name] = torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy()).view(tuple(shape))
        start += 4 * size
    return tensors


def _bytes(tensor: Tensor) -> memoryview:
    numbers = tensor.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False)
    return numbers.reshape(-1).view(np.uint8).data


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a short hash of each tensor's bits."""
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest()[:16] for name, tensor in tensors.items()}


def fingerprint(adapter: Adapter) -> str:
    """Return a hash of all of an adapter."""
    digest = hashlib.sha256(json.dumps([adapter.rank, adapter.lora_alpha]).encode())
    for name, tensor in sorted({**adapter.tensors, **side_tensors(adapter.side)}.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ to the site


def pack_adapter(
    adapter: Adapter, control: Mapping[str, Tensor], known: Mapping[str, str]
) -> tuple[Packed, dict[str, Any]]:
    """Return a received adapter as a message: what a site does not have from the start, by the `known` hashes."""
    own = digests(adapter.tensors)
    tensors = {f"adapter/{name}": t for name, t in adapter.tensors.items() if known.get(name) != own[name]}
    tensors |= {f"side/{name}": tensor for name, tensor in side_tensors(adapter.side).items()}
    tensors |= {f"control/{name}": tensor for name, tensor in control.items()}
    packed = pack(tensors)
    return packed, {"key": packed.key, "layout": packed.layout, "rank": adapter.rank, "alpha": adapter.lora_alpha}


def result_name(adapter_key: str, masks: Mapping[str, Any] | None) -> str:
    """Return the name of what is made of an adapter: under masks it is another in every session."""
    return adapter_key if masks is None else f"{adapter_key}/{masks['session']}"


class Packer:
    """Packs what sites are sent once for all sites that lack the same, and keeps it until others are wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[tuple[Adapter, Mapping[str, str], Packed, dict[str, Any]]] = []

    def forget_others(self, adapters: Sequence[Adapter]) -> None:
        """Keep no array but those of `adapters`."""
        with self._lock:
            self._kept = [kept for kept in self._kept if any(kept[0] is adapter for adapter in adapters)]

    def pack(
        self, adapter: Adapter, control: Mapping[str, Tensor], known: Mapping[str, str]
    ) -> tuple[Packed, dict[str, Any]]:
        """Do as `pack_adapter`; with a control variate, anew each time."""
        with self._lock:
            for kept, its_known, packed, about in self._kept:
                if kept is adapter and its_known == known and not control:
                    return packed, dict(about)
            packed, about = pack_adapter(adapter, control, known)
            if not control:
                self._kept.append((adapter, known, packed, about))
            return packed, dict(about)


def unpack_adapter(about: Mapping[str, Any], payload: Message, initial: Adapter) -> tuple[Adapter, dict[str, Tensor]]:
    """Return the adapter and the control variate of a message; what is not in it is as in `initial`."""
    tensors = unpack(about["layout"], payload)
    adapter, side, control = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("adapter/", "side/", "control/")
    )
    start = initial.cut(about["rank"])
    if unknown := adapter.keys() - start.tensors.keys():
        raise EngineError(f"the adapter has tensors that this base does not have, e.g. {min(unknown)}")
    return Adapter({**start.tensors, **adapter}, about["rank"], about["alpha"], side_of(side)), control


def pack_step(message: bytes, before: str, round_index: int) -> tuple[Packed, dict[str, Any]]:
    """Return the compressed step of a round as a message; `before` names the adapter that it starts from."""
    packed = Packed([], message)
    return packed, {"from": before, "key": packed.key, "round": round_index}


def apply_step(
    before: Mapping[str, Any],
    payload: Message,
    about: Mapping[str, Any],
    step: Message,
    initial: Adapter,
    codec: Codec,
    returned: Collection[str],
) -> Message:
    """Return the array of the adapter `about`, which is the one `before`, with its `payload`, moved by a `step`.

    Raises:
        FeditError: the step does not fit.
    """
    adapter, _ = unpack_adapter(before, payload, initial)
    moving = adapter.only(returned)
    moved = codec.decode(step, {name: tensor.shape for name, tensor in moving.items()}, about["step"]["round"])
    tensors = {**adapter.tensors, **{name: tensor + moved[name] for name, tensor in moving.items()}}
    names = [name.removeprefix("adapter/") for name, _ in about["layout"]]
    if unknown := set(names) - tensors.keys():
        raise EngineError(f"a step cannot make {min(unknown)}")
    return pack({f"adapter/{name}": tensors[name] for name in names}).payload


# ---------------------------------------------------------------------------------------------------- from the site


def pack_update(update: ClientUpdate, codec: Codec, round_index: int) -> tuple[dict[str, Any], Message]:
    """Return an update as a header and a message: what the codec made of it, then the control variate's step."""
    tensors = update.update.tensors
    message = update.message
    if message is None:
        message = pack(tensors).payload if codec.is_plain else codec.encode(tensors, round_index)
    control = pack(update.control_step)
    if control.payload:
        message = b"".join([message, control.payload])
    return {
        "client": update.client,
        "rank": update.update.rank,
        "alpha": update.update.lora_alpha,
        "num_examples": update.num_examples,
        "num_tokens": update.num_tokens,
        "loss": update.loss,
        "num_steps": update.num_steps,
        "others": list(update.others),
        "bytes": len(message) - len(control.payload),
        "control": control.layout,
    }, message


def unpack_update(
    about: Mapping[str, Any], blob: Message, task: ClientTask, shared: Mapping[str, torch.Size], codec: Codec
) -> ClientUpdate | ClientFailure:
    """Return the update of a client that was given `task`; whatever is wrong with the message is its failure."""
    try:
        blob = memoryview(blob)
        message = blob[: about["bytes"]]
        counts = [int(about[name]) for name in ("num_examples", "num_tokens", "num_steps")]
        if max(map(abs, counts)) > LARGEST or abs(float(about["loss"])) > LARGEST:
            raise ValueError("a count or the loss is out of all bounds")
        return ClientUpdate(
            client=task.client,
            update=Adapter(codec.decode(message, shared, task.round_index), int(about["rank"]), float(about["alpha"])),
            num_examples=int(about["num_examples"]),
            num_tokens=int(about["num_tokens"]),
            loss=float(about["loss"]),
            num_steps=int(about["num_steps"]),
            others=tuple(str(client) for client in about["others"]),
            control_step=unpack(about["control"], blob[about["bytes"] :]),
            message=None if codec.is_plain else bytes(message),
        )
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, FeditError) as error:
        return ClientFailure(task.client, f"the message is no update of this round ({error})")
