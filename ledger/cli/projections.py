"""Projections: views that can be dropped and replayed from the log."""

import typer

from ledger.cli.context import out
from ledger.config import load_settings

app = typer.Typer(name="projections", no_args_is_help=True, help="Views over the log.")


@app.command()
def rebuild() -> None:
    """Drop every projected row and replay the log from zero; says whether the rows are the same."""
    from ledger import bootstrap

    with bootstrap.store(load_settings()) as store:
        runner = bootstrap.projection_runner(store)
        runner.catch_up()
        before, position = runner.digest(), runner.position()
        runner.rebuild()
        after = runner.digest()
        verdict = "the same rows" if before == after else "DIFFERENT rows: please report this"
        out.print(f"replayed {runner.position()} events (live was at {position}): {verdict}")
        out.print(f"digest {after}")
        if before != after and runner.position() == position:
            raise typer.Exit(1)


@app.command()
def status() -> None:
    """How far the projections are behind the log."""
    from ledger import bootstrap

    with bootstrap.store(load_settings()) as store:
        runner = bootstrap.projection_runner(store)
        out.print(f"position {runner.position()} of {store.entries.size()}")
