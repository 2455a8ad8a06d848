"""Secure aggregation over any engine: the rounds are given the sum of a cohort's updates, as one update for all.

It needs of an engine what `Parties` says: that messages of a protocol reach each party, and that a party masks what its
clients send. `SimulatedParties` does so in one process, with all the cryptography; `fedit.engines.remote` at sites.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedit.config import RunConfig
from fedit.engines.messages import fingerprint
from fedit.engines.simulation import Simulation
from fedit.interfaces import ClientFailure, ClientTask, ClientUpdate, Engine, RoundError, derive_seed
from fedit.privacy import Draws, Mechanism
from fedit.secure.collector import Collector
from fedit.secure.encoding import Encoding, MaskedSum, PartySum, decode, task_of
from fedit.secure.party import MistrustError, Party, Words
from fedit.server import unusable

log = logging.getLogger(__name__)


class Parties(Protocol):
    """Clients that belong to parties which take part in secure aggregation."""

    def clients(self) -> Mapping[str, int]:
        """Every registered client, as an `Engine` has them."""
        ...

    def parties(self, tasks: Sequence[ClientTask]) -> Mapping[str, Sequence[ClientTask]]:
        """Return the tasks of each party."""
        ...

    def exchange(self, requests: Mapping[str, Words]) -> Mapping[str, Words | ClientFailure]:
        """Return the parties' answers, or why they do not answer."""
        ...

    def run_masked(
        self, tasks: Sequence[ClientTask], requests: Mapping[str, Words]
    ) -> Iterator[MaskedSum | ClientFailure]:
        """Yield a masked sum of each party's clients' updates, and why those fail that are in none."""
        ...


class SecureAggregation:
    """An `Engine` that shows nobody more of a cohort than its sum."""

    def __init__(self, config: RunConfig, engine: Parties) -> None:
        settings = config.secure_sums
        assert settings is not None
        self._config = config
        self._settings = settings
        self._engine = engine
        self._num_bytes = 0
        """That came from the parties in this round"""
        self._lost: dict[str, str] = {}
        """Why parties were lost to this round"""

    def clients(self) -> Mapping[str, int]:
        return self._engine.clients()

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the failures, and then one update that is the mean of all others.

        Raises:
            RoundError: too few parties were left.
        """
        self._num_bytes, self._lost = 0, {}
        try:
            yield from self._run(tasks, self._engine.parties(tasks))
        except RoundError as error:
            why = "".join(f" {party}: {reason}." for party, reason in self._lost.items())
            raise RoundError(f"Round {tasks[0].round_index + 1}: {error}{why}") from error

    def _run(
        self, tasks: Sequence[ClientTask], parties: Mapping[str, Sequence[ClientTask]]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        if len(parties) < self._settings.min_parties:
            yield from self._too_few(tasks, len(parties))
            return
        run = self._config.fingerprint()
        shared = tasks[0].adapter.only(self._config.aggregation.shared(tasks[0].round_index))
        about = {"clients": len(tasks), "registered": len(self.clients())}
        collector = Collector(
            secrets.token_hex(16),
            list(parties),
            self._settings.threshold,
            sum(tensor.numel() for tensor in shared.values()),
            run,
            task_of(run, tasks[0].round_index, about["clients"], about["registered"], fingerprint(tasks[0].adapter)),
        )
        requests = collector.shares(self._ask(collector.keys(self._ask(collector.begin()))))
        requests = {party: words | about for party, words in requests.items()}
        asked = []
        for task in tasks:
            party = next(name for name, its_tasks in parties.items() if task in its_tasks)
            if party in requests:
                asked.append(task)
            else:
                yield ClientFailure(task.client, self._lost.get(party, "its keys or shares are none"))
        sums = list[MaskedSum]()
        for result in self._engine.run_masked(asked, requests):
            if isinstance(result, ClientFailure):
                yield result
            elif collector.add(result.party, result.payload):
                self._num_bytes += len(result.payload)
                sums.append(replace(result, payload=b""))
            else:
                yield from (ClientFailure(client, "its masked sum does not fit") for client in result.clients)
        counts, numbers = collector.total(self._ask(collector.unmask(self._ask(collector.confirm()))))
        summed = {client for total in sums for client in total.clients}
        clients = [task.client for task in tasks if task.client in summed]
        mean = decode(encoding_of(self._config, about), clients, counts, numbers, tasks[0].adapter.with_tensors(shared))
        yield replace(_as_known(mean, sums), num_bytes=self._num_bytes, noise_shares=collector.noise_shares)

    def _too_few(self, tasks: Sequence[ClientTask], num_parties: int) -> Iterator[ClientFailure]:
        """Let a round go without its few clients, where nothing is told of it; otherwise it is the end.

        With noise on the sums the round is the noise alone: whom the cohorts are of has nothing to do with anybody's
        rows.
        """
        least = self._settings.min_parties
        reason = f"a secure sum of {num_parties} parties, where [secure_aggregation] min_parties = {least}"
        if self._config.privacy is None or self._config.privacy.at_clients:
            raise RoundError(f"{reason}. Sample more clients. The checkpoint is intact.")
        for task in tasks:
            yield ClientFailure(task.client, reason)

    def _ask(self, requests: Mapping[str, Words]) -> Mapping[str, Words]:
        answers: dict[str, Words] = {}
        for party, answer in self._engine.exchange(requests).items():
            if isinstance(answer, ClientFailure):
                self._lost[party] = answer.reason
            else:
                answers[party] = answer
                self._num_bytes += len(json.dumps(answer))
        return answers


def _as_known(mean: ClientUpdate, sums: Sequence[MaskedSum]) -> ClientUpdate:
    """Return the mean with what is known of the clients without being told."""
    num_tokens = sum(total.num_tokens for total in sums)
    epsilon = max((total.epsilon for total in sums if total.epsilon is not None), default=None)
    if not num_tokens:
        return replace(mean, epsilon=epsilon)
    loss = sum(total.loss_sum for total in sums) / num_tokens
    return replace(mean, epsilon=epsilon, num_tokens=num_tokens, loss=loss)


def encoding_of(config: RunConfig, about: Mapping[str, Any]) -> Encoding:
    """Return how clients write their updates in a round, `about` which a request says how many clients it has."""
    mechanism = Mechanism.of(config, int(about["registered"]))
    return Encoding.of(config, int(about["clients"]), 0.0 if mechanism is None else mechanism.noise_multiplier)


def masked_sum(
    config: RunConfig,
    party: Party,
    request: Words,
    tasks: Sequence[ClientTask],
    results: Iterable[ClientUpdate | ClientFailure],
    draws: Draws,
    *,
    tells_losses: bool = True,
) -> Iterator[MaskedSum | ClientFailure]:
    """Yield why clients of a party fail, and the masked sum of the others, if there are any.

    With noise in shares a client that fails is in the sum with an update of zero, for that it failed may depend on its
    rows.

    Raises:
        MistrustError: the party does not go on with the round.
    """
    clients, registered = int(request["clients"]), int(request["registered"])
    if not len(tasks) <= clients <= registered:
        raise MistrustError(f"{len(tasks)} clients here, {clients} in the round and {registered} in the run cannot be")
    shared = config.aggregation.shared(tasks[0].round_index)
    shapes = {name: tensor.shape for name, tensor in tasks[0].adapter.only(shared).items()}
    encoding = encoding_of(config, request)
    total = PartySum(encoding, shapes, tells_losses)
    by_client = {task.client: task for task in tasks}
    for result in results:
        if isinstance(result, ClientUpdate):
            reason = unusable(by_client[result.client], result, shared)
            if reason is None:
                total.add(result)
                continue
            result = ClientFailure(result.client, reason)
        if encoding.noise:
            log.warning("%s takes part with an update of zero: %s", result.client, result.reason)
            total.add_nothing(result.client)
        else:
            yield result
    if total.clients:
        purpose = "share of noise", tasks[0].round_index, party.name
        numbers = itertools.count()
        task = task_of(party.run, tasks[0].round_index, clients, registered, fingerprint(tasks[0].adapter))
        payload = party.masked(request, total, task, lambda size: draws.uniform(size, *purpose, next(numbers)))
        in_order = [client for client in by_client if client in total.clients]
        yield MaskedSum(party.name, in_order, payload, total.epsilon, total.num_tokens, total.loss_sum)


class SimulatedParties:
    """The parties of a simulation: each client is one, and all are honest."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self._draws = Draws(derive_seed(config.seed, "secure aggregation"))
        self._identities = {client: Ed25519PrivateKey.generate() for client in engine.clients()}
        public = {name: key.public_key().public_bytes_raw().hex() for name, key in self._identities.items()}
        settings = config.secure_sums
        assert settings is not None
        self._parties = {
            name: Party(
                name, key, lambda n, k: public[n] == k, settings.threshold, settings.min_parties, config.fingerprint()
            )
            for name, key in self._identities.items()
        }

    def clients(self) -> Mapping[str, int]:
        return self._engine.clients()

    def parties(self, tasks: Sequence[ClientTask]) -> dict[str, Sequence[ClientTask]]:
        return {task.client: [task] for task in tasks}

    def exchange(self, requests: Mapping[str, Words]) -> dict[str, Words]:
        return {party: self._parties[party].answer(words) for party, words in requests.items()}

    def run_masked(
        self, tasks: Sequence[ClientTask], requests: Mapping[str, Words]
    ) -> Iterator[MaskedSum | ClientFailure]:
        by_client = {task.client: task for task in tasks}
        for result in self._engine.run(tasks):
            client = result.client
            yield from masked_sum(
                self._config, self._parties[client], requests[client], [by_client[client]], [result], self._draws
            )


def secured(config: RunConfig, engine: Simulation | Parties) -> SecureAggregation:
    """Return what the server sees of an engine's clients where it is to see sums alone."""
    return SecureAggregation(config, SimulatedParties(config, engine) if isinstance(engine, Simulation) else engine)
