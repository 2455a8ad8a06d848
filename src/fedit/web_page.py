"""A page that asks a run's base, local-only and federated models side by side (Gradio)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
import gradio as gr
from gradio.themes import Default

from fedit.evaluation.metrics import FEDERATED_PREFIX, LOCAL_PREFIX
from fedit.generation import Sampling
from fedit.interfaces import ConfigError, Example, FeditError, Turn
from fedit.report import RunFolder
from fedit.report.samples import choose_samples
from fedit.run_models import BASE, FEDERATED, LOCAL, RunModels, median_model, model_names

STYLE = """
.gradio-container { max-width: 1500px !important; }
#chats button[aria-label="Clear"] { display: none; } /* it would clear one chat of several */
@media (max-width: 640px) { #chats > div { height: 300px !important; } }
"""


@dataclass(frozen=True)
class Exchange:
    """A question, and what each column answered."""

    question: Turn
    """Its response is empty"""
    answers: Mapping[str, str]
    """By the column's title"""


@dataclass(frozen=True)
class Columns:
    """What stands side by side: for each title, the model's name given a client's."""

    models: Mapping[str, Callable[[str], str]]
    clients: Sequence[str] = ()
    """Whose models can be chosen; none, where all columns show one model for all"""
    median: str = ""
    """The client of the median local-only model, shown first"""

    @classmethod
    def of(cls, models: RunModels) -> Columns:
        """Return base, local-only (where the run has baselines) and federated."""
        names = model_names(models.folder)
        columns: dict[str, Callable[[str], str]] = {"Base": lambda client: BASE}
        owners = []
        if any(name.startswith(LOCAL_PREFIX) for name in names):
            columns["Local-only"] = lambda client: LOCAL_PREFIX + client
            owners.append(LOCAL_PREFIX)
        if FEDERATED in names:
            columns["Federated"] = lambda client: FEDERATED
        else:
            columns["Federated"] = lambda client: FEDERATED_PREFIX + client
            owners.append(FEDERATED_PREFIX)
        of_first = [name.partition("/")[2] for name in names if owners and name.startswith(owners[0])]
        clients = [client for client in of_first if all(prefix + client in names for prefix in owners)]
        median = (median_model(models.folder, LOCAL) or "").removeprefix(LOCAL_PREFIX)
        if median not in clients:  # of a client that was never drawn there is no federated model
            median = clients[0] if clients else ""
        return cls(columns, clients, median)


def build_page(models: RunModels) -> gr.Blocks:
    """Return the page; it loads a model's adapter when it is asked first."""
    columns = Columns.of(models)
    asker = Asker(models, columns)

    def start_over(client: str) -> list[Any]:
        chats = [gr.Chatbot([], label=_label(title, model(client))) for title, model in columns.models.items()]
        return [[], *chats]

    with gr.Blocks(title=f"{models.folder.name} - fedit", analytics_enabled=False) as page:
        gr.Markdown(describe_run(models, columns))
        exchanges = gr.State([])
        with gr.Row(elem_id="chats"):
            chats = [
                gr.Chatbot(
                    label=_label(title, model(columns.median)),
                    elem_id=title.lower(),
                    render_markdown=False,  # what the model said, letter by letter
                    height=420,
                    min_width=280,
                    layout="bubble",
                    buttons=[],
                    feedback_options=None,
                )
                for title, model in columns.models.items()
            ]
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                label="Question", elem_id="question", lines=1, max_lines=8, scale=3, min_width=280, autofocus=True
            )
            context = gr.Textbox(
                label="Text that the question is about (optional)", lines=1, max_lines=8, scale=2, min_width=280
            )
        with gr.Row():
            button = gr.Button("Ask", variant="primary", elem_id="ask", size="md", min_width=80)
            stop = gr.Button("Stop", size="md", min_width=80)
            clear = gr.Button("Clear", size="md", min_width=80)
        with gr.Accordion("Settings", open=False), gr.Row():
            client = gr.Dropdown(
                list(columns.clients),
                value=columns.median or None,
                label="Client",
                info="Whose own model is shown; another one clears the chats",
                visible=bool(columns.clients),
                min_width=200,
            )
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="The likeliest tokens alone")
            max_new_tokens = gr.Slider(1, 1024, 256, step=1, label="Tokens at most", info="Of each answer")
            seed = gr.Textbox("", label="Seed", info="Of the draws; empty: others every time", min_width=160)
        if rows := choose_samples(RunFolder.read(models.folder)).rows:
            examples = [[sample.row["instruction"], sample.row["context"]] for sample in rows]
            gr.Examples(examples, [question, context], label="Held-out questions, the first of each category")

        inputs = [question, context, client, exchanges, temperature, top_p, max_new_tokens, seed]
        outputs = [question, context, exchanges, *chats]
        asked = gr.on(
            [button.click, question.submit, context.submit], asker.ask, inputs, outputs, show_progress="hidden",
            trigger_mode="once", concurrency_limit=1, api_visibility="private",
        )  # fmt: skip
        stop.click(None, cancels=[asked], api_visibility="private")
        for restart in (clear.click, client.change):
            restart(start_over, client, [exchanges, *chats], cancels=[asked], api_visibility="private")
    return page


class Asker:
    """Asks the models of a page, one question after the other."""

    def __init__(self, models: RunModels, columns: Columns) -> None:
        self._models = models
        self._columns = columns
        # Gradio lets the next question in while a stopped one still waits for its last token.
        self._alone = threading.Lock()

    def ask(
        self,
        question: str,
        context: str,
        client: str,
        done: list[Exchange],
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: str,
    ) -> Generator[list[Any]]:
        """Yield the boxes, the exchanges and every chat after each token of the answers."""
        if not question.strip():
            return
        names = {title: model(client) for title, model in self._columns.models.items()}
        exchange = Exchange(Turn(question.strip(), "", context.strip()), dict.fromkeys(names, ""))
        conversations = {name: _conversation(done, exchange, title) for title, name in names.items()}
        boxes = ["", ""]
        try:
            sampling = Sampling(temperature, top_p, _whole_number(seed))
            with self._alone:
                self._models = self._models.with_models(list(names.values()))
                with closing(self._models.answer(conversations, int(max_new_tokens), sampling)) as growing:
                    for answers in growing:
                        exchange = replace(exchange, answers={title: answers[name] for title, name in names.items()})
                        exchanges = [*done, exchange]
                        yield [*boxes, exchanges, *(_messages(exchanges, title) for title in names)]
                        boxes = [gr.skip(), gr.skip()]
        except FeditError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error


@contextmanager
def serve_page(page: gr.Blocks, host: str, port: int, share: bool) -> Iterator[list[str]]:
    """Serve a page and yield its addresses; the second is public, and there only if it is to be shared."""
    page.queue(default_concurrency_limit=1)
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        css=STYLE,
        theme=Default(primary_hue="teal"),
    )
    try:
        yield [local, *([public] if public else [])]
    finally:
        page.close(verbose=False)


def _whole_number(seed: str) -> int | None:
    try:
        return int(seed) if seed.strip() else None
    except ValueError as error:
        raise ConfigError(f"Seed {seed!r}: expected a whole number, or nothing.") from error


def _conversation(done: Sequence[Exchange], asked: Exchange, title: str) -> Example:
    turns = [replace(exchange.question, response=exchange.answers[title]) for exchange in done]
    return Example((*turns, asked.question))


def _messages(exchanges: Sequence[Exchange], title: str) -> list[dict[str, str]]:
    messages = []
    for exchange in exchanges:
        turn = exchange.question
        asked = f"{turn.instruction}\n\n{turn.context}" if turn.context else turn.instruction
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": exchange.answers[title]})
    return messages


def _label(title: str, name: str) -> str:
    _, _, client = name.partition("/")
    return f"{title}, client {client}" if client else title


def describe_run(models: RunModels, columns: Columns) -> str:
    """Return the page's heading (Markdown): what was run, and why a column is missing."""
    run = RunFolder.read(models.folder)
    facts = [
        f"recipe `{run.config['recipe']}`",
        f"base `{models.config.model.path}`",
        f"{len(run.partition.get('clients', {}))} clients",
        f"{len(run.rounds)} rounds of `{models.config.aggregation.name}`",
        f"report `{models.folder / 'report.html'}`",
    ]
    missing = "" if "Local-only" in columns.models else (
        "\n\nNo local-only model: it was run without baselines (`evaluation.baselines = false`)."
    )  # fmt: skip
    return f"## {models.folder.name}\n\n{' · '.join(facts)}{missing}"
