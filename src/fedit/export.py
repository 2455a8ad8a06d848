"""The result in the formats that others load: a PEFT folder, a merged model."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedit.base import load_tokenizer, resolve_path
from fedit.config import RunConfig
from fedit.data import chat_template_of
from fedit.files import write_atomically, write_tensors
from fedit.interfaces import Adapter, EngineError, FeditError, Template
from fedit.lowrank import LowRank
from fedit.model import StackedModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PEFT_PREFIX = "base_model.model."


SIDE_FOLDER = "side"


def save_adapter(adapter: Adapter, config: RunConfig, model: StackedModel, folder: Path) -> None:
    """Write `adapter` so that ``PeftModel.from_pretrained(base, folder)`` loads it; its tokenizer lies beside it.

    Its side, if it has one, is a second PEFT adapter in ``folder/side``, to be used together with the first. Its cores,
    if it has them, are multiplied into B: any program that loads LoRA adapters loads it.
    """
    adapter = adapter.plain()
    described = LoraConfig(
        base_model_name_or_path=resolve_path(config.model.path),
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        r=adapter.rank,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.adapter.dropout,
        target_modules=model.target_names(),
        fan_in_fan_out=model.transposed_weights,
    ).to_dict()
    described["target_modules"] = sorted(described["target_modules"])
    tensors = {PEFT_PREFIX + name: tensor for name, tensor in adapter.tensors.items()}
    with _refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(model.tokenizer, config.data.template, folder)
    text = json.dumps(described, indent=2, sort_keys=True, default=str)
    if adapter.side:
        _save_side(adapter.side, described, folder / SIDE_FOLDER)
    write_atomically(folder / "adapter_config.json", text.encode())
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template, folder: Path) -> None:
    """Write the tokenizer with `template` as its chat template, whichever it had; none, where that cannot be said."""
    exported = copy.copy(tokenizer)
    exported.chat_template = chat_template_of(template, tokenizer)
    exported.save_pretrained(folder)


def _save_side(side: Mapping[str, LowRank], described: Mapping[str, Any], folder: Path) -> None:
    """Write it as a LoRA adapter of a rank for each module, with a scaling of 1."""
    ranks = {module: matrix.rank for module, matrix in side.items()}
    largest = max(ranks.values())
    config = {
        **described,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(side),
    }
    tensors = {}
    for module, matrix in side.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = matrix.a.contiguous()
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = matrix.b.contiguous()
    with _refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=str).encode())
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def load_adapter(folder: Path, config: RunConfig) -> Adapter:
    """Return the adapter that `save_adapter` wrote; raise EngineError where there is none yet."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise EngineError(f"{folder} holds no adapter. The run writes it when its last round is done.")
    tensors = _peft_tensors(file)
    side_file = folder / SIDE_FOLDER / "adapter_model.safetensors"
    of_side = _peft_tensors(side_file) if side_file.is_file() else {}
    modules = [name.removesuffix(".lora_A.weight") for name in of_side if name.endswith(".lora_A.weight")]
    side = {m: LowRank(of_side[f"{m}.lora_B.weight"], of_side[f"{m}.lora_A.weight"]) for m in modules}
    return Adapter(tensors, config.adapter.max_rank, config.adapter.alpha, side)


def _peft_tensors(file: Path) -> dict[str, Tensor]:
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(file).items()}


def save_merged(adapter_folder: Path, target: Path, config: RunConfig) -> None:
    """Write base + adapter as one ordinary model, in the base's own dtype, with its tokenizer.

    The sum is computed in float32 and rounded once.

    Raises:
        EngineError: there is no adapter in `adapter_folder`, or `target` is not empty.
        FeditError: `target` cannot be written (disk full, ...); nothing is left of it then.
    """
    if not (adapter_folder / "adapter_config.json").is_file():
        raise EngineError(f"{adapter_folder} holds no adapter. The run writes it when its last round is done.")
    check_new(target)
    tokenizer = load_tokenizer(str(adapter_folder))
    base = AutoModelForCausalLM.from_pretrained(resolve_path(config.model.path), dtype="auto")
    dtype = base.dtype
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tuned = PeftModel.from_pretrained(base.float(), adapter_folder)
        names = ["default"]
        if (adapter_folder / SIDE_FOLDER).is_dir():
            names.append(SIDE_FOLDER)
            tuned.load_adapter(str(adapter_folder / SIDE_FOLDER), SIDE_FOLDER)
        merged = tuned.merge_and_unload(adapter_names=names)
    ends = merged.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id not in ends:  # answers were tuned to end with this one
        merged.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    with whole_folder(target) as partial:
        merged.to(dtype).save_pretrained(partial)
        save_tokenizer(tokenizer, config.data.template, partial)


def check_new(target: Path) -> None:
    """Raise EngineError unless `target` is an empty folder or nothing."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise EngineError(f"{target} exists and is no empty folder. Give a new one.")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write into, which takes the place of `target` once all is written; nothing is left otherwise.

    Raises:
        EngineError: `target` is not empty.
        FeditError: it cannot be written.
    """
    check_new(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with _refusals(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Turn what writing into `folder` raises into a `FeditError`."""
    try:
        yield
    except FeditError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception where the disk is full, safetensors one of its own
        raise FeditError(f"{folder} could not be written: {error}. Make room or mend the permissions.") from error
