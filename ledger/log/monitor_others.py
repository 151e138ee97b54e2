"""What others know of a log, held against the tree that a monitor has verified: the contract that
it is anchored in, and the witnesses that cosigned it.

Both are asked before the log's checkpoint is read, since what they hold was the log's before. A
contract may then hold nothing larger than the log shows. A witness may: a log that withholds a
checkpoint until enough witnesses have cosigned it has one that is not published yet. Such a one is
remembered (`MonitorState.ahead`) until the log has come to its size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.canonical import canonical_json
from ledger.errors import NotFound, Unavailable, VerificationError
from ledger.log.add_checkpoint import checkpoint_path
from ledger.log.monitor_findings import Findings
from ledger.log.monitor_served import Served
from ledger.log.monitor_state import Signed
from ledger.ports import LogSource
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.evidence import prefix_roots
from ledger.verify.note import VerifierKey


@dataclass(frozen=True, kw_only=True)
class AnchoredTree:
    """What the L1 contract holds, in one block. `section` is the proof of it, where the node gave
    one (`ledger.verify.l1`). `contract` is 0x and lower-case hex; size 0 is no anchor yet."""

    chain_id: int
    contract: str
    size: int
    root: bytes
    section: Mapping[str, Any] | None


AnchorReader = Callable[[], AnchoredTree]
"""Raises Unavailable (ChainError) when the node does not answer."""


class Others:
    """The contract and the witnesses of one log. `witnesses` are their submission prefixes."""

    def __init__(
        self,
        served: Served,
        findings: Findings,
        *,
        log: str,
        key: VerifierKey,
        anchor: AnchorReader | None,
        witnesses: Mapping[VerifierKey, LogSource],
    ) -> None:
        self._served = served
        self._findings = findings
        self._log, self._key = log, key
        self._anchor = anchor
        self._witnesses = witnesses

    # --- asked before the log is ---

    def read_anchor(self) -> AnchoredTree | None:
        if self._anchor is None:
            return None
        try:
            return self._anchor()
        except Unavailable as error:
            self._findings.look.unchecked.append(f"the L1 contract: {error}")
            return None

    def read_witnesses(self) -> list[Signed]:
        """The checkpoints that they cosigned last, each opened under both keys."""
        found = []
        for witness, source in self._witnesses.items():
            try:
                note = source.read(checkpoint_path(self._log))
                opened = open_checkpoint(note, self._key, origin=self._log, witnesses=[witness])
            except NotFound:
                continue  # it has not met this log, or does not show what it cosigned
            except (Unavailable, VerificationError) as error:
                self._findings.look.unchecked.append(f"the witness {witness.name}: {error}")
                continue
            if opened.witnesses:
                found.append(Signed(checkpoint=opened.checkpoint, note=note))
        return found

    # --- held against what the log shows ---

    def check_witnessed(self, theirs: Signed, ours: Signed) -> None:
        """A checkpoint that a witness cosigned must be a beginning of the log's, or later."""
        old, new = theirs.checkpoint, ours.checkpoint
        pair = {"checkpoint_1": theirs.note, "checkpoint_2": ours.note}
        if old.size == new.size and old.root != new.root:
            says = f"the log showed a witness another tree of {new.size} entries than us"
            self._findings.stop("split-view", says, pair)
        if not 0 < old.size < new.size:
            return
        nodes = self._served.nodes(old, new)
        if _leads(old, new, nodes):
            return
        says = f"the log showed a witness a tree of {old.size} entries that ours does not extend"
        if not nodes or not self._findings.attempt(
            "inconsistent", says, {**pair, "nodes": b"".join(nodes)}
        ):
            self._findings.alarm("inconsistent", says, pair)

    def check_anchored(self, anchored: AnchoredTree, ours: Signed) -> bool:
        """Whether what the contract holds is a beginning of the log's tree; else an alarm."""
        new = ours.checkpoint
        held = Checkpoint(origin=self._log, size=anchored.size, root=anchored.root)
        if (held.size, held.root) == (new.size, new.root):
            return True
        nodes = self._served.nodes(held, new)
        if _leads(held, new, nodes):
            return True
        where = f"contract {anchored.contract} on chain {anchored.chain_id} holds a tree of "
        says = f"{where}{held.size} entries that is not the beginning of the log's {new.size}"
        if held.size > new.size:
            says = f"{where}{held.size} entries, and the log shows only {new.size}"
        items = {"checkpoint": ours.note, "anchor": _claim(anchored)}
        if not nodes or not self._findings.attempt(
            "anchor-mismatch", says, {**items, "nodes": b"".join(nodes)}
        ):
            self._findings.alarm("anchor-mismatch", says, items)
        return False


def _leads(old: Checkpoint, new: Checkpoint, nodes: list[bytes] | None) -> bool:
    return nodes is not None and prefix_roots(old.size, new.size, nodes) == (old.root, new.root)


def _claim(anchored: AnchoredTree) -> bytes:
    """The `anchor` item of an evidence file."""
    return canonical_json(
        {
            "chain_id": anchored.chain_id,
            "contract": anchored.contract,
            "size": anchored.size,
            "root": anchored.root.hex(),
            "section": anchored.section,
        }
    )
