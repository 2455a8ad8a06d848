"""The audit of a run folder: every attack on what the run sent and made, with and without each kind of noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedit.audit.canaries import CanaryAudit, audit_canaries
from fedit.audit.mechanism import CONFIDENCE, MechanismAudit, audit_mechanism
from fedit.audit.membership import Rows
from fedit.audit.subject import Setting, Subject, settings
from fedit.audit.updates import audit_updates
from fedit.config import RunConfig
from fedit.files import write_json
from fedit.interfaces import ConfigError, EngineError
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
    sizes = {client: len(rows) for client, rows in subject.data.clients.items()}
    chosen, refused = settings(config, sizes)
    rounds = min(rounds, config.rounds)
    notify("Attacking the mechanisms")
    mechanisms = [(each, found) for each in chosen if (found := audit_mechanism(each.config, sizes)) is not None]
    notify("Reading tokens from updates")
    try:
        updates = [asdict(found) for found in audit_updates(subject, chosen)]
    except EngineError as error:
        updates, refused = [], {**refused, "tokens of updates": str(error)}
    membership, canaries = None, list[CanaryAudit]()
    if subject.has_one_model:
        notify("Telling members from others")
        rows = Rows(subject.model, subject.data.pooled, subject.data.test, config.seed)
        membership = asdict(rows.judge(subject.final))
        for setting in chosen:
            notify(f"Planting canaries: {setting.label}")
            canaries += audit_canaries(subject, [setting], rounds, rows)
    else:
        refused["the final model"] = (
            f"[aggregation] name = {config.aggregation.name!r} leaves each client factors of its own: there is no "
            "model for all."
        )
    audit = {
        "rounds": rounds,
        "labels": {each.name: each.label for each in chosen},
        "mechanisms": [{"setting": setting.name, **found.to_json()} for setting, found in mechanisms],
        "updates": updates,
        "membership": membership,
        "canaries": [{**asdict(found), "holds": found.holds} for found in canaries],
        "refused": refused,
        "violations": violations(mechanisms, canaries),
    }
    write_json(folder / "audit.json", audit)
    write_report(folder)
    return audit


def violations(mechanisms: Sequence[tuple[Setting, MechanismAudit]], canaries: Sequence[CanaryAudit]) -> list[str]:
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
        f"{each.setting}: canaries prove an epsilon of {each.empirical.epsilon:.2f} of a row, the accountant says "
        f"{each.epsilon:.2f}"
        for each in canaries
        if not each.holds
    ]
    return found
