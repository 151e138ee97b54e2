"""What `tributary monitor` says: lines for people, JSON and Prometheus metrics for programs."""

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape

from ledger.cli.context import err, out
from ledger.client import now_us
from ledger.domain.canonical import canonical_json
from ledger.errors import ConfigError
from ledger.log.monitor import Poll
from ledger.log.monitor_findings import Alarm
from ledger.verify.encoding import printable

ADVICE = {
    "split-view": "Stop relying on this log. Publish the file: it convinces everybody.",
    "inconsistent": "Stop relying on this log until it is explained; publish the file.",
    "rollback": "Ask others, and the log's witnesses, which size they see; a cache is the harmless "
    "reason, a restored backup or a fork is not.",
    "wrong-size": "Entries are withheld or were left out. Ask others whether they get them.",
    "bad-entry": "Somebody wrote to the log past its rules. Read the entry, ask the operator; "
    "--keep-going goes past it.",
    "misplaced-entry": "Entries were moved. Stop relying on this log until it is explained.",
    "anchor-mismatch": "The chain holds another history. Check node and contract, then publish the "
    "file.",
    "witness-conflict": "Ask the witnesses named; do not count checkpoints like this one as "
    "witnessed.",
    "bad-checkpoint": "Somebody else answers at this address, or the log lost its key. Compare the "
    "key with its operator over another channel.",
}


def say(poll: Poll, alarms: list[Alarm], *, as_json: bool) -> None:
    if as_json:
        out.print(canonical_json(_poll_json(poll)).decode(), markup=False)
        return
    root = poll.root.hex()[:16] if poll.root else "-"
    seen = f", witnessed by {', '.join(map(printable, poll.witnesses))}" if poll.witnesses else ""
    chain = f", anchored to {poll.anchored}" if poll.anchored is not None else ""
    if not poll.alarms:
        line = f"{poll.size} entries (+{poll.grown}, {poll.entries} read), root {root}"
        out.print(f"[green]{say_time()} fine:[/green] {escape(line + seen + chain)}")
    for kind, count in poll.unknown_types.items():
        text = f"{count} events of the type {printable(kind)}, which this version does not know"
        err.print(f"[yellow]not judged:[/yellow] {escape(text)}")
    for text in poll.unchecked:
        err.print(f"[yellow]not checked:[/yellow] {escape(text)}")
    for alarm in alarms:
        _say_alarm(alarm)
    if poll.more:
        err.print(f"[bold red]and {poll.more} more[/bold red]")


def _say_alarm(alarm: Alarm) -> None:
    err.print(f"[bold white on red] ALARM {alarm.kind} [/] [red]{escape(alarm.says)}[/red]")
    if alarm.path is None:
        err.print("  evidence: [red]could not be kept[/red] (disk or folder full?)")
    else:
        proof = "proves it to anybody" if alarm.conclusive else "your testimony"
        err.print(f"  evidence: {escape(str(alarm.path))} ({proof}; tributary evidence check FILE)")
    err.print(f"  now: {ADVICE[alarm.kind]}", markup=False)


def _poll_json(poll: Poll) -> dict[str, Any]:
    alarms = [{**asdict(a), "path": a.path and str(a.path)} for a in poll.alarms]
    return {
        **asdict(poll),
        "at": now_us(),
        "root": poll.root and poll.root.hex(),
        "witnesses": list(poll.witnesses),
        "alarms": alarms,
        "unchecked": list(poll.unchecked),
    }


def say_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


Observer = Callable[[Poll | None], None]


def metrics(port: int | None, log: str) -> Observer:
    """Serve Prometheus metrics; what it returns is told of each look, None for one that failed."""
    if port is None:
        return lambda poll: None
    try:
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is missing: --metrics-port needs `pip install "
            "'tributary-ledger[server]'`"
        ) from error
    registry = CollectorRegistry()
    name = "tributary_monitor"

    def gauge(what: str, about: str) -> Any:
        return Gauge(f"{name}_{what}", about, ["log"], registry=registry).labels(log)

    size = gauge("size", "Entries of the newest verified checkpoint.")
    last_ok = gauge("last_ok_seconds", "When a look last found nothing wrong, POSIX seconds.")
    reachable = gauge("reachable", "Whether the last look got answers.")
    read = Counter(f"{name}_entries", "Entries checked.", ["log"], registry=registry).labels(log)
    alarms = Counter(f"{name}_alarms", "Alarms, by kind.", ["log", "kind"], registry=registry)
    for kind in ADVICE:
        alarms.labels(log, kind)
    try:
        server, _ = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}") from error
    err.print(f"metrics: http://127.0.0.1:{server.server_port}/metrics", markup=False)

    def observe(poll: Poll | None) -> None:
        reachable.set(poll is not None)
        if poll is None:
            return
        size.set(poll.size)
        read.inc(poll.entries)
        for alarm in poll.alarms:
            alarms.labels(log, alarm.kind).inc()
        if not poll.alarms:
            last_ok.set(time.time())

    return observe
