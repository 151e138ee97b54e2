"""The event catalogue: every type, the fields of its body, the aggregate it belongs to, and the
earlier things it refers to. Pure.

`check_body` is the only gate: unknown types, missing fields and extra fields are refused. What may
happen *next* is not decided here but in `ledger.aggregates`. docs/FORMATS.md has one heading per
type, and a test fails when one is missing.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import UUID

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import check_actor, check_address, check_hash, check_uuid, derived_id
from ledger.domain.money import BPS_WHOLE, PPM_WHOLE, parse_amount
from ledger.errors import InvalidEvent

MAX_NAME_CHARS = 120
MAX_TEXT_CHARS = 2_000
MAX_ROWS_PER_CONTRIBUTION = 100_000
MAX_DATANETS_PER_RUN = 32
MAX_REVIEWERS = 32
MAX_SHARES = 400
MAX_TOKENS = 1_000_000
MAX_CONFIG_KEYS = 40
MAX_CONFIG_BYTES = 4_000
MAX_SIGNATURE_CHARS = 200
MAX_INTEGER = 2**53 - 1

ROLES = ("worker", "operator", "governance")
HOLD_REASONS = ("junk", "stuffing", "duplicate", "dispute", "other")
ON_WITHDRAWAL = ("keep", "retire")
INTERRUPTIONS = ("crashed", "failed", "unpaid")

# SPDX identifiers that a datanet may carry: licences that allow training and redistribution of
# derived weights. https://spdx.org/licenses/
LICENCES = frozenset(
    {
        "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0",
        "CDLA-Permissive-2.0", "ISC", "MIT", "MIT-0", "ODC-By-1.0", "PDDL-1.0", "PSF-2.0",
        "Python-2.0", "Unlicense",
    }
)  # fmt: skip

Check = Callable[[object, str], object]
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,38}/[a-z0-9][a-z0-9._-]{0,58}")


@dataclass(frozen=True, kw_only=True)
class EventType:
    """One kind of event. `aggregate` names the stream, `key` the body field that identifies it
    ('actor' for the signer, '' for the one stream per ledger)."""

    name: str
    aggregate: str
    key: str
    fields: Mapping[str, Check]
    references: Mapping[str, str]


def text(limit: int, *, empty: bool = True) -> Check:
    def check(value: object, field: str) -> None:
        if not isinstance(value, str) or len(value) > limit or not (value or empty):
            raise InvalidEvent(
                f"{field} must be a string of at most {limit} characters", field=field
            )
        # Names and reasons are shown on terminals and pages: no escapes, no bells, no NUL.
        if any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in value):
            raise InvalidEvent(f"{field} must not hold control characters", field=field)

    return check


def integer(low: int, high: int = MAX_INTEGER) -> Check:
    def check(value: object, field: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidEvent(f"{field} must be an integer from {low} to {high}", field=field)

    return check


def list_of(check_item: Check, *, low: int, high: int) -> Check:
    def check(value: object, field: str) -> None:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise InvalidEvent(f"{field} must be a list of {low} to {high} items", field=field)
        for n, item in enumerate(value):
            check_item(item, f"{field}[{n}]")
        if len({repr(item) for item in value}) != len(value):
            raise InvalidEvent(f"{field} repeats an item", field=field)

    return check


def one_of(choices: tuple[str, ...] | frozenset[str], what: str) -> Check:
    def check(value: object, field: str) -> None:
        if not isinstance(value, str) or value not in choices:
            raise InvalidEvent(f"{field} must be {what}: {', '.join(sorted(choices))}", field=field)

    return check


def optional(check_value: Check) -> Check:
    """The field is always there; null says that there is none."""

    def check(value: object, field: str) -> None:
        if value is not None:
            check_value(value, field)

    return check


def hex32(value: object, field: str) -> None:
    """A keccak-256 root or transaction hash, as the EVM writes it."""
    if not isinstance(value, str) or not re.fullmatch(r"0x[0-9a-f]{64}", value):
        raise InvalidEvent(f"{field} must be 0x and 64 lower-case hex digits", field=field)


def model_name(value: object, field: str) -> None:
    if not isinstance(value, str) or not _MODEL.fullmatch(value):
        raise InvalidEvent(f"{field} must look like owner/name in lower case", field=field)


def training_config(value: object, field: str) -> None:
    """A flat object of strings, integers, booleans and lists of strings; floats are strings."""
    if not isinstance(value, dict) or len(value) > MAX_CONFIG_KEYS:
        raise InvalidEvent(
            f"{field} must be an object of at most {MAX_CONFIG_KEYS} keys", field=field
        )
    if len(canonical_json(value)) > MAX_CONFIG_BYTES:
        raise InvalidEvent(
            f"{field} is longer than MAX_CONFIG_BYTES = {MAX_CONFIG_BYTES} in canonical JSON",
            field=field,
        )
    for key, item in value.items():
        plain = isinstance(item, str | int) or (
            isinstance(item, list) and all(isinstance(part, str) for part in item)
        )
        if not plain or len(key) > MAX_NAME_CHARS:
            raise InvalidEvent(f"{field}.{key[:40]} must be a string, integer or list", field=field)


def share(value: object, field: str) -> None:
    if not isinstance(value, dict) or value.keys() != {"contributor", "ppm"}:
        raise InvalidEvent(f"{field} must have contributor and ppm", field=field)
    check_actor(value["contributor"], f"{field}.contributor")
    integer(1, PPM_WHOLE)(value["ppm"], f"{field}.ppm")


_uuid, _hash, _actor, _amount, _address = (
    check_uuid, check_hash, check_actor, parse_amount, check_address,
)  # fmt: skip
_name, _prose = text(MAX_NAME_CHARS, empty=False), text(MAX_TEXT_CHARS)
_licence = one_of(LICENCES, "an SPDX licence identifier that this ledger accepts")
_bps, _ppm = integer(0, BPS_WHOLE), integer(0, PPM_WHOLE)
_tx = {"tx_hash": hex32, "block_number": integer(0)}
_on_chain = {"chain_id": integer(1), "contract": _address, **_tx}
_contribution = {"contribution": _uuid, "datanet": _uuid}
_contribution_refs = {"contribution": "contribution", "datanet": "datanet"}
_row = {**_contribution, "row": integer(0, MAX_ROWS_PER_CONTRIBUTION - 1)}
_answer: Mapping[str, Check] = {
    "inference": _uuid,
    "adapter": _uuid,
    "consumer": _actor,
    "prompt_commitment": _hash,
    "output_commitment": _hash,
    "transcript_sha256": _hash,
    "prompt_tokens": integer(0, MAX_TOKENS),
    "completion_tokens": integer(0, MAX_TOKENS),
    "max_tokens": integer(1, MAX_TOKENS),
    "seed": integer(0),
    "temperature_ppm": integer(0, 2 * PPM_WHOLE),
    "top_p_ppm": _ppm,
}


def _type(
    name: str, aggregate: str, key: str, fields: Mapping[str, Check], **references: str
) -> EventType:
    return EventType(name=name, aggregate=aggregate, key=key, fields=fields, references=references)


_TYPES = (
    _type("ledger.opened", "governance", "", {"name": _name}),
    _type("role.granted", "governance", "", {"member": _actor, "role": one_of(ROLES, "a role")}),
    _type("role.revoked", "governance", "", {"member": _actor, "role": one_of(ROLES, "a role")}),
    _type(
        "fee_policy.set",
        "governance",
        "",
        {
            "version": integer(1),
            "protocol_bps": _bps,
            "owner_bps": _bps,
            "operator_bps": _bps,
            "contributors_bps": _bps,
        },
    ),
    _type("identity.registered", "identity", "actor", {"name": _name}),
    _type(
        "identity.evm_bound",
        "identity",
        "actor",
        {"address": _address, "signature": text(MAX_SIGNATURE_CHARS, empty=False)},
    ),
    _type(
        "datanet.created",
        "datanet",
        "datanet",
        {
            "datanet": _uuid,
            "name": _name,
            "description": _prose,
            "licence": _licence,
            "reviewers": list_of(_actor, low=0, high=MAX_REVIEWERS),
        },
    ),
    _type("datanet.closed", "datanet", "datanet", {"datanet": _uuid, "reason": _prose}),
    _type(
        "datanet.policy_set",
        "datanet",
        "datanet",
        {
            "datanet": _uuid,
            "max_rows_per_contribution": integer(1, MAX_ROWS_PER_CONTRIBUTION),
            "max_contributions_per_day": integer(1),
            "max_rows_per_day": integer(1),
            "on_withdrawal": one_of(ON_WITHDRAWAL, "what becomes of adapters"),
        },
        datanet="datanet",
    ),
    _type(
        "contribution.recorded",
        "contribution",
        "contribution",
        {
            **_contribution,
            "licence": _licence,
            "rows_root": _hash,
            "rows_count": integer(1, MAX_ROWS_PER_CONTRIBUTION),
            "rows_sha256": _hash,
            "title": _name,
        },
        datanet="datanet",
    ),
    _type(
        "contribution.approved",
        "contribution",
        "contribution",
        {**_contribution, "note": _prose},
        **_contribution_refs,
    ),
    _type(
        "contribution.rejected",
        "contribution",
        "contribution",
        {**_contribution, "reason": _prose},
        **_contribution_refs,
    ),
    _type(
        "contribution.withdrawn",
        "contribution",
        "contribution",
        {**_contribution, "reason": _prose},
        **_contribution_refs,
    ),
    _type(
        "contribution.held",
        "contribution",
        "contribution",
        {
            **_contribution,
            "reason": one_of(HOLD_REASONS, "a reason to hold"),
            "note": _prose,
            "evidence_sha256": optional(_hash),
        },
        **_contribution_refs,
    ),
    _type(
        "contribution.released",
        "contribution",
        "contribution",
        {**_contribution, "note": _prose},
        **_contribution_refs,
    ),
    _type(
        "cluster.appealed",
        "contribution",
        "contribution",
        {**_row, "reason": _prose},
        **_contribution_refs,
    ),
    _type(
        "cluster.split",
        "contribution",
        "contribution",
        {**_row, "note": _prose},
        **_contribution_refs,
    ),
    _type(
        "cluster.upheld",
        "contribution",
        "contribution",
        {**_row, "note": _prose},
        **_contribution_refs,
    ),
    _type(
        "run.requested",
        "run",
        "run",
        {
            "run": _uuid,
            "name": _name,
            "datanets": list_of(_uuid, low=1, high=MAX_DATANETS_PER_RUN),
            "base_model": _hash,
            "base_id": _name,
            "config": training_config,
        },
        datanets="datanet",
    ),
    _type(
        "run.started",
        "run",
        "run",
        {"run": _uuid, "attempt": integer(1, 1_000), "submission_id": _name},
        run="run",
    ),
    _type(
        "run.completed",
        "run",
        "run",
        {
            "run": _uuid,
            "attempt": integer(1, 1_000),
            "manifest_sha256": _hash,
            "adapter_sha256": _hash,
            "adapter_config_sha256": _hash,
            "index_sha256": _hash,
            "index_root": _hash,
            "rows_count": integer(1),
            "contributions_count": integer(1),
            "steps": integer(1),
            "loss": text(40, empty=False),
        },
        run="run",
    ),
    _type(
        "run.failed",
        "run",
        "run",
        {"run": _uuid, "attempt": integer(0, 1_000), "reason": _prose},
        run="run",
    ),
    _type("run.cancelled", "run", "run", {"run": _uuid, "reason": _prose}, run="run"),
    _type(
        "adapter.published",
        "adapter",
        "adapter",
        {
            "adapter": _uuid,
            "run": _uuid,
            "model": model_name,
            "adapter_sha256": _hash,
            "base_model": _hash,
            "input_wei_per_token": _amount,
            "output_wei_per_token": _amount,
        },
        run="run",
    ),
    _type(
        "adapter.retired",
        "adapter",
        "adapter",
        {"adapter": _uuid, "reason": _prose},
        adapter="adapter",
    ),
    _type(
        "adapter.recalled",
        "adapter",
        "adapter",
        {"adapter": _uuid, **_contribution, "reason": _prose},
        adapter="adapter",
        **_contribution_refs,
    ),
    _type(
        "inference.recorded",
        "inference",
        "inference",
        {
            **_answer,
            "finish_reason": one_of(("stop", "length", "cancelled"), "a finish reason"),
            "fee_wei": _amount,
        },
        adapter="adapter",
    ),
    _type(
        "inference.interrupted",
        "inference",
        "inference",
        {**_answer, "reason": one_of(INTERRUPTIONS, "why it broke off")},
        adapter="adapter",
    ),
    _type(
        "attribution.recorded",
        "inference",
        "inference",
        {
            "inference": _uuid,
            "adapter": _uuid,
            "run": _uuid,
            "method": _name,
            "index_sha256": _hash,
            "evidence_sha256": _hash,
            "shares": list_of(share, low=0, high=MAX_SHARES),
            "unattributed_ppm": _ppm,
        },
        inference="inference",
        adapter="adapter",
        run="run",
    ),
    _type(
        "fee.charged",
        "account",
        "account",
        {
            "account": _actor,
            "inference": _uuid,
            "adapter": _uuid,
            "policy_version": integer(1),
            "amount_wei": _amount,
            "protocol_wei": _amount,
            "owner": _actor,
            "owner_wei": _amount,
            "operator_wei": _amount,
            "contributors_wei": _amount,
        },
        inference="inference",
        adapter="adapter",
    ),
    _type(
        "deposit.recorded",
        "account",
        "account",
        {"account": _actor, "amount_wei": _amount, **_on_chain, "log_index": integer(0)},
    ),
    _type("period.cutoff", "periods", "", {"period": integer(1)}),
    _type(
        "period.closed",
        "periods",
        "",
        {
            "period": integer(1),
            "log_size": integer(1),
            "root": hex32,
            "total_wei": _amount,
            "accounts": integer(1),
            "tree_sha256": _hash,
        },
    ),
    _type("period.abandoned", "periods", "", {"period": integer(1), "reason": _prose}),
    _type("payout.proposed", "periods", "", {"period": integer(1), "root": hex32, **_on_chain}),
    _type("payout.activated", "periods", "", {"period": integer(1), "root": hex32, **_on_chain}),
    _type("payout.vetoed", "periods", "", {"period": integer(1), **_on_chain}),
    _type(
        "payout.claimed",
        "claims",
        "address",
        {
            "address": _address,
            "amount_wei": _amount,
            "cumulative_wei": _amount,
            **_on_chain,
            "log_index": integer(0),
        },
    ),
    _type(
        "checkpoint.anchored",
        "anchors",
        "",
        {"size": integer(1), "root": _hash, **_on_chain, "block_hash": hex32, "l1_sha256": _hash},
    ),
)

CATALOGUE: Mapping[str, EventType] = {kind.name: kind for kind in _TYPES}


def check_body(type_name: str, body: Mapping[str, Any]) -> EventType:
    """The catalogue entry of a well-formed body. Raises InvalidEvent that names the field."""
    kind = CATALOGUE.get(type_name)
    if kind is None:
        raise InvalidEvent(
            f"unknown event type {type_name!r}; docs/FORMATS.md lists the catalogue", field="type"
        )
    if body.keys() != kind.fields.keys():
        missing, extra = kind.fields.keys() - body.keys(), body.keys() - kind.fields.keys()
        raise InvalidEvent(
            f"{type_name} has the wrong fields: missing {sorted(missing) or 'none'}, "
            f"unknown {sorted(extra)[:10] or 'none'}",
            field="body",
        )
    for field, check in kind.fields.items():
        check(body[field], f"body.{field}")
    rule = _WHOLES.get(type_name)
    if rule:
        rule(body)
    return kind


def _policy_is_whole(body: Mapping[str, Any]) -> None:
    parts = ("protocol_bps", "owner_bps", "operator_bps", "contributors_bps")
    if sum(body[part] for part in parts) != BPS_WHOLE:
        raise InvalidEvent(f"{', '.join(parts)} must sum to {BPS_WHOLE}", field="body")


def _shares_are_whole(body: Mapping[str, Any]) -> None:
    shares = body["shares"]
    if len({s["contributor"] for s in shares}) != len(shares):
        raise InvalidEvent("body.shares names a contributor twice", field="body.shares")
    if sum(s["ppm"] for s in shares) + body["unattributed_ppm"] != PPM_WHOLE:
        raise InvalidEvent(
            f"shares and unattributed_ppm must sum to {PPM_WHOLE}", field="body.shares"
        )


def _fee_is_whole(body: Mapping[str, Any]) -> None:
    parts = ("protocol_wei", "owner_wei", "operator_wei", "contributors_wei")
    if sum(int(body[part]) for part in parts) != int(body["amount_wei"]):
        raise InvalidEvent(f"{', '.join(parts)} must sum to amount_wei", field="body.amount_wei")


_WHOLES: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "fee_policy.set": _policy_is_whole,
    "attribution.recorded": _shares_are_whole,
    "fee.charged": _fee_is_whole,
}


@lru_cache(maxsize=16_384)
def stream_id(kind: str, *parts: object) -> UUID:
    """The aggregate (event stream) of a thing: `stream_id("datanet", "<uuid>")`. Kinds never
    collide, so a contribution cannot take a datanet's id."""
    return derived_id("stream", kind, *parts)


def stream_of(type_name: str, log: str, actor: str, body: Mapping[str, Any]) -> UUID:
    """The aggregate that an event of a checked body belongs to."""
    kind = CATALOGUE[type_name]
    if kind.key == "":
        return stream_id(kind.aggregate, log)
    value = actor if kind.key == "actor" else str(body[kind.key])
    return stream_id(kind.aggregate, value.lower())


def references(type_name: str, body: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What an event rests on: (body field, aggregate kind, id) for every earlier thing it names.

    The first event of that kind and id (`datanet.created`, `run.requested`, ...) must stand
    earlier in the log; `CREATES` says which type that is.
    """
    found: list[tuple[str, str, str]] = []
    for field, kind in CATALOGUE[type_name].references.items():
        value = body[field]
        found += [(field, kind, item) for item in (value if isinstance(value, list) else [value])]
    return found


CREATES: Mapping[str, str] = {
    "datanet": "datanet.created",
    "contribution": "contribution.recorded",
    "run": "run.requested",
    "adapter": "adapter.published",
    "inference": "inference.recorded",
}
