"""What real sites cost: seconds of a round and peak memory of every process, by the size of the adapter.

    python benchmarks/federation.py --model MODEL --data ROWS [--ranks 124,2480] [--sites 1] [--upload bf16]
                                   [--download bf16] [--engine flower] [--optimizer sgd]

One server and its sites on this machine, behind NVIDIA FLARE or Flower with mutual TLS; two rounds of one step of one
row, so that nearly all is transport. The same rounds in simulation stand beside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from fedit.engines.courier import Courier

FEDIT = [sys.executable, "-m", "fedit.cli"]
RECIPE = """
rounds = 2
model = {{ path = "{model}" }}
adapter = {{ rank = {rank}, alpha = {rank} }}
data = {{ path = "{data}", max_length = 128 }}
partition = {{ {partition} }}
client = {{ local_steps = 1, batch_size = 1, optimizer = "{optimizer}" }}
upload = {{ quantizer = "{upload}" }}
download = {{ quantizer = "{download}" }}
evaluation = {{ every = 0, baselines = false, max_new_tokens = 0 }}
engine = {{ slots = 1, join_s = 600 }}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a file of rows; every site has all of them")
    parser.add_argument("--ranks", default="124,2480,12400")
    parser.add_argument("--sites", type=int, default=1)
    parser.add_argument("--upload", default="fp32")
    parser.add_argument("--download", default="fp32")
    parser.add_argument("--optimizer", default="adamw", help="sgd needs two adapters less of memory at the site")
    parser.add_argument("--port", type=int, default=18077)
    parser.add_argument("--engine", choices=PROCESSES, default="nvflare")
    arguments = parser.parse_args()
    names = [f"site{index}" for index in range(arguments.sites)]
    with tempfile.TemporaryDirectory(prefix="fedit-") as temporary:
        folder = Path(temporary)
        ranks = list(map(int, arguments.ranks.split(",")))
        simulated = {rank: seconds_simulated(folder, arguments, rank) for rank in ranks}
        where = ["--port", arguments.port, "--engine", arguments.engine]
        run([*FEDIT, "federation", "init", folder / "f", "--sites", ",".join(names), *where])
        server = folder / "f" / "server"
        processes = [start(folder, "serve", "federation", "serve", server)]
        for name in names:
            site = folder / "f" / "sites" / name
            (site / "site.toml").write_text(
                f'name = "{name}"\ndata = "{arguments.data}"\nengine = "{arguments.engine}"\n'
            )
            processes.append(start(folder, name, "site", "start", site))
        try:
            while len(Courier(server).sites()) < len(names):
                time.sleep(0.5)
            columns = COLUMNS if arguments.engine == "flower" else COLUMNS[:-1]
            print(f"| {' | '.join(columns)} |")
            print("|---" * len(columns) + "|", flush=True)
            for rank in ranks:
                measure(folder, server, arguments, rank, simulated[rank])
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()


def seconds_simulated(folder: Path, arguments: argparse.Namespace, rank: int) -> float:
    partition = f'name = "iid", num_clients = {arguments.sites}'
    return run_recipe(folder, "simulation", arguments, rank, partition, "run")["seconds"]


def measure(folder: Path, server: Path, arguments: argparse.Namespace, rank: int, simulated: float) -> None:
    command = ("federation", "run", "--server", server)
    timing = run_recipe(folder, "federation", arguments, rank, 'name = "natural"', *command)
    peaks = [timing["peak_memory_bytes"]]
    peaks += [peak_memory(folder, words) for words in PROCESSES[arguments.engine].values()]
    adapter = timing["bytes_up"] / arguments.sites
    cells = [str(rank), f"{adapter / 1e6:.1f} MB", f"{timing['seconds']:.1f} s", f"{simulated:.1f} s"]
    print(f"| {' | '.join([*cells, *(f'{peak / 1e9:.2f} GB' for peak in peaks)])} |", flush=True)


def run_recipe(
    folder: Path, kind: str, arguments: argparse.Namespace, rank: int, partition: str, *command: object
) -> dict[str, float]:
    """Run two rounds; return what the second took, and the bytes that the first sent."""
    recipe, out = folder / f"{kind}-{rank}.toml", folder / f"{kind}-{rank}"
    recipe.write_text(RECIPE.format(partition=partition, rank=rank, **vars(arguments)))
    run([*FEDIT, *command, recipe, "--out", out])
    timing = json.loads((out / "timings.jsonl").read_text().splitlines()[1])
    record = json.loads((out / "rounds.jsonl").read_text().splitlines()[0])
    shutil.rmtree(out)
    return {**timing, "bytes_up": record["bytes_up"]}


COLUMNS = ["rank", "adapter", "round 2", "in simulation", "server", "its courier", "worker", "its courier", "SuperLink"]
PROCESSES = {
    "nvflare": {"server": ("runner_process",), "worker": ("fedit.engines.site",), "site": ("worker_process",)},
    "flower": {
        "server": ("fedit.engines.flower.server",),
        "worker": ("fedit.engines.site",),
        "site": ("fedit.engines.flower.site",),
        "superlink": ("flower_superlink",),
    },
}
"""What the command of each process names"""


def peak_memory(folder: Path, words: tuple[str, ...]) -> int:
    """Return the largest resident memory, in bytes, that any process had whose command names the folder and `words`."""
    peaks = [0]
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and all(word in line for word in words):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peaks.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    return max(peaks)


def start(folder: Path, name: str, *arguments: object) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as output:
        return subprocess.Popen([*FEDIT, *map(str, arguments)], stdout=output, stderr=output, env=os.environ)


def run(command: list[object]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr}\nfailed: {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()
