"""What a model memorises: canaries are put among the rows, the recipe is run, and what it sends is asked for them.

A canary is a row whose instruction and response are random words of the held-out rows (a base that never read digits
could not learn a number by heart). Its exposure (1802.08232) is

    log2 |R| - log2 (its rank by loss among R responses made the same way)

which is 1.4 bits on average of a secret that was never seen, and log2 |R| of one that is the model's first guess. Two
clients join: one has canaries in 1, 4 and 16 copies (others, in no row, are the controls); the other has single ones,
each there or not by its own fair coin: how well their losses tell which are proves a lower bound of epsilon of a row
(2305.08846).

The final model is asked by its loss. The server knows more: of each update, by how much it lowers a canary's loss,
which for the coins is added up over the rounds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedit.audit.bounds import EmpiricalEpsilon, auc, calibrated, empirical_epsilon
from fedit.audit.mechanism import CONFIDENCE
from fedit.audit.membership import Membership, Rows
from fedit.audit.subject import Setting, Subject, drawn, trained
from fedit.config import RunConfig
from fedit.data import encode_all
from fedit.evaluation.heldout import NUM_SLOTS, response_losses
from fedit.interfaces import Adapter, DataError, EncodedExample, Example, Turn, derive_rng
from fedit.model import StackedModel
from fedit.own_privacy import OwnPrivacy

COPIES = (0, 1, 4, 16)
NUM_EACH = 4
"""Canaries of each number of copies"""
COPIED, TOSSED = "\x1fcopied canaries", "\x1ftossed canaries"
"""The clients that hold them"""
NUM_SECRETS = 128
"""R"""
NUM_WORDS = 5
"""Of an instruction, and of a response"""
MOST_WORDS = 500
"""That they are drawn of, the most frequent ones"""
MOST_LETTERS = 12
"""Of a word: where nothing stands between words, a sentence is one."""
NUM_COINS = 128
DELTA = 1e-6
"""Of the lower bound, and of the accountant's epsilon that it is compared with"""


@dataclass(frozen=True)
class CanaryAudit:
    """What a setting gives away."""

    setting: str
    rounds: int
    took_part: Mapping[str, int]
    """In how many of them the clients of the ``copied`` and the ``tossed`` canaries were"""
    highest: float
    """The exposure of a canary that is the first guess"""
    exposure: Mapping[int, float] | None
    """Of the final model: mean bits by the number of copies; None: their client never took part."""
    update_exposure: Mapping[int, float] | None
    """Of the last update; None: nobody has it, or with central noise the trusted server alone"""
    coin_auc: float | None
    """Of the final model: how well single canaries that were there are told from those that were not"""
    update_coin_auc: float | None
    """Of all updates"""
    empirical: EmpiricalEpsilon
    """Of a row"""
    sure_epsilon: float
    """The same with `CONFIDENCE`"""
    epsilon: float | None
    """The accountant's for a row at the same delta; None: it promises nothing of a row"""
    membership: Membership
    """Of the clients' own rows"""

    @property
    def holds(self) -> bool:
        """Whether the accountant's epsilon is not exceeded."""
        return self.epsilon is None or self.sure_epsilon <= self.epsilon


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
    subject: Subject, chosen: Sequence[Setting], rounds: int, rows: Callable[[frozenset[str]], Rows]
) -> list[CanaryAudit]:
    """Run each setting for so many rounds with canaries among the rows, and ask its model for them; `rows` are members
    of some clients, and others.

    Raises:
        DataError: canaries cannot be made of the held-out rows, or no client took part.
    """
    planted = _plant(subject)
    sizes = [len(each) for each in planted.clients.values()]
    return [_ask(subject, setting, rounds, rows, planted, row_epsilon(setting.config, rounds, sizes))
            for setting in chosen]  # fmt: skip


def _ask(
    subject: Subject,
    setting: Setting,
    rounds: int,
    rows: Callable[[frozenset[str]], Rows],
    planted: _Planted,
    epsilon: float | None,
) -> CanaryAudit:
    cohort = setting.config.cohort.model_copy(update={"min_updates": 1})
    model, config = subject.model, setting.config.model_copy(update={"rounds": rounds, "cohort": cohort})
    sent: dict[str, list[tuple[Adapter, Adapter]]] = {COPIED: [], TOSSED: []}
    adapter = trained(config, model, subject.initial, planted.clients, sent)
    lengths = np.asarray([coin.num_supervised for coin in planted.coins])
    base, tuned = _losses(model, [None, adapter], planted.coins)
    lowered = {"model": calibrated(base - tuned, base, lengths)}
    update_exposure = None
    if config.secure_sums is None and (config.privacy is None or config.privacy.at_clients):
        stages = [stage for pair in sent[TOSSED] for stage in pair]
        losses = _losses(model, stages, planted.coins).reshape(-1, 2, NUM_COINS)
        steps = [calibrated(before - after, before, lengths) for before, after in losses]
        lowered["updates"] = np.sum([np.zeros(NUM_COINS), *steps], axis=0)
        if sent[COPIED]:
            before, after = (_candidate_losses(model, stage, planted) for stage in sent[COPIED][-1])
            update_exposure = _exposures(after - before)
    aucs = {}
    if sent[TOSSED]:
        aucs = {who: auc(each[planted.included], each[~planted.included]) for who, each in lowered.items()}
    sizes = {client: len(each) for client, each in planted.clients.items()}
    scores = list(lowered.values())
    return CanaryAudit(
        setting.name,
        rounds,
        {"copied": len(sent[COPIED]), "tossed": len(sent[TOSSED])},
        float(np.log2(NUM_SECRETS)),
        _exposures(_candidate_losses(model, adapter, planted)) if sent[COPIED] else None,
        update_exposure,
        aucs.get("model"),
        aucs.get("updates"),
        empirical_epsilon(scores, planted.included, DELTA),
        empirical_epsilon(scores, planted.included, DELTA, CONFIDENCE).epsilon,
        epsilon,
        rows(drawn(config, sizes, rounds) - {COPIED, TOSSED}).judge(adapter),
    )


def row_epsilon(config: RunConfig, rounds: int, sizes: Sequence[int]) -> float | None:
    """Return the largest epsilon that the accountant has for a row of clients of these sizes, at `DELTA`."""
    config = config.model_copy(update={"rounds": rounds})
    own = [privacy for size in set(sizes) if (privacy := OwnPrivacy.of(config, size)) is not None]
    return max((replace(each, delta=DELTA).spent(each.num_tunings) for each in own), default=None)


def _plant(subject: Subject) -> _Planted:
    """Return the clients with two more: one that has canaries in copies, and one with those that the coins chose."""
    rng = derive_rng(subject.config.seed, "audit", "canaries")
    words = _words(subject.data.test)
    candidates, copied = [], list[EncodedExample]()
    for copies in (copies for copies in COPIES for _ in range(NUM_EACH)):
        asked = _phrase(words, rng)
        secrets = [_canary(asked, _phrase(words, rng)) for _ in range(NUM_SECRETS)]
        candidates.append(_encoded(subject, secrets))
        copied += candidates[-1][:1] * copies
    coins = _encoded(subject, [_canary(_phrase(words, rng), _phrase(words, rng)) for _ in range(NUM_COINS)])
    included = rng.random(NUM_COINS) < 0.5
    chosen = [coin for coin, there in zip(coins, included, strict=True) if there]
    return _Planted({**subject.data.clients, COPIED: copied, TOSSED: chosen}, candidates, coins, included)


def _words(rows: Sequence[EncodedExample]) -> list[str]:
    """Return the most frequent words of the rows' turns."""
    texts = (text for row in rows for turn in row.example.turns for text in (turn.instruction, turn.response))
    counts = Counter(word[:MOST_LETTERS] for text in texts for word in re.findall(r"\w+", text))
    if not counts:
        raise DataError("canaries are random words of the held-out rows, and these have none.")
    return [word for word, _ in counts.most_common(MOST_WORDS)]


def _phrase(words: Sequence[str], rng: np.random.Generator) -> str:
    return " ".join(words[int(index)] for index in rng.integers(0, len(words), NUM_WORDS))


def _canary(asked: str, secret: str) -> Example:
    return Example((Turn(asked, secret),), category="canary")


def _encoded(subject: Subject, examples: Sequence[Example]) -> list[EncodedExample]:
    encoded, report = encode_all(examples, subject.config.data, subject.model.tokenizer)
    if len(encoded) < len(examples):
        raise DataError(
            f"of {len(examples)} canaries, random words of held-out rows, {report.too_long} are too long for [data] "
            f"max_length = {subject.config.data.max_length}, and {report.all_masked} have a response without tokens."
        )
    return encoded


def _losses(model: StackedModel, adapters: Sequence[Adapter | None], rows: Sequence[EncodedExample]) -> np.ndarray:
    """Return the loss of every row under every adapter, [adapters, rows], so many of them at a time."""
    size = 1 if any(adapter is not None and adapter.side for adapter in adapters) else NUM_SLOTS  # sides share no pass
    parts = [response_losses(model, adapters[i : i + size], rows) for i in range(0, len(adapters), size)]
    return np.concatenate([np.zeros((0, len(rows))), *parts])


def _candidate_losses(model: StackedModel, adapter: Adapter, planted: _Planted) -> np.ndarray:
    """Return the losses of all secrets, [canaries, secrets]."""
    rows = [row for secrets in planted.candidates for row in secrets]
    return response_losses(model, [adapter], rows)[0].reshape(len(planted.candidates), NUM_SECRETS)


def _exposures(losses: np.ndarray) -> Mapping[int, float]:
    """Return the mean exposure of the canaries of each number of copies, bits, by losses [canaries, secrets]."""
    ranks = (losses[:, 1:] < losses[:, :1]).sum(axis=1) + 1
    bits = np.log2(NUM_SECRETS) - np.log2(ranks)
    return {copies: float(mean) for copies, mean in zip(COPIES, bits.reshape(-1, NUM_EACH).mean(axis=1), strict=True)}
