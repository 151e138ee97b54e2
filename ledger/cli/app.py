"""Every command of `tributary`, gathered: one module per noun, errors mapped to exit codes.

Exit codes are those of `ledger.errors`: 0 done, 1 verification failed, 2 bad input, 3 not allowed,
4 not found, 5 conflict, 6 retry later, 7 an engine is down, 8 configuration. Never a traceback for
an error that we designed; `TRIBUTARY_DEBUG=1` shows it all the same.
"""

import os
import sys

import typer

from ledger.cli import (
    accounts,
    adapters,
    attribution,
    audit,
    consent,
    contributions,
    datanets,
    demo,
    evidence,
    identities,
    keys,
    log,
    monitor,
    periods,
    projections,
    receipts,
    runs,
    service,
    verifier,
    witness,
)
from ledger.cli.context import err, plain
from ledger.errors import LedgerError

app = typer.Typer(
    name="tributary",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Whose data made this model, whose data shaped this answer, and who was paid.",
)
for module in (
    keys, identities, datanets, contributions, runs, adapters, accounts, periods, log, projections,
    verifier,
    witness, receipts, evidence, attribution,
):  # fmt: skip
    app.add_typer(module.app)
consent.register(contributions.app)
service.register(app)
demo.register(app)
log.register(app)
audit.register(app)
monitor.register(app)


def run() -> None:
    try:
        app(standalone_mode=True)
    except LedgerError as error:
        if os.environ.get("TRIBUTARY_DEBUG"):
            raise
        err.print(f"[bold red]{error.title}[/bold red]: ", end="")
        err.print(plain(error.message), markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`tributary ... | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
