"""Files that are whole or not there, with the rights that they should have."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedit.files import write_atomically, write_secret, write_tensors


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_rights_are_those_of_any_new_file_and_a_secret_is_its_owners(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "tensors", {"a": torch.ones(3)}, {"about": "x"})
        write_atomically(tmp_path / "plain", b"x")
        write_secret(tmp_path / "secret", b"x")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("tensors", "plain", "secret")}
    assert modes == {"tensors": 0o666 & ~umask, "plain": 0o666 & ~umask, "secret": 0o600}


def test_what_a_killed_write_left_is_gone_after_the_next(tmp_path: Path) -> None:
    """Of the library's own temporary file, too, whose name is random."""
    file = tmp_path / "round.safetensors"
    left = tmp_path / ".round.safetensors.partial.d"
    left.mkdir()
    (left / ".tmpabc").write_bytes(b"half")
    (tmp_path / ".round.safetensors.partial").write_bytes(b"half")
    write_tensors(file, {"a": torch.arange(3.0)}, {})
    assert [item.name for item in tmp_path.iterdir()] == [file.name]
    assert torch.equal(load_file(file)["a"], torch.arange(3.0))


def test_a_failed_write_leaves_nothing_and_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "round.safetensors"
    write_tensors(file, {"a": torch.ones(3)}, {})
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(file, {"a": shared, "b": shared[:2]}, {})
    assert torch.equal(load_file(file)["a"], torch.ones(3))
    assert not list(tmp_path.glob(".*.d"))
