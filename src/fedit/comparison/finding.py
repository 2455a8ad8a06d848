"""A comparison in words. It claims a difference only where the paired interval and every seed agree."""

from __future__ import annotations

from collections.abc import Sequence

from fedit.comparison.groups import Comparison, Group
from fedit.report.format import number, percent

MAX_NAMED = 4
"""Groups that are named one by one; more are counted."""


def state_differences(comparison: Comparison) -> str:
    """Return a few sentences made from the groups' losses and their differences to their references."""
    finished = [group for group in comparison.trained if group.mean("response_loss") is not None]
    if not finished:
        return "No run has a finite response loss."
    sentences = []
    for reference in finished:
        others = [group for group in finished if group.reference == reference.label and group is not reference]
        if others or len(finished) == 1:
            sentences += [_against(reference, others), _gap(reference)]
    if len(sentences) == 0:
        best = min(finished, key=lambda group: group.mean("response_loss") or 0.0)
        return f"Of {len(finished)} groups, {best.label} has the lowest loss: {number(best.mean('response_loss'))}."
    return " ".join(filter(None, sentences))


def _against(reference: Group, others: Sequence[Group]) -> str:
    loss = f"{reference.label} (response loss {number(reference.mean('response_loss'))})"
    if not others:
        return f"The mean response loss of {reference.label} is {number(reference.mean('response_loss'))}."
    if len(others) <= MAX_NAMED:
        return f"Against {loss}: {'; '.join(map(_name, others))}."
    lower, higher, open_ = ([group for group in others if _direction(group) == way] for way in (-1, 1, 0))
    text = f"Of {len(others)} others, {len(lower)} have a lower loss than {loss}, {len(higher)} a higher one, "
    text += f"{len(open_)} cannot be told apart from it."
    if lower:
        best = min(lower, key=lambda group: group.mean("difference") or 0.0)
        text += f" Furthest below: {_name(best)}."
    return text


def _direction(group: Group) -> int:
    return 0 if group.difference is None else group.difference.direction


def _name(group: Group) -> str:
    found = {} if group.difference is None else group.difference.metrics.get("response_loss", {})
    if not found:
        return f"{group.label} cannot be compared"
    shown = (
        "" if found["interval"] is None else f" (95% interval {' to '.join(number(x, 4) for x in found['interval'])})"
    )
    if _direction(group) == 0:
        return f"{group.label} cannot be told apart{shown}"
    way = "lower" if found["mean"] < 0 else "higher"
    return f"{group.label} is {way} by {number(abs(found['mean']), 4)}{shown}"


def _gap(reference: Group) -> str:
    closed = reference.mean("gap_closed")
    if closed is None:
        return ""
    return f"{reference.label} closes {percent(closed, 0)} of the gap between local-only and centralised training."
