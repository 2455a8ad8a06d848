"""The figures of a comparison. Each function returns an inline SVG, or None without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fedit.comparison.groups import Comparison, Group
from fedit.report.format import METRIC_LABELS, MODEL_LABELS, clip, size
from fedit.report.plots import LINE_STYLES, MAX_CATEGORIES, metric_axis, round_axis
from fedit.report.svg import COLOURS, NUM_SERIES, WIDTH, drawing, inline_svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

MAX_BARS = 5
"""Groups that bars are drawn of; a category has no room for more."""
MARKERS = "os^DvPX*"

Series = Mapping[str, int]
"""By label of a group that has a colour of its own, the number of the colour"""


def choose_series(comparison: Comparison) -> Series:
    """Return the groups with a colour: the references, then those of the lowest mean loss."""

    def place(group: Group) -> tuple[bool, float]:
        loss = group.mean("response_loss")
        return group.label not in comparison.references, math.inf if loss is None else loss

    groups = comparison.trained
    if len(groups) > NUM_SERIES:
        groups = sorted(groups, key=place)[:NUM_SERIES]
    return {group.label: index for index, group in enumerate(groups)}


def curve_key(comparison: Comparison) -> str:
    """Return which loss is drawn over the rounds: the held-out one, if any run measured it more than once."""
    curves = [run.values.get("curve", {}).get("test_loss", ()) for group in comparison.trained for run in group.runs]
    more_than_once = any(sum(loss is not None for loss in curve) > 1 for curve in curves)
    return "test_loss" if more_than_once else "train_loss"


def rounds_figure(comparison: Comparison, series: Series) -> Markup | None:
    """A line for each group, the mean over its seeds; a band from the lowest to the highest."""
    key = curve_key(comparison)
    curves = {group.label: _curves(group, key) for group in comparison.trained}
    if not any(curve.size for _, curve in curves.values()):
        return None
    with drawing():
        figure, axes = _figure(series)
        for group in comparison.trained:
            rounds, losses = curves[group.label]
            style = _style(comparison, series, group)
            if rounds:
                axes.plot(rounds, losses.mean(axis=0), linewidth=1.6, markersize=3 if len(rounds) < 30 else 0, **style)
            if len(losses) > 1 and group.label in series:
                axes.fill_between(
                    rounds, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
                )
        if key == "test_loss":
            _baseline_lines(comparison, axes.axhline)
        round_axis(axes)
        axes.set_ylabel(f"{'Held-out' if key == 'test_loss' else 'Training'} loss (nats per token)")
        axes.grid(axis="y")
        _legend(comparison, figure, axes)
        return inline_svg(figure, "rounds", f"Loss by round of {len(comparison.trained)} groups")


def bytes_figure(comparison: Comparison, series: Series) -> Markup | None:
    """Loss over the bytes of the whole run, both ways; small points are seeds. The line joins what nothing beats."""
    found = [(group, points) for group in comparison.trained if (points := _bytes_and_losses(group)).size]
    means = [points.mean(axis=0) for _, points in found]
    if len({mean[0] for mean in means}) < 2:
        return None
    with drawing():
        figure, axes = _figure(series)
        frontier = np.array(_frontier(means))
        axes.plot(*frontier.T, color=COLOURS["muted"], linewidth=1, linestyle="--", zorder=1)
        for (group, points), mean in zip(found, means, strict=True):
            style = _style(comparison, series, group)
            if group.label not in series and mean.tolist() in frontier.tolist():
                axes.annotate(_name(comparison, group), mean, (5, 5), textcoords="offset points")
            axes.plot(*points.T, linestyle="", markersize=3, **style | {"label": None, "alpha": 0.4})
            axes.plot(*mean[:, None], linestyle="", markersize=7, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")  # one rule that fails would press all others together
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(FixedLocator(_ticks([mean[0] for mean in means])))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        axes.margins(0.08)
        axes.set_xlabel("Bytes of the run, up and down")
        axes.set_ylabel("Response loss (nats per token)")
        axes.grid()
        _legend(comparison, figure, axes)
        return inline_svg(figure, "bytes", f"Response loss over bytes of {len(found)} groups")


def categories_of(comparison: Comparison, metric: str = "response_loss") -> list[str]:
    """Return the categories of the test rows, in their order."""
    return list(
        dict.fromkeys(
            name
            for group in comparison.trained
            for run in group.runs
            for name in run.values.get("by_category", {}).get(metric, ())
        )
    )


def by_category(group: Group, metric: str, category: str) -> list[float]:
    """Return a category's metric of the runs that have it."""
    found = [run.values.get("by_category", {}).get(metric, {}).get(category) for run in group.runs]
    return [value for value in found if value is not None]


def categories_figure(comparison: Comparison, series: Series, metric: str) -> Markup | None:
    """Horizontal bars: a group of them for each category, whiskers from the lowest to the highest seed."""
    categories = categories_of(comparison, metric)[:MAX_CATEGORIES]
    shown = [group for group in comparison.trained if series.get(group.label, MAX_BARS) < MAX_BARS]
    shown = [group for group in shown if any(by_category(group, metric, category) for category in categories)]
    if len(categories) < 2 or not shown:
        return None
    thickness = 0.8 / len(shown)
    with drawing():
        height = 0.9 + 0.17 * len(shown) + len(categories) * (0.12 + 0.13 * len(shown))
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_subplot()
        for place, group in enumerate(shown):
            colour = _style(comparison, series, group)["color"]
            values = [by_category(group, metric, category) for category in categories]
            positions = np.arange(len(categories)) - 0.4 + (place + 0.5) * thickness
            means = np.array([np.mean(each) if each else np.nan for each in values])
            axes.barh(positions, means, thickness * 0.9, color=colour, label=_name(comparison, group))
            spread = [(at, min(each), max(each)) for at, each in zip(positions, values, strict=True) if len(each) > 1]
            if spread:
                axes.hlines(*np.array(spread).T, color=COLOURS["card"], linewidth=2.2)
                axes.hlines(*np.array(spread).T, color=COLOURS["ink"], linewidth=0.9)
        axes.set_yticks(range(len(categories)), [clip(name, 24) for name in categories])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(categories) - 0.5, -0.6)
        axes.grid(axis="x")
        metric_axis(axes, metric)
        axes.set_xlim(0)
        _legend(comparison, figure, axes)
        return inline_svg(figure, f"categories-{metric}", f"{METRIC_LABELS[metric]} by category of {len(shown)} groups")


def worst_figure(comparison: Comparison) -> Markup | None:
    """Mean loss and the worst client's, a line for each group that has clients' own models, and for local-only."""
    shown = [group for group in comparison.groups if group.measured("worst_client")]
    shared = [group for group in comparison.trained if group not in shown][:MAX_CATEGORIES]
    if not shown:
        return None
    groups = [group for group in comparison.groups if group in shown or group in shared]
    with drawing():
        figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(groups)))
        axes = figure.add_subplot()
        for height, group in enumerate(groups):
            colour = COLOURS["local" if group.is_baseline else "federated"]
            loss, worst = group.mean("response_loss"), group.mean("worst_client")
            if loss is not None and worst is not None:
                axes.hlines(height, loss, worst, color=colour, linewidth=1.6)
            if worst is not None:
                ring = {"s": 44, "facecolor": COLOURS["card"], "edgecolor": colour, "linewidth": 1.4, "zorder": 3}
                axes.scatter(worst, height, **ring, label=None if height else "Worst client")
            if loss is not None:
                axes.scatter(loss, height, s=30, color=colour, linewidth=0, zorder=3, label=None)
        axes.set_yticks(range(len(groups)), [clip(" · ".join(group.choices.values()), 30) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        metric_axis(axes, "response_loss")
        return inline_svg(figure, "worst", f"Mean loss and the worst client's of {len(groups)} groups")


# ---------------------------------------------------------------------------------------------------------- helpers


def _curves(group: Group, key: str) -> tuple[list[int], np.ndarray]:
    """Return the rounds of which all runs with a curve have a loss, and the losses [runs, rounds]."""
    curves = [run.values["curve"] for run in group.runs if "curve" in run.values]
    losses = [dict(zip(curve["round"], curve[key], strict=True)) for curve in curves]
    rounds = [each for each in losses[0] if all(curve.get(each) is not None for curve in losses)] if losses else []
    return rounds, np.array([[curve[each] for each in rounds] for curve in losses])


def _bytes_and_losses(group: Group) -> np.ndarray:
    """Return a line for each run that has both: bytes, loss."""
    pairs = [[run.values.get("bytes"), run.values.get("response_loss")] for run in group.runs]
    return np.array([pair for pair in pairs if all(pair)])


def _frontier(points: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the points (bytes, loss) that no other one beats in both, by bytes."""
    best: list[np.ndarray] = []
    for point in sorted(points, key=lambda point: (point[0], point[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _ticks(values: Sequence[float]) -> list[float]:
    """Return where a logarithmic axis is labelled: at powers of ten; over less than two of them at 1, 2 and 5 times."""
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = (1,) if high - low >= 2 else (1, 2, 5)
    return [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]


def _name(comparison: Comparison, group: Group) -> str:
    """Return a group's name in a figure; below the name of the one key that distinguishes it, the key's value."""
    return clip(group.label if len(comparison.axes) > 1 else next(iter(group.choices.values())), 44)


def _style(comparison: Comparison, series: Series, group: Group) -> dict[str, Any]:
    if group.label not in series:
        return {"color": COLOURS["muted"], "marker": ".", "alpha": 0.4, "zorder": 1}
    index = series[group.label]
    return {"color": COLOURS[f"series{index}"], "marker": MARKERS[index], "label": _name(comparison, group)}


def _figure(series: Series) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 2.9 + 0.17 * len(series)))
    return figure, figure.add_subplot()


def _legend(comparison: Comparison, figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) <= 22 else 1
    title = comparison.axes[0] if len(comparison.axes) == 1 else None
    style: dict[str, Any] = {"handlelength": 1.6, "columnspacing": 1.2, "title": title, "alignment": "left"}
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, **style)


def _baseline_lines(comparison: Comparison, draw: Callable[..., object]) -> None:
    """Draw where local-only and centralised training end; those of several references would say nothing."""
    for name in ("local", "central"):
        found = [group for group in comparison.groups if group.model == name]
        if len(found) == 1 and (loss := found[0].mean("response_loss")) is not None:
            draw(loss, color=COLOURS[name], linestyle=LINE_STYLES[name], linewidth=1.4, label=MODEL_LABELS[name])
