"""Stacked LoRA on one frozen linear layer: ``W0 x + s_k B_k A_k x`` with the slot k of each piece of a batch."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from fedit.base import linear_shape
from fedit.interfaces import EngineError

FUSED_ON = {"cuda"}
"""Where the frozen product and the adapter's are one node: the second is added into the first, in either direction. On
a GPU, products with a small rank take what their passes over the activations take, and this saves a third of them."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The adapters of a batch's tokens. All pieces have the same number of tokens."""

    slots: Tensor
    """int64 [P]: the slot of each piece"""
    order: Tensor
    """int64 [P]: the pieces sorted by where their gradients go: to their slots, or to their rows"""
    offsets: Tensor
    """int64 [S], or [rows]: where in `order` the pieces of each begin"""
    only_slot: int | None
    """The one slot that all pieces have, if they do, and one row too where gradients go to rows"""
    only_target: int
    """Where the gradients go then"""

    @staticmethod
    def of(slots: Sequence[int], targets: Sequence[int], num_targets: int, device: torch.device) -> Pieces:
        """Return the pieces that see `slots` and whose gradients go to `targets`."""
        counts = np.bincount(targets, minlength=num_targets)
        slot, order, offsets = (
            torch.from_numpy(array).to(device)
            for array in (np.asarray(slots), np.argsort(targets, kind="stable"), np.cumsum(counts) - counts)
        )
        return Pieces(slot, order, offsets, slots[0] if len(set(targets)) == 1 else None, targets[0])

    def split(self, tokens: Tensor) -> Tensor:
        """Return `tokens` [N, n] as [P, N/P, n], or as they are where one slot has all."""
        return tokens if self.only_slot is not None else tokens.view(len(self.slots), -1, tokens.shape[-1])

    def take(self, stack: Tensor) -> Tensor:
        """Return what each piece needs of `stack` [S, ...]: a copy for each [P, ...], or the one slot's own."""
        return stack.index_select(0, self.slots) if self.only_slot is None else stack[self.only_slot]

    def add(self, pieces: Tensor, into: Tensor) -> None:
        """Add up `pieces` [P, ...] of each target (or the one target's sum) into `into` [targets, ...].

        A bag of embeddings is a sum of chosen rows: a third of the time of ``index_add_``, and deterministic on GPUs.
        """
        if self.only_slot is not None:
            into[self.only_target].add_(pieces)
        else:
            sums = embedding_bag(self.order, pieces.flatten(1), self.offsets, mode="sum")
            into.add_(sums.view(into.shape))


@dataclass(eq=False)
class Routing:
    """What the adapted layers and the head must know of the current forward pass; shared by all of them."""

    pieces: Pieces | None = None
    """None: the base as it is"""
    num_tokens: int = 0
    """Of this call of the base"""
    dropout: Sequence[tuple[int, int, int]] = ()
    """Where it applies: the seed, first token number and length of each row"""
    head_positions: Tensor | None = None
    hidden: Tensor | None = None
    """What a plain head would have seen at these positions, [N, d]"""


class StackedLora(nn.Module):
    """A frozen linear layer plus ``s_k B_k A_k x`` for the slot k of each piece of x [..., n].

    `lora_A` [S, r, n] holds the A_k and `lora_B` [S, m, r] the s_k B_k, both in the precision of the activations;
    `gradient_A` and `gradient_B` collect the gradients of just these, None where they are not wanted. All four are
    views of the model's stacks. `side` are factors to multiply x by in turn and add, the same for all slots.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    gradient_A: Tensor | None
    gradient_B: Tensor | None

    def __init__(self, name: str, base: nn.Module, routing: Routing, dropout: float) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.num_inputs, self.num_outputs = linear_shape(base)
        self._routing = routing
        self._dropout = dropout
        self._salt = zlib.crc32(name.encode())
        self.side: Sequence[Tensor] = ()

    def forward(self, x: Tensor) -> Tensor:
        routing = self._routing
        pieces = routing.pieces
        if pieces is None:
            return self._without_adapters(x)
        if x.shape[:-1].numel() != routing.num_tokens:
            raise EngineError(
                f"Layer {self.name} receives {list(x.shape)}, not all {routing.num_tokens} tokens of a batch: their "
                "adapters cannot be told apart (an expert layer?). Leave it out of [adapter] target_modules."
            )
        stack = self.lora_A, self.lora_B, self.gradient_A, self.gradient_B
        base = self.base
        if not self.side and not routing.dropout and _is_plain_product(base, x):
            tokens = x.reshape(-1, self.num_inputs)
            added = _StackedLinear.apply(pieces.split(tokens), base.weight, base.bias, *stack, pieces)
        else:
            output = self._without_adapters(x).view(-1, self.num_outputs)
            tokens = x.reshape(-1, self.num_inputs)  # after it: the order of the nodes is that of the gradients' sums
            if routing.dropout:
                tokens = tokens * self._dropout_mask(tokens, routing.dropout)
            added = _StackedProduct.apply(pieces.split(output), pieces.split(tokens), *stack, pieces)
        return added.view(*x.shape[:-1], self.num_outputs)

    def _without_adapters(self, x: Tensor) -> Tensor:
        output = self.base(x)
        return output + functools.reduce(torch.matmul, self.side, x) if self.side else output

    def _dropout_mask(self, x: Tensor, rows: Sequence[tuple[int, int, int]]) -> Tensor:
        """Each row of each layer draws from a generator of its own: neither neighbours nor padding change its mask, and
        a layer that is computed again draws the same.
        """
        keep = 1.0 - self._dropout
        mask = torch.zeros_like(x)
        for seed, start, length in rows:
            generator = torch.Generator(x.device).manual_seed(seed ^ self._salt)
            draw = torch.rand(length, x.shape[1], generator=generator, device=x.device)
            mask[start : start + length] = (draw < keep).to(x.dtype) / keep
        return mask


def _is_plain_product(base: nn.Module, x: Tensor) -> bool:
    """Tell whether a layer is nothing but a frozen product in the precision of x, no quantised or hooked one, on a
    device where both products are one node.
    """
    return (
        x.device.type in FUSED_ON
        and type(base) is nn.Linear
        and base.weight.dtype == x.dtype
        and not base.weight.requires_grad
        and not base._forward_hooks
        and not base._forward_pre_hooks
    )


class _StackedProduct(torch.autograd.Function):
    """``output + B[k] A[k] x`` for the slot k of each piece: one node, gradients added where they belong.

    Shapes: output [P, T, m], x [P, T, n], A [S, r, n], B [S, m, r]; without P where one slot has all tokens, which are
    plain products then. A copy of A and B per piece costs r/T of what the product itself moves, and needs no equal
    number of pieces per slot. The gradients of A and B go straight into `into_A` and `into_B`, of their shapes: through
    autograd every batch would write and add whole stacks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        into_A: Tensor | None,
        into_B: Tensor | None,
        pieces: Pieces,
    ) -> Tensor:
        a, b = pieces.take(lora_A), pieces.take(lora_B)
        inner = x @ a.mT
        ctx.save_for_backward(x, inner, a, b)
        ctx.pieces, ctx.into = pieces, (into_A, into_B)
        product = torch.addmm if x.dim() == 2 else torch.baddbmm
        return product(output, inner, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_output,) = gradients
        x, inner, a, b = ctx.saved_tensors
        of_inner = _into_stacks(ctx, of_output, x, inner, b)
        of_x = of_inner @ a if ctx.needs_input_grad[1] else None
        return of_output, of_x, *[None] * 5


class _StackedLinear(torch.autograd.Function):
    """``W0 x + bias + B[k] A[k] x``: `_StackedProduct` and the frozen product in front of it as one node.

    The adapter's product is added into the frozen one, and so is its gradient of x: nothing is copied to add to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        into_A: Tensor | None,
        into_B: Tensor | None,
        pieces: Pieces,
    ) -> Tensor:
        a, b = pieces.take(lora_A), pieces.take(lora_B)
        inner = x @ a.mT
        ctx.save_for_backward(x, inner, a, b, weight)
        ctx.pieces, ctx.into = pieces, (into_A, into_B)
        return _add_product(linear(x, weight, bias), inner, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_output,) = gradients
        x, inner, a, b, weight = ctx.saved_tensors
        of_inner = _into_stacks(ctx, of_output, x, inner, b)
        of_x = _add_product(of_output @ weight, of_inner, a) if ctx.needs_input_grad[0] else None
        return of_x, *[None] * 7


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return into.addmm_(left, right) if into.dim() == 2 else into.baddbmm_(left, right)


def _into_stacks(ctx: Any, of_output: Tensor, x: Tensor, inner: Tensor, b: Tensor) -> Tensor:
    """Add the gradients of A and B to where they belong; return that of A x."""
    into_A, into_B = ctx.into
    of_inner = of_output @ b
    if into_A is not None:
        ctx.pieces.add(of_inner.mT @ x, into_A)
    if into_B is not None:
        ctx.pieces.add(of_output.mT @ inner, into_B)
    return of_inner
