"""The command line: reads the arguments, calls the library, prints. Heavy imports wait inside the commands."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedit.cli_audit import audit_app
from fedit.cli_evaluate import evaluate_app
from fedit.cli_export import export_app
from fedit.cli_federation import federation_app, site_app
from fedit.cli_judge import judge_app
from fedit.cli_track import track_app
from fedit.cli_use import chat, serve, ui
from fedit.config import DType, RunConfig, load_plugins
from fedit.console import (
    AsJson,
    Overrides,
    PluginFiles,
    Seed,
    Track,
    console,
    load,
    print_json,
    quiet,
    resumed,
    say,
)
from fedit.files import new_folder
from fedit.interfaces import ConfigError, DataError, EngineError, FeditError, plugin_kinds, plugins
from fedit.logs import log_to_stderr

if TYPE_CHECKING:
    from fedit.prepare import FederatedData

app = App(name="fedit", help="Federated instruction tuning: tune one LLM on everybody's instructions.")
app.command(federation_app)
app.command(site_app)
app.command(audit_app)
app.command(judge_app)
app.command(evaluate_app)
app.command(export_app)
app.command(track_app)
for command in (chat, ui, serve):
    app.command(command)


@app.command
def run(
    recipe: str | None = None,
    /,
    *,
    override: Overrides = None,
    plugin: PluginFiles = None,
    out: Annotated[Path | None, Parameter(help="The run folder; by default a new one, runs/RECIPE")] = None,
    resume: Annotated[Path | None, Parameter(help="Go on with the run in this folder")] = None,
    seed: Seed = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Run the experiment: base, local-only, centralised and federated, evaluated and reported.

    RECIPE is a TOML file or the name of a shipped recipe; without one it is "default".
    """
    if resume is not None:
        config, recipe, plugin = resumed(resume, recipe, override, plugin, out, seed)
        folder = resume
    else:
        recipe = recipe or "default"
        config = load(recipe, override, plugin, seed)
        folder = out or new_folder(Path(recipe).stem)
    quiet()
    from fedit.experiment import check_folder, run_experiment
    from fedit.live import LiveView
    from fedit.report.terminal import final_table
    from fedit.tracking import Mirror, wanted_trackers

    check_folder(folder, config, resume=resume is not None)
    trackers = wanted_trackers(folder, track or ())
    data = _prepare(config)
    try:
        with LiveView(console) as view, Mirror(folder, trackers, view) as mirror:
            result = run_experiment(config, folder, data, mirror, recipe=recipe, plugin_files=plugin or ())
    except KeyboardInterrupt:
        say(f"\nInterrupted. {_how_to_go_on(folder)}")
        sys.exit(130)
    except (FeditError, OSError) as error:
        if not isinstance(error, ConfigError | DataError):  # those would only come again
            error.add_note(_how_to_go_on(folder))
        raise
    console.print(final_table(result.evaluation))
    say("\n".join([f"Report:  {folder / 'report.html'}", f"Adapter: {folder / 'adapter'}", *mirror.summary()]))
    if as_json:
        print_json({"folder": str(folder), **result.evaluation})


@app.command
def check(
    recipe: str = "default",
    /,
    *,
    override: Overrides = None,
    plugin: PluginFiles = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe against its data and model without training anything."""
    config = load(recipe, override, plugin, seed)
    quiet()
    from fedit.base import find_targets, load_base, resolve_device

    data = _prepare(config)
    base = load_base(config.model, resolve_device(config.engine.device))
    targets = find_targets(base, config.adapter.target_modules)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    console.print(f"Base: {parameters:,} parameters, {len(targets)} adapted layers. Ready to run.", highlight=False)
    if as_json:
        print_json(data.summary)


@app.command
def partition(
    recipe: str = "default",
    /,
    *,
    override: Overrides = None,
    plugin: PluginFiles = None,
    out: Annotated[Path | None, Parameter(help="Write the client x category picture to this SVG file")] = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Show who holds what: clients by categories."""
    config = load(recipe, override, plugin, seed)
    quiet()
    data = _prepare(config)
    if out is not None:
        from fedit.report.plots import partition_figure
        from fedit.report.svg import standalone_svg

        out.write_text(standalone_svg(str(partition_figure(data.summary))), encoding="utf-8")
        say(f"Picture: {out}")
    if as_json:
        print_json(data.summary)


@app.command
def study(
    file: str,
    /,
    *,
    recipe: Annotated[str | None, Parameter(help="In place of the study's own recipe")] = None,
    override: Overrides = None,
    plugin: PluginFiles = None,
    out: Annotated[Path | None, Parameter(help="The study's folder; by default studies/FILE")] = None,
    jobs: Annotated[int, Parameter(help="Runs at the same time; they share the threads")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run a grid of experiments over several seeds, and make one table of them.

    FILE is a TOML file or the name of a shipped study. The same command goes on where it was interrupted; runs that
    the file has gained are added.
    """
    from fedit.comparison import table, write_comparison
    from fedit.report.terminal import comparison_table
    from fedit.study import compare_study, load_study, plan, run_study, write_study

    grid = load_study(file)
    if recipe is not None:
        grid = grid.model_copy(update={"recipe": recipe})
    folder = out or Path("studies") / Path(file).stem
    runs = plan(grid, folder, override or [], plugin or [])
    try:
        num_failed = run_study(grid, runs, folder, jobs, plugin or [], say)
    except KeyboardInterrupt:
        say(f"\nInterrupted. The same command goes on. Table so far: {folder / 'study.md'}")
        sys.exit(130)
    found = compare_study(grid, runs, folder)
    write_study(folder, grid, runs, found)
    page = write_comparison(found, folder, "study")
    console.print(comparison_table(*table(found, details=False), len(found.axes)))
    say(f"Page:  {page}\nTable: {folder / 'study.md'}, .csv and .tex")
    if as_json:
        print_json(found.to_json())
    if num_failed:
        raise EngineError(f"{num_failed} of {len(runs)} runs failed; the same command tries them again.")


@app.command
def compare(
    folder: Path,
    /,
    *folders: Path,
    out: Annotated[Path, Parameter(help="Where compare.html, compare.csv and compare.tex go")] = Path("comparison"),
    as_json: AsJson = False,
) -> None:
    """Compare finished runs: a table, a page, CSV and LaTeX.

    Runs that differ by the seed alone are one group; the others are compared with the group of the first folder.
    """
    from fedit.comparison import compare as compare_groups
    from fedit.comparison import group_runs, table, write_comparison
    from fedit.report.terminal import comparison_table

    given = [folder, *folders]
    found = compare_groups(f"Comparison of {len(given)} run{'s' if folders else ''}", group_runs(given))
    page = write_comparison(found, out, "compare")
    console.print(comparison_table(*table(found, details=False), len(found.axes)))
    say(f"Page:  {page}\nTable: {out / 'compare.csv'} and .tex")
    if as_json:
        print_json(found.to_json())


@app.command
def report(folder: Path, /) -> None:
    """Write report.html of a run folder again; works on unfinished runs too."""
    from fedit.report import write_report

    say(f"Report: {write_report(folder)}")


@app.command
def bench(
    model: str = "builtin:cria",
    /,
    *,
    shape: Annotated[
        str | None, Parameter(help="Random weights instead: llama-3m, llama-15m, llama-135m, llama-1b, llama-7b")
    ] = None,
    clients: int = 10,
    rows: Annotated[int, Parameter(help="Of each client")] = 30,
    length: Annotated[int, Parameter(help="Median tokens of a row")] = 100,
    max_length: int = 512,
    batch_size: int = 4,
    rank: int = 8,
    slots: Annotated[int | None, Parameter(help="Clients tuned at the same time; by default as in a run")] = None,
    dtype: DType = "auto",
    device: str = "auto",
    repetitions: int = 3,
    as_json: AsJson = False,
) -> None:
    """Measure how fast clients are tuned here: MODEL is a folder or Hub name."""
    quiet()
    from fedit.bench import Workload, describe, measure

    workload = Workload(clients, rows, length, max_length, batch_size, rank)
    measured = measure(model, shape, workload, "auto" if slots is None else slots, dtype, device, repetitions)
    if as_json:
        print_json(asdict(measured))
        return
    table = Table(box=None, show_header=False)
    for line in describe(measured):
        table.add_row(*line)
    Console().print(table)


@app.command(name="plugins")
def list_plugins(*, plugin: PluginFiles = None, as_json: AsJson = False) -> None:
    """List what can be named in a recipe: templates, partitions, objectives, attacks, aggregations, optimizers."""
    load_plugins(plugin or ())
    listed: list[dict[str, Any]] = []
    for kind in plugin_kinds():
        for name, member in sorted(plugins(kind).items()):
            fields = {
                key: "required" if field.is_required() else field.get_default(call_default_factory=True)
                for key, field in member.model_fields.items()
            }
            what = (member.__doc__ or "").strip().partition("\n")[0]
            listed.append({"kind": kind, "name": name, "parameters": fields, "description": what})
    if as_json:
        print_json(listed)
        return
    table = Table(box=None)
    for header in ("Table", "Name", "Parameters", "What it does"):
        table.add_column(header)
    for item in listed:
        shown = ", ".join(f"{key} = {value}" for key, value in item["parameters"].items())
        table.add_row(*map(Text, (item["kind"], item["name"], shown, item["description"])))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a `FeditError`, or a file that the system refuses, is one message and exit status 1.

    `arguments` are those of the process where they are left out.
    """
    log_to_stderr("%(levelname)s: %(message)s", logging.WARNING)
    try:
        app(arguments)
    except (FeditError, OSError) as error:
        console.print(f"[bold red]error:[/bold red] {type(error).__name__}", highlight=False)
        for line in (error, *getattr(error, "__notes__", ())):
            say(str(line))
        sys.exit(1)


# --------------------------------------------------------------------------------------------------------- helpers


def _prepare(config: RunConfig) -> FederatedData:
    from fedit.prepare import prepare_data
    from fedit.report.terminal import preflight_table

    with console.status("Reading and encoding the rows"):
        data = prepare_data(config)
    console.print(preflight_table(data.summary))
    return data


def _how_to_go_on(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return "Nothing was saved yet."
    return f"What was finished is saved; go on with:\n  fedit run --resume {shlex.quote(str(folder))}"


if __name__ == "__main__":
    main()
