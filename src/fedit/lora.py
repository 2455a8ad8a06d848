"""Stacked LoRA on one frozen linear layer: ``W0 x + s_k B_k A_k x`` with the slot k of each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedit.base import linear_shape
from fedit.interfaces import EngineError


@dataclass(eq=False)
class Routing:
    """What the adapted layers and the head must know of the current forward pass; shared by all of them."""

    slots: Tensor | None = None
    """int64 [R]: the adapter of each row; None: the base as it is"""
    only_slot: int | None = None
    """The one slot that all rows have, if they do"""
    length: int = 0
    """Tokens of each row in this call of the base"""
    dropout: list[tuple[torch.Generator, int]] | None = None
    head_positions: Tensor | None = None
    hidden: Tensor | None = None
    """What a plain head would have seen at these positions, [N, d]"""


class StackedLora(nn.Module):
    """A frozen linear layer plus ``s_k B_k A_k x`` for the slot k of each row of x [R, T, n].

    `lora_A` [S, r, n] holds the A_k and `lora_B` [S, m, r] the s_k B_k, both in the precision of the activations;
    `gradient_A` and `gradient_B` collect the gradients of just these. All four are views of the model's stacks.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    gradient_A: Tensor
    gradient_B: Tensor

    def __init__(self, name: str, base: nn.Module, routing: Routing, dropout: float) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.num_inputs, self.num_outputs = linear_shape(base)
        self._routing = routing
        self._dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        output = self.base(x)
        routing = self._routing
        if routing.slots is None:
            return output
        rows = len(routing.slots)
        num_tokens = rows * routing.length
        if x.shape[:-1].numel() != num_tokens or x.shape[0] not in (rows, num_tokens):
            raise EngineError(
                f"Layer {self.name} receives {list(x.shape)}, not all tokens of {rows} rows: the rows cannot be told "
                "apart (an expert layer?). Leave it out of [adapter] target_modules."
            )
        x = x.reshape(rows, -1, self.num_inputs)
        if routing.dropout is not None:
            x = x * self._dropout_mask(x, routing.dropout)
        flat = output.view(rows, -1, self.num_outputs)
        weights, gradients = (self.lora_A, self.lora_B), (self.gradient_A, self.gradient_B)
        if routing.only_slot is not None:
            x, flat = x.flatten(0, 1), flat.flatten(0, 1)
            added = _ProductOfOne.apply(flat, x, *weights, *gradients, routing.only_slot)
        else:
            added = _ProductOfRows.apply(flat, x, *weights, *gradients, routing.slots)
        return added.view(output.shape)

    def _dropout_mask(self, x: Tensor, rows: Sequence[tuple[torch.Generator, int]]) -> Tensor:
        """Each row draws for its own tokens from its own generator: neither neighbours nor padding change its mask."""
        keep = 1.0 - self._dropout
        mask = torch.zeros_like(x)
        for row, (generator, length) in enumerate(rows):
            draw = torch.rand(length, x.shape[2], generator=generator, device=x.device)
            mask[row, :length] = (draw < keep).to(x.dtype) / keep
        return mask


class _ProductOfRows(torch.autograd.Function):
    """``output + B[k] A[k] x`` for the slot k of each row: one node, gradients added where they belong.

    Shapes: output [R, T, m], x [R, T, n], A [S, r, n], B [S, m, r]. A copy of A and B per row costs r/T of the product
    itself and needs no equal rows per slot. The gradients of A and B go straight into `into_A` and `into_B`, of their
    shapes: through autograd every micro-batch would write and add whole stacks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        into_A: Tensor,
        into_B: Tensor,
        slots: Tensor,
    ) -> Tensor:
        a, b = lora_A.index_select(0, slots), lora_B.index_select(0, slots)
        inner = torch.bmm(x, a.mT)
        ctx.save_for_backward(x, inner, a, b, slots)
        ctx.into = into_A, into_B
        return torch.baddbmm(output, inner, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_output,) = gradients
        x, inner, a, b, slots = ctx.saved_tensors
        into_A, into_B = ctx.into
        of_inner = torch.bmm(of_output, b)
        into_A.index_add_(0, slots, torch.bmm(of_inner.mT, x).to(into_A.dtype))
        into_B.index_add_(0, slots, torch.bmm(of_output.mT, inner).to(into_B.dtype))
        of_x = torch.bmm(of_inner, a) if ctx.needs_input_grad[1] else None
        return of_output, of_x, *[None] * 5


class _ProductOfOne(torch.autograd.Function):
    """The same where all rows have one slot: output [N, m] and x [N, n] of all tokens, no copies of A and B."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, into_A: Tensor, into_B: Tensor, slot: int
    ) -> Tensor:
        a, b = lora_A[slot], lora_B[slot]
        inner = torch.mm(x, a.mT)
        ctx.save_for_backward(x, inner, a, b)
        ctx.into = into_A[slot], into_B[slot]
        return torch.addmm(output, inner, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_output,) = gradients
        x, inner, a, b = ctx.saved_tensors
        into_A, into_B = ctx.into
        of_inner = torch.mm(of_output, b)
        into_A.add_(torch.mm(of_inner.mT, x))
        into_B.add_(torch.mm(of_output.mT, inner))
        of_x = torch.mm(of_inner, a) if ctx.needs_input_grad[1] else None
        return of_output, of_x, *[None] * 5
