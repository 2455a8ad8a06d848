"""Small federations for tests: three sites with rows of their own, a transport that calls their workers directly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fedit.config import RunConfig, load_config
from fedit.engines.channel import ChannelError, Header
from fedit.engines.client_store import ClientStore
from fedit.engines.courier import Courier
from fedit.engines.remote import Remote
from fedit.engines.remote_site import Transport
from fedit.engines.simulation import Simulation
from fedit.engines.site import Worker
from fedit.engines.site_folder import SiteFolder
from fedit.experiment import shown_to_server
from fedit.federation import expected_of
from fedit.interfaces import Adapter, derive_rng
from fedit.prepare import prepare_data, prepare_model
from fedit.server import RoundRecord, ServerState, train

SITES = ("a", "b", "c")
RECIPE = """
rounds = 3
[model]
path = "{model}"
dtype = "float32"
[adapter]
rank = 2
alpha = 4
[data]
path = "{data}"
test_path = "{test}"
template = "plain"
[partition]
name = "natural"
[client]
local_steps = 2
batch_size = 3
learning_rate = 1e-2
[engine]
device = "cpu"
slots = 1
deadline_s = 120
absent_s = 60
join_s = 60
"""


KINDS = {
    "plain": ("rows/{site}.jsonl", ""),
    "many": ("rows", ""),
    "pair": ("pair", ""),
    "broken": ("broken.jsonl", ""),
    "poor": ("rows/{site}.jsonl", "memory_gb = 0.0001\n"),
    "silent": ("rows/{site}.jsonl", "[policy]\ncounts = false\nlosses = false\nevaluation = false\n"),
    "wary": ("rows/{site}.jsonl", "[policy]\nmin_parties = 4\n"),
    "two suffice": ("rows/{site}.jsonl", "[policy]\nmin_parties = 2\nthreshold = 0.5\n"),
    "small": ("rows/{site}.jsonl", "[policy]\nmax_message_mb = 0.001\n"),
}
"""What a site may be: its rows, and the end of its site.toml"""


def write_rows(folder: Path, num_rows: int = 8) -> Path:
    """Write a file of rows for each site, held-out rows beside them, a pair of clients, and a file that is broken."""
    rows = folder / "rows"
    rows.mkdir(parents=True)
    for index, name in enumerate((*SITES, "test")):
        file = rows / f"{name}.jsonl" if name in SITES else folder / "test.jsonl"
        lines = [
            {"instruction": f"say {name} {number}", "response": f"{name * 3} {number + index}", "category": name}
            for number in range(num_rows + index)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pair").mkdir()
    for name in ("b1", "b2"):
        shutil.copy(rows / "b.jsonl", folder / "pair" / f"{name}.jsonl")
    (folder / "broken.jsonl").write_text("this is no JSON\n")
    return rows


def write_recipe(folder: Path, model: Path) -> Path:
    rows = write_rows(folder)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model, data=rows, test=folder / "test.jsonl"))
    return recipe


def write_site(folder: Path, name: str, rows: Path, more: str = "", kind: str = "plain") -> None:
    """Make a site's folder, or change its site.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    data, end = KINDS[kind]
    paths = f'data = "{rows.parent / data.format(site=name)}"\ntest_data = "{rows.parent / "test.jsonl"}"\n'
    (folder / "site.toml").write_text(f'name = "{name}"\n{paths}device = "cpu"\n{more}{end}')


class Sites(ABC):
    """A `Transport` to the three sites, which tests may spoil: `before` and `after` may change a call or lose it."""

    def __init__(self, recipe: Path, folders: Path, more: str = "") -> None:
        self.recipe = recipe
        self.rows = recipe.parent / "rows"
        self.piece_bytes, self.inline_bytes = 1000, 500
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, Header], None] = lambda site, header: None
        self.after: Callable[[str, Header, tuple[Header, bytes]], tuple[Header, bytes]] = lambda site, header, r: r
        self._folders = folders
        self._more = more
        for site in SITES:
            self.become(site, "plain")

    def become(self, site: str, kind: str) -> None:
        """Change what a site has and allows, from the next run on; its clients are numbered anew."""
        (self._folders / site / "client-numbers.json").unlink(missing_ok=True)
        write_site(self._folders / site, site, self.rows, self._more, kind)

    def folder_of(self, site: str) -> SiteFolder:
        return SiteFolder.read(self._folders / site)

    @abstractmethod
    def restart(self, site: str) -> None:
        """Kill a site's worker; another takes its place."""

    def call(self, site: str, header: Mapping[str, Any], blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        asked: Header = json.loads(json.dumps(header))
        self.calls.append((site, asked["do"]))
        self.before(site, asked)
        answer, reply = self._carry(site, asked, blob, timeout_s)
        return self.after(site, asked, (json.loads(json.dumps(answer)), reply))

    @abstractmethod
    def _carry(self, site: str, header: Header, blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        """Return the site's own answer."""


LOADING = threading.Lock()
"""transformers changes global state while it loads a model, so two threads of a process must not load at once."""


class _Worker(Worker):
    def _load(self, config: RunConfig, expected: Mapping[str, str], run: str) -> Any:
        with LOADING:
            return super()._load(config, expected, run)


class Direct(Sites):
    """Sites whose workers are threads of this process."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(write_recipe(folder, model), folder / "sites")
        self.workers: dict[str, Worker] = {}
        self.threads: dict[str, threading.Thread] = {}
        for site in SITES:
            self._start(site)

    def _start(self, site: str) -> None:
        self.workers[site] = worker = _Worker(self.folder_of(site))
        self.threads[site] = threading.Thread(target=worker.work, daemon=True)
        self.threads[site].start()

    def _stop(self, site: str) -> None:
        worker = self.workers.pop(site)
        worker.stop()
        self.threads[site].join(timeout=10)

    def restart(self, site: str) -> None:
        self._stop(site)
        self._start(site)

    def close(self) -> None:
        for site in list(self.workers):
            self._stop(site)

    def _carry(self, site: str, header: Header, blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        if site not in self.workers:
            raise ChannelError("nobody listens")
        return self.workers[site].handle(header, blob)


class Deployed(Sites):
    """Sites as processes, which calls reach through both couriers of an engine."""

    def __init__(self, deployment: Deployment, recipe: Path, model: Path) -> None:
        super().__init__(recipe, deployment.folder / "sites", deployment.site_toml(model))
        self.piece_bytes, self.inline_bytes = 12_000, 500  # a call through Flower takes 0.1 s
        self._deployment = deployment
        self._courier = Courier(deployment.server)

    def restart(self, site: str) -> None:
        self._deployment.kill("fedit.engines.site", str(self._deployment.site(site)))

    def _carry(self, site: str, header: Header, blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        return self._courier.call(site, header, blob, timeout_s)


Finished = tuple[Adapter, list[RoundRecord]]


def simulate(config: RunConfig, store: Path) -> Finished:
    """Return what the simulation makes of a run."""
    data = prepare_data(config)
    prepared = prepare_model(config, list(data.clients.values()))
    data = prepared.with_margins(config, data)
    engine = Simulation(config, prepared.model, data.clients, ClientStore(store, config.digest()))
    records: list[RoundRecord] = []
    state = ServerState(0, prepared.initial)
    noise = lambda round_index: derive_rng(config.seed, "privacy", round_index).standard_normal
    state = train(config, shown_to_server(config, engine), state, lambda state, record: records.append(record), noise)
    return state.adapter, records


def federate(config: RunConfig, sites: Transport, names: Sequence[str] = SITES, **changed: str) -> Finished:
    """Return what real sites make of a run; `changed` is what the server says that it has, and has not."""
    prepared = prepare_model(config)
    engine = Remote(config, sites, names, {**expected_of(prepared), **changed})
    engine.join()
    records: list[RoundRecord] = []
    state = ServerState(0, prepared.initial)
    state = train(config, shown_to_server(config, engine), state, lambda state, record: records.append(record))
    return state.adapter, records


def load(recipe: Path, *overrides: str) -> RunConfig:
    return load_config(str(recipe), list(overrides))


# ------------------------------------------------------------------------------------------------- real processes


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


class Deployment:
    """A server and its sites as processes on loopback, started by the commands that an organisation uses."""

    def __init__(self, folder: Path, rows: Path, model: Path, port: int, engine: str, host: str = "localhost") -> None:
        self.folder = folder
        self.engine = engine
        self.server = folder / "server"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        where = ["--host", host, "--port", port, "--engine", engine]
        fedit("federation", "init", folder, "--sites", ",".join(SITES), *where)
        for site in SITES:
            write_site(self.site(site), site, rows, self.site_toml(model))

    def site_toml(self, model: Path) -> str:
        """Return what the sites of this federation have in their site.toml beside their rows."""
        return f'model = "{model}"\nengine = "{self.engine}"\n'

    def start(self, *names: str, prefix: Sequence[str] = ()) -> None:
        """Start the processes of the server or of sites; `prefix` is what they are started by."""
        for name in names:
            command = ["federation", "serve", self.server] if name == "server" else ["site", "start", self.site(name)]
            with (self.folder / f"{name}.out").open("ab") as output:
                self._processes[name] = subprocess.Popen(
                    [*prefix, sys.executable, "-m", "fedit.cli", *map(str, command)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )

    def stop(self, *names: str) -> None:
        for name in names or list(self._processes):
            process = self._processes.pop(name)
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def wait_for_sites(self, *names: str, timeout_s: float = 90) -> None:
        """Wait until a job runs that these sites are in."""
        end = time.monotonic() + timeout_s
        courier = Courier(self.server)
        while not set(names) <= courier.sites().keys():
            assert time.monotonic() < end, f"only {list(courier.sites())} connected; logs in {self.folder}"
            time.sleep(0.5)

    def pids(self, module: str, *arguments: str) -> list[int]:
        """Return the processes whose command names `module` and all of `arguments`."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(module in part for part in line) and all(any(text in part for part in line) for text in arguments):
                found.append(process.pid)
        return found

    def kill(self, module: str, *arguments: str) -> None:
        pids = self.pids(module, str(self.folder), *arguments)
        assert pids, f"no process runs {module} with {arguments}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def kill_courier(self, site: str) -> None:
        """Kill what carries calls: at a site, and with Flower at the server as well."""
        if self.engine == "nvflare":
            self.kill("worker_process", str(self.site(site)))
            return
        self.kill("fedit.engines.flower.site", str(self.site(site)))
        self.kill("fedit.engines.flower.server")

    def kill_engine(self) -> None:
        """Kill the engine's server."""
        self.kill("server_train" if self.engine == "nvflare" else "flower_superlink")

    def kill_site(self, name: str) -> None:
        """Kill all processes of a site at once, as when its machine stops."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        for pid in self.pids(str(self.site(name))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def fedit(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``fedit <arguments>`` as a process."""
    command = [sys.executable, "-m", "fedit.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done
