"""What the repository promises about itself."""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedit

MAX_LINES = 400


def test_modules_stop_at_400_lines(repository: Path):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (repository / "src").rglob("*.py")}
    assert lengths
    assert {str(path): length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_light_modules_import_nothing_heavy():
    script = (
        "import sys, fedit, fedit.interfaces, fedit.config, fedit.console; fedit.load_config; "
        "print({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "set()", "")


def test_every_public_name_is_there():
    assert len(fedit._MODULES) > 5
    for name in fedit._MODULES:
        assert callable(getattr(fedit, name)), name
        assert name in dir(fedit)
    with pytest.raises(AttributeError, match="no attribute 'ran'"):
        operator.attrgetter("ran")(fedit)


def constraints(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    return dict(pin.split("==") for pin in pins if pin)


def test_constraints_are_exact_public_versions(repository: Path):
    pins = constraints(repository)
    assert len(pins) > 50
    # A local version (+cpu, +cu128) would pin one kind of wheel, which other machines cannot use or even find.
    assert [name for name, version in pins.items() if not re.fullmatch(r"[0-9][0-9a-z.]*", version)] == []


def test_constraints_satisfy_the_declared_dependencies(repository: Path):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {canonicalize_name(name): version for name, version in constraints(repository).items()}
    declared = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
    wrong = [str(each) for each in declared if not each.specifier.contains(pins.get(canonicalize_name(each.name), "0"))]
    assert wrong == []


def test_the_documentation_is_built_strictly(repository: Path) -> None:
    """Quiet, mkdocs counts no warning."""
    (build,) = re.findall(r"mkdocs build.*", (repository / "Makefile").read_text(encoding="utf-8"))
    assert "--strict" in build
    assert "--quiet" not in build


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", ".ci/run"])
def test_expected_files_exist_and_say_something(repository: Path, name: str):
    assert (repository / name).read_text(encoding="utf-8").strip()


def test_contributing_is_short(repository: Path):
    assert len((repository / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 100


def test_every_decision_is_in_the_navigation(repository: Path):
    navigation = (repository / "mkdocs.yml").read_text(encoding="utf-8")
    decisions = sorted((repository / "docs" / "decisions").glob("[0-9]*.md"))
    assert decisions
    assert [path.name for path in decisions if f"decisions/{path.name}" not in navigation] == []


def test_tiny_model_is_what_its_fixture_says(tiny_model_folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size <= 300
    ids = tokenizer("Grüße!")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Grüße!"
    assert tokenizer.eos_token_id not in ids
