"""What a federated round costs as clients, tokens or their unevenness grow.

    python benchmarks/scaling.py clients [--rows 10000]     # C: the same rows at 10, 100 and 1,000 clients
    python benchmarks/scaling.py tokens                     # D: 10 clients with ever more rows, and a straight line
    python benchmarks/scaling.py uneven                     # E: rows spread by a Dirichlet(0.1) against evenly

A round is what a run does: every client tuned (one pass), updates taken back, aggregated, the loss of aggregation
measured, the server's step. Rows are random tokens with the lengths of instruction data. All cases alternate in one
process, once unmeasured, then `--repetitions` times; medians, CPU seconds beside wall seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedit.base import load_base, load_tokenizer, resolve_device
from fedit.bench import Workload, load_shape, make_clients
from fedit.config import RunConfig, load_config
from fedit.engines.client_store import ClientStore
from fedit.engines.simulation import Simulation
from fedit.interfaces import EncodedExample, derive_rng
from fedit.memory import fit_memory
from fedit.model import StackedModel
from fedit.server import ServerState, run_round

Clients = Mapping[str, Sequence[EncodedExample]]


def main() -> None:
    arguments = parse_arguments()
    config = load_config(
        "default",
        [
            f"model.path={arguments.model}",
            "adapter.rank=8",
            "client.local_steps=none",
            "client.local_epochs=1",
            "client.moments=reset",
            f"client.batch_size={arguments.batch_size}",
            f"engine.device={arguments.device}",
        ],
    )
    device = resolve_device(config.engine.device)
    shape = arguments.shape
    base = load_shape(shape, config.model.dtype, device) if shape else load_base(config.model, device)
    model = StackedModel(base, load_tokenizer("builtin:cria" if shape else config.model.path), config.adapter)
    rows = make_clients(Workload(clients=1, rows=arguments.rows, length=arguments.length), base.config.vocab_size)[0]
    cases = {"clients": by_clients, "tokens": by_tokens, "uneven": by_unevenness}[arguments.what](rows)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(arguments.repetitions + 1):
        for name, clients in cases.items():
            seconds[name].append(measure(config, model, clients))
    report(cases, {name: [statistics.median(x) for x in zip(*runs[1:], strict=True)] for name, runs in seconds.items()})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clients", "tokens", "uneven"))
    parser.add_argument("--model", default="builtin:cria")
    parser.add_argument("--shape", help="random weights of a shape of `fedit bench` in place of the model's")
    parser.add_argument("--rows", type=int, default=10000, help="of all clients together")
    parser.add_argument("--length", type=int, default=40, help="median tokens of a row")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def by_clients(rows: Sequence[EncodedExample]) -> dict[str, Clients]:
    return {f"{count} clients": share(rows, np.full(count, 1 / count)) for count in (10, 100, 1000)}


def by_tokens(rows: Sequence[EncodedExample]) -> dict[str, Clients]:
    tenth = np.full(10, 0.1)
    return {f"{part:.0%} of the rows": share(rows[: round(part * len(rows))], tenth) for part in (0.25, 0.5, 0.75, 1)}


def by_unevenness(rows: Sequence[EncodedExample]) -> dict[str, Clients]:
    shares = derive_rng(0, "shares").dirichlet(np.full(50, 0.1))
    return {"even": share(rows, np.full(50, 1 / 50)), "Dirichlet(0.1)": share(rows, shares)}


def share(rows: Sequence[EncodedExample], shares: np.ndarray) -> Clients:
    """Give every client its share of `rows`, one row at least where there are enough."""
    counts = np.maximum(1, np.floor(shares * (len(rows) - len(shares)) + 1e-9).astype(int) + 1)
    counts[np.argmax(counts)] -= counts.sum() - len(rows)
    ends = np.cumsum(counts)
    return {str(client): rows[end - count : end] for client, (end, count) in enumerate(zip(ends, counts, strict=True))}


def measure(config: RunConfig, model: StackedModel, clients: Clients) -> tuple[float, float]:
    """Return the wall and CPU seconds of one round."""
    initial = model.fresh_adapter(derive_rng(0, "adapter"))
    with tempfile.TemporaryDirectory() as folder:
        fit_memory(model, config.engine, config.client, list(clients.values()))
        engine = Simulation(config, model, clients, ClientStore(Path(folder)))
        wall, cpu = time.perf_counter(), time.process_time()
        run_round(config, engine, ServerState(0, initial))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - wall, time.process_time() - cpu


def report(cases: Mapping[str, Clients], medians: Mapping[str, Sequence[float]]) -> None:
    tokens = {name: sum(len(row) for rows in clients.values() for row in rows) for name, clients in cases.items()}
    first = next(iter(cases))
    print(f"| Case | Clients | Rows of a client | Tokens | Seconds | CPU s | Tokens per CPU s | Ratio |\n|{'---|' * 8}")
    for name, clients in cases.items():
        sizes = [len(rows) for rows in clients.values()]
        rate = {case: tokens[case] / medians[case][1] for case in (first, name)}
        print(
            f"| {name} | {len(clients):,} | {min(sizes):,} to {max(sizes):,} | {tokens[name]:,} "
            f"| {medians[name][0]:.1f} | {medians[name][1]:.1f} | {rate[name]:,.0f} | {rate[name] / rate[first]:.2f} |"
        )
    if len(set(tokens.values())) > 2:
        x = np.array([tokens[name] for name in cases])
        y = np.array([medians[name][1] for name in cases])
        slope, constant = np.polyfit(x, y, 1)
        residual = np.abs(y - slope * x - constant).max() / y.max()
        print(f"\nCPU seconds = {constant:.2f} + {1e6 * slope:.1f} per million tokens; off by {residual:.1%} at most")


if __name__ == "__main__":
    main()
