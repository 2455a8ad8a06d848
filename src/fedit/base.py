"""The frozen base: device, precision, weights, tokenizer, and which of its layers are adapted."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedit.attention import can_use_it, packed_attention
from fedit.builtin import CRIA_FOLDER
from fedit.config import ModelConfig
from fedit.interfaces import EngineError, did_you_mean


def resolve_device(device: str) -> torch.device:
    """Return the torch device of `[engine] device`; raise EngineError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"[engine] device = {device!r} is not usable here: {error}. Try cpu.") from error
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of `[model] dtype`; auto is bfloat16 where `device` multiplies it natively."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def resolve_path(path: str) -> str:
    """Return the folder or Hub name of `[model] path`."""
    return str(CRIA_FOLDER) if path == "builtin:cria" else path


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or Hub name; raise EngineError that says what is missing."""
    try:
        return AutoTokenizer.from_pretrained(resolve_path(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EngineError(_not_loaded(path, "tokenizer", error)) from error


def context_length(path: str) -> int | None:
    """Return the most positions that a model can take, None where it does not say; raise EngineError if not found."""
    try:
        config = AutoConfig.from_pretrained(resolve_path(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EngineError(_not_loaded(path, "configuration", error)) from error
    return getattr(config, "max_position_embeddings", None)


def load_base(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """Load the base frozen, in evaluation mode, on `device`; raise EngineError that says what is missing."""
    dtype = resolve_dtype(config.dtype, device)
    quantized = {} if config.quantization == "none" else _quantization(config, device, dtype)
    try:
        place = resolve_path(config.path)
        with _no_progress_bar():
            base = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, trust_remote_code=False, **quantized)
    except (OSError, ValueError, SafetensorError) as error:
        raise EngineError(_not_loaded(config.path, "weights", error)) from error
    return prepare_base(base, device)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The library prints nothing."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def _quantization(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options that load a quantised base.

    Raises:
        EngineError: there is no GPU for it (on CPUs, bitsandbytes has no gradient of its products), or no bitsandbytes.
    """
    setting = f"[model] quantization = {config.quantization!r}"
    if device.type != "cuda":
        raise EngineError(f"{setting} needs a CUDA GPU, and [engine] device is {device}. Leave quantization out here.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineError(f"{setting} needs the package bitsandbytes. Install it: pip install 'fedit[quantization]'")
    four_bits = config.quantization == "nf4"
    chosen = BitsAndBytesConfig(
        load_in_4bit=four_bits,
        load_in_8bit=not four_bits,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": chosen, "device_map": {"": device}}


def prepare_base(base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Freeze a model, put it into evaluation mode on `device` and choose its attention; changes and returns it."""
    if can_use_it(base):
        base.set_attn_implementation(packed_attention())
    base.requires_grad_(False)
    base.eval()
    if not getattr(base, "is_quantized", False):  # such a model is where it shall be, and refuses to move
        base.to(device)  # pyright: ignore[reportArgumentType] (transformers' annotation hides torch's)
    return base


def weights_digest(base: PreTrainedModel) -> str:
    """Return the SHA-256 of the names, types, shapes and bits of all weights."""
    digest = hashlib.sha256()
    for name, weight in base.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all that decides which ids a text becomes: the fast tokenizer whole, or the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{whole}\n{special}\n{tokenizer.chat_template}".encode()).hexdigest()


def _not_loaded(path: str, what: str, error: Exception) -> str:
    folder = Path(path)
    if folder.is_dir():
        found = ", ".join(sorted(item.name for item in folder.iterdir())) or "nothing"
        return f"[model] path = {path!r}: the folder has no usable {what} (it holds: {found}). {error}"
    return (
        f"[model] path = {path!r}: no such folder, and the Hugging Face Hub gave no {what}. Check the name and the "
        f"network (HF_HUB_OFFLINE=1 uses only what is cached), or give a local folder. {error}"
    )


def find_targets(base: PreTrainedModel, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers to adapt by name, in the model's order.

    A target is a layer's name or the end of one (``q_proj``), as in PEFT; ``all-linear`` is every linear layer but the
    head.

    Raises:
        EngineError: a target matches nothing.
    """
    head = base.get_output_embeddings()
    linear: dict[str, nn.Module] = {
        name: module for name, module in base.named_modules() if is_linear(module) and module is not head
    }
    if isinstance(target_modules, str):
        return linear
    found: dict[str, nn.Module] = {}
    for target in target_modules:
        matches = {name: module for name, module in linear.items() if name == target or name.endswith(f".{target}")}
        if not matches:
            endings = {name.rpartition(".")[2] for name in linear}
            raise EngineError(f"[adapter] target_modules: {target!r} matches no layer. {did_you_mean(target, endings)}")
        found |= matches
    return {name: module for name, module in linear.items() if name in found}


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer that LoRA can be added to."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs); GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features
