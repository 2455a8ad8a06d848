"""Federations of both engines, as processes on loopback."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federations import SITES, Deployment, free_port, write_recipe

ENGINES = {"nvflare": "nvflare", "flower": "flwr"}
"""And the package that each needs"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes are slow to start, and found in /proc."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.skipif(sys.platform != "linux", reason="the processes are found in /proc"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that needs an engine behind each, or behind the one that its module's ENGINE names."""
    if "engine" in metafunc.fixturenames:
        one = getattr(metafunc.module, "ENGINE", None)
        metafunc.parametrize("engine", ENGINES if one is None else [one], indirect=True, scope="module")


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    """The engine, if what it needs is installed."""
    name = request.param
    if importlib.util.find_spec(ENGINES[name]) is None:
        pytest.skip(f"needs fedit[{name}]")
    if name == "flower" and shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip("needs nginx (apt install nginx-light)")
    return name


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, engine: str
) -> Iterator[tuple[Deployment, Path]]:
    """A federation that runs, and a recipe for it."""
    folder = tmp_path_factory.mktemp("fed")
    recipe = write_recipe(folder, tiny_model_folder)
    deployment = Deployment(folder / "f", folder / "rows", tiny_model_folder, free_port(), engine)
    deployment.start("server", *SITES)
    try:
        deployment.wait_for_sites(*SITES)
        yield deployment, recipe
    finally:
        deployment.stop()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here as at the sites, which share the cores; other sums have other bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
