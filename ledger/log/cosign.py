"""The log's side of witnessing: collect cosignatures for a checkpoint before it is published.

All witnesses of the policy are asked at once, each at most once at a time, and what came within
the time is added under the note, verified first: a forged or foreign line never gets there. With
`required`, a checkpoint without the policy's quorum is withheld (Unavailable) and tried again;
without it, the checkpoint goes out with what there is.

A witness that is asked from a wrong size names its own (409), and is asked once more from there. A
witness that has seen *another history* of this log is the alarm that witnesses exist for: its
cosigned checkpoint is fetched, since it bears this log's own signature, and kept as evidence.

A slow witness costs the time limit once, and is then asked again after a pause that doubles: at
once only where the quorum that is required cannot be met without it. The transport is passed in;
no HTTP here. Protocol: c2sp.org/tlog-witness; cosignatures: c2sp.org/tlog-cosignature.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ledger.errors import (
    ConfigError,
    Inconsistent,
    LedgerError,
    MalformedProof,
    Unavailable,
)
from ledger.log.add_checkpoint import (
    MAX_PROOF_LINES,
    PATH,
    AddCheckpoint,
    checkpoint_path,
    format_request,
    parse_cosignature,
    parse_size,
    with_lines,
)
from ledger.log.kept_evidence import EvidenceFolder
from ledger.log.signer import ProveFrom
from ledger.ports import Clock
from ledger.verify.checkpoint import Checkpoint, open_checkpoint, parse_checkpoint
from ledger.verify.encoding import printable
from ledger.verify.note import (
    Note,
    SignatureLine,
    VerifierKey,
    format_note,
    parse_note,
    verify_note,
)
from ledger.verify.policy import Policy, PolicyWitness

GRACE_S = 0.25
"""With the quorum met, how long the others may still take. Who comes later is asked again when the
log is idle."""
MAX_PAUSE_S = 30.0
CONFLICT_PAUSE_S = 60.0
"""A witness that saw another history does not change its mind; asking it often floods the log."""
RECOSIGN_S = 10.0
"""Between two rounds for a checkpoint that is out already."""

Send = Callable[[str, str, str, bytes], tuple[int, bytes]]
"""URL prefix, method, path, body -> status and body. Raises Unavailable, or NotFound."""

logger = logging.getLogger(__name__)


class _OtherHistory(Inconsistent):
    """A witness has cosigned a history of this log that is not ours."""


@dataclass(kw_only=True)
class _Party:
    """A witness as this process knows it. `size` is what it is believed to have cosigned last."""

    witness: PolicyWitness
    url: str
    size: int = 0
    busy: bool = False
    failures: int = 0
    asleep_until: float = 0.0
    conflict: bool = False
    problem: str | None = None

    @property
    def name(self) -> str:
        return printable(self.witness.name)


@dataclass(kw_only=True)
class _Round:
    """One checkpoint on its way around the witnesses."""

    note: Note
    head: Checkpoint
    prove_from: ProveFrom
    changed: threading.Condition = field(default_factory=threading.Condition)
    lines: dict[VerifierKey, SignatureLine] = field(default_factory=dict)
    pending: int = 0

    def answered(self, policy: Policy) -> dict[VerifierKey, SignatureLine]:
        """The lines that came so far, in the policy's order."""
        with self.changed:
            return {key: self.lines[key] for key in policy.keys if key in self.lines}


class Cosigners:
    """The witnesses of one log. One sequencer uses it; `health` may be asked from any thread.

    `timeout_s` bounds a round. `required` is whether a checkpoint without quorum is withheld.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        vkey: VerifierKey,
        send: Send,
        evidence: Path,
        clock: Clock,
        timeout_s: float,
        required: bool,
    ) -> None:
        _check_policy(policy, vkey, required=required)
        self.policy = policy
        self.required = required
        self._vkey = vkey
        self._send = send
        self._timeout_s = timeout_s
        self._evidence = EvidenceFolder(evidence, clock=clock)
        self._parties = [_Party(witness=w, url=w.url) for w in policy.witnesses if w.url]
        self._withheld: str | None = None
        self._last = "no checkpoint was shown to the witnesses yet"
        self._next_recosign = 0.0
        self._idle: _Round | None = None

    def collect(self, note: bytes, *, prove_from: ProveFrom) -> bytes:
        """The note with the cosignatures that it has and those that came within the time.

        `prove_from` gives the consistency proof from a smaller size to the note's tree. Raises
        Unavailable when the quorum is required and not met: nothing may be published then.
        """
        parsed = parse_note(note)
        head = parse_checkpoint(parsed.text)
        round = _Round(note=parsed, head=head, prove_from=prove_from)
        have = self._cosigned(parsed)
        self._start(round, [p for p in self._whom(have) if p.witness.key not in have])
        self._wait(round, have)
        lines = round.answered(self.policy)
        self._judge(head, {*have, *lines})
        merged = with_lines(parsed, list(lines.values()))
        return format_note(merged.text, merged.signatures)

    def recosign(self, note: bytes, *, prove_from: ProveFrom) -> bytes | None:
        """A published note with more cosignatures; None when there are no more yet.

        For a witness that was away when the checkpoint went out. Never waits: it starts to ask, at
        most every RECOSIGN_S, and a later call has what came meanwhile.
        """
        parsed = parse_note(note)
        have = self._cosigned(parsed)
        asked = self._idle if self._idle and self._idle.note.text == parsed.text else None
        lines = asked.answered(self.policy) if asked else {}
        if asked and not all(key in have for key in lines):
            with suppress(Unavailable):  # it is out already; `health` says what is missing
                self._judge(asked.head, {*have, *lines})
            merged = with_lines(parsed, list(lines.values()))
            return format_note(merged.text, merged.signatures)
        self._ask_when_due(parsed, have, prove_from)
        return None

    def _ask_when_due(
        self, note: Note, have: Collection[VerifierKey], prove_from: ProveFrom
    ) -> None:
        now = time.monotonic()
        missing = [p for p in self._whom(have) if p.witness.key not in have]
        if missing and now >= self._next_recosign:
            self._next_recosign = now + RECOSIGN_S
            head = parse_checkpoint(note.text)
            self._idle = _Round(note=note, head=head, prove_from=prove_from)
            self._start(self._idle, missing)

    def health(self) -> tuple[bool, str]:
        """Whether checkpoints come through, and what the witnesses said last."""
        troubles = [f"{p.name}: {p.problem}" for p in self._parties if p.problem]
        return self._withheld is None, "; ".join([self._withheld or self._last, *troubles])

    # --- a round ---

    def _cosigned(self, note: Note) -> set[VerifierKey]:
        verified = verify_note(note, [self._vkey, *self.policy.keys]).verified
        return {v.key for v in verified if v.key != self._vkey}

    def _whom(self, have: Collection[VerifierKey]) -> list[_Party]:
        """Who is asked: those awake; and, where the quorum needs them, those that failed lately."""
        now = time.monotonic()
        free = [p for p in self._parties if not p.busy]
        awake = [p for p in free if p.asleep_until <= now]
        enough = self.policy.satisfied_by({*have, *(p.witness.key for p in awake)})
        if enough or not self.required:
            return awake
        return [p for p in free if p in awake or not p.conflict]

    def _start(self, round: _Round, parties: Sequence[_Party]) -> None:
        """Ask each on a thread of its own. One that is late goes on, and then frees its party: its
        line is too late for this note."""
        round.pending = len(parties)
        for party in parties:
            party.busy = True
            threading.Thread(
                target=self._visit, args=(party, round), name=f"witness {party.name}", daemon=True
            ).start()

    def _wait(self, round: _Round, have: Collection[VerifierKey]) -> None:
        """Until all answered, or the time is over, or the quorum is met and GRACE_S has passed."""
        end, met = time.monotonic() + self._timeout_s, False
        with round.changed:
            while round.pending and (left := end - time.monotonic()) > 0:
                # Looked at before each wait: some may have answered before the first one.
                if not met and self.policy.quorum:
                    met = self.policy.satisfied_by({*have, *round.lines})
                    if met:
                        end = min(end, time.monotonic() + GRACE_S)
                        continue
                round.changed.wait(left)

    def _visit(self, party: _Party, round: _Round) -> None:
        line: SignatureLine | None = None
        try:
            line = self._obtain(party, round)
        except _OtherHistory as error:
            self._alarm(party, round, error)
            _put_to_sleep(party, error.message, for_s=CONFLICT_PAUSE_S, conflict=True)
        except LedgerError as error:
            _put_to_sleep(party, error.message)
        except Exception as error:
            # This thread is nobody's child: what it does not report would be lost.
            logger.exception("asking the witness %s failed", party.name)
            _put_to_sleep(party, f"{type(error).__name__}: {error}")
        else:
            party.failures, party.problem, party.conflict = 0, None, False
        finally:
            with round.changed:
                if line is not None:
                    round.lines[party.witness.key] = line
                round.pending -= 1
                party.busy = False
                round.changed.notify_all()

    def _obtain(self, party: _Party, round: _Round) -> SignatureLine:
        """The witness's verified line over the round's checkpoint."""
        old = party.size if party.size <= round.head.size else 0
        status, body = self._post(party, round, old)
        if status == 409:
            old = self._named_size(party, round, body)
            status, body = self._post(party, round, old)
        if status == 409 and party.size == round.head.size:
            raise _OtherHistory(f"it cosigned another root at size {round.head.size}")
        if status == 422:
            raise _OtherHistory(f"size {round.head.size} does not extend what it cosigned at {old}")
        if status != 200:
            said = printable(body[:200].decode("utf-8", "replace").strip())
            raise Unavailable(f"it answered {status}: {said}")
        line, _ = parse_cosignature(body, round.note.text, party.witness.key)
        party.size = round.head.size
        return line

    def _post(self, party: _Party, round: _Round, old: int) -> tuple[int, bytes]:
        size = round.head.size
        proof = round.prove_from(old) if 0 < old < size else ()
        if len(proof) > MAX_PROOF_LINES:
            raise MalformedProof(f"no request holds the proof from {old} to {size}")
        request = AddCheckpoint(
            old_size=old,
            proof=tuple(proof),
            checkpoint=format_note(round.note.text, round.note.signatures),
        )
        return self._send(party.url, "POST", PATH, format_request(request))

    def _named_size(self, party: _Party, round: _Round, body: bytes) -> int:
        """What a 409 says was cosigned last. One without a size is about the root of this size."""
        try:
            size = parse_size(body)
        except MalformedProof:
            said = printable(body[:200].decode("utf-8", "replace").strip())
            raise _OtherHistory(f"it refused this tree: {said}") from None
        if size > round.head.size:
            raise _OtherHistory(
                f"it cosigned size {size}, this log is at {round.head.size}: was the database "
                "restored from an older backup?"
            )
        party.size = size
        return size

    # --- what came of it ---

    def _judge(self, head: Checkpoint, have: Collection[VerifierKey]) -> None:
        met = self.policy.satisfied_by(have)
        self._last = f"size {head.size}: {self.policy.shortfall(have)}"
        if met or not self.required:
            self._withheld = None
            return
        self._withheld = f"checkpoint of size {head.size} withheld: {self.policy.shortfall(have)}"
        troubles = "; ".join(f"{p.name}: {p.problem}" for p in self._parties if p.problem)
        raise Unavailable(f"{self._withheld}. {troubles or 'no answer within the time'}")

    def _alarm(self, party: _Party, round: _Round, error: _OtherHistory) -> None:
        logger.critical("the witness %s saw another history: %s", party.name, error.message)
        origin = round.head.origin
        try:
            status, theirs = self._send(party.url, "GET", checkpoint_path(origin), b"")
            if status != 200:
                raise Unavailable(f"it answered {status}")
            seen = open_checkpoint(theirs, self._vkey, origin=origin).checkpoint
            ours = format_note(round.note.text, round.note.signatures)
            self._keep(party, seen, theirs, round, ours)
        except LedgerError as problem:
            logger.warning("the witness %s shows no proof of it: %s", party.name, problem)

    def _keep(
        self, party: _Party, seen: Checkpoint, theirs: bytes, round: _Round, ours: bytes
    ) -> None:
        head, says = round.head, f"the witness {party.name} cosigned another history"
        if seen.size == head.size:
            items = {"checkpoint_1": theirs, "checkpoint_2": ours}
            kind = "split-view"
        elif 0 < seen.size < head.size:
            proof = b"".join(round.prove_from(seen.size))
            items = {"checkpoint_1": theirs, "checkpoint_2": ours, "consistency": proof}
            kind = "inconsistent"
        else:
            items = {"checkpoint_1": theirs, "checkpoint_2": ours}
            kind = "rollback"
        self._evidence.keep(kind, log=head.origin, key=self._vkey, says=says, items=items)


def _put_to_sleep(
    party: _Party, problem: str, *, for_s: float | None = None, conflict: bool = False
) -> None:
    pause = for_s or min(MAX_PAUSE_S, 2.0**party.failures)
    party.failures += 1
    party.conflict = conflict
    party.asleep_until = time.monotonic() + pause
    if party.problem != problem:
        logger.warning("no cosignature by %s: %s", party.name, problem)
    party.problem = problem


def _check_policy(policy: Policy, vkey: VerifierKey, *, required: bool) -> None:
    if policy.logs and vkey not in [log.key for log in policy.logs]:
        raise ConfigError(f"the witness policy is about other logs, not about {vkey.name}")
    if any(key.public_key == vkey.public_key for key in policy.keys):
        raise ConfigError("the witness policy names this log's own key as a witness")
    reachable = [w for w in policy.witnesses if w.url]
    strange = [w.url for w in reachable if w.url and not w.url.startswith(("https://", "http://"))]
    if strange:
        raise ConfigError(f"the witness policy has no http(s) URL: {printable(strange[0])}")
    if required and not policy.satisfied_by([w.key for w in reachable]):
        raise ConfigError(
            "the witness policy demands a quorum that its witnesses with a URL cannot make: "
            f"{policy.shortfall([w.key for w in reachable])}"
        )
