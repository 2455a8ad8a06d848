"""Rounds of fedit's simulation against the same rounds on Flower's, which runs each client on its own with plain PEFT.

    python -m venv flower && flower/bin/pip install "flwr[simulation]==1.42.0" torch==2.13.0 "transformers>=5.23" peft
    python benchmarks/versus_flower.py --python flower/bin/python --model FOLDER --data DATA [--clients 10 --rows 24]

Flower is no dependency of fedit: its side (`flower_peft.py`) runs in an environment of its own. Both sides train the
same rows, one pass a round, with the same LoRA, batch size, AdamW and clip, in turn, `--repetitions` times. For each,
the whole tree of its processes is watched: wall and CPU seconds from the end of the first round to the end of the last,
seconds until the first round has ended, and the largest sum of proportional set sizes (memory, shared pages once).
Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from versus_trainer import load_rows

MARKER = "FEDIT_BENCHMARK_RUN"
"""An environment variable that all processes of a side inherit, Ray's daemons too."""
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.only:
            run_fedit(arguments)
            return
        tokens = write_rows(arguments, folder)
        results: dict[str, list[dict[str, float]]] = {"fedit": [], "Flower": []}
        for repetition in range(arguments.repetitions):
            for side, runs in results.items():
                runs.append(measure(side, arguments, folder))
                print(f"repetition {repetition + 1} {side}: {runs[-1]}", file=sys.stderr, flush=True)
    print(
        f"{arguments.clients} clients x {arguments.rows} rows, {tokens:,} tokens a round\n\n"
        "| | First round done after, s | Seconds a round | CPU s a round | Tokens/s | Peak memory, MB |\n"
        f"|{'---|' * 6}"
    )
    for side, runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {side} | {median['first']:.1f} | {median['seconds']:.2f} | {median['cpu_seconds']:.2f} "
            f"| {tokens / median['seconds']:,.0f} | {median['memory_bytes'] / 1e6:,.0f} |"
        )
    for key, what in (("seconds", "seconds"), ("cpu_seconds", "CPU seconds"), ("memory_bytes", "memory")):
        pairs = zip(results["fedit"], results["Flower"], strict=True)
        print(f"\nFlower / fedit, {what}: {statistics.median(theirs[key] / ours[key] for ours, theirs in pairs):.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has Flower")
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--data", default="builtin:pasture")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=24, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="of a Flower client; as many run as there are cores")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    return parser.parse_args()


def write_rows(arguments: argparse.Namespace, folder: Path) -> int:
    """Write what Flower's side needs; return the tokens of a round."""
    import numpy as np

    from fedit.base import resolve_path

    config, clients = load_rows(arguments)
    rows = [row for own in clients.values() for row in own]
    np.savez(
        folder / "rows.npz",
        input_ids=np.concatenate([row.input_ids for row in rows]),
        supervised=np.concatenate([row.supervised for row in rows]),
        ends=np.cumsum([len(row) for row in rows]),
        clients=np.repeat(np.arange(len(clients)), [len(own) for own in clients.values()]),
    )
    setting = {
        **{name: getattr(arguments, name) for name in ("clients", "rounds", "batch_size", "rank", "dtype", "threads")},
        "model": str(Path(resolve_path(arguments.model)).resolve()),
        "learning_rate": config.client.learning_rate,
        "clip_norm": config.client.clip_norm,
    }
    (folder / "setting.json").write_text(json.dumps(setting), encoding="utf-8")
    return sum(len(row) for row in rows)


def run_fedit(arguments: argparse.Namespace) -> None:
    """Train the rounds, noting the end of each in the folder that ``--only`` names."""
    from fedit.base import load_base, load_tokenizer, resolve_device
    from fedit.engines.client_store import ClientStore
    from fedit.engines.simulation import Simulation
    from fedit.interfaces import derive_rng
    from fedit.memory import fit_memory
    from fedit.model import StackedModel
    from fedit.server import ServerState, train

    folder = Path(arguments.only)

    def note_end_of_round(*_: object) -> None:
        with (folder / "rounds.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")

    config, clients = load_rows(arguments)
    model = StackedModel(
        load_base(config.model, resolve_device("cpu")), load_tokenizer(config.model.path), config.adapter
    )
    fit_memory(model, config.engine, config.client, list(clients.values()))
    initial = ServerState(0, model.fresh_adapter(derive_rng(0, "adapter")))
    note_end_of_round()
    train(config, Simulation(config, model, clients, ClientStore(folder / "store")), initial, note_end_of_round)


# -------------------------------------------------------------------------------------------------------- measuring


def measure(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    ends = folder / "rounds.txt"
    ends.unlink(missing_ok=True)
    here = Path(__file__).parent
    marker = f"{os.getpid()}-{time.time()}"
    environment = os.environ | {MARKER: marker}
    command = [sys.executable, *sys.argv, "--only", str(folder)]
    if side == "Flower":
        command = [arguments.python, str(here / "flower_peft.py")]
        environment |= {"PYTHONPATH": str(here), "FLOWER_PEFT_FOLDER": str(folder)}
        environment |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    started = time.time()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    samples: list[tuple[float, float, float]] = []
    watcher = threading.Thread(target=watch, args=(process, marker, samples))
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    times = [float(line) for line in ends.read_text(encoding="utf-8").split()] if ends.exists() else []
    if process.returncode or len(times) != arguments.rounds + 1:
        raise SystemExit(f"{side} failed with {process.returncode} after {len(times)} marks:\n{output[-4000:]}")
    _, first, *_, last = times  # the first mark stands before the first round
    at_first, at_last = (cpu_at(samples, moment) for moment in (first, last))
    return {
        "first": first - started,
        "seconds": (last - first) / (arguments.rounds - 1),
        "cpu_seconds": (at_last - at_first) / (arguments.rounds - 1),
        "memory_bytes": max(memory for _, _, memory in samples),
    }


def watch(process: subprocess.Popen, marker: str, samples: list[tuple[float, float, float]]) -> None:
    """Note the time, the CPU seconds so far and the memory of all processes with the marker, until it has ended."""
    seconds_of: dict[str, float] = {}
    while process.poll() is None:
        memory = 0.0
        for folder in Path("/proc").iterdir():
            # Processes end while they are looked at.
            with contextlib.suppress(OSError, ValueError, IndexError):
                if not folder.name.isdigit() or f"{MARKER}={marker}".encode() not in (folder / "environ").read_bytes():
                    continue
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                seconds_of[folder.name] = (int(fields[11]) + int(fields[12])) / TICKS
                lines = (folder / "smaps_rollup").read_text().splitlines()
                memory += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        samples.append((time.time(), sum(seconds_of.values()), memory))
        time.sleep(0.2)


def cpu_at(samples: list[tuple[float, float, float]], moment: float) -> float:
    import numpy as np

    return float(np.interp(moment, [when for when, _, _ in samples], [cpu for _, cpu, _ in samples]))


if __name__ == "__main__":
    main()
