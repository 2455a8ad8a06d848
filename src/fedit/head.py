"""The frozen head and the loss on top of it, in chunks: no tensor of all tokens times the vocabulary ever exists.

Because the head is frozen, the gradient of each token's loss with respect to its hidden state, (softmax - one-hot) W,
can be computed beside the loss itself, while the chunk's logits are there. The backward pass only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LOGITS_BYTES = {"cpu": 2**23, "cuda": 2**29}
"""Of the float32 logits of a chunk, at most (one token may have more). On a CPU they had better stay in its cache."""


class FrozenHeadLoss(torch.autograd.Function):
    """Negative log-likelihood (nats, float32 [N]) of `targets` under the head's softmax, for hidden states [N, d].

    `weight` [V, d] and `bias` [V] or None get no gradient. Sums of exponentials are taken in float32, as
    ``cross_entropy`` on float32 logits takes them (float64 where the head is). `is_likeliest` (bool [N]), where given,
    is overwritten by whether each target is the likeliest token there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        is_likeliest: Tensor | None = None,
    ) -> Tensor:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(targets), dtype=precision, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        limit = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"])
        size = max(1, limit // (4 * len(weight)))
        buffer = torch.empty(min(size, len(targets)), len(weight), dtype=precision, device=hidden.device)
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            index = targets[chunk, None]
            values = buffer[: len(index)].copy_(linear(hidden[chunk], weight, bias))
            torch.log_softmax(values, 1, out=values)
            losses[chunk] = -values.gather(1, index)[:, 0]
            if is_likeliest is not None:
                is_likeliest[chunk] = values.argmax(1) == targets[chunk]
            if of_hidden is not None:
                of_logits = values.exp_()
                of_logits.scatter_add_(1, index, of_logits.new_full(index.shape, -1.0))
                torch.mm(of_logits.to(weight.dtype), weight, out=of_hidden[chunk])
        if of_hidden is not None:
            ctx.save_for_backward(of_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return (gradients[0][:, None] * of_hidden).to(of_hidden.dtype), None, None, None, None


def is_plain_head(base: nn.Module, head: nn.Module) -> bool:
    """Tell whether the logits of `base` are its linear head's output as it is, without a cap or scale after it.

    Found out by a forward pass over two tokens, because every architecture names such things differently.
    """
    if type(head) is not nn.Linear:
        return False
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _head, _inputs, output: seen.append(output.clone()))
    try:
        with torch.inference_mode():
            ids = torch.tensor([[0, 1]], device=head.weight.device)
            logits = base(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return len(seen) == 1 and torch.equal(seen[0], logits)
