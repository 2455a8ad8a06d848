"""Tiers by folder, no network, the tiny model, and the folder of shared data."""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

pytest.register_assert_rewrite("engine_suite")

# A shell that starts this process in the background lets it ignore Ctrl-C, and all processes that tests start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
BOS, EOS = 0, 1
TIERS = ("unit", "conformance", "invariant", "integration", "deployment")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the tier that its folder names; the examples in docstrings are unit tests."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else "unit"
        if tier not in TIERS:
            raise pytest.UsageError(f"{item.path}: a test stands in one of the folders {', '.join(TIERS)}")
        item.add_marker(tier)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return TESTS.parent


@pytest.fixture(scope="session")
def shared(repository: Path) -> Path:
    """The folder of real data and models, which is no part of the repository: ``../shared``, or ``FEDIT_SHARED``."""
    folder = Path(os.environ.get("FEDIT_SHARED") or repository.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the data and models of {folder}, which is absent (FEDIT_SHARED names another folder)")
    return folder


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, type]]:
    """The registry of plug-ins, restored after the test: define plug-ins of your own in it."""
    from fedit import plugin

    copy = {kind: dict(members) for kind, members in plugin._registry.items()}
    monkeypatch.setattr(plugin, "_registry", copy)
    return copy


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<s>": BOS, "</s>": EOS}
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, hidden 32, grouped-query attention, untied head) and a tokenizer of bytes.

    The tokenizer puts a BOS in front, as Llama's does, and has no padding token. Same weights in every session.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = _tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
