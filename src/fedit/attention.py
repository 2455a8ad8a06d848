"""Causal attention within each row of a batch, for training: on packed rows, and fast on a CPU.

A packed batch is one sequence of all rows' tokens without padding. transformers would attend within the rows by a mask
over all pairs of tokens, of which nearly all are forbidden; here rows of like length are attended to as a group. On a
CPU, each block of queries multiplies only the keys that it may see: torch's fused kernels lose to plain products there,
and transformers' plain attention works on whole squares in float32. Probabilities are kept for the backward pass in the
activations' own precision, with the rounding of plain attention; they are half a square per head, so that rows beyond
`LONGEST` are left to torch. docs/log.md has the times. On a GPU, torch's flash attention takes packed rows as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fedit.grouping import group_by_length
from fedit.interfaces import EngineError

NAME = "fedit_packed"
"""What ``attn_implementation`` selects it by."""
BLOCK = 64
"""Queries in a block."""
LONGEST = 1024
"""Tokens of a row that blocks are used for, at most."""
GROUP_TOKENS = 4096
"""Padded tokens of a group of packed rows, at most."""
GROUP_LAUNCH_TOKENS = 256
"""What another group costs, in tokens."""


# ------------------------------------------------------------------------------------------------------ packed rows


@dataclass(frozen=True, eq=False)
class RowGroup:
    """R rows of like length in a packed batch, and where they stand in it."""

    padded: Tensor
    """int64 [R, T]: which token of the batch is where; some token of them where a row is shorter"""
    tokens: Tensor
    """int64 [n]: which tokens of the batch are theirs, row by row"""
    places: Tensor | None
    """int64 [n]: where these stand in `padded`, seen as one sequence; None: everywhere, in order"""

    @property
    def length(self) -> int:
        return self.padded.shape[1]

    def pad(self, packed: Tensor) -> Tensor:
        """Return the group's part of `packed` [N, H, D] as [R, T, H, D], arbitrary where a row is shorter."""
        return packed.index_select(0, self.padded.view(-1)).view(*self.padded.shape, *packed.shape[1:])

    def pad_with_zeros(self, packed: Tensor) -> Tensor:
        """Return the same, zero where a row is shorter."""
        if self.places is None:
            return self.pad(packed)
        zeros = packed.new_zeros(self.padded.numel(), *packed.shape[1:])
        zeros.index_copy_(0, self.places, packed.index_select(0, self.tokens))
        return zeros.view(*self.padded.shape, *packed.shape[1:])

    def unpad(self, padded: Tensor, into: Tensor) -> None:
        """Write `padded` [R, T, H, D] to the group's tokens of `into` [N, H, D]."""
        rows = padded.flatten(0, 1)
        into.index_copy_(0, self.tokens, rows if self.places is None else rows.index_select(0, self.places))


def group_rows(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> list[RowGroup]:
    """Return the groups of rows that begin at `starts` in a packed batch and have these `lengths`."""
    groups = []
    for members in group_by_length(lengths, GROUP_TOKENS, GROUP_LAUNCH_TOKENS):
        longest = max(lengths[i] for i in members)
        first, length = (np.asarray([values[i] for i in members])[:, None] for values in (starts, lengths))
        place = np.arange(longest)[None]
        real = place < length
        padded = first + np.minimum(place, length - 1)
        groups.append(
            RowGroup(
                torch.from_numpy(padded).to(device),
                torch.from_numpy(padded[real]).to(device),
                None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device),
            )
        )
    return groups


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Where the rows of a packed batch stand, in the form that an attention wants."""

    starts: Sequence[int]
    lengths: Sequence[int]
    num_tokens: int
    """Of the batch, what fills it up included"""
    device: torch.device

    @functools.cached_property
    def groups(self) -> list[RowGroup]:
        return group_rows(self.starts, self.lengths, self.device)

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, int]:
        """Where each row begins and the last ends, int32 [R + 1], and the longest distance.

        What fills the batch up counts as the end of the row in front of it, whose own tokens do not see it.
        """
        bounds = np.unique(np.asarray([0, *self.starts, self.num_tokens], dtype=np.int32))
        return torch.from_numpy(bounds).to(self.device), int(np.diff(bounds).max())


def as_mask(rows: PackedRows) -> Tensor:
    """Return what a packed batch passes as its attention mask.

    transformers hands a mask of four dimensions on to the attention as it is; this one is empty and carries the rows.
    """
    mask = torch.empty(1, 1, 0, 0, device=rows.device)
    mask.packed_rows = rows  # pyright: ignore[reportAttributeAccessIssue]
    return mask


# -------------------------------------------------------------------------------------------------------- attention


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks; whatever is not plain causal self-attention (generation, windows) is torch's.

    Shapes: query [R, H, T, D], key and value [R, G, T, D] with H a multiple of G; the result is [R, T, H, D]. A packed
    batch is one row.
    """
    rows: PackedRows | None = getattr(attention_mask, "packed_rows", None)
    plain = (
        1 < query.shape[2] == key.shape[2]
        and options.get("is_causal") is not False
        and getattr(module, "is_causal", True)
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("softcap", "position_bias", "s_aux", "indices", "cache"))
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if rows is not None:
        if not plain:
            raise EngineError(
                f"{type(module).__name__} asks for more than plain causal attention: not for packed rows."
            )
        if _has_flash(query, value):
            return _attend_flash(query, key, value, scale, *rows.bounds), None
        return _attend_packed(query, key, value, scale, rows.groups), None
    if plain and attention_mask is None and query.device.type == "cpu" and query.shape[2] <= LONGEST:
        return BlockedCausalAttention.apply(query, key, value, scale, None), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


def _has_flash(query: Tensor, value: Tensor) -> bool:
    """Tell whether torch's flash attention for rows of any length does these; it has no float32."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in {torch.bfloat16, torch.float16}
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and _is_ampere(query.device)
        and _varlen_attention() is not None
    )


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _varlen_attention() -> tuple[Callable[..., Tensor], bool] | None:
    """Return torch's function, and whether it lets heads share keys; None where it cannot do what is asked of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():  # torch 2.10
        return None
    return cast("Callable[..., Tensor]", varlen_attn), "enable_gqa" in parameters


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, bounds: Tensor, longest: int) -> Tensor:
    found = _varlen_attention()
    assert found is not None
    attend, can_share = found
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    shared, options = queries.shape[1] // keys.shape[1], dict[str, bool]()
    if shared > 1 and can_share:
        options["enable_gqa"] = True
    elif shared > 1:
        keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
    causal = (-1, 0)
    return attend(
        queries, keys, values, bounds, bounds, longest, longest, scale=scaling, window_size=causal, **options
    )[None]


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, scaling: float, groups: list[RowGroup]) -> Tensor:
    if query.device.type == "cpu" and all(group.length <= LONGEST for group in groups):
        return BlockedCausalAttention.apply(query, key, value, scaling, groups)
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    packed = torch.zeros(*queries.shape[:-1], values.shape[-1], dtype=query.dtype, device=query.device)
    for group in groups:
        q, k, v = (group.pad(x).transpose(1, 2) for x in (queries, keys, values))
        answers = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        group.unpad(answers.transpose(1, 2), packed)
    return packed[None]


class BlockedCausalAttention(torch.autograd.Function):
    """softmax(scaling * Q K^T) V over the keys up to each query; key and value heads may serve several query heads.

    Shapes: query [R, H, T, D], key and value [R, G, T, D] with H a multiple of G; the result is [R, T, H, D]. With
    row groups, the one row [1, H, N, D] is packed, and attention stays within its rows.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, groups: list[RowGroup] | None
    ) -> Tensor:
        ctx.scaling, ctx.groups = scaling, groups
        if groups is None:
            output, saved = _forward(query, key, value, scaling)
            ctx.save_for_backward(*saved)
            return output
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
        output = values.new_zeros(*queries.shape[:-1], values.shape[-1])
        ctx.num_saved, all_saved = [], list[Tensor]()
        for group in groups:
            q, k, v = (group.pad(x).transpose(1, 2) for x in (queries, keys, values))
            padded, saved = _forward(q, k, v, scaling)
            group.unpad(padded, output)
            ctx.num_saved.append(len(saved))
            all_saved += saved
        ctx.save_for_backward(*all_saved)
        ctx.shapes = [x.shape for x in (queries, keys, values)]
        return output[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_output,) = gradients
        saved = ctx.saved_tensors
        if ctx.groups is None:
            return *_backward(saved, of_output, ctx.scaling), None, None
        of_inputs = [of_output.new_zeros(shape) for shape in ctx.shapes]
        for group, count in zip(ctx.groups, ctx.num_saved, strict=True):
            padded = _backward(saved[:count], group.pad_with_zeros(of_output[0]), ctx.scaling)
            saved = saved[count:]
            for whole, part in zip(of_inputs, padded, strict=True):
                group.unpad(part.transpose(1, 2), whole)
        return *(x.transpose(0, 1)[None] for x in of_inputs), None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """Return the attention's output [R, T, H, D] and what `_backward` needs."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    # Query heads that share a key are further queries of it: [R G, H/G, T, D] and, for keys and values, [R G, T, D].
    query = (query * scaling).reshape(rows * groups, heads // groups, length, width)
    key, value = key.reshape(rows * groups, length, width), value.reshape(rows * groups, length, -1)
    output = query.new_empty(rows, length, groups, heads // groups, value.shape[-1])
    hidden = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu_(1)
    probabilities = []
    for start, end in _blocks(length):
        queries = query[:, :, start:end].flatten(1, 2)
        scores = torch.bmm(queries, key[:, :end].mT)
        squares = scores.view(len(scores), -1, end - start, end)[..., start:]
        squares.masked_fill_(hidden[: end - start, : end - start], -torch.inf)
        seen = scores.softmax(-1)
        answer = torch.bmm(seen, value[:, :end]).view(rows, groups, heads // groups, end - start, -1)
        output[:, start:end] = answer.permute(0, 3, 1, 2, 4)
        probabilities.append(seen)
    return output.view(rows, length, heads, -1), [query, key, value, *probabilities]


def _backward(saved: Sequence[Tensor], of_output: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value [R, H or G, T, D] for that of the output [R, T, H, D]."""
    query, key, value, *probabilities = saved
    rows, length = of_output.shape[:2]
    shared = query.shape[1]
    groups = len(query) // rows
    of_output = of_output.reshape(rows, length, groups, shared, -1).permute(0, 2, 3, 1, 4).flatten(0, 1)
    of_query = torch.empty_like(query)
    of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
    for (start, end), seen in zip(_blocks(length), probabilities, strict=True):
        queries, answers = query[:, :, start:end].flatten(1, 2), of_output[:, :, start:end].flatten(1, 2)
        of_seen = torch.bmm(answers, value[:, :end].mT)
        of_scores = torch.ops.aten._softmax_backward_data(of_seen, seen, -1, seen.dtype)
        block = torch.bmm(of_scores, key[:, :end]).mul_(scaling)
        of_query[:, :, start:end] = block.view(len(query), shared, end - start, -1)
        of_key[:, :end].baddbmm_(of_scores.mT, queries)
        of_value[:, :end].baddbmm_(seen.mT, answers)
    of_query, of_key, of_value = (x.reshape(rows, -1, *x.shape[-2:]) for x in (of_query, of_key, of_value))
    return of_query, of_key, of_value


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


# -------------------------------------------------------------------------------------------------- which bases use it


def can_use_it(base: PreTrainedModel) -> bool:
    """Tell whether this attention does in `base` what transformers' default, torch's, does.

    Not where the model's code asks for the name of its attention: sparse models hand their masks to known names only.
    """
    if base.config._attn_implementation != "sdpa":
        return False
    sources = {inspect.getmodule(type(module)) for module in base.modules()}
    return not any('"sdpa"' in inspect.getsource(source) for source in sources if _is_model_code(source))


def _is_model_code(source: ModuleType | None) -> TypeGuard[ModuleType]:
    return source is not None and source.__name__.rpartition(".")[2].startswith("modeling_")


def packed_attention() -> str:
    """Make the attention known to transformers and return its name."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
