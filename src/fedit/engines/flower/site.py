"""The courier at a site: it takes calls from the SuperLink, by Flower's Fleet API, and hands them to the worker.

python -m fedit.engines.flower.site FOLDER NAME
"""

from __future__ import annotations

import json
import logging
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedit.engines.channel import ChannelError, Header, call
from fedit.engines.flower.calls import HEARTBEAT_S, MAX_OBJECTS, POLL_S, content_of, read, until_terminated
from fedit.errors import EngineError

if TYPE_CHECKING:
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

log = logging.getLogger(__name__)

RETRY_S = 1.0, 15.0
"""First and longest pause between two attempts to connect"""
RETRY_AFTER_S = 0.1, 1.0
"""Pauses between attempts of one request"""
NOBODY_THERE = 502, 503, 504
"""nginx's answers while the SuperLink is away"""
MAX_OBJECT = 65 << 20
"""Bytes of an answer of the server's that a site reads"""
MAX_CALLS = 16
"""At the same time"""


class Retry:
    """Makes a request again, a few times, where nothing came of it: a connection may end just when it is used."""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send a request as it is; its signature holds for minutes."""
        for pause in RETRY_AFTER_S:
            with suppress(httpx.TransportError):
                response = call_next(context)
                if response.status_code not in NOBODY_THERE:
                    return response
            time.sleep(pause)
        return call_next(context)


class SiteCourier:
    """One connection to the SuperLink."""

    def __init__(self, folder: Path, name: str) -> None:
        self._worker = folder / "worker.sock"
        kit = folder / "kit"
        server = json.loads((kit / "server.json").read_text(encoding="utf-8"))
        host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
        self.address = f"{host}:{server['port']}"
        key = load_pem_private_key((kit / f"{name}.key").read_bytes(), None)
        assert isinstance(key, EllipticCurvePrivateKey)
        self._public_key = public_key_to_bytes(key.public_key())
        trusted = ssl.create_default_context(cafile=str(kit / "ca.pem"))
        trusted.load_cert_chain(kit / f"{name}.pem", kit / f"{name}.key")
        signs = NodeAuthHttpInterceptor(key, key.public_key())
        self._client = FleetHttpClient(
            f"https://{self.address}",
            interceptors=[RuntimeVersionHttpInterceptor("SuperNode"), signs, Retry()],
            verify=trusted,
        )
        http = self._client._client
        http.follow_redirects = False
        http.headers["accept-encoding"] = "identity"
        http.event_hooks["response"] = [_refuse_large]
        self._node = node_pb2.Node()
        self._calls = ThreadPoolExecutor(MAX_CALLS)

    def run(self, stopped: threading.Event) -> None:
        """Answer calls until `stopped`, or until the SuperLink is gone or knows this site no more.

        Raises:
            httpx.HTTPError: it cannot be reached, or refuses this site.
        """
        activate = fleet_pb2.ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_S)
        self._node = node_pb2.Node(node_id=self._client.ActivateNode(activate).node_id)
        log.info("connected to %s", self.address)
        lost = threading.Event()
        threading.Thread(target=self._keep_alive, args=(lost,), daemon=True).start()
        pause, longest = POLL_S
        try:
            while not (stopped.is_set() or lost.is_set()):
                pulled = self._client.PullMessages(fleet_pb2.PullMessagesRequest(node=self._node))
                for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                    self._calls.submit(self._answer, message, tree)
                    pause = POLL_S[0]
                stopped.wait(pause)
                pause = min(longest, 1.3 * pause)
        finally:
            lost.set()
            with suppress(Exception):  # or the SuperLink takes no other connection until it counts this one as gone
                self._client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self._node.node_id))

    def close(self) -> None:
        """Give up calls that were not answered yet."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _keep_alive(self, lost: threading.Event) -> None:
        beat = heartbeat_pb2.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        try:
            while not lost.wait(HEARTBEAT_S / 3):
                with suppress(httpx.TransportError):  # whoever pulls messages notices it, too
                    try:
                        known = self._client.SendNodeHeartbeat(beat).success
                    except httpx.HTTPStatusError as error:
                        known = error.response.status_code in NOBODY_THERE
                    if not known:
                        log.warning("the server does not know this site any more")
                        return
        finally:
            lost.set()

    def _answer(self, proto: message_pb2.Message, tree: message_pb2.ObjectTree) -> None:
        try:
            message = self._pull(message_from_proto(proto), tree)
            header, blob = read(message.content)
            self._push(message, *self._ask(json.loads(header), blob))
        except Exception:
            log.exception("a call was not answered")

    def _ask(self, asked: Header, blob: bytes) -> tuple[str, bytes]:
        try:
            answer, reply = call(self._worker, asked, blob, asked["timeout_s"])
        except ChannelError:
            answer, reply = {"error": "the worker at the site does not answer"}, b""
        return json.dumps(answer), reply

    def _pull(self, announced: Message, tree: message_pb2.ObjectTree) -> Message:
        """Return a message with its content."""
        run, name = announced.metadata.run_id, announced.metadata.message_id
        names = [part.object_id for part in iterate_object_tree(tree)]
        if len(names) > MAX_OBJECTS:
            raise EngineError(f"a message of {len(names)} parts")
        parts = {part: self._pull_object(run, part) for part in names}
        received = message_pb2.ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=name)
        self._client.ConfirmMessageReceived(received)
        message = inflate_object_from_contents(name, parts)
        if not isinstance(message, Message):
            raise EngineError("something else than a message")
        message.metadata.__dict__["_message_id"] = name
        return message

    def _pull_object(self, run: int, name: str) -> bytes:
        request = message_pb2.PullObjectRequest(node=self._node, run_id=run, object_id=name)
        end = time.monotonic() + 30
        while not (got := self._client.PullObject(request)).object_available:
            if not got.object_found or time.monotonic() > end:
                raise EngineError("a message whose content is not there")
            time.sleep(POLL_S[0])
        return got.object_content

    def _push(self, message: Message, header: str, blob: bytes) -> None:
        """Send the answer to a message."""
        reply = Message(content_of(header, blob), reply_to=message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            parts = get_all_nested_objects(reply)
            announced = fleet_pb2.PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            taken = self._client.PushMessages(announced)
            for name in taken.objects_to_push:
                part = message_pb2.PushObjectRequest(
                    node=self._node,
                    run_id=message.metadata.run_id,
                    session_id=taken.session_id,
                    object_id=name,
                    object_content=parts[name].deflate(),
                )
                self._client.PushObject(part)


def _refuse_large(response: httpx.Response) -> None:
    """Refuse an answer whose length is not told, or that is longer than any message of ours."""
    size = response.headers.get("content-length")
    if size is None or int(size) > MAX_OBJECT or "content-encoding" in response.headers:
        raise httpx.DecodingError(f"an answer of {size} bytes", request=response.request)


def serve_site(folder: Path, name: str, stopped: threading.Event) -> None:
    """Take part until `stopped`, connecting again, with growing pauses, whenever the server is not there."""
    pause, longest = RETRY_S
    trouble = ""
    while not stopped.is_set():
        began = time.monotonic()
        with closing(SiteCourier(folder, name)) as courier:
            try:
                courier.run(stopped)
                what = "the connection was lost"
            except httpx.HTTPError as error:
                what = _told(error)
        if stopped.is_set():
            return
        if time.monotonic() - began > longest:
            pause, trouble = RETRY_S[0], ""
        if what != trouble:
            log.warning("not connected to the server at %s: %s; trying again until it is", courier.address, what)
            trouble = what
        stopped.wait(pause)
        pause = min(longest, 1.5 * pause)


def _told(error: httpx.HTTPError) -> str:
    """Return what went wrong, in words for the site's operator."""
    if not isinstance(error, httpx.HTTPStatusError):
        return f"{type(error).__name__}: {error}"
    response = error.response
    detail = response.text.strip() if response.headers.get("content-type", "").startswith("text/plain") else ""
    if response.headers.get("content-type", "").startswith("application/json"):
        detail = str(response.json().get("detail", ""))
    why = {
        401: "the clocks of the two differ (5 s ahead or 5 minutes behind are too much), or the server has another key",
        412: "it does not know this site yet, or counts an earlier connection as alive, for half a minute at most",
        502: "its SuperLink is starting",
    }
    if response.status_code in why:
        detail = why[response.status_code]
    return f"it answers {response.status_code} {response.reason_phrase} {detail[:200]}".rstrip()


if __name__ == "__main__":
    serve_site(Path(sys.argv[1]), sys.argv[2], until_terminated())
