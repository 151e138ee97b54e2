"""Follow somebody's log and notice when it breaks its rules. No network here: a `LogSource` reads.

`Monitor.poll` is one look. It trusts the log's key and nothing else that the log says:

1. The newest checkpoint opens under the key (and carries the cosignatures that a policy asks for).
2. It is not smaller than, and does not contradict, the largest one seen before.
3. Every entry up to it is read, once. It says the index that it stands at, is a well-formed event
   of this log signed by its actor, its body is that of its type, and the log's clock does not run
   backwards: the log gives out times under the same lock as indexes, never smaller than the last,
   even where its machine's clock jumps back. A type that this version does not know is counted, not
   judged. That an event id stands twice is not noticed, since that takes a memory as long as the
   log.
4. The entries, hashed onto the monitor's own edge (`monitor_state`), give the signed root. So every
   checkpoint seen is an extension of the one before, without believing any proof of the log's. The
   tiles served, of every level, are those of the own tree (`monitor_growth`).
5. What the L1 contract holds, and what witnesses cosigned last, is the beginning of that tree
   (`monitor_others`).

With `entries=False`, 3 and 4 shrink to the consistency proof out of the log's tiles and the last
entry, whose index binds the size.

What is wrong becomes an evidence file and an alarm (`monitor_findings`). A log's files never change
and are published before the checkpoint that covers them (c2sp.org/tlog-tiles), so a covered file
that is missing is an alarm; a log that does not answer is `Unavailable`, not one.

After an alarm about entries or trees the state stays where it was, and the next run finds the same;
with `keep_going` a bad entry is noted once and the monitor goes past it. Memory is bounded by one
bundle of 256 entries and the edge. Not safe for two threads.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

from ledger.errors import NotFound, Unavailable, VerificationError
from ledger.log.monitor_findings import Alarm, Findings, Items, Look, Stop
from ledger.log.monitor_growth import Growth
from ledger.log.monitor_others import AnchorReader, Others
from ledger.log.monitor_served import READ_ATTEMPTS, REREAD_PAUSE_S, Served
from ledger.log.monitor_state import MonitorFolder, Signed, ahead_with, seen_with
from ledger.ports import Clock, LogSource
from ledger.verify.checkpoint import OpenedCheckpoint, open_checkpoint
from ledger.verify.note import MAX_NOTE_BYTES, VerifierKey, format_vkey
from ledger.verify.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Poll:
    """One look: `size` and `root` as verified now, by how much it grew, how many entries were
    checked, event types that this version does not know, who cosigned, what size the contract is
    known to agree with, what was wrong (`more` alarms are not listed), and what was not checked."""

    size: int
    root: bytes | None
    grown: int
    entries: int
    unknown_types: Mapping[str, int]
    witnesses: tuple[str, ...]
    anchored: int | None
    alarms: tuple[Alarm, ...]
    more: int
    unchecked: tuple[str, ...]


class Monitor:
    """One log's monitor. `folder` is locked by the caller for as long as this lives."""

    def __init__(
        self,
        source: LogSource,
        folder: MonitorFolder,
        *,
        log: str,
        key: VerifierKey,
        clock: Clock,
        policy: tuple[Policy, bytes] | None = None,
        anchor: AnchorReader | None = None,
        witnesses: Mapping[VerifierKey, LogSource] = MappingProxyType({}),
        entries: bool = True,
        keep_going: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`log` is the origin, `policy` a parsed file and its bytes, `anchor` reads the contract,
        `witnesses` are asked what they cosigned last, `entries` is whether every entry is read."""
        self._source = source
        self._folder = folder
        self._log, self._key = log, key
        self._clock, self._sleep = clock, sleep
        self._policy = policy
        self._every_entry = entries
        self._keep_going = keep_going
        self._findings = Findings(folder.evidence, log=log, key=key, clock=clock)
        self._served = Served(source, self._findings, sleep)
        self._others = Others(
            self._served, self._findings, log=log, key=key, anchor=anchor, witnesses=witnesses
        )
        self.state = folder.load()

    def poll(self) -> Poll:
        """One look. Raises Unavailable when the log does not answer, StorageError when the state
        cannot be written; what is wrong with the log stands in the result."""
        look = self._findings.look = Look()
        before = self._size
        try:
            self._follow(look)
        except Stop:
            self._folder.drop_progress()
        except Unavailable as error:
            if not look.alarms:
                raise
            look.unchecked.append(str(error))
        return Poll(
            size=self._size,
            root=self.state.head.checkpoint.root if self.state.head else None,
            grown=self._size - before,
            entries=look.entries,
            unknown_types=dict(look.unknown),
            witnesses=look.witnesses,
            anchored=self.state.anchored[0] if self.state.anchored else None,
            alarms=tuple(look.alarms),
            more=look.more,
            unchecked=tuple(look.unchecked),
        )

    @property
    def _size(self) -> int:
        return self.state.head.checkpoint.size if self.state.head else 0

    def _follow(self, look: Look) -> None:
        # Before the checkpoint: what they hold was the log's before.
        anchored, witnessed = self._others.read_anchor(), self._others.read_witnesses()
        new, opened = self._checkpoint()
        look.witnesses = tuple(seen.key.name for seen in opened.witnesses)
        self._compare(new)
        # What a witness saw of a larger tree binds the log too, for the day that it shows us one:
        # a log that keeps us behind the witness would else never be compared with it.
        size = new.checkpoint.size
        larger = [theirs for theirs in witnessed if theirs.checkpoint.size > size]
        self._save(ahead=ahead_with(self.state.ahead, larger))
        self._reach(new)
        if anchored and anchored.size:
            pair = (anchored.size, anchored.root)
            if pair == self.state.anchored or self._others.check_anchored(anchored, new):
                self._save(anchored=pair)
        due = [theirs for theirs in self.state.ahead if theirs.checkpoint.size <= size]
        for theirs in ahead_with(due, witnessed):
            self._others.check_witnessed(theirs, new)
        if not look.alarms:
            self._save(last_ok=self._clock(), ahead=self.state.ahead[len(due) :])

    def _save(self, **changes: Any) -> None:
        state = replace(self.state, **changes)
        if state != self.state:
            self._folder.save(state)
            self.state = state

    # --- 1: the checkpoint ---

    def _checkpoint(self) -> tuple[Signed, OpenedCheckpoint]:
        """The newest one; read again when it does not open, or lacks cosignatures, at first."""
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                self._sleep(REREAD_PAUSE_S)
            note = self._read_checkpoint()
            last = attempt == READ_ATTEMPTS - 1
            try:
                opened = self._open(note)
            except VerificationError as error:
                if not last:
                    continue
                self._findings.stop(
                    "bad-checkpoint",
                    f"the log serves a checkpoint that does not open under its key: {error}",
                    {"checkpoint": note[: MAX_NOTE_BYTES + 1]},
                )
            lacks = self._lacks(opened)
            if not lacks or last:
                break
        if lacks and self._policy:
            says = f"the checkpoint of size {opened.checkpoint.size} has too few witnesses: {lacks}"
            items = {"checkpoint": note, "policy": self._policy[1]}
            self._findings.alarm("witness-conflict", says, items)
        return Signed(checkpoint=opened.checkpoint, note=note), opened

    def _read_checkpoint(self) -> bytes:
        try:
            return self._source.read("checkpoint")
        except NotFound as error:
            raise Unavailable(f"there is no log here (yet): {error}") from error

    def _open(self, note: bytes) -> OpenedCheckpoint:
        witnesses = self._policy[0].keys if self._policy else ()
        return open_checkpoint(note, self._key, origin=self._log, witnesses=witnesses)

    def _lacks(self, opened: OpenedCheckpoint) -> str:
        """What the policy misses in it; empty when nothing."""
        keys = [seen.key for seen in opened.witnesses]
        if self._policy is None or self._policy[0].satisfied_by(keys):
            return ""
        return self._policy[0].shortfall(keys)

    # --- 2: against the largest seen ---

    def _compare(self, new: Signed) -> None:
        now = new.checkpoint
        for seen in (*self.state.seen, self.state.head):
            if seen and seen.checkpoint.size == now.size and seen.checkpoint.root != now.root:
                pair = {"checkpoint_1": seen.note, "checkpoint_2": new.note}
                self._blame_witnesses(pair)
                says = f"the log signed two different trees of {now.size} entries"
                self._findings.stop("split-view", says, pair)
        largest = self.state.seen[-1] if self.state.seen else None
        if largest and now.size < largest.checkpoint.size:
            self._rolled_back(largest, new)

    def _rolled_back(self, seen: Signed, new: Signed) -> NoReturn:
        old, now = seen.checkpoint, new.checkpoint
        pair = {"checkpoint_1": seen.note, "checkpoint_2": new.note}
        self._blame_witnesses(pair)
        if nodes := self._served.nodes(now, old):
            self._findings.stop_if(
                "inconsistent",
                f"the log shows a tree of {now.size} entries that is not the beginning of the "
                f"{old.size} it signed before",
                {"checkpoint_1": new.note, "checkpoint_2": seen.note, "nodes": b"".join(nodes)},
            )
        says = f"the log shows a tree of {now.size} entries after one of {old.size}"
        self._findings.stop("rollback", says, pair)

    def _blame_witnesses(self, pair: Items) -> None:
        """Witnesses who cosigned both sides of a contradiction."""
        for known in self._policy[0].keys if self._policy else ():
            self._findings.attempt(
                "witness-conflict",
                f"the witness {known.name} cosigned two checkpoints that exclude each other",
                {**pair, "witness": format_vkey(known).encode()},
            )

    # --- 3 and 4: the own tree ---

    def _reach(self, new: Signed) -> None:
        """Bring the state to a checkpoint at least as large as any seen."""
        self._save(seen=seen_with(self.state.seen, new))
        if self.state.head and new.checkpoint.size == self._size:
            self._save(head=new)  # the same tree, perhaps with newer cosignatures
            return
        growth = Growth(
            self._served,
            self._findings,
            log=self._log,
            keep_going=self._keep_going,
            target=new,
            seen=[old for old in self.state.seen[:-1] if old.checkpoint.size > self._size],
        )
        if self._every_entry:
            start = self._folder.progress(self.state, new.checkpoint.size)
            state = growth.grow(start, self._folder.save_progress)
        else:
            state = growth.skim(self.state)
        state = replace(state, seen=(new,))
        self._folder.save(state)
        self._folder.drop_progress()
        self.state = state
