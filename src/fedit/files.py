"""Writing files so that a crash at any moment leaves them whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedit.interfaces import FeditError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, even if the machine stops: temporary name, fsync, rename.

    Raises:
        FeditError: it cannot be written (disk full, ...); what was there before is intact.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _unwritable(path, error) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append a mapping as one line of JSON and flush it to the disk.

    Raises:
        FeditError: it cannot be written; the file ends with the line before.
    """
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    end = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, end)
        raise _unwritable(path, error) from error


def keep_lines(path: Path, num_lines: int | None = None) -> None:
    """Drop all but the first `num_lines` whole lines of a file, and in any case a last one that is half-written."""
    if path.is_file():
        whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        write_atomically(path, b"".join(whole[:num_lines]))


def _unwritable(path: Path, error: OSError) -> FeditError:
    return FeditError(
        f"{path} could not be written: {error.strerror}. What was saved before is intact: make room or mend the "
        "permissions, and go on."
    )


def folder_name(client: str) -> str:
    """Return a folder's name for a client, percent-encoded, dots too: a client named ".." stays where it belongs."""
    return quote(client, safe="").replace(".", "%2E")
