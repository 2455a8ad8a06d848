"""Groups of runs -> what differs between each and its reference, seed by seed and row by row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedit.comparison.groups import Comparison, Difference, Group, MeasuredRun
from fedit.comparison.measures import BASELINES, GONE
from fedit.comparison.pairing import SCORES, Answers, Pair, paired_interval, read_answers
from fedit.report import RunFolder
from fedit.report.format import MODEL_LABELS

OTHER_ROWS = "other test rows"
NO_ANSWERS = "answers are gone, so the test rows are not known"


def compare(
    title: str, groups: Sequence[Group], known: Mapping[tuple[str, str], Difference] | None = None
) -> Comparison:
    """Return the groups with what follows from their references, and the references' baselines as further groups.

    `known` has differences by label and model: their intervals hold where the answers of a run are gone.

    Raises:
        DataError: the answers of a run are damaged.
    """
    by_label = {group.label: group for group in groups}
    related = [_related(group, by_label.get(group.reference)) for group in groups]
    for group in list(related):
        if group.label == group.reference:
            related += _baselines(group, groups)
    read: dict[Path, Answers | None] = {}

    def answers(run: MeasuredRun) -> Answers | None:
        if run.folder not in read:
            there = (run.folder / "config.json").is_file()
            read[run.folder] = read_answers(RunFolder.read(run.folder)) if there else None
        return read[run.folder]

    result = []
    for group in related:
        reference = by_label.get(group.reference)
        if reference is not None and (group.is_baseline or group.label != reference.label):
            earlier = (known or {}).get((group.label, group.model))
            group = replace(group, difference=_difference(group, reference, answers, earlier))
        result.append(group)
    return Comparison(title, list(groups[0].choices) if groups else [], result)


def _related(group: Group, reference: Group | None) -> Group:
    """Return the group with the differences of its losses to the reference's, and the gap that it closes."""
    others = {} if reference is None else {run.seed: run for run in reference.runs}
    runs = []
    for run in group.runs:
        values = {name: value for name, value in run.values.items() if name not in {"difference", "gap_closed"}}
        other = others.get(run.seed)
        if other is not None and _why_unpaired(run, other) is None:
            missing = [name for name in BASELINES if name in other.values and name not in values]
            values |= {name: other.values[name] for name in missing}
            if reference is not group and "response_loss" in values and "response_loss" in other.values:
                values["difference"] = values["response_loss"] - other.values["response_loss"]
        loss, local, central = (values.get(name) for name in ("response_loss", "local", "central"))
        if loss is not None and local is not None and central is not None and local > central:
            values["gap_closed"] = (local - loss) / (local - central)
        runs.append(replace(run, values=values))
    return replace(group, runs=runs)


def _why_unpaired(run: MeasuredRun, other: MeasuredRun) -> str | None:
    """Return why losses of two runs of one seed do not compare; None: they do."""
    if run.folder == other.folder:
        return None
    if GONE in {run.values.get("test_rows"), other.values.get("test_rows")}:
        return NO_ANSWERS
    if run.values.get("test_rows") != other.values.get("test_rows"):
        return OTHER_ROWS
    if run.values.get("test_tokens") != other.values.get("test_tokens"):
        return "another tokenizer, so losses per token do not compare"
    return None


def _baselines(reference: Group, groups: Sequence[Group]) -> list[Group]:
    """Return a reference's base and baselines as groups, named in the column in which others differ from it."""
    own = [group for group in groups if group.reference == reference.label]
    differing = [axis for axis, value in reference.choices.items() if any(each.choices[axis] != value for each in own)]
    column = differing[0] if differing else next(iter(reference.choices))
    result = []
    for name in BASELINES:
        runs = []
        for run in reference.runs:
            if name not in run.values:
                continue
            values = {key: run.values[key] for key in ("test_rows", "test_tokens", "command") if key in run.values}
            values["response_loss"] = run.values[name]
            if "response_loss" in run.values:
                values["difference"] = run.values[name] - run.values["response_loss"]
            values |= {
                key.removeprefix(f"{name}_"): value for key, value in run.values.items() if key.startswith(f"{name}_")
            }
            runs.append(replace(run, values=values))
        if runs:
            label = MODEL_LABELS[name] if differing else f"{MODEL_LABELS[name]} of {reference.choices[column]}"
            choices = {**reference.choices, column: label}
            result.append(Group(" · ".join(choices.values()), choices, runs, {}, reference.label, name))
    return result


def _difference(
    group: Group, reference: Group, answers: Callable[[MeasuredRun], Answers | None], known: Difference | None
) -> Difference:
    others = {run.seed: run for run in reference.runs}
    reasons: dict[str, list[int]] = {}
    found: dict[str, list[tuple[MeasuredRun, MeasuredRun]]] = {metric: [] for metric in SCORES}
    for run in group.runs:
        other = others.get(run.seed)
        reason = "the reference has no such seed" if other is None else _why_unpaired(run, other)
        if other is not None and reason not in {OTHER_ROWS, NO_ANSWERS}:
            both = [metric for metric in SCORES if metric in run.values and metric in other.values]
            if reason is None and "response_loss" not in both:
                reason = "a loss is not finite"
            for metric in both:
                if metric != "response_loss" or reason is None:
                    found[metric].append((run, other))
        if reason is not None:
            reasons.setdefault(reason, []).append(run.seed)
    metrics = {}
    for metric, pairs in found.items():
        if not pairs:
            continue
        by_seed = [run.values[metric] - other.values[metric] for run, other in pairs]
        seeds = [run.seed for run, _ in pairs]
        scores = _scores(metric, group.model, pairs, answers)
        earlier = {} if known is None else known.metrics.get(metric, {})
        interval = earlier.get("interval") if earlier.get("by_seed") == by_seed else None
        if scores is not None:
            interval = paired_interval(scores)
        elif interval is None:
            reasons["no interval, for answers are gone"] = seeds
        metrics[metric] = {
            "seeds": seeds,
            "by_seed": by_seed,
            "mean": statistics.fmean(by_seed),
            "deviation": statistics.stdev(by_seed) if len(by_seed) > 1 else None,
            "interval": interval,
        }
    return Difference(metrics, [f"{reason} (seed {', '.join(map(str, seeds))})" for reason, seeds in reasons.items()])


def _scores(
    metric: str,
    model: str,
    pairs: Sequence[tuple[MeasuredRun, MeasuredRun]],
    answers: Callable[[MeasuredRun], Answers | None],
) -> list[Pair] | None:
    """Return the rows of each seed's two models; None: the answers of a run are gone."""
    result = []
    for run, other in pairs:
        ours, theirs = answers(run), answers(other)
        if ours is None or theirs is None:
            return None
        differences = ours.scores[model][metric] - theirs.scores["federated"][metric]
        sizes = ours.num_tokens if metric == "response_loss" else np.ones(len(ours.rows))
        result.append(Pair(ours.rows, differences, sizes))
    return result
