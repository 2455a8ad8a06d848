"""What clients keep for themselves between rounds, on disk: never on the shared model, never at the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from fedit.files import folder_name, write_atomically, write_tensors
from fedit.interfaces import EngineError

if TYPE_CHECKING:
    from torch import Tensor


class ClientStore:
    """A folder for each client, in it a file for each of the last three rounds that the client took part in.

    Three, because a run goes on from one of its two checkpoints, and the round after the last may have been under way
    when it was killed: up to two rounds are run again, and must find what the client kept before them.
    """

    def __init__(self, folder: Path, owner: str = "") -> None:
        """Open the store in `folder`; `owner` names what run it belongs to."""
        self._folder = folder
        self._owner = owner

    def read(self, client: str, round_index: int) -> dict[str, Tensor]:
        """Return what `client` kept after its last round before `round_index`; empty where there was none.

        Raises:
            EngineError: another run kept it, or the file is damaged.
        """
        earlier = [file for file in self._files(client) if _round_index(file) < round_index]
        if not earlier:
            return {}
        try:
            with safe_open(earlier[-1], "pt") as file:
                owner = (file.metadata() or {}).get("owner", "")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise EngineError(
                f"{earlier[-1]} is damaged ({error}). Delete it to go on from what was kept before."
            ) from error
        if owner != self._owner:
            raise EngineError(
                f"{earlier[-1]} was kept by a run of another configuration ({owner or 'unnamed'}, this one is "
                f"{self._owner or 'unnamed'}). Give this run a folder of its own, or delete {self._folder}."
            )
        return tensors

    def write(self, client: str, round_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` as what `client` has after the round `round_index`, in place of all that came later.

        Raises:
            FeditError: it cannot be written (disk full, ...); what was kept before is intact.
        """
        file = self._client_folder(client) / f"round-{round_index:05d}.safetensors"
        write_tensors(file, tensors, {"owner": self._owner})
        files = self._files(client)
        for old in [*files[: max(0, files.index(file) - 2)], *files[files.index(file) + 1 :]]:
            old.unlink()

    def count(self, client: str) -> int:
        """Return how often this was asked of a client, with this time, which is on the disk before it is told."""
        file = self._client_folder(client) / "tunings"
        number = (int(file.read_text(encoding="ascii")) if file.is_file() else 0) + 1
        write_atomically(file, str(number).encode())
        return number

    def _client_folder(self, client: str) -> Path:
        return self._folder / folder_name(client)

    def _files(self, client: str) -> list[Path]:
        return sorted(self._client_folder(client).glob("round-*.safetensors"), key=_round_index)


def _round_index(file: Path) -> int:
    return int(file.stem.removeprefix("round-"))
