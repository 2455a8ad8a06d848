"""The finding in words. It claims a difference only where the paired interval excludes zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedit.report.format import METRIC_LABELS, interval, metric, number, percent, signed_interval

Model = Mapping[str, Any]


def state_finding(evaluation: Mapping[str, Any], rounds_done: int, rounds_planned: int) -> str:
    """Return one to three sentences made from the numbers of ``evaluation.json``; empty: how far the run has come."""
    models = evaluation.get("models", {})
    if "federated" not in models:
        return f"This run is unfinished: {rounds_done} of {rounds_planned} rounds are done, and nothing is evaluated."
    diverged = [name for name, model in models.items() if model["response_loss"]["all"] is None]
    if diverged:
        return f"The loss of these models is not finite, so they cannot be compared: {', '.join(diverged)}."
    matches = [model["exact_match"]["all"] for model in models.values() if "exact_match" in model]
    name = "exact_match" if len(matches) == len(models) and max(matches) > 0 else "response_loss"
    if "local" in models:
        sentences = [_against_local(evaluation, name), _gap(evaluation), _against_base(models, name)]
    else:
        sentences = [_without_local(models, name)]
    if matches and max(matches) == 0:
        sentences.append("No answer of any model is an exact match.")
    return " ".join(sentence for sentence in sentences if sentence)


def state_privacy(rounds: Sequence[Mapping[str, Any]], rounds_planned: int, *, is_private: bool) -> str | None:
    """Return what a run across real sites with privacy may tell; None: it is no such run."""
    if not is_private or not rounds or any(line["cohort"] for line in rounds):
        return None
    epsilon = rounds[-1].get("epsilon")
    cost = "each client's log says what its privacy has cost"
    if epsilon is not None:
        cost = f"the clients' privacy has cost an epsilon of {number(epsilon)}"
    return (
        f"After {len(rounds)} of {rounds_planned} rounds {cost}. Sites' losses are exact, so they are not asked for: "
        "evaluate the adapter on rows of your own."
    )


def state_sites(rounds: Sequence[Mapping[str, Any]], rounds_planned: int) -> str | None:
    """Return what sites measured of the last global adapter; None: the run is not across real sites."""
    told = [line for line in rounds if line.get("site_losses")]
    if not told:
        return None
    losses = told[-1]["site_losses"]
    worst = max(losses, key=losses.__getitem__)
    text = (
        f"After {told[-1]['round']} of {rounds_planned} rounds the sites measured a held-out loss of "
        f"{number(told[-1]['test_loss'])} nats per response token"
    )
    return (
        f"{text}; the worst of {len(losses)} is {worst} with {number(losses[worst])}."
        if len(losses) > 1
        else f"{text}."
    )


def _value(model: Model, name: str) -> str:
    value = metric(name, model[name]["all"])
    return f"{value} exact match" if name == "exact_match" else f"a response loss of {value} nats per token"


def _plain(model: Model, name: str) -> str:
    return metric(name, model[name]["all"])


def _better(name: str, one: float, other: float) -> bool:
    return one < other if name == "response_loss" else one > other


def _without_local(models: Mapping[str, Model], name: str) -> str:
    text = f"Federated tuning reaches {_value(models['federated'], name)}"
    if "base" in models:
        text += f"; the untuned base model is at {_plain(models['base'], name)}"
    return f"{text}. Without a local-only baseline this run cannot say what federation adds."


def _against_local(evaluation: Mapping[str, Any], name: str) -> str:
    models = evaluation["models"]
    federated, local, central = models["federated"], models["local"], models.get("central")
    bounds = evaluation["differences"]["federated_minus_local"]["confidence"].get(name, {}).get("all")
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        unit = " points" if name == "exact_match" else ""
        shown = "" if bounds is None else f" (95% interval of the difference: {signed_interval(name, bounds)}{unit})"
        text = (
            f"In {METRIC_LABELS[name].lower()}, federated tuning and the mean local-only model cannot be told apart: "
            f"{_plain(federated, name)} and {_plain(local, name)}{shown}"
        )
        return f"{text}. Centralised training: {_plain(central, name)}." if central else f"{text}."
    if not _better(name, federated[name]["all"], local[name]["all"]):
        text = (
            f"Federated tuning does worse than training alone: {_value(federated, name)} against "
            f"{_plain(local, name)} of the mean local-only model"
        )
        return f"{text}; centralised training: {_plain(central, name)}." if central else f"{text}."
    return f"Federated tuning reaches {_value(federated, name)}, {_won(federated, local, central, name)}."


def _won(federated: Model, local: Model, central: Model | None, name: str) -> str:
    """Say by how much federated beats local-only, and how near it comes to centralised."""
    ours, alone = federated[name]["all"], local[name]["all"]
    if name == "exact_match" and alone > 0:
        text = f"{number(ours / alone, 1)} times that of the mean local-only model ({_plain(local, name)})"
    else:
        text = f"against {_plain(local, name)} of the mean local-only model"
    if central is None:
        return text
    together = central[name]["all"]
    if name == "exact_match" and together > 0:
        return f"{text} and {percent(ours / together, 0)} of centralised training ({_plain(central, name)})"
    return f"{text} and {_plain(central, name)} of centralised training"


def _gap(evaluation: Mapping[str, Any]) -> str:
    closed, bounds = evaluation.get("gap_closed"), evaluation.get("gap_closed_confidence")
    if closed is None:
        reason = evaluation.get("gap_closed_reason")
        return f"How much of the loss gap it closes is undefined ({reason})." if reason else ""
    shown = f" (95% interval {interval('exact_match', bounds)})" if bounds else ""
    gap = "the loss gap between local-only and centralised training"
    if closed <= 0:
        return f"It closes nothing of {gap}: its loss is no lower than that of the mean local-only model."
    if closed > 1:
        return f"It closes all of {gap} and goes beyond: {percent(closed, 0)}{shown}."
    return f"It closes {percent(closed, 0)} of {gap}{shown}."


def _against_base(models: Mapping[str, Model], name: str) -> str:
    if "base" not in models:
        return ""
    worse = [
        f"{_value(models['federated'], each)} against {_plain(models['base'], each)}"
        for each in dict.fromkeys((name, "response_loss"))
        if _better(each, models["base"][each]["all"], models["federated"][each]["all"])
    ]
    return f"It is worse than the untuned base model: {' and '.join(worse)}." if worse else ""
