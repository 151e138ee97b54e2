"""Judge an evidence file: what its bytes prove against a log, and what is only its finder's word.
Pure.

`check_evidence` re-proves everything offline, under the log's key, so that neither finder nor log
has to be believed. Three results are possible. *Conclusive*: the log's own signatures contradict
each other or its rules, whoever shows them. *Testimony*: the signatures check, but what makes them
a fault (that a smaller tree was shown later, that a file was missing) nobody signed; it is the
finder's word, and the verdict says so. Anything else is a `VerificationError`: the file proves
nothing, whatever it claims.

The bytes are `evidence_format`'s; the judges stand in `evidence_trees` (two checkpoints, files),
`evidence_entries` (what a signed tree holds) and `evidence_others` (anchor, witnesses, receipts).
`tests/unit/test_verify_evidence.py` makes each kind, alters it, and tries to frame an honest log.
"""

from collections.abc import Callable, Mapping

from ledger.errors import BadSignature
from ledger.verify import evidence_entries as entries
from ledger.verify import evidence_others as others
from ledger.verify import evidence_trees as trees
from ledger.verify.encoding import printable
from ledger.verify.evidence_case import Case, Finding
from ledger.verify.evidence_entries import entry_fault, read_entry
from ledger.verify.evidence_format import (
    FORMAT,
    MAX_EVIDENCE_BYTES,
    SHAPES,
    Evidence,
    format_evidence,
    one_line,
    parse_evidence,
)
from ledger.verify.evidence_trees import prefix_roots
from ledger.verify.note import VerifierKey, parse_vkey
from ledger.verify.verdict import Step, Verdict

__all__ = [
    "FORMAT",
    "MAX_EVIDENCE_BYTES",
    "SHAPES",
    "Evidence",
    "check_evidence",
    "entry_fault",
    "format_evidence",
    "one_line",
    "parse_evidence",
    "prefix_roots",
    "read_entry",
]

STEP_NAMES = {1: "log key", 2: "signatures", 3: "claim"}


def check_evidence(evidence: Evidence, trusted_vkey: str | None = None) -> Verdict:
    """Re-prove what the saved bytes prove; the verdict also says what is only testimony.

    1. The log's key is `trusted_vkey`, if given (else the file's own, which is then to be trusted).
    2. Every signature that the kind needs checks under it.
    3. The claim of the kind holds.

    `facts["conclusive"]` is whether the bytes alone, with the log's key, show that the log broke a
    rule; where a contract or a witness has to be believed too, they do not. Raises a
    VerificationError when they show nothing of the kind, and nothing else, whatever the items hold.
    """
    key = _log_key(evidence.vkey, trusted_vkey)
    case = Case(log=evidence.log, key=key, items=evidence.items)
    finding = _JUDGES[evidence.kind](case)
    conclusive = not finding.testimony
    own = (
        f"That the key you gave is that of the log {printable(evidence.log)}."
        if trusted_vkey is not None
        else f"The log's key came from the evidence file itself: compare id {key.id.hex()} of "
        f"{printable(key.name)} with one that you got elsewhere."
    )
    signed = ", ".join(sorted(evidence.items))
    said = f"{evidence.kind}: " + ("shown by the bytes alone" if conclusive else "testimony")
    return Verdict(
        steps=(
            _step(1, f"{printable(key.name)} ({key.id.hex()})"),
            _step(2, f"checked what is signed in {signed}"),
            _step(3, said),
        ),
        proven=tuple(finding.proven),
        trusted=(own, *finding.trusted, *(f"Testimony: {line}" for line in finding.testimony)),
        facts={
            **finding.facts,
            "kind": evidence.kind,
            "log": evidence.log,
            "vkey": evidence.vkey,
            "found_at": evidence.found_at,
            "conclusive": conclusive,
        },
    )


def _step(number: int, detail: str) -> Step:
    return Step(number=number, name=STEP_NAMES[number], status="ok", detail=detail)


def _log_key(vkey: str, trusted_vkey: str | None) -> VerifierKey:
    key = parse_vkey(vkey)
    if trusted_vkey is not None and parse_vkey(trusted_vkey.strip()) != key:
        raise BadSignature(
            f"the evidence is against the key {printable(vkey, 200)}, you asked for "
            f"{printable(trusted_vkey, 200)}: another log's, or made up",
            field="vkey",
        )
    return key


def _wrong_size(case: Case) -> Finding:
    return trees.missing_file(case) if "path" in case.items else entries.wrong_size(case)


_JUDGES: Mapping[str, Callable[[Case], Finding]] = {
    "split-view": trees.split_view,
    "rollback": trees.rollback,
    "inconsistent": trees.inconsistent,
    "wrong-size": _wrong_size,
    "bad-entry": entries.bad_entry,
    "misplaced-entry": entries.misplaced_entry,
    "broken-receipt": others.broken_receipt,
    "anchor-mismatch": others.anchor_mismatch,
    "witness-conflict": others.witness_conflict,
    "bad-checkpoint": trees.bad_checkpoint,
}
assert _JUDGES.keys() == SHAPES.keys()
