"""A comparison as text: headings and cells, Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable

from fedit.comparison.groups import Comparison, Group
from fedit.comparison.measures import MEASURES, Measure
from fedit.config import override_value
from fedit.report.format import MISSING, count, number, size

NO_COLUMN = ("curve", "by_category", "folder", "command")


def shown_measures(comparison: Comparison) -> dict[str, Measure]:
    """Return the measures that any group has."""
    return {name: each for name, each in MEASURES.items() if any(group.measured(name) for group in comparison.groups)}


def plain(measure: Measure, value: float) -> str:
    """Return one value of a measure as people read it, a percentage without its sign."""
    if measure.unit == "bytes":
        return size(value)
    if measure.unit == "count":
        return count(value)
    return number(100 * value if measure.unit == "percent" else value, measure.digits)


def heading(measure: Measure) -> str:
    """Return the heading of a column with its unit."""
    return f"{measure.heading}, %" if measure.unit == "percent" else measure.heading


def mean_and_deviation(group: Group, name: str) -> str:
    """Return the mean over the runs ± their standard deviation, and of how many runs where some have no such value."""
    values, measure = group.measured(name), MEASURES[name]
    if not values:
        return MISSING
    text = plain(measure, statistics.fmean(values))
    deviation = statistics.stdev(values) if len(values) > 1 and measure.unit in {"plain", "percent"} else 0.0
    if deviation:
        text += f" ± {plain(measure, deviation)}"
    expected = group.seeds if name != "difference" or group.difference is None else values
    return text if len(values) == len(expected) else f"{text} ({len(values)} of {len(expected)})"


def interval_text(group: Group, metric: str = "response_loss", join: str = " to ") -> str:
    """Return the 95% interval of a group's difference to its reference; none: an empty text."""
    metrics = {} if group.difference is None else group.difference.metrics
    bounds = metrics.get(metric, {}).get("interval")
    measure = MEASURES["difference" if metric == "response_loss" else metric]
    return "" if bounds is None else join.join(plain(measure, each) for each in bounds)


def table(comparison: Comparison, *, details: bool = True) -> tuple[list[str], list[list[str]]]:
    """Return headings and lines of the table: a line for each group, means ± standard deviations over seeds, and of the
    difference to the reference the 95% interval. Measures that no group has are left out, and `details` where asked.
    """
    shown = {name: each for name, each in shown_measures(comparison).items() if details or not each.is_detail}
    lines = []
    for group in comparison.groups:
        cells = []
        for name in shown:
            cell = mean_and_deviation(group, name)
            bounds = interval_text(group) if name == "difference" else ""
            cells.append(f"{cell} ({bounds})" if bounds else cell)
        lines.append([*group.choices.values(), str(len(group.runs)), *cells])
    return [*comparison.axes, "Seeds", *map(heading, shown.values())], lines


def to_markdown(comparison: Comparison) -> str:
    """Return the table, and what it leaves out, as Markdown."""
    headings, lines = table(comparison)
    rows = [headings, ["---"] * len(headings), *lines]
    text = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
    return text + "".join(f"\n{note}\n" for note in notes(comparison))


def notes(comparison: Comparison) -> list[str]:
    """Return why something is left out of the differences, and of which groups."""
    groups: dict[str, list[str]] = {}
    for group in comparison.groups:
        for note in () if group.difference is None else group.difference.notes:
            groups.setdefault(note, []).append(group.label)
    return [f"Difference, {note}: {', '.join(labels)}." for note, labels in groups.items()]


def to_csv(comparison: Comparison) -> str:
    """Return a line for each run: choices, what else its configuration differs in, seed, measures, folder, command."""
    runs = [(group, run) for group in comparison.trained for run in group.runs]
    names = [name for name in MEASURES if any(name in run.values for _, run in runs)]
    names += [name for name in dict.fromkeys(key for _, run in runs for key in run.values)
              if name not in names and name not in NO_COLUMN]  # fmt: skip
    settings = [key for key in comparison.differing() if key not in comparison.axes]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*comparison.axes, *settings, "seed", *names, "folder", "command"])
    for group, run in runs:
        told = [override_value(group.settings[key]) if key in group.settings else "" for key in settings]
        values = [run.values.get(name, "") for name in names]
        writer.writerow([*group.choices.values(), *told, run.seed, *values, run.folder, run.values.get("command", "")])
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ LaTeX

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "\n": " ", MISSING: "--", "\N{MINUS SIGN}": r"\textminus{}"}
_SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
_LATEX = str.maketrans(_SPECIAL)


def escape(text: str) -> str:
    """Return text as LaTeX prints it."""
    return text.translate(_LATEX)


def to_latex(comparison: Comparison) -> str:
    """Return a table for the package booktabs; the best mean of each reference's groups is bold, ties too."""
    shown = shown_measures(comparison)
    num_choices = len(comparison.axes)
    headings = [*comparison.axes, "Seeds", *map(heading, shown.values())]
    lines = [
        "% Needs \\usepackage{booktabs}. Means and standard deviations over seeds; differences to the reference with",
        "% 95% intervals of a paired bootstrap over test rows. The runs and their commands stand below the table.",
        f"\\begin{{tabular}}{{{'l' * num_choices}{'r' * (len(headings) - num_choices)}}}",
        "\\toprule",
        _row(map(escape, headings)),
        "\\midrule",
    ]
    best = {name: best_groups(comparison, name) for name in shown}
    for index, group in enumerate(comparison.groups):
        if index and group.is_baseline and not comparison.groups[index - 1].is_baseline:
            lines.append("\\midrule")
        cells = [_latex_cell(group, name, is_best=index in best[name]) for name in shown]
        lines.append(_row([*map(escape, group.choices.values()), str(len(group.runs)), *cells]))
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"% {' '.join(note.split())}" for note in notes(comparison)]
    for group in comparison.trained:
        for run in group.runs:
            command = " ".join(str(run.values.get("command", "command not recorded")).split())
            lines.append(f"% {' '.join(group.label.split())}, seed {run.seed}: {run.folder}: {command}")
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    row = " & ".join(cells) + r" \\"
    return "{}" + row if row.startswith(("[", "*")) else row  # the line before would take it for its argument


def _latex_cell(group: Group, name: str, *, is_best: bool) -> str:
    values, measure = group.measured(name), MEASURES[name]
    if not values:
        return "--"
    if measure.unit not in {"plain", "percent"}:
        return escape(plain(measure, statistics.fmean(values))).replace(" ", "\\,")
    text = mean_and_deviation(group, name).replace("\N{MINUS SIGN}", "-").replace(" ± ", r" \pm ").replace(",", "{,}")
    text, _, seeds = text.partition(" (")
    mean, _, rest = text.partition(" ")
    text = f"$\\mathbf{{{mean}}}{' ' + rest if rest else ''}$" if is_best else f"${text}$"
    text += f" ({seeds}" if seeds else ""
    bounds = interval_text(group, join="$, $").replace("\N{MINUS SIGN}", "-") if name == "difference" else ""
    return f"{text} {{\\scriptsize [${bounds}$]}}" if bounds else text


def best_groups(comparison: Comparison, name: str) -> set[int]:
    """Return which groups have the best mean, as it is printed, among those with the same reference."""
    measure = MEASURES[name]
    if measure.better == 0:
        return set()
    means: dict[str, dict[int, float]] = {}
    for index, group in enumerate(comparison.groups):
        mean = group.mean(name)
        if mean is not None and not group.is_baseline:
            means.setdefault(group.reference if group.reference in comparison.references else "", {})[index] = mean
    found: set[int] = set()
    for each in means.values():
        if len(each) > 1:
            best = plain(measure, (max if measure.better > 0 else min)(each.values()))
            found |= {index for index, mean in each.items() if plain(measure, mean) == best}
    return found
