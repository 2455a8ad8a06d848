"""What NVIDIA FLARE lets nobody do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from federations import SITES, Deployment

pytest.importorskip("nvflare", reason="needs fedit[nvflare]")
from fedit.engines import nvflare

ENGINE = "nvflare"

SUBMIT = """
import sys, time
from nvflare.fuel.flare_api.flare_api import new_secure_session
kit, user, job = sys.argv[1:]
session = new_secure_session(user, kit, timeout=20)
try:
    job = session.submit_job(job)
    while not str(status := session.get_job_status(job)).startswith("FINISHED"):
        time.sleep(0.5)
    print("status", status)
finally:
    session.close()
"""


def submit(deployment: Deployment, job: Path) -> str:
    """Submit a job with the operator's certificate, and return how it ended."""
    command = [sys.executable, "-c", SUBMIT, str(deployment.server / "operator"), nvflare.OPERATOR, str(job)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout


def job_with_code(job: Path, proof: Path) -> Path:
    """Write a job that brings the class which it names; its code leaves a file where it ran."""
    nvflare.write_job(job, SITES)
    custom = job / "app" / "custom"
    custom.mkdir()
    (custom / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(proof)!r}).write_text('ran')\nclass Site: pass\n"
    )
    config = job / "app" / "config" / "config_fed_client.json"
    config.write_text(config.read_text().replace("fedit.engines.nvflare.SiteCourier", "mine.Site"))
    return job


def test_sites_run_no_code_that_arrives_and_no_class_but_the_courier(
    made: tuple[Deployment, Path], tmp_path: Path
) -> None:
    deployment, _ = made
    proof = tmp_path / "proof"
    job = job_with_code(tmp_path / "job", proof)
    assert "status FINISHED" in submit(deployment, job)
    assert "BYOC not permitted" in logs_of(deployment.server)  # which has the same policy as the sites
    other = tmp_path / "other"
    nvflare.write_job(other, SITES)
    config = other / "app" / "config" / "config_fed_client.json"
    config.write_text(config.read_text().replace("fedit.engines.nvflare.SiteCourier", "subprocess.Popen"))
    assert "status FINISHED" in submit(deployment, other)
    assert not proof.exists()
    assert "subprocess.Popen" in logs_of(deployment.site("a"))


def logs_of(folder: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in (folder / "logs").glob("*.log"))


def test_certificates_of_another_authority_are_refused(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    """Even those of a site of the same name that trusts the right server."""
    deployment, _ = made
    port = json.loads((deployment.server / "federation.json").read_text())["port"]
    nvflare.make_kits(tmp_path / "other", "localhost", port, ["d"])
    site = tmp_path / "other" / "sites" / "d"
    shutil.copy(deployment.site("a") / "kit" / "startup" / "rootCA.pem", site / "kit" / "startup" / "rootCA.pem")
    (program,) = nvflare.site_programs(site, "d")
    with (tmp_path / "d.log").open("wb") as output:
        stranger = subprocess.Popen(program.command, cwd=site / "kit", stdout=output, stderr=subprocess.STDOUT)
        time.sleep(12)
        stranger.kill()
        stranger.wait()
    assert "Successfully registered" not in (tmp_path / "d.log").read_text()
    assert "d@" not in (deployment.server / "logs" / "engine.log").read_text(errors="replace")


def test_sites_refuse_code_that_their_server_allows(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    """A server whose operator lets everybody do everything."""
    deployment, _ = made
    proof = tmp_path / "proof"
    deployment.stop("server")
    engine, _ = nvflare.server_programs(deployment.server)
    policy = deployment.server / "kit" / "local" / "authorization.json"
    policy.write_text(json.dumps({"format_version": "1.0", "permissions": {"lead": "any"}}))
    resources = policy.with_name("resources.json")
    settings = json.loads(resources.read_text())
    settings["class_list_enforcement_mode"] = "off"
    resources.write_text(json.dumps(settings))
    with (tmp_path / "engine.log").open("wb") as output:
        server = subprocess.Popen(
            engine.command, cwd=engine.folder, env={**os.environ, **engine.environment}, stdout=output, stderr=output
        )
    try:
        ended = submit(deployment, job_with_code(tmp_path / "job", proof))
    finally:
        server.terminate()
        server.wait(30)
        deployment.start("server")
    assert "status FINISHED" in ended
    assert not proof.exists()
    assert re.search(r"'server: OK'.*'[abc]: NVFLARE_ERROR: BYOC not permitted'", (tmp_path / "engine.log").read_text())
    deployment.wait_for_sites(*SITES)


LOST = """
import sys, threading
from nvflare.fuel.flare_api import flare_api
from fedit.engines import nvflare

class Lost:
    def get_connected_client_list(self):
        raise ConnectionError("the server is gone")
    def close(self):  # as FLARE's own, where the connection returns meanwhile
        threading.Event().wait()

def session(*_, **__):
    threading.Thread(target=threading.Event().wait).start()  # FLARE's threads are no daemons
    return Lost()

flare_api.new_secure_session = session
nvflare.main(sys.argv[1:])
"""


def test_a_keeper_ends_with_its_session_so_that_another_follows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "ended (ConnectionError: the server is gone); a new one follows" in done.stderr
