"""NVIDIA FLARE as transport: couriers in its job processes, the kits that it provisions, and a keeper of the job.

    fedit run process -> courier.sock -> ServerCourier = (mutual TLS) = SiteCourier -> worker.sock -> worker

Couriers hand on calls and look into none. FLARE aborts its whole job where one process of it dies, forgets jobs when
its server restarts, and takes no site back into a job. So the job holds nothing: the keeper submits it again, with
whoever is connected, and the calls that were under way are made again. The job is JSON that
names the classes of this module; sites forbid code that arrives.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from fedit.engines.channel import ChannelError, Header, call, serve
from fedit.engines.supervisor import Program
from fedit.errors import EngineError
from fedit.logs import log_to_stderr

log = logging.getLogger(__name__)

_MODULE = "fedit.engines.nvflare"  # __name__ is another where this module is the program
VERSION = "2.9.0"
"""The one that is tested: its calls changed from 2.8 to 2.9."""
SITE, SERVER = "FEDIT_SITE", "FEDIT_SERVER"
"""Environment variables of FLARE's processes: the folder whose socket their courier uses; no job can say it."""
OPERATOR = "operator@fedit.org"
"""Who submits the job; FLARE wants the form of an address."""
HEARTBEAT_S = 3
ALIVE_S = 12.0
"""Seconds since its last heartbeat after which a site counts as gone."""
CHECK_S = 2.0
START_S = 30.0
"""What a submitted job may take to start its couriers."""
PAUSE_S = 15.0, 600.0
"""First and longest pause between two new jobs for the same site."""
ROOT_DAYS = 3650
CONTROLLER = "nvflare.collab.runtime.controller.CollabController"
EXECUTOR = "nvflare.collab.runtime.executor.CollabExecutor"


# ---------------------------------------------------------------------------------------------------------- couriers


class SiteCourier:
    """At a site: hands calls to the worker, which the site's operator started."""

    @collab.publish
    def call(self, header: str, blob: bytes) -> list[Any]:
        """Return the worker's answer, [header, blob]."""
        asked = json.loads(header)
        if asked["do"] == "reach":
            return ["{}", b""]
        try:
            answer, reply = call(Path(os.environ[SITE]) / "worker.sock", asked, blob, asked["timeout_s"])
        except ChannelError:
            answer, reply = {"error": "the worker at the site does not answer"}, b""
        return [json.dumps(answer), reply]


class ServerCourier:
    """At the server: hands calls to the couriers of the job's sites."""

    @collab.main
    def run(self) -> None:
        """Serve until the job is aborted."""
        sites = {proxy.name: proxy for proxy in collab.clients}
        traffic = {name: {"down": 0, "up": 0, "answered": None} for name in sites}
        context = collab.context
        stopped = threading.Event()

        def handle(header: Header, blob: bytes) -> tuple[Header, bytes]:
            if header["do"] == "sites":
                return {"sites": traffic}, b""
            site = header.pop("site")
            if site not in sites:
                return {"error": "the site is not connected"}, b""
            asked = json.dumps(header)
            try:
                answer, reply = sites[site](timeout=header["timeout_s"]).call(asked, blob)
            except Exception as error:  # noqa: BLE001 (FLARE raises what the far end raised)
                return {"error": f"no answer from the site ({getattr(error, 'cause_type', type(error).__name__)})"}, b""
            seen = traffic[site]
            seen["down"] += len(asked) + len(blob)
            seen["up"] += len(answer) + len(reply)
            seen["answered"] = time.time()
            return json.loads(answer), reply

        def watch() -> None:
            while not context.is_aborted() and not stopped.wait(0.2):
                pass
            stopped.set()

        threading.Thread(target=watch, daemon=True).start()
        serve(Path(os.environ[SERVER]) / "courier.sock", handle, stopped)


def write_job(folder: Path, sites: Collection[str]) -> None:
    """Write a job that starts the couriers at the server and at `sites`: JSON, no code."""
    config = folder / "app" / "config"
    config.mkdir(parents=True, exist_ok=True)
    meta = {"name": "fedit", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["server", *sorted(sites)]}}
    threads = {"max_inbound_call_threads": 16, "max_outbound_call_threads": max(16, 4 * len(sites))}
    filters = {"task_data_filters": [], "task_result_filters": []}
    server = {
        "format_version": 2,
        "workflows": [{"id": "calls", "path": CONTROLLER, "args": {"server_obj_id": "courier", **threads}}],
        "components": [{"id": "courier", "path": f"{_MODULE}.ServerCourier", "args": {}}],
    }
    executor = {"path": EXECUTOR, "args": {"client_obj_id": "courier", **threads}}
    site = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": "courier", "path": f"{_MODULE}.SiteCourier", "args": {}}],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (config / "config_fed_server.json").write_text(json.dumps(server | filters))
    (config / "config_fed_client.json").write_text(json.dumps(site | filters))


# -------------------------------------------------------------------------------------------------------------- kits


def make_kits(folder: Path, host: str, port: int, sites: Sequence[str]) -> None:
    """Write the start-up kits of a federation: ``server/kit``, ``server/operator`` and ``sites/NAME/kit``.

    Certificates and keys are made by FLARE's own provisioning; the authority that signed them stays in ``authority/``,
    so that the same call with more sites makes kits for these.

    Raises:
        EngineError: provisioning failed.
    """
    authority = folder / "authority"
    authority.mkdir(parents=True, exist_ok=True)
    authority.chmod(0o700)
    participants: list[dict[str, Any]] = [
        {"name": host, "type": "server", "org": "fedit", "fed_learn_port": port},
        {"name": OPERATOR, "type": "admin", "org": "fedit", "role": "lead"},
        *({"name": site, "type": "client", "org": "fedit"} for site in sites),
    ]
    lighter = "nvflare.lighter.impl"
    project = {
        "api_version": 3,
        "name": "fedit",
        "participants": participants,
        "builders": [
            {"path": f"{lighter}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
            {"path": f"{lighter}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{lighter}.cert.CertBuilder", "args": {"root_valid_days": ROOT_DAYS}},
            {"path": f"{lighter}.signature.SignatureBuilder"},
        ],
    }
    (authority / "project.yml").write_text(json.dumps(project, indent=1))  # JSON is YAML
    provision = ["-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", "workspace", "--force"]
    command = [sys.executable, *provision]
    done = subprocess.run(command, cwd=authority, capture_output=True, text=True, check=False)
    made = sorted((authority / "workspace" / "fedit").glob("prod_*"))
    if done.returncode or not made:
        raise EngineError(f"FLARE's provisioning in {authority} failed:\n{done.stdout}{done.stderr}")
    for name, target in {
        host: folder / "server" / "kit",
        OPERATOR: folder / "server" / "operator",
        **{site: folder / "sites" / site / "kit" for site in sites},
    }.items():
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.parent.chmod(0o700)
            shutil.copytree(made[-1] / name, target)


def _harden(kit: Path, allowed: Sequence[str], may: Mapping[str, str]) -> None:
    """Let a kit run the couriers and nothing else, send no logs, and keep its files beside it, not in /tmp.

    Done at every start, so that what a kit arrived with counts for nothing.
    """
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text())
    resources |= {"class_allow_list": list(allowed), "class_list_enforcement_mode": "enforce"}
    if "allow_log_streaming" in resources:
        resources["allow_log_streaming"] = False
    resources["components"] = [
        component
        for component in resources["components"]
        if component["id"] not in ("site_log_streamer", "log_receiver")
    ]
    text = json.dumps(resources, indent=1).replace("/tmp/nvflare", str(kit / "storage"))
    (local / "resources.json").write_text(text)
    nobody = dict.fromkeys(("clone_job", "download_job", "operate", "shell_commands", "byoc"), "none")
    rights = {"project_admin": {"view": "any"}, "org_admin": {"view": "any"}, "member": {"view": "any"}}
    rights["lead"] = {**nobody, "view": "any", **may}
    (local / "authorization.json").write_text(json.dumps({"format_version": "1.0", "permissions": rights}, indent=1))


def server_programs(folder: Path) -> list[Program]:
    """Return what runs at the server: FLARE's server, and the keeper of its job."""
    kit = folder / "kit"
    _harden(kit, [CONTROLLER, f"{_MODULE}.ServerCourier"], {"submit_job": "any", "manage_job": "any"})
    engine = _command("server.server_train", kit, "fed_server.json")
    return [
        Program("engine", engine, kit, {SERVER: str(folder)}),
        Program("keeper", [sys.executable, "-m", _MODULE, str(folder)], folder),
    ]


def site_programs(folder: Path, name: str) -> list[Program]:
    """Return what runs at a site beside its worker: FLARE's client."""
    kit = folder / "kit"
    _harden(kit, [EXECUTOR, f"{_MODULE}.SiteCourier"], {"submit_job": "any"})
    command = _command("client.client_train", kit, "fed_client.json")
    command += [f"uid={name}", f"heart_beat_interval={HEARTBEAT_S}"]
    return [Program("engine", command, kit, {SITE: str(folder)})]


def _command(module: str, kit: Path, config: str) -> list[str]:
    (kit / "transfer").mkdir(exist_ok=True)
    run = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{module}", "-m", str(kit), "-s", config]
    return [*run, "--set", "secure_train=true", "org=fedit", "config_folder=config"]


# ------------------------------------------------------------------------------------------------------------ keeper


def keep(folder: Path, stopped: threading.Event) -> None:
    """Keep the couriers' job running with every site that is connected, until `stopped` or the session's end.

    Raises:
        Exception: whatever ended the session with FLARE's server.
    """
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    _Keeper(folder, new_secure_session(OPERATOR, str(folder / "operator"), timeout=10.0)).run(stopped)


class _Keeper:
    """The job during one session with the server."""

    def __init__(self, folder: Path, session: Any) -> None:
        self._folder = folder
        self._session = session
        self._job: str | None = None
        self._submitted = 0.0
        self._missed: dict[str, int] = {}
        self._patience: dict[str, tuple[float, float]] = {}
        """When a site may next cause a new job, and the pause before that"""
        self._alive: set[str] = set()

    def run(self, stopped: threading.Event) -> None:
        while not stopped.wait(CHECK_S):
            alive, before = self._connected(), self._alive
            self._alive = alive
            if alive != before:
                log.info("connected: %s", ", ".join(sorted(alive)) or "nobody")
                continue  # sites come one after another: one job for all of them
            members = self._members()
            if members is None:
                if alive and (self._is_over() or time.monotonic() - self._submitted > START_S):
                    self._submit(alive)
                continue
            lacking = {site for site in members & alive if self._is_lost(site)} | (alive - members)
            now = time.monotonic()
            due = {site for site in lacking if now >= self._patience.get(site, (0.0, 0.0))[0]}
            if due:
                log.info("the job starts again: it lacks %s", ", ".join(sorted(due)))
                for site in due:  # one that never answers is not to trouble the others for ever
                    pause = min(PAUSE_S[1], 2 * self._patience.get(site, (0.0, PAUSE_S[0] / 2))[1])
                    self._patience[site] = now + pause, pause
                self._submit(alive)
            for site in set(self._patience) - lacking:
                if now > self._patience[site][0] + PAUSE_S[0]:
                    del self._patience[site]

    def _connected(self) -> set[str]:
        now = time.time()
        clients = self._session.get_connected_client_list()
        return {client.name for client in clients if now - float(client.last_connect_time) < ALIVE_S}

    def _members(self) -> set[str] | None:
        """Return the sites of the job that runs; None: its courier does not answer."""
        try:
            return set(call(self._folder / "courier.sock", {"do": "sites"}, timeout_s=5.0)[0]["sites"])
        except ChannelError:
            return None

    def _is_lost(self, site: str) -> bool:
        """Tell whether a site, connected, did not answer in this job twice."""
        reach = {"do": "reach", "site": site, "timeout_s": 4.0}
        try:
            answer, _ = call(self._folder / "courier.sock", reach, timeout_s=6.0)
        except ChannelError as error:
            answer = {"error": str(error)}
        self._missed[site] = self._missed.get(site, 0) + 1 if "error" in answer else 0
        return self._missed[site] > 1

    def _is_over(self) -> bool:
        if self._job is None:
            return True
        status = self._session.get_job_status(self._job)
        return status is None or str(status).startswith("FINISHED")

    def _submit(self, sites: Collection[str]) -> None:
        for job in self._session.list_jobs():
            if not str(job.get("status", "")).startswith("FINISHED"):
                with suppress(Exception):
                    self._session.abort_job(job["job_id"])
        write_job(self._folder / "job", sites)
        self._job = self._session.submit_job(str(self._folder / "job"))
        self._submitted = time.monotonic()
        self._missed.clear()
        log.info("job %s for %s", self._job, ", ".join(sorted(sites)))


def main(arguments: Sequence[str]) -> None:
    """Keep the job of the server's folder until SIGTERM, in one session: for another one, the supervisor starts again.

    A session is not closed but ends with its process: closing one waits for ever where its connection returns
    meanwhile, and FLARE's threads would keep the interpreter from exiting.
    """
    log_to_stderr()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    status = 0
    try:
        keep(Path(arguments[0]), stopped)
    except Exception as error:  # noqa: BLE001 (whatever ends a session, the supervisor starts another)
        log.warning("the session with FLARE's server ended (%s: %s); a new one follows", type(error).__name__, error)
        status = 1
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
