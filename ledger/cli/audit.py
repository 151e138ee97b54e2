"""`tributary audit`: read a whole log again and say what is wrong with it, to the byte."""

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from ledger.cli.context import Json, err, out, print_json
from ledger.cli.places import to_audit, warn_own_word
from ledger.config import load_settings
from ledger.log.audit import audit_log
from ledger.log.audit_report import Report, Step

WRONG_EXIT = 1
COLOURS = {"ok": "green", "wrong": "bold red", "skipped": "yellow"}
SHOWN_FINDINGS = 20


def register(root: typer.Typer) -> None:
    root.command()(audit)


def audit(
    place: Annotated[
        str | None,
        typer.Argument(metavar="URL|DIR|DATABASE_URL", help="The log; else this home's database."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="VKEY", help="The log's key, got from elsewhere.")
    ] = None,
    signatures: Annotated[
        bool, typer.Option(help="Check the form, body and signature of each event.")
    ] = True,
    pymerkle: Annotated[
        bool, typer.Option(help="Rebuild the tree by pymerkle too (extra `audit`).")
    ] = True,
    jobs: Annotated[
        int, typer.Option(min=1, max=64, help="Processes.", show_default="cores")
    ] = os.cpu_count() or 1,
    as_json: Json = False,
) -> None:
    """Read every entry again, rebuild the tree, compare all that is stored; exit 1 when wrong."""
    with to_audit(place, key, load_settings()) as found:
        if found.own_word:
            warn_own_word(found.key)
        report = audit_log(
            found.open_reader,
            found.key,
            signatures=signatures,
            pymerkle=pymerkle,
            jobs=jobs,
            progress=_progress,
        )
    if sys.stderr.isatty():
        err.print(end="\r")
    if as_json:
        print_json(report.json())
    else:
        _say(report)
    raise typer.Exit(0 if report.ok else WRONG_EXIT)


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        err.print(f"{done:,} of {of:,} entries", end="\r")


def _say(report: Report) -> None:
    for number, step in enumerate(report.steps, 1):
        out.print(_line(number, step))
    rate = report.entries / report.seconds if report.seconds else 0
    out.print(f"{report.entries:,} entries in {report.seconds:.1f} s, {rate:,.0f}/s")
    if report.ok:
        out.print("[bold green]Nothing is wrong.[/bold green]")
        return
    out.print(f"[bold red]{len(report.findings)} wrong; the first bad byte:[/bold red]")
    for finding in report.findings[:SHOWN_FINDINGS]:
        out.print(f"  {escape(str(finding))}")
    if len(report.findings) > SHOWN_FINDINGS:
        out.print(f"  and {len(report.findings) - SHOWN_FINDINGS} more (--json has them)")


def _line(number: int, step: Step) -> str:
    colour = COLOURS[step.state]
    return (
        f"{number}. [{colour}]{step.state:<7}[/{colour}] {step.name + ':':<15} {escape(step.says)}"
    )
