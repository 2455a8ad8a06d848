"""What a run that is killed goes on from: the server's state after each of its last rounds, as safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedit.files import write_tensors
from fedit.interfaces import Adapter, RoundError
from fedit.server import ServerState
from fedit.wire import side_of, side_tensors


def save_state(state: ServerState, folder: Path, keep: int = 2) -> None:
    """Write a checkpoint by rename, so that it is whole or not there, and drop all but the last `keep`.

    Raises:
        FeditError: it cannot be written (disk full, ...); the earlier checkpoints are intact.
    """
    tensors = {f"adapter/{name}": tensor for name, tensor in state.adapter.tensors.items()}
    tensors |= {f"side/{name}": tensor for name, tensor in side_tensors(state.adapter.side).items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in state.optimizer_state.items()}
    tensors |= {f"control/{name}": tensor for name, tensor in state.control.items()}
    tensors |= {f"error/{name}": tensor for name, tensor in state.download_error.items()}
    about = {
        "round_index": state.round_index,
        "rank": state.adapter.rank,
        "lora_alpha": state.adapter.lora_alpha,
        "side_step_bytes": state.side_step_bytes,
        "messages": state.messages,
        "ranks": dict(state.ranks),
        "clip_norm": state.clip_norm,
        "epsilon": state.epsilon,
        "order": list(tensors),  # the file sorts its tensors, and sums over them in another order have other bits
    }
    write_tensors(folder / f"round-{state.round_index:05d}.safetensors", tensors, {"fedit": json.dumps(about)})
    for old in _checkpoints(folder)[:-keep]:
        old.unlink()


def load_state(folder: Path) -> ServerState | None:
    """Return the last checkpoint of a folder, or None where there is none.

    Raises:
        RoundError: the file is damaged.
    """
    saved = _checkpoints(folder)
    if not saved:
        return None
    try:
        with safe_open(saved[-1], "pt") as file:
            about = json.loads((file.metadata() or {})["fedit"])
            tensors = {name: file.get_tensor(name) for name in about["order"]}
    except (SafetensorError, KeyError, ValueError) as error:
        raise RoundError(
            f"The checkpoint {saved[-1]} is damaged ({error}). Delete it to go on from the one before."
        ) from error
    adapter, side, optimizer, error, control = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("adapter/", "side/", "optimizer/", "error/", "control/")
    )
    loaded = Adapter(adapter, about["rank"], about["lora_alpha"], side_of(side))
    return ServerState(
        about["round_index"],
        loaded,
        optimizer,
        about["side_step_bytes"],
        error,
        tuple(about["messages"]),
        control,
        ranks=about.get("ranks", {}),
        clip_norm=about.get("clip_norm"),
        epsilon=about.get("epsilon"),
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors"), key=lambda path: (len(path.name), path.name))
