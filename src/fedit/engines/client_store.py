"""What clients keep for themselves between rounds, on disk: never on the shared model, never at the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save

from fedit.files import folder_name, write_atomically

if TYPE_CHECKING:
    from torch import Tensor


class ClientStore:
    """A folder for each client, in it a file for each of the last three rounds that the client took part in.

    Three, because a run goes on from one of its two checkpoints, and the round after the last may have been under way
    when it was killed: up to two rounds are run again, and must find what the client kept before them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, client: str, round_index: int) -> dict[str, Tensor]:
        """Return what `client` kept after its last round before `round_index`; empty where there was none."""
        earlier = [file for file in self._files(client) if _round_index(file) < round_index]
        return load_file(earlier[-1]) if earlier else {}

    def write(self, client: str, round_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` as what `client` has after the round `round_index`, in place of all that came later.

        Raises:
            FeditError: it cannot be written (disk full, ...); what was kept before is intact.
        """
        file = self._client_folder(client) / f"round-{round_index:05d}.safetensors"
        write_atomically(file, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
        files = self._files(client)
        for old in [*files[: max(0, files.index(file) - 2)], *files[files.index(file) + 1 :]]:
            old.unlink()

    def _client_folder(self, client: str) -> Path:
        return self._folder / folder_name(client)

    def _files(self, client: str) -> list[Path]:
        return sorted(self._client_folder(client).glob("round-*.safetensors"), key=_round_index)


def _round_index(file: Path) -> int:
    return int(file.stem.removeprefix("round-"))
