"""Causal attention for training on a CPU: in blocks of queries, in a fraction of the time of what torch has.

transformers' plain attention works on whole [T, T] squares in float32, of which causality throws one half away, and
torch's fused kernels lose to plain products on a CPU. Here each block of queries multiplies only the keys that it may
see. The probabilities are kept for the backward pass in the activations' own precision, with the rounding of plain
attention; they are half a square per head, so that rows beyond `LONGEST` are left to torch. docs/log.md has the times.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fedit_blocked"
"""What ``attn_implementation`` selects it by."""
BLOCK = 64
"""Queries in a block."""
LONGEST = 1024
"""Tokens of a row at most."""


class BlockedCausalAttention(torch.autograd.Function):
    """softmax(scaling * Q K^T) V over the keys up to each query; key and value heads may serve several query heads.

    Shapes: query [R, H, T, D], key and value [R, G, T, D] with H a multiple of G; the result is [R, T, H, D].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rows, heads, length, width = query.shape
        groups = key.shape[1]
        query = (query * scaling).view(rows, groups, heads // groups, length, width)
        key, value = key.contiguous(), value.contiguous()
        output = query.new_empty(rows, length, groups, heads // groups, value.shape[-1])
        hidden = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu_(1)
        probabilities = []
        for start, end in _blocks(length):
            scores = _flat(query[..., start:end, :]) @ _flat(key[:, :, :end]).mT
            scores = scores.view(rows, heads, end - start, end)
            scores[..., start:].masked_fill_(hidden[: end - start, : end - start], -torch.inf)
            seen = scores.softmax(-1).view(rows * groups, -1, end)
            answer = (seen @ _flat(value[:, :, :end])).view(rows, groups, heads // groups, end - start, -1)
            output[:, start:end] = answer.permute(0, 3, 1, 2, 4)
            probabilities.append(seen)
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.scaling = scaling
        return output.view(rows, length, heads, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *probabilities = ctx.saved_tensors
        rows, groups, shared, length, width = query.shape
        of_output = gradients[0].reshape(rows, length, groups, shared, -1).permute(0, 2, 3, 1, 4)
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        for (start, end), seen in zip(_blocks(length), probabilities, strict=True):
            queries, answers = _flat(query[..., start:end, :]), _flat(of_output[..., start:end, :])
            of_seen = answers @ _flat(value[:, :, :end]).mT
            of_scores = torch.ops.aten._softmax_backward_data(of_seen, seen, -1, seen.dtype)
            block = (of_scores @ _flat(key[:, :, :end])).mul_(ctx.scaling)
            of_query[..., start:end, :] = block.view(rows, groups, shared, end - start, width)
            of_key[:, :, :end] += (of_scores.mT @ queries).view(rows, groups, end, width)
            of_value[:, :, :end] += (seen.mT @ answers).view(rows, groups, end, -1)
        return of_query.view(rows, groups * shared, length, width), of_key, of_value, None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _flat(x: Tensor) -> Tensor:
    """Return x [R, G, ..., D] as [R G, positions, D]: query heads that share a key are further positions."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks; whatever is not plain causal self-attention (generation, windows) is torch's."""
    plain = (
        attention_mask is None
        and 1 < query.shape[2] == key.shape[2] <= LONGEST
        and options.get("is_causal") is not False
        and getattr(module, "is_causal", True)
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("softcap", "position_bias", "s_aux", "indices", "cache"))
    )
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return BlockedCausalAttention.apply(query, key, value, scaling), None


def can_attend_in_blocks(base: PreTrainedModel) -> bool:
    """Tell whether blocked attention does in `base` what transformers' default, torch's, does.

    Not where the model's code asks for the name of its attention: sparse models hand their masks to known names only.
    """
    if base.config._attn_implementation != "sdpa":
        return False
    sources = {inspect.getmodule(type(module)) for module in base.modules()}
    return not any('"sdpa"' in inspect.getsource(source) for source in sources if _is_model_code(source))


def _is_model_code(source: ModuleType | None) -> TypeGuard[ModuleType]:
    return source is not None and source.__name__.rpartition(".")[2].startswith("modeling_")


def blocked_attention() -> str:
    """Make the attention known to transformers and return its name."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
