"""Runs beside each other: seeds as one group, paired differences between groups, one table, one page."""

from fedit.comparison.differences import compare
from fedit.comparison.groups import Comparison, Difference, Group, MeasuredRun, group_runs
from fedit.comparison.measures import GONE, measure_run
from fedit.comparison.page import write_comparison
from fedit.comparison.tables import table, to_markdown

__all__ = [
    "GONE",
    "Comparison",
    "Difference",
    "Group",
    "MeasuredRun",
    "compare",
    "group_runs",
    "measure_run",
    "table",
    "to_markdown",
    "write_comparison",
]
