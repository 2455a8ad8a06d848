"""A run's models behind OpenAI's API: a real server asked by OpenAI's client, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletionMessage

from fedit.answering import Answer, Answering, Question, before_stop
from fedit.generation import GREEDY, UNFINISHED, Continuation, Sampling
from fedit.interfaces import EngineError, Example, Turn
from fedit.run_models import RunModels
from fedit.serving import build_app, vllm_command

MESSAGES: Any = [{"role": "user", "content": "ab 1?"}]
NAMES = ["base", "local/0", "local/1", "local/2", "central", "federated"]


@pytest.fixture(scope="module")
def models(asked_run: Path) -> RunModels:
    return RunModels.open(asked_run, NAMES)


@pytest.fixture(scope="module")
def web(models: RunModels) -> Iterator[TestClient]:
    with TestClient(build_app(models, NAMES), raise_server_exceptions=False) as client:
        yield client


def ask(web: TestClient, address: str = "/v1/chat/completions", **asked: Any) -> dict[str, Any]:
    body = {"model": "federated", "messages": MESSAGES, "temperature": 0, "max_tokens": 8, **asked}
    answer = web.post(address, json={name: value for name, value in body.items() if value is not ...})
    return {"status": answer.status_code, **answer.json()}


def expected(models: RunModels, name: str, conversation: Example, most: int = 8) -> str:
    *_, answers = models.answer({name: conversation}, most)
    return answers[name]


# ---------------------------------------------------------------------------------------------------------- a server


@pytest.mark.slow
def test_openais_client_asks_a_real_server(asked_run: Path, models: RunModels) -> None:
    command = [sys.executable, "-m", "fedit.cli", "serve", str(asked_run), "--port", "0"]
    environment = {**os.environ, "FEDIT_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+/v1", line)))
            client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
            assert [model.id for model in client.models.list()] == NAMES
            for name in ("base", "federated"):
                asked: dict[str, Any] = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
                whole = client.chat.completions.create(**asked)
                text = whole.choices[0].message.content
                assert text == expected(models, name, Example((Turn("ab 1?", ""),)))
                *parts, last = client.chat.completions.create(
                    **asked, stream=True, stream_options={"include_usage": True}
                )
                assert "".join(part.choices[0].delta.content or "" for part in parts) == text
                assert len(parts) > 3
                assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
                assert last.usage == whole.usage
            raw = {"model": "base", "prompt": "ab 1?\n", "temperature": 0, "max_tokens": 8}
            whole = client.completions.create(**raw)
            streamed = client.completions.create(**raw, stream=True)
            assert "".join(part.choices[0].text for part in streamed) == whole.choices[0].text
            with pytest.raises(openai.NotFoundError, match=r"No model 'fedrated'\. Did you mean 'federated'"):
                client.chat.completions.create(model="fedrated", messages=MESSAGES)
            with pytest.raises(openai.AuthenticationError, match="API key"):
                openai.OpenAI(base_url=address, api_key="other", max_retries=0).models.list()
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


def test_a_port_that_is_taken(fedit, asked_run, monkeypatch) -> None:
    monkeypatch.setattr(RunModels, "open", None)  # nothing is loaded for it
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for command in ("serve", "ui"):
            done = fedit(command, asked_run, "--port", str(port))
            assert done.status == 1
            assert f"--host 127.0.0.1 --port {port}: Address already in use. Choose another" in done.stderr
            assert "--port 99999:" in fedit(command, asked_run, "--port", "99999").stderr


@pytest.mark.parametrize(("command", "package", "extra"), [("serve", "uvicorn", "serve"), ("ui", "gradio", "ui")])
def test_a_missing_package(fedit, asked_run, monkeypatch, command: str, package: str, extra: str) -> None:
    for module in ("fedit.serving", "fedit.web_page"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    done = fedit(command, asked_run, "--port", "0")
    assert done.status == 1
    assert f"pip install 'fedit[{extra}]'" in done.stderr


def test_models_that_the_run_does_not_have(fedit, asked_run) -> None:
    done = fedit("serve", asked_run, "--port", "0", "--models", "federated", "local/9")
    assert done.status == 1
    assert "no model 'local/9'. Did you mean 'local/" in done.stderr


def test_the_lines_for_vllm(fedit, recipe, tmp_path, asked_run, tiny_model_folder) -> None:
    first, second = vllm_command(RunModels.open(asked_run)).splitlines()
    assert first == f"  vllm serve {tiny_model_folder} --tokenizer {asked_run}/adapter \\"
    assert second == f"    --enable-lora --max-lora-rank 8 --lora-modules federated={asked_run}/adapter"
    options = ("-o", "aggregation.name=flora", "-o", "evaluation.baselines=false")
    assert fedit("run", recipe, "--out", tmp_path / "run", *options).status == 0
    assert "fedit export" in vllm_command(RunModels.open(tmp_path / "run"))  # vLLM knows no adapter in two parts


# ------------------------------------------------------------------------------------------------------------ requests


def test_messages_become_turns(web, models) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "text", "text": " 1?"}]},
        {"role": "assistant", "content": "ba"},
        {"role": "user", "content": "and?", "context": "cde"},
    ]
    conversation = Example((Turn("ab 1?", "ba"), Turn("and?", "", "cde")), system="Be brief.")
    answered = ask(web, messages=messages)
    assert answered["choices"][0]["message"] == {
        "role": "assistant",
        "content": expected(models, "federated", conversation),
    }
    assert answered["usage"]["prompt_tokens"] == len(models.prompt(conversation, 8))


def test_a_system_message_may_be_empty(web) -> None:
    user = {"role": "user", "content": "ab 1?"}
    empty = ask(web, messages=[{"role": "system", "content": ""}, user])
    assert empty["choices"] == ask(web, messages=[user])["choices"]


def test_tokens_and_why_an_answer_ended(web, models) -> None:
    cut = ask(web, max_completion_tokens=5, max_tokens=7)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 5
    prompt = models.prompt(Example((Turn("ab 1?", ""),)), 8)

    def drawn(seed: int) -> Continuation:
        *_, (answer,) = models.stream([("federated", prompt)], 200, Sampling(2.0, seed=seed))
        return answer

    def can_be_stopped(answer: Continuation) -> bool:
        return answer.is_finished and len(answer.text) > 5 and UNFINISHED not in answer.text[:5]

    seed, longer = next((seed, answer) for seed in range(99) if can_be_stopped(answer := drawn(seed)))
    whole = ask(web, "/v1/completions", messages=..., prompt="ab 1?\n", temperature=2.0, seed=seed, max_tokens=200)
    assert whole["choices"][0] == {"index": 0, "text": longer.text, "logprobs": None, "finish_reason": "stop"}
    assert whole["usage"]["completion_tokens"] == longer.num_tokens
    stop = longer.text[3:5]
    stopped = ask(web, "/v1/completions", messages=..., prompt="ab 1?\n", temperature=2.0, seed=seed, stop=stop)
    assert stopped["choices"][0]["text"] == longer.text[: longer.text.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("asked", "status", "message", "param"),
    [
        ({"model": "fedrated"}, 404, "Did you mean 'federated'", "model"),
        ({"n": 2}, 400, "n: is not supported here", "n"),
        ({"tools": [{"type": "function"}]}, 400, "tools: is not supported here", "tools"),
        ({"temperature": -1}, 400, "temperature = -1.0", None),
        ({"temperature": 1e-40}, 400, "temperature = 1e-40", None),
        ({"temperature": 1, "seed": 10**23}, 400, "seed = 100000000000000000000000", None),
        ({"logprobs": 0}, 400, "logprobs: is not supported here", "logprobs"),
        ({"stop": ["a"] * 5}, 400, "stop: ", "stop"),
        ({"max_tokens": 0}, 400, "max_tokens: ", "max_tokens"),
        ({"messages": []}, 400, "messages: ", "messages"),
        ({"messages": MESSAGES * 2}, 400, "got user, user", None),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "got system", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "type: Input should be", ...),
        ({"max_tokens": 506}, 400, "the model's context is 512", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}], "max_tokens": ...}, 400, "context is 512", "messages"),
    ],
)
def test_refusals_are_openais_error_objects(web, asked: dict[str, Any], status: int, message: str, param: Any) -> None:
    refused = ask(web, **asked)
    assert refused["status"] == status
    assert message in refused["error"]["message"]
    assert refused["error"]["type"] == "invalid_request_error"
    assert param in {refused["error"]["param"], ...}


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/v1/chat/completions", r'"messages": [{"role": "user", "content": "caf\ud800"}]'),
        ("/v1/completions", r'"prompt": "caf\ud800"'),
    ],
)
def test_what_is_no_text_is_refused(web, address: str, said: str) -> None:
    body = '{"model": "federated", "max_tokens": 3, ' + said + "}"
    refused = web.post(address, content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert "Character 4 is no text" in refused.json()["error"]["message"]


def test_settings_that_change_nothing_are_taken(web) -> None:
    plain = ask(web)
    more = ask(web, n=1, logprobs=False, presence_penalty=0, user="me", stop=None, seed=4, top_p=0.5)
    assert more["choices"] == plain["choices"]


def test_an_answer_goes_back_as_openais_client_gives_it(web) -> None:
    """With all that it does not have, as null."""
    plain = {"role": "assistant", "content": "b 1"}
    whole = ChatCompletionMessage(role="assistant", content="b 1").model_dump()
    assert None in whole.values()
    turns = [[*MESSAGES, said, {"role": "user", "content": "And?"}] for said in (plain, whole)]
    first, second = (ask(web, messages=messages) for messages in turns)
    assert first["status"] == second["status"] == 200
    assert first["choices"] == second["choices"]
    assert ask(web, messages=[{"role": "user", "content": None}])["error"]["param"] == "messages.0.content"


def test_other_addresses_and_other_names_of_this_machine(web) -> None:
    assert web.get("/health").json() == {"status": "ok"}
    assert web.get("/v2").json()["error"]["message"] == "Not Found"
    assert web.get("/v1/models", headers={"host": "rebound.example"}).status_code == 400
    assert web.get("/v1/models", headers={"host": "[::1]:8000"}).status_code == 200


# ------------------------------------------------------------------------------------------------------------ together


def questions(models: RunModels, *names: str, most: int = 30, sampling: Sampling = GREEDY) -> list[Question]:
    turns = [Turn("ab 1?" * (place + 1), "") for place in range(len(names))]
    prompts = [models.prompt(Example((turn,)), most) for turn in turns]
    return [Question(name, prompt, most, sampling) for name, prompt in zip(names, prompts, strict=True)]


def answered(models: RunModels, asked: list[Question]) -> list[Answer]:
    async def last(answering: Answering, question: Question) -> Answer:
        answers = [answer async for answer in answering.answers(question)]
        return answers[-1]

    async def all_of_them() -> list[Answer]:
        answering = Answering(models)
        try:
            return await asyncio.gather(*(last(answering, question) for question in asked))
        finally:
            answering.close()

    return asyncio.run(all_of_them())


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The models that were asked together."""
    noted: list[list[str]] = []
    stream = RunModels.stream

    def noting(self: RunModels, asked: Any, *arguments: Any) -> Any:
        noted.append([name for name, _ in asked])
        return stream(self, asked, *arguments)

    monkeypatch.setattr(RunModels, "stream", noting)
    return noted


def test_questions_that_wait_are_answered_together(models, batches) -> None:
    names = ["base", "federated", "local/0", "federated", "central"]
    together = answered(models, questions(models, *names))
    assert sum(map(len, batches)) == 5
    assert len(batches) <= 2, "the first alone at most, then all that came meanwhile"
    for question, answer in zip(questions(models, *names), together, strict=True):
        assert answered(models, [question]) == [answer]


def test_seeds_and_the_context_part_batches(models, batches) -> None:
    drawn = questions(models, "base", "federated", sampling=Sampling(1.0, seed=1))
    answered(models, drawn)
    assert [len(batch) for batch in batches] == [1, 1]
    batches.clear()
    long = Question("federated", np.full(480, 70, np.int32), 32, GREEDY)
    asked = [long, *questions(models, "federated", most=100)]
    assert answered(models, asked)[1].num_tokens == 100
    assert [len(batch) for batch in batches] == [1, 1]


def test_who_leaves_ends_the_work_on_his_answer_alone(models, monkeypatch) -> None:
    forward, calls = models.model.base.forward, []
    monkeypatch.setattr(models.model.base, "forward", lambda *a, **named: calls.append(1) or forward(*a, **named))

    async def leave() -> Answer:
        answering = Answering(models)
        try:
            (short,), (long,) = questions(models, "federated", most=20), questions(models, "base", most=400)
            async with aclosing(answering.answers(long)) as answers:
                await anext(answers)
            stayed = [answer async for answer in answering.answers(short)]
            return stayed[-1]
        finally:
            answering.close()

    assert asyncio.run(leave()).num_tokens == 20
    assert len(calls) < 200


@contextmanager
def served(models: RunModels) -> Iterator[str]:
    """Serve `models` to other processes as ``fedit serve`` does, and give the address."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(models, NAMES), log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def test_a_reader_who_disconnects_ends_the_work(models, monkeypatch) -> None:
    forward, calls = models.model.base.forward, []

    def slow_and_never_done(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        time.sleep(0.01)
        output = forward(*arguments, **named)
        output.logits[..., models.model.tokenizer.eos_token_id] = -torch.inf
        return output

    monkeypatch.setattr(models.model.base, "forward", slow_and_never_done)
    with served(models) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": "base", "messages": MESSAGES, "max_tokens": 480}
        streamed = client.chat.completions.create(**asked, stream=True)
        next(iter(streamed))
        streamed.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).chat.completions.create(**asked)
        client.chat.completions.create(**{**asked, "max_tokens": 1})  # waits for those before it
    assert len(calls) < 480


def test_what_fails_is_told_and_the_next_is_answered(models, monkeypatch) -> None:
    stream = RunModels.stream
    with monkeypatch.context() as broken:
        broken.setattr(RunModels, "stream", lambda *arguments: 1 / 0)
        with TestClient(build_app(models, NAMES)) as web:
            failed = ask(web)
            assert failed["status"] == 500
            assert failed["error"] == {
                "message": "ZeroDivisionError: division by zero", "type": "server_error", "param": None, "code": None,
            }  # fmt: skip
            body = {"model": "base", "messages": MESSAGES, "stream": True}
            assert "division by zero" in web.post("/v1/chat/completions", json=body).text
            broken.setattr(RunModels, "stream", stream)
            assert ask(web)["status"] == 200
    monkeypatch.setattr(RunModels, "stream", lambda *arguments: 1 / 0)
    with pytest.raises(EngineError, match="division by zero"):
        answered(models, questions(models, "base"))


@pytest.mark.parametrize(
    ("text", "stops", "before", "found"),
    [
        ("one. two", [". "], "one", True),
        ("one.", [". "], "one", False),
        ("one", [], "one", False),
        ("abcab", ["abd"], "abc", False),
        ("xyz", ["z", "y"], "x", True),
        ("aaa", ["aab"], "a", False),
    ],
)
def test_before_stop(text: str, stops: list[str], before: str, found: bool) -> None:
    assert before_stop(text, stops) == (before, found)
