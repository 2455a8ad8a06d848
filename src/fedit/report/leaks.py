"""What leaks: ``audit.json`` as sentences, tables and figures, for the page and the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from rich.table import Table
from rich.text import Text

from fedit.report.format import MISSING, interval, number, percent
from fedit.report.svg import COLOURS, WIDTH, drawing, inline_svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

Audit = Mapping[str, Any]


def leaks(audit: Audit) -> dict[str, Any] | None:
    """Return what the page's section shows; None: the run was not audited."""
    if not audit:
        return None
    return {
        "sentences": sentences(audit),
        "tokens": tokens_figure(audit),
        "roc": roc_figure(audit),
        "updates": [{**each, "label": _label(audit, each)} for each in audit["updates"]],
        "models": [{**each, "label": _label(audit, each)} for each in audit["canaries"]],
        "mechanisms": [{**each, "label": _label(audit, each)} for each in audit["mechanisms"]],
        "refused": audit["refused"],
        "violations": audit["violations"],
        "rounds": audit["rounds"],
        "highest": audit["canaries"][0]["highest"] if audit["canaries"] else None,
    }


def leaks_table(audit: Audit) -> Table:
    """Return one line for each setting: what updates, their sum and the model tell."""
    table = Table(title="What leaks (what knowing nothing gives)", title_justify="left")
    headers = ["", "Tokens of one step", "of an update", "of the sum", "Canary, 16 copies: update, model"]
    for header in (*headers, "Rows, AUC", "Noise found, promised"):
        table.add_column(header)
    for name, label in audit["labels"].items():
        model = next((each for each in audit["canaries"] if each["setting"] == name), None)
        noise = next((each for each in audit["mechanisms"] if each["setting"] == name), None)
        table.add_row(
            Text(label),
            _tokens(_found(audit, name, "one update", one_step=True)),
            _tokens(_found(audit, name, "one update")),
            _tokens(_found(audit, name, "the sum") or _found(audit, name, "the noisy sum")),
            MISSING if model is None else f"{bits(model['update_exposure'])}, {bits(model['exposure'])}",
            MISSING if model is None else number(model["membership"]["auc"]),
            MISSING if noise is None else f"≤ {number(noise['found_noise'])}, {number(noise['noise_multiplier'])}",
        )
    return table


def bits(exposure: Mapping[str, float] | None, copies: int = 16) -> str:
    """Return an exposure; its keys are texts once they come from a file."""
    if exposure is None:
        return MISSING
    return number({int(key): value for key, value in exposure.items()}[copies], 1)


def _label(audit: Audit, entry: Mapping[str, Any]) -> str:
    return audit["labels"][entry["setting"]]


def _found(audit: Audit, setting: str, seen: str, *, one_step: bool = False) -> Mapping[str, Any] | None:
    """Return what was recovered from the run's last adapter on, of one plain step or of the local training."""
    found = [
        each
        for each in audit["updates"]
        if (each["setting"], each["seen"], each["first_round"]) == (setting, seen, False)
    ]
    chosen = [each for each in found if each.get("plain", each["steps"] == 1) == one_step] or found
    return chosen[-1]["recovered"] if chosen else None


def _tokens(recovered: Mapping[str, Any] | None) -> str:
    return MISSING if recovered is None else f"{percent(recovered['recall'], 0)} ({percent(recovered['blind'], 0)})"


# ----------------------------------------------------------------------------------------------------- in words


def sentences(audit: Audit) -> list[tuple[str, str]]:
    """Return who sees what, and what that tells of the run as it is."""
    own = next(iter(audit["labels"]))
    said = []
    # Noise that the server adds itself hides nothing from it.
    seen_by_server = "none" if own == "central" else own
    step, update = (_found(audit, seen_by_server, "one update", one_step=one) for one in (True, False))
    model = next((each for each in audit["canaries"] if each["setting"] == own), None)
    if step is not None and update is not None:
        text = f"{_named(step)} after one step of plain gradient descent; {_named(update)} after the local training"
        if model is not None and model["update_exposure"] is not None:
            text += (
                f". A canary in 16 copies has an exposure of {bits(model['update_exposure'])} of {_most(model)} bits"
            )
        who = "The server, which is trusted to forget them," if own == "central" else "The server"
        said.append(("One update", f"{who} names {text}."))
    for seen, label in (("the sum", "The sum"), ("the noisy sum", "The noisy sum")):
        step, update = _found(audit, own, seen, one_step=True), _found(audit, own, seen)
        if step is not None and update is not None:
            both = f"{_named(step)} after one step, {_named(update)} after the local training"
            said.append((label, f"Who sees nothing else names {both}."))
    members = audit["membership"]
    if members is not None:
        text = _members(members)
        if model is not None and model["exposure"] is not None:
            never = bits(model["exposure"], 0)
            text += (
                f". With canaries and {audit['rounds']} rounds, one in 16 copies has an exposure of "
                f"{bits(model['exposure'])} of {_most(model)} bits; canaries that were never there have {never}"
            )
        said.append(("The final model", f"{text}."))
    return said


def _members(members: Mapping[str, Any]) -> str:
    """Return how well members are told from others, and what that is worth."""
    text = (
        f"Members are told from others with an AUC of {number(members['auc'])} "
        f"({interval('auc', members['auc_interval'])}; 0.5 is a guess), {percent(members['true_share'])} of them "
        f"at 1% false alarms ({interval('exact_match', members['true_share_interval'])})"
    )
    if not members.get("by_category", True):
        text += ". Clients and held-out rows have no category in common, so rows of all are compared"
    low, high = members["base_interval"]
    if not low <= 0.5 <= high:
        text += (
            f". That means nothing: the base, which was trained on neither, tells them apart as well (AUC "
            f"{number(members['base_auc'])}), so held-out rows are of another kind than the clients'"
        )
    return text


def _named(recovered: Mapping[str, Any]) -> str:
    return (
        f"{percent(recovered['recall'], 0)} of the {recovered['num_tokens']:,} tokens trained on (of noise: "
        f"{percent(recovered['blind'], 0)}; by their frequency elsewhere: {percent(recovered['guessed'], 0)})"
    )


def _most(model: Mapping[str, Any]) -> str:
    return f"{model['highest']:g}"


# ------------------------------------------------------------------------------------------------------ figures


def tokens_figure(audit: Audit) -> Markup | None:
    """Horizontal bars: the share of tokens recovered, by setting and what was seen; a tick is the attack on noise."""
    lines = [
        (f"{audit['labels'][name]}, {seen}", found)
        for name in audit["labels"]
        for seen in ("one update", "the sum", "the noisy sum")
        if (found := _found(audit, name, seen, one_step=True)) is not None
    ]
    if not lines:
        return None
    with drawing():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.26 * len(lines)))
        axes = figure.add_subplot()
        places = np.arange(len(lines))
        axes.barh(places, [found["recall"] for _, found in lines], 0.6, color=COLOURS["federated"], label="Recovered")
        blind = [found["blind"] for _, found in lines]
        axes.vlines(blind, places - 0.38, places + 0.38, color=COLOURS["ink"], linewidth=1.4, label="Of noise")
        axes.set_yticks(places, [label for label, _ in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("Tokens recovered from one step")
        axes.grid(axis="x")
        _legend(figure, axes)
        return inline_svg(figure, "leaked-tokens", "Tokens recovered from updates, by setting")


def roc_figure(audit: Audit) -> Markup | None:
    """How many members are found at what price, of the run itself and of those with canaries, on logarithmic axes."""
    if audit["membership"] is None:
        return None
    with drawing():
        figure = Figure(figsize=(WIDTH, 3.6))
        axes = figure.add_subplot()
        smallest = 1 / audit["membership"]["num_rows"]
        curves = [("this run's final model", audit["membership"], COLOURS["federated"], "-")]
        styles = zip((COLOURS["local"], COLOURS["central"], COLOURS["personal"]), ("--", "-.", ":"), strict=True)
        others = [each for each in audit["canaries"] if each["setting"] != next(iter(audit["labels"]))]
        for each, (colour, style) in zip(others, itertools.cycle(styles), strict=False):
            curves.append((_label(audit, each), each["membership"], colour, style))
        for label, found, colour, style in curves:
            points = np.maximum(np.asarray(found["curve"]), smallest)
            axes.plot(*points.T, color=colour, linestyle=style, linewidth=1.6, label=label)
        axes.plot([smallest, 1], [smallest, 1], color=COLOURS["muted"], linewidth=0.8, label="a guess")
        axes.set(xscale="log", yscale="log", xlim=(smallest, 1), ylim=(smallest, 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("Others taken for members")
        axes.set_ylabel("Members found")
        axes.grid()
        _legend(figure, axes)
        return inline_svg(figure, "membership", "Members found against others taken for members")


def _legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
