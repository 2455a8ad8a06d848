"""Files, folders and Hub datasets -> raw rows, each with the place it came from.

JSON and CSV are read with the standard library and not with `datasets`: its loader infers one type per column (a
response "42" becomes a number, "NA" a missing value) and reports a malformed line without its file or number. It
loads what it is best at, Hub datasets, and is imported only then because its import takes a second.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedit.interfaces import DataError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file has it."""

    values: Mapping[str, Any]
    source: str
    """Where it is: ``train.jsonl:17`` (line) or ``train.json row 17`` (both from 1)."""
    client: str | None = None
    """Named by the file, in a folder of one file per client."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a path holds; `test` is None where it does not say which rows are held out."""

    train: list[Row]
    test: list[Row] | None = None


def is_hub_name(path: str) -> bool:
    """Return whether a path is a name on the Hub: ``owner/name``, and nothing here is called so."""
    place = Path(path).expanduser()
    has_form = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
    return has_form and place.suffix.lower() not in _READERS and not place.exists()


def read_path(path: str, seed: int, key: str = "path") -> Rows:
    """Read a file, a folder, ``builtin:pasture`` or a Hub dataset; `key` is what named it in the table [data].

    Raises:
        DataError: nothing is there, or it cannot be read; names the file and the line.
    """
    if path.startswith("builtin:"):
        return _read_builtin(path, seed)
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_folder(place)
    if place.is_file():
        return Rows(_read_file(place))
    if is_hub_name(path):
        return _read_hub(path, key)
    raise DataError(
        f"[data] {key} = {path!r}: no such file or folder (seen from {Path.cwd()}). Expected a JSON, JSONL, CSV or "
        "Parquet file, a folder with one file per client, a Hub name (owner/name), or builtin:pasture."
    )


# ----------------------------------------------------------------------------------------------------------- files


def _read_file(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'files without suffix'}. Use {', '.join(_READERS)}.")
    rows = reader(path)
    if not rows:
        raise DataError(f"{path}: the file has no rows.")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error


def _read_json(path: Path) -> list[Row]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _json_lines(path, text)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}.") from error
    return [_json_row(values, f"{path} row {number}") for number, values in enumerate(rows, start=1)]


def _read_jsonl(path: Path) -> list[Row]:
    return _json_lines(path, _read_text(path))


def _json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside strings
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON at column {error.colno}: {error.msg}. Expected one JSON object per "
                "line (or, in a .json file, one list of objects)."
            ) from error
        rows.append(_json_row(values, f"{path}:{number}"))
    return rows


def _json_row(values: object, source: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{source}: expected an object with named columns, got {type(values).__name__}.")
    return Row(values, source)


def _read_csv(path: Path) -> list[Row]:
    lines = csv.reader(io.StringIO(_read_text(path)), strict=True)
    rows = []
    try:
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: two columns have the same name: {', '.join(header)}.")
        first_line = lines.line_num + 1
        for cells in lines:
            if cells:
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{first_line}: expected {len(header)} cells ({', '.join(header)}), got {len(cells)}. "
                        "Quote cells that contain commas or line breaks."
                    )
                rows.append(Row(dict(zip(header, cells, strict=True)), f"{path}:{first_line}"))
            first_line = lines.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: not valid CSV: {error}. JSONL avoids quoting.") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a valid Parquet file: {error}.") from error
    return [Row(values, f"{path} row {number}") for number, values in enumerate(rows, start=1)]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# --------------------------------------------------------------------------------------------------------- folders


def _read_folder(folder: Path) -> Rows:
    """Read one file per client, shorter names first (2 before 10), and the test file where there is one."""
    files = sorted((file for file in folder.iterdir() if file.is_file()), key=lambda file: (len(file.name), file.name))
    known = [file for file in files if file.suffix.lower() in _READERS and not file.name.startswith(".")]
    ignored = [file.name for file in files if file not in known]
    if ignored:
        logger.info("%s: ignored, not data files: %s", folder, ", ".join(ignored))
    test_files = [file for file in known if _is_test(file)]
    if len(test_files) > 1:
        names = ", ".join(file.name for file in test_files)
        raise DataError(f"{folder}: {len(test_files)} files look like the test set: {names}. Keep one.")
    file_of: dict[str, Path] = {}
    rows: list[Row] = []
    for file in known:
        if _is_test(file):
            continue
        client = _client_name(file)
        if client in file_of:
            raise DataError(
                f"{folder}: {file_of[client].name} and {file.name} both hold client {client!r}. Rename or merge them."
            )
        file_of[client] = file
        rows += [replace(row, client=client) for row in _read_file(file)]
    if not rows:
        raise DataError(f"{folder}: no client file. Expected one {' or '.join(_READERS)} file per client.")
    return Rows(rows, _read_file(test_files[0]) if test_files else None)


def _is_test(file: Path) -> bool:
    """Whether ``test`` is a word of the file's name: global_test.json is the test set, latest.json a client."""
    return re.search(r"(?<![a-z])test(?![a-z])", file.stem.lower()) is not None


def _client_name(file: Path) -> str:
    numbered = re.fullmatch(r"local_training_(\d+)", file.stem)
    return numbered[1] if numbered else file.stem


# -------------------------------------------------------------------------------------------------- Hub and builtin


def _read_hub(name: str, key: str) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"[data] {key} = {name!r} is no file or folder here (seen from {Path.cwd()}), and the Hub dataset of that "
            f"name could not be loaded: {error}. Check the name and the network (HF_HUB_OFFLINE=1 uses the local cache "
            "only), or save its rows as JSONL and give the file's path."
        ) from error
    if not isinstance(splits, datasets.DatasetDict) or not splits:
        raise DataError(f"Hub dataset {name}: expected named splits, got {type(splits).__name__}.")
    train = "train" if "train" in splits else next((split for split in splits if split != "test"), "test")
    if train != "train":
        logger.warning("Hub dataset %s has no split named train: training on %s.", name, train)

    def rows(split: str) -> list[Row]:
        listed = splits[split].to_list()
        return [Row(values, f"{name} {split} row {number}") for number, values in enumerate(listed, start=1)]

    return Rows(rows(str(train)), rows("test") if "test" in splits and train != "test" else None)


def _read_builtin(path: str, seed: int) -> Rows:
    name = path.removeprefix("builtin:")
    if name != "pasture":
        raise DataError(f"[data] path {path!r} is unknown. {did_you_mean(path, ['builtin:pasture'])}")
    from fedit.builtin.pasture import generate

    train, test = generate(seed=seed)
    return Rows(
        [Row(values, f"{path} train row {number}") for number, values in enumerate(train, start=1)],
        [Row(values, f"{path} test row {number}") for number, values in enumerate(test, start=1)],
    )
