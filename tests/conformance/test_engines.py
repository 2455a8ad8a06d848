"""What every engine must do: the same rounds to the bit, and failures that stay those of a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federations import SITES, Direct, Finished, federate, load, simulate, write_recipe, write_site

from fedit.interfaces import Adapter


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Path:
    return write_recipe(tmp_path, tiny_model_folder)


@pytest.fixture
def direct(tmp_path: Path, recipe: Path) -> Iterator[Direct]:
    """Three sites behind a transport in this process."""
    transport = Direct({name: write_site(tmp_path / "sites" / name, name, tmp_path / "rows") for name in SITES})
    yield transport
    transport.close()


def assert_equal(left: Finished, right: Finished) -> None:
    assert left[1] == right[1]
    assert_same_bits(left[0], right[0])


def assert_same_bits(left: Adapter, right: Adapter) -> None:
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("client.moments=keep", "client.schedule=cosine", "cohort.size=2"),
        ("aggregation.name=fedex-lora",),
        ("aggregation.name=fedsa-lora",),
        ("aggregation.name=fed-sb",),
        ("aggregation.name=lora-a2",),
        ("adapter.rank=[1,2,4]", "aggregation.name=hetlora"),
        ("objective.name=scaffold", "client.optimizer=sgd", "client.clip_norm=none"),
        ("objective.name=ditto",),
        ("upload.mask=top-k", "upload.density=0.1", "upload.quantizer=int8", "download.quantizer=int8"),
    ],
    ids=lambda overrides: " ".join(overrides) or "fedit",
)
def test_real_sites_give_the_bits_of_the_simulation(
    recipe: Path, direct: Direct, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = load(recipe, *overrides)
    assert_equal(federate(config, direct), simulate(config, tmp_path / "store"))
