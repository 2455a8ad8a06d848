"""Logs as JSON objects."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import logging
from fedit.logs import log_to_stderr
log_to_stderr()
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("fedit.engines.site").exception("round %d failed", 3)
"""


def written(environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return done.stderr


def test_a_record_is_a_line() -> None:
    (line,) = written({"FEDIT_LOG": "json"}).splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert "ZeroDivisionError: division by zero" in record.pop("exception")
    assert record == {"level": "ERROR", "logger": "fedit.engines.site", "message": "round 3 failed"}


def test_without_a_word_of_it_they_are_for_people() -> None:
    assert " ERROR fedit.engines.site: round 3 failed\nTraceback" in written({})
