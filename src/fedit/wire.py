"""What travels between server and clients, and how many bytes that is.

A message is a safetensors file: eight bytes of length, a JSON header, the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedit.lowrank import LowRank

if TYPE_CHECKING:
    from torch import Tensor


def wire_size(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of float32 `tensors` as a safetensors file, header included."""
    header, offset = {}, 0
    for name in sorted(tensors):
        end = offset + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    header_bytes = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header_bytes // 8) * 8 + offset


def side_tensors(side: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return an adapter's side, or a step of it, as tensors by name."""
    tensors = {}
    for module, matrix in side.items():
        tensors[f"{module}.side_A.weight"] = matrix.a
        tensors[f"{module}.side_B.weight"] = matrix.b
    return tensors


def side_of(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """Return the side that `side_tensors` gave."""
    ending = ".side_A.weight"
    modules = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    return {m: LowRank(tensors[f"{m}.side_B.weight"], tensors[f"{m}.side_A.weight"]) for m in modules}
