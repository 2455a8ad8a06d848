"""A real federation as folders and processes: what the server and each site are given, and what runs there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import shutil
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, ValidationError

from fedit.config import Table, explain
from fedit.engines.courier import Courier
from fedit.engines.site_folder import SiteConfig, SiteFolder
from fedit.engines.supervisor import Program, supervise
from fedit.files import write_atomically, write_json
from fedit.interfaces import ConfigError, EngineError

log = logging.getLogger(__name__)

Engine = Literal["nvflare", "flower"]
CERTIFICATES: Mapping[Engine, tuple[str, str]] = {
    "nvflare": ("startup/server.crt", "startup/client.crt"),
    "flower": ("server.pem", "{name}.pem"),
}
"""Of the server and of a site, in their kits"""
PACKAGES: Mapping[Engine, str] = {"nvflare": "nvflare", "flower": "flwr"}
FILE = "federation.json"
PROBE_S = 5.0
"""Between two looks for a server that is not there"""
WARN_DAYS = 30
"""Before a certificate expires its operator is told at every start"""


class FederationConfig(Table):
    """The content of federation.json in the server's folder."""

    engine: Engine = "nvflare"
    host: str = Field(min_length=1)
    """The server's name, or address, as the sites reach it: its certificate is for this one"""
    port: int = Field(default=8002, ge=1, le=65535)
    sites: tuple[str, ...] = Field(min_length=1)


def courier_of(server: Path, federation: FederationConfig) -> Courier:
    """Return the way to the sites; a message of Flower's costs more, so it carries more."""
    if federation.engine == "flower":
        return Courier(server, piece_bytes=32 << 20, inline_bytes=8 << 20)
    return Courier(server)


def read_federation(folder: Path) -> FederationConfig:
    """Return the federation of a server's folder.

    Raises:
        ConfigError: it is none.
    """
    try:
        return FederationConfig.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{folder} is no server's folder: {folder / FILE} cannot be read ({error.strerror}). "
            "`fedit federation init` makes one."
        ) from error
    except ValidationError as error:
        raise ConfigError(explain(error, FederationConfig, f"{folder / FILE}: ")) from error


# ---------------------------------------------------------------------------------------------------------- set-up


def init_federation(folder: Path, federation: FederationConfig) -> None:
    """Write what the server and each site need into ``server`` and ``sites/NAME`` of `folder`; sites that are there
    already keep what they have.

    Raises:
        ConfigError: a name cannot be used, or `folder` holds another federation.
        EngineError: the engine is not installed, or its provisioning failed.
    """
    for site in federation.sites:
        try:
            SiteConfig(name=site, data="rows.jsonl")
        except ValidationError as error:
            raise ConfigError(explain(error, SiteConfig, f"--sites {site}: ")) from error
    if len(set(federation.sites)) < len(federation.sites):
        raise ConfigError(f"--sites {','.join(federation.sites)}: a name is there twice.")
    server, authority = folder / "server", folder / "authority"
    if (authority / FILE).is_file():  # the server's folder may be elsewhere by now
        before = read_federation(authority)
        if (before.engine, before.host, before.port) != (federation.engine, federation.host, federation.port):
            raise ConfigError(
                f"{folder} holds a federation of {before.engine} at {before.host}:{before.port}. Choose another folder."
            )
        federation = before.model_copy(update={"sites": tuple(dict.fromkeys((*before.sites, *federation.sites)))})
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds other files already. Choose a new or empty folder.")
    _engine(federation.engine).make_kits(folder, federation.host, federation.port, federation.sites)
    for place in (authority, server):
        write_json(place / FILE, federation.model_dump(mode="json"))
    write_atomically(server / "fedit-server.service", _unit("server", "fedit federation serve").encode())
    for site in federation.sites:
        target = folder / "sites" / site
        if not (target / "site.toml").is_file():
            write_atomically(target / "site.toml", SITE_FILE.format(name=site, engine=federation.engine).encode())
            write_atomically(target / "fedit-site.service", _unit(f"site {site}", "fedit site start").encode())


SITE_FILE = """\
# What this site decides by itself. Relative paths start at this folder.
name = "{name}"
engine = "{engine}"

# A JSON, JSONL, CSV or Parquet file is one client; a folder is one client for each file in it.
# The server learns their numbers, and not their names: client-numbers.json has both.
data = "rows.jsonl"
# Held-out rows; without them some rows of each category are held out, as many as the run says.
# test_data = "test.jsonl"
# Where the columns have other names than the run expects: columns = {{ instruction = "question", response = "answer" }}

# Identifiers to replace in the rows, beside those that a run says: redact = ["EMAIL_ADDRESS", "PHONE_NUMBER"]

# Where the base lies here; without it, the path or Hub name that the run says.
# model = "/srv/models/base"
device = "auto"

# What may leave this site, beside the updates of its clients.
[policy]
counts = true       # how many rows each client has; false: each counts as one
losses = true       # the training loss, and how many tokens were trained on
evaluation = true   # the loss of the global adapter on the held-out rows
max_message_mb = 4096
"""


def _unit(what: str, command: str) -> str:
    program = shutil.which("fedit") or f"{sys.prefix}/bin/fedit"
    return (
        f"[Unit]\nDescription=fedit {what}\nAfter=network-online.target\nWants=network-online.target\n\n"
        f"# Set the user, the program and the folder of this machine.\n[Service]\nUser=fedit\n"
        f"ExecStart={program} {command.removeprefix('fedit ')} /srv/fedit\n"
        "Restart=always\nRestartSec=10\nNoNewPrivileges=true\nPrivateTmp=true\nProtectSystem=full\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )


def require(engine: Engine) -> None:
    """Refuse, with the command that mends it, an engine that is not installed or of another version.

    Raises:
        EngineError: as said.
    """
    package = PACKAGES[engine]
    wanted = _pin(package)
    if importlib.util.find_spec(package) is None:
        raise EngineError(f"The engine {engine} is not installed. Install it: pip install 'fedit[{engine}]'")
    got = importlib.metadata.version(package)
    if got != wanted:
        raise EngineError(
            f"{package} {got} is installed; the server and every site need {wanted}. pip install '{package}=={wanted}'"
        )


def _pin(package: str) -> str:
    """Return the version that fedit's own metadata asks for."""
    for requirement in importlib.metadata.requires("fedit") or ():
        name, _, rest = requirement.partition("==")
        if name == package:
            return rest.partition(";")[0].strip()
    raise EngineError(f"This installation of fedit names no version of {package}. Install it again.")


class EngineModule(Protocol):
    """What an engine provides: kits, and the processes that carry calls between the server and the sites."""

    def make_kits(self, folder: Path, host: str, port: int, sites: Sequence[str]) -> None: ...

    def server_programs(self, folder: Path) -> list[Program]: ...

    def site_programs(self, folder: Path, name: str) -> list[Program]: ...


def _engine(name: Engine) -> EngineModule:
    require(name)
    if name == "flower":
        from fedit.engines import flower

        return flower
    from fedit.engines import nvflare

    return nvflare


# -------------------------------------------------------------------------------------------------------- processes


def serve(folder: Path, stopped: threading.Event) -> None:
    """Run the engine's server, and what keeps its couriers there, until `stopped`.

    Raises:
        ConfigError: the folder is no server's, or its certificate has expired.
        EngineError: the engine is not installed, or its port is taken.
    """
    federation = read_federation(folder)
    engine = _engine(federation.engine)
    check_certificate(folder / "kit" / CERTIFICATES[federation.engine][0], federation.engine)
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", federation.port))
        except OSError as error:
            raise EngineError(
                f"Port {federation.port} cannot be served ({error.strerror}): another program has it, or this one runs "
                "already. Stop that one; the sites know this port, so another needs a new federation."
            ) from error
    supervise(engine.server_programs(folder.absolute()), folder / "logs", stopped)


def check_certificate(file: Path, engine: Engine) -> None:
    """Refuse a certificate that holds no more, which engines do without a word.

    Raises:
        ConfigError: it is not there, or expired.
    """
    from cryptography.x509 import load_pem_x509_certificate

    if not file.exists():
        raise ConfigError(
            f"The folder holds no kit of {engine}: {file} is missing. Copy the whole folder that `fedit federation "
            "init` made; a site's `engine` in site.toml is the federation's."
        )
    certificate = load_pem_x509_certificate(file.read_bytes())
    begins, ends, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if not begins <= now <= ends:
        raise ConfigError(
            f"The certificate {file} holds from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M} UTC. If the clock is right, make the federation anew, in another folder: "
            "`fedit federation init`."
        )
    if (ends - now).days < WARN_DAYS:
        log.warning("the certificate %s expires on %s", file, f"{ends:%Y-%m-%d}")


def start_site(folder: Path, stopped: threading.Event) -> None:
    """Run a site's worker and its engine's client until `stopped`.

    Raises:
        ConfigError: the folder is no site's, or another engine's.
    """
    site = SiteFolder.read(folder)
    engine = _engine(site.config.engine)
    check_certificate(
        site.path / "kit" / CERTIFICATES[site.config.engine][1].format(name=site.name), site.config.engine
    )
    worker = Program("worker", [sys.executable, "-m", "fedit.engines.site", str(site.path)], site.path)
    programs = [worker, *engine.site_programs(site.path, site.name)]
    if site.config.engine == "nvflare":  # whose client says nothing of why it does not connect
        about = json.loads((site.path / "kit" / "startup" / "fed_client.json").read_text(encoding="utf-8"))
        address = about["servers"][0]["service"]["target"]
        threading.Thread(target=tell_unreachable, args=(address, stopped), daemon=True).start()
    supervise(programs, site.path / "logs", stopped)


def tell_unreachable(address: str, stopped: threading.Event) -> None:
    """Log why nobody listens at ``host:port``, whenever that changes, until somebody does."""
    host, _, port = address.rpartition(":")
    trouble = ""
    while not stopped.is_set():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
        except OSError as error:
            if str(error) != trouble:
                trouble = str(error)
                log.warning("the server at %s cannot be reached (%s); trying again until it can", address, trouble)
        else:
            if trouble:
                log.warning("the server at %s can be reached", address)
            return
        stopped.wait(PROBE_S)
