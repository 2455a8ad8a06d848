"""One adapted layer: the frozen product and the adapter's as one node, which GPUs use, against two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedit import lora
from fedit.lora import Pieces, Routing, StackedLora

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slots", [[1, 1, 1], [2, 0, 0, 2, 1]])
def test_one_node_equals_two(monkeypatch: pytest.MonkeyPatch, slots: list[int], bias: bool) -> None:
    """Outputs, gradients of the input and of the stacks, where one slot has all pieces and where several share them."""
    torch.manual_seed(0)
    base = nn.Linear(6, 10, bias=bias).double().requires_grad_(False)
    lora_a, lora_b = torch.randn(3, 2, 6).double(), torch.randn(3, 10, 2).double()
    x, upstream = torch.randn(1, 4 * len(slots), 6).double(), torch.randn(1, 4 * len(slots), 10).double()

    def results(fused_on: set[str]) -> list[torch.Tensor]:
        monkeypatch.setattr(lora, "FUSED_ON", fused_on)
        routing = Routing(Pieces.of(slots, slots, 3, CPU), num_tokens=x.shape[1])
        layer = StackedLora("layer", base, routing, 0.0)
        layer.lora_A, layer.lora_B = nn.Parameter(lora_a.clone()), nn.Parameter(lora_b.clone())
        layer.gradient_A, layer.gradient_B = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
        given = x.clone().requires_grad_()
        output = layer(given)
        output.backward(upstream)
        assert given.grad is not None
        return [output.detach(), given.grad, layer.gradient_A, layer.gradient_B]

    for one, two in zip(results({"cpu"}), results(set()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_what_is_more_than_a_product_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of another class (a quantised one) or with a hook computes its own part."""
    monkeypatch.setattr(lora, "FUSED_ON", {"cpu"})

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (its name in nn.Linear)
            return 2 * super().forward(input)

    hooked = nn.Linear(6, 6, bias=False)
    hooked.register_forward_hook(lambda _module, _inputs, output: output.mul(2))
    for base in (Doubled(6, 6, bias=False), hooked):
        base.requires_grad_(False)
        layer = StackedLora("layer", base, Routing(Pieces.of([0], [0], 1, CPU), num_tokens=4), 0.0)
        layer.lora_A, layer.lora_B = nn.Parameter(torch.zeros(1, 2, 6)), nn.Parameter(torch.zeros(1, 6, 2))
        layer.gradient_A = layer.gradient_B = None
        x = torch.randn(1, 4, 6)
        torch.testing.assert_close(layer(x), 2 * x @ base.weight.T)
