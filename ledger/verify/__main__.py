"""`python -m ledger.verify FILE`: verify a lineage bundle with everything else switched off.

Needs Python and PyNaCl. Reads one file (`-` is standard input), prints the verdict, exits 0; or
says what failed and exits 1. With `--packet FILE`, an audit packet, the verdict is about one row's
score on the answer of the bundle. Exit 4: no such file; 2: wrong usage; 8: a bug of this verifier.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ledger.errors import LedgerError, MalformedProof, NotFound
from ledger.verify import packet
from ledger.verify.bundle import MAX_BUNDLE_BYTES, STEP_NAMES, verify_bundle
from ledger.verify.encoding import printable
from ledger.verify.note import parse_vkey
from ledger.verify.policy import MAX_POLICY_BYTES, Policy, parse_policy

MAX_MESSAGE_CHARS = 2_000
BUG_EXIT_CODE = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check_keys(parser, arguments)
    steps = STEP_NAMES
    try:
        data = _read(arguments.file, MAX_BUNDLE_BYTES)
        verdict = verify_bundle(
            data,
            trusted_vkey=arguments.key,
            witness_vkeys=arguments.witness,
            policy=_policy(arguments.policy),
            require_l1=arguments.require_l1,
        )
        if arguments.packet is not None:
            steps = packet.STEP_NAMES
            shown = _read(arguments.packet, packet.MAX_PACKET_BYTES)
            verdict = packet.check_packet(shown, bundle=data, trusted_vkey=arguments.key)
    except LedgerError as error:
        return _failed(error, steps, as_json=arguments.json)
    except Exception as error:
        # Hostile bytes must not look like a crash, and a crash must not look like a verdict.
        message = printable(f"{type(error).__name__}: {error}", MAX_MESSAGE_CHARS)
        print(f"NOT VERIFIED: a bug of this verifier: {message}", file=sys.stderr)
        return BUG_EXIT_CODE
    if arguments.json:
        print(json.dumps(verdict.to_json(), indent=2))
    else:
        print(f"VERIFIED\n\n{verdict.to_text()}", end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ledger.verify", description="Verify a lineage bundle offline."
    )
    parser.add_argument("file", help="a .lineage.json file, or - for standard input")
    parser.add_argument("--key", metavar="VKEY", help="the log's public key, got from elsewhere")
    parser.add_argument(
        "--witness", metavar="VKEY", action="append", default=[], help="a witness you know"
    )
    parser.add_argument(
        "--policy",
        metavar="FILE",
        help="a witness policy (c2sp.org/tlog-policy): fail unless its quorum cosigned",
    )
    parser.add_argument(
        "--packet", metavar="FILE", help="an audit packet: prove one row's score on the answer"
    )
    parser.add_argument("--require-l1", action="store_true", help="fail unless the L1 part checks")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON")
    return parser


def _check_keys(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """A slip in an option is no fault of the file: wrong usage, not a verdict."""
    keys = [] if arguments.key is None else [("--key", arguments.key)]
    for option, vkey in [*keys, *(("--witness", w) for w in arguments.witness)]:
        try:
            parse_vkey(vkey)
        except MalformedProof as error:
            parser.error(f"argument {option}: {printable(error.message, MAX_MESSAGE_CHARS)}")


def _policy(name: str | None) -> Policy | None:
    return None if name is None else parse_policy(_read(name, MAX_POLICY_BYTES))


def _read(name: str, limit: int) -> bytes:
    """At most one byte more than there may be: enough to be refused."""
    try:
        if name == "-":
            return sys.stdin.buffer.read(limit + 1)
        with Path(name).open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise NotFound(f"cannot read {printable(name)}: {error.strerror}") from error


def _failed(error: LedgerError, steps: Mapping[int, str], *, as_json: bool) -> int:
    if as_json:
        problem = {"verified": False, "error": error.slug, "message": str(error)}
        print(json.dumps({**problem, "detail": error.detail}, indent=2, default=str))
        return error.exit_code
    message = printable(str(error), MAX_MESSAGE_CHARS)
    print(f"NOT VERIFIED: {error.title.lower()}: {message}", file=sys.stderr)
    step = error.detail.get("step")
    if isinstance(step, int):
        print(
            f"It failed in step {step}, {steps[step]}. Believe nothing that the file says.",
            file=sys.stderr,
        )
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
