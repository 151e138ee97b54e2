"""`tributary monitor`: watch somebody's log, and shout when it breaks its rules."""

import logging
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ledger.cli.context import Json, err, home
from ledger.cli.monitor_report import Observer, metrics, say, say_time
from ledger.cli.monitor_setup import (
    l1_anchor,
    log_key,
    log_source,
    read_policy,
    slug,
    witness_sources,
)
from ledger.client import now_us
from ledger.errors import StorageError, Unavailable
from ledger.log.monitor import Monitor, Poll
from ledger.log.monitor_state import MonitorFolder

ALARM_EXIT, UNREACHABLE_EXIT = 1, 7
MAX_PAUSE_S = 300.0


def register(root: typer.Typer) -> None:
    root.command()(monitor)


def monitor(
    url: Annotated[
        str, typer.Argument(metavar="URL|DIR", help="A ledger, a log's base URL, or its folder.")
    ],
    key: Annotated[
        str | None, typer.Option(metavar="VKEY", help="The log's key, got from elsewhere.")
    ] = None,
    origin: Annotated[
        str | None, typer.Option(help="First line of its checkpoints, if not the key's name.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of this monitor; else in the home.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="One look, then exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 30.0,
    policy: Annotated[
        Path | None, typer.Option(help="Which witnesses are enough (c2sp.org/tlog-policy).")
    ] = None,
    ask_witnesses: Annotated[
        bool, typer.Option(help="Ask the policy's witnesses what they cosigned last.")
    ] = True,
    rpc: Annotated[
        str | None, typer.Option(metavar="URL", help="An EVM node to read the anchor from.")
    ] = None,
    contract: Annotated[
        str | None, typer.Option(help="The log's CheckpointAnchor; else as the log says.")
    ] = None,
    entries: Annotated[bool, typer.Option(help="Read every entry; without, proofs alone.")] = True,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on after an alarm, past bad entries.")
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Prometheus on 127.0.0.1; 0: a free one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Follow a log; exit 1 on an alarm, with the evidence saved, 7 when it cannot be reached."""
    # What is kept is said below, in our own words.
    logging.getLogger("ledger").addHandler(logging.NullHandler())
    with ExitStack() as stack:
        source = log_source(url, stack)
        rules = read_policy(policy)
        folder = state or home() / "monitors" / slug(url)
        vkey = log_key(key, rules, folder, source)
        log = origin or vkey.name
        memory = MonitorFolder(folder.expanduser().absolute(), log=log, key=vkey)
        stack.enter_context(memory.locked())
        watching = Monitor(
            source,
            memory,
            log=log,
            key=vkey,
            clock=now_us,
            policy=rules,
            anchor=l1_anchor(rpc, contract, url, stack),
            witnesses=witness_sources(rules, stack) if ask_witnesses else {},
            entries=entries,
            keep_going=keep_going,
        )
        observe = metrics(metrics_port, log)
        found = memory.evidence_files()
        if found:
            err.print(f"{found} evidence files of earlier looks lie in {memory.evidence}")
        stop = threading.Event()
        if not once:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
        code = _watch(watching, stop, observe, interval, once, keep_going, as_json)
    raise typer.Exit(code)


def _watch(
    watching: Monitor,
    stop: threading.Event,
    observe: Observer,
    interval: float,
    once: bool,
    keep_going: bool,
    as_json: bool,
) -> int:
    """Look until an alarm, or told to stop; the exit code."""
    alarmed, pause, told = False, interval, set[tuple[str, str]]()
    while True:
        try:
            poll = watching.poll()
        except Unavailable as error:
            if once or isinstance(error, StorageError):  # our own disk: waiting mends nothing
                raise
            observe(None)
            err.print(f"[yellow]{say_time()} not reachable:[/yellow] {escape(error.message)}")
            pause = min(MAX_PAUSE_S, pause * 2)
        else:
            observe(poll)
            new = [alarm for alarm in poll.alarms if (alarm.kind, alarm.says) not in told]
            told |= {(alarm.kind, alarm.says) for alarm in new}
            say(poll, new, as_json=as_json)
            alarmed, pause = alarmed or bool(poll.alarms), interval
            if once or (alarmed and not keep_going):
                return _exit_code(poll, alarmed)
        if stop.wait(pause):
            return ALARM_EXIT if alarmed else 0


def _exit_code(poll: Poll, alarmed: bool) -> int:
    if alarmed:
        return ALARM_EXIT
    return UNREACHABLE_EXIT if poll.unchecked else 0
