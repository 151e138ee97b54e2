"""A monitor's own tree: read a log's entries, judge each, hash them onto the edge, compare.

Nothing that the log serves is believed before it leads to a root that it signed. Where it does
not, `_contradiction` looks for the strongest thing to show: hashes that lead to both roots (a fork,
which the signatures alone prove), then a leaf that the signed tree holds where another entry was
handed out, then a file that does not fit, then the checkpoints alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from ledger.domain.envelope import ENTRY_HEADER_BYTES, leaf_hash
from ledger.domain.events import CATALOGUE
from ledger.errors import InvalidEvent, StorageError, VerificationError
from ledger.log import tree
from ledger.log.monitor_findings import Findings, Items, Stop
from ledger.log.monitor_served import Served
from ledger.log.monitor_state import MonitorState, Signed, edge_of
from ledger.log.sources import width_at
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.evidence import prefix_roots, read_entry
from ledger.verify.merkle import HASH_BYTES, verify_inclusion
from ledger.verify.tiles import TILE_WIDTH, Tile, tile_path, tiles_of

PROGRESS_ENTRIES = 65_536
"""Entries read between two writes of the state, while a long log is being caught up with."""
MAX_TILE_BYTES = TILE_WIDTH * HASH_BYTES


class Growth:
    """Brings a state to a checkpoint: `grow` by reading every entry, `skim` by proof alone."""

    def __init__(self, served: Served, findings: Findings, *, log: str, keep_going: bool) -> None:
        self._served = served
        self._findings = findings
        self._log = log
        self._keep_going = keep_going

    def grow(
        self, state: MonitorState, target: Signed, progress: Callable[[MonitorState], None]
    ) -> MonitorState:
        """The state with all entries of the target's tree, whose root they give. `progress` is
        called now and then with a state on the way. Raises Stop after an alarm."""
        saved = state.size
        while state.size < target.checkpoint.size:
            state = self._read_bundle(state, target)
            if not self._findings.look.spoiled and state.size - saved >= PROGRESS_ENTRIES:
                progress(state)
                saved = state.size
        if state.root != target.checkpoint.root:
            self._contradiction("its entries do not hash to the signed root", state, target)
        return replace(state, head=target)

    def _read_bundle(self, state: MonitorState, target: Signed) -> MonitorState:
        n, known = divmod(state.size, TILE_WIDTH)
        entries = self._served.bundle(n, target)
        leaves = [leaf_hash(entry) for entry in entries]
        self._check_known(state, entries, leaves[:known], target)
        recorded_at = self._check_entries(state, entries, known, target)
        changed = tree.integrate(state.size, leaves[known:], state.read)
        self._check_tiles(state, changed, entries, target)
        size = n * TILE_WIDTH + len(entries)
        return replace(
            state,
            size=size,
            edge=edge_of(size, {**state.edge, **changed}),
            recorded_at=recorded_at,
            entries=state.entries + len(entries) - known,
        )

    def skim(self, state: MonitorState, target: Signed) -> MonitorState:
        """The state with the target's edge, which the log's tiles and the head give; of the entries
        only the last is read, since its index binds the size. Raises Stop after an alarm."""
        new, head = target.checkpoint, state.head
        tiles = [tile for tile in tiles_of(new.size) if tile.width < TILE_WIDTH]
        edge = {(tile.level or 0, tile.n): self._served.file(tile, target) for tile in tiles}
        grown = replace(state, size=new.size, edge=edge, head=target)
        if _root(grown) != new.root:
            self._contradiction("its tiles do not lead to the signed root", state, target)
        if head and head.checkpoint.size:
            self._check_consistent(state, head.checkpoint, target)
        if not new.size:
            return grown
        index = new.size - 1
        last = self._served.bundle(index // TILE_WIDTH, target)[-1]
        if not _included(last, index, new, self._served.path(index, new.size)):
            says = f"entry {index}, the last, is not the last leaf of the tree"
            self._contradiction(says, state, target, index=index, entry=last)
        recorded_at = self._check_entries(replace(state, size=index), [last], 0, target)
        return replace(grown, recorded_at=recorded_at, entries=state.entries + 1)

    def _check_consistent(self, state: MonitorState, old: Checkpoint, target: Signed) -> None:
        new = target.checkpoint
        nodes = self._served.nodes(old, new)
        if nodes is None or prefix_roots(old.size, new.size, nodes) != (old.root, new.root):
            says = f"its tiles give no proof that leads from size {old.size} to size {new.size}"
            self._contradiction(says, state, target)

    # --- entries ---

    def _check_known(
        self,
        state: MonitorState,
        entries: Sequence[bytes],
        leaves: Sequence[bytes],
        target: Signed,
    ) -> None:
        """Entries of a bundle that was partial before must be what they were."""
        n = state.size // TILE_WIDTH
        own = state.edge[0, n] if leaves else b""
        at = _first_difference(b"".join(leaves), own)
        if at < len(leaves):
            index = n * TILE_WIDTH + at
            says = f"entry {index} is not what it was"
            self._contradiction(says, state, target, index=index, entry=entries[at])

    def _check_entries(
        self, state: MonitorState, entries: Sequence[bytes], known: int, target: Signed
    ) -> int:
        """Judge each entry from position `known` on, which stands at index `state.size`; the last
        one's recorded_at (us)."""
        recorded_at = state.recorded_at
        for at in range(known, len(entries)):
            entry, index = entries[at], state.size + at - known
            self._findings.look.entries += 1
            if len(entry) > ENTRY_HEADER_BYTES:
                self._check_index(state, entry, index, target)
                before, recorded_at = recorded_at, int.from_bytes(entry[8:16], "big")
                if recorded_at < before:
                    self._time_ran_back(state, entries, at, index, target)
            self._check_event(state, entry, index, target)
        return recorded_at

    def _check_index(self, state: MonitorState, entry: bytes, index: int, target: Signed) -> None:
        written, size = int.from_bytes(entry[:8], "big"), target.checkpoint.size
        if written != index:
            kind = "wrong-size" if index == size - 1 and written > index else "misplaced-entry"
            says = f"at index {index} of {size} stands an entry that says it is entry {written}"
            self._bad(kind, says, state, entry, index, target)

    def _check_event(self, state: MonitorState, entry: bytes, index: int, target: Signed) -> None:
        try:
            kind = read_entry(entry, self._log).envelope.type
        except InvalidEvent as error:
            self._bad("bad-entry", f"entry {index}: {error}", state, entry, index, target)
            return
        if kind not in CATALOGUE:
            self._findings.look.unknown[kind] += 1

    def _time_ran_back(
        self,
        state: MonitorState,
        entries: Sequence[bytes],
        at: int,
        index: int,
        target: Signed,
    ) -> None:
        before = entries[at - 1] if at else self._served.bundle(index // TILE_WIDTH - 1, target)[-1]
        more = {"before": before, "before_proof": self._served.proof(index - 1, target) or b""}
        says = f"entry {index} was recorded before the entry that it follows"
        self._bad("bad-entry", says, state, entries[at], index, target, more)

    def _bad(
        self,
        kind: str,
        says: str,
        state: MonitorState,
        entry: bytes,
        index: int,
        target: Signed,
        more: Items | None = None,
    ) -> None:
        """An entry that breaks a rule, if the signed tree holds it; else the log shows another."""
        proof = self._served.proof(index, target)
        items = {"entry": entry, "proof": proof or b"", **(more or {})}
        if not self._findings.attempt(kind, says, items):
            self._contradiction(says, state, target, index=index, entry=entry)
        self._findings.look.spoiled = True
        if not self._keep_going:
            raise Stop

    # --- the tree ---

    def _check_tiles(
        self,
        state: MonitorState,
        changed: Mapping[tree.TileId, bytes],
        entries: Sequence[bytes],
        target: Signed,
    ) -> None:
        """Tiles that the target's tree has at this width must be served as they were computed."""
        for (level, n), computed in changed.items():
            tile = Tile(level=level, n=n, width=len(computed) // HASH_BYTES)
            if tile.width != width_at(target.checkpoint.size, level, n):
                continue  # more entries on the way to the target make it wider
            served = self._served.file(tile, target)
            if served == computed:
                continue
            at, path = _first_difference(served, computed), tile_path(tile)
            items = {
                "checkpoint": target.note,
                "path": path.encode(),
                "served": served[: MAX_TILE_BYTES + 1],
                "computed": computed,
            }
            self._contradiction(
                f"{path} is not what the entries hash to, from hash {at} on",
                state,
                target,
                index=n * TILE_WIDTH + at,
                entry=entries[at] if level == 0 and at < len(entries) else None,
                weaker=items,
            )

    def _contradiction(
        self,
        says: str,
        state: MonitorState,
        target: Signed,
        *,
        index: int = 0,
        entry: bytes | None = None,
        weaker: Items | None = None,
    ) -> NoReturn:
        """What is served does not make the tree that was signed: see the module's first words."""
        head, new, kind = state.head, target.checkpoint, "inconsistent"
        pair = head and {"checkpoint_1": head.note, "checkpoint_2": target.note}
        if head and pair and (nodes := self._served.nodes(head.checkpoint, new)):
            self._findings.stop_if(
                kind,
                f"the tree of {new.size} entries is no extension of the {head.checkpoint.size} "
                f"that the log signed before ({says})",
                {**pair, "nodes": b"".join(nodes)},
            )
        if entry is not None:
            proof, leaf = self._served.proof(index, target), self._served.leaf(index, new.size)
            self._findings.stop_if(
                kind,
                f"the log hands out an entry {index} that is not in the tree it signed ({says})",
                {"entry": entry, "leaf": leaf or b"", "proof": proof or b""},
            )
        if weaker:
            self._findings.stop_if(kind, f"the log contradicts itself: {says}", weaker)
        said = f"the log does not hand out the tree of {new.size} entries that it signed: {says}"
        if head and head.checkpoint.size:
            self._findings.stop(kind, said, pair or {})
        self._findings.stop(kind, said, {"checkpoint": target.note})


def _root(state: MonitorState) -> bytes | None:
    try:
        return state.root
    except StorageError:  # a tile of the wrong length
        return None


def _included(entry: bytes, index: int, head: Checkpoint, path: Sequence[bytes] | None) -> bool:
    try:
        verify_inclusion(
            index=index, size=head.size, leaf=leaf_hash(entry), proof=path or (), root=head.root
        )
    except VerificationError:
        return False
    return True


def _first_difference(served: bytes, computed: bytes) -> int:
    """The position of the first hash that differs, or that one side lacks."""
    whole = max(len(served), len(computed)) // HASH_BYTES
    for at in range(whole):
        part = slice(at * HASH_BYTES, (at + 1) * HASH_BYTES)
        if served[part] != computed[part]:
            return at
    return whole
