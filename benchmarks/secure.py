"""What a round of secure aggregation costs each party and the server, beside plain updates: CPU seconds and bytes.

python benchmarks/secure.py [--layers 32 --rank 16 | --numbers 192512] [--clients 10] [--lost 0] [--noise 1.0]

The updates are drawn beforehand. Seconds are CPU seconds of one process on one thread: a party's are the mean over
parties, which work at the same time where they are real. `--lost` parties vanish after they have shared their secrets,
so that the server makes their masks.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedit.interfaces import Adapter, ClientUpdate
from fedit.privacy import Draws
from fedit.secure.collector import Collector
from fedit.secure.encoding import Encoding, PartySum, decode
from fedit.secure.party import Party, Words

LAYER = 4 * (4096 + 4096) + 3 * (11008 + 4096)
"""Inputs and outputs of the linear layers in a block of a Llama of 7 billion parameters"""


class Clock:
    """CPU seconds by who works."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, who: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[who] += time.process_time() - started


def round_of(clients: int, numbers: int, lost: int, noise: float) -> dict[str, float]:
    names = [f"site-{number:03d}" for number in range(clients)]
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    public = {name: key.public_key().public_bytes_raw().hex() for name, key in identities.items()}
    parties = {name: Party(name, key, lambda n, k: public[n] == k, 2 / 3, 3, "run") for name, key in identities.items()}
    clip_norm = 1.0
    encoding = Encoding(clip_norm, 1, 2 * clip_norm * (clients + 1 + 20 * noise) / 2**32, "uniform", noise, False)
    shape = Adapter({"layer.lora_B.weight": torch.randn(numbers) / (2 * numbers**0.5)}, 1, 1.0)
    update = ClientUpdate("one", shape, 1, 1, 0.0, 1)
    collector, clock, traffic = (
        Collector("benchmark", names, 2 / 3, numbers, "run", "task"),
        Clock(),
        {"up": 0, "down": 0},
    )

    def ask(requests: dict[str, Words], absent: int = 0) -> dict[str, Words]:
        answers = {}
        for name in list(requests)[absent:]:
            with clock.of("party"):
                answers[name] = parties[name].answer(requests[name])
            traffic["down"] += len(json.dumps(requests[name]))
            traffic["up"] += len(json.dumps(answers[name]))
        return answers

    with clock.of("whole"):
        keys = ask(collector.begin())
        with clock.of("server"):
            requests = collector.keys(keys)
        shares = ask(requests)
        with clock.of("server"):
            requests = collector.shares(shares)
        for name in names[lost:]:
            with clock.of("encoding"):
                total = PartySum(encoding, {n: tensor.shape for n, tensor in shape.tensors.items()})
                total.add(update)
            with clock.of("party"):
                payload = parties[name].masked(requests[name], total, "task", lambda size: Draws(None).uniform(size))
            traffic["down"] += len(json.dumps(requests[name]))
            traffic["up"] += len(payload)
            with clock.of("server"):
                collector.add(name, payload)
        confirmed = ask(collector.confirm())
        told = ask(collector.unmask(confirmed))
        with clock.of("server"):
            counts, sums = collector.total(told)
            mean = decode(encoding, [f"c{n}" for n in range(clients - lost)], counts, sums, shape)
    error = max(
        float((mean.update.tensors[name] - tensor).abs().max()) for name, tensor in update.update.tensors.items()
    )
    return {
        "party_cpu_s": clock.seconds["party"] / clients,
        "encoding_cpu_s": clock.seconds["encoding"] / clients,
        "server_cpu_s": clock.seconds["server"],
        "bytes_up": traffic["up"] / clients,
        "bytes_down_of_protocol": traffic["down"] / clients,
        "bytes_up_plain": 4 * numbers,
        "largest_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--numbers", type=int, help="of an update, in place of --layers and --rank")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--lost", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.0, help="multiplier; its shares are drawn from the system")
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers = given.numbers or given.layers * LAYER * given.rank
    results = [round_of(given.clients, numbers, given.lost, given.noise) for _ in range(given.repetitions)]
    medians = {key: float(np.median([result[key] for result in results])) for key in results[0]}
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"clients": given.clients, "numbers": numbers, **medians, "peak_memory": memory}, indent=1))


if __name__ == "__main__":
    main()
