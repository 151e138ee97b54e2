"""Periods: from what was earned to what the chain paid. Pure.

accrued -> held at the cut-off, held -> available when the payout root is active on chain, available
-> paid when the chain shows a claim; a veto takes held back to accrued. The payout tree is
cumulative over all accounts (docs/FORMATS.md), so a period has a line for *every* address that was
ever due something, with amount 0 where nothing is new, and its root also proves every earlier one:
activating a period releases what earlier, still unsettled periods hold.

Addresses: an EVM address belongs to the first actor that binds it until that actor moves to another
one; a second actor's binding of a taken address is an anomaly and changes nothing. What was cut off
for an address stays with that address and that actor (`payees`), wherever the actor goes later.

A claim that the chain paid but that no active period covers yet waits in `claims` (`applied_index`
null) and is applied when a period covers it; one that stays there is money the ledger cannot
explain, which `queries.unexplained_claims` lists.
"""

from collections.abc import Iterator

from ledger.domain.accrual import ACCRUED, AVAILABLE, HELD, PAID
from ledger.domain.envelope import Entry
from ledger.ports import Row, Rows
from projections.balances import BALANCES, Journal, Line, first_seen, move_lines
from projections.base import Projection, anomaly, change, nothing, table

ADDRESSES = table("addresses", key="address:text", columns="actor:text index:int")
BINDINGS = table("bindings", key="actor:text", columns="address:text index:int")
PAYEES = table(
    "payees",
    key="address:text owner:text",
    columns="cumulative_wei:wei available_wei:wei paid_wei:wei",
)
PERIODS = table(
    "periods",
    key="period:int",
    columns="status:text cutoff_index:int cutoff_at:int closed_index:int? log_size:int? root:text? "
    "total_wei:wei? accounts:int? tree_sha256:text? chain_id:int? contract:text? "
    "proposed_tx:text? activated_tx:text? vetoed_tx:text?",
)
PAYOUT_LINES = table(
    "payout_lines",
    key="period:int address:text owner:text",
    columns="amount_wei:wei cumulative_wei:wei",
)
CLAIMS = table(
    "claims",
    key="address:text index:int",
    columns="at:int amount_wei:wei cumulative_wei:wei chain_id:int contract:text tx_hash:text "
    "block_number:int applied_index:int?",
)

# A period whose money is still held. `superseded` is settled: a later root released it.
UNSETTLED = ("cutoff", "closed", "proposed")


def cumulative_lines(rows: Rows, period: int) -> list[tuple[str, int]]:
    """Leaves of the period's payout tree: (address, cumulative wei), by address, none repeated."""
    total: dict[str, int] = {}
    for (_, address, _), line in rows.scan(PAYOUT_LINES.name, (period,)):
        total[address] = total.get(address, 0) + line["cumulative_wei"]
    return sorted(total.items())


def _bound(rows: Rows, entry: Entry) -> None:
    actor, address = entry.envelope.actor, entry.envelope.body["address"].lower()
    holder = rows.get(ADDRESSES.name, (address,))
    if holder is not None:
        if holder["actor"] != actor:
            anomaly(rows, entry, "address_taken", f"{address} is bound to {holder['actor']}")
        return
    former = rows.get(BINDINGS.name, (actor,))
    if former is not None:
        rows.delete(ADDRESSES.name, (former["address"],))
    rows.put(ADDRESSES.name, (address,), {"actor": actor, "index": entry.index})
    rows.put(BINDINGS.name, (actor,), {"address": address, "index": entry.index})


def _cutoff(rows: Rows, entry: Entry) -> None:
    period = entry.envelope.body["period"]
    if rows.get(PERIODS.name, (period,)) is not None:
        anomaly(rows, entry, "repeated_period", f"period {period} was cut off before")
        return
    addresses = {row["actor"]: key[0] for key, row in rows.scan(ADDRESSES.name)}
    due = {
        (addresses[owner], owner): row["amount_wei"]
        for (owner, bucket), row in rows.scan(BALANCES.name)
        if bucket == ACCRUED and row["amount_wei"] and owner in addresses
    }
    _move(Journal(rows, entry), due, ACCRUED, HELD, part="cutoff", period=period)
    for payee, amount_wei in due.items():
        _add(rows, payee, cumulative_wei=amount_wei)
    for key, row in list(rows.scan(PAYEES.name)):
        if row["cumulative_wei"]:
            line = {"amount_wei": due.get((key[0], key[1]), 0)}
            line["cumulative_wei"] = row["cumulative_wei"]
            rows.put(PAYOUT_LINES.name, (period, *key), line)
    opened = dict.fromkeys(PERIODS.columns, None)
    opened |= {"status": "cutoff", "cutoff_index": entry.index, "cutoff_at": entry.recorded_at}
    rows.put(PERIODS.name, (period,), opened)


def _closed(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    if _expect(rows, entry, ("cutoff",)) is None:
        return
    fields = ("log_size", "root", "tree_sha256", "accounts")
    change(
        rows,
        entry,
        PERIODS.name,
        (body["period"],),
        status="closed",
        closed_index=entry.index,
        total_wei=int(body["total_wei"]),
        **{field: body[field] for field in fields},
    )


def _proposed(rows: Rows, entry: Entry) -> None:
    if _expect(rows, entry, ("closed",)) is None:
        return
    body = entry.envelope.body
    change(
        rows,
        entry,
        PERIODS.name,
        (body["period"],),
        status="proposed",
        chain_id=body["chain_id"],
        contract=body["contract"].lower(),
        proposed_tx=body["tx_hash"],
    )


def _activated(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    known = _expect(rows, entry, ("closed", "proposed", "superseded"))
    if known is None:
        return
    journal, touched = Journal(rows, entry), set()
    for period, _ in list(_unsettled(rows, up_to=body["period"])):
        due = _amounts(rows, period)
        _move(
            journal, due, HELD, AVAILABLE,
            part="activated", period=period, tx_hash=body["tx_hash"],
        )  # fmt: skip
        for payee, amount_wei in due.items():
            _add(rows, payee, available_wei=amount_wei)
            touched.add(payee[0])
        change(rows, entry, PERIODS.name, (period,), status="superseded")
    change(
        rows,
        entry,
        PERIODS.name,
        (body["period"],),
        status="activated",
        chain_id=body["chain_id"],
        contract=body["contract"].lower(),
        activated_tx=body["tx_hash"],
    )
    for address in sorted(touched):
        _apply_claims(rows, entry, journal, address)


def _vetoed(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    period = body["period"]
    if _expect(rows, entry, UNSETTLED) is None:
        return
    due = _amounts(rows, period)
    tx_hash = body.get("tx_hash")  # an abandoned period never reached the chain
    _move(Journal(rows, entry), due, HELD, ACCRUED, part="vetoed", period=period, tx_hash=tx_hash)
    for payee, amount_wei in due.items():
        _add(rows, payee, cumulative_wei=-amount_wei)
    status = entry.envelope.type.split(".")[1]
    change(rows, entry, PERIODS.name, (period,), status=status, vetoed_tx=tx_hash)
    later = [number for number, _ in _unsettled(rows) if number > period]
    if later:
        # Their trees count the vetoed amounts. Nothing here can mend a published root: it has to
        # be vetoed too, and a claim against it beyond what is available will wait in `claims`.
        message = f"periods {later} were cut off on top of vetoed period {period}: veto them too"
        anomaly(rows, entry, "veto_out_of_order", message)


def _claimed(rows: Rows, entry: Entry) -> None:
    if not first_seen(rows, entry):
        return
    body = entry.envelope.body
    address = body["address"].lower()
    claim = {
        "at": entry.recorded_at,
        "amount_wei": int(body["amount_wei"]),
        "cumulative_wei": int(body["cumulative_wei"]),
        "chain_id": body["chain_id"],
        "contract": body["contract"].lower(),
        "tx_hash": body["tx_hash"],
        "block_number": body["block_number"],
        "applied_index": None,
    }
    rows.put(CLAIMS.name, (address, entry.index), claim)
    _apply_claims(rows, entry, Journal(rows, entry), address)


def _apply_claims(rows: Rows, entry: Entry, journal: Journal, address: str) -> None:
    """available -> paid for the claims of `address` that active periods cover, oldest first."""
    for key, claim in list(rows.scan(CLAIMS.name, (address,))):
        if claim["applied_index"] is not None:
            continue
        payees = [
            (payee[1], row["available_wei"]) for payee, row in rows.scan(PAYEES.name, (address,))
        ]
        left_wei = claim["amount_wei"]
        if left_wei > sum(available_wei for _, available_wei in payees):
            return
        due = {}
        for owner, available_wei in payees:
            due[address, owner] = min(left_wei, available_wei)
            left_wei -= due[address, owner]
        _move(journal, due, AVAILABLE, PAID, part="claimed", tx_hash=claim["tx_hash"])
        for payee, amount_wei in due.items():
            _add(rows, payee, available_wei=-amount_wei, paid_wei=amount_wei)
        rows.put(CLAIMS.name, key, {**claim, "applied_index": entry.index})


def _expect(rows: Rows, entry: Entry, allowed: tuple[str, ...]) -> Row | None:
    """The period of the event if it may change so now, and names its root; else None, anomaly."""
    body = entry.envelope.body
    row = rows.get(PERIODS.name, (body["period"],))
    status = "never cut off" if row is None else row["status"]
    if row is None or status not in allowed:
        message = f"period {body['period']} is {status}; {' or '.join(allowed)} was expected"
        anomaly(rows, entry, "period_out_of_order", message)
        return None
    if row["root"] is not None and body.get("root", row["root"]) != row["root"]:
        message = f"the root is {body['root']}, period {body['period']} closed with {row['root']}"
        anomaly(rows, entry, "root_mismatch", message)
        return None
    return row


def _unsettled(rows: Rows, *, up_to: int | None = None) -> Iterator[tuple[int, Row]]:
    for (period,), row in rows.scan(PERIODS.name):
        if row["status"] in UNSETTLED and (up_to is None or period <= up_to):
            yield period, row


def _amounts(rows: Rows, period: int) -> dict[tuple[str, str], int]:
    """What the period itself adds, by (address, owner); no zeros."""
    return {
        (address, owner): line["amount_wei"]
        for (_, address, owner), line in rows.scan(PAYOUT_LINES.name, (period,))
        if line["amount_wei"]
    }


def _move(
    journal: Journal,
    due: dict[tuple[str, str], int],
    source: str,
    target: str,
    *,
    part: str,
    period: int | None = None,
    tx_hash: str | None = None,
) -> None:
    owed = [(owner, amount_wei) for (_, owner), amount_wei in due.items()]
    lines: list[Line] = move_lines(owed, source, target, part=part, period=period, tx_hash=tx_hash)
    posted = journal.post(lines)
    assert posted, f"{source} does not hold what {part} moves"


def _add(rows: Rows, payee: tuple[str, str], **wei: int) -> None:
    row = rows.get(PAYEES.name, payee) or dict.fromkeys(PAYEES.columns, 0)
    rows.put(PAYEES.name, payee, row | {name: row[name] + more for name, more in wei.items()})


PROJECTION = Projection(
    name="payouts",
    tables=(ADDRESSES, BINDINGS, PAYEES, PERIODS, PAYOUT_LINES, CLAIMS),
    folds={
        "identity.evm_bound": _bound,
        "period.cutoff": _cutoff,
        "period.closed": _closed,
        "payout.proposed": _proposed,
        "payout.activated": _activated,
        "payout.vetoed": _vetoed,
        "period.abandoned": _vetoed,
        "payout.claimed": _claimed,
    },
    wants=nothing,
)
