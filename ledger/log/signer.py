"""The log's key, and the memory that keeps it from ever signing two histories.

A signature is the one thing that cannot be taken back. So the signer itself, not its caller, checks
before each one that the new tree extends

* the tree it remembers, from a small file beside the key, and
* the newest checkpoint of the tile store (another server with this key may have signed it),

each by an RFC 9162 consistency proof. It writes the new tree to its memory *before* it signs. What
a crash leaves:

* after the memory was written, before publishing: the memory is ahead of the store. The next run
  integrates at least as far and proves that it extends the remembered tree.
* a database restored from an older backup, with the memory intact: the log is shorter than what
  was signed, or differs from it. The signer refuses, for good: bring back the newer data, or start
  a log under another origin. Deleting the memory file would sign a fork.
* memory lost, store intact: the store's newest checkpoint takes its place.

Both lost together cannot be noticed here; witnesses and the anchor contract exist for that.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nacl.signing import SigningKey

from ledger.errors import ConfigError, Inconsistent, StorageError, VerificationError
from ledger.files import write_durably
from ledger.log.keyfile import ensure_signer_key
from ledger.ports import StoredCheckpoint
from ledger.verify.checkpoint import Checkpoint, format_checkpoint, open_checkpoint
from ledger.verify.merkle import verify_consistency
from ledger.verify.note import (
    VerifierKey,
    format_note,
    format_vkey,
    sign_text,
    valid_name,
    vkey_of,
)
from ledger.verify.receipt import CONTEXT as RECEIPT_CONTEXT
from ledger.verify.receipt import FORMAT as RECEIPT_FORMAT

STATE_FORMAT = "tributary/signer-state/v1"
ProveFrom = Callable[[int], Sequence[bytes]]
"""The consistency proof from a smaller size to the tree that is to be signed."""


@dataclass(frozen=True, kw_only=True)
class SignedTree:
    """A tree head that was, or was about to be, signed."""

    size: int
    root: bytes


class LogSigner:
    """One log's Ed25519 key. Not thread-safe: one sequencer uses it. `sign_receipt` alone keeps no
    state, any thread may call it."""

    def __init__(self, *, origin: str, key: SigningKey, state_path: Path) -> None:
        assert valid_name(origin)
        self.origin = origin
        self.vkey: VerifierKey = vkey_of(origin, key)
        self._key = key
        self._state_path = state_path

    @classmethod
    def open(cls, *, origin: str, key_path: Path, state_path: Path) -> "LogSigner":
        """Read the key file, or create it (0600) on the first start.

        Raises ConfigError when the file is readable by others or holds another origin's key.
        """
        if not valid_name(origin):
            raise ConfigError(f"the origin {origin!r} must have no spaces and no plus sign")
        if origin == RECEIPT_FORMAT:
            raise ConfigError(f"the origin must not be {RECEIPT_FORMAT}: receipts start with it")
        _, key = ensure_signer_key(key_path, name=origin)
        return cls(origin=origin, key=key, state_path=state_path)

    @property
    def vkey_text(self) -> str:
        """The public key as text, for everyone who verifies."""
        return format_vkey(self.vkey)

    def remembered(self) -> SignedTree | None:
        """The largest tree that this key has signed, as far as this machine knows."""
        try:
            state = json.loads(self._state_path.read_bytes())
            if state["format"] == STATE_FORMAT and state["origin"] == self.origin:
                return SignedTree(size=int(state["size"]), root=bytes.fromhex(state["root"]))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(
                f"cannot read {self._state_path}: {error.strerror or error}; nothing was signed. "
                "The sequencer tries again by itself"
            ) from error
        except (ValueError, KeyError, TypeError):
            pass
        raise ConfigError(
            f"{self._state_path} is not the signer's memory for {self.origin}: restore it from a "
            "backup; without it the log could be made to sign a fork"
        )

    def floor(self, published: StoredCheckpoint | None) -> int:
        """The size that the next signed tree must reach."""
        memory = self.remembered()
        return max(memory.size if memory else 0, published.size if published else 0)

    def sign(
        self, tree: SignedTree, *, published: StoredCheckpoint | None, prove_from: ProveFrom
    ) -> bytes:
        """The signed note of `tree`, once it is shown to extend all that was signed before.

        Raises Inconsistent, with both trees named, when it does not; StorageError when the memory
        cannot be written (a full disk): then nothing is signed.
        """
        memory = self.remembered()
        if memory:
            self._check_extends(memory, tree, prove_from, "the signer's memory")
        if published:
            self._check_extends(self._own(published), tree, prove_from, "the published checkpoint")
        # Also what is remembered already: whoever wrote it may have been killed, or told of a
        # failure, before it was sure to survive a power cut.
        self._remember(tree)
        # A crash here leaves the memory ahead of the store; the next run signs this tree or one
        # that extends it.
        text = format_checkpoint(Checkpoint(origin=self.origin, size=tree.size, root=tree.root))
        return format_note(text, [sign_text(text, self.origin, self._key)])

    def sign_receipt(self, promise: bytes) -> bytes:
        """The signature over a receipt's promise (canonical JSON), behind the receipts' context.

        The same key signs checkpoints, so no message may ever pass for one of the other kind: a
        checkpoint starts with the origin's line, a receipt's message with the line RECEIPT_FORMAT,
        and `open` refuses the one origin that would make those equal. A promise without the log's
        memory is harmless: what it says is checked against checkpoints, not the other way round.
        """
        return self._key.sign(RECEIPT_CONTEXT + promise).signature

    def _own(self, published: StoredCheckpoint) -> SignedTree:
        """What the stored note says, signature checked: the store's columns are not signed."""
        head = open_checkpoint(published.note, self.vkey).checkpoint
        return SignedTree(size=head.size, root=head.root)

    def _check_extends(
        self, old: SignedTree, new: SignedTree, prove_from: ProveFrom, where: str
    ) -> None:
        try:
            if new.size < old.size:
                raise Inconsistent(f"the tree has {new.size} leaves, {old.size} were signed")
            verify_consistency(
                size1=old.size,
                size2=new.size,
                root1=old.root,
                root2=new.root,
                proof=prove_from(old.size),
            )
        except VerificationError as error:
            raise Inconsistent(
                f"refused to sign size {new.size}, root {new.root.hex()}: it does not extend size "
                f"{old.size}, root {old.root.hex()} ({where}): {error}. The data is older than, or "
                "different from, what this key has signed: restore the newer data, or start a new "
                "log under another origin",
                signed_size=old.size,
                refused_size=new.size,
            ) from error

    def _remember(self, tree: SignedTree) -> None:
        state = {
            "format": STATE_FORMAT,
            "origin": self.origin,
            "size": tree.size,
            "root": tree.root.hex(),
        }
        _write_durably(self._state_path, json.dumps(state).encode() + b"\n")


def _write_durably(path: Path, data: bytes) -> None:
    """Replace the file in one step, readable by its owner alone, on disk when this returns."""
    try:
        write_durably(path, data)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; nothing was signed. Free the disk or "
            "mend the folder's rights; the sequencer tries again by itself"
        ) from error
