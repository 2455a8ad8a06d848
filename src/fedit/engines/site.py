"""The worker at a site: it holds the base, the rows and what its clients keep, and answers the calls of `remote`.

    python -m fedit.engines.site FOLDER      (started and watched over by `fedit site start`)

It stays while couriers come and go. One thread tunes; a thread for each call asks it for news. To the server go numbers
and the reasons that are written here; what goes wrong with a file or a row is told to the site's log alone.
"""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from fedit.codec import Message, upload_codec
from fedit.config import RunConfig, load_plugins, parse_config
from fedit.engines.channel import Header, serve
from fedit.engines.client_store import ClientStore
from fedit.engines.messages import digests, pack_update, unpack_adapter
from fedit.engines.simulation import Simulation
from fedit.engines.site_folder import SiteFolder
from fedit.evaluation.heldout import mean_loss
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ConfigError, EncodedExample, FeditError
from fedit.memory import memory_bytes
from fedit.model import StackedModel
from fedit.prepare import prepare_model, prepare_site

log = logging.getLogger(__name__)

Reply = tuple[Header, bytes]


class SupersededError(BaseException):
    """The server has gone on to another job."""


@dataclass(eq=False)
class _Job:
    """Something that the server asked for: its results grow while it runs."""

    request: Header
    payload: Message
    results: list[tuple[Header, bytes]] = field(default_factory=list)
    running: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        clients = tuple(self.request.get("clients", ()))
        return self.request["do"], self.request["round"], self.request["adapter"]["key"], clients


@dataclass(frozen=True, eq=False)
class _Joined:
    """What a run's description made of the site."""

    config: RunConfig
    model: StackedModel
    clients: Mapping[str, Sequence[EncodedExample]]
    test: Sequence[EncodedExample]
    engine: Simulation
    initial: Adapter
    answer: Header


class Worker:
    """Answers calls (`handle`, in any thread) and does what they ask for (`work`, in one)."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder
        self._policy = folder.config.policy
        self._changed = threading.Condition()
        self._described: Header | None = None
        """The description of the run that the site joined, or is joining"""
        self._joined: _Joined | None = None
        self._refused: str | None = None
        self._job: _Job | None = None
        self._arriving: tuple[str, bytearray] = "", bytearray()
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
        }
        if header.get("do") not in answers:
            return {"refused": f"this site does not know the call {header.get('do')!r}"}, b""
        with self._changed:
            return ({"error": "the worker is stopping"}, b"") if self._stopped else answers[header["do"]](header, blob)

    def _hello(self, header: Header, blob: bytes) -> Reply:
        wanted = {"config": header["config"], "expected": header["expected"]}
        if self._described != wanted:
            self._described, self._joined, self._refused, self._job = wanted, None, None, None
            self._changed.notify_all()
        self._changed.wait_for(lambda: self._joined or self._refused, _wait_s(header))
        if self._refused is not None:
            return {"refused": self._refused}, b""
        return ({**self._joined.answer, "clock": time.time()} if self._joined else {"state": "loading"}), b""

    def _put(self, header: Header, blob: bytes) -> Reply:
        key, arrived = self._arriving
        if key != header["key"]:
            key, arrived = header["key"], bytearray()
            self._arriving = key, arrived
        if header["size"] > self._folder.max_message_bytes:
            most = self._folder.max_message_bytes
            return {"refused": f"a message of {header['size']:,} bytes; this site takes {most:,} at most"}, b""
        if header["offset"] > len(arrived):
            return {"missing": len(arrived)}, b""
        arrived[header["offset"] :] = blob
        return {}, b""

    def _news(self, header: Header, blob: bytes) -> Reply:
        """Return the results that the server has not seen; a job that is new begins."""
        if self._joined is None:
            return {"unjoined": True}, b""
        job = _Job(header, b"")
        restarted = False
        if self._job is None or self._job.key != job.key:
            key, arrived = self._arriving
            size = 4 * sum(_numel(shape) for _, shape in header["adapter"]["layout"])
            if key != header["adapter"]["key"] or len(arrived) < size:
                return {"missing": len(arrived) if key == header["adapter"]["key"] else 0}, b""
            job.payload, restarted = arrived, True
            self._job = job
            self._changed.notify_all()
        job, seen = self._job, 0 if restarted else int(header["seen"])
        self._changed.wait_for(lambda: len(job.results) > seen or not job.running or self._stopped, _wait_s(header))
        if self._stopped:
            return {"error": "the worker is stopping"}, b""
        results, parts, inline = [], [], int(header.get("inline", 0))
        for about, message in job.results[seen:]:
            comes_along = len(message) <= inline
            inline -= len(message) if comes_along else 0
            results.append({**about, "size": len(message), "inline": comes_along})
            parts.append(message if comes_along else b"")
        return {"results": results, "running": job.running, "restarted": restarted}, b"".join(parts)

    def _get(self, header: Header, blob: bytes) -> Reply:
        job = self._job
        if job is not None and job.request["round"] == header["round"]:
            for about, message in job.results:
                if about["client"] == header["client"] and "failure" not in about:
                    return {}, message[header["offset"] : header["offset"] + header["bytes"]]
        return {"gone": True}, b""

    # -------------------------------------------------------------------------------------------------------- work

    def work(self) -> None:
        """Join runs and do jobs until `stop`."""
        while not self._stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._to_join() or self._to_do(), 1.0)
                described, job = self._to_join(), self._to_do()
            if described is not None:
                self._join(described)
            elif job is not None:
                self._run(job)

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
            config = parse_config(described["config"])
            self._folder.log("asked to join", run=config.digest())
            joined = self._load(config, described["expected"])
        except RefusalError as refusal:
            refused = str(refusal)
        except ConfigError as error:
            refused = f"the run's description cannot be used here: {error}"
        except Exception as error:
            log.exception("the site cannot join")
            refused = f"{type(error).__name__} while it got ready; its own log says more"
        with self._changed:
            if self._described == described:
                self._joined, self._refused = joined, refused
            self._changed.notify_all()
        self._folder.log("joined" if joined else "refused", reason=refused, clients=joined and len(joined.clients))

    def _load(self, described: RunConfig, expected: Mapping[str, str]) -> _Joined:
        """Return the site ready to tune.

        Raises:
            RefusalError: the run does not fit what is installed or allowed here.
        """
        version = importlib.metadata.version("fedit")
        if version != expected["fedit"]:
            raise RefusalError(f"fedit {version} is installed here, the server has {expected['fedit']}")
        if described.attack is not None:
            raise RefusalError("[attack] is for simulations: clients of a real federation act for themselves")
        config = self._folder.localise(described)
        data = prepare_site(config, self._folder.name)
        started = prepare_model(config, list(data.clients.values()))
        here = {"base": started.weights_sha256, "tokenizer": started.tokenizer_sha256}
        for what, digest in here.items():
            if digest != expected[what]:
                raise RefusalError(
                    f"another {what}: SHA-256 {digest[:16]}... here, {expected[what][:16]}... at the server"
                )
        data = started.with_margins(config, data)
        store = ClientStore(self._folder.path / "clients", described.digest())
        engine = Simulation(config, started.model, data.clients, store, self._step_done)
        answer = {
            "clients": {client: len(rows) if self._policy.counts else 1 for client, rows in data.clients.items()},
            "initial": digests(started.initial.tensors),
            "torch": torch.__version__,
            "device": str(started.model.device),
            "memory_bytes": memory_bytes(config.engine, started.model.device),
            "slots": started.model.max_slots,
            "held_out": len(data.test),
        }
        return _Joined(config, started.model, data.clients, data.test, engine, started.initial, answer)

    def _step_done(self, num_tokens: int) -> None:
        job = self._job
        if self._stopped or job is None or job is not self._running:
            raise SupersededError

    def _run(self, job: _Job) -> None:
        self._running = job
        about = job.request
        num_clients = len(about.get("clients", ())) or None
        self._folder.log(
            f"asked to {about['do']}", round=about["round"], received=len(job.payload), clients=num_clients
        )
        joined = self._joined
        assert joined is not None
        try:
            adapter, control = unpack_adapter(about["adapter"], job.payload, joined.initial)
            if about["do"] == "evaluate":
                self._evaluate(job, joined, adapter)
            else:
                self._tune(job, joined, adapter, control)
        except SupersededError:
            self._folder.log("abandoned", round=about["round"])
            return  # nobody is to think that it is done
        except Exception as error:
            log.exception("round %s failed", about["round"])
            done = {result["client"] for result, _ in job.results}
            reason = f"{type(error).__name__} while it tuned; the site's own log says more"
            for client in about.get("clients", {self._folder.name: 0}):
                if client not in done:
                    self._finish(job, {"client": client, "failure": reason}, b"")
        with self._changed:
            job.running = False
            self._changed.notify_all()

    def _tune(self, job: _Job, joined: _Joined, adapter: Adapter, control: Mapping[str, torch.Tensor]) -> None:
        about, codec = job.request, upload_codec(joined.config)
        tasks = [
            ClientTask(client, about["round"], adapter, int(num_earlier), control)
            for client, num_earlier in about["clients"].items()
            if client in joined.clients
        ]
        for client in about["clients"].keys() - joined.clients.keys():
            self._finish(job, {"client": client, "failure": "this site has no such client"}, b"")
        for result in joined.engine.run(tasks) if tasks else ():
            if isinstance(result, ClientFailure):
                self._finish(job, {"client": result.client, "failure": result.reason}, b"")
                continue
            header, message = pack_update(result, codec, about["round"])
            if not self._policy.counts:
                header["num_examples"] = 1
            if not self._policy.losses:
                header |= {"loss": 0.0, "num_tokens": 0}
            norm = sum(float(t.double().square().sum()) for t in result.update.tensors.values()) ** 0.5
            self._folder.log(
                "sent", round=about["round"], client=result.client, bytes=len(message), norm=norm,
                sha256=sha256(message).hexdigest(),
            )  # fmt: skip
            self._finish(job, header, message)

    def _evaluate(self, job: _Job, joined: _Joined, adapter: Adapter) -> None:
        if not self._policy.evaluation:
            self._finish(job, {"client": self._folder.name, "failure": "this site tells no losses"}, b"")
            return
        loss = mean_loss(joined.model, [adapter], joined.test)
        num_tokens = sum(row.num_supervised for row in joined.test)
        self._folder.log("told its loss", round=job.request["round"], loss=loss)
        self._finish(job, {"client": self._folder.name, "loss": loss, "num_tokens": num_tokens}, b"")

    def _finish(self, job: _Job, about: Header, message: bytes) -> None:
        with self._changed:
            job.results.append((about, message))
            self._changed.notify_all()


class RefusalError(FeditError):
    """Why the site does not take part: told to the server as it is."""


def _wait_s(header: Header) -> float:
    return min(60.0, max(0.0, float(header.get("wait_s", 0.0))))


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total


def main(arguments: Sequence[str]) -> None:
    """Serve a site's folder until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    load_plugins()
    folder = SiteFolder.read(Path(arguments[0]))
    worker, stopped = Worker(folder), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (stopped.set(), worker.stop()))
    server = threading.Thread(target=serve, args=(folder.socket, worker.handle, stopped), daemon=True)
    server.start()
    worker.work()
    stopped.set()
    server.join(timeout=5)


if __name__ == "__main__":
    main(sys.argv[1:])
