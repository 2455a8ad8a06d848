"""Blocked causal attention against the formula, and in a model against transformers' plain attention."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedit import attention
from fedit.attention import (
    BLOCK,
    NAME,
    BlockedCausalAttention,
    PackedRows,
    _attend_flash,
    _attend_packed,
    group_rows,
    packed_attention,
)
from fedit.base import load_base
from fedit.config import ModelConfig


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (scaling * query @ key.mT).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_equals_the_formula_with_its_gradients(length: int, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def draw(num_heads: int, width: int) -> torch.Tensor:
        """As models make them: [R, T, H, D], seen as [R, H, T, D]."""
        drawn = torch.randn(2, length, num_heads, width, generator=generator, dtype=torch.float64)
        return drawn.transpose(1, 2).requires_grad_()

    inputs = draw(heads, 8), draw(groups, 8), draw(groups, 5)
    got = BlockedCausalAttention.apply(*inputs, 0.3, None)
    expected = plain(*inputs, 0.3)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, expected)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_cpu_base_uses_it_and_gives_the_logits_of_plain_attention(tiny_model_folder: Path) -> None:
    """Without a mask in blocks; with padding on the left, and token by token with a cache, through torch's."""
    base = load_base(ModelConfig(path=str(tiny_model_folder), dtype="float32"), torch.device("cpu"))
    assert base.config._attn_implementation == NAME
    eager = AutoModelForCausalLM.from_pretrained(tiny_model_folder, attn_implementation="eager")
    ids = torch.randint(3, 200, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    for options in ({"use_cache": False}, {"attention_mask": mask}):
        got, expected = (model(input_ids=ids, **options).logits for model in (base, eager))
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[0, 30:], expected[0, 30:], rtol=1e-4, atol=1e-5)
    cached = base(input_ids=ids[:, :60], use_cache=True).past_key_values
    stepwise = base(input_ids=ids[:, 60:61], past_key_values=cached, use_cache=True).logits
    torch.testing.assert_close(stepwise[:, 0], eager(input_ids=ids).logits[:, 60], rtol=1e-4, atol=1e-5)


def packed_by_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """The formula, from one bound to the next, [1, N, H, D]."""
    spans = [slice(start, end) for start, end in pairwise(bounds)]
    return torch.cat([plain(query[:, :, at], key[:, :, at], value[:, :, at], 0.3) for at in spans], 1)


@pytest.mark.parametrize("can_share", [True, False])
def test_flash_attention_is_asked_for_the_rows(monkeypatch: pytest.MonkeyPatch, can_share: bool) -> None:
    """Causal, within bounds at the rows' starts; heads may share keys, whether the function knows that or not."""

    def attend(q, k, v, bounds, _bounds, longest, _longest, *, scale, window_size, enable_gqa=False):
        assert (scale, window_size) == (0.3, (-1, 0))
        assert enable_gqa == (q.shape[1] != k.shape[1]) == can_share
        assert longest == bounds.diff().max()
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        return packed_by_rows(query, key, value, bounds.tolist())[0]

    monkeypatch.setattr(attention, "_varlen_attention", lambda: (attend, can_share))
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    rows = PackedRows([16, 0, 5], [20, 5, 7], 40, torch.device("cpu"))
    bounds, longest = rows.bounds
    got = _attend_flash(query, key, value, 0.3, bounds, longest)
    torch.testing.assert_close(got, packed_by_rows(query, key, value, [0, 5, 16, 40]))
    grouped = _attend_packed(query, key, value, 0.3, rows.groups)
    real = [*range(12), *range(16, 36)]
    torch.testing.assert_close(got[:, real], grouped[:, real])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
def test_flash_attention_equals_the_formula_with_its_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(1, heads, 160, 64, generator=generator).cuda() for heads in (4, 2, 2)]
    weight = torch.randn(1, 160, 4, 64, generator=generator).cuda()
    rows = PackedRows([0, 70, 77], [70, 7, 83], 160, torch.device("cuda"))

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        query, key, value = (x.to(dtype).requires_grad_() for x in inputs)
        if dtype is torch.bfloat16:
            bounds, longest = rows.bounds
            output = _attend_flash(query, key, value, 0.3, bounds, longest)
        else:
            output = _attend_packed(query, key, value, 0.3, rows.groups)
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), (query, key, value))]

    for got, expected in zip(results(torch.bfloat16), results(torch.float64), strict=True):
        assert (got.double() - expected).norm() < 2e-2 * expected.norm()


def test_packed_rows_are_kept_apart(tiny_model_folder: Path) -> None:
    """Positions that start again mean another sequence: transformers then gives a mask, which must be obeyed."""
    base = load_base(ModelConfig(path=str(tiny_model_folder), dtype="float32"), torch.device("cpu"))
    base.set_attn_implementation(packed_attention())
    ids = torch.randint(3, 200, (1, 30), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    packed = base(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = base(input_ids=ids[:, 12:], use_cache=False).logits
    torch.testing.assert_close(packed[:, 12:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longest", [1024, 10])
def test_packed_rows_attend_as_alone(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """In blocks and, for long rows and on GPUs, through torch's own attention; gradients too."""
    monkeypatch.setattr("fedit.attention.LONGEST", longest)
    generator = torch.Generator().manual_seed(2)
    lengths, starts = [5, 70, 3, 68, 1], [2, 7, 77, 84, 152]

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, 160, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = draw(4), draw(2), draw(2)
    groups = group_rows(starts, lengths, torch.device("cpu"))
    got = _attend_packed(query, key, value, 0.3, groups)[0]
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(got)
    for start, length in zip(starts, lengths, strict=True):
        row = slice(start, start + length)
        expected[row] = plain(query[:, :, row], key[:, :, row], value[:, :, row], 0.3)[0]
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), (query, key, value)),
        torch.autograd.grad((expected * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
