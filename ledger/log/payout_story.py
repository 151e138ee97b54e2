"""What stands behind one account's payout: its line in a payout tree, and the events to follow.

A payout is not one arrow back but a sum: everything that the account's owner earned before the
period was cut off, less what vetoes gave back. Which events those are the index knows; that they
add up is for `ledger.verify.statement` to show.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.envelope import Entry, decode_entry
from ledger.domain.events import CATALOGUE
from ledger.domain.ids import check_address
from ledger.errors import InvalidEvent, NotFound, Unavailable
from ledger.log.ancestry import EntryReader, EventIndex
from ledger.ports import BlobStore
from ledger.verify.bundle_format import MAX_ENTRIES
from ledger.verify.payouts import PayoutLine

ProvePayout = Callable[[dict[str, Any], str], Mapping[str, Any]]
"""(dump of a payout tree, address) -> {"cumulative_wei": <decimal>, "proof": [<hex32>, ...]}."""


@dataclass(frozen=True, kw_only=True)
class PayoutStory:
    """`line` is None for a claim of which no active period knows the amount."""

    line: PayoutLine | None
    entries: frozenset[int]


class PayoutStories:
    """Payout lines of one log."""

    def __init__(
        self, *, log: EntryReader, index: EventIndex, blobs: BlobStore, prove: ProvePayout
    ) -> None:
        self._log = log
        self._index = index
        self._blobs = blobs
        self._prove = prove

    def about(
        self, subject: Entry, account: str | None, *, size: int, earnings: bool
    ) -> PayoutStory | None:
        """The payout that an event is about: of the claimed address, or of `account` in the period
        of the event. None where there is none. `earnings` adds what the owner earned.

        Raises InvalidEvent when `account` does not go with the event, NotFound when the period is
        not closed (below `size`) or owes the account nothing.
        """
        event = subject.envelope
        if account is not None:
            account = check_address(account, "account").lower()
        if event.type == "payout.claimed":
            claimed = str(event.body["address"]).lower()
            if account not in (None, claimed):
                raise InvalidEvent(f"this claim is of {claimed}, not of {account}", field="account")
            if self._index.position() <= subject.index:
                raise Unavailable(f"claim {subject.index} is not projected yet; retry in a second")
            cumulative_wei = int(event.body["cumulative_wei"])
            period = self._index.claimed_period(claimed, cumulative_wei, subject.index)
            if period is None:
                return PayoutStory(line=None, entries=frozenset(self._index.bindings(claimed)))
            return self._story(claimed, period, size=size, earnings=earnings)
        if account is None:
            return None
        if CATALOGUE[event.type].aggregate != "periods":
            raise InvalidEvent(
                f"account asks for a line of a payout tree: the subject must be an event of a "
                f"period or a claim, not {event.type}",
                field="account",
            )
        return self._story(account, event.body["period"], size=size, earnings=earnings)

    def _story(self, account: str, period: int, *, size: int, earnings: bool) -> PayoutStory:
        things = [
            (event_type, "period", str(period))
            for event_type in ("period.cutoff", "period.closed", "payout.activated")
        ]
        found = self._index.firsts(things)
        cutoff, closed = found.get(things[0]), found.get(things[1])
        if cutoff is None or closed is None or closed >= size:
            raise NotFound(
                f"period {period} is not closed yet, or not in a signed checkpoint: its payout "
                "lines are not known; retry later"
            )
        line = self._line(account, period, closed)
        bindings = self._index.bindings(account)
        entries = {*found.values(), *bindings}
        if earnings:
            entries |= set(self._index.settlements(cutoff))
            owners = {self._entry(n).envelope.actor for n in bindings}
            entries |= set(self._index.earnings(owners, cutoff, MAX_ENTRIES + 1))
        return PayoutStory(line=line, entries=frozenset(n for n in entries if n < size))

    def _line(self, account: str, period: int, closed: int) -> PayoutLine:
        body = self._entry(closed).envelope.body
        proved = self._prove(json.loads(self._blobs.get(body["tree_sha256"])), account)
        return PayoutLine(
            period=period,
            account=account,
            cumulative_wei=int(proved["cumulative_wei"]),
            proof=tuple(bytes.fromhex(node[2:]) for node in proved["proof"]),
        )

    def _entry(self, index: int) -> Entry:
        return decode_entry(self._log.pick([index])[0], verify=False)
