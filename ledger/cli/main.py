"""The `tributary` command. `tributary verify` runs with pynacl alone, as `python -m ledger.verify`
does: an auditor installs nothing else. Every other command needs the extra `client`."""

import sys


def main() -> None:
    if sys.argv[1:2] == ["verify"]:
        from ledger.verify.__main__ import main as verify

        sys.exit(verify(sys.argv[2:]))
    try:
        from ledger.cli.app import run
    except ModuleNotFoundError as error:
        sys.exit(
            f"{error.name} is not installed: this command needs "
            "`pip install 'tributary-ledger[client]'` (or [server], to run a ledger)"
        )
    run()


if __name__ == "__main__":
    main()
