"""Audits: what attacks find out from a run's updates, their sums and its final model, against what it promises.

`audit_run` of `fedit.audit.folder` composes them; each has a module of its own: what updates tell of tokens (`span`),
what a model has memorised (`canaries`), who was trained on (`membership`), whether noise holds (`mechanism`), and what
right guesses prove (`bounds`). An audit finds lower bounds: what these attacks find, others may exceed.
"""
