"""From stored entries to a signed checkpoint: integrate, sign, publish, again and again.

One step, and what a crash at each point leaves:

1. read the newest checkpoint and the log's size (nothing written)
2. read leaf hashes in batches, grow the tree in memory (nothing written)
3. sign: the signer's memory is written, then the note is made. The memory is ahead of the store;
   the next step integrates at least that far, so the signer sees its tree extended.
4. show it to the witnesses, if a policy names some: their memories are ahead of the store like the
   signer's, and the next step shows them a tree that extends what they saw. Without a quorum that
   is required the step ends here, and is tried again: appends go on, checkpoints do not.
5. publish tiles and checkpoint in one transaction. Lost: as after 4. Kept though reported failed:
   the next step starts from the newer checkpoint that it reads in 1.

While nothing grows, the newest checkpoint is shown to witnesses that were away, and published again
with their lines added.

So there is no recovery code: every step is the recovery of the one before. Two sequencers are kept
apart by `TileStore.sequencer_lock`; should a lock be lost without notice, `publish` refuses the
second of them (Conflict), and it starts again from what the first has published.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Event

from ledger.errors import Conflict, Inconsistent, StorageError, Unavailable, VerificationError
from ledger.log import tree
from ledger.log.cosign import Cosigners
from ledger.log.signer import LogSigner, ProveFrom, SignedTree
from ledger.ports import Clock, EntryLog, StoredCheckpoint, TileStore

BATCH_LEAVES = 16_384
"""Leaf hashes read at a time."""
MAX_LEAVES_PER_CHECKPOINT = 262_144
"""A step signs after so many even when the log is longer, so that it cannot fall silent."""
MIN_INTERVAL_S = 0.05
"""Rest after a checkpoint: at most 20 a second under load; entries that arrive meanwhile share the
next one."""
WAIT_S = 0.5
"""How long one wait for growth lasts; also how soon `run` notices that it has to stop."""
RETRY_S = 1.0
"""Rest after an engine failed, or while another sequencer holds the lock."""

logger = logging.getLogger(__name__)


class Sequencer:
    """The one writer of tiles and checkpoints. `failure` says why it stopped for good, if so."""

    def __init__(
        self,
        *,
        log: EntryLog,
        tiles: TileStore,
        signer: LogSigner,
        clock: Clock,
        cosigners: Cosigners | None = None,
    ) -> None:
        self._log = log
        self._tiles = tiles
        self._signer = signer
        self._clock = clock
        self._cosigners = cosigners
        self.failure: VerificationError | None = None

    def run(self, stop: Event) -> None:
        """Sequence until told to stop.

        Storage failures, and a lock that another process holds, are waited out. A signer that
        refuses ends the run: the VerificationError is raised and kept in `failure`.
        """
        while not stop.is_set():
            try:
                with self._tiles.sequencer_lock() as held:
                    if held:
                        logger.info("sequencing started", extra={"origin": self._signer.origin})
                        self._sequence(stop)
            except VerificationError as error:
                self.failure = error
                logger.critical("sequencing stopped for good: %s", error)
                raise
            except (Conflict, Unavailable) as error:
                logger.warning("sequencing interrupted, retrying: %s", error)
            stop.wait(RETRY_S)

    def _sequence(self, stop: Event) -> None:
        while not stop.is_set():
            checkpoint = self.step()
            if checkpoint is None:
                published = self.complete()
                self._log.wait(published.size if published else 0, WAIT_S)
            else:
                stop.wait(MIN_INTERVAL_S)

    def step(self) -> StoredCheckpoint | None:
        """Publish the next checkpoint; None when the newest one covers the log.

        The first step of an empty log publishes the empty tree. Raises StorageError when the store
        fails, Conflict when another sequencer was faster, Inconsistent when the signer refuses,
        Unavailable when too few witnesses cosigned.
        """
        # 1. Where we are.
        published = self._tiles.latest()
        size = published.size if published else 0
        target = self._target(size, published)
        if published and target == size:
            return None
        # 2. Grow.
        staged: dict[tree.TileId, bytes] = {}
        read = _staged_over(staged, self._tiles)
        while size < target:
            leaves = self._leaves(size, min(size + BATCH_LEAVES, target))
            staged.update(tree.integrate(size, leaves, read))
            size += len(leaves)
        # 3. Sign.
        root = tree.root(size, read)
        prove_from = _prover(size, read)
        note = self._signer.sign(
            SignedTree(size=size, root=root), published=published, prove_from=prove_from
        )
        # 4. Witness.
        if self._cosigners:
            note = self._cosigners.collect(note, prove_from=prove_from)
        # 5. Publish.
        checkpoint = StoredCheckpoint(size=size, root=root, note=note, signed_at=self._clock())
        self._tiles.publish(staged, checkpoint, expected_size=published.size if published else 0)
        logger.debug("checkpoint published", extra={"size": size, "root": root.hex()})
        return checkpoint

    def complete(self) -> StoredCheckpoint | None:
        """The newest checkpoint, published again when witnesses that were away now cosigned it.

        Same size, same root, same time: only lines are added. Raises as `step` does.
        """
        published = self._tiles.latest()
        if published is None or self._cosigners is None:
            return published
        note = self._cosigners.recosign(
            published.note, prove_from=_prover(published.size, self._tiles.tiles)
        )
        if note is None:
            return published
        fuller = replace(published, note=note)
        self._tiles.publish({}, fuller, expected_size=published.size)
        logger.info("cosignatures added", extra={"size": published.size})
        return fuller

    def _target(self, size: int, published: StoredCheckpoint | None) -> int:
        """The size to sign: all there is up to a limit, but never below what was signed before."""
        floor, stored = self._signer.floor(published), self._log.size()
        if stored < floor:
            raise Inconsistent(
                f"the event store holds {stored} entries, but a tree of {floor} was signed: it was "
                "restored from an older backup or lost entries; restore the newer data",
                signed_size=floor,
                stored_size=stored,
            )
        return min(stored, max(size + MAX_LEAVES_PER_CHECKPOINT, floor))

    def _leaves(self, start: int, stop: int) -> list[bytes]:
        leaves = self._log.leaf_hashes(start, stop)
        if not leaves:
            raise StorageError(
                f"the event store says that it holds entry {start} but gives no leaf hash for it"
            )
        return leaves


def _prover(size: int, read: tree.ReadTiles) -> ProveFrom:
    """Consistency proofs to the tree of `size`; `read` may be called from several threads."""
    return lambda old: tree.range_hashes(tree.consistency_ranges(old, size), read)


def _staged_over(staged: Mapping[tree.TileId, bytes], tiles: TileStore) -> tree.ReadTiles:
    """Tiles as they will be once the staged ones are published."""

    def read(wanted: Sequence[tree.TileId]) -> Mapping[tree.TileId, bytes]:
        missing = [id for id in wanted if id not in staged]
        stored = tiles.tiles(missing) if missing else {}
        return {**stored, **{id: staged[id] for id in wanted if id in staged}}

    return read
