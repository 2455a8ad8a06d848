"""Numbers and names as people read them; shared by the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

MISSING = "–"

METRIC_LABELS = {"response_loss": "Response loss", "exact_match": "Exact match", "rouge_l": "ROUGE-L"}
MODEL_LABELS = {"base": "Base", "local": "Local-only", "central": "Centralised", "federated": "Federated"}
MODEL_LABELS["personal"] = "Clients' own"


def number(value: float | None, digits: int = 3) -> str:
    """Return a plain number; None or not finite: a dash."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage."""
    return MISSING if value is None else f"{number(100 * value, digits)}%"


def metric(name: str, value: float | None) -> str:
    """Return the value of a metric in its usual unit."""
    return percent(value) if name == "exact_match" else number(value)


def interval(name: str, bounds: Sequence[float] | None) -> str:
    """Return a metric's interval, e.g. ``1.204–1.331``; an unknown one is empty."""
    if bounds is None:
        return ""
    low, high = metric(name, bounds[0]), metric(name, bounds[1])
    return f"{low} to {high}" if low.startswith("−") else f"{low.removesuffix('%')}–{high}"


def signed(name: str, value: float | None) -> str:
    """Return a difference of a metric with its sign; of percentages in points."""
    if value is None:
        return MISSING
    text = number(100 * value, 1) if name == "exact_match" else number(value)
    if not any(digit in "123456789" for digit in text):
        return text.removeprefix("−")
    return text if text.startswith("−") else f"+{text}"


def signed_interval(name: str, bounds: Sequence[float] | None) -> str:
    """Return the interval of a difference."""
    return "" if bounds is None else f"{signed(name, bounds[0])} to {signed(name, bounds[1])}"


def count(value: float | None) -> str:
    """Return a count in full up to 999,999, then in millions, ...: ``1.24 M``."""
    if value is None:
        return MISSING
    if abs(value) < 1_000_000:
        return f"{value:,.0f}"
    return _scaled(value, ("", "k", "M", "G", "T"))


def size(num_bytes: float | None) -> str:
    """Return bytes in decimal units: ``1.24 MB``."""
    return MISSING if num_bytes is None else _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: Sequence[str]) -> str:
    exponent = min(int(math.log10(abs(value)) // 3), len(units) - 1) if abs(value) >= 1 else 0
    scaled = value / 1000**exponent
    digits = 0 if exponent == 0 or abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {units[exponent]}".rstrip()


def duration(seconds: float | None) -> str:
    """Return seconds as ``8.1 s``, ``3 min 12 s`` or ``1 h 04 min``."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clip(text: str, length: int) -> str:
    """Return at most `length` characters of `text`, with an ellipsis where some are left out."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def short_name(path: str) -> str:
    """Return what a person calls a model or data set: ``builtin:cria`` -> cria, ``some/folder/rows.jsonl`` -> rows."""
    parts = Path(path.removeprefix("builtin:"))
    name = parts.stem if parts.suffix in {".json", ".jsonl", ".csv", ".parquet"} else parts.name
    return name if any(letter.isalpha() for letter in name) else "/".join(parts.parts[-2:])


def vllm_rank(rank: int) -> int:
    """Return the least ``--max-lora-rank`` of vLLM's that holds an adapter of a rank; it takes few numbers."""
    return next((each for each in (8, 16, 32, 64, 128, 256, 320, 512) if each >= rank), rank)
