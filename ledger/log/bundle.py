"""Assemble a lineage bundle: from one event, everything that it rests on, with proofs.

What belongs into it `ancestry` and `payout_story` find; here it gets its checkpoint, its inclusion
proofs and the section of the newest anchored checkpoint. Keeps nothing between two bundles.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.envelope import decode_entry
from ledger.errors import NotFound, TooLarge
from ledger.log.ancestry import Ancestry, EntryReader, EventIndex, gather
from ledger.log.payout_story import PayoutStories, PayoutStory, ProvePayout
from ledger.log.prover import Prover
from ledger.ports import BlobStore, StoredCheckpoint, TileStore
from ledger.verify.bundle_format import (
    MAX_BUNDLE_BYTES,
    AnchoredCheckpoint,
    Bundle,
    BundledEntry,
    format_bundle,
)
from ledger.verify.note import VerifierKey, format_vkey

ASK_PARTS = "ask for the bundles of what it rests on, one by one (GET /v1/lineage names the events)"
ASK_LINE = (
    "ask with earnings=false for the payout line alone, and for the answers that made it one by "
    "one (GET /v1/accounts/{owner}/statement names them)"
)


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """A checkpoint that an EVM chain holds, and the L1 section captured when it was committed."""

    checkpoint: StoredCheckpoint
    section: Mapping[str, Any]


class Bundler:
    """Bundles of one log. `prove_payout` opens payout trees, which are the chain room's."""

    def __init__(
        self,
        *,
        log: EntryReader,
        tiles: TileStore,
        blobs: BlobStore,
        index: EventIndex,
        vkey: VerifierKey,
        prove_payout: ProvePayout,
    ) -> None:
        self._log = log
        self._tiles = tiles
        self._blobs = blobs
        self._index = index
        self._vkey = vkey
        self._prover = Prover(tiles)
        self._payouts = PayoutStories(log=log, index=index, blobs=blobs, prove=prove_payout)

    def bundle(
        self,
        subject: int,
        *,
        anchored: Anchored | None = None,
        account: str | None = None,
        earnings: bool = True,
    ) -> bytes:
        """The lineage bundle of the event at a leaf index.

        Stands on the anchored checkpoint when that covers every entry, else on the newest one and
        carries the consistency proof between the two. Of a claim, or with the `account` (address)
        whose line of a period's payout tree is asked for, it also carries that line, with
        `earnings` and everything that its owner earned for it.

        Raises NotFound for an event that no checkpoint covers yet, TooLarge beyond the format's
        limits, and what `payout_story` and `ancestry` raise.
        """
        newest = self._tiles.latest()
        if newest is None or not 0 <= subject < newest.size:
            raise NotFound(f"entry {subject} is not in a signed checkpoint yet; try again shortly")
        entry = decode_entry(self._log.pick([subject])[0], verify=False)
        payout = self._payouts.about(entry, account, size=newest.size, earnings=earnings)
        found = gather(
            {subject, *(payout.entries if payout else ())},
            size=newest.size,
            reader=self._log,
            index=self._index,
            blobs=self._blobs,
            hint=ASK_LINE if payout and earnings else ASK_PARTS,
        )
        head = newest
        if anchored and anchored.checkpoint.size > max(found.entries):
            head = anchored.checkpoint
        data = format_bundle(
            Bundle(
                log=self._vkey.name,
                vkey=format_vkey(self._vkey),
                subject=entry.envelope.id,
                checkpoint=head.note,
                entries=self._with_proofs(found, head.size),
                blobs=found.blobs,
                l1=self._anchored(anchored, head) if anchored else None,
                payouts=_lines(payout),
            )
        )
        if len(data) > MAX_BUNDLE_BYTES:
            raise TooLarge(
                f"the bundle would exceed MAX_BUNDLE_BYTES = {MAX_BUNDLE_BYTES}: {ASK_PARTS}"
            )
        return data

    def _with_proofs(self, found: Ancestry, size: int) -> tuple[BundledEntry, ...]:
        indexes = sorted(found.entries)
        proofs = self._prover.inclusions(indexes, size)
        return tuple(
            BundledEntry(index=index, entry=found.entries[index], proof=tuple(proofs[index]))
            for index in indexes
        )

    def _anchored(self, anchored: Anchored, head: StoredCheckpoint) -> AnchoredCheckpoint:
        proof = self._prover.consistency(anchored.checkpoint.size, head.size)
        return AnchoredCheckpoint(
            checkpoint=anchored.checkpoint.note,
            consistency=tuple(proof),
            section=anchored.section,
        )


def _lines(payout: PayoutStory | None) -> tuple[Any, ...]:
    return (payout.line,) if payout and payout.line else ()
