"""A server of a run's models by OpenAI's API: chats under the run's template, completions of raw text."""

from __future__ import annotations

import hmac
import shlex
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fedit.answering import Answering, Question
from fedit.base import resolve_path
from fedit.data import check_text, encode_prompt
from fedit.interfaces import ConfigError, DataError, EngineError, did_you_mean
from fedit.openai_api import AskedChat, AskedCompletion, AskedOf, Reply, error_object
from fedit.report.format import vllm_rank
from fedit.run_models import RunModels

DEFAULT_TOKENS = 256
"""Of an answer at most, where the request does not say"""
GONE = 499
"""Status of an answer that nobody reads (nginx's)"""


def serve_models(
    models: RunModels, names: Sequence[str], listener: socket.socket, key: str | None, *, is_local: bool
) -> None:
    """Serve until interrupted; answers that are being given then are cut."""
    app = build_app(models, names, key, is_local=is_local)
    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def build_app(models: RunModels, names: Sequence[str], key: str | None = None, *, is_local: bool = True) -> FastAPI:
    """Return the server's application: it offers the models `names`, whose adapters are loaded when they are asked.

    `key` is what requests have to bring as their bearer token. Where it `is_local`, a browser that was led here by
    another name of this machine is refused.
    """
    endpoints = _Endpoints(models, names, key)
    app = FastAPI(lifespan=endpoints.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if is_local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[", "testserver"])
    checked = [Depends(endpoints.authorise)]
    app.add_api_route("/health", endpoints.health)
    app.add_api_route("/v1/models", endpoints.list_models, dependencies=checked)
    app.add_api_route("/v1/chat/completions", endpoints.chat, methods=["POST"], dependencies=checked)
    app.add_api_route("/v1/completions", endpoints.complete, methods=["POST"], dependencies=checked)
    app.add_exception_handler(RefusalError, lambda _, error: _refusal(error))
    app.add_exception_handler(RequestValidationError, lambda _, error: _refusal(_of_form(error)))
    app.add_exception_handler(HTTPException, lambda _, error: _refusal(_of_address(error)))
    for kind, status in ((ConfigError, 400), (DataError, 400), (EngineError, 500)):
        app.add_exception_handler(kind, lambda _, error, status=status: _refusal(RefusalError(status, str(error))))
    return app


class RefusalError(Exception):
    """A request that gets an error object of OpenAI's API."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _Endpoints:
    """What is done at each address."""

    def __init__(self, models: RunModels, names: Sequence[str], key: str | None) -> None:
        self._models = models
        self._names = names
        self._key = key
        self._started = int(time.time())
        self._answering: Answering

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self._answering = Answering(self._models)
        try:
            yield
        finally:
            self._answering.close()

    async def authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key is not None and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise RefusalError(401, "The API key is missing or another than the server's.", code="invalid_api_key")

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def list_models(self) -> dict[str, Any]:
        about = {"object": "model", "created": self._started, "owned_by": "fedit"}
        return {"object": "list", "data": [{"id": name, **about} for name in self._names]}

    async def chat(self, asked: AskedChat, request: Request) -> Response:
        template, tokenizer = self._models.config.data.template, self._models.model.tokenizer
        return await self._respond(request, asked, encode_prompt(asked.conversation(), template, tokenizer))

    async def complete(self, asked: AskedCompletion, request: Request) -> Response:
        check_text(asked.prompt)
        ids = self._models.model.tokenizer(asked.prompt)["input_ids"]
        if not ids:
            raise RefusalError(400, "The prompt has no tokens.", "prompt")
        return await self._respond(request, asked, np.asarray(ids, np.int32))

    async def _respond(self, request: Request, asked: AskedOf, prompt: np.ndarray) -> Response:
        if asked.model not in self._names:
            known = did_you_mean(asked.model, self._names)
            raise RefusalError(404, f"No model {asked.model!r}. {known}", "model", "model_not_found")
        room = self._models.model.room(len(prompt))
        if room < (asked.most or 1):
            raise RefusalError(
                400,
                f"The prompt has {len(prompt)} tokens and {asked.most or 1} are asked for; the model's context is "
                f"{len(prompt) + room}. Shorten it, or ask for fewer.",
                "messages" if isinstance(asked, AskedChat) else "prompt",
                "context_length_exceeded",
            )
        most = asked.most or int(min(DEFAULT_TOKENS, room))
        reply = Reply(asked, len(prompt))
        answers = self._answering.answers(Question(asked.model, prompt, most, asked.sampling, asked.stop))
        if asked.stream:
            return StreamingResponse(reply.events(answers), media_type="text/event-stream")
        async with aclosing(answers):
            async for answer in answers:
                if answer.finish_reason is not None:
                    return JSONResponse(reply.whole(answer))
                if await request.is_disconnected():
                    break
        return Response(status_code=GONE)


def _refusal(error: Exception) -> JSONResponse:
    assert isinstance(error, RefusalError)
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return JSONResponse(error_object(str(error), kind, error.param, error.code), error.status)


def _of_form(error: Exception) -> RefusalError:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    what = "is not supported here" if first["type"] == "extra_forbidden" else first["msg"]
    return RefusalError(400, f"{param or 'body'}: {what}", param or None)


def _of_address(error: Exception) -> RefusalError:
    assert isinstance(error, HTTPException)
    return RefusalError(error.status_code, str(error.detail))


def vllm_command(models: RunModels) -> str:
    """Return the two lines that serve the run's federated model with vLLM."""
    adapter, base = models.folder / "adapter", resolve_path(models.config.model.path)
    if not adapter.is_dir() or (adapter / "side").is_dir():
        which = "" if adapter.is_dir() else " --model federated/CLIENT"
        merged = f"fedit export {shlex.quote(str(models.folder))}{which} --merged my-model"
        return f"  {merged}\n  vllm serve my-model --served-model-name federated"
    rank = vllm_rank(models.config.adapter.max_rank)
    place = shlex.quote(str(adapter))
    return (
        f"  vllm serve {shlex.quote(base)} --tokenizer {place} \\\n"
        f"    --enable-lora --max-lora-rank {rank} --lora-modules federated={place}"
    )
