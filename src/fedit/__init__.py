"""Federated instruction tuning (2305.05644): tune one LLM on everybody's instructions without sharing them.

Reading order, one client update from row to global adapter: `interfaces`, `config`, `data`, `partition`, `base`,
`model`, `tuning`, `aggregation`, `server`, `engines.simulation`; then `evaluation`, `report`, `export`; then what
composes them: `prepare`, `baselines`, `experiment`, `cli`.

From Python, the experiment is::

    from pathlib import Path
    from fedit.config import load_config
    from fedit.experiment import run_experiment
    from fedit.prepare import prepare_data

    config = load_config("default", ["rounds=5"])
    result = run_experiment(config, Path("runs/mine"), prepare_data(config))
    result.evaluation["gap_closed"]
"""
