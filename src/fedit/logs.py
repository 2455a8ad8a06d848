"""How the processes of a real federation write their logs: lines to read, or JSON objects to collect."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

FORMAT = "FEDIT_LOG"
"""Environment variable: ``json`` for JSON objects"""


class JsonLines(logging.Formatter):
    """A JSON object for each record: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(plain: str = "%(asctime)s %(levelname)s %(name)s: %(message)s", level: int = logging.INFO) -> None:
    """Let this process write its log to stderr: as JSON if `FEDIT_LOG` says so, else in the format `plain`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if os.environ.get(FORMAT) == "json" else logging.Formatter(plain))
    logging.basicConfig(handlers=[handler], level=level)
