"""The run description: what loads, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fedit.config import (
    ClientConfig,
    CohortConfig,
    RunConfig,
    apply_overrides,
    load_config,
    load_plugins,
    parse_config,
    shipped_recipes,
)
from fedit.config import loading as config_module
from fedit.interfaces import ConfigError, Example, Partition, derive_rng, derive_seed, plugin_kinds, plugins

load_plugins()


def refusal(tables: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tables)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- wrong descriptions


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"cleint": {}}, "unknown key 'cleint'. Did you mean 'client'?"),
        ({"int": 3}, "unknown key 'int'."),
        (
            {"client": {"local_epochs": 1, "lerning_rate": 1}},
            "unknown key 'client.lerning_rate'. Did you mean 'learning_rate'?",
        ),
        (
            {"partition": {"name": "dirichlet", "alhpa": 1}},
            "[partition] dirichlet: unknown key 'alhpa'. Did you mean 'alpha'?",
        ),
        ({"partition": "dirichet"}, "[partition] name = 'dirichet' is unknown. Did you mean 'dirichlet'?"),
        ({"aggregation": {"name": "fedti"}}, "[aggregation] name = 'fedti' is unknown. Did you mean 'fedit'?"),
        ({"data": {"template": "alpcaa"}}, "[template] name = 'alpcaa' is unknown. Did you mean 'alpaca'?"),
        ({"server_optimizer": 3}, "[server_optimizer]: expected a name, got 3. Known: fedadagrad, fedadam, fedavg"),
        ({"partition": {"num_clients": 5}}, "[partition]: expected a name, got {'num_clients': 5}."),
        (
            {"data": {"columns": {"instrction": "question"}}},
            "data.columns: unknown column 'instrction'. Did you mean 'instruction'?",
        ),
    ],
)
def test_unknown_words_are_answered_with_the_nearest_known_one(tables: dict[str, object], message: str):
    assert message in refusal(tables)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"rounds": 0}, "rounds: Input should be greater than or equal to 1, got 0"),
        ({"client": 3}, "client: expected a table, got 3"),
        ({"adapter": {"rank": [8, 0]}}, "adapter.rank.1: Input should be greater than or equal to 1, got 0"),
        ({"adapter": {"rank": []}}, "adapter.rank: Tuple should have at least 1 item"),
        ({"adapter": {"target_modules": []}}, "adapter.target_modules: Tuple should have at least 1 item"),
        ({"adapter": {"target_modules": "q_proj"}}, 'expected "all-linear" or a list of layer names'),
        ({"adapter": {"dropout": 1.0}}, "adapter.dropout: Input should be less than 1, got 1.0"),
        (
            {"client": {"local_epochs": 1, "learning_rate": float("inf")}},
            "client.learning_rate: Input should be a finite",
        ),
        ({"client": {"local_epochs": 1, "learning_rate": float("nan")}}, "client.learning_rate: Input should be"),
        ({"engine": {"slots": 0}}, "engine.slots: Input should be greater than or equal to 1, got 0"),
        (
            {"partition": {"name": "dirichlet", "alpha": -1.0}},
            "[partition] dirichlet: alpha: Input should be greater than 0, got -1.0",
        ),
        ({"client": {"local_epochs": 1, "local_steps": 1}}, "client: give exactly one of local_steps and local_epochs"),
        ({"client": {"learning_rate": 0.1}}, "client: give exactly one of local_steps and local_epochs"),
        ({"cohort": {"fraction": 0.5, "size": 2}}, "cohort: give fraction or size, not both"),
    ],
)
def test_wrong_values_are_named_with_what_was_got(tables: dict[str, object], message: str):
    assert message in refusal(tables)


def test_a_value_of_two_types_is_refused_once():
    assert refusal({"adapter": {"rank": -1}}) == "adapter.rank: Input should be greater than or equal to 1, got -1"


def test_every_wrong_key_is_named_at_once():
    lines = refusal({"rounds": 0, "seeed": 1, "engine": {"slots": "x"}}).splitlines()
    assert {line.split()[0] for line in lines} == {"rounds:", "unknown", "engine.slots:"}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"partition": {"name": "iid", "num_clients": 4}, "cohort": {"size": 5}},
            "[cohort] size = 5 is more than [partition] num_clients = 4.",
        ),
        (
            {"partition": {"name": "iid", "num_clients": 4}, "cohort": {"fraction": 0.5, "min_updates": 3}},
            "[cohort] min_updates = 3 can never be reached: a cohort has 2 clients.",
        ),
        (
            {"partition": "natural", "cohort": {"size": 2, "min_updates": 3}},
            "cohort: min_updates = 3 can never be reached by a cohort of 2",
        ),
        (
            {"adapter": {"rank": [4, 8]}, "aggregation": "fedit"},
            "[adapter] rank = [4, 8]. Use one rank, or one of: hetlora, flora, flexlora",
        ),
        (
            {"aggregation": "flexlora", "server_optimizer": {"name": "fedavg", "learning_rate": 2.0}},
            "[server_optimizer] learning_rate = 2.0 stretches the step",
        ),
        (
            {"aggregation": "flexlora", "client": {"local_steps": 1, "moments": "keep"}},
            '[client] moments = "keep" goes on with moments of the old factors',
        ),
    ],
)
def test_impossible_combinations_are_refused(tables: dict[str, object], message: str):
    assert message in refusal(tables)


def test_mixed_ranks_load_where_the_aggregation_can():
    config = parse_config({"adapter": {"rank": [4, 8]}, "aggregation": "flexlora"})
    assert config.adapter.rank == (4, 8)
    assert config.adapter.max_rank == 8


def test_a_plugin_can_refuse_a_run(registry: dict[str, dict[str, type]]):
    class OnlyShort(Partition):
        """Refuses long runs."""

        name: ClassVar[str] = "only_short"

        def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {}

        def check(self, run: RunConfig) -> None:
            if run.rounds > 3:
                raise ConfigError("[partition] only_short: at most 3 rounds")

    assert isinstance(parse_config({"rounds": 3, "partition": "only_short"}).partition, OnlyShort)
    assert refusal({"rounds": 4, "partition": "only_short"}) == "[partition] only_short: at most 3 rounds"


def test_a_configuration_is_frozen():
    config = parse_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3


# ----------------------------------------------------------------------------------------------------------- numbers


def test_number_of_local_steps():
    assert ClientConfig(local_steps=7).num_steps(1) == 7
    assert ClientConfig(local_epochs=2, batch_size=8).num_steps(17) == 6
    assert ClientConfig(local_epochs=1, batch_size=8).num_steps(1) == 1


@pytest.mark.parametrize(
    ("cohort", "num_clients", "expected"),
    [
        (CohortConfig(), 10, 10),
        (CohortConfig(fraction=0.1), 10, 1),
        (CohortConfig(fraction=0.1), 3, 1),
        (CohortConfig(size=4), 10, 4),
    ],
)
def test_size_of_a_cohort(cohort: CohortConfig, num_clients: int, expected: int):
    assert cohort.num_sampled(num_clients) == expected


@given(seed=st.integers(), round_index=st.integers(0, 10_000))
def test_derived_seeds_depend_on_every_part(seed: int, round_index: int):
    this = derive_seed(seed, "cohort", round_index)
    assert 0 <= this < 2**63
    assert this == derive_seed(seed, "cohort", round_index)
    others = {
        derive_seed(seed + 1, "cohort", round_index),
        derive_seed(seed, "noise", round_index),
        derive_seed(seed, "cohort", round_index + 1),
        derive_seed(seed, f"cohort{round_index}"),
    }
    assert this not in others
    assert len(others) == 4


def test_derived_generators_repeat():
    assert (
        derive_rng(1, "a", 2).integers(1000, size=8).tolist() == derive_rng(1, "a", 2).integers(1000, size=8).tolist()
    )


# --------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("client.learning_rate=3e-4", {"client": {"learning_rate": 3e-4}}),
        ("adapter.rank=[4, 8]", {"adapter": {"rank": [4, 8]}}),
        ("evaluation.baselines = false", {"evaluation": {"baselines": False}}),
        ("model.path=models/tiny", {"model": {"path": "models/tiny"}}),
        ("model.path=a=b", {"model": {"path": "a=b"}}),
        ("model.path='7'", {"model": {"path": "7"}}),
        ("seed=7", {"seed": 7}),
        ("partition=iid", {"partition": "iid"}),
        ("data.columns={instruction='q'}", {"data": {"columns": {"instruction": "q"}}}),
        ("data.template.name=plain", {"data": {"template": {"name": "plain"}}}),
    ],
)
def test_an_override_is_toml_or_else_text(override: str, expected: dict[str, object]):
    assert apply_overrides({}, [override]) == expected


@pytest.mark.parametrize("override", ["rounds", "=3", "client.=3", ".rounds=3", "client..batch_size=3"])
def test_an_override_without_a_key_or_value_is_refused(override: str):
    with pytest.raises(ConfigError, match=r"expected key\.sub=value"):
        apply_overrides({}, [override])


def test_overrides_leave_the_recipe_alone():
    tables = {"data": {"template": {"name": "alpaca"}}, "client": {"batch_size": 4}}
    before = json.dumps(tables)
    apply_overrides(tables, ["data.template.name=plain", "client.batch_size=8", "seed=1"])
    assert json.dumps(tables) == before


DIRICHLET = {"partition": {"name": "dirichlet", "num_clients": 5, "alpha": 0.1}}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["partition.name=iid"], {"name": "iid"}),
        (["partition=iid"], "iid"),
        (["partition.name=dirichlet"], DIRICHLET["partition"]),
        (["partition.alpha=2.5"], {"name": "dirichlet", "num_clients": 5, "alpha": 2.5}),
        (["partition.name=iid", "partition.num_clients=3"], {"name": "iid", "num_clients": 3}),
        (["partition.num_clients=3", "partition.name=iid"], {"name": "iid", "num_clients": 3}),
        (["partition=iid", "partition.num_clients=3"], {"name": "iid", "num_clients": 3}),
        (["partition.num_clients=3", "partition=iid"], {"name": "iid", "num_clients": 3}),
    ],
)
def test_choosing_another_plugin_drops_the_parameters_of_the_former(overrides: list[str], expected: object):
    assert apply_overrides(DIRICHLET, overrides)["partition"] == expected


def test_none_unsets_what_may_be_left_out():
    tables = {"client": {"local_epochs": 2}, "cohort": {"fraction": 0.5}, "data": {"test_path": "test.jsonl"}}
    overrides = ["client.local_epochs=none", "client.local_steps=5", "client.clip_norm=none"]
    overrides += ["cohort.fraction=none", "data.test_path=none", "model.path=none"]
    config = parse_config(apply_overrides(tables, overrides))
    assert (config.client.local_epochs, config.client.local_steps, config.client.clip_norm) == (None, 5, None)
    assert (config.cohort.fraction, config.data.test_path) == (None, None)
    assert config.model.path == "none"  # where something must be given, it is a text like any other


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"client": {"local_steps": 3, "clip_norm": "none"}},
        {"adapter": {"rank": [4, 8], "target_modules": ["q_proj", "v_proj"]}, "aggregation": "flexlora"},
        {"partition": {"name": "dirichlet", "num_clients": 4, "alpha": 0.3}, "cohort": {"size": 2}},
        {"server_optimizer": "fedavgm", "data": {"columns": {"instruction": "question"}, "template": "plain"}},
    ],
)
def test_what_is_written_reads_back_equal(tables: dict[str, object]):
    config = parse_config(tables)
    assert parse_config(config.to_json()) == config
    assert parse_config(json.loads(json.dumps(config.to_json(), allow_nan=False))) == config


def test_parameters_of_a_plugin_are_written(registry: dict[str, dict[str, type]]):
    class Optional(Partition):
        """A parameter whose default is not None, and which may be None."""

        name: ClassVar[str] = "optional"
        cap: int | None = Field(default=3, ge=1)

        def split(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {}

    config = parse_config({"partition": {"name": "optional", "cap": None}})
    assert config.to_json()["partition"] == {"name": "optional", "cap": None}
    assert parse_config(config.to_json()) == config


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads(name: str):
    config = load_config(name)
    assert parse_config(config.to_json()) == config


def test_an_unknown_recipe_is_answered_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quickstart.toml").write_text("seed = 1")
    monkeypatch.setattr(config_module, "shipped_recipes", lambda: {path.stem: path for path in tmp_path.glob("*.toml")})
    with pytest.raises(ConfigError, match=r"No shipped recipe is named 'quikstart'. Did you mean 'quickstart'\?"):
        load_config("quikstart")
    assert load_config("quickstart").seed == 1


def test_a_recipe_of_ones_own(tmp_path: Path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('rounds = 3\n[partition]\nname = "iid"\nnum_clients = 4\n')
    config = load_config(str(recipe), ["rounds=5"])
    assert (config.rounds, config.to_json()["partition"]) == (5, {"name": "iid", "num_clients": 4})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"rounds = ", "is not valid TOML: Invalid value"),
        (b"# \xff", "is not valid TOML: 'utf-8' codec"),
    ],
)
def test_an_unreadable_recipe_is_named(tmp_path: Path, content: bytes | None, message: str):
    recipe = tmp_path / "mine.toml"
    if content is not None:
        recipe.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(str(recipe))
    assert str(recipe) in str(caught.value)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- plug-ins


def plugin_source(name: str, class_name: str = "Mine") -> str:
    return dedent(
        f'''
        """A plug-in in a file of its own."""
        from typing import ClassVar

        from fedit.interfaces import Partition


        class {class_name}(Partition):
            """Nothing to everybody."""

            name: ClassVar[str] = "{name}"
            share: float = 0.5

            def split(self, examples, rng):
                return {{}}
        '''
    )


def test_a_plugin_file_registers_and_its_parameters_are_fields(tmp_path: Path, registry: dict[str, dict[str, type]]):
    file = tmp_path / "mine.py"
    file.write_text(plugin_source("of_my_own"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[partition]\nname = "of_my_own"\nshare = 0.25\n')
    config = load_config(str(recipe), plugin_files=[file])
    assert config.to_json()["partition"] == {"name": "of_my_own", "share": 0.25}
    load_plugins([file, file])  # a file is run once


def test_two_plugin_files_of_the_same_name_are_both_loaded(tmp_path: Path, registry: dict[str, dict[str, type]]):
    files = [tmp_path / folder / "mine.py" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(plugin_source(f"of_folder_{file.parent.name}"))
    load_plugins(files)
    assert {"of_folder_a", "of_folder_b"} <= set(plugins("partition"))


@pytest.mark.parametrize(
    ("file_name", "content", "message"),
    [
        ("missing.py", None, "no such Python file"),
        ("folder.py/", None, "no such Python file"),
        ("plugin.txt", "x = 1", "no such Python file"),
        ("broken.py", "def (", "does not import: SyntaxError"),
        ("needs.py", "import a_package_that_nobody_has", "does not import: ModuleNotFoundError"),
        ("raises.py", "{}['key']", "does not import: KeyError: 'key'"),
        ("asserts.py", "assert False", "does not import: AssertionError"),
        (
            "fields.py",
            "from fedit.interfaces import Partition\nclass X(Partition):\n    name = 'fields_of_no_type'\n    y = 3\n",
            "does not import: PydanticUserError",
        ),
        ("clash.py", plugin_source("iid"), "Two partition plug-ins are named 'iid': fedit.partition.IID and"),
    ],
)
def test_a_plugin_file_that_cannot_be_used_is_named(
    tmp_path: Path, registry: dict[str, dict[str, type]], file_name: str, content: str | None, message: str
):
    file = tmp_path / file_name
    if file_name.endswith("/"):
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    for _ in range(2):  # a failed file is not taken for a loaded one
        with pytest.raises(ConfigError) as caught:
            load_plugins([file])
        assert str(caught.value).startswith(f"--plugin {file}")
        assert message in str(caught.value)


def test_a_name_clash_raises(registry: dict[str, dict[str, type]]):
    with pytest.raises(
        ConfigError, match=r"Two partition plug-ins are named 'dirichlet': fedit\.partition\..*Rename one"
    ):

        class Another(Partition):
            """Takes a name that is taken."""

            name: ClassVar[str] = "dirichlet"


def test_a_broken_entry_point_is_named(monkeypatch: pytest.MonkeyPatch):
    from importlib import metadata

    broken = metadata.EntryPoint("theirs", "a_package_that_nobody_has.plugins", "fedit.plugins")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    with pytest.raises(ConfigError, match=r"a_package_that_nobody_has\.plugins does not import: ModuleNotFoundError"):
        load_plugins()


def test_the_plugins_of_fedit_itself_come_by_entry_points(repository: Path):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["entry-points"]["fedit.plugins"].values()) >= {"fedit.aggregation", "fedit.partition"}
    assert set(plugin_kinds()) >= {"aggregation", "partition", "server_optimizer", "template"}
