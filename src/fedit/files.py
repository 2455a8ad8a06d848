"""Writing files so that a crash at any moment leaves them whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from safetensors import SafetensorError

from fedit.interfaces import FeditError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, even if the machine stops: temporary name, fsync, rename.

    Raises:
        FeditError: it cannot be written (disk full, ...); what was there before is intact.
    """
    _replace(path, lambda temporary: temporary.write_bytes(content))


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that nobody but its owner can read at any moment, atomically.

    Raises:
        FeditError: as `write_atomically`.
    """

    def write(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600, exist_ok=False)
        temporary.write_bytes(content)

    _replace(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors, with words about them, as a safetensors file, atomically.

    Raises:
        FeditError: as `write_atomically`.
    """
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        # The library writes to a random name first, for its owner alone: in a folder of its own, where the next write
        # finds what a killed one left, and with the rights that any other file has.
        temporary.touch()
        rights = temporary.stat().st_mode
        place = temporary.with_name(f"{temporary.name}.d")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            save_file(whole, place / "tensors", dict(about))
            (place / "tensors").chmod(rights)
            (place / "tensors").rename(temporary)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file, and put it in the place of `path` once it is on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise _unwritable(path, error) from error


def _flush(path: Path) -> None:
    """Let a file, or a folder's list of files, be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _unwritable(path: Path, error: OSError | SafetensorError) -> FeditError:
    reason = error.strerror if isinstance(error, OSError) else error
    return FeditError(
        f"{path} could not be written: {reason}. What was saved before is intact: make room or mend the "
        "permissions, and go on."
    )


def folder_name(client: str) -> str:
    """Return a folder's name for a client, percent-encoded, dots too: a client named ".." stays where it belongs."""
    return quote(client, safe="").replace(".", "%2E")


def new_folder(name: str) -> Path:
    """Return runs/<name>, or the first of runs/<name>-2, -3, ... that does not exist."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder
