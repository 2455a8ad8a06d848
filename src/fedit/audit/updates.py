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

from fedit.adapter import CORE
from fedit.audit.span import Embeddings, Recovered, recover
from fedit.audit.subject import Setting, Subject, noted, simulation
from fedit.config import RunConfig
from fedit.interfaces import FACTORS, Adapter, ClientTask, ClientUpdate, EncodedExample, EngineError, derive_rng
from fedit.privacy import Mechanism

MOST_CLIENTS = 8
"""Whose updates are looked at, one by one and as a sum"""


@dataclass(frozen=True)
class UpdateAudit:
    """What the tokens of one kind of update look like to who receives it; means over the clients where it is single."""

    setting: str
    plain: bool
    """Whether it is one step of plain gradient descent, and not the local training of the recipe"""
    steps: int
    """Local steps"""
    seen: str
    """``one update``, ``the sum`` of so many clients, or the ``noisy sum``"""
    num_updates: int
    first_round: bool
    """Whether it starts from the untrained adapter, where B is zero"""
    recovered: Recovered


def audit_updates(subject: Subject, chosen: Sequence[Setting], refused: dict[str, str]) -> list[UpdateAudit]:
    """Look for tokens in what clients send, in each setting; the untrained adapter only without noise. What cannot be
    looked at goes into `refused`, with the reason.

    Raises:
        EngineError: nothing can: no layer, or nothing that is sent, has a span.
    """
    rule = subject.config.aggregation
    shared = {factor for round_index in (0, 1) for factor in rule.shared(round_index)}
    if not shared & {*FACTORS, CORE}:
        raise EngineError(f"[aggregation] name = {rule.name!r} shares no matrices, so there is no span to check.")
    embeddings = Embeddings(subject.model)
    if not subject.has_one_model:
        refused["tokens of the last round's updates"] = (
            f"[aggregation] name = {rule.name!r} leaves each client factors of its own, without which its updates "
            "cannot be made again. Those of the first round are looked at."
        )
    audits = list[UpdateAudit]()
    for setting in chosen:
        for config, plain in ((_one_step(setting.config), True), (setting.config, False)):
            for adapter, round_index in _starts(subject, setting):
                first = adapter is subject.initial
                what = f"{'one step' if plain else 'updates'} of the {'first' if first else 'last'} round"
                with noted(refused, f"{setting.label}, tokens of {what}"):
                    if made := list(_sent(subject, config, adapter, round_index)):
                        for seen, num, found in _look(subject, embeddings, setting, made, adapter):
                            steps = config.client.num_steps(made[0][0].num_examples)
                            audits.append(UpdateAudit(setting.name, plain, steps, seen, num, first, _mean(found)))
    return audits


def _starts(subject: Subject, setting: Setting) -> list[tuple[Adapter, int]]:
    """Return from which adapters updates are made, and in which rounds."""
    starts = [(subject.final, subject.rounds_done - 1)] if subject.has_one_model else []
    if setting.config.privacy is None or not starts:
        starts.insert(0, (subject.initial, 0))
    return starts


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
    clients = {client: _Watched(rows) for client, rows in subject.data.clients.items()}
    tasks = [ClientTask(client, round_index, adapter, 0) for client in list(clients)[:MOST_CLIENTS]]
    with simulation(config, subject.model, clients) as engine:
        for result in engine.run(tasks):
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
    sent: Sequence[tuple[ClientUpdate, list[EncodedExample]]],
    adapter: Adapter,
) -> Iterator[tuple[str, int, list[Recovered]]]:
    """Yield what single updates tell, and what their sum does; of central noise, what the noisy sum does: as what it is
    seen, of how many, and what is found.

    Raises:
        EngineError: they are all zero in the layers that are looked at, or cannot be added up.
    """
    rng = derive_rng(setting.config.seed, "audit", "span")

    def found(update: Mapping[str, Tensor], rank: int, rows: Sequence[EncodedExample]) -> Recovered:
        views = embeddings.views(update, adapter.cut(rank))
        if not any(part.any() for _, part in views):
            raise EngineError(
                "what is sent is zero in the first layers: from the untrained adapter, whose B is zero, A gets no "
                "gradient."
            )
        return recover(views, rows, subject.data.test, rng)

    updates, everybody = [update for update, _ in sent], [row for _, rows in sent for row in rows]
    rank = updates[0].update.rank
    mechanism = Mechanism.of(setting.config, len(subject.data.clients))
    if mechanism is None and setting.config.secure_sums is None:
        yield "one update", 1, [found(each.update.tensors, each.update.rank, rows) for each, rows in sent]
    if any(each.update.rank != rank for each in updates):
        raise EngineError("clients gave up different numbers of components: factors of several ranks have no sum.")
    if mechanism is None:
        yield "the sum", len(sent), [found(_sum(updates), rank, everybody)]
        return
    # Noise in shares adds up to the server's; what makes up for lost parties' it adds itself, and sees the sum without.
    privacy = mechanism.config.model_copy(update={"mechanism": "central"})
    mechanism = replace(mechanism, config=privacy, variance=1.0)
    shapes = {name: torch.zeros_like(tensor) for name, tensor in updates[0].update.tensors.items()}
    noise = derive_rng(setting.config.seed, "audit", "sum").standard_normal
    mean, _ = mechanism.mean(adapter, shapes, iter(updates), privacy.clip_norm, noise)
    yield "the noisy sum", len(sent), [found(mean.update.tensors, rank, everybody)]


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
