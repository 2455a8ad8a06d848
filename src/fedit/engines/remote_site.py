"""The server's view of one site: calls that are made again until they are answered, or the round's time is over."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from fedit.codec import Message, upload_codec
from fedit.config import RunConfig
from fedit.engines.channel import ChannelError, Header
from fedit.engines.messages import LARGEST, Packed, Packer, pack_step, result_name, unpack_update
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, EngineError

log = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""What a call waits for news before it answers that there are none."""
CALL_S = 30.0
"""What a call may take beyond that, and beyond its bytes."""
LONGEST_CALL_S = 240.0
"""No call takes longer."""
MOST_RESTARTS = 3
"""After so many restarts of a worker in a round its clients have failed."""
SLOWEST = 100_000
"""Bytes a second that a site's connection has at least."""
RETRY_S = 0.5, 10.0
"""First and longest pause before a call is made again."""


class Transport(Protocol):
    """Carries calls to the workers of sites."""

    piece_bytes: int
    """Longest blob of a call"""
    inline_bytes: int
    """What comes with an answer to `train` at most; longer updates are fetched in pieces"""

    def call(self, site: str, header: Mapping[str, Any], blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        """Return a site's reply.

        Raises:
            ChannelError: there was none within `timeout_s` seconds.
        """
        ...


class SiteError(EngineError):
    """A site cannot take part: it refuses, is gone, or is late. The message is what the round's record says."""


Answer = ClientFailure | tuple[Header, bytes | None]
"""What came of a task: an update's header, and its message where it came along."""
IN_ANOTHER: Answer = {}, None
"""The client's update is in that of another client of its site."""


class RemoteSite:
    """The server's view of one site."""

    def __init__(
        self,
        name: str,
        config: RunConfig,
        transport: Transport,
        expected: Mapping[str, str],
        names: Mapping[str, str],
        packer: Packer,
    ) -> None:
        self.name = name
        self._packer = packer
        self.clients: dict[str, int] = {}
        self.described: Header = {}
        self._config = config
        self._transport = transport
        self._expected = expected
        self._names = names
        """Of the run and of the process that runs it: in every call"""
        self._tuning: threading.Thread | None = None
        self._num_restarts = 0
        """Of its worker, in this round"""
        self._masks: Header | None = None
        """What it masks its clients' sum by in this round"""
        self._initial: dict[str, str] = {}
        self._groups: dict[str, Sequence[ClientTask]] = {}
        """The tasks that a client's were asked with"""
        self._held = "", -1, 0
        """The adapter that it has: its name, after how many rounds it was the global one, its rank"""
        self._codec = upload_codec(config)
        self._was_absent = False
        self._trouble = ""

    def join(self, deadline: float) -> None:
        """Agree on the run's description, and learn the site's clients.

        Raises:
            SiteError: it refuses, cannot be reached, or was not ready in time.
        """
        hello = {"do": "hello", "config": self._config.to_json(), "expected": dict(self._expected)}
        while (answer := self._ask(hello, b"", deadline, patient=True)[0]).get("state") == "loading":
            if time.monotonic() > deadline:
                raise SiteError("it was still loading at the deadline")
        if "refused" in answer:
            raise SiteError(f"it refuses: {answer['refused']}")
        clients = {str(client): int(rows) for client, rows in answer["clients"].items()}
        if any(client.partition("/")[0] != self.name or rows < 1 for client, rows in clients.items()):
            raise SiteError("it names clients that are not its own, or have no rows")
        if self.clients and clients != self.clients:
            raise SiteError("its clients, or their rows, are not what they were when it joined")
        self._initial = {str(name): str(digest) for name, digest in answer.pop("initial").items()}
        self.clients = clients
        self.described = {**answer, "clock_ahead_s": float(answer.pop("clock")) - time.time()}

    def exchange(self, words: Header, deadline: float) -> Header:
        """Return the site's answer to an exchange of secure aggregation.

        Raises:
            SiteError: it does not go on, cannot be reached, or was not there in time.
        """
        if words["exchange"] == "keys":  # a round begins
            self._num_restarts = 0
        return self._ask({"do": "secure", "words": words}, b"", deadline)[0]["words"]

    def begin(
        self,
        tasks: Sequence[ClientTask],
        answers: Mapping[str, queue.Queue[Answer]],
        deadline: float,
        masks: Header | None = None,
    ) -> None:
        """Let a thread put a result for each of `tasks` into its queue; with `masks`, one of their masked sum."""
        self._num_restarts = 0
        self._masks = masks
        self._tuning = threading.Thread(target=self._tune, args=(tasks, answers, deadline), daemon=True)
        self._tuning.start()

    def _tune(self, tasks: Sequence[ClientTask], answers: Mapping[str, queue.Queue[Answer]], deadline: float) -> None:
        """Put a result for each of `tasks` into its queue, as the clients finish."""
        left = {task.client: task for task in tasks}
        try:
            for group in _of_equal_adapters(tasks):
                for answer in self._results(group, deadline):
                    client = answer.client if isinstance(answer, ClientFailure) else answer[0]["client"]
                    others = [] if isinstance(answer, ClientFailure) else answer[0]["others"]
                    if others:
                        self._check_others(client, others, [task.client for task in group if task.client in left])
                    for other in others:
                        del left[other]
                        answers[other].put(IN_ANOTHER)
                    if left.pop(client, None) is not None:
                        self._groups[client] = group
                        answers[client].put(answer)
        except SiteError as error:
            reason = str(error)
        except Exception as error:  # whatever a site sends, the round goes on without it
            log.exception("site %s", self.name)
            reason = f"its answer cannot be used ({type(error).__name__})"
        else:
            reason = "no answer"
        for client in left:
            answers[client].put(ClientFailure(client, reason))

    def _check_others(self, client: str, others: Sequence[str], asked: Sequence[str]) -> None:
        """Refuse an update that stands for other clients than the site may speak for; the first of them sends it."""
        stands_for = [name for name in asked if name == client or name in others]
        merges = self._config.engine.merge_clients or self._masks is not None
        if not merges or stands_for != [client, *others]:
            raise SiteError("its update stands for clients that were not asked for one, or have answered")

    def receive(self, task: ClientTask, answer: tuple[Header, bytes | None]) -> Result:
        """Return the update that `answer` announces; what has not come along is fetched."""
        about, _ = answer
        received = task.adapter
        if about.get("rank") == (kept_rank := self._config.objective.kept_rank(received.rank)):
            received = received.cut(kept_rank)
        shared = received.only(self._config.aggregation.shared(task.round_index))
        shapes = {name: tensor.shape for name, tensor in shared.items()}
        message = self.fetch(task, answer)
        if isinstance(message, ClientFailure):
            return message
        return unpack_update(about, message, task, shapes, self._codec)

    def fetch(self, task: ClientTask, answer: tuple[Header, bytes | None]) -> Message | ClientFailure:
        """Return the message that `answer` announces, of an update or a masked sum; what is missing is fetched."""
        about, message = answer
        shared = task.adapter.only(self._config.aggregation.shared(task.round_index))
        most = 8 * sum(tensor.numel() for tensor in shared.values()) + (1 << 16)
        try:
            size = int(about["size"])
            if size > 2 * most:
                return ClientFailure(task.client, f"an update of {size:,} bytes, where {most:,} are too many")
            if message is None:
                message = self._fetch(task, about, size, time.monotonic() + self._config.engine.deadline_s)
        except SiteError as error:
            return ClientFailure(task.client, str(error))
        except Exception as error:  # whatever a site sends, the round goes on without it
            log.exception("site %s", self.name)
            return ClientFailure(task.client, f"its answer cannot be used ({type(error).__name__})")
        return message

    def evaluate(
        self, adapter: Adapter, round_index: int, deadline: float, step: bytes = b""
    ) -> tuple[float, int] | None:
        """Return the loss of an adapter at the site, and the tokens it is of; `step` is what moved it in this round."""
        packed, about = self._packer.pack(adapter, {}, self._initial)
        request = {"do": "evaluate", "round": round_index, "adapter": about}
        for answer in self._news(request, packed, deadline, step):
            if not isinstance(answer, ClientFailure):
                loss, num_tokens = float(answer[0]["loss"]), int(answer[0]["num_tokens"])
                return (loss, num_tokens) if math.isfinite(loss) and 0 < num_tokens < LARGEST else None
            log.warning("site %s was not evaluated: %s", self.name, answer.reason)
        return None

    def _results(self, tasks: Sequence[ClientTask], deadline: float) -> Iterator[Answer]:
        """Yield what comes of tasks that share one adapter."""
        packed, about = self._packer.pack(tasks[0].adapter, tasks[0].control, self._initial)
        request = {
            "do": "train",
            "round": tasks[0].round_index,
            "adapter": about,
            "clients": {task.client: task.num_earlier for task in tasks},
            "inline": self._transport.inline_bytes,
            "merge": self._config.engine.merge_clients,
            "epsilon": tasks[0].epsilon,
        }
        if self._masks is not None:
            request["secure"] = self._masks
        yield from self._news(request, packed, deadline, tasks[0].step)

    def _news(self, request: Header, packed: Packed, deadline: float, step: bytes) -> Iterator[Answer]:
        """Ask until everything is answered; yield what is new each time.

        A site that has the adapter which it was asked to work with last is sent the `step` from it alone.
        """
        seen = 0
        packed_step = packed
        number, rank = request["round"] + (request["do"] == "evaluate"), request["adapter"]["rank"]
        held, *which = self._held
        if step and held != packed.key and which == [number - 1, rank]:
            packed_step, request["adapter"]["step"] = pack_step(step, held, number - 1)
        while True:
            self._check(deadline)
            answer, blob = self._ask({**request, "seen": seen}, b"", deadline, patient=True)
            if "missing" in answer:
                self._put(packed_step if answer.get("step") else packed, int(answer["missing"]), deadline)
                continue
            if (answer["round"], answer["key"]) != (request["round"], packed.key):
                log.warning("site %s answered something that was not asked; asking again", self.name)
                time.sleep(RETRY_S[0])
                continue
            self._held = packed.key, number, rank
            if answer.get("restarted"):
                seen = 0
            for about in answer["results"]:
                if "failure" in about:
                    yield ClientFailure(about["client"], str(about["failure"]))
                elif about["inline"]:
                    message, blob = blob[: about["size"]], blob[about["size"] :]
                    yield about, message
                else:
                    yield about, None
            seen += len(answer["results"])
            if not answer["running"]:
                return

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise SiteError(f"no answer within [engine] deadline_s = {self._config.engine.deadline_s:g} s")

    def _put(self, packed: Packed, start: int, deadline: float) -> None:
        """Send a message from byte `start` on; if nothing is left to send, its end once more."""
        size = len(packed.payload)
        for offset in range(min(start, size), max(size, 1), self._transport.piece_bytes):
            piece = bytes(packed.payload[offset : offset + self._transport.piece_bytes])
            answer, _ = self._ask({"do": "put", "key": packed.key, "offset": offset, "size": size}, piece, deadline)
            if answer.get("missing") is not None:  # it has begun anew meanwhile
                return

    def _fetch(self, task: ClientTask, about: Header, size: int, deadline: float) -> bytearray:
        """Return an update's message piece by piece; a worker that was restarted tunes the client again."""
        message = bytearray()
        key = result_name(self._packer.pack(task.adapter, task.control, self._initial)[0].key, self._masks)
        while len(message) < size:
            self._check(deadline)
            request = {
                "do": "get",
                "round": task.round_index,
                "key": key,
                "client": task.client,
                "offset": len(message),
                "bytes": self._transport.piece_bytes,
            }
            answer, piece = self._ask(request, b"", deadline)
            if answer.get("gone"):
                if self._tuning is not None:  # or the two would interrupt each other
                    self._tuning.join(max(0.0, deadline - time.monotonic()))
                self._tune_again(task, about, deadline)
                continue
            if len(piece) < min(self._transport.piece_bytes, size - len(message)):
                raise SiteError(f"its update ended after {len(message):,} of {size:,} bytes")
            message += piece
        return message

    def _tune_again(self, task: ClientTask, about: Header, deadline: float) -> None:
        """Let a worker that was restarted make an update once more, which it announced with `about`."""
        others = about["others"]
        for again in self._results(self._groups[task.client] if others else [task], deadline):
            if isinstance(again, ClientFailure):
                if again.client in (task.client, *others):
                    raise SiteError(again.reason)
            elif again[0]["client"] == task.client and any(again[0][n] != about[n] for n in ("others", "num_examples")):
                raise SiteError("after a restart its update stands for other clients than before")

    def _ask(self, header: Header, blob: bytes, deadline: float, *, patient: bool = False) -> tuple[Header, bytes]:
        """Return the site's answer; calls are made again until they have one.

        Raises:
            SiteError: the site refuses, or none came before the deadline, or for `absent_s` seconds.
        """
        wait_s = max(0.0, min(PATIENCE_S, deadline - time.monotonic())) if patient else 0.0
        num_bytes = len(blob) + int(header.get("bytes", header.get("inline", 0)))
        pause, longest = RETRY_S
        first = time.monotonic()
        while True:
            try:
                timeout_s = wait_s + CALL_S + num_bytes / SLOWEST
                asked = {**header, **self._names, "wait_s": wait_s}
                answer, reply = self._transport.call(self.name, asked, blob, timeout_s)
                if "error" in answer:
                    raise ChannelError(str(answer["error"]))
            except ChannelError as error:
                now = time.monotonic()
                given_up = first if self._was_absent else first + self._config.engine.absent_s
                if header["do"] == "hello":
                    given_up = deadline
                if now > min(deadline, given_up):
                    self._was_absent = True
                    raise SiteError(f"it could not be reached ({error})") from error
                if str(error) != self._trouble:
                    log.warning("site %s: %s; asking again until it answers", self.name, error)
                    self._trouble = str(error)
                time.sleep(min(pause, max(0.0, deadline - now)))
                pause = min(longest, 2 * pause)
                continue
            self._was_absent = False
            if self._trouble:
                log.warning("site %s answers", self.name)
                self._trouble = ""
            if "unjoined" in answer and header["do"] != "hello":
                self._check(deadline)
                self._num_restarts += 1
                if self._num_restarts > MOST_RESTARTS:
                    raise SiteError(f"its worker ended {self._num_restarts} times in this round")
                self.join(deadline)
                continue
            if "refused" in answer and header["do"] != "hello":
                raise SiteError(f"it refuses: {answer['refused']}")
            return answer, reply


Result = ClientUpdate | ClientFailure


def _of_equal_adapters(tasks: Sequence[ClientTask]) -> list[list[ClientTask]]:
    """Return the tasks in groups that were given the same adapter."""
    groups: dict[int, list[ClientTask]] = defaultdict(list)
    for task in tasks:
        groups[task.adapter.rank].append(task)
    return list(groups.values())
