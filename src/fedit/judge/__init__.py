"""The LLM judge: a language model scores what the models of runs answer to open questions.

Questions -> answers (`questions`, `answers`) -> requests (`protocol`) -> replies of a judge behind HTTP or of a local
model, kept on disk (`replies`, `client`, `local`) -> scores (`scores`). `fedit.cli_judge` puts them together.
"""
