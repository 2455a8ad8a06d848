"""Secure aggregation: exact sums, drop-outs at every exchange, and what a party refuses to a server that lies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedit.config import RunConfig, load_plugins, parse_config
from fedit.config.privacy import threshold_of
from fedit.interfaces import Adapter, ClientUpdate, ConfigError, RoundError
from fedit.secure import collector as collector_module
from fedit.secure import shamir
from fedit.secure.collector import Collector
from fedit.secure.encoding import COUNTS, Encoding, PartySum, decode, discrete_gaussian, task_of
from fedit.secure.masks import add_masks
from fedit.secure.party import MistrustError, Party, Words, signed_keys

load_plugins()

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
NAMES = [f"site-{number}" for number in range(6)]
Tamper = Callable[[str, str, Words], Words]
"""Changes what the server asks (exchange, party, words)"""


def config(**tables: Any) -> RunConfig:
    tables = {
        "adapter": {"rank": 2, "alpha": 4},
        "aggregation": {"name": "fedit", "weighting": "uniform"},
        "secure_aggregation": {"clip_norm": 2.0},
        **tables,
    }
    return parse_config(tables)


def update(client: str, seed: int, scale: float = 0.1, examples: int = 3) -> ClientUpdate:
    rng = np.random.default_rng(seed)
    tensors = {A: rng.normal(size=(2, 50)), B: rng.normal(size=(30, 2))}
    adapter = Adapter({n: scale * torch.from_numpy(array.astype(np.float32)) for n, array in tensors.items()}, 2, 4.0)
    return ClientUpdate(client, adapter, examples, 100 + seed, 0.5 + seed, 2)


def party_sum(encoding: Encoding, *updates: ClientUpdate) -> PartySum:
    total = PartySum(encoding, {name: tensor.shape for name, tensor in updates[0].update.tensors.items()})
    for each in updates:
        total.add(each)
    return total


def parties(
    names: Sequence[str] = NAMES, least: int = 3, share: float = 2 / 3, runs: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Party]:
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    public = {name: key.public_key().public_bytes_raw().hex() for name, key in keys.items()}
    return {
        name: Party(name, key, lambda n, k: public.get(n) == k, share, least, runs.get(name, "run"))
        for name, key in keys.items()
    }


def run(
    members: Mapping[str, Party],
    sums: Mapping[str, PartySum],
    lost: Mapping[str, str] | None = None,
    tamper: Tamper = lambda exchange, party, words: words,
    share: float = 2 / 3,
    tasks: Mapping[str, str] = MappingProxyType({}),
    *,
    lies: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Do a round; `lost` says before which exchange a party is lost. A party that mistrusts is lost as well.

    A server that `lies` passes on what it knows to be signed by nobody.
    """
    order = ["keys", "shares", "mask", "confirm", "unmask"]
    gone = {name: order.index(exchange) for name, exchange in (lost or {}).items()}
    collector = Collector("5e55", list(members), share, len(next(iter(sums.values())).numbers), "run", "a task")
    why: list[str] = []

    def ask(requests: Mapping[str, Words]) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        for name, words in requests.items():
            exchange = words["exchange"]
            if order.index(exchange) >= gone.get(name, 9):
                continue
            words = tamper(exchange, name, copy.deepcopy(words))
            try:
                if exchange == "mask":
                    payload = members[name].masked(
                        words, sums[name], tasks.get(name, "a task"), np.random.default_rng(1).random
                    )
                    collector.add(name, payload)
                else:
                    answers[name] = members[name].answer(words)
                    assert members[name].answer(words) == answers[name], "asked again, it answers the same"
            except MistrustError as error:
                why.append(str(error))
        return answers

    checks = ("has_signed", "has_signed_keys") if lies else ()
    try:
        with ExitStack() as patches:
            for name in checks:
                patches.enter_context(patch.object(collector_module, name, lambda *_: True))
            ask(collector.shares(ask(collector.keys(ask(collector.begin())))))
            answers = ask(collector.unmask(ask(collector.confirm())))
            counts, numbers = collector.total(answers)
    except RoundError as error:
        error.add_note("; ".join(why))
        raise
    return counts, numbers, why


def six(encoding: Encoding) -> dict[str, PartySum]:
    return {name: party_sum(encoding, update(name, seed)) for seed, name in enumerate(NAMES)}


ENCODING = Encoding.of(config(), 6, 0.0)


# ------------------------------------------------------------------------------------------------------- exact sums


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 2**32), st.sampled_from(["uniform", "examples", "tokens"]), st.floats(0.01, 5))
def test_the_sum_of_integers_is_the_weighted_mean(count: int, seed: int, weighting: str, scale: float) -> None:
    """As if each were clipped, weighted and added up in float64, but for half a step for each client."""
    secure = {"clip_norm": 2.0, **({} if weighting == "uniform" else {"max_weight": 200})}
    encoding = Encoding.of(
        config(aggregation={"name": "fedit", "weighting": weighting}, secure_aggregation=secure), 6, 0
    )
    updates = [update(f"c{n}", (seed + n) % 1000, scale, 1 + n) for n in range(count)]
    sums = [party_sum(encoding, each) for each in updates]
    counts, numbers = sum(s.counts for s in sums), sum(s.numbers for s in sums)
    mean = decode(encoding, [u.client for u in updates], np.asarray(counts), np.asarray(numbers), updates[0].update)
    weights = np.array([encoding.weight_of(result) for result in updates])
    assert (
        list(weights)
        == {
            "uniform": [1] * count,
            "examples": [result.num_examples for result in updates],
            "tokens": [min(200, result.num_tokens) for result in updates],
        }[weighting]
    )
    for name in (A, B):
        clipped = [u.update.tensors[name].double() * min(1.0, 2.0 / norm(u)) for u in updates]
        expected = sum(w * t for w, t in zip(weights, clipped, strict=True)) / weights.sum()
        bound = encoding.step * encoding.max_weight * count / 2 / weights.sum()
        assert float((mean.update.tensors[name].double() - expected).abs().max()) <= bound * (1 + 1e-6) + 1e-6 * scale
    assert (mean.client, mean.others) == ("c0", tuple(u.client for u in updates[1:]))
    assert mean.num_tokens == sum(u.num_tokens for u in updates)
    assert mean.loss == pytest.approx(sum(u.loss * u.num_tokens for u in updates) / mean.num_tokens, abs=1e-5)


def norm(result: ClientUpdate) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in result.update.tensors.values()))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8, 12])
def test_no_cohort_leaves_the_range(count: int, sign: float) -> None:
    """Where all send one number of the whole clip norm, and more: it is all there."""
    tensors = {A: torch.zeros(2, 50), B: torch.zeros(30, 2)}
    tensors[A][0, 0] = sign * 1e30
    updates = [ClientUpdate(f"c{n}", Adapter(tensors, 2, 4.0), 1, 1, 0.0, 1) for n in range(count)]
    encoding = Encoding.of(config(), count, 0.0)
    sums = [party_sum(encoding, each) for each in updates]
    counts, numbers = np.asarray(sum(s.counts for s in sums)), np.asarray(sum(s.numbers for s in sums))
    mean = decode(encoding, [u.client for u in updates], counts, numbers, updates[0].update)
    assert float(mean.update.tensors[A][0, 0]) == pytest.approx(sign * 2.0)
    assert counts[COUNTS.index("clipped")] == count


def test_counts_that_no_clients_can_have_sent_are_refused() -> None:
    total = party_sum(ENCODING, update("c0", 0))
    for counts in ([2, 1, 0, 0, 0, 0], [1, 7, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]):
        with pytest.raises(RoundError, match="a party sent nonsense"):
            decode(ENCODING, ["c0"], np.array(counts, "<u8"), total.numbers, update("c0", 0).update)


@pytest.mark.parametrize("deviation", [0.4, 1.0, 7.3, 1e6])
def test_noise_is_discrete_gaussian(deviation: float) -> None:
    drawn = discrete_gaussian(deviation, 40_000, np.random.default_rng(5).random)
    edges = np.unique(np.floor(stats.norm.ppf(np.linspace(0.02, 0.98, 25)) * deviation)).astype(int)
    reach = int(12 * deviation) + 2
    if deviation < 100:
        values = np.arange(-reach, reach + 1)
        mass = np.exp(-(values**2) / (2 * deviation**2))
        cumulated = np.cumsum(mass) / mass.sum()
        at = np.array([cumulated[edge + reach] for edge in edges])
    else:
        at = stats.norm.cdf((edges + 0.5) / deviation)
    probabilities = np.diff(np.concatenate([[0], at, [1]]))
    observed = np.diff(np.concatenate([[0], np.searchsorted(np.sort(drawn), edges, side="right"), [len(drawn)]]))
    assert stats.chisquare(observed, probabilities * len(drawn)).pvalue > 1e-3


def test_shares_of_noise_add_up_to_what_is_promised_when_all_that_may_be_lost_are_lost() -> None:
    """Variance (z C)^2 at least, of the threshold of the parties; and with all of them n / t times as much."""
    run_config = config(
        privacy={"mechanism": "distributed", "noise_multiplier": 1.5, "clip_norm": 0.5},
        cohort={"sampling": "poisson", "fraction": 0.1},
        secure_aggregation={},
    )
    encoding = Encoding.of(run_config, 9, 1.5)
    rng = np.random.default_rng(0)

    def noisy(count: int) -> float:
        total = np.zeros(20_000, "<u4")
        for _ in range(count):
            one = PartySum(encoding, {A: torch.Size([20_000])})
            one.add_noise(threshold_of(2 / 3, 9), rng.random)
            total += one.numbers
        return float((total.view("<i4") * encoding.step).std())

    promised = 1.5 * 0.5
    assert noisy(threshold_of(2 / 3, 9) - 1) == pytest.approx(promised, rel=0.03), "what one of them sees"
    assert noisy(9) == pytest.approx(promised * math.sqrt(9 / 6), rel=0.03)
    assert run_config.secure_sums is not None
    assert max(count / (threshold_of(2 / 3, count) - 1) for count in range(3, 50)) == run_config.secure_sums.most_noise


def test_a_grid_too_coarse_for_the_noise_is_refused() -> None:
    """A server that claims a billion clients would let the noise vanish between two steps."""
    encoding = Encoding(1.0, 1, 1e-3, "uniform", 0.5, only_updates=True)
    with pytest.raises(ConfigError, match="the grid is too coarse"):
        PartySum(encoding, {A: torch.Size([3])}).add_noise(4, np.random.default_rng(0).random)


def test_with_noise_rounding_never_makes_an_update_longer() -> None:
    encoding = Encoding(0.5, 1, 0.013, "uniform", 1.0, only_updates=True)
    for seed in range(20):
        steps = party_sum(encoding, update("c", seed, 10.0)).numbers.view("<i4")
        assert np.sqrt((steps.astype(float) ** 2).sum()) * encoding.step <= 0.5 * (1 + 1e-12)


# --------------------------------------------------------------------------------------------------- secret sharing


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 7), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = shamir.split(secret, range(1, count + 1), threshold)
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert shamir.join({point: shares[point] for point in chosen}) == secret


def test_fewer_shares_are_any_secrets() -> None:
    """Two of three shares fit every secret: there is a third share for it."""
    shares = shamir.split(b"\1" * 32, [1, 2, 3], 3)
    other = int.from_bytes(b"\7" * 32)
    # The parabola through (0, other) and both shares: what it is at 3 is a share that would have given `other`.
    one, two = (int.from_bytes(shares[point]) for point in (1, 2))
    third = (other - 3 * one + 3 * two) % shamir.PRIME
    assert shamir.join({1: shares[1], 2: shares[2], 3: third.to_bytes(33)}) == b"\7" * 32
    firsts = {shamir.split(b"\1" * 32, [1, 2, 3], 3)[1] for _ in range(50)}
    assert len(firsts) == 50, "each share is drawn anew"


def test_a_mask_and_its_opposite_are_nothing() -> None:
    counts, numbers = np.arange(6, dtype="<u8"), np.arange(300_000, dtype="<u4")
    before = counts.copy(), numbers.copy()
    add_masks((counts, numbers), [b"k" * 32], [])
    changed = (numbers != before[1]).mean()
    assert changed > 0.999
    assert abs(np.corrcoef(numbers.astype(float), before[1].astype(float))[0, 1]) < 0.01
    add_masks((counts, numbers), [], [b"k" * 32])
    assert np.array_equal(counts, before[0])
    assert np.array_equal(numbers, before[1])


# ---------------------------------------------------------------------------------------------------- the protocol


def plain(sums: Mapping[str, PartySum]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(sum(s.counts for s in sums.values())), np.asarray(sum(s.numbers for s in sums.values()))


EXCHANGES = ["keys", "shares", "mask", "confirm", "unmask"]


@pytest.mark.parametrize("lost", [[], *[[e] for e in EXCHANGES]], ids=str)
def test_the_sum_is_that_of_whoever_masked_one(lost: Sequence[str]) -> None:
    """To the last bit, with one of six lost before any exchange."""
    sums = six(ENCODING)
    expected = six(ENCODING)
    gone = {NAMES[index]: exchange for index, exchange in enumerate(lost)}
    for name, exchange in gone.items():
        if EXCHANGES.index(exchange) <= 2:
            del expected[name]
    counts, numbers, _ = run(parties(), sums, gone)
    assert np.array_equal(counts, plain(expected)[0])
    assert np.array_equal(numbers, plain(expected)[1])


def test_parties_lost_at_several_exchanges() -> None:
    gone = {"site-0": "keys", "site-2": "mask", "site-5": "unmask"}
    names = [f"site-{number}" for number in range(10)]
    encoding = Encoding.of(config(), 10, 0.0)
    sums = {name: party_sum(encoding, update(name, seed)) for seed, name in enumerate(names)}
    expected = {n: party_sum(encoding, update(n, s)) for s, n in enumerate(names) if n not in ("site-0", "site-2")}
    _, numbers, _ = run(parties(names), sums, gone)
    assert np.array_equal(numbers, plain(expected)[1])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_below_the_threshold_there_is_no_sum(exchange: str) -> None:
    """Five of six are needed."""
    with pytest.raises(RoundError, match=r"of 4 of 6 parties, and needs 5\. The checkpoint"):
        run(parties(), six(ENCODING), {"site-1": exchange, "site-4": exchange})


def record(party: Party, payloads: list[bytes]) -> None:
    """Keep what a party sends as its masked sum."""
    masked = party.masked

    def keep(*arguments: Any) -> bytes:
        payloads.append(masked(*arguments))
        return payloads[-1]

    vars(party)["masked"] = keep


def test_what_leaves_a_party_says_nothing_of_its_sum() -> None:
    """Masked sums of zeros and of anything look the same: all bytes equally often, another time each."""
    seen = []
    for scale in (0.0, 0.1):
        sums = {name: party_sum(ENCODING, update(name, seed, scale)) for seed, name in enumerate(NAMES)}
        payloads: list[bytes] = []
        members = parties()
        record(members["site-0"], payloads)
        run(members, sums)
        seen.append(np.frombuffer(payloads[0], np.uint8))
    for payload in seen:
        counts = np.bincount(payload >> 4, minlength=16)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert (seen[0] != seen[1]).mean() > 0.9


# ------------------------------------------------------------------------------------------ a server that lies


def refused(tamper: Tamper, match: str, members: Mapping[str, Party] | None = None) -> None:
    """All, or those that are lied to, do not go on; too few are left."""
    with pytest.raises(RoundError) as caught:
        run(parties() if members is None else members, six(ENCODING), tamper=tamper, lies=True)
    assert match in " ".join(caught.value.__notes__)


def test_a_key_of_the_servers_own_making_is_found() -> None:
    """The server puts its own key in the place of site-1's, to read what the others share with it."""

    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "shares" and party != "site-1":
            words["keys"]["site-1"]["cipher"] = "11" * 32
        return words

    refused(tamper, "the keys of site-1 are not signed by it for this run")


def test_keys_signed_by_an_unknown_identity_are_found() -> None:
    """Also where the server makes up a whole party."""
    liar = Ed25519PrivateKey.generate()

    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "shares" and party != "site-1":
            keys = words["keys"]["site-1"]
            keys |= {"cipher": "22" * 32, "mask": "33" * 32, "identity": liar.public_key().public_bytes_raw().hex()}
            keys["signature"] = liar.sign(signed_keys("run", "5e55", "site-1", keys)).hex()
        return words

    refused(tamper, "does not know site-1 by the identity")


def test_its_own_keys_cannot_be_changed() -> None:
    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "shares":
            words["keys"][party]["mask"] = "44" * 32
        return words

    refused(tamper, "own keys are not among those")


def test_an_old_key_in_two_places_is_found() -> None:
    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "shares" and party == "site-0":
            words["keys"]["site-2"]["mask"] = words["keys"]["site-1"]["mask"]
        return words

    with pytest.raises(RoundError) as caught:
        run(parties(share=0.99), six(ENCODING), tamper=tamper, share=0.99)
    assert "two parties have the same key" in " ".join(caught.value.__notes__)


def test_too_few_parties_are_refused() -> None:
    refused(lambda exchange, party, words: words, "takes part with 7 parties or more, not 6", parties(least=7))


def test_shares_that_were_changed_are_found() -> None:
    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "mask" and party in NAMES[:2]:
            words["shares"]["site-3"] = words["shares"]["site-4"]
        return words

    refused(tamper, "the shares of site-3 were changed on the way")


def test_different_survivors_for_different_parties_are_found() -> None:
    """The attack that would unmask one update: some are told that site-5 was lost, and give its key."""

    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "confirm" and party in NAMES[:3]:
            words["survivors"] = NAMES[:5]
        return words

    refused(tamper, "has confirmed another sum")


def test_a_server_that_sends_two_models_learns_nothing() -> None:
    """The attack that would find site-0's update in the sum: the others tune a model that learns nothing.

    It shows the others no signature of site-0's, so that they unmask. But masks cancel for one task alone, of which the
    number of clients is a part: a grid that is coarser for the others is another task, too.
    """
    sums = {name: party_sum(ENCODING, update(name, 0, 0.1 * (name == "site-0"))) for name in NAMES}
    alone = sums["site-0"].numbers.copy()

    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "unmask":
            words["signatures"].pop("site-0", None)
        return words

    tasks = dict.fromkeys(NAMES[1:], "a dead model")
    _, numbers, why = run(parties(), sums, tamper=tamper, tasks=tasks, lies=True)
    assert len(why) == 1, "site-0 alone sees that it was asked for something else"
    assert (numbers == alone).mean() < 0.01


def test_a_party_that_was_sent_another_model_is_found() -> None:
    with pytest.raises(RoundError) as caught:
        run(parties(), six(ENCODING), tasks=dict.fromkeys(NAMES[1:], "a dead model"), lies=True)
    assert "or was asked for something else" in " ".join(caught.value.__notes__)


@pytest.mark.parametrize("clients", [-5, 0, 10**11])
def test_a_number_of_clients_that_cannot_be_is_another_task_or_refused(clients: int) -> None:
    assert task_of("run", 0, 6, 6, "adapter") != task_of("run", 0, clients, 6, "adapter")
    with pytest.raises(ConfigError, match="the grid is too coarse"):
        Encoding(1.0, 1, 2 * (clients or -1) / 2**32, "uniform", 0.5, only_updates=True).noise_deviation(4)


def test_a_party_that_was_told_of_another_run_is_found() -> None:
    """The same by another learning rate, or clip norm, for the others."""
    refused(lambda exchange, party, words: words, "not signed by it for this run", parties(runs={"site-0": "other"}))


def test_a_sum_of_few_is_not_confirmed() -> None:
    def tamper(exchange: str, party: str, words: Words) -> Words:
        if exchange == "confirm":
            words["survivors"] = sorted({party, *NAMES[:3]})
        return words

    refused(tamper, "5 are needed")


def test_what_was_not_confirmed_is_not_unmasked() -> None:
    refused(
        lambda exchange, party, words: {**words, "signatures": {}} if exchange == "unmask" else words,
        "0 parties confirm the sum, 5 are needed",
    )


def test_a_party_confirms_one_sum_and_masks_one() -> None:
    members, sums = parties(), six(ENCODING)
    request: dict[str, Words] = {}

    def listen(exchange: str, party: str, words: Words) -> Words:
        if party == "site-0":
            request[exchange] = words
        return words

    run(members, sums, tamper=listen)
    one = members["site-0"]
    with pytest.raises(MistrustError, match="has confirmed another sum"):
        one.answer({**request["confirm"], "survivors": NAMES[:5]})
    with pytest.raises(MistrustError, match="masks one sum in a round"):
        one.masked(request["mask"], six(ENCODING)["site-0"], "a task", np.random.default_rng(0).random)
    with pytest.raises(MistrustError, match="was shown other keys than before"):
        one.answer({**request["shares"], "keys": {}})
    with pytest.raises(MistrustError, match="has no keys of this round"):
        one.answer({**request["confirm"], "session": "another"})
    answered = one.answer(request["unmask"])
    assert set(answered["seeds"]) == set(NAMES)
    assert answered["privates"] == {}, "of nobody both secrets are told"


def test_words_that_cannot_be_read_are_refused() -> None:
    members = parties()
    members["site-0"].answer({"exchange": "keys", "session": "5e55"})
    for words in ({"exchange": "shares"}, {"exchange": "shares", "keys": 3}, {"exchange": "what"}):
        with pytest.raises(MistrustError):
            members["site-0"].answer({"session": "5e55", **words})


def lie(party: Party, exchange: str, change: Callable[[Words], Any]) -> None:
    """Let a party change what it answers to an exchange."""
    answer = party.answer
    vars(party)["answer"] = lambda words: change(answer(words)) if words["exchange"] == exchange else answer(words)


def another_share(told: Words) -> Words:
    return {**told, "seeds": {**told["seeds"], "site-4": "00" * 33}}


def test_wrong_shares_of_one_party_are_left_out() -> None:
    """A party that lies about its shares does not spoil the sum, as long as enough others are there."""
    members = parties()
    lie(members["site-2"], "unmask", another_share)
    _, numbers, _ = run(members, six(ENCODING))
    assert np.array_equal(numbers, plain(six(ENCODING))[1])


def test_wrong_shares_of_a_party_that_is_needed_end_the_round() -> None:
    members = parties()
    lie(members["site-2"], "unmask", another_share)
    with pytest.raises(RoundError, match="the shares of a secret of site-4 do not fit"):
        run(members, six(ENCODING), {"site-5": "unmask"})


NONSENSE: list[Any] = [
    7, None, [], {}, {"shares": 3}, {"signature": 5}, {"seeds": {}, "privates": {}}, {"shares": {"site-1": "zz"}},
    dict.fromkeys(("cipher", "mask", "seed", "identity", "signature"), "00"),
    {"cipher": "00" * 32, "mask": "00" * 32, "seed": "", "identity": "11" * 32, "signature": "22" * 64},
]  # fmt: skip


@pytest.mark.parametrize("exchange", ["keys", "shares", "confirm", "unmask"])
@pytest.mark.parametrize("nonsense", NONSENSE, ids=str)
def test_a_party_that_answers_nonsense_is_lost_and_nobody_else(exchange: str, nonsense: Any) -> None:
    members = parties()
    lie(members["site-2"], exchange, lambda told: nonsense)
    _, numbers, _ = run(members, six(ENCODING))
    expected = six(ENCODING)
    if exchange in ("keys", "shares"):
        del expected["site-2"]
    assert np.array_equal(numbers, plain(expected)[1])


def test_a_masked_sum_of_the_wrong_length_or_twice_is_not_taken() -> None:
    collector = Collector("5e55", NAMES, 2 / 3, 160, "run", "a task")
    members = parties()
    keys = collector.keys(
        {name: party.answer({"exchange": "keys", "session": "5e55"}) for name, party in members.items()}
    )
    requests = collector.shares({name: members[name].answer(words) for name, words in keys.items()})
    payload = members["site-0"].masked(
        requests["site-0"], six(ENCODING)["site-0"], "a task", np.random.default_rng(0).random
    )
    assert not collector.add("site-0", payload[:-1])
    assert not collector.add("stranger", payload)
    assert collector.add("site-0", payload)
    assert not collector.add("site-0", payload)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ({"secure_aggregation": {}}, "clip_norm is missing"),
        ({"aggregation": {"name": "fedit", "weighting": "examples"}}, "max_weight is missing"),
        ({"aggregation": "median"}, "'median' needs each of them"),
        ({"aggregation": "krum"}, "'krum' needs each of them"),
        ({"aggregation": "flora"}, "'flora' needs each of them"),
        ({"aggregation": "norm-clipping"}, "'norm-clipping' needs each of them"),
        ({"aggregation": {"name": "fedit", "weighting": "fednova"}}, "weighting = 'fednova' needs each of them"),
        ({"upload": {"mask": "top-k", "density": 0.1}}, "needs each of them"),
        ({"upload": {"quantizer": "int8"}}, "needs each of them"),
        ({"adapter": {"rank": [1, 2]}, "aggregation": {"name": "hetlora"}}, "needs each of them"),
        ({"cohort": {"sampling": "weighted", "size": 3}}, "the server is not told who has how many rows"),
        ({"engine": {"merge_clients": True}}, "a site's clients are added up anyway"),
        (
            {"privacy": {"noise_multiplier": 1.0}, "cohort": {"sampling": "poisson", "fraction": 0.5}},
            'Use mechanism = "distributed"',
        ),
        (
            {
                "privacy": {"mechanism": "distributed", "noise_multiplier": 1.0},
                "cohort": {"sampling": "poisson", "fraction": 0.5},
            },
            r"clip_norm: \[privacy\] has one",
        ),
        (
            {"privacy": {"mechanism": "distributed", "noise_multiplier": 1.0}, "secure_aggregation": "none"},
            'Use sampling = "poisson"',
        ),
    ],
)
def test_what_does_not_go_with_sums_is_refused(tables: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config(**tables)


def test_noise_in_shares_means_secure_sums() -> None:
    made = config(
        privacy={"mechanism": "distributed", "noise_multiplier": 1.0},
        cohort={"sampling": "poisson", "fraction": 0.5},
        secure_aggregation="none",
    )
    assert made.secure_sums is not None
    assert made.secure_sums.clip_norm_of(made) == 1.0
