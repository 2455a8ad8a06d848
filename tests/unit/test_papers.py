"""The index of papers: each configuration in it loads, and no rule is missing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fedit.config import load_config, load_plugins, shipped_recipes
from fedit.interfaces import plugins

load_plugins()

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| Paper") and not line.startswith("| Source")
]
FIRST = ["client.moments=reset", "server_optimizer=fedavg"]
"""What the page says to set first, so that every rule can go with a shipped recipe"""


def configurations(cell: str) -> list[list[str]]:
    """Return the overrides that a cell names; of a key with several values, those with each."""
    settings: dict[str, list[str]] = {}
    key = ""
    for span in re.findall(r"`([^`]+)`", cell):
        if "=" in span and not span.startswith("fedit "):
            tomllib.loads(span)
            key, _, value = (part.strip() for part in span.partition("="))
            settings[key] = [value]
        elif span.startswith('"'):
            settings[key].append(span)
    longest = max(map(len, settings.values()), default=0)
    return [
        [f"{key}={values[min(number, len(values) - 1)]}" for key, values in settings.items()]
        for number in range(longest)
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_the_configuration_of_a_paper_loads(row: list[str]) -> None:
    paper, _, cell = row
    found = configurations(cell)
    assert found or "`fedit " in cell, f"{paper}: how is it had?"
    for overrides in found:
        for recipe in ("default", "dolly"):
            load_config(recipe, [*FIRST, *overrides])
    for recipe in re.findall(r"`fedit run ([\w-]+)`", cell):
        assert recipe in shipped_recipes()
        load_config(recipe)


@pytest.mark.parametrize("kind", ["aggregation", "objective", "attack", "server_optimizer"])
def test_every_rule_is_there(kind: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    ours = {"plain", "sign-flip", "gaussian", "gauge-rescaling", "label-flip", "fedit-plus"}
    assert [name for name in plugins(kind) if f'"{name}"' not in text and name not in ours] == []
