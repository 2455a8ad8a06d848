"""What a site sends where the server is to see sums alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fedit.codec import Message
from fedit.engines.channel import Header
from fedit.engines.joining import Joined
from fedit.engines.site_folder import SitePolicy
from fedit.interfaces import ClientFailure, ClientTask, FeditError
from fedit.privacy import Draws, Mechanism

if TYPE_CHECKING:
    from fedit.secure.party import Party


def answer_exchange(party: Party | None, words: Header, note: Callable[..., None]) -> Header:
    """Return the answer of a site to an exchange, or why it does not go on; `note` writes a line of the site's log."""
    from fedit.secure.party import MistrustError

    if party is None:
        return {"refused": "this run has no secure aggregation"}
    try:
        return {"words": party.answer(words)}
    except FeditError as error:  # only of what the protocol says may the server be told
        note("does not go on", reason=str(error))
        return {"refused": str(error) if isinstance(error, MistrustError) else "its own log says why"}


def masked_answers(
    joined: Joined, policy: SitePolicy, about: Header, tasks: Sequence[ClientTask], note: Callable[..., None]
) -> Iterator[tuple[Header, Message]]:
    """Tune the clients of `tasks`, and yield the masked sum of their updates, with its header, and who fails.

    `about` is the server's request; `note` writes a line of the site's log.
    """
    from fedit.engines.secure import masked_sum
    from fedit.secure.party import MistrustError

    left = [task.client for task in tasks]
    try:
        if joined.party is None or "secure" not in about:
            raise MistrustError("a run has secure aggregation in all that it asks for, or nowhere")
        if not tasks:
            return
        cost = _cost(joined, about["secure"], tasks)
        results = (
            result if isinstance(result, ClientFailure) or policy.counts else replace(result, num_examples=1)
            for result in joined.engine.run(tasks)
        )
        for result in masked_sum(
            joined.config, joined.party, about["secure"], tasks, results, Draws(None), tells_losses=policy.losses
        ):
            if isinstance(result, ClientFailure):
                left.remove(result.client)
                yield {"client": result.client, "failure": result.reason}, b""
                continue
            first, *others = result.clients
            left = [client for client in left if client not in result.clients]
            note(
                "sent", round=about["round"], client=first, merged=len(others) or None, bytes=len(result.payload),
                masked=True, sha256=sha256(result.payload).hexdigest(), **{"epsilon": result.epsilon, **cost},
            )  # fmt: skip
            yield {"client": first, "others": others, "num_examples": 0}, result.payload
    except MistrustError as error:
        note("does not go on", round=about["round"], reason=str(error))
        yield from (({"client": client, "failure": str(error)}, b"") for client in left)


def _cost(joined: Joined, masks: Header, tasks: Sequence[ClientTask]) -> dict[str, Any]:
    """Return what noise in shares has cost the clients of `tasks` after this round, for the site's log; empty: there is
    no such noise. A client counts its rounds, on its disk before one begins.

    ``epsilon`` is against who sees global adapters, ``epsilon_against_parties`` against who knows in which rounds a
    client is: the server, and the other sites.

    Raises:
        MistrustError: a client was asked more often than the run has rounds.
    """
    from fedit.secure.party import MistrustError

    mechanism = Mechanism.of(joined.config, int(masks["registered"]))
    if mechanism is None:
        return {}
    most = max(joined.store.count(task.client) for task in tasks)
    if most > joined.config.rounds:
        raise MistrustError(f"a client was asked {most} times in a run of {joined.config.rounds} rounds")
    return {
        "epsilon": mechanism.spent(tasks[0].round_index + 1),
        "epsilon_against_parties": mechanism.spent_against_parties(most),
        "delta": mechanism.delta,
        "noise_multiplier": mechanism.noise_multiplier,
        "registered": mechanism.num_clients,
    }
