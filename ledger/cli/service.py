"""Running the service: up, serve, migrate, doctor."""

import contextlib
import signal
import threading
from typing import Annotated

import typer

from ledger.cli.context import Json, listing, out
from ledger.config import load_settings
from ledger.errors import ConfigError, Unavailable


def register(root: typer.Typer) -> None:
    root.command()(up)
    root.command()(serve)
    root.command()(migrate)
    root.command()(doctor)
    root.command()(login)


def up() -> None:
    """Run the whole service in the foreground; Ctrl-C stops it in order."""
    from ledger.processes.supervisor import running

    settings = load_settings()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    def say(what: str, detail: str) -> None:
        out.print(f"  [bold]{what:<11}[/bold]", end="")
        out.print(detail, markup=False, soft_wrap=True)

    out.print(f"[bold]Tributary[/bold] in {settings.root}")
    with running(settings, say) as service:
        url = service.settings.url
        try:
            ready = service.wait_ready(stop=stop)
        except Unavailable as error:
            if not service.lives():
                raise
            # It answers and appends; witnesses that are away, say, may come back by themselves.
            ready = False
            out.print("\n[bold yellow]Not ready, and going on:[/bold yellow] ", end="")
            out.print(f"{error.message}\n{url}/readyz says when it is.\n", markup=False)
        if ready:
            about = f"(API: {url}/docs, log: {url}/log/)"
            out.print(f"\n[bold green]Ready.[/bold green] {url}  {about}")
            out.print("Training and serving follow when Ray is up. Ctrl-C stops everything.\n")
        service.watch(stop, say)
        out.print("stopping...")
    out.print("stopped; everything is on disk")


def serve(role: Annotated[str, typer.Argument(help="api, projector, chain or workers.")]) -> None:
    """Run one process of the service (an operator with a process manager of their own)."""
    from ledger.processes.roles import ROLES, main

    if role not in ROLES:
        raise ConfigError(f"no process {role!r}; choose one of {', '.join(ROLES)}")
    raise typer.Exit(main(role))


def migrate() -> None:
    """Bring the database's tables up to date."""
    from ledger import bootstrap
    from ledger.store.migrate import migrate as apply

    settings = load_settings()
    with bootstrap.reachable_database(settings) as url:
        applied = apply(url)
    out.print("\n".join(applied) if applied else "nothing to do: the tables are up to date")


def doctor(as_json: Json = False) -> None:
    """Say what is wrong and what to do: database, signer, witnesses, chain, Ray, replicas,
    keys, disk, clock."""
    from ledger.processes.doctor import examine

    findings = examine(load_settings())
    rows = [{"check": f.check, "state": f.state, "detail": f.detail, "do": f.do} for f in findings]
    if as_json:
        listing(rows, [], as_json=True)
    else:
        for f in findings:
            colour = {"ok": "green", "warning": "yellow", "problem": "red"}[f.state]
            out.print(f"[{colour}]{f.state:<8}[/{colour}] {f.check:<13}", end="")
            out.print(f.detail, markup=False, soft_wrap=True)
            if f.do:
                out.print(f"{'':<23}-> {f.do}", markup=False, soft_wrap=True)
    if any(f.state == "problem" for f in findings):
        raise typer.Exit(7)


def login(
    who: Annotated[str, typer.Option("--as", metavar="KEY", help="Name of the key.")] = "me",
) -> None:
    """Print an API credential for your key, for OpenAI clients and curl."""
    from ledger.cli.context import client

    with contextlib.closing(client(who)) as ledger:
        out.print(ledger.login("cli"), soft_wrap=True)
