"""The command that evaluates a finished run on benchmarks."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fedit.console import AsJson, console, print_json, quiet, say
from fedit.interfaces import ConfigError

evaluate_app = App(name="evaluate")


@evaluate_app.default
def evaluate(
    folder: Path,
    /,
    *,
    tasks: Annotated[
        list[str],
        Parameter(
            negative="", help="Tasks of lm-eval, pasture, instructions, or YAML files of your own, parted by commas"
        ),
    ],
    models: Annotated[
        list[str] | None,
        Parameter(negative="", help="base, local (the median one), local/CLIENT, central, federated; by default all"),
    ] = None,
    fewshot: Annotated[int | None, Parameter(help="Examples in each prompt, instead of the task's")] = None,
    limit: Annotated[int | None, Parameter(help="Evaluate the first rows of each task only")] = None,
    apply_template: Annotated[
        bool, Parameter(help="Ask in the run's own template; else as lm-eval writes the prompt")
    ] = True,
    include_path: Annotated[
        list[Path] | None, Parameter(negative="", help="A folder of YAML tasks beside lm-eval's")
    ] = None,
    data: Annotated[
        list[str] | None, Parameter(negative="", help="TASK=PATH: a file or folder in the place of a task's data")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's models on benchmarks: base, local-only, centralised and federated, all at once.

    FOLDER is what `fedit run` wrote. Numbers go to its benchmarks.json and report.html, every answer to benchmarks/.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("fedit evaluate needs lm-eval, which is not installed: pip install 'fedit[benchmarks]'")
    # lm-eval's progress bars and advice; its own advice is for who writes tasks.
    os.environ.setdefault("TQDM_DISABLE", "1")
    quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It prints to stdout, too, which carries results alone.
    with redirect_stdout(sys.stderr), console.status("Loading lm-eval") as status:
        from fedit.benchmarks.folder import Wanted, evaluate_run
        from fedit.report.benchmarks import benchmarks_table

        wanted = Wanted(
            tasks=_parted(tasks),
            models=_parted(models or ()),
            num_fewshot=fewshot,
            limit=limit,
            apply_template=apply_template,
            include=include_path or (),
            data=dict(_data(each) for each in data or ()),
        )
        found = evaluate_run(folder, wanted, status.update)
    console.print(benchmarks_table(found))
    say(f"Report: {folder / 'report.html'}\nAnswers: {folder / 'benchmarks'}")
    if as_json:
        print_json(found)


def _parted(texts: list[str] | tuple[()]) -> list[str]:
    return [name for text in texts for name in text.split(",") if name]


def _data(text: str) -> tuple[str, Path]:
    task, separator, path = text.partition("=")
    if not (task and separator and path):
        raise ConfigError(f"--data {text}: expected TASK=PATH, as in --data ifeval=input_data.jsonl.")
    return task, Path(path)
