"""What exists: datanets, contributions, runs, adapters, identities, roles, fee policies. Pure.

Shows the newest state of each thing; the history of a thing is its stream in `lineage`. What may
happen next was decided in `ledger.aggregates` before the event was stored, so a fold here only
records; an event about a thing that does not exist is an anomaly.
"""

from collections.abc import Mapping

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import Entry
from ledger.domain.events import ROLES
from ledger.ports import Key, Rows
from projections.base import Fold, Projection, change, table
from projections.payouts import BINDINGS

DATANETS = table(
    "datanets",
    key="datanet:text",
    columns="owner:text name:text description:text licence:text reviewers:text status:text "
    "contributions:int approved:int rows:int created_index:int created_at:int",
)
CONTRIBUTIONS = table(
    "contributions",
    key="contribution:text",
    columns="datanet:text contributor:text title:text licence:text rows_root:text rows_count:int "
    "rows_sha256:text status:text note:text index:int at:int decided_index:int? decided_by:text?",
)
RUNS = table(
    "runs",
    key="run:text",
    columns="requester:text name:text base_model:text base_id:text config:text datanets:text "
    "status:text attempt:int submission_id:text? requested_index:int requested_at:int "
    "started_index:int? finished_index:int? finished_at:int? manifest_sha256:text? "
    "adapter_sha256:text? adapter_config_sha256:text? index_sha256:text? index_root:text? "
    "rows_count:int? contributions_count:int? steps:int? loss:text? reason:text?",
)
ADAPTERS = table(
    "adapters",
    key="adapter:text",
    columns="run:text owner:text model:text adapter_sha256:text base_model:text "
    "input_wei_per_token:wei output_wei_per_token:wei status:text index:int at:int "
    "retired_index:int? reason:text?",
)
IDENTITIES = table(
    "identities", key="actor:text", columns="name:text? evm_address:text? index:int at:int"
)
ROLES_HELD = table("roles", key="member:text role:text", columns="index:int")
FEE_POLICIES = table(
    "fee_policies",
    key="version:int",
    columns="protocol_bps:int owner_bps:int operator_bps:int contributors_bps:int index:int",
)
LEDGERS = table("ledgers", key="log:text", columns="name:text opened_by:text index:int at:int")

_COMPLETED = (
    "manifest_sha256", "adapter_sha256", "adapter_config_sha256", "index_sha256", "index_root",
    "rows_count", "contributions_count", "steps", "loss", "attempt",
)  # fmt: skip


def _opened(rows: Rows, entry: Entry) -> None:
    event = entry.envelope
    row = {"name": event.body["name"], "opened_by": event.actor}
    rows.put(LEDGERS.name, (event.log,), {**row, **_here(entry)})
    # Whoever opens the ledger has every role until governance revokes it (ledger.aggregates).
    for role in ROLES:
        rows.put(ROLES_HELD.name, (event.actor, role), {"index": entry.index})


def _role_granted(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    rows.put(ROLES_HELD.name, (body["member"], body["role"]), {"index": entry.index})


def _role_revoked(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    rows.delete(ROLES_HELD.name, (body["member"], body["role"]))


def _policy_set(rows: Rows, entry: Entry) -> None:
    policy = dict(entry.envelope.body)
    rows.put(FEE_POLICIES.name, (policy.pop("version"),), {**policy, "index": entry.index})


def _registered(rows: Rows, entry: Entry) -> None:
    actor = entry.envelope.actor
    known = rows.get(IDENTITIES.name, (actor,)) or {"evm_address": None, **_here(entry)}
    rows.put(IDENTITIES.name, (actor,), {**known, "name": entry.envelope.body["name"]})


def _bound(rows: Rows, entry: Entry) -> None:
    # `payouts` has folded this event before us and decided whose address it is.
    actor = entry.envelope.actor
    binding = rows.get(BINDINGS.name, (actor,))
    known = rows.get(IDENTITIES.name, (actor,)) or {"name": None, **_here(entry)}
    address = binding["address"] if binding else None
    rows.put(IDENTITIES.name, (actor,), {**known, "evm_address": address})


def _datanet_created(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    row = {
        "owner": entry.envelope.actor,
        "name": body["name"],
        "description": body["description"],
        "licence": body["licence"],
        "reviewers": _json(body["reviewers"]),
        "status": "open",
        "contributions": 0,
        "approved": 0,
        "rows": 0,
        "created_index": entry.index,
        "created_at": entry.recorded_at,
    }
    rows.put(DATANETS.name, (body["datanet"],), row)


def _datanet_closed(rows: Rows, entry: Entry) -> None:
    change(rows, entry, DATANETS.name, (entry.envelope.body["datanet"],), status="closed")


def _contributed(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    fields = ("datanet", "title", "licence", "rows_root", "rows_count", "rows_sha256")
    row = {
        **{field: body[field] for field in fields},
        "contributor": entry.envelope.actor,
        "status": "recorded",
        "note": "",
        "decided_index": None,
        "decided_by": None,
        **_here(entry),
    }
    rows.put(CONTRIBUTIONS.name, (body["contribution"],), row)
    _count(rows, entry, body["datanet"], {"contributions": 1})


def _decided(status: str, note: str) -> Fold:
    """Fold for approved, rejected and withdrawn; `note` names the body's explaining field."""

    def fold(rows: Rows, entry: Entry) -> None:
        body = entry.envelope.body
        before = change(
            rows,
            entry,
            CONTRIBUTIONS.name,
            (body["contribution"],),
            status=status,
            note=body[note],
            decided_index=entry.index,
            decided_by=entry.envelope.actor,
        )
        if before is None:
            return
        step = (status == "approved") - (before["status"] == "approved")
        if step:
            steps = {"approved": step, "rows": step * before["rows_count"]}
            _count(rows, entry, before["datanet"], steps)

    return fold


def _run_requested(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    row = dict.fromkeys(RUNS.columns, None) | {
        "requester": entry.envelope.actor,
        "name": body["name"],
        "base_model": body["base_model"],
        "base_id": body["base_id"],
        "config": _json(body["config"]),
        "datanets": _json(body["datanets"]),
        "status": "requested",
        "attempt": 0,
        "requested_index": entry.index,
        "requested_at": entry.recorded_at,
    }
    rows.put(RUNS.name, (body["run"],), row)


def _run_started(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    change(
        rows,
        entry,
        RUNS.name,
        (body["run"],),
        status="started",
        attempt=body["attempt"],
        submission_id=body["submission_id"],
        started_index=entry.index,
    )


def _run_completed(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    done = {field: body[field] for field in _COMPLETED}
    change(rows, entry, RUNS.name, (body["run"],), status="completed", **_finished(entry), **done)


def _run_failed(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    more = {"attempt": body["attempt"], "reason": body["reason"]}
    change(rows, entry, RUNS.name, (body["run"],), status="failed", **_finished(entry), **more)


def _run_cancelled(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    more = {"reason": body["reason"]}
    change(rows, entry, RUNS.name, (body["run"],), status="cancelled", **_finished(entry), **more)


def _published(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    row = {
        "run": body["run"],
        "owner": entry.envelope.actor,
        "model": body["model"],
        "adapter_sha256": body["adapter_sha256"],
        "base_model": body["base_model"],
        "input_wei_per_token": int(body["input_wei_per_token"]),
        "output_wei_per_token": int(body["output_wei_per_token"]),
        "status": "published",
        "retired_index": None,
        "reason": None,
        **_here(entry),
    }
    rows.put(ADAPTERS.name, (body["adapter"],), row)


def _retired(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    change(
        rows,
        entry,
        ADAPTERS.name,
        (body["adapter"],),
        status="retired",
        retired_index=entry.index,
        reason=body["reason"],
    )


def _here(entry: Entry) -> dict[str, int]:
    return {"index": entry.index, "at": entry.recorded_at}


def _finished(entry: Entry) -> dict[str, int]:
    return {"finished_index": entry.index, "finished_at": entry.recorded_at}


def _json(value: object) -> str:
    return canonical_json(value).decode()


def _count(rows: Rows, entry: Entry, datanet: str, steps: Mapping[str, int]) -> None:
    row = rows.get(DATANETS.name, (datanet,)) or dict.fromkeys(steps, 0)
    counts = {name: row[name] + step for name, step in steps.items()}
    change(rows, entry, DATANETS.name, (datanet,), **counts)


def _wants(entry: Entry) -> list[tuple[str, Key]]:
    body, kind = entry.envelope.body, entry.envelope.type
    if kind.startswith("contribution."):
        return [
            (CONTRIBUTIONS.name, (body["contribution"],)),
            (DATANETS.name, (body["datanet"],)),
        ]
    if kind.startswith("identity."):
        return [(IDENTITIES.name, (entry.envelope.actor,))]
    return []


PROJECTION = Projection(
    name="catalogue",
    tables=(
        DATANETS, CONTRIBUTIONS, RUNS, ADAPTERS, IDENTITIES, ROLES_HELD, FEE_POLICIES, LEDGERS,
    ),
    folds={
        "ledger.opened": _opened,
        "role.granted": _role_granted,
        "role.revoked": _role_revoked,
        "fee_policy.set": _policy_set,
        "identity.registered": _registered,
        "identity.evm_bound": _bound,
        "datanet.created": _datanet_created,
        "datanet.closed": _datanet_closed,
        "contribution.recorded": _contributed,
        "contribution.approved": _decided("approved", "note"),
        "contribution.rejected": _decided("rejected", "reason"),
        "contribution.withdrawn": _decided("withdrawn", "reason"),
        "run.requested": _run_requested,
        "run.started": _run_started,
        "run.completed": _run_completed,
        "run.failed": _run_failed,
        "run.cancelled": _run_cancelled,
        "adapter.published": _published,
        "adapter.retired": _retired,
        "adapter.recalled": _retired,
    },
    wants=_wants,
)  # fmt: skip
