"""Which tokens a client trained on, read from what it sent (the span check of DAGER, 2405.15586, made greedy).

Let x_v be what the first adapted layers see of token v: its normalised embedding, which no other token of the row has
changed yet. Everything about the base is public, so x_v is too. Of the layer ``W0 x + s B A x`` a batch of tokens t
with gradients g_t at its output gives

    dA = s sum_t (B^T g_t) x_t^T      rows in the span of the x_t, in R^n
    dB = s sum_t g_t (A x_t)^T        rows in the span of the A x_t, in R^r
    dR = s sum_t (B^T g_t) (A x_t)^T  the same, of a core R between B and A

so that a token at some distance from that span was not there. The span has r dimensions at most for each layer (q, k
and v see the same x_v: together 3 r), and no more than there were tokens. Of more tokens it is a part of theirs, to
which none of them need be near. But there are few of them among the vocabulary: the token whose direction explains most
of the update is taken, its direction is taken out of the update and of all x_v, and so on (orthogonal least squares,
1989), as many as there were. That names most tokens of one step even where they are more than the span has dimensions.
dB alone, or a core, has r dimensions in each layer and names few; while B = 0 it is all there is. AdamW divides each
number by its own size, many steps add up spans of changing factors, a sum those of many clients: that blurs, and does
not hide. Vectors that many layers share, and amounts along random directions, have no span.

Two ways of knowing nothing are measured beside it: naming the most frequent tokens of held-out rows, since what a
template repeats is no secret; and the same attack on pure noise of the update's shape.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fedit.interfaces import Adapter, EncodedExample, EngineError, Example
from fedit.lora import StackedLora
from fedit.model import StackedModel

SPENT = 1e-3
"""What is left of a direction of length 1 that counts as nothing"""

View = tuple[Tensor, Tensor]
"""The direction of every token in some space, [V, k], and rows of an update in that space, [rows, k]"""


@dataclass(frozen=True)
class Recovered:
    """The share of a client's distinct tokens that were named, with as many names as there are tokens."""

    num_tokens: int
    """Distinct ones that were trained on"""
    recall: float
    """Precision is the same."""
    blind: float
    """Of the same attack on noise"""
    guessed: float
    """Of naming the most frequent tokens of the held-out rows"""
    unguessed_recall: float | None
    """Of the tokens that this guess misses; None: it misses none"""
    unguessed_blind: float | None
    """Of the same attack on noise"""


class Embeddings:
    """What the first adapted layers see of every token of the vocabulary."""

    def __init__(self, model: StackedModel) -> None:
        """Find these layers, and run the vocabulary through them.

        Raises:
            EngineError: no adapted layer sees a token alone (it sees positions, or other tokens, too).
        """
        embeddings = cast(nn.Embedding, model.base.get_input_embeddings())
        self.inputs, self.modules = _first_inputs(model, len(embeddings.weight))
        """float64 [V, n], and the names of the layers"""

    def views(self, update: Mapping[str, Tensor], adapter: Adapter) -> list[View]:
        """Return what an `update` of `adapter` says of tokens; nothing where it has none of the factors."""
        views, whole = [], []
        for module in self.modules:
            parts = {factor: update.get(f"{module}.lora_{factor}.weight") for factor in "ABR"}
            whole += [_scaled(part) for part in (parts["A"],) if part is not None]
            seen = self.inputs @ adapter.tensors[f"{module}.lora_A.weight"].double().T
            views += [(seen, _scaled(part)) for part in (parts["B"], parts["R"]) if part is not None]
        if whole:
            views.append((self.inputs, torch.cat(whole)))
        return views


def recover(
    views: Sequence[View], trained: Sequence[EncodedExample], public: Sequence[EncodedExample], rng: np.random.Generator
) -> Recovered:
    """Return how many tokens of the `trained` rows an update gives away; `public` rows are what guesses go by."""
    told = np.unique(np.concatenate([_read(row) for row in trained]))
    counts = Counter(np.concatenate([_read(row) for row in public]).tolist())
    guess = np.asarray([token for token, _ in counts.most_common(len(told))])
    noise = [(seen, torch.from_numpy(rng.standard_normal(rows.shape))) for seen, rows in views]
    named, blind = pursue(views, len(told)), pursue(noise, len(told))
    missed = np.setdiff1d(told, guess)
    share = lambda tokens, names: len(np.intersect1d(tokens, names)) / len(tokens) if len(tokens) else None
    return Recovered(
        len(told),
        share(told, named) or 0.0,
        share(told, blind) or 0.0,
        share(told, guess) or 0.0,
        share(missed, named),
        share(missed, blind),
    )


def pursue(views: Sequence[View], count: int) -> list[int]:
    """Return `count` tokens at most, those first that explain most of the rows."""
    left = [
        (seen / seen.norm(dim=1, keepdim=True).clamp(min=1e-30), _scaled(rows)) for seen, rows in views if rows.any()
    ]
    named = list[int]()
    while left and len(named) < count:
        explained = torch.stack([_explained(*view) for view in left]).sum(dim=0)
        explained[named] = 0
        token = int(explained.argmax())
        if not explained[token] > SPENT**4:
            break
        named.append(token)
        left = [_taken_out(seen, rows, token) for seen, rows in left]
    return named


def _explained(seen: Tensor, rows: Tensor) -> Tensor:
    """Return the squared length of the rows along each token's direction, [V]; nothing of a direction that is spent."""
    lengths = seen.norm(dim=1)
    return torch.where(lengths > SPENT, (seen @ rows.T).norm(dim=1) / lengths.clamp(min=SPENT), 0.0).square()


def _taken_out(seen: Tensor, rows: Tensor, token: int) -> View:
    length = seen[token].norm()
    if length <= SPENT:
        return seen, rows
    direction = seen[token] / length
    return seen - torch.outer(seen @ direction, direction), rows - torch.outer(rows @ direction, direction)


def _scaled(rows: Tensor) -> Tensor:
    return rows.double() / rows.double().norm().clamp(min=1e-30)


def _read(row: EncodedExample) -> np.ndarray:
    """Return the tokens that a gradient can depend on: all but what comes after the last one that predicts."""
    return row.input_ids[: np.flatnonzero(row.supervised)[-1]]


@torch.no_grad()
def _first_inputs(model: StackedModel, size: int) -> tuple[Tensor, list[str]]:
    few = np.arange(min(8, size))
    one, other = (_inputs(model, before, few, model.layers[:8]) for before in (0, 1))
    alone = {name: seen for name, seen in one.items() if _same(seen, other[name])}
    if not alone:
        raise EngineError(
            f"No adapted layer of {type(model.base).__name__} sees the embedding of a token alone, so there is no span "
            "to check. Adapt the first layer's projections ([adapter] target_modules)."
        )
    first = next(iter(alone.values()))
    same = [layer for layer in model.layers[:8] if layer.name in alone and _same(alone[layer.name], first)]
    return _inputs(model, 0, np.arange(size), same[:1])[same[0].name].double().cpu(), [layer.name for layer in same]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-6)


def _inputs(model: StackedModel, before: int, tokens: np.ndarray, layers: Sequence[StackedLora]) -> dict[str, Tensor]:
    """Return what `layers` see of `tokens` behind the token `before`, [tokens, n] by layer."""
    model.allocate(1, ())
    seen: dict[str, list[Tensor]] = defaultdict(list)
    note = lambda name: lambda _, inputs: seen[name].append(inputs[0].flatten(0, -2))
    hooks = [layer.register_forward_pre_hook(note(layer.name)) for layer in layers]
    ids = np.stack([np.full_like(tokens, before), tokens], axis=1).astype(np.int32)
    rows = [EncodedExample(pair, np.array([False, True]), Example(())) for pair in ids]
    places, order = list[int](), list[int]()
    try:
        for part, batch in model.batches(rows, [0] * len(rows)):
            offset = sum(len(each) for each in next(iter(seen.values()), []))
            model.token_losses(batch)
            places += [offset + start + 1 for start, _ in batch.rows]
            order += part
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts)[places][np.argsort(order)] for name, parts in seen.items()}
