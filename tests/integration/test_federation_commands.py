"""What the commands of a federation refuse, and say."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedit import deployment, federation
from fedit.engines.site_folder import SiteFolder
from fedit.interfaces import EngineError

Fedit = Callable[..., Any]


def test_init_makes_a_folder_for_everyone_and_adds_sites(fedit: Fedit, tmp_path: Path) -> None:
    pytest.importorskip("nvflare", reason="needs fedit[nvflare]")
    folder = tmp_path / "fed"
    assert fedit("federation", "init", folder, "--sites", "north,south", "--host", "fl.example.org").status == 0
    key = folder / "sites" / "north" / "kit" / "startup" / "client.key"
    before = key.read_bytes()
    assert key.stat().st_mode & 0o077 == 0
    assert (folder / "server").stat().st_mode & 0o077 == 0
    assert (folder / "authority").stat().st_mode & 0o077 == 0
    assert SiteFolder.read(folder / "sites" / "north").config.policy.counts
    (folder / "sites" / "north" / "site.toml").write_text('name = "north"\ndata = "mine.jsonl"\n')
    assert fedit("federation", "init", folder, "--sites", "west", "--host", "fl.example.org").status == 0
    assert key.read_bytes() == before
    assert "mine.jsonl" in (folder / "sites" / "north" / "site.toml").read_text()
    assert json.loads((folder / "server" / "federation.json").read_text())["sites"] == ["north", "south", "west"]
    assert (folder / "sites" / "west" / "kit" / "startup" / "client.crt").is_file()
    assert "fedit site start" not in (folder / "server" / "fedit-server.service").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sites", ""), "names no site"),
        (("--sites", "a,a"), "a name is there twice"),
        (("--sites", "../x"), "--sites ../x"),
        (("--sites", "7"), "--sites 7"),
        (("--sites", "a", "--port", "0"), "--port 0: expected a number from 1 to 65535"),
    ],
)
def test_init_refuses(fedit: Fedit, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = fedit("federation", "init", tmp_path / "fed", *arguments)
    assert done.status == 1
    assert says in done.stderr
    assert not (tmp_path / "fed" / "server").exists()


def test_init_takes_no_folder_with_other_files(fedit: Fedit, tmp_path: Path) -> None:
    (tmp_path / "fed").mkdir()
    (tmp_path / "fed" / "thesis.tex").touch()
    done = fedit("federation", "init", tmp_path / "fed", "--sites", "a")
    assert done.status == 1
    assert "holds other files" in done.stderr


def test_an_engine_that_is_not_installed_is_said_with_the_command(
    fedit: Fedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment.importlib.util, "find_spec", lambda name: None)
    done = fedit("federation", "init", tmp_path / "fed", "--sites", "a")
    assert done.status == 1
    assert "pip install 'fedit[nvflare]'" in done.stderr


def test_an_engine_of_another_version_is_said(fedit: Fedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvflare", reason="needs fedit[nvflare]")
    monkeypatch.setattr(deployment.importlib.metadata, "version", lambda name: "2.8.3")
    done = fedit("federation", "init", tmp_path / "fed", "--sites", "a")
    assert done.status == 1
    assert "nvflare 2.8.3 is installed; the server and every site need 2.9.0" in done.stderr


def test_folders_of_another_kind_are_refused(fedit: Fedit, tmp_path: Path) -> None:
    for command in (("federation", "serve"), ("federation", "status"), ("site", "start"), ("site", "log")):
        done = fedit(*command, tmp_path)
        assert done.status == 1, command
        assert "federation init" in done.stderr or "is no site's folder" in done.stderr


def test_the_status_of_a_run_is_one_line_however_long(
    fedit: Fedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = {"connected": True, "answered": None, "down": 49_000, "up": 30_600}
    run = {"folder": "runs/" + "long" * 30, "rounds": 3, "rounds_done": 2, "failures": []}
    monkeypatch.setattr(federation, "federation_status", lambda server: {"sites": {"north": site}, "run": run})
    lines = fedit("federation", "status", tmp_path).stderr.splitlines()
    assert lines[1].split() == ["north", "yes", "49.0", "kB", "30.6", "kB"]
    assert lines[2] == f"Run {run['folder']}: 2 of 3 rounds"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name = ", "is no TOML"),
        ('name = "a"', "data"),
        ('name = "a"\ndata = "x"\ncolour = "red"', "colour"),
        ('name = "a"\ndata = "x"\n[policy]\ncount = true', "counts"),
        ('name = "a"\ndata = "x"\n[policy]\nmax_message_mb = 0', "max_message_mb"),
    ],
)
def test_a_site_file_that_cannot_be_used_names_what_is_wrong(
    fedit: Fedit, tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "site.toml").write_text(content)
    done = fedit("site", "log", tmp_path)
    assert done.status == 1
    assert says in done.stderr


@pytest.mark.parametrize("engine", ["nvflare", "flower"])
def test_a_port_that_is_taken_is_said(fedit: Fedit, tmp_path: Path, engine: str) -> None:
    folder = tmp_path / "fed"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = fedit("federation", "init", folder, "--sites", "a", "--port", str(port), "--engine", engine)
        if made.status:
            pytest.skip(made.stderr)
        done = fedit("federation", "serve", folder / "server")
    assert done.status == 1
    assert f"Port {port} cannot be served (Address already in use)" in " ".join(done.stderr.split())


def test_a_site_of_another_engine_is_said(fedit: Fedit, tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="needs fedit[flower]")
    folder = tmp_path / "fed"
    assert fedit("federation", "init", folder, "--sites", "a", "--engine", "flower").status == 0
    file = folder / "sites" / "a" / "site.toml"
    assert 'engine = "flower"' in file.read_text()
    file.write_text(file.read_text().replace('"flower"', '"nvflare"'))
    done = fedit("site", "start", folder / "sites" / "a")
    assert done.status == 1
    assert "holds no kit of nvflare" in " ".join(done.stderr.split())


def test_more_sites_get_kits_and_the_others_keep_their_keys(fedit: Fedit, tmp_path: Path) -> None:
    """Wherever the folders of the server and of the sites are by then; with Flower a site is its key."""
    pytest.importorskip("flwr", reason="needs fedit[flower]")
    folder = tmp_path / "fed"
    init = ("federation", "init", folder, "--engine", "flower", "--sites")
    assert fedit(*init, "north,south").status == 0
    north = (folder / "server" / "kit" / "sites" / "north.pub").read_bytes()
    (folder / "sites" / "north").rename(tmp_path / "north")
    assert fedit(*init, "west").status == 0
    assert not (folder / "sites" / "north" / "kit").exists()
    assert (folder / "server" / "kit" / "sites" / "north.pub").read_bytes() == north
    (folder / "server").rename(tmp_path / "server")
    assert fedit(*init, "east").status == 0
    kit = folder / "server" / "kit"
    assert {file.stem for file in (kit / "sites").iterdir()} == {"north", "south", "west", "east"}
    assert not (kit / "server.pem").exists(), "the server has one"
    assert (kit / "sites" / "north.pub").read_bytes() == north


def test_nginx_takes_a_folder_with_a_space(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="needs fedit[flower]")
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if nginx is None:
        pytest.skip("needs nginx")
    from fedit.engines.flower import kits

    folder = tmp_path / "our federation"
    kits.make_kits(folder, "localhost", 18099, ["a"])
    _, program, _ = kits.server_programs(folder / "server")
    done = subprocess.run([*program.command, "-t"], capture_output=True, text=True, check=False)
    assert "test is successful" in done.stderr
    with pytest.raises(EngineError, match="nginx cannot be given the path"):
        kits.server_programs(tmp_path / 'with"quotes')


def test_a_server_that_is_not_there_is_said_once_and_when_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deployment, "PROBE_S", 0.05)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        threading.Timer(0.5, server.listen).start()
        with caplog.at_level("WARNING"):
            deployment.tell_unreachable(address, threading.Event())
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "cannot be reached ([Errno 111] Connection refused)" in told[0]
    assert told[1] == f"the server at {address} can be reached"


def test_check_shows_what_a_site_withholds(fedit: Fedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its policy, or because the run gives privacy."""
    site = {"clients": {"a": 1}, "device": "cpu", "memory_bytes": 1e9, "torch": "2", "clock_ahead_s": 0.0}
    told = {"a": site, "b": {**site, "clients": {"b": 7}, "held_out": 5, "slots": 3}}
    monkeypatch.setattr("fedit.federation.check_sites", lambda config, server: (told, {}))
    shown = fedit("federation", "check", "--server", str(tmp_path))
    assert shown.status == 0
    assert (shown.stdout + shown.stderr).count("withheld") == 2
