"""How many clients are tuned at a time, and how many tokens go through the base at once, so that both fit the memory.

What a slot takes is known: the adapter, its copy, gradient, two moments, and what a step of AdamW needs beside them.
What a token takes is measured: the tensors that a forward pass of this base keeps for the backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedit.batch import BATCH_TOKENS, Batch
from fedit.config import ClientConfig, EngineConfig
from fedit.interfaces import EncodedExample, EngineError, Example, Turn
from fedit.model import StackedModel

FULL_BATCHES = 2
"""Batches of tokens that a step of all slots should fill, for some to wait when others' last rows leave room: with more
slots only the optimizer's state would grow."""
SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Of the machine's memory that is used, if the configuration does not say how much."""
BACKWARD = 1.5
"""What a backward pass takes at its peak, in units of what the forward pass kept."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class MemoryShortageError(EngineError):
    """The memory does not hold the run; `shortage` says so without a word about the rows."""

    def __init__(self, message: str, shortage: str) -> None:
        super().__init__(message)
        self.shortage = shortage


def fit_memory(
    model: StackedModel,
    engine: EngineConfig,
    client: ClientConfig,
    clients: Sequence[Sequence[EncodedExample]],
    more_of_slot: int = 0,
) -> None:
    """Set the model's `max_slots`, `batch_tokens` and `checkpointing` for tuning `clients`.

    `more_of_slot` is how many vectors of an adapter's size are kept for each slot beside what every tuning keeps.

    Depends on the machine's whole memory, not on what is free at the moment, so that a resumed run does the same.

    Raises:
        MemoryShortageError: the memory cannot hold one client and its longest row, or as many slots as were asked for.
    """
    kind = model.device.type
    budget = memory_bytes(engine, model.device)
    frozen = [parameter for parameter in model.base.parameters() if not parameter.requires_grad]
    base = sum(tensor.numel() * tensor.element_size() for tensor in (*frozen, *model.base.buffers()))
    rows = [row for client_rows in clients for row in client_rows]
    num_steps = sum(-(-len(client_rows) // client.batch_size) for client_rows in clients)
    step_tokens = sum(row.num_trained for row in rows) / num_steps
    longest = max(len(each) for row in rows for each in (row, row.rejected) if each is not None)
    most_tokens = BATCH_TOKENS.get(kind, BATCH_TOKENS["cuda"])
    room = budget - base
    slot_bytes = model.slot_bytes + more_of_slot * model.num_parameters * model.parameters.element_size()
    if engine.slots == "auto":
        wanted = min(len(clients), int(-(-FULL_BATCHES * most_tokens // step_tokens)))
        model.max_slots = max(1, min(wanted, int(room / 2 // slot_bytes)))
    else:
        model.max_slots = engine.slots
    room -= min(model.max_slots, len(clients)) * slot_bytes
    fitting = 0
    choices = [False, True][: 1 + model.can_checkpoint]
    for checkpointing in choices if engine.gradient_checkpointing == "auto" else [engine.gradient_checkpointing]:
        model.checkpointing = checkpointing
        fitting = int(room / (BACKWARD * token_bytes(model, longest)))
        model.batch_tokens = min(most_tokens, fitting)
        if fitting >= longest:
            return
    slots = max(0, int((budget - base) / 2 // slot_bytes))
    shortage = (
        f"{budget / 1e9:.2f} GB do not hold the base ({base / 1e9:.2f} GB), {model.max_slots} slots of "
        f"{slot_bytes / 1e9:.3f} GB and"
    )
    raise MemoryShortageError(
        f"[engine] memory: {shortage} a row of {longest} tokens: {slots} slots would fit into half of the "
        f"rest, and beside {model.max_slots} slots {max(0, fitting)} tokens. Choose fewer [engine] slots, a smaller "
        "[data] max_length, [adapter] rank or [model] path, or raise [engine] memory_gb if the machine has more.",
        f"{shortage} its longest row",
    )


def memory_bytes(engine: EngineConfig, device: torch.device) -> float:
    """Return how much memory may be used on `device`: what the configuration says, else a share of the machine's."""
    if engine.memory_gb != "auto":
        return engine.memory_gb * 1e9
    if device.type == "cuda":
        return SHARE["cuda"] * torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text(encoding="ascii").strip() if CGROUP_LIMIT.is_file() else "max"
    return SHARE["cpu"] * (total if limit == "max" else min(total, int(limit)))


def token_bytes(model: StackedModel, length: int) -> float:
    """Return what training keeps for each token of a row of `length` tokens, in bytes.

    With checkpointing, the layer that is being computed again is added.
    """
    kept = _kept_bytes(model, length)
    if not model.checkpointing:
        return kept
    model.checkpointing = False
    whole = _kept_bytes(model, length)
    model.checkpointing = True
    return kept + whole / model.base.config.get_text_config().num_hidden_layers


def _kept_bytes(model: StackedModel, length: int) -> float:
    row = EncodedExample(np.ones(length, np.int32), np.arange(length) > length // 2, Example((Turn("", ""),)))
    collate = Batch.pack if length <= model.longest_packed else Batch.pad
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.base.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = model.token_losses(collate([row], [0], model.device))
    del losses
    return sum(kept.values()) / length
