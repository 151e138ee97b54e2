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

    def __init__(
        self,
        served: Served,
        findings: Findings,
        *,
        log: str,
        keep_going: bool,
        target: Signed,
        seen: Sequence[Signed],
    ) -> None:
        """`seen` are smaller checkpoints that were seen signed, and not reached yet: earlier runs
        were interrupted on the way. The way to the target leads through them."""
        self._served = served
        self._findings = findings
        self._log = log
        self._keep_going = keep_going
        self._target, self._seen = target, seen
        self._new = target.checkpoint

    def grow(self, state: MonitorState, progress: Callable[[MonitorState], None]) -> MonitorState:
        """The state with all entries of the target's tree, whose root they give. `progress` is
        called now and then with a state on the way. Raises Stop after an alarm."""
        saved = state.size
        while state.size < self._new.size:
            state = self._read_bundle(state)
            if not self._findings.look.spoiled and state.size - saved >= PROGRESS_ENTRIES:
                progress(state)
                saved = state.size
        if state.root != self._new.root:
            self._contradiction("its entries do not hash to the signed root", state)
        return replace(state, head=self._target)

    def _read_bundle(self, state: MonitorState) -> MonitorState:
        n, known = divmod(state.size, TILE_WIDTH)
        entries = self._served.bundle(n, self._target)
        leaves = [leaf_hash(entry) for entry in entries]
        self._check_known(state, entries, leaves[:known])
        self._check_seen(state, leaves[known:])
        recorded_at = self._check_entries(state, entries, known)
        grown, changed = _appended(state, leaves[known:])
        self._check_tiles(state, changed, entries)
        read = state.entries + len(entries) - known
        return replace(grown, recorded_at=recorded_at, entries=read)

    def _check_seen(self, state: MonitorState, leaves: Sequence[bytes]) -> None:
        """Where the way leads through a checkpoint seen before, its root must be ours."""
        for old in self._seen:
            at = old.checkpoint.size - state.size
            if not 0 < at <= len(leaves):
                continue
            if _appended(state, leaves[:at])[0].root != old.checkpoint.root:
                says = f"its entries are not those that it signed at size {old.checkpoint.size}"
                self._contradiction(says, state)

    def skim(self, state: MonitorState) -> MonitorState:
        """The state with the target's edge, which the log's tiles and the head give; of the entries
        only the last is read, since its index binds the size. Raises Stop after an alarm."""
        new = self._new
        tiles = [tile for tile in tiles_of(new.size) if tile.width < TILE_WIDTH]
        edge = {(t.level or 0, t.n): self._served.file(t, self._target) for t in tiles}
        grown = replace(state, size=new.size, edge=edge, head=self._target)
        if _root(grown) != new.root:
            self._contradiction("its tiles do not lead to the signed root", state)
        for old in self._older(state):
            nodes = self._served.nodes(old.checkpoint, new)
            roots = nodes and prefix_roots(old.checkpoint.size, new.size, nodes)
            if roots != (old.checkpoint.root, new.root):
                says = f"its tiles give no proof that leads from size {old.checkpoint.size} to here"
                self._contradiction(says, state)
        if not new.size:
            return grown
        index = new.size - 1
        last = self._served.bundle(index // TILE_WIDTH, self._target)[-1]
        if not _included(last, index, new, self._served.path(index, new.size)):
            says = f"entry {index}, the last, is not the last leaf of the tree"
            self._contradiction(says, state, index=index, entry=last)
        recorded_at = self._check_entries(replace(state, size=index), [last], 0)
        return replace(grown, recorded_at=recorded_at, entries=state.entries + 1)

    def _older(self, state: MonitorState) -> list[Signed]:
        """Checkpoints signed before, of trees that the target's must extend."""
        return [old for old in (*self._seen, state.head) if old and old.checkpoint.size]

    # --- entries ---

    def _check_known(
        self,
        state: MonitorState,
        entries: Sequence[bytes],
        leaves: Sequence[bytes],
    ) -> None:
        """Entries of a bundle that was partial before must be what they were."""
        n = state.size // TILE_WIDTH
        own = state.edge[0, n] if leaves else b""
        at = _first_difference(b"".join(leaves), own)
        if at < len(leaves):
            index = n * TILE_WIDTH + at
            says = f"entry {index} is not what it was"
            self._contradiction(says, state, index=index, entry=entries[at])

    def _check_entries(
        self,
        state: MonitorState,
        entries: Sequence[bytes],
        known: int,
    ) -> int:
        """Judge each entry from position `known` on, which stands at index `state.size`; the last
        one's recorded_at (us)."""
        recorded_at = state.recorded_at
        for at in range(known, len(entries)):
            entry, index = entries[at], state.size + at - known
            self._findings.look.entries += 1
            if len(entry) > ENTRY_HEADER_BYTES:
                self._check_index(state, entry, index)
                before, recorded_at = recorded_at, int.from_bytes(entry[8:16], "big")
                if recorded_at < before:
                    self._time_ran_back(state, entries, at, index)
            self._check_event(state, entry, index)
        return recorded_at

    def _check_index(self, state: MonitorState, entry: bytes, index: int) -> None:
        written, size = int.from_bytes(entry[:8], "big"), self._new.size
        if written != index:
            kind = "wrong-size" if index == size - 1 and written > index else "misplaced-entry"
            says = f"at index {index} of {size} stands an entry that says it is entry {written}"
            self._bad(kind, says, state, entry, index)

    def _check_event(self, state: MonitorState, entry: bytes, index: int) -> None:
        try:
            kind = read_entry(entry, self._log).envelope.type
        except InvalidEvent as error:
            self._bad("bad-entry", f"entry {index}: {error}", state, entry, index)
            return
        if kind not in CATALOGUE:
            self._findings.look.unknown[kind] += 1

    def _time_ran_back(
        self,
        state: MonitorState,
        entries: Sequence[bytes],
        at: int,
        index: int,
    ) -> None:
        bundle = entries if at else self._served.bundle(index // TILE_WIDTH - 1, self._target)
        proof = self._served.proof(index - 1, self._target)
        more = {"before": bundle[at - 1], "before_proof": proof or b""}
        says = f"entry {index} was recorded before the entry that it follows"
        self._bad("bad-entry", says, state, entries[at], index, more)

    def _bad(
        self,
        kind: str,
        says: str,
        state: MonitorState,
        entry: bytes,
        index: int,
        more: Items | None = None,
    ) -> None:
        """An entry that breaks a rule, if the signed tree holds it; else the log shows another."""
        proof = self._served.proof(index, self._target)
        items = {"entry": entry, "proof": proof or b"", **(more or {})}
        if not self._findings.attempt(kind, says, items):
            self._contradiction(says, state, index=index, entry=entry)
        self._findings.look.spoiled = True
        if not self._keep_going:
            raise Stop

    # --- the tree ---

    def _check_tiles(
        self,
        state: MonitorState,
        changed: Mapping[tree.TileId, bytes],
        entries: Sequence[bytes],
    ) -> None:
        """Tiles that the target's tree has at this width must be served as they were computed."""
        for (level, n), computed in changed.items():
            tile = Tile(level=level, n=n, width=len(computed) // HASH_BYTES)
            if tile.width != width_at(self._new.size, level, n):
                continue  # more entries on the way to the target make it wider
            served = self._served.file(tile, self._target)
            if served == computed:
                continue
            at, path = _first_difference(served, computed), tile_path(tile)
            items = {
                "checkpoint": self._target.note,
                "path": path.encode(),
                "served": served[: MAX_TILE_BYTES + 1],
                "computed": computed,
            }
            self._contradiction(
                f"{path} is not what the entries hash to, from hash {at} on",
                state,
                index=n * TILE_WIDTH + at,
                entry=entries[at] if level == 0 and at < len(entries) else None,
                weaker=items,
            )

    def _contradiction(
        self,
        says: str,
        state: MonitorState,
        *,
        index: int = 0,
        entry: bytes | None = None,
        weaker: Items | None = None,
    ) -> NoReturn:
        """What is served does not make the tree that was signed: see the module's first words."""
        new, kind, older = self._new, "inconsistent", self._older(state)
        for old in older:
            nodes = self._served.nodes(old.checkpoint, new)
            self._findings.stop_if(
                kind,
                f"the tree of {new.size} entries is no extension of the {old.checkpoint.size} "
                f"that the log signed before ({says})",
                {**_pair(old, self._target), "nodes": b"".join(nodes or ())},
            )
        if entry is not None:
            leaf = self._served.leaf(index, new.size)
            proof = self._served.proof(index, self._target)
            self._findings.stop_if(
                kind,
                f"the log hands out an entry {index} that is not in the tree it signed ({says})",
                {"entry": entry, "leaf": leaf or b"", "proof": proof or b""},
            )
        if weaker:
            self._findings.stop_if(kind, f"the log contradicts itself: {says}", weaker)
        said = f"the log does not hand out the tree of {new.size} entries that it signed: {says}"
        if older:
            self._findings.stop_if(kind, said, _pair(older[-1], self._target))
        self._findings.stop(kind, said, {"checkpoint": self._target.note})


def _pair(old: Signed, new: Signed) -> dict[str, bytes]:
    return {"checkpoint_1": old.note, "checkpoint_2": new.note}


def _appended(
    state: MonitorState, leaves: Sequence[bytes]
) -> tuple[MonitorState, Mapping[tree.TileId, bytes]]:
    """The state with more leaves, and the tiles that they changed."""
    changed = tree.integrate(state.size, leaves, state.read)
    size = state.size + len(leaves)
    return replace(state, size=size, edge=edge_of(size, {**state.edge, **changed})), changed


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
