"""The figures of the report. Each function takes parsed JSON and returns an inline SVG, or None without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedit.report.format import METRIC_LABELS, MODEL_LABELS, clip
from fedit.report.svg import COLOURS, WIDTH, drawing, inline_svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

MAX_CATEGORIES = 20
MAX_NAMED_CLIENTS = 30
NO_LOSS = 1e-6
LINE_STYLES = {"base": ":", "local": (0, (4, 2)), "central": (0, (6, 2, 1, 2)), "federated": "-"}


def categories_figure(evaluation: Mapping[str, Any], metric: str) -> Markup | None:
    """Horizontal bars: one group for each category, one bar for each model, whiskers for the 95% intervals."""
    models = {name: model for name, model in evaluation.get("models", {}).items() if metric in model}
    models = {name: models[name] for name in MODEL_LABELS if name in models}
    if not models:
        return None
    sizes = {name: rows for name, rows in evaluation["num_test_rows"].items() if name != "all"}
    categories = ["all", *sorted(sizes, key=lambda name: -sizes[name])[:MAX_CATEGORIES]]
    if len(sizes) == 1:
        categories = ["all"]
    thickness = 0.8 / len(models)
    with drawing():
        figure = Figure(figsize=(WIDTH, 0.9 + len(categories) * (0.12 + 0.13 * len(models))))
        axes = figure.add_subplot()
        for place, (name, model) in enumerate(models.items()):
            positions = np.arange(len(categories)) - 0.4 + (place + 0.5) * thickness
            values = [_finite(model[metric].get(category)) for category in categories]
            axes.barh(positions, values, thickness * 0.9, color=COLOURS[name], label=MODEL_LABELS[name])
            bounds = model["confidence"].get(metric, {})
            pairs = zip(positions, categories, strict=True)
            known = [(position, *bounds[category]) for position, category in pairs if category in bounds]
            if known:
                axes.hlines(*np.array(known).T, color=COLOURS["card"], linewidth=2.2)
                axes.hlines(*np.array(known).T, color=COLOURS["ink"], linewidth=0.9)
        axes.set_yticks(range(len(categories)), ["all rows", *(clip(name, 24) for name in categories[1:])])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(categories) - 0.5, -0.6)
        if len(categories) > 1:
            axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.6)
        axes.grid(axis="x")
        metric_axis(axes, metric)
        axes.set_xlim(0, min(1, axes.get_xlim()[1]) if metric != "response_loss" else None)
        _legend(figure, axes)
        label = f"{METRIC_LABELS[metric]} by category for {', '.join(MODEL_LABELS[name] for name in models)}"
        return inline_svg(figure, f"categories-{metric}", label)


def loss_figure(rounds: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> Markup | None:
    """Training and held-out loss of the federated model over the rounds; the other models as horizontal lines."""
    if not rounds:
        return None
    with drawing():
        figure = Figure(figsize=(WIDTH, 3.1))
        axes = figure.add_subplot()
        _line(axes, rounds, "train_loss", label="Federated, training", linewidth=1, alpha=0.5)
        _line(axes, rounds, "test_loss", label="Federated, held-out", linewidth=1.8)
        for name in ("base", "local", "central"):
            loss = evaluation.get("models", {}).get(name, {}).get("response_loss", {}).get("all")
            if loss is not None:
                label = f"{MODEL_LABELS[name]}, held-out"
                axes.axhline(loss, color=COLOURS[name], linestyle=LINE_STYLES[name], linewidth=1.4, label=label)
        round_axis(axes)
        axes.set_ylabel("Loss per response token (nats)")
        axes.grid(axis="y")
        _legend(figure, axes, columns=2)
        return inline_svg(figure, "loss", "Training and held-out loss of the federated model over the rounds")


def privacy_figure(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What each bit of epsilon bought: the losses over what the rounds had spent by then."""
    spent = [entry for entry in rounds if entry.get("epsilon") is not None]
    if not any(entry.get(key) is not None for entry in spent for key in ("train_loss", "test_loss")):
        return None
    with drawing():
        figure = Figure(figsize=(WIDTH, 3.1))
        axes = figure.add_subplot()
        _line(axes, spent, "train_loss", "epsilon", label="Federated, training", linewidth=1, alpha=0.5)
        _line(axes, spent, "test_loss", "epsilon", label="Federated, held-out", linewidth=1.8)
        axes.set_xlim(0, None)
        axes.set_xlabel("Epsilon spent")
        axes.set_ylabel("Loss per response token (nats)")
        axes.grid(axis="y")
        _legend(figure, axes, columns=2)
        return inline_svg(figure, "privacy", "Training and held-out loss over the epsilon spent")


def aggregation_figure(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What the aggregation rule lost in each round; None: it lost nothing but rounding errors."""
    largest = max((entry.get("aggregation_loss") or 0 for entry in rounds), default=0)
    if largest < NO_LOSS:
        return None
    with drawing():
        figure = Figure(figsize=(WIDTH, 3.1))
        axes = figure.add_subplot()
        _line(axes, rounds, "aggregation_loss", linewidth=1.8)
        round_axis(axes)
        axes.set_ylim(0, 1.08 * largest)
        axes.set_ylabel("Aggregation loss")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.grid(axis="y")
        return inline_svg(figure, "aggregation", "Aggregation loss over the rounds")


def clients_figure(evaluation: Mapping[str, Any]) -> Markup | None:
    """Each local-only client's loss as a point, the other models as vertical lines, the worst client marked."""
    models = evaluation.get("models", {})
    per_client = models.get("local", {}).get("per_client", {})
    losses = {client: model["response_loss"]["all"] for client, model in per_client.items()}
    losses = {client: losses[client] for client in losses if losses[client] is not None}
    if not losses:
        return None
    best_first = sorted(losses, key=losses.__getitem__)
    named = len(best_first) <= MAX_NAMED_CLIENTS
    with drawing():
        figure = Figure(figsize=(WIDTH, 1.3 + 0.2 * len(best_first) if named else 3.0))
        axes = figure.add_subplot()
        for name in ("local", "central", "federated"):
            loss = models.get(name, {}).get("response_loss", {}).get("all")
            if loss is not None:
                label = f"{MODEL_LABELS[name]}{', mean' if name == 'local' else ''}"
                axes.axvline(loss, color=COLOURS[name], linestyle=LINE_STYLES[name], linewidth=1.4, label=label)
        heights = np.arange(len(best_first)) if named else _spread(len(best_first))
        if named:
            for height, client in zip(heights, best_first, strict=True):
                bounds = per_client[client]["confidence"]["response_loss"].get("all")
                if bounds:
                    axes.hlines(height, *bounds, color=COLOURS["local"], linewidth=1)
            axes.set_yticks(heights, [clip(client, 20) for client in best_first])
        else:
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        values = [losses[client] for client in best_first]
        point = {"s": 22 if named else 9, "color": COLOURS["local"], "linewidth": 0, "alpha": 1 if named else 0.6}
        axes.scatter(values, heights, **point, label="One local-only client")
        ring = {"s": 70, "facecolor": "none", "edgecolor": COLOURS["ink"], "linewidth": 1.2, "zorder": 3}
        axes.scatter(values[-1:], heights[-1:], **ring, label="Worst client")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.margins(x=0.06, y=0.04 if named else 0.08)
        metric_axis(axes, "response_loss")
        _legend(figure, axes, columns=2)
        return inline_svg(figure, "clients", f"Held-out loss of {len(best_first)} local-only clients")


def partition_figure(partition: Mapping[str, Any]) -> Markup | None:
    """Who holds what: bubbles, client by category; for many clients an image of shares under their sizes."""
    clients = partition.get("clients", {})
    if not any(holding["categories"] for holding in clients.values()):
        return None  # of real sites, which tell how many rows they have and no more
    if not clients:
        return None
    totals: dict[str, int] = {}
    for holding in clients.values():
        for category, rows in holding["categories"].items():
            totals[category] = totals.get(category, 0) + rows
    categories = sorted(totals, key=lambda name: -totals[name])
    shown = categories if len(categories) <= MAX_CATEGORIES else categories[: MAX_CATEGORIES - 1]
    rows = np.array([[holding["categories"].get(name, 0) for name in shown] for holding in clients.values()], float)
    if len(shown) < len(categories):
        others = np.array([holding["rows"] for holding in clients.values()]) - rows.sum(axis=1)
        rows, shown = np.column_stack([rows, others]), [*shown, "(all others)"]
    with drawing():
        figure = _bubbles(list(clients), shown, rows) if len(clients) <= MAX_NAMED_CLIENTS else _shares(shown, rows)
        return inline_svg(figure, "partition", f"Rows of {len(clients)} clients by category")


def _bubbles(clients: Sequence[str], categories: Sequence[str], rows: np.ndarray) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.6 + 0.24 * len(clients)))
    axes = figure.add_subplot()
    client_index, category_index = np.nonzero(rows)
    held = rows[client_index, category_index]
    room = min(0.24, 3.4 / len(categories)) * 72  # points between two neighbours
    largest = (0.95 * room) ** 2
    axes.scatter(category_index, client_index, s=largest * held / rows.max(), color=COLOURS["federated"], linewidth=0)
    axes.set_xlim(-0.6, len(categories) - 0.4)
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_yticks(range(len(clients)), [clip(client, 18) for client in clients])
    axes.set_xticks(range(len(categories)), [clip(name, 24) for name in categories], rotation=40, ha="right")
    axes.tick_params(length=0)
    axes.grid()
    totals = axes.secondary_yaxis("right")
    totals.set_yticks(range(len(clients)), [f"{total:,.0f}" for total in rows.sum(axis=1)])
    totals.tick_params(length=0)
    totals.spines["right"].set_visible(False)
    totals.set_ylabel("Rows in all", rotation=270, labelpad=12)
    return figure


def _shares(categories: Sequence[str], rows: np.ndarray) -> Figure:
    """Sort the clients by their largest category, then by size, and draw one column for each."""
    order = np.lexsort((-rows.sum(axis=1), rows.argmax(axis=1)))
    rows = rows[order]
    shares = rows / np.maximum(1, rows.sum(axis=1, keepdims=True))
    figure = Figure(figsize=(WIDTH, 1.9 + 0.22 * len(categories)))
    sizes_axes, shares_axes = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [1, max(1.2, 0.25 * len(categories))]}
    )
    edges = np.arange(len(rows) + 1) - 0.5
    sizes_axes.stairs(rows.sum(axis=1), edges, fill=True, color=COLOURS["muted"])
    sizes_axes.set_ylabel("Rows")
    sizes_axes.grid(axis="y")
    sizes_axes.tick_params(axis="x", length=0)
    image = np.empty((len(categories), len(rows), 4))
    image[..., :3] = np.array([0x1F, 0x77, 0xC4]) / 255  # seen on light and on dark: the share is in the opacity
    image[..., 3] = shares.T
    extent = (-0.5, len(rows) - 0.5, len(categories) - 0.5, -0.5)
    shares_axes.imshow(image, aspect="auto", interpolation="nearest", extent=extent)
    shares_axes.set_yticks(range(len(categories)), [clip(name, 20) for name in categories])
    shares_axes.tick_params(axis="y", length=0)
    shares_axes.set_xticks([])
    shares_axes.set_xlabel(f"{len(rows):,} clients, sorted by largest category, then by rows")
    return figure


def _finite(value: float | None) -> float:
    return np.nan if value is None else value


def _line(axes: Axes, rounds: Sequence[Mapping[str, Any]], key: str, over: str = "round", **style: Any) -> None:
    points = [(entry[over], entry[key]) for entry in rounds if entry.get(key) is not None]
    marker = "o" if len(points) <= MAX_NAMED_CLIENTS else ""
    if points:
        axes.plot(*zip(*points, strict=True), color=COLOURS["federated"], marker=marker, markersize=3, **style)


def round_axis(axes: Axes) -> None:
    """Number the x-axis by whole rounds."""
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def metric_axis(axes: Axes, metric: str) -> None:
    """Give the x-axis the name and unit of a metric."""
    if metric == "exact_match":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    unit = " (nats per token)" if metric == "response_loss" else ""
    axes.set_xlabel(f"{METRIC_LABELS[metric]}{unit}")


def _legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)


def _spread(count: int) -> np.ndarray:
    """Return heights in [0, 1) that keep neighbours apart: the fractional parts of multiples of the golden ratio."""
    return np.arange(count) * 0.6180339887498949 % 1
