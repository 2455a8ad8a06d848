"""Reading a run folder: what is there, of a run that may be unfinished or still writing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedit.interfaces import ConfigError, DataError
from fedit.report.terminal import as_html, final_table


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a run, parsed. What the run has not written yet is empty."""

    path: Path
    config: Mapping[str, Any]
    """``config.json``: the configuration under ``config``; recipe, versions, hardware, model"""
    partition: Mapping[str, Any]
    """``partition.json``"""
    rounds: Sequence[Mapping[str, Any]]
    """``rounds.jsonl``, in order"""
    timings: Sequence[Mapping[str, Any]]
    """``timings.jsonl``: of rounds and of phases"""
    evaluation: Mapping[str, Any]
    """``evaluation.json``"""
    audit: Mapping[str, Any] = field(default_factory=dict)
    """``audit.json``"""
    benchmarks: Mapping[str, Any] = field(default_factory=dict)
    """``benchmarks.json``"""
    judge: Mapping[str, Any] = field(default_factory=dict)
    """``judge.json``: by what was judged, the result"""

    @classmethod
    def read(cls, path: Path | str) -> RunFolder:
        """Read the folder `path`.

        Raises:
            ConfigError: `path` is no run folder.
            DataError: a file of it is damaged; the last line of a JSONL file may be incomplete.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            what = "holds no config.json" if path.is_dir() else "is no folder"
            raise ConfigError(f"{path} is not a run: it {what}. Give the folder that `fedit run` wrote.")
        return cls(
            path=path,
            config=read_json(path / "config.json"),
            partition=read_json(path / "partition.json"),
            rounds=list(read_lines(path / "rounds.jsonl")),
            timings=list(read_lines(path / "timings.jsonl")),
            evaluation=read_json(path / "evaluation.json"),
            audit=read_json(path / "audit.json"),
            benchmarks=read_json(path / "benchmarks.json"),
            judge=read_json(path / "judge.json"),
        )

    @property
    def run(self) -> Mapping[str, Any]:
        """The run's configuration, as `RunConfig.to_json` gave it."""
        return self.config.get("config", {})

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as the keys and values of ``-o key.sub=value``."""
        return flatten(self.run)

    @property
    def is_across_sites(self) -> bool:
        """Whether the clients were sites of their own, and not simulated: then nobody encoded all rows."""
        return bool(self.partition) and "encoding" not in self.partition

    @property
    def go_on(self) -> str:
        """The command that goes on with the run."""
        command = "fedit federation run --server SERVER" if self.is_across_sites else "fedit run"
        return f"{command} --resume {shlex.quote(str(self.path))}"

    @property
    def withholds(self) -> bool:
        """Whether the clients have privacy, so that rounds tell nothing exact of who came, what they had, or when."""
        return self.is_across_sites and bool(self.run.get("privacy"))

    @property
    def is_complete(self) -> bool:
        """Whether the run has everything that it makes."""
        return (self.path / "adapter").is_dir() if self.is_across_sites else bool(self.evaluation)

    def answers(self) -> Iterator[Mapping[str, Any]]:
        """Yield the lines of ``answers.jsonl`` one by one: a run of many clients has more than fit in memory."""
        yield from read_lines(self.path / "answers.jsonl")

    def __repr__(self) -> str:
        return f"RunFolder.read({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Return the table of `fedit run`, as a notebook shows it."""
        return as_html(final_table(self.evaluation))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with keys like ``client.learning_rate``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the object in a file; empty where there is none. Raise DataError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        return _object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Delete it, or restore it and try again.") from error


def read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects in the lines of a file, but for a last one that is half-written; none where there is no file.

    Raises:
        DataError: a line is damaged.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        previous: tuple[int, bytes] | None = None
        for number, line in enumerate(file, start=1):
            if previous is not None:
                yield _parse_line(path, *previous)
            previous = number, line
    if previous is None:
        return
    try:
        last = _object(previous[1].decode())
    except ValueError:
        return  # the run is writing this line, or was killed while it did
    yield last


def _parse_line(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        return _object(line.decode())
    except ValueError as error:
        raise DataError(f"{path}:{number} is damaged: {error}. Delete the line and try again.") from error


def _object(text: str) -> Mapping[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")  # noqa: TRY004 (as json's own errors)
    return value
