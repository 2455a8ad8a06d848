"""The command of a run: whatever made its configuration, the command makes it again."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedit.config import RunConfig, load_config, override_value, run_command, shipped_recipes, shipped_studies
from fedit.interfaces import ConfigError
from fedit.study import load_study, plan


def config_of(command: str | None) -> RunConfig:
    """Return what the command line would load."""
    assert command is not None
    program, verb, recipe, *rest = shlex.split(command)
    assert (program, verb) == ("fedit", "run")
    options = list(zip(rest[::2], rest[1::2], strict=True))
    overrides = [value for option, value in options if option == "-o"]
    seeds = [value for option, value in options if option == "--seed"]
    return load_config(recipe, [*overrides, *(f"seed={seed}" for seed in seeds)])


def test_only_what_differs_is_said():
    assert run_command(load_config("default"), "default") == "fedit run default --seed 0"
    overrides = ["client.moments=reset", "aggregation.name=hetlora", "server_optimizer.learning_rate=1.0"]
    given = shlex.join(
        ["fedit", "run", "default", *(part for each in overrides for part in ("-o", each)), "--seed", "3"]
    )
    assert run_command(load_config("default", [*overrides, "seed=3"]), "default") == given


@pytest.mark.parametrize("recipe", ["", "gone.toml"])
def test_without_its_recipe_the_default_one_is_changed(recipe):
    config = load_config("dolly", ["cohort.size=3"])
    command = run_command(config, recipe)
    assert command is not None
    assert command.startswith("fedit run default -o rounds=72 ")
    assert config_of(command) == config


def test_a_recipe_that_was_changed_since_is_changed_back(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('rounds = 3\n[data.columns]\ninstruction = "q"\n')
    config = load_config(str(recipe))
    recipe.write_text('rounds = 4\n[data.columns]\ncontext = "c"\n')
    command = run_command(config, str(recipe))
    assert config_of(command) == config
    assert command == f'fedit run {recipe} -o rounds=3 -o \'data.columns={{ "instruction" = "q" }}\' --seed 0'
    recipe.write_text("rounds = ")
    assert config_of(run_command(config, str(recipe))) == config


def test_what_no_command_line_can_say(tmp_path):
    """Text "none" stands for nothing where a key may be left out."""
    config = load_config("default")
    config = config.model_copy(update={"data": config.data.model_copy(update={"test_path": "none"})})
    assert run_command(config, "default") is None


@pytest.mark.parametrize("study", sorted(shipped_studies()))
def test_every_run_of_the_shipped_studies(study, tmp_path):
    grid = load_study(study)
    grid = grid.model_copy(update={"seeds": grid.seeds[:1]})
    for run in plan(grid, tmp_path / "nowhere", [], []):
        assert config_of(run_command(run.config, grid.recipe)) == run.config


KEYS = st.fixed_dictionaries(
    {},
    optional={
        "rounds": st.integers(1, 99),
        "adapter.rank": st.sampled_from([4, "[4, 8]", "{ min = 2, max = 8 }"]),
        "aggregation.name": st.sampled_from(["fedit", "hetlora", "flexlora"]),
        "client.learning_rate": st.floats(1e-9, 1e9, allow_nan=False),
        "client.clip_norm": st.sampled_from(["none", 0.5]),
        "client.moments": st.just("reset"),
        "server_optimizer.name": st.sampled_from(["fedavg", "fedadam"]),
        "data.path": st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(override_value),
        "data.columns": st.just('{ instruction = "a b" }'),
        "attack.name": st.sampled_from(["sign-flip", "label-flip"]),
        "cohort.availability": st.sampled_from(['{ "a.b" = [[1, 2]] }', 0.5]),
        "evaluation.baselines": st.sampled_from(["true", "false"]),
    },
)


@settings(deadline=None, max_examples=60)
@given(keys=KEYS, recipe=st.sampled_from([*shipped_recipes(), ""]), seed=st.integers(0, 2**31))
def test_any_configuration(keys, recipe, seed):
    overrides = [f"{key}={value}" for key, value in keys.items()]
    try:
        config = load_config(recipe or "default", [*overrides, f"seed={seed}"])
    except ConfigError:
        return
    assert config_of(run_command(config, recipe)) == config
