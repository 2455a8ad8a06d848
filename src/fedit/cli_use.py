"""The commands that ask a finished run's models: on the terminal, in the browser, over HTTP."""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fedit.console import console, quiet, say
from fedit.interfaces import ConfigError, DataError, EngineError

if TYPE_CHECKING:
    from fedit.chat import Conversation

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HELP = """/new            starts over
/model          lists the run's models; /model NAME goes on with another
/quit, Ctrl-D   ends; Ctrl-C ends an answer"""

Port = Annotated[int, Parameter(help="0: any that is free")]
Host = Annotated[str, Parameter(help="The address to listen at; by default nobody but this machine reaches it")]


def chat(
    folder: Path,
    /,
    *,
    model: Annotated[
        str,
        Parameter(help="federated, base, central, local (the median client), local/CLIENT, or federated/CLIENT"),
    ] = "federated",
    temperature: Annotated[float, Parameter(help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, Parameter(help="Draw from the likeliest tokens that have this probability")] = 1.0,
    seed: Annotated[int | None, Parameter(help="Of the draws, for each answer anew")] = None,
    max_new_tokens: int = 256,
) -> None:
    """Talk to one of a run's models on the terminal. /help lists what can be typed beside questions."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: expected 1 or more.")
    quiet()
    from fedit.chat import Conversation
    from fedit.generation import Sampling
    from fedit.run_models import RunModels

    sampling = Sampling(temperature, top_p, seed)
    models = RunModels.open(folder, [model])
    (name,) = models.adapters
    conversation = Conversation(models, name, max_new_tokens, sampling)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text: the question is refused, not the chat
    if sys.stdin.isatty() and sys.stdout.isatty():
        _talk(conversation, folder)
    else:
        _answer_lines(conversation, folder)


def _answer_lines(conversation: Conversation, folder: Path) -> None:
    """Answer standard input line by line, each answer whole: for scripts."""
    while True:
        try:
            line = (console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if _is_command(line):
            _obey(conversation, folder, line)
        elif line:
            try:
                *_, text = conversation.answer(line)
                print(text, flush=True)
            except DataError as error:
                say(str(error))


def _talk(conversation: Conversation, folder: Path) -> None:
    """Talk on a terminal: lines are edited, arrows bring back earlier ones, answers come as they grow."""
    import readline

    readline.set_auto_history(True)  # `input` edits with it once it is loaded
    say(f"{conversation.name} of {folder}. /help lists the commands.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            say("Ctrl-D or /quit ends.")
            continue
        if line == "/quit":
            return
        if _is_command(line):
            _obey(conversation, folder, line)
        elif line:
            _print_growing(conversation.answer(line))


def _is_command(line: str) -> bool:
    command = line.partition(" ")[0]
    return command[:1] == "/" and command[1:].isalpha()


def _obey(conversation: Conversation, folder: Path, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/new":
        conversation.clear()
    elif command == "/model":
        _switch(conversation, folder, rest.strip())
    else:
        say(HELP)


def _switch(conversation: Conversation, folder: Path, name: str) -> None:
    from fedit.run_models import model_names, resolve_names

    if not name:
        say("\n".join(f"{'*' if known == conversation.name else ' '} {known}" for known in model_names(folder)))
        return
    try:
        (exact,) = resolve_names(folder, [name])
        conversation.switch(exact)
        say(f"{exact} goes on; /new starts over.")
    except ConfigError as error:
        say(str(error))


def _print_growing(answers: Generator[str]) -> None:
    """Print an answer as it grows, until it is whole or Ctrl-C."""
    shown = ""
    try:
        with closing(answers):
            for text in answers:
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print()
    except KeyboardInterrupt:
        print(" ...")
    except DataError as error:
        say(str(error))


def ui(
    folder: Path,
    /,
    *,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    share: Annotated[bool, Parameter(negative="", help="Publish it under a link of Gradio's, for everybody")] = False,
) -> None:
    """Ask a run's base, local-only and federated models side by side, in the browser."""
    quiet()
    try:
        from fedit.web_page import build_page, serve_page
    except ModuleNotFoundError as error:
        raise ConfigError("fedit ui needs Gradio: pip install 'fedit[ui]'") from error
    from fedit.run_models import RunModels, model_names

    model_names(folder)  # or it is refused
    with _listening(host, port) as listener:
        page = build_page(RunModels.open(folder, ["base"]))
        chosen = listener.getsockname()[1]
    _warn(host, "anybody who reaches this address can ask")
    with serve_page(page, host, chosen, share) as addresses:
        for address in addresses:
            say(f"{folder} at {address} (Ctrl-C ends)")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def serve(
    folder: Path,
    /,
    *,
    models: Annotated[
        list[str] | None,
        Parameter(help="Those to offer; by default all that the run has", consume_multiple=True, negative=""),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
) -> None:
    """Serve a run's models by OpenAI's API, for quick trials. FEDIT_API_KEY in the environment: the key to ask for."""
    quiet()
    try:
        from fedit.serving import serve_models
    except ModuleNotFoundError as error:
        raise ConfigError("fedit serve needs FastAPI and uvicorn: pip install 'fedit[serve]'") from error
    from fedit.run_models import RunModels, model_names, resolve_names
    from fedit.serving import vllm_command

    key = os.environ.get("FEDIT_API_KEY") or None
    names = resolve_names(folder, models) if models else model_names(folder)
    with _listening(host, port) as listener:
        opened = RunModels.open(folder, names[-1:])
        shown = f"[{host}]" if ":" in host else host
        if key is None:
            _warn(host, "anybody who reaches this address can ask; FEDIT_API_KEY in the environment sets a key")
        say(f"Models: {', '.join(names)}\nOpenAI's API: http://{shown}:{listener.getsockname()[1]}/v1 (Ctrl-C ends)")
        say(f"For many users, the federated model with vLLM:\n{vllm_command(opened)}")
        with suppress(KeyboardInterrupt):
            serve_models(opened, names, listener, key, is_local=host in LOOPBACK)


# --------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that listens, before anything is loaded.

    Raises:
        EngineError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            said = f"--host {host} --port {port}: {str(why).rstrip('.')}"
            raise EngineError(f"{said}. Choose another; port 0 is any free one.") from error
        listener.listen()
        yield listener


def _warn(host: str, what: str) -> None:
    if host not in LOOPBACK:
        say(f"--host {host}: {what}.")
