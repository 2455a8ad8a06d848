"""The audit of a run folder: every attack on what the run sent and made, with and without each kind of noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedit.audit.canaries import CanaryAudit, audit_canaries
from fedit.audit.mechanism import CONFIDENCE, MechanismAudit, audit_mechanism
from fedit.audit.membership import Rows
from fedit.audit.subject import Setting, Subject, drawn, noted, settings
from fedit.audit.updates import UpdateAudit, audit_updates
from fedit.config import RunConfig
from fedit.files import write_json
from fedit.interfaces import ConfigError
from fedit.report import write_report

MOST_ROUNDS = 8
"""Of the runs that are made again with canaries among their rows"""


def audit_run(
    folder: Path, config: RunConfig, rounds: int = MOST_ROUNDS, notify: Callable[[str], None] = lambda phase: None
) -> dict[str, Any]:
    """Attack the run in `folder`, of `config`, write ``audit.json``, and the report again; return what was found.

    Runs with canaries take `rounds` rounds, or as many as the run has where these are fewer.

    Raises:
        ConfigError, DataError, EngineError: the run cannot be audited (`Subject.open`).
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: runs with canaries take one round at least.")
    notify("Reading the rows and the base")
    subject = Subject.open(folder, config)
    chosen, refused = settings(subject.config, subject.sizes)
    rounds = min(rounds, config.rounds)
    notify("Attacking the mechanisms")
    mechanisms = list[tuple[Setting, MechanismAudit]]()
    for setting in chosen:
        with noted(refused, f"{setting.label}, the mechanism"):
            if (attacked := audit_mechanism(setting.config, subject.sizes)) is not None:
                mechanisms.append((setting, attacked))
    notify("Reading tokens from updates")
    updates, canaries = list[UpdateAudit](), list[CanaryAudit]()
    with noted(refused, "tokens of updates"):
        updates = audit_updates(subject, chosen, refused)
    membership = None
    if subject.has_one_model:
        notify("Telling members from others")
        rows = functools.cache(lambda clients: rows_of(subject, clients))
        with noted(refused, "members of the final model"):
            took_part = drawn(subject.config, subject.sizes, subject.rounds_done)
            membership = asdict(rows(took_part).judge(subject.final))
        for setting in chosen:
            notify(f"Planting canaries: {setting.label}")
            with noted(refused, f"{setting.label}, canaries"):
                canaries += audit_canaries(subject, [setting], rounds, rows)
        refused |= undrawn(canaries, chosen)
    else:
        refused["the final model"] = (
            f"[aggregation] name = {config.aggregation.name!r} leaves each client factors of its own: there is no "
            "model for all."
        )
    audit = {
        "rounds": rounds,
        "labels": {each.name: each.label for each in chosen},
        "mechanisms": [{"setting": setting.name, **found.to_json()} for setting, found in mechanisms],
        "updates": [asdict(found) for found in updates],
        "membership": membership,
        "canaries": [{**asdict(found), "holds": found.holds} for found in canaries],
        "refused": refused,
        "violations": violations(mechanisms, canaries, {each.name: each.label for each in chosen}),
    }
    write_json(folder / "audit.json", audit)
    write_report(folder)
    return audit


def rows_of(subject: Subject, clients: Collection[str]) -> Rows:
    """Return members, of these of the run's clients, and others.

    Raises:
        DataError: there are none.
    """
    members = [row for client, rows in subject.data.clients.items() if client in clients for row in rows]
    return Rows(subject.model, members, subject.data.test, subject.config.seed)


def undrawn(canaries: Sequence[CanaryAudit], chosen: Sequence[Setting]) -> dict[str, str]:
    """Return which canaries tell nothing, by what they are called, and why."""
    labels = {each.name: each.label for each in chosen}
    return {
        f"{labels[each.setting]}, {kind} canaries": f"Their client was not drawn in any of {each.rounds} rounds."
        for each in canaries
        for kind, times in each.took_part.items()
        if not times
    }


def violations(
    mechanisms: Sequence[tuple[Setting, MechanismAudit]], canaries: Sequence[CanaryAudit], labels: Mapping[str, str]
) -> list[str]:
    """Return what was promised and does not hold."""
    found = [
        f"{setting.label}, mechanism {each.mechanism}: the noise is {each.found_noise:.3g} clip norms at most (with "
        f"{CONFIDENCE:.1%} confidence), {each.noise_multiplier:.3g} are promised: the true epsilon is "
        f"{each.found_epsilon:.2f} at least, the accountant says {each.epsilon:.2f}"
        if each.found_noise is not None and each.found_noise < each.noise_multiplier
        else f"{setting.label}, mechanism {each.mechanism}: an epsilon of {each.one_run_epsilon:.2f} is proven of the "
        f"canaries in a few rounds, the accountant says {each.one_run_accountant:.2f}"
        for setting, each in mechanisms
        if not each.holds
    ]
    found += [
        f"{labels[each.setting]}: canaries prove an epsilon of {each.sure_epsilon:.2f} of a row (with {CONFIDENCE:.1%} "
        f"confidence), the accountant says {each.epsilon:.2f}"
        for each in canaries
        if not each.holds
    ]
    return found
