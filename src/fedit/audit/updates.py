"""What a server receives, made again: updates of the run's clients from its own adapter, in each setting.

Each setting is looked at in one step of plain gradient descent, which is what an attacker hopes for, and in the local
training that the recipe configures; of single clients, and of the sum of the cohort, which is all that secure
aggregation or a site that merges its clients shows. With central noise the server itself sees single updates as they
are; what is looked at is the noisy sum, of which the global adapter is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedit.audit.span import Embeddings, Recovered, recover
from fedit.audit.subject import Setting, Subject, simulation
from fedit.config import RunConfig
from fedit.interfaces import Adapter, ClientTask, ClientUpdate, EncodedExample, derive_rng
from fedit.privacy import Mechanism

MOST_CLIENTS = 8
"""Whose updates are looked at, one by one and as a sum"""


@dataclass(frozen=True)
class UpdateAudit:
    """What the tokens of one kind of update look like to who receives it; means over the clients where it is single."""

    setting: str
    steps: int
    """Local steps; 1: of plain gradient descent"""
    seen: str
    """``one update``, ``the sum`` of so many clients, or the ``noisy sum``"""
    num_updates: int
    first_round: bool
    """Whether it starts from the untrained adapter, where B is zero"""
    recovered: Recovered


def audit_updates(subject: Subject, chosen: Sequence[Setting]) -> list[UpdateAudit]:
    """Look for tokens in what clients send, in each setting; the untrained adapter only without noise."""
    embeddings = Embeddings(subject.model)
    audits = list[UpdateAudit]()
    for setting in chosen:
        for config in (_one_step(setting.config), setting.config):
            starts = [(subject.final, subject.rounds_done - 1)]
            if setting.config.privacy is None:
                starts.insert(0, (subject.initial, 0))
            for adapter, round_index in starts:
                if made := list(_sent(subject, config, adapter, round_index)):
                    first = adapter is subject.initial
                    audits += _look(subject, embeddings, setting, config, made, adapter, first=first)
    return audits


def _one_step(config: RunConfig) -> RunConfig:
    """Return the same with one step of plain gradient descent, which nothing but privacy clips."""
    client = config.client.model_copy(
        update={
            "local_steps": 1, "local_epochs": None, "optimizer": "sgd", "moments": "reset",
            "clip_norm": None, "weight_decay": 0.0, "schedule": "constant",
        }
    )  # fmt: skip
    return config.model_copy(update={"client": client})


def _sent(
    subject: Subject, config: RunConfig, adapter: Adapter, round_index: int
) -> Iterator[tuple[ClientUpdate, list[EncodedExample]]]:
    """Yield the updates of the first clients, with the rows that each was really trained on."""
    clients = {client: _Watched(rows) for client, rows in list(subject.data.clients.items())[:MOST_CLIENTS]}
    with simulation(config, subject.model, clients) as engine:
        for result in engine.run([ClientTask(client, round_index, adapter, round_index) for client in clients]):
            if isinstance(result, ClientUpdate) and clients[result.client].read:
                yield result, clients[result.client].read


class _Watched(Sequence[EncodedExample]):
    """Rows that remember which of them were taken."""

    def __init__(self, rows: Sequence[EncodedExample]) -> None:
        self._rows = rows
        self.read = list[EncodedExample]()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> EncodedExample:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.read.append(self._rows[index])
        return self._rows[index]


def _look(
    subject: Subject,
    embeddings: Embeddings,
    setting: Setting,
    config: RunConfig,
    sent: Sequence[tuple[ClientUpdate, list[EncodedExample]]],
    adapter: Adapter,
    *,
    first: bool,
) -> Iterator[UpdateAudit]:
    """Yield what single updates tell, and what their sum does; of central noise, what the noisy sum does."""
    rng = derive_rng(config.seed, "audit", "span")
    steps, public = config.client.num_steps(sent[0][0].num_examples), subject.data.test

    def audit(seen: str, num: int, found: Sequence[Recovered]) -> UpdateAudit:
        return UpdateAudit(setting.name, steps, seen, num, first, _mean(found))

    everybody = [row for _, rows in sent for row in rows]
    mechanism = Mechanism.of(setting.config, len(subject.data.clients))
    if mechanism is not None:  # noise in shares adds up to the server's
        mechanism = replace(mechanism, config=mechanism.config.model_copy(update={"mechanism": "central"}))
        shapes = {name: torch.zeros_like(tensor) for name, tensor in sent[0][0].update.tensors.items()}
        noise = derive_rng(config.seed, "audit", "sum").standard_normal
        mean, _ = mechanism.mean(adapter, shapes, (each for each, _ in sent), mechanism.config.clip_norm, noise)
        found = recover(embeddings.views(mean.update.tensors, adapter), everybody, public, rng)
        yield audit("the noisy sum", len(sent), [found])
        return
    if setting.config.secure_sums is None:
        each = [recover(embeddings.views(update.update.tensors, adapter), rows, public, rng) for update, rows in sent]
        yield audit("one update", 1, each)
    found = recover(embeddings.views(_sum([update for update, _ in sent]), adapter), everybody, public, rng)
    yield audit("the sum", len(sent), [found])


def _sum(updates: Sequence[ClientUpdate]) -> Mapping[str, Tensor]:
    names = updates[0].update.tensors
    return {name: torch.stack([each.update.tensors[name].double() for each in updates]).sum(dim=0) for name in names}


def _mean(found: Sequence[Recovered]) -> Recovered:
    def mean(name: str) -> float | None:
        values = [value for each in found if (value := getattr(each, name)) is not None]
        return float(np.mean(values)) if values else None

    return Recovered(
        round(mean("num_tokens") or 0),
        *((mean(name) or 0.0) for name in ("recall", "blind", "guessed")),
        *(mean(name) for name in ("unguessed_recall", "unguessed_blind")),
    )
