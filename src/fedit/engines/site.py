"""The worker at a site: it holds the base, the rows and what its clients keep, and answers the calls of `remote`.

    python -m fedit.engines.site FOLDER      (started and watched over by `fedit site start`)

It stays while couriers come and go. One thread tunes; a thread for each call asks it for news. To the server go numbers
and the reasons that are written here; what goes wrong with a file or a row is told to the site's log alone.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedit.aggregation.merging import Merged
from fedit.codec import Codec, Message, download_codec, upload_codec
from fedit.config import RunConfig, load_plugins, parse_config
from fedit.engines.channel import Header, serve
from fedit.engines.inbox import Inbox, Taken
from fedit.engines.joining import Joined, RefusalError, join_run
from fedit.engines.messages import apply_step, pack_update, result_name, unpack_adapter
from fedit.engines.site_folder import SiteFolder
from fedit.engines.site_sums import answer_exchange, masked_answers
from fedit.evaluation.heldout import mean_loss
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, ConfigError, FeditError
from fedit.logs import log_to_stderr

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Reply = tuple[Header, bytes]


class SupersededError(BaseException):
    """The server has gone on to another job."""


@dataclass(eq=False)
class _Job:
    """Something that the server asked for: its results grow while it runs."""

    request: Header
    adapter: Taken = field(default_factory=lambda: Taken(b"", 0))
    results: list[tuple[Header, Message]] = field(default_factory=list)
    running: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        clients = tuple(self.request.get("clients", ()))
        return self.request["do"], self.request["round"], self.name, clients

    @property
    def done(self) -> set[str]:
        """The clients whose results are there, in updates of others too."""
        return {name for about, _ in self.results for name in (about["client"], *about.get("others", ()))}

    @property
    def order(self) -> tuple[int, bool]:
        """A round is tuned before it is evaluated."""
        return int(self.request["round"]), self.request["do"] == "evaluate"

    @property
    def name(self) -> str:
        """Of what its clients' results are kept under: the received adapter, and the masks."""
        return result_name(self.request["adapter"]["key"], self.request.get("secure"))

    @property
    def keys(self) -> list[_ResultKey]:
        """What its clients' results are kept under."""
        return [(self.request["round"], self.name, client) for client in self.request.get("clients", ())]


_ResultKey = tuple[int, str, str]
"""Round, name of what it was made of, client"""


class Worker:
    """Answers calls (`handle`, in any thread) and does what they ask for (`work`, in one)."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder
        self._policy = folder.config.policy
        self._changed = threading.Condition()
        self._described: Header | None = None
        """The description of the run that the site joined, or is joining"""
        self._joined: Joined | None = None
        self._refused: str | None = None
        self._job: _Job | None = None
        self._session = ""
        """Which process asks"""
        self._finished: dict[_ResultKey, tuple[Header, Message]] = {}
        """The updates of the latest round, whichever jobs they came of"""
        self._inbox = Inbox(folder.max_message_bytes)
        self._running: _Job | None = None
        """The job that `work` does; `_job` may be another already"""
        self._stopped = False

    # ------------------------------------------------------------------------------------------------------- calls

    def handle(self, header: Header, blob: bytes) -> Reply:
        """Return the answer to a call."""
        answers: dict[str, Callable[[Header, bytes], Reply]] = {
            "hello": self._hello,
            "put": self._put,
            "train": self._news,
            "evaluate": self._news,
            "get": self._get,
            "secure": self._exchange,
        }
        do = header.get("do")
        if do not in answers:
            return {"refused": f"this site does not know the call {do!r}"}, b""
        with self._changed:
            if self._stopped:
                return {"error": "the worker is stopping"}, b""
            if do != "hello" and (self._joined is None or self._session != header.get("session")):
                return {"unjoined": True}, b""
            return answers[do](header, blob)

    def _hello(self, header: Header, blob: bytes) -> Reply:
        wanted = {key: header[key] for key in ("run", "config", "expected")}
        if not re.fullmatch("[0-9a-f]{16}", str(wanted["run"])):
            return {"refused": "the run has no name of 16 hexadecimal digits"}, b""
        is_new = self._session != header["session"]
        self._session = header["session"]
        if self._described != wanted or (is_new and self._refused is not None):
            self._described, self._joined, self._refused, self._job = wanted, None, None, None
            self._finished.clear()
        self._changed.notify_all()
        self._changed.wait_for(
            lambda: self._stopped or self._described != wanted or self._joined or self._refused, _wait_s(header)
        )
        if self._described != wanted or not (self._joined or self._refused):
            return {"state": "loading"}, b""
        if self._joined is None:
            return {"refused": self._refused}, b""
        return {**self._joined.answer, "clock": time.time()}, b""

    def _put(self, header: Header, blob: bytes) -> Reply:
        return self._inbox.put(header, blob), b""

    def _news(self, header: Header, blob: bytes) -> Reply:
        """Return the results that the server has not seen; a job that is new begins."""
        job, began = _Job(header), False
        earlier = self._job
        if earlier is not None and earlier.request["session"] == self._session and job.order < earlier.order:
            return {"error": "a call of an earlier round"}, b""
        if self._job is None or self._job.key != job.key:
            taken = self._inbox.take(header["adapter"], self._step_from)
            if not isinstance(taken, Taken):
                return taken, b""
            job.adapter, began = taken, True
            self._finished = {key: result for key, result in self._finished.items() if key[0] == header["round"]}
            job.results = [self._finished[key] for key in job.keys if key in self._finished]
            self._job = job
            self._changed.notify_all()
        job, seen = self._job, 0 if began else int(header["seen"])
        self._changed.wait_for(
            lambda: len(job.results) > seen or not job.running or self._stopped or self._job is not job,
            _wait_s(header),
        )
        if self._stopped or self._job is not job:
            return {"error": "the worker turned to something else"}, b""
        results, parts, inline = [], [], int(header.get("inline", 0))
        for about, message in job.results[seen:]:
            comes_along = len(message) <= inline
            inline -= len(message) if comes_along else 0
            results.append({**about, "size": len(message), "inline": comes_along})
            parts.append(message if comes_along else b"")
        news = {"round": header["round"], "key": header["adapter"]["key"], "restarted": began}
        return {**news, "results": results, "running": job.running}, b"".join(parts)

    def _step_from(self, before: Header, payload: Message, about: Header, step: Message) -> Message:
        joined = self._joined
        assert joined is not None
        returned = joined.config.aggregation.returned(about["step"]["round"])
        return apply_step(before, payload, about, step, joined.initial, download_codec(joined.config), returned)

    def _get(self, header: Header, blob: bytes) -> Reply:
        found = self._finished.get((header["round"], header["key"], header["client"]))
        if found is None:
            return {"gone": True}, b""
        offset = max(0, int(header["offset"]))
        return {}, bytes(found[1][offset : offset + max(0, int(header["bytes"]))])

    def _exchange(self, header: Header, blob: bytes) -> Reply:
        assert self._joined is not None  # `handle` sees to it
        return answer_exchange(self._joined.party, header["words"], self._note), b""

    # -------------------------------------------------------------------------------------------------------- work

    def work(self) -> None:
        """Join runs and do jobs until `stop`."""
        while not self._stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._to_join() or self._to_do(), 1.0)
                described, job, joined = self._to_join(), self._to_do(), self._joined
            if described is not None:
                self._join(described)
            elif job is not None and joined is not None:
                self._run(job, joined)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _to_join(self) -> Header | None:
        return self._described if self._joined is None and self._refused is None else None

    def _to_do(self) -> _Job | None:
        return self._job if self._job is not None and self._job.running else None

    def _join(self, described: Header) -> None:
        joined, refused = None, None
        try:
            self._read_again()
            self._folder.log("asked to join", run=described["run"])
            joined = self._load(self._parse(described["config"]), described["expected"], described["run"])
        except RefusalError as refusal:
            refused = str(refusal)
        except Exception as error:
            log.exception("the site cannot join")
            refused = f"{type(error).__name__} while it got ready; its own log says more"
        with self._changed:
            if self._described == described:
                self._joined, self._refused = joined, refused
            self._changed.notify_all()
        if joined is None:
            self._note("refused", reason=refused)
        else:
            self._note("joined", clients=len(joined.clients), rows=joined.cleaning)

    def _read_again(self) -> None:
        """What the operator changed in site.toml holds from the next run on."""
        folder = SiteFolder.read(self._folder.path)
        if folder.name != self._folder.name:
            raise RefusalError(f"its site.toml names another site, {folder.name}")
        with self._changed:
            self._folder, self._policy = folder, folder.config.policy
            self._inbox.max_bytes = folder.max_message_bytes

    @staticmethod
    def _parse(config: Header) -> RunConfig:
        try:
            return parse_config(config)
        except ConfigError as error:  # of the server's words alone, so it may be told
            raise RefusalError(f"the run's description cannot be used here: {error}") from error

    def _note(self, event: str, **about: Any) -> None:
        """Log what happened; a disk that is full does not end the worker."""
        try:
            self._folder.log(event, **about)
        except FeditError:
            log.exception("the site's log cannot be written")

    def _load(self, config: RunConfig, expected: Mapping[str, str], run: str) -> Joined:
        return join_run(self._folder, config, expected, run, self._step_done)

    def _step_done(self, num_tokens: int) -> None:
        job = self._job
        if self._stopped or job is None or job is not self._running:
            raise SupersededError

    def _run(self, job: _Job, joined: Joined) -> None:
        self._running = job
        about = job.request
        num_clients = len(about.get("clients", ())) or None
        self._note(f"asked to {about['do']}", round=about["round"], received=job.adapter.num_bytes, clients=num_clients)
        try:
            adapter, control = unpack_adapter(about["adapter"], job.adapter.payload, joined.initial)
            if about["do"] == "evaluate":
                self._evaluate(job, joined, adapter)
            else:
                self._tune(job, joined, adapter, control)
        except SupersededError:
            self._note("abandoned", round=about["round"])
            return  # nobody is to think that it is done
        except Exception as error:
            log.exception("round %s failed", about["round"])
            done = job.done
            reason = f"{type(error).__name__} while it tuned; the site's own log says more"
            for client in about.get("clients", {self._folder.name: 0}):
                if client not in done:
                    self._finish(job, {"client": client, "failure": reason}, b"")
        with self._changed:
            job.running = False
            self._changed.notify_all()

    def _tune(self, job: _Job, joined: Joined, adapter: Adapter, control: Mapping[str, Tensor]) -> None:
        about, codec = job.request, upload_codec(joined.config)
        done = job.done
        tasks = [
            ClientTask(client, about["round"], adapter, int(num_earlier), control)
            for client, num_earlier in about["clients"].items()
            if client in joined.clients and client not in done
        ]
        for client in about["clients"].keys() - joined.clients.keys():
            self._finish(job, {"client": client, "failure": "this site has no such client"}, b"")
        if joined.party is not None or "secure" in about:
            for header, message in masked_answers(joined, self._policy, about, tasks, self._note):
                self._finish(job, header, message)
            return
        merged = Merged(getattr(joined.config.aggregation, "weighting", "uniform")) if about.get("merge") else None
        for result in joined.engine.run(tasks) if tasks else ():
            if isinstance(result, ClientFailure):
                self._finish(job, {"client": result.client, "failure": result.reason}, b"")
            elif not math.isfinite(result.loss):
                self._finish(job, {"client": result.client, "failure": f"its training loss is {result.loss}"}, b"")
            elif merged is not None:
                merged.add(result if self._policy.counts else replace(result, num_examples=1))
            else:
                self._send(job, result, codec)
        if merged is not None and (mean := merged.result(list(about["clients"]))) is not None:
            self._send(job, mean, codec)

    def _send(self, job: _Job, result: ClientUpdate, codec: Codec) -> None:
        """Make an update ready to be fetched, with what the policy lets leave."""
        round_index = job.request["round"]
        header, message = pack_update(result, codec, round_index)
        private = self._joined is not None and self._joined.config.privacy is not None
        epsilon = job.request.get("epsilon") if result.epsilon is None else result.epsilon
        if private or not self._policy.counts:
            header["num_examples"] = 1 + len(result.others)
        if private or not self._policy.losses:
            header |= {"loss": 0.0, "num_tokens": 0}
        norm = sum(float(t.double().square().sum()) for t in result.update.tensors.values()) ** 0.5
        self._note(
            "sent", round=round_index, client=result.client, merged=len(result.others) or None, bytes=len(message),
            norm=norm, sha256=sha256(message).hexdigest(), epsilon=epsilon,
        )  # fmt: skip
        self._finish(job, header, message)

    def _evaluate(self, job: _Job, joined: Joined, adapter: Adapter) -> None:
        if not self._policy.evaluation or joined.config.privacy is not None:
            self._finish(job, {"client": self._folder.name, "failure": "this site tells no losses"}, b"")
            return
        loss = mean_loss(joined.model, [adapter], joined.test)
        if not math.isfinite(loss):
            self._finish(job, {"client": self._folder.name, "failure": f"its held-out loss is {loss}"}, b"")
            return
        num_tokens = sum(row.num_supervised for row in joined.test)
        self._note("told its loss", round=job.request["round"], loss=loss)
        self._finish(job, {"client": self._folder.name, "loss": loss, "num_tokens": num_tokens}, b"")

    def _finish(self, job: _Job, about: Header, message: Message) -> None:
        with self._changed:
            job.results.append((about, message))
            if job.request["do"] == "train" and "failure" not in about:
                key = job.request["round"], job.name, about["client"]
                self._finished[key] = about, message
            self._changed.notify_all()


def _wait_s(header: Header) -> float:
    return min(60.0, max(0.0, float(header.get("wait_s", 0.0))))


def main(arguments: Sequence[str]) -> None:
    """Serve a site's folder until SIGTERM."""
    log_to_stderr()
    load_plugins()
    folder = SiteFolder.read(Path(arguments[0]))
    worker, stopped = Worker(folder), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (stopped.set(), worker.stop()))
    problems: list[BaseException] = []

    def answer() -> None:
        try:
            serve(folder.socket, worker.handle, stopped)
        except BaseException as error:  # a worker that nobody can call has no business
            problems.append(error)
            raise
        finally:
            worker.stop()

    server = threading.Thread(target=answer, daemon=True)
    server.start()
    worker.work()
    stopped.set()
    server.join(timeout=5)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
