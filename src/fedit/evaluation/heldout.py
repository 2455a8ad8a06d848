"""Run models on held-out rows: the loss of each reference response, and generated answers.

All models are adapters on the one base, so rows of different models share a forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedit.evaluation.checks import exact_match, passes
from fedit.evaluation.metrics import Prediction, rouge_l
from fedit.generation import GREEDY, Sampling, generate
from fedit.interfaces import Adapter, EncodedExample
from fedit.model import StackedModel

NUM_SLOTS = 16
"""Adapters evaluated at the same time, at most; where memory is short, twice as many as are tuned (no moments)."""
GENERATED_TOKENS = {"cpu": 16384, "cuda": 65536}
"""Prompt and answer tokens of a generation batch at most: each of them keeps its keys and values."""


def mean_loss(model: StackedModel, adapters: Sequence[Adapter], examples: Sequence[EncodedExample]) -> float:
    """Return the mean negative log-likelihood (nats) over all response tokens of `examples`, mean over the adapters."""
    num_tokens = sum(example.num_supervised for example in examples)
    losses = [
        response_losses(model, adapters[start : start + NUM_SLOTS], examples).sum()
        for start in range(0, len(adapters), NUM_SLOTS)
    ]
    return float(sum(losses) / num_tokens / len(adapters))


def predict(
    model: StackedModel,
    adapters: Mapping[str, Adapter | None],
    examples: Sequence[EncodedExample],
    max_new_tokens: int,
    on_model: Callable[[int], None] = lambda num_models: None,
) -> Iterator[Prediction]:
    """Yield what every model (None: the base itself) does with every row, model by model.

    `max_new_tokens` 0 measures the losses only. Overwrites the model's slots. `on_model` is told how many models each
    group finished.
    """
    num_slots = min(NUM_SLOTS, 2 * model.max_slots)
    for group in together(adapters, num_slots):
        stacked = [adapters[name] for name in group]
        losses = response_losses(model, stacked, examples)
        answers = generate_answers(model, stacked, examples, max_new_tokens) if max_new_tokens else None
        for position, name in enumerate(group):
            for index, example in enumerate(examples):
                answer = None if answers is None else answers[position][index]
                yield _prediction(name, index, example, answer, float(losses[position, index]))
        on_model(len(group))


def with_reference_margins(model: StackedModel, examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Return rows of preferences that know how much the base prefers the response to the rejected one."""
    (margins,) = _margins(model, [None], examples)
    return [replace(row, reference_margin=margin) for row, margin in zip(examples, margins.tolist(), strict=True)]


def preference_accuracy(
    model: StackedModel, adapters: Mapping[str, Adapter | None], examples: Sequence[EncodedExample]
) -> dict[str, float]:
    """Return, by model, the share of rows whose response it prefers to the rejected one more than the base does.

    Equal is half: the base itself has 0.5.
    """
    base = np.asarray([row.reference_margin for row in examples])
    accuracies = {}
    for group in together(adapters, min(NUM_SLOTS, 2 * model.max_slots)):
        margins = _margins(model, [adapters[name] for name in group], examples)
        for name, own in zip(group, margins, strict=True):
            better = np.where(np.isclose(own, base, rtol=1e-6), 0.5, own > base)
            accuracies[name] = float(better.mean())
    return accuracies


def _margins(model: StackedModel, adapters: Sequence[Adapter | None], examples: Sequence[EncodedExample]) -> np.ndarray:
    """Return log p(response) - log p(rejected) of every row, [models, rows]."""
    rejected = [row.rejected for row in examples if row.rejected is not None]
    return response_losses(model, adapters, rejected) - response_losses(model, adapters, examples)


def together(adapters: Mapping[str, Adapter | None], size: int) -> Iterator[list[str]]:
    """Yield the names of models that can share a pass through the base: `size` at most, with the same side."""
    by_side: dict[int, list[str]] = {}
    for name, adapter in adapters.items():
        by_side.setdefault(id(adapter.side) if adapter is not None and adapter.side else 0, []).append(name)
    for names in by_side.values():
        for start in range(0, len(names), size):
            yield names[start : start + size]


def response_losses(
    model: StackedModel, adapters: Sequence[Adapter | None], examples: Sequence[EncodedExample]
) -> np.ndarray:
    """Return the summed negative log-likelihood (nats) of each row's response tokens, float64 [models, rows]."""
    model.fill(adapters)
    pairs = [(slot, row) for slot in range(len(adapters)) for row in range(len(examples))]
    losses = np.zeros((len(adapters), len(examples)))
    inputs = [examples[row] for _, row in pairs]
    for part, batch in model.batches(inputs, [slot for slot, _ in pairs]):
        slots, rows = zip(*(pairs[i] for i in part), strict=True)
        with torch.inference_mode():
            token_losses, row_of_token = model.token_losses(batch)
            sums = torch.zeros(len(rows), dtype=torch.float64, device=model.device)
            sums.index_add_(0, row_of_token, token_losses.double())
        losses[list(slots), list(rows)] = sums.cpu().numpy()
    return losses


def generate_answers(
    model: StackedModel, adapters: Sequence[Adapter | None], examples: Sequence[EncodedExample], max_new_tokens: int
) -> list[list[str]]:
    """Return each model's greedy answer to each row: a list for each model."""
    asked = [(slot, example.prompt_ids) for slot in range(len(adapters)) for example in examples]
    texts = dict(continue_prompts(model, adapters, asked, max_new_tokens))
    return [
        [texts[slot * len(examples) + row].strip() for row in range(len(examples))] for slot in range(len(adapters))
    ]


def continue_prompts(
    model: StackedModel,
    adapters: Sequence[Adapter | None],
    asked: Sequence[tuple[int, np.ndarray]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:
    """Yield what continues each prompt, as `generate` does, with its index, batch by batch. Overwrites the slots.

    Args:
        model: the stacked model.
        adapters: who answers (None: the base itself).
        asked: pairs of an adapter's index and a prompt's ids (int32 [T]).
        max_new_tokens: of a continuation.
        sampling: how tokens are chosen; draws of another batch have another seed, the next.
        stops: what ends a continuation.
    """
    model.fill(adapters)
    limit = GENERATED_TOKENS.get(model.device.type, GENERATED_TOKENS["cuda"])

    def kind(index: int) -> tuple[bool, int]:
        """Who may share a batch: it lasts as long as its longest answer, and the base never learned to stop; and it
        ends where its longest prompt fills the context, which must cut no shorter prompt's answer.
        """
        slot, prompt = asked[index]
        return adapters[slot] is None, len(prompt) if model.room(len(prompt)) < max_new_tokens else 0

    # A slot's rows side by side: a batch of few slots takes less time than one of many.
    in_order = sorted(range(len(asked)), key=lambda index: (*kind(index), asked[index][0], len(asked[index][1])))
    for _, group in itertools.groupby(in_order, kind):
        waiting = list(group)
        longest = max(len(asked[index][1]) for index in waiting)
        while waiting:
            count = max(1, limit // (longest + max_new_tokens))
            batch, waiting = waiting[-count:], waiting[:-count]
            slots, prompts = zip(*(asked[index] for index in batch), strict=True)
            texts = generate(model, prompts, slots, max_new_tokens, sampling, stops)
            yield from zip(batch, texts, strict=True)
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + 1)


def _prediction(model: str, index: int, encoded: EncodedExample, answer: str | None, nll: float) -> Prediction:
    example = encoded.example
    reference = example.response
    passed = score = None
    if answer is not None:
        passed = exact_match(answer, reference) if example.checks is None else passes(example.checks, answer)
        score = rouge_l(answer, reference)
    return Prediction(
        model=model,
        index=index,
        category=example.category,
        instruction=example.turns[-1].instruction,
        context=example.turns[-1].context,
        reference=reference,
        answer=answer,
        passed=passed,
        rouge_l=score,
        nll=nll,
        num_tokens=encoded.num_supervised,
    )
