"""The same numbers for the terminal: functions that return rich renderables and print nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedit.report.format import METRIC_LABELS, MODEL_LABELS, count, interval, metric, percent

MAX_CLIENTS = 20
NOTEBOOK_WIDTH = 115
"""Characters"""


def final_table(evaluation: Mapping[str, Any]) -> RenderableType:
    """Return the models of ``evaluation.json`` with their metrics, 95% intervals and training tokens."""
    models = evaluation.get("models", {})
    metrics = [name for name in METRIC_LABELS if any(name in model for model in models.values())]
    table = Table(title="Held-out rows, 95% bootstrap intervals", title_justify="left")
    table.add_column("Model", no_wrap=True)
    for name in metrics:
        table.add_column(METRIC_LABELS[name], justify="right")
    table.add_column("Training tokens", justify="right")
    for name, model in models.items():
        cells = []
        for each in metrics:
            bounds = interval(each, model["confidence"].get(each, {}).get("all"))
            value = metric(each, model[each]["all"]) if each in model else metric(each, None)
            cells.append(f"{value}\n{bounds}" if bounds else value)
        table.add_row(
            Text(str(MODEL_LABELS.get(name, name))),
            *cells,
            _tokens(name, model),
            style="bold" if name == "federated" else "",
        )
    closed = evaluation.get("gap_closed")
    if closed is not None:
        bounds = interval("exact_match", evaluation.get("gap_closed_confidence"))
        table.caption = f"Loss gap closed: {percent(closed)}{f' ({bounds})' if bounds else ''}"
        table.caption_justify = "left"
    return Group(table, *_unseen_lines(evaluation))


def as_html(shown: RenderableType) -> str:
    """Return what a terminal would show, for a notebook."""
    console = Console(file=io.StringIO(), record=True, width=NOTEBOOK_WIDTH, force_jupyter=False)
    console.print(shown)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _unseen_lines(evaluation: Mapping[str, Any]) -> list[Text]:
    """Return the losses on what no model was trained on, a line for clients and one for categories."""
    lines = []
    for what in ("clients", "categories"):
        models = evaluation.get(f"unseen_{what}", {}).get("models", {})
        losses = ", ".join(
            f"{MODEL_LABELS.get(name, name)} {metric('response_loss', model['response_loss']['all'])}"
            for name, model in models.items()
        )
        lines += [Text(f"Response loss on unseen {what}: {losses}")] if losses else []
    return lines


def _tokens(name: str, model: Mapping[str, Any]) -> str:
    """Return the training tokens; of local-only, the mean of so many models."""
    clients = model.get("per_client") if name == "local" else None
    return f"{len(clients)} × {count(model['tokens'])}" if clients else count(model["tokens"])


def comparison_table(headings: Sequence[str], lines: Sequence[Sequence[str]], num_choices: int) -> RenderableType:
    """Return the table of a comparison; deviations and intervals stand below their means. The first `num_choices` cells
    of a line are its name.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(Text("\n".join(headings[:num_choices])), overflow="fold", min_width=12)
    for heading in headings[num_choices:]:
        table.add_column(Text(heading.replace(" ", "\n"), justify="right"), justify="right", no_wrap=True)
    for line in lines:
        numbers = (_BEFORE.sub("\n", cell) for cell in line[num_choices:])
        table.add_row(*map(Text, (" · ".join(line[:num_choices]), *numbers)))
    return table


_BEFORE = re.compile(r" (?=±|\(|to )")
"""Where a cell of a comparison is broken"""


def preflight_table(partition: Mapping[str, Any]) -> RenderableType:
    """Return who holds what (of many clients a summary) and what encoding did to the rows."""
    clients = partition["clients"]
    table = _client_table(clients) if len(clients) <= MAX_CLIENTS else _summary_table(clients)
    encoding = partition.get("encoding", {})
    gone = partition.get("clients_without_rows", ())
    lost = [Text(f"Clients of whose rows none is left: {', '.join(gone)}", style="yellow")] if gone else []
    never = len(partition.get("never_sampled", ()))
    sampling = Text(
        f"Clients never sampled with this seed: {never:,} of {len(clients):,}", "yellow" if never else "dim"
    )
    promised = [privacy_line(partition["privacy"])] if "privacy" in partition else []
    tables = [table, *([_encoding_table(encoding)] if encoding else [])]
    found = cleaning_lines(partition.get("cleaning", {}))
    return Group(*tables, *found, *_first_dropped(encoding), *lost, sampling, *promised)


def cleaning_lines(cleaning: Mapping[str, Any]) -> list[Text]:
    """Return what was found in the rows that should not be there."""
    lines = []
    if redacted := cleaning.get("redacted"):
        lines.append(f"Replaced: {', '.join(f'{number:,} {entity}' for entity, number in sorted(redacted.items()))}")
    if again := cleaning.get("duplicates", 0):
        done = "left out" if cleaning.get("deduplicated") else "kept; -o data.deduplicate=true leaves them out"
        lines.append(f"Training rows that are copies of others: {again:,} ({done})")
    alike = cleaning.get("near_duplicates", {"rows": 0, "first": []})
    if alike["rows"]:
        one, other, likeness = alike["first"][0]
        lines.append(
            f"Held-out rows with a near-copy among the training rows: {alike['rows']:,}, first {other} and {one} "
            f"({percent(likeness)} of their runs of five words)"
        )
    return [Text(line, style="yellow") for line in lines]


def privacy_line(statement: Mapping[str, Any]) -> Text:
    """Return what a run promises its clients."""
    return Text(
        f"Privacy of {statement['unit']}: epsilon {statement['epsilon']:.2f}, delta {statement['delta']:.2g} after "
        f"{statement['rounds']:,} rounds; noise {statement['noise_multiplier']:.2f} clip norms, {statement['noise']}"
    )


def _client_table(clients: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"{len(clients)} clients", title_justify="left")
    for header in ("Client", "Rows", "Tokens", "Categories"):
        table.add_column(header, justify="right" if header in {"Rows", "Tokens"} else "left")
    for client, holding in clients.items():
        largest_first = sorted(holding["categories"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {rows:,}" for name, rows in largest_first[:4])
        more = f", {len(largest_first) - 4} more" if len(largest_first) > 4 else ""
        table.add_row(Text(client), count(holding["rows"]), count(holding["tokens"]), Text(shown + more))
    return table


def _summary_table(clients: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"{len(clients):,} clients", title_justify="left")
    table.add_column("Per client")
    for header in ("Smallest", "Median", "Largest", "In all"):
        table.add_column(header, justify="right")
    for label, key in (("Rows", "rows"), ("Tokens", "tokens")):
        values = [holding[key] for holding in clients.values()]
        table.add_row(label, *(count(value) for value in (min(values), median(values), max(values), sum(values))))
    kinds = [sum(1 for rows in holding["categories"].values() if rows) for holding in clients.values()]
    distinct = {name for holding in clients.values() for name in holding["categories"]}
    table.add_row("Categories", *(count(value) for value in (min(kinds), median(kinds), max(kinds), len(distinct))))
    return table


def _encoding_table(encoding: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return what became of the rows; what lost something is coloured."""
    table = Table(title="Rows as tokens", title_justify="left")
    table.add_column("")
    for split in encoding:
        table.add_column(Text(split), justify="right")
    for label, key, loses in _ENCODING_LINES:
        cells = [Text(count(counts.get(key, 0))) for counts in encoding.values()]
        for cell in cells if loses else ():
            cell.stylize("dim" if cell.plain == "0" else "yellow")
        table.add_row(label, *cells)
    return table


_ENCODING_LINES = (
    ("Rows", "rows", False),
    ("Tokens", "tokens", False),
    ("Tokens in responses", "supervised_tokens", False),
    ("Rows with a truncated context", "truncated", True),
    ("Rows dropped", "dropped", True),
    ("  too long without their context", "too_long", True),
    ("  all masked: a response of no token", "all_masked", True),
    ("  text that spells a special token", "special_token_text", True),
)
"""Label, key, whether it tells of a loss."""


def _first_dropped(encoding: Mapping[str, Mapping[str, Any]]) -> list[Text]:
    return [
        Text(f"First row dropped of {split}: {counts['dropped_sources'][0]}", style="yellow")
        for split, counts in encoding.items()
        if counts.get("dropped_sources")
    ]
