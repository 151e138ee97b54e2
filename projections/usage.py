"""What was asked and answered: inferences, attributions, counters; anchored checkpoints. Pure.

Counters of fees count what was charged and posted, not what an inference announced. An answer that
broke off (`finish_reason` INTERRUPTED) is listed, and counted nowhere. Prompts and answers are not
here: an event holds only their commitments.
"""

from ledger.domain.envelope import Entry
from ledger.ports import Key, Rows
from projections.balances import POOLS
from projections.base import Projection, anomaly, change, table

INTERRUPTED = "interrupted"
INFERENCES = table(
    "inferences",
    key="inference:text",
    columns="index:int at:int adapter:text consumer:text operator:text prompt_commitment:text "
    "output_commitment:text transcript_sha256:text prompt_tokens:int completion_tokens:int "
    "max_tokens:int seed:int temperature_ppm:int top_p_ppm:int finish_reason:text fee_wei:wei "
    "fee_index:int? attribution_index:int?",
)
ATTRIBUTIONS = table(
    "attributions",
    key="inference:text",
    columns="index:int at:int adapter:text run:text method:text index_sha256:text "
    "evidence_sha256:text unattributed_ppm:int attributor:text",
)
SHARES = table("shares", key="inference:text contributor:text", columns="ppm:int")
_COUNTERS = "inferences:int prompt_tokens:int completion_tokens:int fees_wei:wei"
ADAPTER_USAGE = table("adapter_usage", key="adapter:text", columns=_COUNTERS)
CONSUMER_USAGE = table("consumer_usage", key="consumer:text", columns=_COUNTERS)
ANCHORS = table(
    "anchors",
    key="size:int",
    columns="root:text chain_id:int contract:text tx_hash:text block_number:int block_hash:text "
    "l1_sha256:text index:int at:int",
)

_COPIED = (
    "adapter", "consumer", "prompt_commitment", "output_commitment", "transcript_sha256",
    "prompt_tokens", "completion_tokens", "max_tokens", "seed", "temperature_ppm", "top_p_ppm",
)  # fmt: skip


def _listed(rows: Rows, entry: Entry, finish_reason: str, fee_wei: int) -> None:
    body = entry.envelope.body
    row = {
        **{field: body[field] for field in _COPIED},
        "index": entry.index,
        "at": entry.recorded_at,
        "operator": entry.envelope.actor,
        "finish_reason": finish_reason,
        "fee_wei": fee_wei,
        "fee_index": None,
        "attribution_index": None,
    }
    rows.put(INFERENCES.name, (body["inference"],), row)


def _interrupted(rows: Rows, entry: Entry) -> None:
    _listed(rows, entry, INTERRUPTED, 0)


def _inferred(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    _listed(rows, entry, body["finish_reason"], int(body["fee_wei"]))
    tokens = {field: body[field] for field in ("prompt_tokens", "completion_tokens")}
    _count(rows, ADAPTER_USAGE.name, body["adapter"], inferences=1, **tokens)
    _count(rows, CONSUMER_USAGE.name, body["consumer"], inferences=1, **tokens)


def _charged(rows: Rows, entry: Entry) -> None:
    # `balances` has folded this event before us; it refuses a fee that the account cannot pay.
    body = entry.envelope.body
    pool = rows.get(POOLS.name, (body["inference"],))
    if pool is None or pool["fee_index"] != entry.index:
        return
    change(rows, entry, INFERENCES.name, (body["inference"],), fee_index=entry.index)
    fees_wei = int(body["amount_wei"])
    _count(rows, ADAPTER_USAGE.name, body["adapter"], fees_wei=fees_wei)
    _count(rows, CONSUMER_USAGE.name, body["account"], fees_wei=fees_wei)


def _attributed(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    inference = body["inference"]
    if rows.get(ATTRIBUTIONS.name, (inference,)) is not None:
        return  # `balances` has recorded the anomaly
    fields = ("adapter", "run", "method", "index_sha256", "evidence_sha256", "unattributed_ppm")
    row = {
        **{field: body[field] for field in fields},
        "index": entry.index,
        "at": entry.recorded_at,
        "attributor": entry.envelope.actor,
    }
    rows.put(ATTRIBUTIONS.name, (inference,), row)
    for share in body["shares"]:
        rows.put(SHARES.name, (inference, share["contributor"]), {"ppm": share["ppm"]})
    change(rows, entry, INFERENCES.name, (inference,), attribution_index=entry.index)


def _anchored(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    known = rows.get(ANCHORS.name, (body["size"],))
    if known is not None and known["root"] != body["root"]:
        message = f"size {body['size']} was anchored with root {known['root']} before"
        anomaly(rows, entry, "root_mismatch", message)
        return
    anchor = {**body, "contract": body["contract"].lower(), "index": entry.index}
    del anchor["size"]
    rows.put(ANCHORS.name, (body["size"],), {**anchor, "at": entry.recorded_at})


def _count(rows: Rows, name: str, subject: str, **steps: int) -> None:
    row = rows.get(name, (subject,)) or dict.fromkeys(ADAPTER_USAGE.columns, 0)
    rows.put(name, (subject,), row | {field: row[field] + step for field, step in steps.items()})


def _wants(entry: Entry) -> list[tuple[str, Key]]:
    body, kind = entry.envelope.body, entry.envelope.type
    if kind == "inference.recorded":
        consumer = body["consumer"]
    elif kind == "fee.charged":
        consumer = body["account"]
    elif kind == "attribution.recorded":
        return [(table.name, (body["inference"],)) for table in (INFERENCES, ATTRIBUTIONS)]
    else:
        return []
    return [
        (INFERENCES.name, (body["inference"],)),
        (ADAPTER_USAGE.name, (body["adapter"],)),
        (CONSUMER_USAGE.name, (consumer,)),
    ]


PROJECTION = Projection(
    name="usage",
    tables=(INFERENCES, ATTRIBUTIONS, SHARES, ADAPTER_USAGE, CONSUMER_USAGE, ANCHORS),
    folds={
        "inference.recorded": _inferred,
        "inference.interrupted": _interrupted,
        "fee.charged": _charged,
        "attribution.recorded": _attributed,
        "checkpoint.anchored": _anchored,
    },
    wants=_wants,
)
