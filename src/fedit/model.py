"""The frozen base and the stacked LoRA adapters on its linear layers.

One base is resident; S adapters ("slots") lie over it. A batch names a slot for each of its rows, and every adapted
layer computes ``W0 x + s_k B_k A_k x`` with the row's own slot k, so one forward pass serves many clients. Because W0
is frozen and rows do not see each other, the result equals S models run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from fedit.base import find_targets, is_linear, linear_shape
from fedit.config import AdapterConfig
from fedit.head import FrozenHeadLoss, is_plain_head
from fedit.interfaces import Adapter, EncodedExample, EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------- stacked LoRA


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows for one forward pass, padded on the right to the longest.

    No attention mask is needed: under causal attention nothing looks at padding that lies to its right.
    """

    input_ids: Tensor
    """int64 [R, T]"""
    supervised: Tensor
    """bool [R, T]: the loss is taken on predicting these tokens"""
    slots: Tensor
    """int64 [R]: the adapter of each row"""
    lengths: Sequence[int]
    """Tokens of each row without padding"""
    dropout_seeds: Sequence[int] = ()
    """One per row, where adapter dropout applies"""

    @staticmethod
    def collate(
        examples: Sequence[EncodedExample], slots: Sequence[int], device: torch.device, seeds: Sequence[int] = ()
    ) -> Batch:
        """Return the batch of `examples`, the i-th under the adapter ``slots[i]``."""
        length = max(len(example) for example in examples)
        input_ids = np.zeros((len(examples), length), dtype=np.int64)
        supervised = np.zeros((len(examples), length), dtype=bool)
        for row, example in enumerate(examples):
            input_ids[row, : len(example)] = example.input_ids
            supervised[row, : len(example)] = example.supervised
        supervised[:, 0] = False
        return Batch(
            torch.from_numpy(input_ids).to(device),
            torch.from_numpy(supervised).to(device),
            torch.as_tensor(slots, dtype=torch.int64, device=device),
            [len(example) for example in examples],
            seeds,
        )


@dataclass(eq=False)
class _Routing:
    """What the adapted layers and the head must know of the current forward pass; shared by all of them."""

    slots: Tensor | None = None
    scaling: Tensor | None = None
    length: int = 0
    """Tokens of each row in this call of the base"""
    dropout: list[tuple[torch.Generator, int]] | None = None
    head_positions: Tensor | None = None
    hidden: Tensor | None = None
    """What a plain head would have seen at these positions, [N, d]"""


class _StackedProduct(torch.autograd.Function):
    """``output + scaling[k] * B[k] A[k] x`` for the slot k of each row: one node, gradients added where they belong.

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
        scaling: Tensor,
        slots: Tensor,
        into_A: Tensor,
        into_B: Tensor,
    ) -> Tensor:
        scaling = scaling.index_select(0, slots)[:, None, None]
        a = lora_A.index_select(0, slots).to(x.dtype)
        b = (lora_B.index_select(0, slots) * scaling).to(x.dtype)
        inner = torch.bmm(x, a.mT)
        ctx.save_for_backward(x, inner, a, b, scaling, slots)
        ctx.into = into_A, into_B
        return torch.baddbmm(output, inner, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_output,) = gradients
        x, inner, a, b, scaling, slots = ctx.saved_tensors
        into_A, into_B = ctx.into
        of_inner = torch.bmm(of_output, b)
        into_A.index_add_(0, slots, torch.bmm(of_inner.mT, x).to(into_A.dtype))
        into_B.index_add_(0, slots, torch.bmm(of_output.mT, inner).to(into_B.dtype).mul_(scaling))
        of_x = torch.bmm(of_inner, a) if ctx.needs_input_grad[1] else None
        return of_output, of_x, *[None] * 6


class StackedLora(nn.Module):
    """A frozen linear layer plus ``scaling[k] * B[k] A[k] x`` for the slot k of each row of x [R, T, n]."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    gradient_A: Tensor
    gradient_B: Tensor

    def __init__(self, name: str, base: nn.Module, routing: _Routing, dropout: float) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.num_inputs, self.num_outputs = linear_shape(base)
        self._routing = routing
        self._dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        output = self.base(x)
        routing = self._routing
        if routing.slots is None or routing.scaling is None:
            return output
        rows = len(routing.slots)
        num_tokens = rows * routing.length
        if x.shape[:-1].numel() != num_tokens or x.shape[0] not in (rows, num_tokens):
            raise EngineError(
                f"Layer {self.name} receives {list(x.shape)}, not all tokens of {rows} rows: the rows cannot be told "
                "apart (an expert layer?). Leave it out of [adapter] target_modules."
            )
        x = x.reshape(rows, -1, x.shape[-1])
        if routing.dropout is not None:
            x = x * self._dropout_mask(x, routing.dropout)
        added = _StackedProduct.apply(
            output.reshape(rows, -1, self.num_outputs),
            x,
            self.lora_A,
            self.lora_B,
            routing.scaling,
            routing.slots,
            self.gradient_A,
            self.gradient_B,
        )
        return added.view(output.shape)

    def _dropout_mask(self, x: Tensor, rows: Sequence[tuple[torch.Generator, int]]) -> Tensor:
        """Each row draws for its own tokens from its own generator: neither neighbours nor padding change its mask."""
        keep = 1.0 - self._dropout
        mask = torch.zeros_like(x)
        for row, (generator, length) in enumerate(rows):
            draw = torch.rand(length, x.shape[2], generator=generator, device=x.device)
            mask[row, :length] = (draw < keep).to(x.dtype) / keep
        return mask


class StackedModel:
    """A frozen causal LM with S LoRA slots on its linear layers.

    All slots live in one matrix ``parameters`` [S, d], float32 unless the base is float64: a row is a client's whole
    adapter, each layer's A [S, r, n] and B [S, m, r] are views of its columns. An adapter of a lower rank fills
    the first rows of A and columns of B; the rest stay exactly zero, because their gradients are. Backward passes add
    to ``gradients`` [S, d], laid out alike; whoever steps along them sets them to zero.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AdapterConfig) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.device = base.device
        self.rank = config.max_rank
        self.lora_alpha = config.alpha
        self.dropout = config.dropout
        self._routing = _Routing()
        self.layers = [
            _replace(base, name, StackedLora(name, layer, self._routing, config.dropout))
            for name, layer in find_targets(base, config.target_modules).items()
        ]
        # The base's own generation settings (sampling, penalties) would make answers of models incomparable.
        eos = tokenizer.eos_token_id
        base.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=eos)
        base.register_forward_pre_hook(self._note_length, with_kwargs=True)
        head = base.get_output_embeddings()
        if head is None:
            raise EngineError(
                f"{type(base).__name__} has no language-model head, so it cannot be tuned as a causal LM."
            )
        # The check sees the base without adapters and hooks.
        self._plain_head = head if is_plain_head(base, head) else None
        head.register_forward_pre_hook(self._select_supervised)
        self.processed_tokens = 0
        """Padding included, in all calls of `token_losses`; for whoever wants to know what padding costs."""
        self.allocate(1)

    # -- adapters in and out

    @property
    def num_parameters(self) -> int:
        """d: the parameters of one adapter of the full rank."""
        return sum(self.rank * (layer.num_inputs + layer.num_outputs) for layer in self.layers)

    @property
    def num_slots(self) -> int:
        return len(self.scaling)

    @property
    def transposed_weights(self) -> bool:
        """Whether the adapted layers keep their weight as [inputs, outputs] (GPT-2's Conv1D)."""
        return isinstance(self.layers[0].base, Conv1D)

    def target_names(self) -> list[str]:
        """Return names that select exactly the adapted layers in PEFT: name endings where they suffice."""
        adapted = {layer.name for layer in self.layers}
        endings = sorted({name.rpartition(".")[2] for name in adapted})
        others = [name for name, module in self.base.named_modules() if is_linear(module)]
        bases = {f"{name}.base" for name in adapted}
        if any(name.rpartition(".")[2] in endings for name in others if name not in bases):
            return sorted(adapted)
        return endings

    def allocate(self, num_slots: int) -> None:
        """Make `num_slots` empty slots (B = A = 0: the base itself); whatever the slots held is gone."""
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        self.parameters = torch.zeros(num_slots, self.num_parameters, device=self.device, dtype=dtype)
        self.gradients = torch.zeros_like(self.parameters)
        self.scaling = torch.zeros(num_slots, device=self.device, dtype=dtype)
        offset = 0
        for layer in self.layers:
            for name, shape in _factor_shapes(layer, self.rank).items():
                columns = slice(offset, offset + math.prod(shape))
                setattr(layer, name, nn.Parameter(self.parameters[:, columns].view(num_slots, *shape)))
                setattr(layer, name.replace("lora", "gradient"), self.gradients[:, columns].view(num_slots, *shape))
                offset = columns.stop

    def fresh_adapter(self, rng: np.random.Generator) -> Adapter:
        """Return an untrained adapter of the full rank as PEFT initialises it: A uniform in +-1/sqrt(n), B zero."""
        tensors = {}
        for layer in self.layers:
            bound = 1 / math.sqrt(layer.num_inputs)
            a = rng.uniform(-bound, bound, (self.rank, layer.num_inputs)).astype(np.float32)
            tensors[f"{layer.name}.lora_A.weight"] = torch.from_numpy(a)
            tensors[f"{layer.name}.lora_B.weight"] = torch.zeros(layer.num_outputs, self.rank)
        return Adapter(tensors, self.rank, self.lora_alpha)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy `adapter` into a slot.

        Raises:
            EngineError: tensors are missing, unexpected or of another shape; nothing is written then.
        """
        expected = {
            f"{layer.name}.{name}.weight": shape
            for layer in self.layers
            for name, shape in _factor_shapes(layer, adapter.rank).items()
        }
        got = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
        if got != expected or adapter.rank > self.rank:
            wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise EngineError(
                f"The adapter (rank {adapter.rank}) does not fit the model (rank up to {self.rank}): {len(wrong)} "
                f"tensors differ, first {wrong[:3]}: got {[got.get(name) for name in wrong[:3]]}, expected "
                f"{[expected.get(name) for name in wrong[:3]]}. Nothing was loaded."
            )
        with torch.no_grad():
            self.parameters[slot] = 0
            self.scaling[slot] = adapter.scaling
            for layer in self.layers:
                layer.lora_A[slot, : adapter.rank] = adapter.tensors[f"{layer.name}.lora_A.weight"].to(self.device)
                layer.lora_B[slot, :, : adapter.rank] = adapter.tensors[f"{layer.name}.lora_B.weight"].to(self.device)

    def read(self, slot: int, rank: int) -> dict[str, Tensor]:
        """Return a copy of a slot's tensors on the CPU, cut to `rank`."""
        tensors = {}
        for layer in self.layers:
            tensors[f"{layer.name}.lora_A.weight"] = layer.lora_A.detach()[slot, :rank].cpu().clone()
            tensors[f"{layer.name}.lora_B.weight"] = layer.lora_B.detach()[slot, :, :rank].cpu().clone()
        return tensors

    # -- forward

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood (nats, [N]) of each supervised token, and its row (int64 [N]).

        The head is applied to the N positions that predict a supervised token only; the order is row by row.
        """
        self.processed_tokens += batch.input_ids.numel()
        row, position = batch.supervised.nonzero(as_tuple=True)
        head_positions = row * batch.input_ids.shape[1] + position - 1
        targets = batch.input_ids[row, position]
        with self._route(batch.slots, head_positions, list(zip(batch.dropout_seeds, batch.lengths, strict=False))):
            logits = self.base(input_ids=batch.input_ids, use_cache=False).logits[0]
            hidden = self._routing.hidden
        if self._plain_head is not None:
            head = self._plain_head
            return FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets), row
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, targets, reduction="none"), row

    @torch.inference_mode()
    def generate(self, prompts: Sequence[np.ndarray], slots: Sequence[int], max_new_tokens: int) -> list[str]:
        """Return the greedy continuation of each prompt (int32 ids) under its row's slot.

        It ends at EOS, after `max_new_tokens`, or where the longest prompt of the batch reaches the model's context: no
        prompt without room for `max_new_tokens` should share a batch with shorter ones.
        """
        length = max(len(prompt) for prompt in prompts)
        input_ids = torch.zeros(len(prompts), length, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            attention_mask[row, length - len(prompt) :] = 1
        with self._route(torch.as_tensor(slots, device=self.device)):
            output = self.base.generate(  # pyright: ignore[reportCallIssue] (torch's __getattr__ hides the mixin)
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device),
                max_new_tokens=max(1, int(min(max_new_tokens, self.room(length)))),
            )
        return self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)

    def room(self, length: int) -> float:
        """Return how many tokens the model's context leaves after `length` of them; infinity where it has no limit."""
        context = getattr(self.base.config, "max_position_embeddings", None)
        return math.inf if context is None else context - length

    @contextmanager
    def _route(
        self, slots: Tensor, head_positions: Tensor | None = None, dropout: Sequence[tuple[int, int]] = ()
    ) -> Iterator[None]:
        routing = self._routing
        routing.slots, routing.scaling, routing.head_positions = slots, self.scaling, head_positions
        if self.dropout and dropout:
            routing.dropout = [(torch.Generator(self.device).manual_seed(seed), length) for seed, length in dropout]
        try:
            yield
        finally:
            routing.slots = routing.scaling = routing.head_positions = routing.dropout = routing.hidden = None

    def _note_length(self, _base: nn.Module, _arguments: tuple[object, ...], named: dict[str, Tensor]) -> None:
        self._routing.length = named["input_ids"].shape[1]

    def _select_supervised(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Let the head see the chosen positions only, whatever follows it.

        A plain head is applied later, chunk by chunk: here it gets the first position, and the states are kept.
        """
        positions = self._routing.head_positions
        if positions is None:
            return inputs
        hidden = inputs[0].flatten(0, 1).index_select(0, positions)
        if self._plain_head is not None:
            self._routing.hidden = hidden
            hidden = hidden[:1]
        return (hidden[None], *inputs[1:])


def _factor_shapes(layer: StackedLora, rank: int) -> Mapping[str, tuple[int, int]]:
    return {"lora_A": (rank, layer.num_inputs), "lora_B": (layer.num_outputs, rank)}


def _replace(base: nn.Module, name: str, layer: StackedLora) -> StackedLora:
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, layer)
    return layer
