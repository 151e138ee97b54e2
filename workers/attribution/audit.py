"""Recompute an attribution from what was committed, to the last ppm. No torch, no network.

The event names an evidence document, the document a sketch, the run an index. From these and the
terms that the log itself gives, everything else follows in integers, the same on every machine:
so the tolerance is nothing at all. The steps, in order:

1. evidence      the document has the hash that the event names, and is about that answer
2. index         the index has the hash and the root that the run recorded, and is its adapter's
3. rows          its rows are those that the run was trained on, each under its contributor's name
4. terms         withdrawals and splits are what the log said at the size the document names
5. scores        sketch times index gives scores of the recorded hash
6. placebo       and the recorded placebo level
7. shares        scores, clusters and terms give the recorded shares: 0 ppm difference
8. named rows    the rows named for and against the answer are the right ones

What this cannot know: that the sketch is the answer's (`audit_weights.py`), and that the index is
the rows' (`audit_index.py`). `tests/unit/test_attribution_audit.py` breaks each step once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ledger.domain.ids import sha256_hex
from ledger.domain.money import PPM_WHOLE
from ledger.errors import Inconsistent, InvalidEvent, VerificationError
from workers.attribution.committed import (
    LEVEL_SHIFT,
    CommittedIndex,
    CommittedSketch,
    read_sketch,
    scores_of,
    scores_sha256,
)
from workers.attribution.evidence import (
    MAX_NAMED_ROWS,
    NONE_METHOD,
    Evidence,
    NamedRow,
    NotAttributed,
    parse,
)
from workers.attribution.shares import Shares, shares_from_voices, shift_of, weight_of
from workers.attribution.terms import Terms

STEPS = ("evidence", "index", "rows", "terms", "scores", "placebo", "shares", "named rows",
         "weights", "sketch", "effect", "rebuilt index")  # fmt: skip
"""The last four are those of `audit_weights.py` and `audit_index.py`."""


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """A row of the run's training manifest, and what the log says of its contribution."""

    contribution: str
    index: int
    row_hash: str
    contributor: str
    registered_index: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the log recorded: of an attribution, and of the run behind it.

    `inference_index` and `attribution_index` are leaf indexes: terms must be of a log that held the
    answer, and cannot be of one that held the attribution itself.
    """

    inference: str
    method: str
    evidence_sha256: str
    index_sha256: str
    shares: list[tuple[str, int]]
    unattributed_ppm: int
    index_root: str
    run_index_sha256: str
    adapter_sha256: str
    base_model: str
    inference_index: int
    attribution_index: int
    rows: Sequence[TrainedRow] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class AuditStep:
    """One step that held, or that could not be taken (`skipped`), and why."""

    number: int
    name: str
    status: str
    detail: str


@dataclass
class Audit:
    """Steps taken so far. A step that fails raises, and names itself; it is never listed."""

    steps: list[AuditStep] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def ok(self, name: str, detail: str) -> None:
        self.steps.append(_step(name, "ok", detail))

    def skip(self, name: str, why: str) -> None:
        self.steps.append(_step(name, "skipped", why))

    @contextmanager
    def taking(self, name: str) -> Iterator[None]:
        """Errors inside are of that step: `detail["step"]` and the message say so."""
        try:
            yield
        except (VerificationError, InvalidEvent) as error:
            # Hostile bytes are their fault, not the auditor's: a failed verification.
            said = f"{name}: {error.message}"
            raise Inconsistent(said, **{**error.detail, "step": name}) from error


def _step(name: str, status: str, detail: str) -> AuditStep:
    return AuditStep(number=STEPS.index(name) + 1, name=name, status=status, detail=detail)


def read_evidence(audit: Audit, claim: Claim, data: bytes) -> Evidence | NotAttributed:
    """Step 1. `data` is the blob that the event names."""
    with audit.taking("evidence"):
        if sha256_hex(data) != claim.evidence_sha256:
            raise Inconsistent(
                f"the document hashes to {sha256_hex(data)}; the event names "
                f"{claim.evidence_sha256}"
            )
        found = parse(data)
        _agree("method", found.method, claim.method)
        if isinstance(found, Evidence):
            _agree("inference", found.inference, claim.inference)
            _agree("index_sha256", found.index_sha256, claim.index_sha256)
    version = f"version {found.version}" if isinstance(found, Evidence) else NONE_METHOD
    audit.ok("evidence", f"{version}, {len(data)} bytes, {claim.evidence_sha256}")
    return found


def audit_shares(
    audit: Audit, claim: Claim, evidence: Evidence, index: CommittedIndex, terms: Terms
) -> Shares:
    """Steps 2 to 8: `index` was opened by the hash in `claim`, `terms` come from the log itself.

    Raises Inconsistent that names the step which does not hold.
    """
    _check_index(audit, claim, index)
    _check_rows(audit, claim, index)
    _check_terms(audit, claim, evidence, terms)
    with audit.taking("scores"):
        sketch = read_sketch(evidence.sketch)
        scores = scores_of(index, sketch)
        _agree("scores_sha256", evidence.scores_sha256, scores_sha256(scores))
    audit.ok("scores", f"{len(scores)} scores from {len(sketch.vector)} entries, as recorded")
    placebo = placebo_of(index, sketch)
    with audit.taking("placebo"):
        _agree("placebo", evidence.placebo, placebo)
    audit.ok("placebo", f"{placebo}, cleared by {int((scores > placebo).sum())} rows")
    speaking = speaking_rows(index, terms)
    shares = shares_of(index, scores, sketch, speaking, terms)
    _check_shares(audit, claim, shares)
    _check_named(audit, evidence, index, scores, speaking)
    return shares


def audit_nobody(audit: Audit, claim: Claim, found: NotAttributed) -> None:
    """An answer of method none/v1: all of it must be unattributed. Nothing else can be recomputed
    without the weights."""
    for name in ("index", "rows", "terms", "scores", "placebo"):
        audit.skip(name, f"nothing was attributed: {found.reason}")
    _check_shares(audit, claim, Shares(contributors=[], unattributed_ppm=PPM_WHOLE))
    audit.skip("named rows", "no row is named")


def placebo_of(index: CommittedIndex, sketch: CommittedSketch) -> int:
    """The score that a row reaches by chance for an answer of this norm."""
    return index.placebo_level * sketch.norm >> LEVEL_SHIFT


def noise_of(index: CommittedIndex, sketch: CommittedSketch) -> int:
    """The score up to which a row does not count, for an answer of this norm."""
    return index.noise_level * sketch.norm >> LEVEL_SHIFT


def speaking_rows(index: CommittedIndex, terms: Terms) -> NDArray[np.bool_]:
    """(rows,): representatives of their clusters, and rows that the terms split off."""
    split = terms.splits
    return np.array(
        [
            row.cluster == n or (row.contribution, row.index) in split
            for n, row in enumerate(index.rows)
        ],
        dtype=np.bool_,
    )


def shares_of(
    index: CommittedIndex,
    scores: NDArray[np.int64],
    sketch: CommittedSketch,
    speaking: NDArray[np.bool_],
    terms: Terms,
) -> Shares:
    """Shares by the rule of `shares.py`; rows of withdrawn contributions weigh and earn nothing."""
    noise, voices, lost = noise_of(index, sketch), [], 0
    heard = np.flatnonzero(speaking & (scores > noise)).tolist()
    best = max((int(scores[n]) for n in heard), default=0)
    shift = shift_of(best, noise)
    for n in heard:
        row, weight = index.rows[n], weight_of(int(scores[n]), noise, shift)
        if row.contribution in terms.withdrawn:
            lost += weight
        else:
            voices.append((row.contributor, weight))
    return shares_from_voices(voices, placebo=placebo_of(index, sketch), best=best, lost=lost)


def difference_ppm(a: Shares, b: Shares) -> int:
    """How much of the whole is given to someone else: half the summed differences, rounded up."""
    left = {**dict(a.contributors), "": a.unattributed_ppm}
    right = {**dict(b.contributors), "": b.unattributed_ppm}
    moved = sum(abs(left.get(who, 0) - right.get(who, 0)) for who in {*left, *right})
    return -(-moved // 2)


def _check_index(audit: Audit, claim: Claim, index: CommittedIndex) -> None:
    with audit.taking("index"):
        _agree("the run's index_sha256", claim.run_index_sha256, claim.index_sha256)
        _agree("the index opened", index.manifest_sha256, claim.index_sha256)
        root = index.row_root()
        _agree("row_root of the manifest", index.manifest["row_root"], root)
        _agree("index_root of the run", claim.index_root, root)
        _agree("the index's adapter", index.manifest.get("adapter_sha256"), claim.adapter_sha256)
        _agree("the index's base model", index.manifest.get("base_digest"), claim.base_model)
        _agree("the index's method", index.manifest.get("method"), claim.method)
    audit.ok("index", f"{len(index.rows)} rows under {root}")


def _check_rows(audit: Audit, claim: Claim, index: CommittedIndex) -> None:
    with audit.taking("rows"):
        _agree("the number of rows", len(index.rows), len(claim.rows))
        for n, (row, trained) in enumerate(zip(index.rows, claim.rows, strict=True)):
            for name in ("contribution", "index", "row_hash", "contributor", "registered_index"):
                _agree(f"{name} of row {n}", getattr(row, name), getattr(trained, name))
            speaker = index.rows[row.cluster]
            if speaker.registered_index > row.registered_index:
                raise Inconsistent(
                    f"row {row.row_id} is made a copy of {speaker.row_id}, which was registered "
                    "later: the earliest speaks for copies"
                )
    contributors = len({row.contributor for row in index.rows})
    audit.ok("rows", f"those of the training manifest, of {contributors} contributors")


def _check_terms(audit: Audit, claim: Claim, evidence: Evidence, terms: Terms) -> None:
    with audit.taking("terms"):
        if evidence.version == 1:
            # Honest ones are about indexes of version 1, which `open_committed` does not take.
            raise Inconsistent(
                "the document is of version 1, which names no terms, about an index of a time when "
                "they were recorded: what was withdrawn could be paid"
            )
        size = evidence.terms.log_size
        if not claim.inference_index < size <= claim.attribution_index:
            raise Inconsistent(
                f"they are of {size} log entries; expected a log that held the answer (entry "
                f"{claim.inference_index}) and not yet its attribution ({claim.attribution_index})"
            )
        _agree("log_size", terms.log_size, size)
        _agree("withdrawn", sorted(evidence.terms.withdrawn), sorted(terms.withdrawn))
        _agree("splits", sorted(evidence.terms.splits), sorted(terms.splits))
    audit.ok(
        "terms",
        f"at {size} log entries: {len(terms.withdrawn)} withdrawn, {len(terms.splits)} split off",
    )


def _check_shares(audit: Audit, claim: Claim, shares: Shares) -> None:
    with audit.taking("shares"):
        recorded = Shares(contributors=claim.shares, unattributed_ppm=claim.unattributed_ppm)
        moved = difference_ppm(recorded, shares)
        if moved or sorted(claim.shares) != shares.contributors:
            raise Inconsistent(f"{moved} ppm went elsewhere: {_first_difference(recorded, shares)}")
    audit.facts["difference_ppm"] = 0
    audit.ok(
        "shares",
        f"0 ppm difference: {len(shares.contributors)} contributors, "
        f"{shares.unattributed_ppm} ppm unattributed",
    )


def _first_difference(recorded: Shares, found: Shares) -> str:
    have, want = dict(recorded.contributors), dict(found.contributors)
    for who in sorted({*have, *want}):
        if have.get(who, 0) != want.get(who, 0):
            return f"{who} has {have.get(who, 0)} ppm, expected {want.get(who, 0)}"
    return (
        f"unattributed are {recorded.unattributed_ppm} ppm, expected {found.unattributed_ppm}, or "
        "shares of 0 ppm stand in the event"
    )


def _check_named(
    audit: Audit,
    evidence: Evidence,
    index: CommittedIndex,
    scores: NDArray[np.int64],
    speaking: NDArray[np.bool_],
) -> None:
    with audit.taking("named rows"):
        _agree("top_rows", evidence.top_rows, _top(index, scores, speaking, sign=1))
        against = _top(index, scores, speaking & (scores < 0), sign=-1)
        _agree("against", evidence.against, against)
    audit.ok(
        "named rows", f"{len(evidence.top_rows)} for the answer, {len(evidence.against)} against"
    )


def _top(
    index: CommittedIndex, scores: NDArray[np.int64], among: NDArray[np.bool_], *, sign: int
) -> tuple[NamedRow, ...]:
    """The rows of largest (sign 1) or smallest (-1) score among some; ties by place."""
    ranked = sorted(np.flatnonzero(among).tolist(), key=lambda n: (-sign * int(scores[n]), n))
    return tuple(
        NamedRow(
            row=index.rows[n].row_id, contributor=index.rows[n].contributor, score=int(scores[n])
        )
        for n in ranked[:MAX_NAMED_ROWS]
    )


def _agree(what: str, have: object, want: object) -> None:
    if have != want:
        raise Inconsistent(f"{what} is {_short(have)}; recomputed, it is {_short(want)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def claim_of(
    attribution: Mapping[str, Any],
    completed: Mapping[str, Any],
    *,
    base_model: str,
    inference_index: int,
    attribution_index: int,
    rows: Sequence[TrainedRow],
) -> Claim:
    """From the bodies of attribution.recorded and run.completed, both verified by the caller."""
    return Claim(
        inference=attribution["inference"],
        method=attribution["method"],
        evidence_sha256=attribution["evidence_sha256"],
        index_sha256=attribution["index_sha256"],
        shares=[(share["contributor"], share["ppm"]) for share in attribution["shares"]],
        unattributed_ppm=attribution["unattributed_ppm"],
        index_root=completed["index_root"],
        run_index_sha256=completed["index_sha256"],
        adapter_sha256=completed["adapter_sha256"],
        base_model=base_model,
        inference_index=inference_index,
        attribution_index=attribution_index,
        rows=rows,
    )
