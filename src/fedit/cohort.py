"""Who takes part in a round, and with an adapter of what rank: a function of the run's description and its clients.

`clients` is what an engine registered: their names, in order, and the rows that each says it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedit.config import RankRange, RunConfig
from fedit.interfaces import ConfigError, derive_rng, did_you_mean


def sample_cohort(config: RunConfig, clients: Mapping[str, int], round_index: int) -> list[str]:
    """Return the round's clients, in client order; nobody, where nobody is online or `poisson` draws none."""
    cohort, num_clients = config.cohort, len(clients)
    seed = config.seed if config.cohort_secret is None else config.cohort_secret
    rng = derive_rng(seed, "cohort", round_index)
    size = cohort.num_sampled(num_clients)
    names = list(clients)
    online = _online(config, names, round_index)
    if cohort.sampling == "poisson":
        chosen = np.flatnonzero(rng.random(num_clients) < cohort.expected_share(num_clients))
        chosen = chosen[online[chosen]]
    elif cohort.sampling == "round_robin":
        turn = (round_index * size + np.arange(num_clients)) % num_clients
        chosen = turn[online[turn]][:size]
    else:
        rows = np.asarray(list(clients.values()), dtype=np.float64)
        weighted = cohort.sampling == "weighted"
        candidates = np.flatnonzero(online & (rows > 0) if weighted else online)
        if not len(candidates):
            return []
        shares = rows[candidates] / rows[candidates].sum() if weighted else None
        chosen = rng.choice(candidates, min(size, len(candidates)), replace=False, p=shares)
    return [names[int(index)] for index in sorted(chosen)]


def _online(config: RunConfig, names: Sequence[str], round_index: int) -> np.ndarray:
    """Return which clients can be reached in a round, bool [clients]."""
    availability = config.cohort.availability
    if not isinstance(availability, Mapping):
        return derive_rng(config.seed, "online", round_index).random(len(names)) < availability
    number = round_index + 1
    return np.asarray([
        name not in availability or any(first <= number <= last for first, last in availability[name])
        for name in names
    ])  # fmt: skip


def check_clients(config: RunConfig, clients: Mapping[str, int]) -> None:
    """Raise ConfigError where the cohorts that `config` asks for cannot be drawn from `clients`."""
    cohort, num_clients = config.cohort, len(clients)
    if cohort.size is not None and cohort.size > num_clients:
        raise ConfigError(f"[cohort] size = {cohort.size} is more than the {num_clients} clients of the partition.")
    if cohort.min_updates > cohort.num_sampled(num_clients):
        raise ConfigError(
            f"[cohort] min_updates = {cohort.min_updates} can never be reached: the partition has "
            f"{num_clients} clients, a cohort {cohort.num_sampled(num_clients)}."
        )
    for index in range(config.rounds):
        drawn = len(sample_cohort(config, clients, index))
        if 0 < drawn < cohort.min_updates:
            raise ConfigError(
                f"[cohort] min_updates = {cohort.min_updates} cannot be reached in round {index + 1}, which draws "
                f"{drawn} of the clients that are online. Lower it, sample more, or choose another seed."
            )
    for name in cohort.availability if isinstance(cohort.availability, Mapping) else ():
        if name not in clients:
            raise ConfigError(f"[cohort] availability: no client is named {name!r}. {did_you_mean(name, clients)}")


def participation(config: RunConfig, clients: Mapping[str, int], round_index: int) -> dict[str, list[int]]:
    """Return the rounds before `round_index` whose cohort each client was in."""
    rounds: dict[str, list[int]] = {client: [] for client in clients}
    for index in range(round_index):
        for client in sample_cohort(config, clients, index):
            rounds[client].append(index)
    return rounds


def mean_share(config: RunConfig, clients: Mapping[str, int]) -> float:
    """Return the share of the clients that the run's cohorts have on average."""
    rounds = participation(config, clients, config.rounds)
    return sum(len(indices) for indices in rounds.values()) / (config.rounds * len(clients))


def most_rounds(config: RunConfig, clients: Mapping[str, int]) -> int:
    """Return in how many rounds the client takes part that is in most."""
    return max(len(rounds) for rounds in participation(config, clients, config.rounds).values())


def never_sampled(config: RunConfig, clients: Mapping[str, int]) -> list[str]:
    """Return the clients that no round of this run will draw."""
    return [client for client, rounds in participation(config, clients, config.rounds).items() if not rounds]


def client_rank(config: RunConfig, clients: Mapping[str, int], client: str) -> int:
    """Return the rank of a client's adapter: one of the configured ranks in turn, or one of a range."""
    rank = config.adapter.rank
    if isinstance(rank, int):
        return rank
    if not isinstance(rank, RankRange):
        return rank[list(clients).index(client) % len(rank)]
    if rank.by == "random":
        return int(derive_rng(config.seed, "rank", client).integers(rank.min, rank.max + 1))
    fewest, most = min(clients.values()), max(clients.values())
    share = (clients[client] - fewest) / (most - fewest) if most > fewest else 1.0
    return rank.min + round(share * (rank.max - rank.min))
