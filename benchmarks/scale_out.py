"""One recipe on more nodes: seconds of a round in simulation, and with the same clients on 1, 2 and 4 nodes.

    python benchmarks/scale_out.py --model MODEL --clients FOLDER [--nodes 1,2,4] [--engine flower] [--threads 1]

FOLDER has a file of rows for each client. All nodes are processes on this machine, each with THREADS threads, behind
the engine with mutual TLS; each tunes its clients together, as the simulation does with all of them. The rounds are the
same ones, so that the difference is transport, and cores that nodes share. Medians over the rounds after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from federation import FEDIT, run, start

from fedit.engines.courier import Courier

RECIPE = """
rounds = {rounds}
model = {{ path = "{model}" }}
adapter = {{ rank = 8, alpha = 16 }}
data = {{ path = "{clients}", test_path = "{test}", max_length = 256 }}
partition = {{ name = "natural" }}
client = {{ local_steps = {steps}, batch_size = 4 }}
aggregation = {{ name = "fedit", weighting = "uniform" }}
evaluation = {{ every = 0, baselines = false, max_new_tokens = 0 }}
engine = {{ join_s = 600 }}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", required=True, help="a folder with a file of rows for each client")
    parser.add_argument("--test", required=True, help="held-out rows")
    parser.add_argument("--nodes", default="1,2,4")
    parser.add_argument("--engine", choices=["nvflare", "flower"], default="nvflare")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--port", type=int, default=18079)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    files = sorted(Path(arguments.clients).iterdir())
    with tempfile.TemporaryDirectory(prefix="fedit-") as temporary:
        folder = Path(temporary)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(**vars(arguments)))
        print("| Nodes | Round | CPU of all processes in a round |\n|---|---|---|", flush=True)
        before = os.times()
        run([*FEDIT, "run", recipe, "--out", folder / "simulation"])
        spent = os.times()
        report("simulation", folder / "simulation", spent.children_user - before.children_user)
        for number in map(int, arguments.nodes.split(",")):
            measure(folder / f"{number}", recipe, files, number, arguments)


def measure(folder: Path, recipe: Path, files: list[Path], number: int, arguments: argparse.Namespace) -> None:
    """Run the recipe with the clients dealt out to `number` nodes."""
    names = [f"node{index}" for index in range(number)]
    where = ["--port", arguments.port, "--engine", arguments.engine]
    run([*FEDIT, "federation", "init", folder / "f", "--sites", ",".join(names), *where])
    server = folder / "f" / "server"
    processes = [start(folder, "serve", "federation", "serve", server)]
    for index, name in enumerate(names):
        site = folder / "f" / "sites" / name
        (site / "rows").mkdir()
        for file in files[index::number]:
            shutil.copy(file, site / "rows")
        about = {"name": name, "engine": arguments.engine, "data": "rows", "test_data": arguments.test}
        (site / "site.toml").write_text("".join(f'{key} = "{value}"\n' for key, value in about.items()))
        processes.append(start(folder, name, "site", "start", site))
    try:
        while len(Courier(server).sites()) < number:
            time.sleep(0.5)
        run([*FEDIT, "federation", "check", recipe, "--server", server])  # so that every node has loaded its base
        before = cpu_seconds(folder)
        run([*FEDIT, "federation", "run", recipe, "--server", server, "--out", folder / "run"])
        report(str(number), folder / "run", cpu_seconds(folder) - before)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


def cpu_seconds(folder: Path) -> float:
    """Return the CPU seconds, of all kinds, of the processes whose command names the folder."""
    times = [
        process.cpu_times()
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or [])
    ]
    return sum(each.user + each.system for each in times)


def report(name: str, out: Path, cpu: float) -> None:
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in timings if "round" in line]
    print(f"| {name} | {statistics.median(seconds[1:]):.2f} s | {cpu / len(seconds):.1f} s |", flush=True)


if __name__ == "__main__":
    main()
