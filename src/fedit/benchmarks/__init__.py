"""Benchmarks of a run's models through EleutherAI's lm-evaluation-harness (``pip install 'fedit[benchmarks]'``).

`evaluate_run` of `fedit.benchmarks.folder` is what ``fedit evaluate`` does: it finds tasks (`tasks`), lets lm-eval ask
all models of a run at once (`harness`, which answers from `answers`), and writes what lm-eval makes of it. `shipped`
has tasks of fedit's own, as YAML; `rows` is what they call.
"""
