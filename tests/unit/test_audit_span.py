"""Tokens read from gradients of a tiny model: all of one step, few of the second factor alone, none of noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedit.audit.span import Embeddings, pursue, recover
from fedit.base import load_base, load_tokenizer
from fedit.config import AdapterConfig, ClientConfig, ModelConfig
from fedit.interfaces import Adapter, EncodedExample, Example
from fedit.model import StackedModel
from fedit.tuning import TuningTask, tune

STEP = ClientConfig(local_steps=1, batch_size=4, optimizer="sgd", learning_rate=1.0, clip_norm=None)


def make_model(folder, *targets: str) -> StackedModel:
    config, path = AdapterConfig(rank=8, alpha=8, target_modules=targets or "all-linear"), str(folder)
    return StackedModel(
        load_base(ModelConfig(path=path, dtype="float32"), torch.device("cpu")), load_tokenizer(path), config
    )


def make_rows(tokens: Sequence[Sequence[int]]) -> list[EncodedExample]:
    return [EncodedExample(np.asarray(row, np.int32), np.arange(len(row)) > 1, Example(())) for row in tokens]


@pytest.fixture(scope="module")
def model(tiny_model_folder) -> StackedModel:
    return make_model(tiny_model_folder)


@pytest.fixture(scope="module")
def embeddings(model) -> Embeddings:
    return Embeddings(model)


@pytest.fixture(scope="module")
def adapter(model) -> Adapter:
    fresh = model.fresh_adapter(np.random.default_rng(0))
    rng = torch.Generator().manual_seed(0)
    return fresh.with_tensors(
        {name: torch.randn(tensor.shape, generator=rng) / 4 if "lora_B" in name else tensor
         for name, tensor in fresh.tensors.items()}
    )  # fmt: skip


ROWS = make_rows([[5, 9, 44, 120, 61, 7], [9, 200, 13, 44, 77, 31]])
TOLD = {5, 9, 44, 120, 61, 200, 13, 77}
"""What comes last in a row predicts nothing"""
PUBLIC = make_rows([[5, 6, 44, 3, 1, 1]])


def update_of(model: StackedModel, adapter: Adapter, rows: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    task = TuningTask("client", rows, adapter, 0, 1, 1, 0)
    (result,) = tune(model, [task], STEP, 1)
    return {name: tensor - adapter.tensors[name] for name, tensor in result.adapter.tensors.items()}


def test_what_the_first_layers_see_of_each_token(model, embeddings) -> None:
    """The normalised embedding, in the layers of the first block that read it."""
    block = model.base.model.layers[0]
    expected = block.input_layernorm(model.base.get_input_embeddings().weight).double()
    assert torch.allclose(embeddings.inputs, expected, atol=1e-6)
    assert [name.rpartition(".")[2] for name in embeddings.modules] == ["q_proj", "k_proj", "v_proj"]


def test_one_step_gives_all_its_tokens_away(model, embeddings, adapter) -> None:
    views = embeddings.views(update_of(model, adapter, ROWS), adapter)
    assert set(pursue(views, len(TOLD))) == TOLD
    found = recover(views, ROWS, PUBLIC, np.random.default_rng(0))
    assert (found.num_tokens, found.recall, found.unguessed_recall) == (8, 1.0, 1.0)
    assert found.blind < 0.5
    assert found.guessed == pytest.approx(2 / 8)  # the rows that everybody has name 5 and 44


def test_the_untrained_adapter_gives_its_second_factor_only(model, embeddings) -> None:
    """B = 0: the gradient of A is zero."""
    fresh = model.fresh_adapter(np.random.default_rng(0))
    update = update_of(model, fresh, ROWS[:1])
    views = embeddings.views(update, fresh)
    assert not views[-1][1].any()
    assert len({5, 9, 44, 120, 61} & set(pursue(views, 5))) >= 4


def test_noise_hides_tokens(model, embeddings, adapter) -> None:
    rng = np.random.default_rng(1)
    update = {
        name: 30 * tensor.norm() / tensor.numel() ** 0.5 * torch.from_numpy(rng.standard_normal(tensor.shape)) + tensor
        for name, tensor in update_of(model, adapter, ROWS).items()
    }
    assert recover(embeddings.views(update, adapter), ROWS, PUBLIC, rng).recall <= 0.25


def test_vectors_and_other_layers_have_no_span(model, embeddings, adapter) -> None:
    update = {
        "tied.lora_v.weight": torch.ones(1, 4),
        "model.layers.1.self_attn.q_proj.lora_A.weight": torch.ones(8, 32),
    }
    views = embeddings.views(update, adapter)
    assert views == []
    found = recover(views, ROWS, PUBLIC, np.random.default_rng(0))
    assert (found.recall, found.blind, found.unguessed_recall) == (0.0, 0.0, 0.0)


def test_layers_behind_the_first_attention_see_more_than_a_token(tiny_model_folder) -> None:
    from fedit.interfaces import EngineError

    with pytest.raises(EngineError, match="sees the embedding of a token alone"):
        Embeddings(make_model(tiny_model_folder, "layers.1.self_attn.q_proj"))
