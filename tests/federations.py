"""Small federations for tests: three sites with rows of their own, a transport that calls their workers directly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

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
from fedit.interfaces import Adapter
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
absent_s = 5
join_s = 60
"""


def write_rows(folder: Path, num_rows: int = 8) -> Path:
    """Write a file of rows for each site, and one of held-out rows beside them."""
    rows = folder / "rows"
    rows.mkdir(parents=True)
    for index, name in enumerate((*SITES, "test")):
        file = rows / f"{name}.jsonl" if name in SITES else folder / "test.jsonl"
        lines = [
            {"instruction": f"say {name} {number}", "response": f"{name * 3} {number + index}", "category": name}
            for number in range(num_rows + index)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def write_recipe(folder: Path, model: Path) -> Path:
    rows = write_rows(folder)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model, data=rows, test=folder / "test.jsonl"))
    return recipe


def write_site(folder: Path, name: str, rows: Path, more: str = "") -> SiteFolder:
    """Make a site's folder for the rows of `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    test = rows.parent / "test.jsonl"
    (folder / "site.toml").write_text(
        f'name = "{name}"\ndata = "{rows / f"{name}.jsonl"}"\ntest_data = "{test}"\ndevice = "cpu"\n{more}'
    )
    return SiteFolder.read(folder)


LOADING = threading.Lock()
"""transformers changes global state while it loads a model, so two threads of a process must not load at once."""


class _Worker(Worker):
    def _load(self, config: RunConfig, expected: Mapping[str, str], run: str) -> Any:
        with LOADING:
            return super()._load(config, expected, run)


class Direct:
    """A `Transport` to workers in threads of this process; `before` and `after` may spoil a call."""

    piece_bytes = 1000
    inline_bytes = 500

    def __init__(self, folders: Mapping[str, SiteFolder]) -> None:
        self.folders = dict(folders)
        self.workers: dict[str, Worker] = {}
        self.threads: dict[str, threading.Thread] = {}
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, Header], None] = lambda site, header: None
        self.after: Callable[[str, Header, tuple[Header, bytes]], tuple[Header, bytes]] = lambda site, header, r: r
        for site in folders:
            self.start(site)

    def start(self, site: str) -> None:
        self.workers[site] = worker = _Worker(self.folders[site])
        self.threads[site] = threading.Thread(target=worker.work, daemon=True)
        self.threads[site].start()

    def stop(self, site: str) -> None:
        worker = self.workers.pop(site)
        worker.stop()
        self.threads[site].join(timeout=10)

    def close(self) -> None:
        for site in list(self.workers):
            self.stop(site)

    def call(self, site: str, header: Mapping[str, Any], blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        asked: Header = json.loads(json.dumps(header))
        self.calls.append((site, asked["do"]))
        self.before(site, asked)
        if site not in self.workers:
            raise ChannelError("nobody listens")
        answer, reply = self.workers[site].handle(asked, blob)
        return self.after(site, asked, (json.loads(json.dumps(answer)), reply))


Finished = tuple[Adapter, list[RoundRecord]]


def simulate(config: RunConfig, store: Path) -> Finished:
    """Return what the simulation makes of a run."""
    data = prepare_data(config)
    prepared = prepare_model(config, list(data.clients.values()))
    data = prepared.with_margins(config, data)
    engine = Simulation(config, prepared.model, data.clients, ClientStore(store, config.digest()))
    records: list[RoundRecord] = []
    state = ServerState(0, prepared.initial)
    state = train(config, engine, state, lambda state, record: records.append(record))
    return state.adapter, records


class Sites(Transport, Protocol):
    """A transport that knows its sites."""

    @property
    def folders(self) -> Mapping[str, Any]: ...


def federate(config: RunConfig, transport: Sites, **changed: str) -> Finished:
    """Return what real sites, behind `transport`, make of a run."""
    import importlib.metadata

    prepared = prepare_model(config)
    expected = {
        "fedit": importlib.metadata.version("fedit"),
        "base": prepared.weights_sha256,
        "tokenizer": prepared.tokenizer_sha256,
    }
    engine = Remote(config, transport, list(transport.folders), expected | changed)
    engine.join()
    records: list[RoundRecord] = []
    state = ServerState(0, prepared.initial)
    state = train(config, engine, state, lambda state, record: records.append(record))
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
            write_site(folder / "sites" / site, site, rows, f'model = "{model}"\nengine = "{engine}"\n')

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
