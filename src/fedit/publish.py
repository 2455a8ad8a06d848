"""A run's models as others load them, each with its card: PEFT folders, merged models, GGUF files, the Hub.

What is written here is meant to leave this machine, so it names no path of it: where the base is a local folder, the
adapter's configuration has its name alone.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedit.base import load_tokenizer, resolve_path
from fedit.config import RunConfig, load_plugins, recorded_config
from fedit.export import SIDE_FOLDER, check_new, save_adapter, save_merged, save_tokenizer, whole_folder
from fedit.files import folder_name, write_atomically
from fedit.interfaces import ConfigError, EngineError
from fedit.report import RunFolder
from fedit.report.card import UNKNOWN, name_of, write_card
from fedit.run_models import BASE, RunModels, resolve_names

MODEL_CONVERTER, ADAPTER_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"


def export_adapter(folder: Path, name: str, target: Path, licence: str = UNKNOWN) -> str:
    """Write a PEFT folder of the model `name` of the run in `folder` (`resolve_names`), and return its exact name.

    Raises:
        ConfigError: it is no finished run, or has no such model.
        EngineError: `target` is not empty.
        FeditError: `target` cannot be written; nothing is left of it then.
    """
    check_new(target)
    with _peft_folder(folder, name) as (run, config, exact, source), whole_folder(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        save_tokenizer(load_tokenizer(str(source)), config.data.template, partial)
        for file in partial.rglob("adapter_config.json"):
            described = json.loads(file.read_text(encoding="utf-8"))
            described["base_model_name_or_path"] = name_of(run, "model")
            write_atomically(file, json.dumps(described, indent=2, sort_keys=True).encode())
        write_card(run, exact, "adapter", partial, licence)
    return exact


def export_merged(folder: Path, name: str, target: Path, licence: str = UNKNOWN) -> str:
    """Write base + adapter as one ordinary model in the base's own dtype; returns and raises as `export_adapter`."""
    check_new(target)
    with _peft_folder(folder, name) as (run, config, exact, source):
        save_merged(source, target, config)
    write_card(run, exact, "merged", target, licence)
    return exact


@contextmanager
def _peft_folder(folder: Path, name: str) -> Iterator[tuple[RunFolder, RunConfig, str, Path]]:
    """Yield the run, its configuration, the model's exact name, and a PEFT folder of it: the run's own, where it has
    one, or a temporary one.
    """
    run = RunFolder.read(folder)
    (exact,) = resolve_names(folder, [name])
    load_plugins([Path(file) for file in run.config.get("plugin_files", [])])
    config = recorded_config(run.config, folder)
    kind, _, client = exact.partition("/")
    if exact == BASE:
        raise ConfigError("--model base: the base is as it was, so there is nothing to export.")
    if kind in {"federated", "personal"}:
        yield run, config, exact, folder / "adapters" / folder_name(client) if client else folder / "adapter"
        return
    with tempfile.TemporaryDirectory() as temporary:
        models = RunModels.open(folder, [exact])
        adapter = models.adapters[exact]
        assert adapter is not None
        save_adapter(adapter, config, models.model, Path(temporary))
        del models  # the base is loaded again to be merged
        yield run, config, exact, Path(temporary)


# ------------------------------------------------------------------------------------------------------------- GGUF


def convert_merged(merged: Path, target: Path, llama_cpp: Path | None) -> None:
    """Convert a merged model to GGUF by llama.cpp's own program.

    Raises:
        EngineError: the program is not found, or refuses the model.
    """
    _convert([*find_converter(MODEL_CONVERTER, llama_cpp), str(merged)], target)


def convert_adapter(folder: Path, adapter: Path, target: Path, llama_cpp: Path | None) -> None:
    """Convert a PEFT folder of the run in `folder` to a GGUF adapter, to be loaded beside the base's GGUF; raises as
    `convert_merged`.
    """
    if (adapter / SIDE_FOLDER).is_dir():
        raise EngineError(
            "A GGUF adapter has one rank for all layers, and this run keeps more in adapter/side. Use --gguf, the "
            "whole model."
        )
    converter = find_converter(ADAPTER_CONVERTER, llama_cpp)
    base = RunFolder.read(folder).run["model"]["path"]
    _convert([*converter, str(adapter), "--base", _base_folder(base)], target)


def find_converter(program: str, llama_cpp: Path | None) -> list[str]:
    """Return the command that starts a program of llama.cpp: in the folder `llama_cpp`, or on the PATH.

    Raises:
        EngineError: it is in neither.
    """
    if llama_cpp is not None and (llama_cpp / program).is_file():
        return [sys.executable, str(llama_cpp / program)]
    if llama_cpp is None and (found := shutil.which(program)) is not None:
        return [found]
    where = "not on the PATH" if llama_cpp is None else f"not in {llama_cpp}"
    raise EngineError(
        f"GGUF files are written by llama.cpp's {program}, which is {where}. Get it with\n"
        "  git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install gguf sentencepiece\n"
        "and name the folder: --llama-cpp llama.cpp (or in the environment variable LLAMA_CPP)."
    )


def check_new_file(target: Path) -> None:
    """Raise EngineError where there is such a file already."""
    if target.exists():
        raise EngineError(f"{target} exists. Give the name of a new file.")


def _convert(command: Sequence[str], target: Path) -> None:
    check_new_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        done = subprocess.run(
            [*command, "--outfile", str(partial)], capture_output=True, text=True, check=False, errors="replace"
        )
        if done.returncode or not partial.is_file():
            last = "\n".join(done.stderr.strip().splitlines()[-3:]) or "it said nothing"
            raise EngineError(f"`{shlex.join(command)}` wrote no GGUF file. Its last words:\n{last}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _base_folder(path: str) -> str:
    """Return where the base's configuration lies: its folder, or the Hub's copy of it here."""
    resolved = resolve_path(path)
    if Path(resolved).is_dir():
        return resolved
    from huggingface_hub import snapshot_download

    return snapshot_download(resolved, allow_patterns=["*.json", "*.model", "*.jinja", "*.txt"])


# ---------------------------------------------------------------------------------------------------------- the Hub

_EARLIER_FILES = [f"{SIDE_FOLDER}/*", "*config.json", "*.safetensors*", "chat_template.jinja"]
"""Removed where an upload replaces another: transformers adds an adapter that lies beside a merged model to it."""


def push_to_hub(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported folder to the Hugging Face Hub, as one commit, and return its address.

    The repository is made where there is none, private unless `public`; the token is that of ``HF_TOKEN`` or of
    ``hf auth login``.

    Raises:
        ConfigError: the name is none, there is no token, or the repository is public and `public` is off, or the other
            way round.
        EngineError: the Hub refuses, or does not answer.
    """
    from huggingface_hub import HfApi

    check_hub(repository)
    api = HfApi(library_name="fedit")
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        seen_by_all = not api.model_info(repository).private
    except Exception as error:  # its HTTP client's errors are not OSErrors, and have another home in each version
        raise EngineError(f"--push-to-hub {repository}: {error}") from error
    if seen_by_all and not public:
        raise ConfigError(
            f"--push-to-hub {repository}: it is public already, and everybody would see the model. Add --public, or "
            "give another name."
        )
    if public and not seen_by_all:
        raise ConfigError(
            f"--push-to-hub {repository}: it is there already, and private. Make it public on the Hub first, or leave "
            "--public out."
        )
    try:
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by fedit", delete_patterns=_EARLIER_FILES
        )
    except Exception as error:
        raise EngineError(f"--push-to-hub {repository}: {error}") from error
    return str(url)


def check_hub(repository: str) -> None:
    """Make sure that `repository` is a NAMESPACE/NAME, and that there is a token; calls nobody.

    Raises:
        ConfigError: it is not, or there is none.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repository}: {error}") from error
    if "/" not in repository:
        raise ConfigError(f"--push-to-hub {repository}: expected NAMESPACE/NAME, e.g. my-lab/{repository}.")
    if get_token() is None:
        raise ConfigError("--push-to-hub needs a token: set HF_TOKEN to one that may write, or run `hf auth login`.")
