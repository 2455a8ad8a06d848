"""The commands of a real federation: `fedit federation` at the server, `fedit site` at the sites."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedit.console import (
    AsJson,
    Overrides,
    PluginFiles,
    Seed,
    Track,
    console,
    load,
    print_json,
    quiet,
    resumed,
    say,
)
from fedit.files import new_folder
from fedit.interfaces import ConfigError, DataError, FeditError

if TYPE_CHECKING:
    from fedit.federation import SitesJoined

federation_app = App(name="federation", help="Real sites: set up a federation, serve it, run rounds across it.")
site_app = App(name="site", help="At a site of a real federation: take part, and see what was asked and sent.")

Server = Annotated[Path, Parameter(help="The server's folder, which `fedit federation init` made")]


@federation_app.command
def init(
    folder: Path,
    /,
    *,
    sites: Annotated[str, Parameter(help="The sites' names, with commas between")],
    host: Annotated[str, Parameter(help="The server's name or address, as the sites reach it")] = "localhost",
    port: int = 8002,
    engine: Annotated[Literal["nvflare", "flower"], Parameter(help="What carries the messages")] = "nvflare",
) -> None:
    """Make the folders of the server and of every site: certificates, keys, settings, units for systemd.

    The same command with more sites adds these.
    """
    from fedit.deployment import FederationConfig, init_federation

    names = tuple(name.strip() for name in sites.split(",") if name.strip())
    if not names:
        raise ConfigError("--sites names no site. Give names with commas between: --sites north,south")
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected a number from 1 to 65535.")
    init_federation(folder, FederationConfig(engine=engine, host=host, port=port, sites=names))
    say(f"Server: {folder / 'server'}  (stays here, or goes to {host})")
    for name in names:
        say(f"Site:   {folder / 'sites' / name}  (goes to {name}, by a way that nobody else can read)")
    say(f"Keep {folder / 'authority'} offline: who has it can make sites.")
    say("At every site set `data` in site.toml, then:  fedit site start FOLDER")
    say(f"At the server:  fedit federation serve {shlex.quote(str(folder / 'server'))}")


@federation_app.command
def serve(
    server: Server,
    /,
    *,
    metrics_port: Annotated[
        int | None, Parameter(help="Serve metrics for Prometheus on this port of loopback, at /metrics")
    ] = None,
) -> None:
    """Run the engine's server, which sites connect to, until it is interrupted."""
    from fedit import deployment

    config = deployment.read_federation(server)
    say(f"Serving {len(config.sites)} sites at {config.host}:{config.port}. Logs: {server / 'logs'}")
    with _metrics(server, metrics_port):
        _until_interrupted(lambda stopped: deployment.serve(server, stopped))


@contextmanager
def _metrics(server: Path, port: int | None) -> Iterator[None]:
    if port is None:
        yield
        return
    try:
        from fedit.monitoring import metrics_served
    except ModuleNotFoundError as error:
        raise ConfigError("--metrics-port needs prometheus-client: pip install 'fedit[metrics]'") from error
    with metrics_served(server, port) as chosen:
        say(f"Metrics: http://127.0.0.1:{chosen}/metrics")
        yield


@federation_app.command
def run(
    recipe: str | None = None,
    /,
    *,
    server: Server,
    override: Overrides = None,
    plugin: PluginFiles = None,
    out: Annotated[Path | None, Parameter(help="The run folder; by default a new one, runs/RECIPE")] = None,
    resume: Annotated[Path | None, Parameter(help="Go on with the run in this folder")] = None,
    seed: Seed = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Run the rounds of RECIPE across the sites. Its rows are those of the sites; [partition] plays no part.

    The first interruption finishes the round, the second does not wait for it; both leave a run that --resume goes on
    with.
    """
    if resume is not None:
        config, recipe, plugin = resumed(resume, recipe, override, plugin, out, seed)
        folder = resume
    else:
        recipe = recipe or "default"
        config = load(recipe, override, plugin, seed)
        folder = out or new_folder(Path(recipe).stem)
    quiet()
    logging.getLogger("fedit.engines").setLevel(logging.INFO)
    from fedit.experiment import check_folder
    from fedit.federation import StoppedError, run_federation
    from fedit.live import LiveView
    from fedit.tracking import Mirror, wanted_trackers

    check_folder(folder, config, resume=resume is not None, at_sites=True)
    trackers = wanted_trackers(folder, track or ())
    go_on = f"fedit federation run --server {shlex.quote(str(server))} --resume {shlex.quote(str(folder))}"
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, _finish_round(stopped))
    say(f"Waiting for the sites, {config.engine.join_s:g} s at most; a round has {config.engine.deadline_s:g} s")
    try:
        with LiveView(console) as view, Mirror(folder, trackers, view) as mirror:
            result = run_federation(
                config, server, folder, mirror, _say_who, recipe=recipe, plugin_files=plugin or (), stopped=stopped
            )
    except (KeyboardInterrupt, StoppedError) as error:
        say(f"\n{'Stopped' if isinstance(error, StoppedError) else 'Interrupted'}. Go on with:\n  {go_on}")
        sys.exit(130)
    except (FeditError, OSError) as error:
        if (folder / "config.json").is_file() and not isinstance(error, ConfigError | DataError):
            error.add_note(f"What was finished is saved; go on with:\n  {go_on}")
        raise
    say("\n".join([f"Report:  {folder / 'report.html'}", f"Adapter: {folder / 'adapter'}", *mirror.summary()]))
    if as_json:
        print_json({"folder": str(folder), "rounds": list(result.rounds)})


@federation_app.command
def check(
    recipe: str = "default",
    /,
    *,
    server: Server,
    override: Overrides = None,
    plugin: PluginFiles = None,
    as_json: AsJson = False,
) -> None:
    """Let every site load the base and its rows for RECIPE, and show what each has; nothing is trained."""
    config = load(recipe, override, plugin, None)
    quiet()
    from fedit.federation import check_sites
    from fedit.report.format import size

    ready, missing = check_sites(config, server)
    if as_json:
        print_json({"ready": ready, "missing": missing})
        return
    table = Table(box=None, pad_edge=False)
    for header in ("Site", "Clients", "Rows", "Held out", "Device", "Memory", "Slots", "torch", "Clock ahead"):
        table.add_column(header, justify="left" if header in ("Site", "Device", "torch") else "right")
    for name, site in ready.items():
        rows = f"{sum(site['clients'].values()):,}"
        cells = [name, str(len(site["clients"])), rows, str(site.get("held_out", "withheld")), site["device"]]
        cells += [
            size(site["memory_bytes"]),
            str(site.get("slots", "withheld")),
            site["torch"],
            f"{site['clock_ahead_s']:+.1f} s",
        ]
        table.add_row(*cells)
    console.print(table)
    for name, reason in missing.items():
        say(f"Site {name} is not ready: {reason}")


@federation_app.command
def status(
    server: Server,
    /,
    *,
    follow: Annotated[bool, Parameter(negative="", help="Show it again every two seconds, until interrupted")] = False,
    as_json: AsJson = False,
) -> None:
    """Show who is connected, what travelled, and how far the last run is."""
    from rich.live import Live

    from fedit.federation import federation_status

    if as_json:
        print_json(federation_status(server))
        return
    if not follow:
        console.print(_status_table(federation_status(server)), soft_wrap=True)
        return
    with (
        suppress(KeyboardInterrupt),
        Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live,
    ):
        while True:
            table = _status_table(federation_status(server))
            if console.is_terminal:
                live.update(table, refresh=True)
            else:
                console.print(table, soft_wrap=True)
            time.sleep(2)


def _status_table(status: Mapping[str, Any]) -> Group:
    from fedit.report.format import size

    table = Table(box=None, pad_edge=False)
    for header in ("Site", "Connected", "Last answer", "Down", "Up"):
        table.add_column(header, justify="right" if header in ("Down", "Up") else "left")
    for name, site in status["sites"].items():
        answered = "" if site["answered"] is None else f"{time.time() - site['answered']:.0f} s ago"
        table.add_row(name, "yes" if site["connected"] else "no", answered, size(site["down"]), size(site["up"]))
    run = status["run"]
    lines = ["No run yet."]
    if run:
        lines = [f"Run {run['folder']}: {run['rounds_done']} of {run['rounds']} rounds"]
        lines += [
            f"  round {failure['round']}: {failure['client']}: {failure['reason']}" for failure in run["failures"]
        ]
    return Group(table, *(Text(line) for line in lines))


@site_app.command
def start(folder: Path, /) -> None:
    """Take part in the federation with the folder that its maker sent, until interrupted."""
    from fedit import deployment
    from fedit.engines.site_folder import SiteFolder

    site = SiteFolder.read(folder)
    say(f"Site {site.name}: rows {site.config.data}. Logs: {site.path / 'logs'}. What leaves: fedit site log {folder}")
    _until_interrupted(lambda stopped: deployment.start_site(folder, stopped))


@site_app.command
def identity(folder: Path, /, *, as_json: AsJson = False) -> None:
    """Show what other sites know this one by in secure aggregation: it goes under [peers] of site.toml."""
    from fedit.engines.identities import own_identity, public_identity
    from fedit.engines.site_folder import SiteFolder

    site = SiteFolder.read(folder)
    public = public_identity(own_identity(site.path))
    if as_json:
        print_json({site.name: public})
    else:
        say(f'{site.name} = "{public}"')


@site_app.command(name="log")
def show_log(folder: Path, /, *, as_json: AsJson = False) -> None:
    """Show what this site was asked and what it sent."""
    from fedit.engines.site_folder import SiteFolder
    from fedit.report.format import size

    lines = list(SiteFolder.read(folder).logged())
    if as_json:
        print_json(lines)
        return
    table = Table(box=None, pad_edge=False)
    for header in ("Time", "Event", "Round", "Client", "Bytes", "Norm", "Hash or reason"):
        table.add_column(header, justify="right" if header in ("Round", "Bytes", "Norm") else "left", no_wrap=True)
    for line in lines:
        num_bytes = line.get("bytes", line.get("received"))
        table.add_row(
            line["time"][:19].replace("T", " "),
            line["event"],
            str(line["round"] + 1) if "round" in line else "",
            line.get("client", ""),
            "" if num_bytes is None else size(num_bytes),
            f"{line['norm']:.4g}" if "norm" in line else "",
            str(line.get("sha256", ""))[:12] or str(line.get("reason", "")),
        )
    console.print(table)


def _say_who(joined: SitesJoined) -> None:
    for site, reason in joined.missing.items():
        say(f"Site {site} takes no part: {reason}")
    say(f"{len(joined.clients)} clients: " + ", ".join(f"{name} ({n:,} rows)" for name, n in joined.clients.items()))


def _finish_round(stopped: threading.Event) -> Callable[..., None]:
    def interrupted(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        say("The round is finished first; interrupt again to stop now.")

    return interrupted


def _until_interrupted(work: Callable[[threading.Event], None]) -> None:
    logging.getLogger("fedit").setLevel(logging.INFO)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    work(stopped)
