"""What ships inside the package: the dataset ``builtin:pasture`` and the base model ``builtin:cria``."""

from __future__ import annotations

from pathlib import Path

CRIA_FOLDER = Path(__file__).parent / "cria"
"""The base model, as `transformers` saves one."""
