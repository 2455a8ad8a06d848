"""Federated instruction tuning (2305.05644): tune one LLM on everybody's instructions without sharing them.

Reading order, one client update from row to global adapter: `interfaces`, `config`, `data`, `partition`, `base`,
`model`, `tuning`, `aggregation`, `server`, `engines.simulation`; then `evaluation`, `report`, `export`; then what
composes them: `prepare`, `baselines`, `experiment`, `api`, `cli`.

From Python, an experiment is::

    import fedit

    run = fedit.run("default", ["rounds=5"])
    run.evaluation["gap_closed"]
    models = fedit.RunModels.open(run.path, ["base", "federated"])
    models.ask("Classify each as eggs or feathers: cotha, fawnik, ellup.")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedit.api import run as run
    from fedit.config import RunConfig as RunConfig
    from fedit.config import load_config as load_config
    from fedit.experiment import PhaseStarted as PhaseStarted
    from fedit.experiment import Progressed as Progressed
    from fedit.experiment import RoundFinished as RoundFinished
    from fedit.generation import Sampling as Sampling
    from fedit.interfaces import FeditError as FeditError
    from fedit.report import RunFolder as RunFolder
    from fedit.run_models import RunModels as RunModels

# Each is imported when it is first asked for, so that `import fedit` costs nothing.
_MODULES = {
    "FeditError": "interfaces",
    "PhaseStarted": "experiment",
    "Progressed": "experiment",
    "RoundFinished": "experiment",
    "RunConfig": "config",
    "RunFolder": "report",
    "RunModels": "run_models",
    "Sampling": "generation",
    "load_config": "config",
    "run": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fedit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
