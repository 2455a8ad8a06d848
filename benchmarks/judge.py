"""What the judge's client costs: requests per second against a server on this machine, beside what the server can do.

    python benchmarks/judge.py [--requests 2000] [--concurrency 8,64] [--latency 0,0.5]

The server is a process of its own that answers every chat completion with the same review, after a pause. "Server
alone" is a client of bare sockets, which neither builds nor reads JSON; "client" is `ServerJudge`; "with its file"
keeps every reply on the disk, as `fedit judge` does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from fedit.judge.client import ServerJudge
from fedit.judge.replies import Replies, Reply, Request

REVIEW = "8 7\n" + "The first answer is more specific, and both are correct. " * 10
COMPLETION = {
    "id": "completion",
    "object": "chat.completion",
    "created": 0,
    "model": "judge",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": REVIEW}}],
    "usage": {"prompt_tokens": 700, "completion_tokens": 130, "total_tokens": 830},
}
PROMPT = "A question, and two answers of a few paragraphs each. " * 60


def serve(latency_s: float, ready: Connection) -> None:
    """Answer for ever."""
    body = json.dumps(COMPLETION).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(content_length(asked))
                if latency_s:
                    await asyncio.sleep(latency_s)
                writer.write(head + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def content_length(head: bytes) -> int:
    (line,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(line.partition(b":")[2])


async def ask_by_sockets(port: int, num_requests: int, concurrency: int) -> None:
    body = json.dumps({"model": "judge", "messages": [{"role": "user", "content": PROMPT}]}).encode()
    request = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    waiting = iter(range(num_requests))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in waiting:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(content_length(head))
        writer.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))


def rate(num_requests: int, action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return num_requests / (time.perf_counter() - started)


def measure(num_requests: int, concurrency: int, latency_s: float) -> None:
    receive, send = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(latency_s, send), daemon=True)
    server.start()
    port = receive.recv()
    judge = ServerJudge("judge", f"http://127.0.0.1:{port}/v1", concurrency=concurrency)
    requests = [Request([{"role": "user", "content": f"{PROMPT}{number}"}]) for number in range(num_requests)]
    with tempfile.TemporaryDirectory() as folder:
        replies = Replies(Path(folder) / "replies.jsonl", judge.model, judge.parameters)

        def keep(request: Request, reply: Reply | str) -> None:
            assert isinstance(reply, Reply)
            replies.add(request, reply)

        rates = [
            rate(num_requests, lambda: asyncio.run(ask_by_sockets(port, num_requests, concurrency))),
            rate(num_requests, lambda: judge.ask(requests, lambda request, reply: None)),
            rate(num_requests, lambda: judge.ask(requests, keep)),
        ]
    server.terminate()
    server.join()
    most = f"{concurrency / latency_s:,.0f}" if latency_s else "no"
    print(f"{latency_s:>9.2f} {concurrency:>11} {most:>9}" + "".join(f"{each:>14,.0f}" for each in rates))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", default="8,64")
    parser.add_argument("--latency", default="0,0.5")
    arguments = parser.parse_args()
    print("Requests per second")
    print("latency s concurrency    bound  server alone        client with its file")
    for latency_s in map(float, arguments.latency.split(",")):
        for concurrency in map(int, arguments.concurrency.split(",")):
            num_requests = arguments.requests if not latency_s else min(arguments.requests, 20 * concurrency)
            measure(num_requests, concurrency, latency_s)


if __name__ == "__main__":
    main()
