"""What a judge said: results of ``judge.json`` as tables and sentences, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from fedit.report.format import MISSING, clip, interval, number, percent, signed, signed_interval

if TYPE_CHECKING:
    from rich.console import RenderableType

Result = Mapping[str, Any]
Cell = tuple[str, str]
"""What a cell of a table says, and its small print"""
GRADE_HEADERS = ("Model", "Grade", "By turn")


def verdicts(judged: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Return what the page's section shows of each result."""
    return [
        {
            "title": f"{result['questions']}: {_title(result)}",
            "headers": _headers(result),
            "rows": _rows(result),
            "grade_headers": GRADE_HEADERS,
            "grades": _grades(result),
            "sentences": sentences(result),
        }
        for result in judged.values()
    ]


def verdict_tables(result: Result) -> list[RenderableType]:
    """Return the grades, where single answers were graded, the comparisons, and what has to be known about them."""
    tables = []
    if grades := _grades(result):
        tables.append(_table("Grades from 1 to 10", GRADE_HEADERS, grades))
    title = f"{_title(result)}, 95% bootstrap intervals over questions"
    tables.append(_table(title, _headers(result), _rows(result)))
    return [*tables, *(Text(sentence, style="yellow") for sentence in sentences(result))]


def _title(result: Result) -> str:
    how = result["parameters"].get("local")
    return f"{result['num_questions']:,} questions, judged by {result['judge']}{f' ({how})' if how else ''}"


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(headers[0], overflow="fold")
    for header in headers[1:]:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text("\n".join(filter(None, cell))) for cell in row))
    return table


def sentences(result: Result) -> list[str]:
    """Return what a reader has to know about the numbers."""
    replies, found = result["replies"], []
    if replies["without_scores"]:
        found.append(
            f"{replies['without_scores']:,} of {replies['wanted']:,} replies held no scores: their questions are left "
            "out."
        )
    if replies["missing"]:
        why = f" ({clip(replies['why_missing'][0], 200)})" if replies["why_missing"] else ""
        found.append(
            f"{replies['missing']:,} of {replies['wanted']:,} requests got no reply{why}: their questions are left "
            "out, and the same command asks again."
        )
    if replies["cut"]:
        found.append(f"{replies['cut']:,} replies were cut at the most tokens that a reply may have.")
    if result["num_orders"] == 1:
        found.append(
            "One order only, this model's answer first: what a judge gives for the place alone is not averaged out."
        )
    return found


def _headers(result: Result) -> list[str]:
    if result["protocol"] == "single":
        return ["Model", "Difference", "Won, tied, lost"]
    return ["Model", "Relative score", "Scores", "Won, tied, lost", "Orders agree"]


def _rows(result: Result) -> list[list[Cell]]:
    rows = []
    for each in result["comparisons"]:
        row: list[Cell] = [(each["ours"], f"against {each['baseline']}")]
        won = (f"{each['wins']}, {each['ties']}, {each['losses']}", _left_out(each))
        if result["protocol"] == "single":
            row += [(signed("grade", each["difference"]), signed_interval("grade", each["confidence"])), won]
        else:
            scores = [MISSING] if each["mean_scores"] is None else [number(score, 2) for score in each["mean_scores"]]
            first = each["first_minus_second"]
            row += [
                (percent(each["relative_score"]), interval("exact_match", each["confidence"])),
                (" : ".join(scores), ""),
                won,
                (percent(each["orders_agree"]), "" if first is None else f"first {signed('points', first)}"),
            ]
        rows.append(row)
    return rows


def _grades(result: Result) -> list[list[Cell]]:
    return [
        [
            (name, _left_out(each)),
            (number(each["grade"]), interval("grade", each["confidence"])),
            (", ".join(number(grade, 2) for grade in each["by_turn"]), ""),
        ]
        for name, each in result.get("models", {}).items()
    ]


def _left_out(each: Mapping[str, Any]) -> str:
    return f"{each['num_left_out']} left out" if each["num_left_out"] else ""
