"""Receipts: the log's promises to this home, and whether it keeps them."""

import sys
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from ledger.cli.context import Json, api_url, client, out, print_json, receipt_path
from ledger.cli.places import folder_key, to_read
from ledger.client import now_us
from ledger.domain.canonical import canonical_json
from ledger.errors import InvalidEvent, NotFound
from ledger.files import write_durably
from ledger.log.receipts import hold_against
from ledger.verify.evidence import Evidence, format_evidence, one_line
from ledger.verify.note import VerifierKey, format_vkey
from ledger.verify.policy import MAX_POLICY_BYTES
from ledger.verify.receipt import MAX_RECEIPT_BYTES, Receipt, parse_receipt, verify_receipt
from ledger.verify.receipt_verdict import ReceiptVerdict

app = typer.Typer(name="receipt", no_args_is_help=True, help="The log's promises to you.")

EXIT_CODES = {"kept": 0, "broken": 1, "pending": 6}
"""6 is also what a retry is asked for with elsewhere; 1 also stands for a receipt that is none."""
NO_EVM = "The EVM signature was not checked: this needs `pip install 'tributary-ledger[server]'`."


@app.command()
def get(
    event: Annotated[str, typer.Argument(help="Event id or leaf index.")],
    to: Annotated[Path | None, typer.Option("--to", help="File to write.")] = None,
) -> None:
    """Ask for the receipt of an event again, and keep it."""
    with client() as ledger:
        found = ledger.get(f"/v1/events/{event}")
        data = canonical_json(ledger.receipt(int(found["index"])))
    parse_receipt(data)
    path = to or receipt_path(UUID(str(found["event"])))
    _write(path, data)
    out.print(f"{path}  now: tributary receipt check {path}", markup=False)


@app.command()
def check(
    receipt: Annotated[Path, typer.Argument(help="A receipt file.")],
    log: Annotated[
        str | None, typer.Option(metavar="URL|DIR", help="The log's files; else the ledger's.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="VKEY", help="The log's key, got from elsewhere.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A policy file that names the log's witnesses.")
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(help="Where evidence goes; else beside the receipt.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold a receipt against what the log shows. Exit code 0: kept; 6: pending, ask again; 1:
    broken, with an evidence file to hand on."""
    data = _read(receipt, MAX_RECEIPT_BYTES)
    source = to_read(log or api_url())
    vkey = folder_key(source, key)
    promised = verify_receipt(data, vkey)
    known = _read(policy, MAX_POLICY_BYTES) if policy is not None else None
    verdict = hold_against(source, promised, vkey, now=now_us(), policy=known)
    kept_at = None
    if verdict.evidence is not None:
        kept_at = evidence or receipt.with_name(f"{receipt.stem}.evidence.json")
        _write(kept_at, _evidence(verdict, promised, vkey))
    trusted = [*verdict.trusted, *_own_key(key), *_evm(promised)]
    if as_json:
        print_json({
            **verdict.to_json(),
            "trusted": trusted,
            "evidence": str(kept_at) if kept_at else None,
        })  # fmt: skip
    else:
        sys.stdout.write(verdict.to_text(trusted))
        if kept_at:
            sys.stdout.write(f"\nEvidence: {kept_at}; now: tributary evidence check {kept_at}\n")
    raise typer.Exit(EXIT_CODES[verdict.state])


def _evidence(verdict: ReceiptVerdict, receipt: Receipt, key: VerifierKey) -> bytes:
    assert verdict.evidence is not None
    return format_evidence(
        Evidence(
            kind="broken-receipt",
            log=receipt.promise.log,
            vkey=format_vkey(key),
            found_at=now_us(),
            says=one_line(verdict.says),
            items=verdict.evidence,
        )
    )


def _own_key(key: str | None) -> list[str]:
    if key is not None:
        return []
    return ["The key came from the log itself: give --key with one that you got elsewhere."]


def _evm(receipt: Receipt) -> list[str]:
    """Check the signature for contracts; what is left to be trusted about it."""
    if receipt.evm is None:
        return []
    from ledger.bootstrap import check_evm_receipt

    try:
        check_evm_receipt(receipt)
    except ModuleNotFoundError:
        return [NO_EVM]
    evm = receipt.evm
    return [
        f"That {evm.signer} is the log's account: the committer of {evm.contract} on chain "
        f"{evm.chain_id}, which its EVM signature names."
    ]


def _read(path: Path, limit: int) -> bytes:
    """At most one byte more than the format allows: enough to be refused."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    try:
        write_durably(path, data)
    except OSError as error:
        raise InvalidEvent(f"cannot write {path}: {error.strerror}") from error
