"""What a model memorises: canaries are put among the rows, the recipe is run, and its model is asked for them.

A canary is a row whose response is a secret of random digits, as its form and its instruction say. Its exposure
(1802.08232) is

    log2 |R| - log2 (its rank by loss among R secrets of the same form)

which is 1.4 bits on average of a secret that was never seen, and log2 |R| of one that is the model's first guess. One
client has canaries in 1, 4 and 16 copies; canaries that are in no row are the controls. Single canaries are spread over
the clients as well, each there or not by its own fair coin: how well their losses tell which are proves a lower bound
of epsilon of a row (2305.08846).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedit.audit.bounds import EmpiricalEpsilon, auc, empirical_epsilon
from fedit.audit.membership import Membership, Rows
from fedit.audit.subject import Setting, Subject, trained
from fedit.config import RunConfig
from fedit.data import encode_all
from fedit.evaluation.heldout import response_losses
from fedit.interfaces import Adapter, EncodedExample, Example, Turn, derive_rng
from fedit.model import StackedModel
from fedit.own_privacy import OwnPrivacy

COPIES = (0, 1, 4, 16)
NUM_EACH = 3
"""Canaries of each number of copies"""
NUM_SECRETS = 256
"""R"""
NUM_DIGITS = 6
NUM_COINS = 128
DELTA = 1e-6
"""Of the lower bound, and of the accountant's epsilon that it is compared with"""


@dataclass(frozen=True)
class CanaryAudit:
    """What a setting's final model gives away."""

    setting: str
    rounds: int
    exposure: Mapping[int, float]
    """Mean bits by the number of copies"""
    highest: float
    """The exposure of a canary that is the first guess"""
    coin_auc: float
    """How well single canaries that were there are told from those that were not"""
    empirical: EmpiricalEpsilon
    """Of a row"""
    epsilon: float | None
    """The accountant's for a row at the same delta; None: it promises nothing of a row"""
    membership: Membership
    """Of the clients' own rows"""

    @property
    def holds(self) -> bool:
        """Whether the accountant's epsilon is not exceeded."""
        return self.epsilon is None or self.empirical.epsilon <= self.epsilon


@dataclass(frozen=True, eq=False)
class _Planted:
    """The clients' rows with the canaries among them, and what is asked for."""

    clients: Mapping[str, Sequence[EncodedExample]]
    candidates: Sequence[Sequence[EncodedExample]]
    """Of each canary its own secret, then others; `NUM_EACH` canaries for each of `COPIES`"""
    coins: Sequence[EncodedExample]
    included: np.ndarray
    """bool [coins]"""


def audit_canaries(
    subject: Subject, chosen: Sequence[Setting], rounds: int, rows: Rows, step: Callable[[int], None]
) -> list[CanaryAudit]:
    """Run each setting for so many rounds with canaries among the rows, and ask its model for them."""
    planted = _plant(subject)
    audits = []
    for setting in chosen:
        config = setting.config.model_copy(update={"rounds": rounds})
        adapter = trained(config, subject.model, subject.initial, planted.clients, step)
        lost = np.subtract(*response_losses(subject.model, [None, adapter], planted.coins))
        audits.append(
            CanaryAudit(
                setting.name,
                rounds,
                _exposures(subject.model, adapter, planted.candidates),
                float(np.log2(NUM_SECRETS)),
                auc(lost[planted.included], lost[~planted.included]),
                empirical_epsilon([lost], planted.included, DELTA),
                row_epsilon(config, [len(each) for each in planted.clients.values()]),
                rows.judge(adapter),
            )
        )
    return audits


def row_epsilon(config: RunConfig, sizes: Sequence[int]) -> float | None:
    """Return the largest epsilon that the accountant has for a row of clients of these sizes, at `DELTA`."""
    own = [privacy for size in set(sizes) if (privacy := OwnPrivacy.of(config, size)) is not None]
    spent = [
        replace(each, delta=DELTA).spent(each.num_tunings) for each in own if each.mechanism in {"dp-sgd", "local"}
    ]
    return max(spent, default=None)


def _plant(subject: Subject) -> _Planted:
    """Put the canaries among the rows: those with copies at the first client, the others one after the other."""
    rng = derive_rng(subject.config.seed, "audit", "canaries")
    names = list(subject.data.clients)
    clients = {client: list(rows) for client, rows in subject.data.clients.items()}
    candidates = []
    for number, copies in enumerate(copies for copies in COPIES for _ in range(NUM_EACH)):
        secrets = [_example(f"locker {number}", rng) for _ in range(NUM_SECRETS)]
        candidates.append(_encoded(subject, secrets))
        clients[names[0]] += candidates[-1][:1] * copies
    coins = _encoded(subject, [_example(f"safe {number}", rng) for number in range(NUM_COINS)])
    included = rng.random(NUM_COINS) < 0.5
    for number in np.flatnonzero(included):
        clients[names[number % len(names)]].append(coins[number])
    return _Planted(clients, candidates, coins, included)


def _example(what: str, rng: np.random.Generator) -> Example:
    digits = " ".join(str(digit) for digit in rng.integers(0, 10, NUM_DIGITS))
    return Example((Turn(f"What is the code of {what}?", f"The code is {digits}."),), category="canary")


def _encoded(subject: Subject, examples: Sequence[Example]) -> list[EncodedExample]:
    return encode_all(examples, subject.config.data, subject.model.tokenizer)[0]


def _exposures(
    model: StackedModel, adapter: Adapter, candidates: Sequence[Sequence[EncodedExample]]
) -> Mapping[int, float]:
    """Return the mean exposure of the canaries of each number of copies, bits."""
    losses = response_losses(model, [adapter], [row for rows in candidates for row in rows])
    losses = losses.reshape(len(candidates), NUM_SECRETS)
    ranks = (losses[:, 1:] < losses[:, :1]).sum(axis=1) + 1
    bits = np.log2(NUM_SECRETS) - np.log2(ranks)
    return {copies: float(mean) for copies, mean in zip(COPIES, bits.reshape(-1, NUM_EACH).mean(axis=1), strict=True)}
