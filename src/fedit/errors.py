"""What fedit refuses or fails at: one tree of errors, whose messages say how to go on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeditError(Exception):
    """Whatever fedit refuses or fails at. The message says what, where, got, expected and how to fix it."""


class ConfigError(FeditError):
    """The run description is wrong or impossible. Raised before anything is loaded."""


class DataError(FeditError):
    """A file, row, column or tokenizer cannot be used; names the file and line where there is one."""


class RoundError(FeditError):
    """A round could not be completed; the last checkpoint is intact."""


class EngineError(FeditError):
    """The machine, the model or the transport cannot do what was asked."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known word, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."
