"""The frozen base and the stacked LoRA adapters on its linear layers.

One base is resident; S adapters ("slots") lie over it. A batch names a slot for each of its rows, and every adapted
layer computes ``W0 x + s_k B_k A_k x`` with the row's own slot k, so one forward pass serves many clients. Because W0
is frozen and rows do not see each other, the result equals S models run one by one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedit.base import find_targets, is_linear
from fedit.batch import BATCH_TOKENS, Batch, batches, longest_packed
from fedit.config import AdapterConfig
from fedit.head import FrozenHeadLoss, is_plain_head
from fedit.interfaces import FACTORS, Adapter, EncodedExample, EngineError
from fedit.lora import Pieces, Routing, StackedLora
from fedit.lowrank import LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_log = logging.getLogger(__name__)


class StackedModel:
    """A frozen causal LM with S LoRA slots on its linear layers.

    All slots live in one matrix ``parameters`` [S, d], float32 unless the base is float64: a row is a client's whole
    adapter, first the A [r, n] of all layers, then their B [m, r]. An adapter of a lower rank fills the first rows of A
    and columns of B; the rest stay exactly zero, because their gradients are.

    The layers compute with copies in the base's precision, in which each B is scaled; whoever changes `parameters`
    calls `parameters_changed`. Backward passes add up gradients for `take_gradients`.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AdapterConfig) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.device = base.device
        self.rank = config.max_rank
        self.lora_alpha = config.alpha
        self.dropout = config.dropout
        self._routing = Routing()
        self.layers = [
            _replace(base, name, StackedLora(name, layer, self._routing, config.dropout))
            for name, layer in find_targets(base, config.target_modules).items()
        ]
        # The base's own generation settings (sampling, penalties) would make answers of models incomparable.
        eos = tokenizer.eos_token_id
        base.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=eos)
        base.register_forward_pre_hook(self._note_num_tokens, with_kwargs=True)
        self._checkpointed = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        head = base.get_output_embeddings()
        if head is None:
            raise EngineError(
                f"{type(base).__name__} has no language-model head, so it cannot be tuned as a causal LM."
            )
        # The checks see the base without adapters and hooks.
        self._plain_head = head if is_plain_head(base, head) else None
        self.longest_packed = longest_packed(base)
        """Tokens of the longest rows that the base may be given packed"""
        head.register_forward_pre_hook(self._select_supervised)
        self.max_slots, self.batch_tokens = 16, BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        """Clients tuned at the same time, and tokens of a batch, at most; `fit_memory` chooses them."""
        self._has_halved = False
        self._side: Mapping[str, LowRank] = {}
        self.processed_tokens = 0
        """Padding included, in all calls of `token_losses`; for whoever wants to know what padding costs."""
        self.allocate(1, ())

    # -- adapters in and out

    @property
    def num_parameters(self) -> int:
        """d: the parameters of one adapter of the full rank."""
        return sum(self.rank * (layer.num_inputs + layer.num_outputs) for layer in self.layers)

    @property
    def _num_first_factors(self) -> int:
        """Columns of `parameters` that hold A; those of B follow."""
        return self.rank * sum(layer.num_inputs for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """What a slot takes while it is tuned: parameters, gradient, two moments, two of a step's own, and the copy."""
        return self.num_parameters * (6 * self.parameters.element_size() + self._copies.element_size())

    @property
    def can_checkpoint(self) -> bool:
        return bool(self._checkpointed)

    @property
    def checkpointing(self) -> bool:
        """Whether a layer's activations are computed again in the backward pass instead of kept."""
        return any(layer.training for layer in self._checkpointed)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        if on and not self.can_checkpoint:
            raise EngineError(
                f"[engine] gradient_checkpointing: {type(self.base).__name__} does not support it. Turn it off."
            )
        if on:
            self.base.activation_checkpointing_enable()
        # Only the layer itself is told: its dropouts stay off.
        for layer in self._checkpointed:
            layer.training = on

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

    def columns(self, factors: Collection[str]) -> slice:
        """Return the columns of `parameters` that hold some of the factors, which lie side by side."""
        split = self._num_first_factors
        return slice(0 if "lora_A" in factors else split, self.num_parameters if "lora_B" in factors else split)

    def allocate(self, num_slots: int, trained: Collection[str] = FACTORS) -> None:
        """Make `num_slots` empty slots (B = A = 0: the base itself); whatever the slots held is gone.

        Gradients are collected for the factors in `trained` only, and take no memory where there are none.
        """
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        self.parameters = torch.zeros(num_slots, self.num_parameters, device=self.device, dtype=dtype)
        self._copies = torch.zeros_like(self.parameters, dtype=self.base.dtype)
        self.scaling = torch.zeros(num_slots, device=self.device, dtype=dtype)
        for layer, factors in self.views(self._copies):
            layer.lora_A, layer.lora_B = (nn.Parameter(factor) for factor in factors)
        self._collect(num_slots if trained else 0, trained)

    def collect_by_row(self, num_rows: int, trained: Collection[str]) -> None:
        """Keep the gradients of so many rows apart from now on, until slots are allocated again."""
        self._collect(num_rows, trained)

    def _collect(self, num_targets: int, trained: Collection[str]) -> None:
        self._gradients = self.parameters.new_zeros(num_targets, self.num_parameters)
        self._row_slots: Tensor | None = None
        for layer, factors in self.views(self._gradients):
            wanted = [factor if name in trained else None for name, factor in zip(FACTORS, factors, strict=True)]
            layer.gradient_A, layer.gradient_B = wanted

    def set_side(self, side: Mapping[str, LowRank], *, shared: bool = False) -> None:
        """Let all slots see the base with an adapter's side beside it; empty: the base as it is.

        The weights stay: the layers multiply by the factors, or, where these would take longer, by their product.

        Raises:
            EngineError: it would change while it is `shared` with other slots, or does not fit the layers.
        """
        if side is self._side or not (side or self._side):
            return
        if shared:
            raise EngineError("Adapters with different sides cannot share a pass through the base.")
        unknown = side.keys() - {layer.name for layer in self.layers}
        if unknown:
            raise EngineError(f"The adapter's side has modules that are not adapted here, first {min(unknown)!r}.")
        self._side = side
        for layer in self.layers:
            layer.side = ()
            if (matrix := side.get(layer.name)) is not None and matrix.rank:
                factors = [matrix.a.mT, matrix.b.mT]
                if matrix.rank * (layer.num_inputs + layer.num_outputs) >= layer.num_inputs * layer.num_outputs:
                    factors = [factors[0] @ factors[1]]
                layer.side = [factor.to(self.device, self.base.dtype).contiguous() for factor in factors]

    @torch.no_grad()
    def parameters_changed(self, slots: slice = slice(None)) -> None:
        """Bring the layers' copies up to date with `parameters` and `scaling`."""
        b = self._num_first_factors
        self._copies[slots, :b] = self.parameters[slots, :b]
        self._copies[slots, b:] = self.parameters[slots, b:] * self.scaling[slots, None]

    def halve_batches(self, reason: str) -> None:
        """Drop the gradients of a step that did not fit the memory, and let at most half as many tokens in at a time.

        Raises:
            EngineError: that was done before.
        """
        self._gradients.zero_()
        if self._has_halved:
            raise EngineError(
                f"Out of memory again with {self.batch_tokens} tokens at a time: {reason}. What was saved is intact; "
                "resume with less beside it on the device. For a new run, lower [engine] slots or [data] max_length."
            )
        self._has_halved = True
        self.batch_tokens //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning("Out of memory: going on from the last step with %d tokens at a time.", self.batch_tokens)

    def take_gradients(self, slots: slice = slice(None)) -> Tensor:
        """Return the gradients of `parameters` [S, d] that backward passes added up; to be set to zero once used.

        Where they are collected by row, `slots` are rows of the last pass.
        """
        gradients = self._gradients[slots]
        scaling = self.scaling if self._row_slots is None else self.scaling[self._row_slots]
        gradients[:, self._num_first_factors :] *= scaling[slots, None]
        return gradients

    def views(self, stack: Tensor) -> Iterator[tuple[StackedLora, tuple[Tensor, Tensor]]]:
        """Yield every layer with its A [S, r, n] and B [S, m, r] in a matrix of the layout of `parameters`."""
        a_at, b_at = 0, self._num_first_factors
        for layer in self.layers:
            a_end, b_end = a_at + self.rank * layer.num_inputs, b_at + self.rank * layer.num_outputs
            a = stack[:, a_at:a_end].view(len(stack), self.rank, layer.num_inputs)
            b = stack[:, b_at:b_end].view(len(stack), layer.num_outputs, self.rank)
            yield layer, (a, b)
            a_at, b_at = a_end, b_end

    def weight(self, module: str) -> Tensor:
        """Return the frozen weight [m, n] of an adapted layer, float32."""
        layer = next(layer for layer in self.layers if layer.name == module)
        weight = cast(Tensor, layer.base.weight).detach().float()
        return weight.T if isinstance(layer.base, Conv1D) else weight

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
            self.parameters[slot] = self.flat(adapter.tensors, adapter.rank)
            self.scaling[slot] = adapter.scaling
        self.parameters_changed(slice(slot, slot + 1))

    def fill(self, adapters: Sequence[Adapter | None]) -> None:
        """Let slot i hold the i-th adapter, or nothing: the base itself. What the slots held is gone.

        Raises:
            EngineError: an adapter does not fit, or their sides differ (None has none).
        """
        self.allocate(len(adapters), ())
        for slot, adapter in enumerate(adapters):
            self.set_side({} if adapter is None else adapter.side, shared=slot > 0)
            if adapter is not None:
                self.write(slot, adapter.plain())

    def flat(self, tensors: Mapping[str, Tensor], rank: int) -> Tensor:
        """Return tensors of an adapter of `rank` as one row [d] of `parameters`; what they lack is zero."""
        # Put together where the tensors are, and moved once: a copy to a GPU takes longer than most tensors do.
        row = torch.zeros(1, self.num_parameters, dtype=self.parameters.dtype)
        for layer, (a, b) in self.views(row):
            if (tensor := tensors.get(f"{layer.name}.lora_A.weight")) is not None:
                a[0, :rank] = tensor.to(row)
            if (tensor := tensors.get(f"{layer.name}.lora_B.weight")) is not None:
                b[0, :, :rank] = tensor.to(row)
        return row[0].to(self.device)

    def read(self, slot: int, rank: int) -> dict[str, Tensor]:
        """Return a copy of a slot's tensors on the CPU, cut to `rank`."""
        tensors = {}
        for layer, (a, b) in self.views(self.parameters[slot : slot + 1].cpu()):
            tensors[f"{layer.name}.lora_A.weight"] = a[0, :rank].clone()
            tensors[f"{layer.name}.lora_B.weight"] = b[0, :, :rank].clone()
        return tensors

    # -- forward

    def batches(
        self, examples: Sequence[EncodedExample], slots: Sequence[int], seeds: Sequence[int] = ()
    ) -> Iterator[tuple[list[int], Batch]]:
        """Yield the indices and the batch of each part of `examples` that goes through the base at once."""
        return batches(examples, slots, self.device, self.longest_packed, self.batch_tokens, seeds)

    def token_losses(
        self, batch: Batch, slot_of_row: Sequence[int] = (), is_likeliest: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood (nats, [P]) of each supervised token, and its row (int64 [P]).

        Where gradients are collected by row, the batch's "slots" are rows, and `slot_of_row` says what each sees.
        `is_likeliest` (bool [P]), where given, is overwritten by whether each is the likeliest token at its place.

        The head is applied to the P positions that predict a supervised token only; the order is row by row.
        """
        self.processed_tokens += batch.input_ids.numel()
        dropout = [(seed, *row) for seed, row in zip(batch.dropout_seeds, batch.rows, strict=False)]
        self.route(batch.piece_slots, batch.predicting, dropout if self.dropout else (), slot_of_row)
        logits = self.base(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits[0]
        hidden, self._routing.hidden = self._routing.hidden, None
        if self._plain_head is not None:
            head = self._plain_head
            losses = FrozenHeadLoss.apply(hidden, head.weight, head.bias, batch.targets, is_likeliest)
            return losses, batch.target_rows
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if is_likeliest is not None:
            is_likeliest[:] = logits.argmax(1) == batch.targets
        return cross_entropy(logits, batch.targets, reduction="none"), batch.target_rows

    def room(self, length: int) -> float:
        """Return how many tokens the model's context leaves after `length` of them; infinity where it has no limit."""
        context = getattr(self.base.config, "max_position_embeddings", None)
        return math.inf if context is None else context - length

    def route(
        self,
        piece_slots: Sequence[int],
        head_positions: Tensor | None = None,
        dropout: Sequence[tuple[int, int, int]] = (),
        slot_of_row: Sequence[int] = (),
    ) -> None:
        """Tell the layers about the next call of the base; it holds until another, as checkpointed layers run again."""
        routing = self._routing
        slots, num_targets = piece_slots, self.num_slots
        if slot_of_row:
            slots, num_targets = [slot_of_row[row] for row in piece_slots], len(self._gradients)
            self._row_slots = torch.as_tensor(slot_of_row, device=self.device)
        routing.pieces = Pieces.of(slots, piece_slots, num_targets, self.device)
        routing.head_positions, routing.dropout = head_positions, dropout

    def _note_num_tokens(self, _base: nn.Module, _arguments: tuple[object, ...], named: dict[str, Tensor]) -> None:
        self._routing.num_tokens = named["input_ids"].numel()

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
