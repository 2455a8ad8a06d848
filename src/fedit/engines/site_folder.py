"""A site's folder: what its operator decides (`site.toml`), and its own log of what it was asked and what it sent."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedit.config import DataConfig, EngineConfig, RunConfig
from fedit.config.explaining import explain
from fedit.config.tables import Table
from fedit.files import append_line, write_json
from fedit.interfaces import ConfigError, FeditError

KEPT_RUNS = 4
"""The private state of so many runs is kept, for one of them may be resumed."""


class SitePolicy(Table):
    """What may leave the site beside the updates themselves."""

    counts: bool = True
    """How many rows each client has, which weights its update; false: each counts as one"""
    losses: bool = True
    """The training loss and the number of tokens trained on"""
    evaluation: bool = True
    """The loss of the global adapter on the site's held-out rows"""
    sums_only: bool = False
    """Take part in runs alone whose server sees no more than sums of sites ([secure_aggregation])"""
    min_parties: int = Field(default=3, ge=2)
    """Sites that such a sum is of at least; a run can ask for more, not for fewer"""
    threshold: float = Field(default=2 / 3, ge=0.5, lt=1)
    """The share of the sites that suffices for such a sum; a run can ask for a larger one, not for a smaller one"""
    max_message_mb: float = Field(default=4096.0, gt=0)
    """The longest message that is taken from the server, in 10^6 bytes"""


class SiteConfig(Table):
    """The content of site.toml. Relative paths start at its folder."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9._-]*$")
    engine: Literal["nvflare", "flower"] = "nvflare"
    """What carries the calls: the federation's"""
    data: str
    """The rows: a file is one client; a folder is one client for each file, and so is a client column. The server is
    told their numbers (client-numbers.json), never their names."""
    test_data: str | None = None
    """Held-out rows; without it `test_per_category` of the run's `[data]` are held out."""
    columns: dict[str, str] | None = None
    """As in a run's `[data]`, where this site's rows name them in another way than the run says"""
    redact: tuple[str, ...] = ()
    """Identifiers to replace in its rows, beside those that the run says; as in a run's `[data]`"""
    model: str | None = None
    """The folder of the base here; without it the path, or Hub name, that the run says"""
    device: str = "auto"
    memory_gb: float | None = Field(default=None, gt=0)
    peers: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(default_factory=dict)
    """The identities of the other sites (`fedit site identity`), by name: secure aggregation is done with these alone.
    Without them each site's first identity is remembered, and no other taken for it; then a server that lies can make
    sites up."""
    policy: SitePolicy = SitePolicy()

    @model_validator(mode="after")
    def _knows_its_peers(self) -> Self:
        if self.policy.sums_only and not self.peers:
            raise ValueError(
                "[policy] sums_only needs [peers], or the server could make up the sites that a sum is of: put the "
                "other sites' identities there (fedit site identity)"
            )
        return self


class SiteFolder:
    """A folder with a site.toml; everything that the site keeps lies in it."""

    def __init__(self, path: Path, config: SiteConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def read(cls, path: Path) -> SiteFolder:
        """Return the folder of a site.

        Raises:
            ConfigError: it has no site.toml, or one that cannot be used.
        """
        file = path / "site.toml"
        try:
            return cls(path.absolute(), SiteConfig.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))))
        except OSError as error:
            raise ConfigError(f"{path} is no site's folder: {file.name} cannot be read ({error.strerror}).") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{file} is no TOML: {error}.") from error
        except ValidationError as error:
            raise ConfigError(explain(error, SiteConfig, f"{file}: ")) from error

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def socket(self) -> Path:
        """Where the worker listens."""
        return self.path / "worker.sock"

    def state_of(self, run: str) -> Path:
        """Return where clients keep their state during a run; that of the oldest runs is dropped."""
        runs = self.path / "clients"
        if runs.is_dir():
            others = sorted(
                (folder for folder in runs.iterdir() if folder.name != run), key=lambda f: f.stat().st_mtime
            )
            for folder in others[: 1 - KEPT_RUNS]:
                shutil.rmtree(folder, ignore_errors=True)
        (runs / run).mkdir(parents=True, exist_ok=True)
        return runs / run

    def call(self, clients: Sequence[str | None]) -> list[str]:
        """Return what the server is told that the site's clients are called: ``site/1``, ``site/2``, ...

        What files and rows call them stays in client-numbers.json; whoever is numbered keeps the number. The one client
        of rows that name none is called as the site.

        Raises:
            FeditError: client-numbers.json is damaged, or cannot be written.
        """
        file = self.path / "client-numbers.json"
        try:
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            numbers = {str(name): int(number) for name, number in known.items()}
            if len(set(numbers.values())) < len(numbers):
                raise ValueError("two clients have one number")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise FeditError(
                f"{file} cannot be read: {error}. Restore it; without it the clients are numbered anew, and must not "
                "go on with a run that was started before."
            ) from error
        for client in clients:
            if client is not None:
                numbers.setdefault(client, max(numbers.values(), default=0) + 1)
        if numbers != known:
            write_json(file, numbers)
        return [self.name if client is None else f"{self.name}/{numbers[client]}" for client in clients]

    @property
    def max_message_bytes(self) -> int:
        return int(self.config.policy.max_message_mb * 1e6)

    def localise(self, described: RunConfig) -> RunConfig:
        """Return a run's description with this site's rows, base and device in place of the server's."""
        site = self.config
        data: dict[str, Any] = {"path": self._path(site.data)}
        data["test_path"] = None if site.test_data is None else self._path(site.test_data)
        if site.columns is not None:
            data["columns"] = site.columns
        data["redact"] = tuple(dict.fromkeys((*described.data.redact, *site.redact)))
        engine: dict[str, Any] = {"device": site.device}
        if site.memory_gb is not None:
            engine["memory_gb"] = site.memory_gb
        model = {} if site.model is None else {"path": self._path(site.model)}
        return described.model_copy(
            update={
                "data": DataConfig.model_validate({**described.data.model_dump(), **data}),
                "engine": EngineConfig.model_validate({**described.engine.model_dump(), **engine}),
                "model": described.model.model_copy(update=model),
            }
        )

    def _path(self, path: str) -> str:
        return str(self.path / path) if (self.path / path).exists() else path

    def log(self, event: str, **about: Any) -> None:
        """Append a line to the site's log; None is left out."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event}
        append_line(self.path / "log.jsonl", line | {key: value for key, value in about.items() if value is not None})

    def logged(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of the log."""
        file = self.path / "log.jsonl"
        if file.is_file():
            with file.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines)
