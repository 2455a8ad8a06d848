"""How a site joins a run: its own rows and base under the run's description, or the reason why it refuses."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedit.config import RunConfig, SecureAggregationConfig
from fedit.engines.channel import Header
from fedit.engines.client_store import ClientStore
from fedit.engines.messages import digests
from fedit.engines.simulation import Simulation
from fedit.engines.site_folder import SiteFolder
from fedit.interfaces import Adapter, EncodedExample, FeditError
from fedit.memory import MemoryShortageError, memory_bytes
from fedit.model import StackedModel
from fedit.prepare import prepare_model, prepare_site
from fedit.privacy import Draws

if TYPE_CHECKING:
    from fedit.secure.party import Party


@dataclass(frozen=True, eq=False)
class Joined:
    """What a run's description made of the site."""

    config: RunConfig
    model: StackedModel
    clients: Mapping[str, Sequence[EncodedExample]]
    test: Sequence[EncodedExample]
    engine: Simulation
    store: ClientStore
    party: Party | None
    """Its part in secure aggregation"""
    initial: Adapter
    answer: Header
    cleaning: Mapping[str, Any]
    """What became of the rows; for the site's log alone"""


class RefusalError(FeditError):
    """Why the site does not take part: told to the server as it is."""


def join_run(
    folder: SiteFolder,
    described: RunConfig,
    expected: Mapping[str, str],
    run: str,
    on_step: Callable[[int], None],
) -> Joined:
    """Return a site ready to tune for a run; `on_step` hears of the tokens of every step.

    Raises:
        RefusalError: the run does not fit what is installed or allowed here.
    """
    version = importlib.metadata.version("fedit")
    if version != expected["fedit"]:
        raise RefusalError(f"fedit {version} is installed here, the server has {expected['fedit']}")
    secure, policy = described.secure_sums, folder.config.policy
    if secure is None and policy.sums_only:
        raise RefusalError("it takes part only where the server sees sums alone. Use [secure_aggregation]")
    if secure is not None and secure.threshold < policy.threshold:
        raise RefusalError(
            f"[secure_aggregation] threshold = {secure.threshold:.3g} is too low, it wants {policy.threshold:.3g}"
        )
    if described.attack is not None:
        raise RefusalError("[attack] is for simulations: clients of a real federation act for themselves")
    if described.evaluation.unseen_clients:
        raise RefusalError("[evaluation] unseen_clients is for simulations: who does not join is not measured")
    config = folder.localise(described)
    data = prepare_site(config, folder.call)
    try:
        started = prepare_model(config, list(data.clients.values()))
    except MemoryShortageError as error:
        raise RefusalError(f"its memory is too small for the run: {error.shortage}") from error
    here = {"base": started.weights_sha256, "tokenizer": started.tokenizer_sha256}
    for what, digest in here.items():
        if digest != expected[what]:
            raise RefusalError(f"another {what}: SHA-256 {digest[:16]}... here, {expected[what][:16]}... at the server")
    data = started.with_margins(config, data)
    store = ClientStore(folder.state_of(run), described.digest())
    engine = Simulation(config, started.model, data.clients, store, on_step, Draws(None))
    counts = policy.counts and described.privacy is None and secure is None
    answer = {
        "clients": {client: len(rows) if counts else 1 for client, rows in data.clients.items()},
        "initial": digests(started.initial.tensors),
        "torch": torch.__version__,
        "device": str(started.model.device),
        "memory_bytes": memory_bytes(config.engine, started.model.device),
    }
    if described.privacy is None:
        answer["slots"] = started.model.max_slots
    if counts:
        answer["held_out"] = len(data.test)
    return Joined(
        config=config,
        model=started.model,
        clients=data.clients,
        test=data.test,
        engine=engine,
        store=store,
        party=None if secure is None else _party(folder, secure, described.fingerprint()),
        initial=started.initial,
        answer=answer,
        cleaning=data.summary["cleaning"],
    )


def _party(folder: SiteFolder, settings: SecureAggregationConfig, run: str) -> Party:
    """Return what the site is in secure aggregation."""
    from fedit.engines.identities import KnownSites, own_identity
    from fedit.secure.party import Party

    least = max(settings.min_parties, folder.config.policy.min_parties)
    return Party(folder.name, own_identity(folder.path), KnownSites(folder).knows, settings.threshold, least, run)
