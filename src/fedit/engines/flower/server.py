"""The courier at the server: it hands calls to the sites, as messages of a run that it starts at the SuperLink.

python -m fedit.engines.flower.server FOLDER ADDRESS
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto import control_pb2, message_pb2, runtime_pb2
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedit.engines.channel import Header, serve
from fedit.engines.flower.calls import MAX_OBJECTS, POLL_S, content_of, read, until_terminated
from fedit.errors import EngineError

log = logging.getLogger(__name__)

TRIES = 3
"""To reach the SuperLink, whose connections may end when they are used; then the run counts as gone."""
START_S = 30.0
"""What the SuperLink may take to hand out a run's task"""
BEAT_S = 5.0
"""Between two heartbeats of the run"""
LATE_S = 10.0
"""After a call's time is over, its answer is still taken off the SuperLink"""
LONGEST_POLL_S = 0.25
"""The longest pause between two questions whether there are answers"""
APP = b"""
[project]
name = "fedit"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedit"
[tool.flwr.app.components]
serverapp = "fedit.engines.flower:none"
clientapp = "fedit.engines.flower:none"
[tool.flwr.app.config]
"""
"""What Flower calls an app: a description, no code. Nobody loads what it names."""


def register_sites(address: str, kit: Path) -> dict[str, int]:
    """Return the node of each site whose public key lies in the kit; the SuperLink learns those that it lacks."""
    nodes = {}
    with ControlHttpClient.from_server_address(
        address, False, (kit / "ca.pem").read_bytes(), [RuntimeVersionHttpInterceptor("flwr CLI")]
    ) as control:
        listed = control.ListNodes(control_pb2.ListNodesRequest()).nodes_info
        known = {bytes(node.public_key): node.node_id for node in listed}
        for file in sorted((kit / "sites").glob("*.pub")):
            key = file.read_bytes()
            if key not in known:
                request = control_pb2.RegisterNodeRequest(public_key=key, name=file.stem)
                known[key] = control.RegisterNode(request).node_id
            nodes[file.stem] = known[key]
    return nodes


def start_run(address: str, kit: Path) -> HttpGrid:
    """Start a run at the SuperLink and take its task, so that messages can be sent.

    Raises:
        EngineError: the task was not handed out.
    """
    trusted = (kit / "ca.pem").read_bytes()
    app, _ = build_fab_from_files({"pyproject.toml": APP})
    with ControlHttpClient.from_server_address(
        address, False, trusted, [RuntimeVersionHttpInterceptor("flwr CLI")]
    ) as control:
        for earlier, run in control.ListRuns(control_pb2.ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":  # of a courier that was killed: or its messages are kept
                control.StopRun(control_pb2.StopRunRequest(run_id=earlier))
        run_id = control.StartRun(control_pb2.StartRunRequest(fab=fab_to_proto(Fab("", app, {})))).run_id
    secret = (kit / "superexec.secret").read_bytes()
    signs = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=["/flwr.proto.Runtime/AcquireTask"])
    wanted = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    end = time.monotonic() + START_S
    with RuntimeHttpClient.from_server_address(
        address, False, trusted, [RuntimeVersionHttpInterceptor("SuperExec"), signs]
    ) as runtime:
        while (got := runtime.AcquireTask(wanted)).task.run_id != run_id:  # an earlier courier's are dropped
            if time.monotonic() > end:
                raise EngineError(f"it did not hand out the task of run {run_id}")
            time.sleep(0.1)
    grid = HttpGrid(address, False, trusted, token=got.token)
    grid._retry_invoker.max_tries = TRIES
    given = grid._runtime_client.PullTaskInput(runtime_pb2.PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    grid.set_run(run_from_proto(given.run))
    return grid


class ServerCourier:
    """One run at the SuperLink, whose messages are the calls to the sites."""

    def __init__(self, grid: HttpGrid, nodes: Mapping[str, int]) -> None:
        self._grid = grid
        self._nodes = nodes
        self._traffic: dict[str, dict[str, Any]] = {}
        self._client = grid._runtime_client
        self._awaited: dict[str, Future[tuple[message_pb2.Message, message_pb2.ObjectTree]]] = {}
        self._late: dict[str, float] = {}
        """Calls that nobody waits for any more, and how long their answers may come, to be forgotten"""
        self._changed = threading.Condition()
        self._is_asked = False
        """There is a call since the answers were last asked for"""
        self._online: tuple[float, set[int]] = 0.0, set()
        """When it was asked who is connected, and who was"""

    def run(self, path: Path, stopped: threading.Event) -> None:
        """Serve calls at the socket `path` until `stopped`, or until the run is gone."""
        over = threading.Event()

        def wait(over: threading.Event) -> None:
            while not (over.is_set() or stopped.wait(0.2)):
                pass

        for work in (self._keep_alive, self._collect, wait):
            threading.Thread(target=self._until_over, args=(work, over), daemon=True).start()
        serve(path, self.handle, over)

    def _until_over(self, work: Callable[[threading.Event], None], over: threading.Event) -> None:
        try:
            work(over)
        except Exception as error:  # noqa: BLE001 (whatever it is, a new run is started)
            log.warning("the run at the SuperLink is gone (%s: %s)", type(error).__name__, error)
        finally:
            over.set()

    def _keep_alive(self, over: threading.Event) -> None:
        while not over.wait(BEAT_S):
            if not self._client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest()).success:
                raise EngineError("it does not know the run")

    def _collect(self, over: threading.Event) -> None:
        """Tell whoever waits for an answer that it has come; they fetch it themselves, however long that takes."""
        pause, longest = POLL_S[0], LONGEST_POLL_S
        while not over.is_set():
            with self._changed:
                if self._changed.wait_for(lambda: self._is_asked, pause):
                    pause = POLL_S[0]
                self._is_asked = False
                self._late = {name: until for name, until in self._late.items() if until > time.monotonic()}
                names = [*self._awaited, *self._late]
            if not names:
                continue
            pulled = self._client.PullMessages(runtime_pb2.PullAppMessagesRequest(message_ids=names))
            for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                with self._changed:
                    future = self._awaited.pop(message.metadata.reply_to_message_id, None)
                    self._late.pop(message.metadata.reply_to_message_id, None)
                if future is None:
                    self._confirm(message.metadata.message_id)
                else:
                    future.set_result((message, tree))
            pause = POLL_S[0] if pulled.messages_list else min(longest, 1.3 * pause)

    def _fetch(self, announced: message_pb2.Message, tree: message_pb2.ObjectTree, timeout_s: float) -> Message:
        """Return an answer with its content."""
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._grid.node, self._grid.run.run_id)
        name, names = announced.metadata.message_id, [part.object_id for part in iterate_object_tree(tree)]
        try:
            if len(names) > MAX_OBJECTS:
                raise EngineError(f"an answer of {len(names)} parts")
            parts = pull_objects(names, pull, max_time=timeout_s, max_tries_per_object=None, backoff_cap=0.5)
        finally:
            self._confirm(name)
        message = inflate_object_from_contents(name, parts)
        if not isinstance(message, Message):
            raise EngineError("something else than a message")
        return message

    def _confirm(self, name: str) -> None:
        """Let the SuperLink forget a message, which it would keep as long as the run."""
        with suppress(Exception):
            self._client.ConfirmMessageReceived(
                message_pb2.ConfirmMessageReceivedRequest(
                    node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=name
                )
            )

    def _connected(self) -> dict[str, int]:
        """Return the nodes of the sites that are connected."""
        asked, online = self._online
        if time.monotonic() - asked > 1.0:
            online = set(self._grid.get_node_ids())
            self._online = time.monotonic(), online
        return {site: node for site, node in self._nodes.items() if node in online}

    def handle(self, header: Header, blob: bytes) -> tuple[Header, bytes]:
        """Return a site's answer to a call."""
        connected = self._connected()
        nothing = {"down": 0, "up": 0, "answered": None}
        if header["do"] == "sites":
            return {"sites": {site: self._traffic.get(site, nothing) for site in connected}}, b""
        site = header.pop("site")
        if site not in connected:
            return {"error": "the site is not connected"}, b""
        asked, timeout_s = json.dumps(header), header["timeout_s"]
        end = time.monotonic() + timeout_s
        message = Message(content_of(asked, blob), connected[site], "query", ttl=timeout_s + LATE_S)
        (name,) = self._grid.push_messages([message])
        if not name:
            return {"error": "the SuperLink does not take the message"}, b""
        future: Future[tuple[message_pb2.Message, message_pb2.ObjectTree]] = Future()
        with self._changed:
            self._awaited[name], self._is_asked = future, True
            self._changed.notify_all()
        try:
            reply = self._fetch(*future.result(timeout_s), max(1.0, end - time.monotonic()))
        except TimeoutError:
            with self._changed:
                self._awaited.pop(name, None)
                self._late[name] = end + LATE_S
            self._confirm(name)
            return {"error": "no answer from the site"}, b""
        if not reply.has_content():
            return {"error": f"no answer from the site ({reply.error.reason})"}, b""
        answer, content = read(reply.content)
        seen = self._traffic.setdefault(site, nothing)
        seen["down"] += len(asked) + len(blob)
        seen["up"] += len(answer) + len(content)
        seen["answered"] = time.time()
        return json.loads(answer), content


def serve_server(folder: Path, address: str, stopped: threading.Event) -> None:
    """Serve calls until `stopped`, with a new run whenever the last one is gone."""
    trouble = ""
    while not stopped.is_set():
        try:
            nodes = register_sites(address, folder / "kit")
            grid = start_run(address, folder / "kit")
            log.info("run %d for %s", grid.run.run_id, ", ".join(nodes))
            trouble = ""
            with closing(grid):
                ServerCourier(grid, nodes).run(folder / "courier.sock", stopped)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is tried again)
            if str(error) != trouble:
                log.warning("no run at the SuperLink (%s: %s); trying again", type(error).__name__, error)
                trouble = str(error)
        stopped.wait(1.0)


if __name__ == "__main__":
    serve_server(Path(sys.argv[1]), sys.argv[2], until_terminated())
