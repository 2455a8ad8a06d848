"""The kits of a federation behind Flower, and the processes of its server and its sites."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from fedit.engines.certificates import make_authority, make_certificate, write_secret
from fedit.engines.supervisor import Program
from fedit.errors import EngineError

COURIERS = "fedit.engines.flower"
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
}
"""Keeps Flower from calling home, from installing anything, and from a line for every message."""


def make_kits(folder: Path, host: str, port: int, sites: Sequence[str]) -> None:
    """Write the kits of a federation, ``server/kit`` and ``sites/NAME/kit``; what is there stays.

    A site's key is both that of its certificate, which nginx asks for, and that of its node, which the SuperLink knows.
    """
    authority, server = folder / "authority", folder / "server" / "kit"
    for place in (authority, server / "sites"):
        place.mkdir(parents=True, exist_ok=True)
    for secret in (authority, folder / "server"):
        secret.chmod(0o700)
    make_authority(authority)
    issued = authority / "issued"
    issued.mkdir(exist_ok=True)
    if not (issued / "server").exists():
        make_certificate(authority, server, "server", list(dict.fromkeys((host, "localhost", "127.0.0.1"))))
        (issued / "server").touch()
        write_secret(server / "superexec.secret", secrets.token_bytes(32))
        (server / "server.json").write_text(json.dumps({"host": host, "port": port}))
    for site in sites:
        kit, public = folder / "sites" / site / "kit", issued / f"{site}.pub"
        if public.exists():  # its folder may be at the site by now; another key would shut it out
            continue
        kit.parent.mkdir(parents=True, exist_ok=True)
        kit.parent.chmod(0o700)
        key = make_certificate(authority, kit, site)
        (kit / "server.json").write_text(json.dumps({"host": host, "port": port}))
        public.write_bytes(key)
    for public in issued.glob("*.pub"):
        (server / "sites" / public.name).write_bytes(public.read_bytes())


NGINX = """
# Written at every start. Sites reach the paths of Flower's Fleet API and nothing else, with a certificate of ours.
{user}
pid "{kit}/nginx.pid";
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path "{kit}/tmp";
    proxy_temp_path "{kit}/tmp";
    fastcgi_temp_path "{kit}/tmp";
    uwsgi_temp_path "{kit}/tmp";
    scgi_temp_path "{kit}/tmp";
    upstream superlink {{
        server {address};
        keepalive 32;
        keepalive_timeout 3s;
    }}
    server {{
        listen {port} ssl;{and_ipv6}
        ssl_certificate "{kit}/server.pem";
        ssl_certificate_key "{kit}/server.key";
        ssl_client_certificate "{kit}/ca.pem";
        ssl_verify_client on;
        ssl_protocols TLSv1.2 TLSv1.3;
        error_page 495 496 =403 @refused;
        location @refused {{
            default_type text/plain;
            return 403 "this certificate is refused: $ssl_client_verify";
        }}
        client_max_body_size 65m;
        proxy_request_buffering off;
        location = /v1/fleet/register-node {{ return 403; }}
        location = /v1/fleet/unregister-node {{ return 403; }}
        location /v1/fleet/ {{
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_ssl_trusted_certificate "{kit}/ca.pem";
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_max_temp_file_size 0;
            proxy_read_timeout 300s;
        }}
        location / {{ return 403; }}
    }}
}}
"""


def server_programs(folder: Path) -> list[Program]:
    """Return what runs at the server: the SuperLink on loopback, nginx in front of it, the courier beside it.

    Raises:
        EngineError: nginx is not installed.
    """
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if nginx is None:
        raise EngineError(
            "nginx, which lets the sites reach Flower's Fleet API and nothing else, is not installed. Install it, on "
            "Debian and Ubuntu: apt install nginx-light"
        )
    kit = folder / "kit"
    if unusable := set(str(kit)) & set('"$\\\n'):
        raise EngineError(f"nginx cannot be given the path {kit}, for its {' '.join(map(repr, unusable))}. Rename it.")
    port = json.loads((kit / "server.json").read_text(encoding="utf-8"))["port"]
    address = f"127.0.0.1:{_free_port()}"
    and_ipv6 = f" listen [::]:{port} ssl;" if socket.has_dualstack_ipv6() else ""
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    (kit / "tmp").mkdir(exist_ok=True)
    (kit / "nginx.conf").write_text(NGINX.format(kit=kit, port=port, address=address, user=user, and_ipv6=and_ipv6))
    superlink = ["--ssl-certfile", kit / "server.pem", "--ssl-keyfile", kit / "server.key"]
    superlink += ["--ssl-ca-certfile", kit / "ca.pem", "--enable-supernode-auth", "--isolation", "process"]
    superlink += ["--superexec-auth-secret-file", kit / "superexec.secret"]
    superlink += ["--disable-runtime-dependency-installation"]
    superlink += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    start = "from flwr.superlink.cli.flower_superlink import flower_superlink; flower_superlink()"
    environment = {**ENVIRONMENT, "FLWR_HOME": str(kit / "flwr")}
    return [
        Program("engine", [sys.executable, "-c", start, *map(str, superlink)], kit, environment),
        Program("nginx", [nginx, "-p", str(kit), "-c", str(kit / "nginx.conf"), "-g", "daemon off;"], kit),
        Program("courier", [sys.executable, "-m", f"{COURIERS}.server", str(folder), address], folder, environment),
    ]


def site_programs(folder: Path, name: str) -> list[Program]:
    """Return what runs at a site beside its worker: the courier."""
    environment = {**ENVIRONMENT, "FLWR_HOME": str(folder / "kit" / "flwr")}
    return [Program("engine", [sys.executable, "-m", f"{COURIERS}.site", str(folder), name], folder, environment)]


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]
