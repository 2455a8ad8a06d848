"""The chunked loss of a frozen head against torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedit import head
from fedit.head import FrozenHeadLoss, is_plain_head


def draw(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).to(dtype)
    return (
        hidden,
        weight,
        torch.randn(50, generator=generator).to(dtype) if bias else None,
        torch.randint(50, (23,), generator=generator),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logits_bytes", [1, 4 * 50 * 7, 2**26])
def test_equals_cross_entropy_whatever_the_chunks(monkeypatch, bias: bool, logits_bytes: int) -> None:
    monkeypatch.setitem(head.LOGITS_BYTES, "cpu", logits_bytes)
    hidden, weight, offset, targets = draw(torch.float64, bias)
    losses = FrozenHeadLoss.apply(hidden, weight, offset, targets)
    expected = cross_entropy(torch.nn.functional.linear(hidden, weight, offset), targets, reduction="none")
    assert isinstance(losses, torch.Tensor)
    torch.testing.assert_close(losses, expected)
    scale = torch.linspace(0.1, 2, 23, dtype=torch.float64)
    (ours,) = torch.autograd.grad((losses * scale).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * scale).sum(), hidden)
    torch.testing.assert_close(ours, theirs)


def test_bfloat16_losses_are_float32() -> None:
    hidden, weight, _, targets = draw(torch.bfloat16, bias=False)
    losses = FrozenHeadLoss.apply(hidden, weight, None, targets)
    expected = cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    assert isinstance(losses, torch.Tensor)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    (ours,) = torch.autograd.grad(losses.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("cap", "plain"), [(False, True), (True, False)])
def test_a_cap_after_the_head_is_noticed(cap: bool, plain: bool) -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(10, 4), nn.Linear(4, 10)

        def forward(self, input_ids: torch.Tensor, use_cache: bool):
            logits = self.lm_head(self.embed(input_ids))
            return type("Output", (), {"logits": logits.tanh() if cap else logits})

    base = Base()
    assert is_plain_head(base, base.lm_head) is plain
    assert not base.lm_head._forward_hooks
