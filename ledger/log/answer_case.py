"""What a log says of an answer or of a training run, out of a lineage bundle that holds. Pure.

An audit of an attribution starts from recorded facts: who was paid, which index and evidence were
named, which rows the run was trained on and whose they are. Here they come from the bundle's
entries once `verify_bundle` has checked every signature, proof and reference between them; nothing
is taken from a server's word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ledger.domain.canonical import parse_canonical
from ledger.domain.envelope import Entry, decode_entry
from ledger.errors import InvalidEvent, NotFound
from ledger.verify.bundle import verify_bundle
from ledger.verify.bundle_format import parse_bundle
from ledger.verify.checkpoint import Checkpoint, parse_checkpoint
from ledger.verify.note import parse_note
from ledger.verify.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class RunCase:
    """A completed run: its events, its training manifest, and the contributions it lists.

    `recorded` maps contribution id to its contribution.recorded; `head` is the tree the log signed.
    """

    verdict: Verdict
    head: Checkpoint
    requested: Entry
    completed: Entry
    manifest: bytes
    recorded: Mapping[str, Entry]

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The manifest's rows in order: `contribution`, `row`, `row_hash`."""
        return list(parse_canonical(self.manifest)["rows"])


@dataclass(frozen=True, kw_only=True)
class AnswerCase:
    """An attributed answer, and the run behind it."""

    attribution: Entry
    inference: Entry
    run: RunCase


def answer_case(data: bytes, *, trusted_vkey: str | None = None) -> AnswerCase:
    """The case of a bundle whose subject is an attribution.recorded.

    Raises VerificationError when the bundle does not hold, NotFound when the answer is not
    attributed yet, InvalidEvent when the bundle is about something else.
    """
    verdict, entries, head, blobs = _opened(data, trusted_vkey)
    subject = next(e for e in entries if str(e.envelope.id) == verdict.facts["subject"])
    kind = subject.envelope.type
    if kind == "inference.recorded":
        raise NotFound("the answer is not attributed yet: the worker service does it in seconds")
    if kind != "attribution.recorded":
        raise InvalidEvent(f"that is a {kind}; name an answer or its attribution.recorded")
    body = subject.envelope.body
    return AnswerCase(
        attribution=subject,
        inference=_one(entries, "inference.recorded", "inference", body["inference"]),
        run=_run(verdict, entries, head, blobs, body["run"]),
    )


def run_case(data: bytes, run: str, *, trusted_vkey: str | None = None) -> RunCase:
    """The case of a completed run, from a bundle of its run.completed or of what rests on it.

    Raises VerificationError when the bundle does not hold, NotFound when the run is not in it.
    """
    verdict, entries, head, blobs = _opened(data, trusted_vkey)
    return _run(verdict, entries, head, blobs, run)


def _opened(
    data: bytes, trusted_vkey: str | None
) -> tuple[Verdict, list[Entry], Checkpoint, Mapping[str, bytes]]:
    verdict = verify_bundle(data, trusted_vkey=trusted_vkey)
    bundle = parse_bundle(data)
    entries = [decode_entry(bundled.entry, verify=False) for bundled in bundle.entries]
    return verdict, entries, parse_checkpoint(parse_note(bundle.checkpoint).text), bundle.blobs


def _run(
    verdict: Verdict,
    entries: Sequence[Entry],
    head: Checkpoint,
    blobs: Mapping[str, bytes],
    run: str,
) -> RunCase:
    completed = _one(entries, "run.completed", "run", run)
    return RunCase(
        verdict=verdict,
        head=head,
        requested=_one(entries, "run.requested", "run", run),
        completed=completed,
        manifest=blobs[completed.envelope.body["manifest_sha256"]],
        recorded={
            entry.envelope.body["contribution"]: entry
            for entry in entries
            if entry.envelope.type == "contribution.recorded"
        },
    )


def _one(entries: Sequence[Entry], type: str, field: str, value: str) -> Entry:
    """The first is the only one: the bundle's lineage was checked."""
    for entry in entries:
        if entry.envelope.type == type and entry.envelope.body[field] == value:
            return entry
    raise NotFound(f"the bundle has no {type} of {field} {value[:64]}")
