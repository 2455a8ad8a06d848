"""What each aggregation rule costs the server: seconds and memory for adapters of a 7-billion-parameter Llama, rank 16.

python benchmarks/aggregation.py [--layers 32] [--clients 10] [--rules fedit,flora]

The updates are drawn one by one while the rule asks for them, so that the memory is what the rule holds. Time spent in
drawing is not counted. Each layer is aggregated by itself, so that fewer of them say what all 32 cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator

import numpy as np
import torch

from fedit.config import load_plugins
from fedit.interfaces import Adapter, Aggregation, ClientUpdate, plugins

SHAPES = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
SHAPES |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
RANK = 16


def random_adapter(num_layers: int) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(num_layers):
        for name, (num_outputs, num_inputs) in SHAPES.items():
            tensors[f"{layer}.{name}.lora_A.weight"] = torch.randn(RANK, num_inputs, generator=generator) / 64
            tensors[f"{layer}.{name}.lora_B.weight"] = torch.randn(num_outputs, RANK, generator=generator) / 64
    return Adapter(tensors, RANK, 2.0 * RANK)


class Updates:
    """Draws the updates of a round, and knows how long that took."""

    def __init__(self, rule: Aggregation, adapter: Adapter, num_clients: int) -> None:
        self._sent = adapter.only(rule.shared(0))
        self._adapter = adapter
        self._num_clients = num_clients
        self.seconds = 0.0

    def __iter__(self) -> Iterator[ClientUpdate]:
        generator = torch.Generator().manual_seed(1)
        for client in range(self._num_clients):
            started = time.perf_counter()
            steps = {n: torch.randn(t.shape, generator=generator).mul_(1e-3) for n, t in self._sent.items()}
            update = Adapter(steps, self._adapter.rank, self._adapter.lora_alpha)
            self.seconds += time.perf_counter() - started
            yield ClientUpdate(str(client), update, 100, 10_000, 1.0, 10)


def measure(name: str, num_layers: int, num_clients: int) -> dict[str, float]:
    """Return seconds, and bytes of memory beyond those of the adapter (in a process of its own)."""
    load_plugins()
    rule = plugins("aggregation")[name]()
    assert isinstance(rule, Aggregation)

    def weight(module: str) -> torch.Tensor:
        return torch.randn(SHAPES[module.rpartition(".")[2]])

    adapter = rule.initial(random_adapter(num_layers), weight, np.random.default_rng(0))
    updates = Updates(rule, adapter, num_clients)
    next(iter(updates))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    updates.seconds, started = 0.0, time.perf_counter()
    result = rule.aggregate(adapter, updates, np.random.default_rng(0))
    seconds = time.perf_counter() - started - updates.seconds
    used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    update_bytes = sum(4 * tensor.numel() for tensor in adapter.only(rule.shared(0)).values())
    return {"seconds": seconds, "bytes": used, "update_bytes": update_bytes, **result.metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rules", default="")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    load_plugins()
    context = multiprocessing.get_context("spawn")
    for name in arguments.rules.split(",") if arguments.rules else sorted(plugins("aggregation")):
        with context.Pool(1) as pool:
            measured = pool.apply(measure, (name, arguments.layers, arguments.clients))
        if arguments.json:
            print(json.dumps({"rule": name, "clients": arguments.clients, **measured}), flush=True)
        else:
            held = measured["bytes"] / measured["update_bytes"]
            print(
                f"{name:14} {measured['seconds']:8.2f} s {measured['bytes'] / 1e9:6.2f} GB = {held:6.1f} updates, "
                f"aggregation loss {measured.get('aggregation_loss', float('nan')):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
