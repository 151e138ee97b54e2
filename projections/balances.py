"""Who has what: balances, and the statement lines that explain every unit of them. Pure.

Double entry by `ledger.domain.accrual`. The postings of one event are applied whole or not at all:
they sum to zero (asserted), and where they would take any account but `world` below zero nothing
moves and an anomaly says so. Every posting is a statement line with the balance after it, so the
sum of an owner's lines *is* the balance, and a contributor can check line by line which inference,
which adapter, which share of which pool.

Events come as inference, fee, attribution; a pool that is attributed before its fee is charged
keeps the shares in `pools.waiting` and pays them out at the index of the fee.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ledger.domain import accrual
from ledger.domain.accrual import (
    ACCRUED,
    MAIN,
    POOL,
    PREPAID,
    PROTOCOL,
    UNATTRIBUTED,
    WITHHELD,
    WORLD,
)
from ledger.domain.envelope import Entry
from ledger.ports import Key, Row, Rows
from projections.base import Projection, anomaly, table
from projections.holds import HELD_IN, RUNS_TABLE, held_of, withhold

BALANCES = table("balances", key="owner:text bucket:text", columns="amount_wei:wei")
STATEMENT_LINES = table(
    "statement_lines",
    key="owner:text index:int n:int",
    columns="at:int type:text bucket:text part:text amount_wei:wei balance_wei:wei "
    "counterparty:text? inference:text? adapter:text? period:int? ppm:int? pool_wei:wei? "
    "tx_hash:text?",
)
POOLS = table(
    "pools",
    key="inference:text",
    columns="amount_wei:wei? fee_index:int? attribution_index:int? waiting:text?",
)
CHAIN_EVENTS = table(
    "chain_events", key="chain_id:int tx_hash:text log_index:int", columns="index:int"
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One posting and what explains it. `part` says which role the money was earned or spent in."""

    owner: str
    bucket: str
    amount_wei: int
    part: str
    counterparty: str | None = None
    inference: str | None = None
    adapter: str | None = None
    period: int | None = None
    ppm: int | None = None
    pool_wei: int | None = None
    tx_hash: str | None = None


class Journal:
    """Postings of one event, numbered in the order in which they are made."""

    def __init__(self, rows: Rows, entry: Entry) -> None:
        self._rows, self._entry, self._n = rows, entry, 0

    def post(self, lines: Iterable[Line]) -> bool:
        """Apply all of them, or none and record an anomaly when an account would be overdrawn."""
        moved = [line for line in lines if line.amount_wei]
        assert sum(line.amount_wei for line in moved) == 0, "postings must sum to zero"
        net: dict[tuple[str, str], int] = defaultdict(int)
        for line in moved:
            net[line.owner, line.bucket] += line.amount_wei
        balances = {account: balance(self._rows, *account) for account in net}
        for account, amount_wei in net.items():
            if balances[account] + amount_wei < 0 and account[0] != WORLD:
                anomaly(
                    self._rows,
                    self._entry,
                    "overdrawn",
                    f"{account[0]} has {balances[account]} wei {account[1]}, "
                    f"the event takes {-amount_wei}: nothing was posted",
                )
                return False
        for line in moved:
            account = (line.owner, line.bucket)
            balances[account] += line.amount_wei
            self._write(line, balances[account])
        for account, amount_wei in balances.items():
            self._rows.put(BALANCES.name, account, {"amount_wei": amount_wei})
        return True

    def _write(self, line: Line, balance_wei: int) -> None:
        row = {
            "at": self._entry.recorded_at,
            "type": self._entry.envelope.type,
            "bucket": line.bucket,
            "part": line.part,
            "amount_wei": line.amount_wei,
            "balance_wei": balance_wei,
            "counterparty": line.counterparty,
            "inference": line.inference,
            "adapter": line.adapter,
            "period": line.period,
            "ppm": line.ppm,
            "pool_wei": line.pool_wei,
            "tx_hash": line.tx_hash,
        }
        self._rows.put(STATEMENT_LINES.name, (line.owner, self._entry.index, self._n), row)
        self._n += 1


def balance(rows: Rows, owner: str, bucket: str) -> int:
    """Balance in wei; 0 for an account that no event has touched."""
    row = rows.get(BALANCES.name, (owner, bucket))
    return 0 if row is None else int(row["amount_wei"])


def first_seen(rows: Rows, entry: Entry) -> bool:
    """Whether this EVM log is recorded for the first time; an anomaly when it is not.

    Money that enters or leaves by the chain counts once, whatever a watcher sends twice.
    """
    body = entry.envelope.body
    key = (body["chain_id"], body["tx_hash"], body["log_index"])
    known = rows.get(CHAIN_EVENTS.name, key)
    if known is not None:
        anomaly(rows, entry, "repeated_chain_event", f"already recorded at index {known['index']}")
        return False
    rows.put(CHAIN_EVENTS.name, key, {"index": entry.index})
    return True


def _deposit(rows: Rows, entry: Entry) -> None:
    if not first_seen(rows, entry):
        return
    body = entry.envelope.body
    source, target = accrual.deposit(body)
    about = {"part": "deposit", "tx_hash": body["tx_hash"]}
    Journal(rows, entry).post(
        [
            _line(source, counterparty=target.owner, **about),
            _line(target, counterparty=source.owner, **about),
        ]
    )


def _fee(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    inference = body["inference"]
    pool = rows.get(POOLS.name, (inference,)) or _EMPTY_POOL
    if pool["fee_index"] is not None:
        where = pool["fee_index"]
        anomaly(rows, entry, "charged_twice", f"the fee of {inference} was charged at {where}")
        return
    journal = Journal(rows, entry)
    if not journal.post(_fee_lines(body, entry.envelope.actor)):
        return
    amount_wei, waiting = int(body["contributors_wei"]), pool["waiting"]
    charged = {**pool, "amount_wei": amount_wei, "fee_index": entry.index, "waiting": None}
    rows.put(POOLS.name, (inference,), charged)
    if waiting is not None:
        _share_out(rows, journal, json.loads(waiting), amount_wei)


def _fee_lines(body: Mapping[str, Any], operator: str) -> list[Line]:
    postings = accrual.fee(body, operator)
    about = {"inference": body["inference"], "adapter": body["adapter"]}
    parts = ("protocol", "owner", "operator", "contributors")
    paid = _line(postings[0], part="fee", counterparty=operator, **about)
    # One line for what the consumer pays; accrual writes it once per part.
    lines = [replace(paid, amount_wei=-int(body["amount_wei"]))]
    for part, target in zip(parts, postings[1::2], strict=True):
        lines.append(_line(target, part=part, counterparty=body["account"], **about))
    return lines


def _attribution(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    key = (body["inference"],)
    pool = rows.get(POOLS.name, key) or _EMPTY_POOL
    if pool["attribution_index"] is not None:
        where = pool["attribution_index"]
        anomaly(rows, entry, "attributed_twice", f"{key[0]} was attributed at {where}")
        return
    pool = {**pool, "attribution_index": entry.index}
    if pool["fee_index"] is None:
        fields = ("inference", "adapter", "run", "shares", "unattributed_ppm")
        waiting = {field: body[field] for field in fields}
        pool["waiting"] = json.dumps(waiting, sort_keys=True, separators=(",", ":"))
    rows.put(POOLS.name, key, pool)
    if pool["fee_index"] is not None:
        _share_out(rows, Journal(rows, entry), body, pool["amount_wei"])


def _share_out(rows: Rows, journal: Journal, body: Mapping[str, Any], pool_wei: int) -> None:
    """Move the pool of one inference to those whose data shaped the answer, or to wait for them."""
    about = {"inference": body["inference"], "adapter": body["adapter"], "pool_wei": pool_wei}
    ppm = {share["contributor"]: share["ppm"] for share in body["shares"]}
    ppm[UNATTRIBUTED] = body["unattributed_ppm"]
    held = held_of(rows, ppm.keys() - {UNATTRIBUTED}, body["run"])
    lines = [Line(owner=POOL, bucket=MAIN, amount_wei=-pool_wei, part="attribution", **about)]
    for target in accrual.attribution(body, pool_wei, held)[1::2]:
        part = "unattributed" if target.owner == UNATTRIBUTED else "contributor"
        if target.bucket == WITHHELD and target.amount_wei:
            withhold(rows, target.owner, body["run"], target.amount_wei)
        lines.append(_line(target, part=part, counterparty=POOL, ppm=ppm[target.owner], **about))
    posted = journal.post(lines)
    assert posted, "the pool does not hold what the fee of this inference put there"


_EMPTY_POOL: Row = {
    "amount_wei": None,
    "fee_index": None,
    "attribution_index": None,
    "waiting": None,
}


def _line(posting: accrual.Posting, **about: Any) -> Line:
    return Line(owner=posting.owner, bucket=posting.bucket, amount_wei=posting.amount_wei, **about)


def move_lines(
    due: Sequence[tuple[str, int]], source: str, target: str, **about: Any
) -> list[Line]:
    """Lines that move each owner's amount from one bucket to the next."""
    return [_line(posting, **about) for posting in accrual.move(due, source, target)]


def _wants(entry: Entry) -> list[tuple[str, Key]]:
    body, kind = entry.envelope.body, entry.envelope.type
    if kind == "fee.charged":
        accounts = [
            (body["account"], PREPAID),
            (PROTOCOL, MAIN),
            (POOL, MAIN),
            (body["owner"], ACCRUED),
            (entry.envelope.actor, ACCRUED),
        ]
    elif kind == "attribution.recorded":
        accounts = [(share["contributor"], ACCRUED) for share in body["shares"]]
        accounts += [(POOL, MAIN), (UNATTRIBUTED, MAIN)]
    elif kind == "deposit.recorded":
        accounts = [(WORLD, MAIN), (body["account"], PREPAID)]
    else:
        return []
    wanted: list[tuple[str, Key]] = [(BALANCES.name, account) for account in accounts]
    if kind == "attribution.recorded":
        wanted += [(HELD_IN.name, (share["contributor"],)) for share in body["shares"]]
        wanted.append((RUNS_TABLE, (body["run"],)))
    if "inference" in body:
        wanted.append((POOLS.name, (body["inference"],)))
    else:
        key = (body["chain_id"], body["tx_hash"], body["log_index"])
        wanted.append((CHAIN_EVENTS.name, key))
    return wanted


PROJECTION = Projection(
    name="balances",
    tables=(BALANCES, STATEMENT_LINES, POOLS, CHAIN_EVENTS),
    folds={
        "deposit.recorded": _deposit,
        "fee.charged": _fee,
        "attribution.recorded": _attribution,
    },
    wants=_wants,
)
