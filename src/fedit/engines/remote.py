"""An `Engine` whose clients are at real sites, behind any transport that carries calls to them.

What a site is asked (its worker answers, `fedit.engines.site`), each a call of bounded size and duration, each the same
if it is asked twice:

    hello     the run's description -> the clients here, or why this site refuses it
    put       a piece of a message that the next call refers to
    train     tune these clients -> what is finished by now
    get       a piece of an update that was too long for the answer
    evaluate  the loss of an adapter on the site's held-out rows
    secure    an exchange of secure aggregation (`fedit.secure`), where the server is to see sums alone

So any process on the way may be killed, and the call is made again.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedit.config import RunConfig
from fedit.engines.channel import Header
from fedit.engines.messages import Packer
from fedit.engines.remote_site import IN_ANOTHER, LONGEST_CALL_S, Answer, RemoteSite, SiteError, Transport
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, EngineError
from fedit.secure.encoding import MaskedSum

log = logging.getLogger(__name__)


class Remote:
    """The clients of all sites; `join` comes before the first round."""

    def __init__(
        self,
        config: RunConfig,
        transport: Transport,
        sites: Sequence[str],
        expected: Mapping[str, str],
        run: str | None = None,
    ) -> None:
        """Make the engine of a run.

        `expected` is what every site must have: hashes of the base's weights and the tokenizer, fedit's version. `run`
        names the run, 16 hexadecimal digits, so that its clients find what they kept when it is resumed.
        """
        self._config = config
        names = {"run": run or secrets.token_hex(8), "session": secrets.token_hex(8)}
        self._packer = Packer()
        self._sites = {site: RemoteSite(site, config, transport, expected, names, self._packer) for site in sites}
        self._clients: dict[str, int] = {}
        self._site_of: dict[str, str] = {}

    def join(self, known: Mapping[str, int] | None = None) -> Mapping[str, str]:
        """Wait for the sites, and return why those that will not take part do not.

        `known` are the clients that a resumed run was started with: no others take part.

        Raises:
            EngineError: nobody joined, or a client's rows are not what they were.
        """
        deadline = time.monotonic() + self._config.engine.join_s
        reasons: dict[str, str] = {}

        def join(site: RemoteSite) -> None:
            try:
                site.join(deadline)
            except SiteError as error:
                reasons[site.name] = str(error)
            except Exception as error:  # whatever it sends
                log.exception("site %s", site.name)
                reasons[site.name] = f"its answer cannot be used ({type(error).__name__})"

        _in_threads(join, list(self._sites.values()))
        joined = {client: rows for site in self._sites.values() for client, rows in site.clients.items()}
        if not joined:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise EngineError(f"No site joined within [engine] join_s = {self._config.engine.join_s:g} s. {why}")
        self._clients = dict(joined if known is None else known)
        for client, rows in joined.items():
            if self._clients.get(client, rows) != rows:
                raise EngineError(f"Client {client!r} has {rows} rows now and had {self._clients[client]} when the run "
                                  "was started. Restore its rows, or start a new run.")  # fmt: skip
        self._site_of = {client: client.partition("/")[0] for client in self._clients}
        if gone := sorted(set(self._site_of.values()) - self._sites.keys()):
            raise EngineError(f"The run was started with sites that the federation no longer names: {', '.join(gone)}.")
        return reasons

    def clients(self) -> Mapping[str, int]:
        return self._clients

    def described(self) -> Mapping[str, Header]:
        """Return what the sites that joined say of themselves, and how many seconds their clocks are ahead."""
        return {name: site.described for name, site in self._sites.items() if site.clients}

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the results in the order of `tasks`, so that an update that is too long for an answer is fetched when
        its turn has come: one is in memory at a time.
        """
        for task, answer in self._answers(tasks, {}):
            if isinstance(answer, ClientFailure):
                yield answer
                continue
            result = self._sites[self._site_of[task.client]].receive(task, answer)
            yield result
            if isinstance(result, ClientFailure):
                yield from (ClientFailure(other, result.reason) for other in answer[0]["others"])

    def parties(self, tasks: Sequence[ClientTask]) -> Mapping[str, Sequence[ClientTask]]:
        """Return the tasks of each site: it is one party of secure aggregation."""
        by_site: dict[str, list[ClientTask]] = defaultdict(list)
        for task in tasks:
            by_site[self._site_of[task.client]].append(task)
        return by_site

    def exchange(self, requests: Mapping[str, Header]) -> Mapping[str, Header | ClientFailure]:
        """Return the sites' answers to an exchange of secure aggregation, or why one cannot be reached within
        `absent_s`, or does not go on.
        """
        deadline = time.monotonic() + self._config.engine.absent_s
        answers: dict[str, Header | ClientFailure] = {}

        def ask(site: RemoteSite) -> None:
            try:
                answers[site.name] = site.exchange(requests[site.name], deadline)
            except SiteError as error:
                answers[site.name] = ClientFailure(site.name, str(error))
            except Exception as error:  # whatever it sends
                log.exception("site %s", site.name)
                answers[site.name] = ClientFailure(site.name, f"its answer cannot be used ({type(error).__name__})")

        _in_threads(ask, [self._sites[name] for name in requests])
        return {name: answers[name] for name in requests}

    def run_masked(
        self, tasks: Sequence[ClientTask], requests: Mapping[str, Header]
    ) -> Iterator[MaskedSum | ClientFailure]:
        """Yield the sites' masked sums, in the order of `tasks`."""
        for task, answer in self._answers(tasks, requests):
            if isinstance(answer, ClientFailure):
                yield answer
                continue
            site, clients = self._site_of[task.client], [task.client, *answer[0]["others"]]
            payload = self._sites[site].fetch(task, answer)
            if isinstance(payload, ClientFailure):
                yield from (ClientFailure(client, payload.reason) for client in clients)
            else:
                yield MaskedSum(site, clients, payload)

    def _answers(
        self, tasks: Sequence[ClientTask], masks: Mapping[str, Header]
    ) -> Iterator[tuple[ClientTask, ClientFailure | tuple[Header, bytes | None]]]:
        """Yield what the sites answer for each task, in their order; tasks that another's answer is of are left out."""
        deadline = time.monotonic() + self._config.engine.deadline_s
        self._packer.forget_others([task.adapter for task in tasks])
        answers: dict[str, queue.Queue[Answer]] = {task.client: queue.Queue() for task in tasks}
        for site, its_tasks in self.parties(tasks).items():
            self._sites[site].begin(its_tasks, answers, deadline, masks.get(site))
        for task in tasks:
            try:  # a site's thread ends a call's length after the deadline
                answer = answers[task.client].get(timeout=max(0.0, deadline - time.monotonic()) + 2 * LONGEST_CALL_S)
            except queue.Empty:
                answer = ClientFailure(task.client, "no answer")
            if answer is not IN_ANOTHER:
                yield task, answer

    def evaluate(self, adapter: Adapter, round_index: int, step: bytes = b"") -> dict[str, tuple[float, int]]:
        """Return each site's mean held-out loss per response token, nats, and the number of these tokens; sites that
        do not answer, or tell nothing, are left out. `step` is the compressed message of what moved the adapter.
        """
        deadline = time.monotonic() + self._config.engine.deadline_s
        losses: dict[str, tuple[float, int]] = {}
        self._packer.forget_others([adapter])

        def evaluate(site: RemoteSite) -> None:
            try:
                if (loss := site.evaluate(adapter, round_index, deadline, step)) is not None:
                    losses[site.name] = loss
            except SiteError as error:
                log.warning("site %s was not evaluated: %s", site.name, error)
            except Exception:  # whatever it sends
                log.exception("site %s was not evaluated", site.name)

        _in_threads(evaluate, [site for site in self._sites.values() if site.clients])
        return {name: losses[name] for name in self._sites if name in losses}


def _in_threads(function: Callable[[RemoteSite], None], sites: Sequence[RemoteSite]) -> None:
    threads = [threading.Thread(target=function, args=(site,), daemon=True) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
