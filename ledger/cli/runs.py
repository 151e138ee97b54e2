"""Training runs: fine-tune without code. The worker turns a request into a Ray job."""

from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from ledger.cli.context import As, Json, client, listing, out, show
from ledger.cli.places import given_key
from ledger.domain.envelope import decode_entry
from ledger.domain.ids import check_uuid, sha256_hex
from ledger.errors import Conflict, Inconsistent, InvalidEvent, NotFound
from ledger.verify.bundle import verify_bundle
from ledger.verify.bundle_format import MAX_BUNDLE_BYTES, parse_bundle
from ledger.verify.manifest import parse_manifest

app = typer.Typer(name="run", no_args_is_help=True, help="Train LoRA adapters.")

COLUMNS = ["run", "name", "status", "attempt", "adapter_sha256"]
FINISHED = ("completed", "failed", "cancelled")
MAX_ROWS_SAID = 20


@app.command()
def request(
    name: Annotated[str, typer.Argument(help="A name for the run.")],
    datanet: Annotated[list[str], typer.Option(help="Datanets to train on; may be repeated.")],
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Training setting.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end.")] = False,
    who: As = "me",
) -> None:
    """Request a training run on the approved rows of datanets."""
    run = str(uuid4())
    with client(who) as ledger:
        base = ledger.get("/v1/info")["base_model"]
        body = {
            "run": run,
            "name": name,
            "datanets": datanet,
            "base_model": base["digest"],
            "base_id": base["id"],
            "config": settings_from(option or []),
        }
        ledger.append("run.requested", body)
        out.print(run)
        if wait:
            done = ledger.wait_until(
                f"/v1/runs/{run}", lambda r: r["status"] in FINISHED, timeout_s=3_600
            )
            show(done, as_json=False)


@app.command()
def cancel(run: str, reason: Annotated[str, typer.Option()] = "", who: As = "me") -> None:
    """Cancel a run of yours."""
    with client(who) as ledger:
        out.print(ledger.append("run.cancelled", {"run": run, "reason": reason}))


@app.command("list")
def list_runs(status: Annotated[str | None, typer.Option()] = None, as_json: Json = False) -> None:
    """Training runs."""
    with client() as ledger:
        listing(list(ledger.pages("/v1/runs", status=status)), COLUMNS, as_json=as_json)


@app.command("show")
def show_run(run: str, as_json: Json = False) -> None:
    """One run."""
    with client() as ledger:
        show(ledger.get(f"/v1/runs/{run}"), as_json=as_json)


@app.command()
def excludes(
    run: str,
    contribution: str,
    bundle: Annotated[
        Path | None, typer.Option(help="A lineage bundle with the run: needs no network.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The log's key that you trust.")] = None,
    as_json: Json = False,
) -> None:
    """Show from a run's training manifest that no row of a contribution is in it.

    The manifest is held against the hash that `run.completed` commits to;
    with --bundle, that one is verified in its log, too. Exit 1 where the run
    was trained on the contribution."""
    given_key(key)  # a slip here is no fault of the bundle
    check_uuid(run, "run")
    check_uuid(contribution, "contribution")  # whatever else is written so is in no manifest
    if bundle is not None:
        event, data = completed_in(read_bundle(bundle), run, key)
    else:
        event, data = _completed(run, contribution)
    rows = parse_manifest(data).rows
    used = sorted(rows.get(contribution, ()))
    found = {
        "excluded": not used,
        "run": run,
        "contribution": contribution,
        "rows": used,
        "manifest_sha256": sha256_hex(data),
        "manifest_rows": sum(map(len, rows.values())),
        "index": event,
        "verified": bundle is not None,
    }
    if as_json:
        show(found, as_json=True)
    else:
        _say_excluded(found)
    raise typer.Exit(1 if used else 0)


def _completed(run: str, contribution: str) -> tuple[int, bytes]:
    """Leaf index of a run's run.completed, and the manifest that it names, as the ledger says."""
    with client() as ledger:
        # Asked for first: an id that nobody has is left out of every manifest.
        ledger.get(f"/v1/contributions/{contribution}")
        row = ledger.get(f"/v1/runs/{run}")
        if row["status"] != "completed":
            raise Conflict(f"the run is {row['status']}: only a completed one has a manifest")
        event = ledger.get(f"/v1/events/{row['finished_index']}")
        if (event["type"], event["body"].get("run")) != ("run.completed", run):
            raise Inconsistent(f"entry {row['finished_index']} is not the run.completed of {run}")
        name = event["body"]["manifest_sha256"]
        data = ledger.get_blob(name)
    if sha256_hex(data) != name:
        raise Inconsistent(f"the manifest that the ledger gave is not {name}")
    return int(event["index"]), data


def completed_in(data: bytes, run: str, vkey: str | None) -> tuple[int, bytes]:
    """The same out of a lineage bundle, after verifying all of it. Raises VerificationError,
    NotFound when the run's end is not in it."""
    verify_bundle(data, trusted_vkey=vkey)
    bundle = parse_bundle(data)
    for item in bundle.entries:
        entry = decode_entry(item.entry, verify=False)
        body = entry.envelope.body
        if (entry.envelope.type, body.get("run")) == ("run.completed", run):
            return entry.index, bundle.blobs[body["manifest_sha256"]]
    raise NotFound(f"no run.completed of {run} is in this bundle: take that of the run itself")


def read_bundle(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error


def _say_excluded(found: dict[str, Any]) -> None:
    rows = found["rows"]
    if found["excluded"]:
        out.print(
            f"run {found['run']} leaves out contribution {found['contribution']}: none of its rows "
            f"is among the {found['manifest_rows']} that it was trained on"
        )
    else:
        shown = ", ".join(map(str, rows[:MAX_ROWS_SAID]))
        more = ", ..." if len(rows) > MAX_ROWS_SAID else ""
        out.print(
            f"run {found['run']} was trained on {len(rows)} of the rows of contribution "
            f"{found['contribution']}: {shown}{more}"
        )
    out.print(f"manifest {found['manifest_sha256']}, by run.completed at index {found['index']}")
    if found["verified"]:
        out.print("verified in the log that the bundle names; `tributary verify` says the rest")
    else:
        out.print(f"to prove it offline: tributary log bundle {found['index']}, then --bundle FILE")


def settings_from(options: list[str]) -> dict[str, object]:
    """`--set r=8 --set lr=0.001 --set target_modules=q_proj,v_proj`; floats stay strings."""
    config: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise InvalidEvent(f"--set takes KEY=VALUE, not {option!r}")
        if "," in value:
            config[key] = value.split(",")
        else:
            config[key] = int(value) if value.isascii() and value.isdigit() else value
    return config
