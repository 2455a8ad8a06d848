"""The stack of clients that train cores: small matrices between factors that are frozen and the same for all.

To the layers a client's adapter is A and the product B R; its gradient G of B R is B^T G of R. So nothing but this
module knows of cores: the model computes as ever, and the optimizer moves the cores in place of the factors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedit.adapter import CORE, TIED, Adapter, groups
from fedit.model import StackedModel


class CoreStack:
    """What an optimizer moves in place of a `StackedModel` when clients train cores; its slots are the model's.

    A row of `parameters` [S, c] holds a client's R of all layers, or its vectors v, flat. `like` is an adapter with the
    frozen tensors that all clients have.
    """

    def __init__(self, model: StackedModel, num_slots: int, like: Adapter) -> None:
        model.allocate(num_slots, ("lora_B",))
        self._model = model
        self._tied = TIED in like.tensors
        modules = like.modules()
        self._names = [TIED] if self._tied else [f"{module}.{CORE}.weight" for module in modules]
        self._shapes = [like.tensors[name].shape for name in self._names]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._b = {m: like.tensors[f"{m}.lora_B.weight"].to(model.parameters) for m in modules}
        if self._tied:
            self._projections = {m: like.tensors[f"{m}.lora_P.weight"].to(model.parameters) for m in modules}
            self._group = dict(zip(modules, groups(len(modules), self._shapes[0][0]), strict=True))
        self.parameters = model.parameters.new_zeros(num_slots, sum(self._sizes))

    @property
    def num_slots(self) -> int:
        return len(self.parameters)

    def columns(self, factors: Collection[str]) -> slice:
        """Return the columns of `parameters` that are trained: all."""
        return slice(None)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy `adapter` into a slot."""
        self._model.write(slot, adapter.plain())
        self.parameters[slot] = self.flat(adapter.tensors, adapter.rank)
        self.parameters_changed(slice(slot, slot + 1))

    def flat(self, tensors: Mapping[str, Tensor], rank: int) -> Tensor:
        """Return the trained tensors among `tensors` as one row [c] of `parameters`; what they lack is zero."""
        parts = zip(self._names, self._shapes, strict=True)
        return torch.cat([tensors.get(name, torch.zeros(shape)).to(self.parameters).flatten() for name, shape in parts])

    def read(self, slot: int, rank: int) -> dict[str, Tensor]:
        """Return a copy of a slot's trained tensors on the CPU."""
        parts = self.parameters[slot].cpu().split(self._sizes)
        return {
            name: part.view(shape).clone() for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }

    @torch.no_grad()
    def parameters_changed(self, slots: slice = slice(None)) -> None:
        """Bring the model's slots up to date with `parameters`."""
        parts = self._parts(self.parameters[slots])
        for index, (layer, (_, b)) in enumerate(self._model.views(self._model.parameters)):
            if self._tied:
                vectors = parts[0][:, self._group[layer.name]]
                core = torch.einsum("su,uij->sij", vectors, self._projections[layer.name])
            else:
                core = parts[index]
            b[slots] = self._b[layer.name] @ core
        self._model.parameters_changed(slots)

    def take_gradients(self, slots: slice = slice(None)) -> Tensor:
        """Return the gradients of `parameters` [S, c], and set those that the model added up to zero."""
        whole = self._model.take_gradients(slots)
        gradients = whole.new_zeros(len(whole), self.parameters.shape[1])
        parts = self._parts(gradients)
        for index, (layer, (_, of_b)) in enumerate(self._model.views(whole)):
            of_core = self._b[layer.name].mT @ of_b
            if self._tied:
                of_vector = torch.einsum("sij,uij->su", of_core, self._projections[layer.name])
                parts[0][:, self._group[layer.name]] += of_vector
            else:
                parts[index].copy_(of_core)
        whole.zero_()
        return gradients

    def _parts(self, stack: Tensor) -> list[Tensor]:
        """Return the views [S, *shape] of each trained tensor in a matrix of the layout of `parameters`."""
        parts = stack.split(self._sizes, dim=1)
        return [part.view(len(stack), *shape) for part, shape in zip(parts, self._shapes, strict=True)]
