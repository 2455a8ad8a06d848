"""What all models of a run make of one list of requests: likelihoods of continuations, and text.

Models that can share a pass through the base are asked together. So are requests that differ in their last token only,
as the choices of a multiple-choice question often do: what is fed to the base is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedit.batch import Batch
from fedit.evaluation.heldout import NUM_SLOTS, continue_prompts, together
from fedit.generation import Sampling
from fedit.interfaces import DataError, EncodedExample, Example, Turn
from fedit.run_models import RunModels

_log = logging.getLogger(__name__)

Request = tuple[np.ndarray, np.ndarray]
"""A context and its continuation, as ids; the context is not empty"""
_NO_EXAMPLE = Example((Turn("", ""),))


def likelihoods(models: RunModels, requests: Sequence[Request]) -> dict[str, list[tuple[float, bool]]]:
    """Return, by model, the log-likelihood (nats) of each continuation and whether it is what greedy decoding says.

    A request that exceeds the model's context loses its first tokens.

    Raises:
        DataError: a continuation alone exceeds it.
    """
    asked = _by_input(models, requests)
    rows = [
        EncodedExample(np.frombuffer(fed, np.int32), np.zeros(len(fed) // 4, dtype=bool), _NO_EXAMPLE) for fed in asked
    ]
    asked_of_row = list(asked.values())
    found = {}
    for names in _groups(models):
        models.model.fill([models.adapters[name] for name in names])
        sums = np.zeros((len(names), len(requests)))
        is_greedy = np.ones((len(names), len(requests)), dtype=bool)
        pairs = [(slot, row) for slot in range(len(names)) for row in range(len(rows))]
        inputs, slots = [rows[row] for _, row in pairs], [slot for slot, _ in pairs]
        for part, batch in models.model.batches(inputs, slots) if rows else ():
            places = [
                (place, pairs[i][0], index) for place, i in enumerate(part) for index in asked_of_row[pairs[i][1]]
            ]
            losses, likeliest = _losses(models, batch, [(place, requests[index][1]) for place, _, index in places])
            for (_, slot, index), loss, greedy in zip(places, losses, likeliest, strict=True):
                sums[slot, index], is_greedy[slot, index] = -loss, greedy
        for slot, name in enumerate(names):
            found[name] = list(zip(sums[slot].tolist(), is_greedy[slot].tolist(), strict=True))
    return found


def continuations(
    models: RunModels, prompts: Sequence[np.ndarray], max_new_tokens: int, sampling: Sampling, stops: Sequence[str]
) -> dict[str, list[str]]:
    """Return, by model, how each prompt (int32 ids) goes on, before the first of `stops`.

    A prompt that leaves no room for `max_new_tokens` in the model's context loses its first tokens. Where these alone
    fill the context, half of it is for the prompt.
    """
    context = models.model.room(0)
    if max_new_tokens >= context:
        _log.warning("%d tokens asked for, the model's context has %d: half of it.", max_new_tokens, context)
        max_new_tokens = int(context // 2)
    longest = context - max_new_tokens
    _warn_of_cuts(sum(len(prompt) > longest for prompt in prompts), len(prompts))
    cut = [prompt[-int(longest) :] if len(prompt) > longest else prompt for prompt in prompts]
    found: dict[str, list[str]] = {}
    for names in _groups(models):
        stacked = [models.adapters[name] for name in names]
        asked = [(slot, prompt) for slot in range(len(names)) for prompt in cut]
        texts = dict(continue_prompts(models.model, stacked, asked, max_new_tokens, sampling, stops))
        for slot, name in enumerate(names):
            found[name] = [texts[slot * len(cut) + row] for row in range(len(cut))]
    return found


def _groups(models: RunModels) -> Iterator[list[str]]:
    return together(models.adapters, min(NUM_SLOTS, 2 * models.model.max_slots))


def _by_input(models: RunModels, requests: Sequence[Request]) -> dict[bytes, list[int]]:
    """Return what is fed to the base, int32 ids as bytes, and which requests it answers."""
    context = models.model.room(0)
    asked: dict[bytes, list[int]] = {}
    num_cut = 0
    for index, (before, after) in enumerate(requests):
        if len(after) > context:
            raise DataError(
                f"A continuation has {len(after)} tokens, the model's context {context}. Leave the task out."
            )
        fed = np.concatenate([before, after])[:-1]
        if len(fed) > context:
            fed, num_cut = fed[-int(context) :], num_cut + 1
        if len(after):  # the likelihood of nothing is 1
            asked.setdefault(fed.astype(np.int32).tobytes(), []).append(index)
    _warn_of_cuts(num_cut, len(requests))
    return asked


def _warn_of_cuts(num_cut: int, num_requests: int) -> None:
    if num_cut:
        _log.warning("%d of %d requests exceed the model's context and lose their beginning.", num_cut, num_requests)


@torch.inference_mode()
def _losses(models: RunModels, batch: Batch, asked: Sequence[tuple[int, np.ndarray]]) -> tuple[list[float], list[bool]]:
    """Return the loss (nats, summed) of each continuation that ends one token after a row of the batch, and whether it
    is the likeliest, token by token.
    """
    predicting, targets, owners = [], [], []
    for number, (place, after) in enumerate(asked):
        start, length = batch.rows[place]
        predicting.append(np.arange(start + length - len(after), start + length))
        targets.append(after)
        owners.append(np.full(len(after), number))
    device = models.model.device
    of_tokens = [
        torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device) for parts in (predicting, targets, owners)
    ]
    batch = replace(batch, **dict(zip(("predicting", "targets", "target_rows"), of_tokens, strict=True)))
    is_likeliest = torch.zeros(len(batch.targets), dtype=torch.bool, device=device)
    losses, owner = models.model.token_losses(batch, is_likeliest=is_likeliest)
    sums = torch.zeros(len(asked), dtype=torch.float64, device=device).index_add_(0, owner, losses.double())
    misses = torch.zeros(len(asked), dtype=torch.int64, device=device).index_add_(0, owner, (~is_likeliest).long())
    return sums.tolist(), (misses == 0).tolist()
