"""Run folder -> ``report.html``: gathers what each section of the template shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedit.files import write_atomically
from fedit.report import format as formats
from fedit.report import plots
from fedit.report.benchmarks import benchmarks
from fedit.report.card import write_cards
from fedit.report.finding import state_finding, state_privacy, state_sites
from fedit.report.folder import RunFolder
from fedit.report.leaks import leaks
from fedit.report.samples import choose_samples
from fedit.report.terminal import cleaning_lines
from fedit.report.verdicts import verdicts

MAX_LISTED = 20
"""Clients and failures listed in full; of more, the page gives the number and the first ones."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, which may be unfinished, and the cards of its adapters; return its path.

    The page is a function of the folder's files alone.

    Raises:
        ConfigError: `folder` is no run folder.
        DataError: a file of it is damaged.
    """
    run = RunFolder.read(folder)
    path = folder / "report.html"
    write_atomically(path, render(run).encode())
    write_cards(run)
    return path


def render(run: RunFolder) -> str:
    """Return the page."""
    return fill("report.html.j2", _sections(run))


def fill(template: str, sections: Mapping[str, Any]) -> str:
    """Return the page that a template of this package makes of what it is given."""
    environment = Environment(
        loader=PackageLoader("fedit", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["formats"] = formats
    return environment.get_template(template).render(sections)


def _sections(run: RunFolder) -> dict[str, Any]:
    planned = run.run.get("rounds", 0)
    return {
        "title": f"Federated instruction tuning of {_model_name(run)} on {_data_name(run)}",
        "recipe": run.config.get("recipe"),
        "finding": state_privacy(run.rounds, planned, is_private=run.run.get("privacy") is not None)
        or state_sites(run.rounds, planned)
        or state_finding(run.evaluation, len(run.rounds), planned),
        "rounds_done": len(run.rounds),
        "rounds_planned": planned,
        "config": run.config,
        "evaluation": run.evaluation,
        "models": _models(run.evaluation),
        "metrics": _metrics(run.evaluation),
        "differences": _differences(run.evaluation),
        "unseen": _unseen(run.evaluation),
        "categories": [name for name in run.evaluation.get("num_test_rows", {}) if name != "all"],
        "clients": _clients(run),
        "samples": choose_samples(run),
        "partition": run.partition,
        "participation": _participation(run),
        "cleaning": [line.plain for line in cleaning_lines(run.partition.get("cleaning", {}))],
        "privacy": _privacy(run),
        "saw_sums": run.run.get("secure_aggregation")
        or (run.run.get("privacy") or {}).get("mechanism") == "distributed",
        "benchmarks": benchmarks(run.benchmarks.get("tasks", {})),
        "leaks": leaks(run.audit),
        "verdicts": verdicts(run.judge),
        "communication": _communication(run),
        "time": _time(run),
        "peak_memory": max((timing.get("peak_memory_bytes") or 0 for timing in run.timings), default=0),
        "round_rows": _round_rows(run),
        "settings": list(run.settings.items()),
        "plots": _plots(run),
        "max_listed": MAX_LISTED,
        "max_drawn": plots.MAX_CATEGORIES,
        "max_named": plots.MAX_NAMED_CLIENTS,
    }


def _plots(run: RunFolder) -> dict[str, Any]:
    models = run.evaluation.get("models", {}).values()
    any_match = any(model["exact_match"]["all"] for model in models if "exact_match" in model)
    return {
        "answers": plots.categories_figure(run.evaluation, "exact_match" if any_match else "rouge_l"),
        "answers_metric": "Exact match" if any_match else "ROUGE-L",
        "response_loss": plots.categories_figure(run.evaluation, "response_loss"),
        "loss": plots.loss_figure(run.rounds, run.evaluation),
        "clients": plots.clients_figure(run.evaluation),
        "partition": plots.partition_figure(run.partition),
        "aggregation": plots.aggregation_figure(run.rounds),
        "privacy": plots.privacy_figure(run.rounds),
    }


def _model_name(run: RunFolder) -> str:
    return formats.short_name(run.run.get("model", {}).get("path", "a model"))


def _data_name(run: RunFolder) -> str:
    return formats.short_name(run.run.get("data", {}).get("path", "data"))


def _models(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    models = evaluation.get("models", {})
    names = [name for name in formats.MODEL_LABELS if name in models] + [
        name for name in models if name not in formats.MODEL_LABELS
    ]
    return [{"name": name, "label": formats.MODEL_LABELS.get(name, name), **models[name]} for name in names]


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the metrics that any model has."""
    models = evaluation.get("models", {}).values()
    return [metric for metric in formats.METRIC_LABELS if any(metric in model for model in models)]


def _differences(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    labels = {
        "federated_minus_local": "Federated − local-only",
        "federated_minus_central": "Federated − centralised",
    }
    found = evaluation.get("differences", {})
    return [{"label": label, **found[name]} for name, label in labels.items() if name in found]


def _unseen(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was measured on clients and categories that no model was trained on."""
    found = []
    for key in ("unseen_clients", "unseen_categories"):
        if key in evaluation:
            measured = evaluation[key]
            groups = [name for name in measured["num_test_rows"] if name != "all"]
            label = f"{measured['num_test_rows']['all']:,} rows of unseen {key.removeprefix('unseen_')}"
            found.append({"label": label, "groups": groups, "models": _models(measured), "metrics": _metrics(measured)})
    return found


def _clients(run: RunFolder) -> dict[str, Any]:
    """Return the rows of the per-client table, worst first, and how many there are in all."""
    per_client = run.evaluation.get("models", {}).get("local", {}).get("per_client", {})
    holdings = run.partition.get("clients", {})

    def loss(client: str) -> float:
        value = per_client[client]["response_loss"]["all"]
        return float("inf") if value is None else value

    worst_first = sorted(per_client, key=loss, reverse=True)
    rows = [{"client": client, "holding": holdings.get(client), **per_client[client]} for client in worst_first]
    return {"rows": rows if len(rows) <= MAX_LISTED else rows[: MAX_LISTED // 2], "num_all": len(rows)}


def _participation(run: RunFolder) -> dict[str, Any]:
    failures = [
        {"round": entry["round"], "client": client, "reason": reason}
        for entry in run.rounds
        for client, reason in entry.get("failures", {}).items()
    ]
    sampled = {client for entry in run.rounds for client in entry["cohort"]}
    return {
        "num_clients": len(run.partition.get("clients", {})),
        "num_sampled": len(sampled),
        "num_tasks": sum(len(entry["cohort"]) for entry in run.rounds),
        "failures": failures,
        "withheld": bool(run.rounds) and run.run.get("privacy") is not None and not sampled,
        "never_sampled": [client for client in run.partition.get("clients", {}) if client not in sampled],
    }


def _privacy(run: RunFolder) -> dict[str, Any] | None:
    """Return what the run promises its clients and what it has cost so far; None: it promises nothing."""
    statement = run.partition.get("privacy")
    spent = run.rounds[-1].get("epsilon") if run.rounds else 0.0
    if statement is None:
        return None
    return {"statement": statement, "spent": spent}


def _communication(run: RunFolder) -> dict[str, Any]:
    up = sum(entry["bytes_up"] for entry in run.rounds)
    down = sum(entry["bytes_down"] for entry in run.rounds)
    num_tasks = sum(len(entry["cohort"]) for entry in run.rounds) or 1
    num_rounds = len(run.rounds) or 1
    return {
        direction: {"total": total, "per_round": total / num_rounds, "per_client": total / num_tasks}
        for direction, total in (("up", up), ("down", down))
    }


def _time(run: RunFolder) -> list[dict[str, Any]]:
    """Return one line for the federated rounds and one for each phase that was timed."""
    labels = {"local": "Local-only baselines", "central": "Centralised baseline", "evaluation": "Evaluation"}
    by_round = list(_timing_by_round(run).values())
    lines = []
    if by_round:
        tokens = sum(entry["tokens"] for entry in run.rounds)
        lines.append(_time_line(f"Federated rounds ({len(run.rounds):,})", by_round, tokens))
    for phase, label in labels.items():
        timings = [timing for timing in run.timings if timing.get("phase") == phase]
        if timings:
            lines.append(_time_line(label, timings, sum(timing.get("tokens") or 0 for timing in timings)))
    return lines


def _time_line(label: str, timings: list[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    seconds = sum(timing["seconds"] for timing in timings)
    return {
        "label": label,
        "seconds": seconds,
        "cpu_seconds": sum(timing.get("cpu_seconds") or 0 for timing in timings),
        "tokens": tokens or None,
        "tokens_per_second": tokens / seconds if seconds and tokens else None,
    }


def _timing_by_round(run: RunFolder) -> dict[int, Mapping[str, Any]]:
    """Return the last timing of each round: a resumed run may have done one twice, or lost its result."""
    done = {entry["round"] for entry in run.rounds}
    return {timing["round"]: timing for timing in run.timings if timing.get("round") in done}


def _round_rows(run: RunFolder) -> list[dict[str, Any]]:
    timings = _timing_by_round(run)
    return [{**entry, "timing": timings.get(entry["round"], {})} for entry in run.rounds]
