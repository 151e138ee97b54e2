"""Progress that a person enjoys: a live bar on a terminal, plain lines elsewhere, and a summary."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table


class Show:
    """What a person sees: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.number = 0

    def title(self, home: Path, rows: dict[str, list[Any]]) -> None:
        count = sum(map(len, rows.values()))
        self.console.print(
            f"\n[bold cyan]Tributary[/bold cyan]  {len(rows)} contributors, {count} rows of text\n"
            f"[dim]state in {home}[/dim]\n"
        )

    @contextmanager
    def step(self, text: str, total: int | None = None) -> Iterator["Bar"]:
        self.number += 1
        label = f"{self.number:>2}. {text}"
        started = time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn() if total else TextColumn(""),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            bar = Bar(progress, progress.add_task(label, total=total, note=""))
            try:
                yield bar
            except BaseException:
                self.number -= 1  # so that the next try has the same number
                raise
        seconds = time.monotonic() - started
        self.console.print(f"[green]✓[/green] {label}", end="")
        self.console.print(f"  {bar.result}", markup=False, style="dim", end="", soft_wrap=True)
        self.console.print(f"  [dim]({seconds:.1f} s)[/dim]")

    def detail(self, what: str, detail: str) -> None:
        self.console.print(f"     {what:<10} {detail}", markup=False, style="dim", soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(f"\n{text}", markup=False)

    def summary(self, facts: dict[str, Any], seconds: float) -> None:
        self.console.print("\n[bold]What happened[/bold]")
        for name, value in facts["table"].items():
            # Hashes stay whole: they are there to be copied.
            self.console.print(f"  [dim]{name:<12}[/dim] ", end="")
            self.console.print(str(value), markup=False, soft_wrap=True)
        statement = Table(
            "leaf", "event", "amount", "share", "of pool", box=None, header_style="dim"
        )
        for line in facts["statement"]:
            statement.add_row(*line)
        self.console.print(f"\n[bold]Statement of the top contributor, {facts['top']}[/bold]")
        self.console.print(statement)
        self.console.print("\n[bold]Look further[/bold]  (tributary up starts the service again)")
        for command in facts["commands"]:
            self.console.print(f"  {command}", markup=False, soft_wrap=True)
        self.console.print(f"\nDone in {seconds:.0f} s.")


class Bar:
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task
        self.result = ""

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)

    def to(self, completed: float, total: float | None = None) -> None:
        self._progress.update(self._task, completed=completed, total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def done(self, result: str) -> None:
        self.result = result
