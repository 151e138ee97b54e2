"""An auditor of somebody's ledger: recompute an attribution, prove a row, replay a training run.

Recomputing shares needs numpy (extra `audit`); making sketches, indexes and adapters again needs
the extra `workers`. Part of the composition root, and light: it loads neither the database nor the
chain. What it fetches is `audit_files`' matter, what it checks the workers' room's.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger.domain.canonical import parse_canonical
from ledger.domain.ids import check_uuid, sha256_hex
from ledger.errors import ConfigError, Conflict, InvalidEvent
from ledger.log.answer_case import AnswerCase, RunCase, answer_case
from ledger.log.row_terms import read_terms
from ledger.ports import LogSource
from ledger.processes.audit_files import AuditFiles, Texts, row_of
from ledger.processes.workplace import workplace
from ledger.verify.encoding import printable
from ledger.verify.packet import Packet, check_packet, format_packet

if TYPE_CHECKING:
    from workers.attribution.audit import Audit, AuditStep, Claim, TrainedRow
    from workers.attribution.committed import CommittedIndex
    from workers.attribution.evidence import Evidence, NotAttributed
    from workers.attribution.index import IndexedRow
    from workers.attribution.shares import Shares
    from workers.attribution.terms import Terms
    from workers.training.replay import Replayed
    from workers.training.trainer import TrainingRow

Tell = Callable[[int, int, float], None]

MAX_LINE_CHARS = 4_000


@dataclass(frozen=True, kw_only=True)
class Report:
    """The steps that held, what is left to trust, and facts for programs."""

    subject: str
    steps: list["AuditStep"]
    trusted: list[str]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        steps = [
            {"number": s.number, "name": s.name, "status": s.status, "detail": s.detail}
            for s in self.steps
        ]
        return {
            "verified": True, "subject": self.subject, "steps": steps, "trusted": self.trusted,
            "facts": self.facts,
        }  # fmt: skip

    def to_text(self) -> str:
        marks = {"ok": "ok", "skipped": "--"}
        lines = [f"{s.number}. [{marks[s.status]}] {s.name}: {s.detail}" for s in self.steps]
        lines += ["", "Still to be trusted", *(f"  ? {line}" for line in self.trusted)]
        # Some of it is a worker's own words: it must not move the terminal's cursor.
        return "".join(f"{printable(line, MAX_LINE_CHARS)}\n" for line in lines)


@dataclass(frozen=True, kw_only=True)
class _Recomputed:
    """What the first eight steps found; None for an answer that nobody was paid for."""

    evidence: "Evidence"
    committed: "CommittedIndex"
    terms: "Terms"
    shares: "Shares"


def verify(
    files: AuditFiles,
    log: LogSource,
    subject: str,
    *,
    weights: bool = False,
    index: bool = False,
    base: Path | None = None,
) -> Report:
    """Audit one answer: its integers; with `weights` its sketch; with `index` that, and the index.

    Raises VerificationError that names the step which does not hold; NotFound, Forbidden and
    Unavailable for what cannot be had; ConfigError for a library that is not installed.
    """
    with _extra("audit"):
        from workers.attribution import audit as shares_audit
    case = answer_case(files.bundle(subject), trusted_vkey=files.vkey)
    claim, audit = _claim(case), shares_audit.Audit()
    document = shares_audit.read_evidence(audit, claim, files.blob(claim.evidence_sha256))
    found = _recompute(files, log, case, claim, audit, document, lens=weights or index)
    if weights or index:
        _with_weights(files, case, claim, audit, document, found, index=index, base=base)
    return Report(
        subject=subject,
        steps=audit.steps,
        trusted=_still_trusted(
            case, weights=weights or index, index=index, key=files.vkey, nobody=found is None
        ),
        facts={
            **audit.facts,
            "inference": claim.inference,
            "evidence_sha256": claim.evidence_sha256,
            "index_sha256": claim.index_sha256,
            "log_size": case.run.head.size,
        },
    )


def _recompute(
    files: AuditFiles,
    log: LogSource,
    case: AnswerCase,
    claim: "Claim",
    audit: "Audit",
    document: "Evidence | NotAttributed",
    *,
    lens: bool,
) -> _Recomputed | None:
    from workers.attribution.audit import audit_nobody, audit_shares
    from workers.attribution.evidence import Evidence
    from workers.attribution.terms import NO_TERMS, Terms

    if not isinstance(document, Evidence):
        audit_nobody(audit, claim, document)
        return None
    told, terms = document.terms, NO_TERMS
    if document.version > 1:
        # Of the index's contributions, and of whatever else the document names.
        named = {row.contribution for row in claim.rows} | told.withdrawn
        named |= {contribution for contribution, _ in told.splits}
        with audit.taking("terms"):
            terms = Terms.from_dict(read_terms(log, told.log_size, case.run.head, named))
    committed = files.index(case.run, lens=lens)
    shares = audit_shares(audit, claim, document, committed, terms)
    return _Recomputed(evidence=document, committed=committed, terms=terms, shares=shares)


def _with_weights(
    files: AuditFiles,
    case: AnswerCase,
    claim: "Claim",
    audit: "Audit",
    document: "Evidence | NotAttributed",
    found: _Recomputed | None,
    *,
    index: bool,
    base: Path | None,
) -> None:
    with _extra("workers"):
        from workers import base_model
        from workers.attribution.audit_index import audit_index
        from workers.attribution.audit_weights import audit_silence, audit_sketch, load_weights
        from workers.attribution.build import config_of
        from workers.attribution.evidence import NotAttributed
        from workers.attribution.index import load_index
        from workers.training.config import TrainingConfig
    model, tokenizer = load_weights(audit, claim, base_model.folder(base), files.adapter(case.run))
    answer = files.transcript(case)
    if found is None:
        assert isinstance(document, NotAttributed)
        audit_silence(audit, document, model, tokenizer, answer)
        return
    opened = load_index(files.index_folder(claim.index_sha256), manifest_sha256=claim.index_sha256)
    audit_sketch(
        audit, found.evidence, found.committed, opened, model, tokenizer, answer, found.terms,
        found.shares,
    )  # fmt: skip
    if index:
        rows = _indexed_rows(case.run, files.texts(case.run))
        with workplace(files.cache / "rebuild") as work:
            recipe = TrainingConfig.from_dict(case.run.requested.envelope.body["config"])
            config = config_of(recipe, model)
            audit_index(audit, found.committed, model, tokenizer, rows, work, config)


def packet(files: AuditFiles, subject: str, row: str) -> tuple[bytes, bytes]:
    """An audit packet of `row` (`<contribution>/<row number>`), and the bundle that binds it.

    Both are checked before they are handed out. Raises NotFound for a row that the index does not
    hold, InvalidEvent for an answer that nobody was paid for.
    """
    with _extra("audit"):
        from workers.attribution.committed import read_sketch, scores_of
        from workers.attribution.evidence import Evidence, parse
    bundle = files.bundle(subject)
    case = answer_case(bundle, trusted_vkey=files.vkey)
    document = files.blob(case.attribution.envelope.body["evidence_sha256"])
    evidence = parse(document)
    if not isinstance(evidence, Evidence):
        raise InvalidEvent(f"no row has a score for this answer: {evidence.reason}")
    index = files.index(case.run, lens=False)
    proof = index.proof(row)
    data = format_packet(
        Packet(
            evidence=parse_canonical(document),
            evidence_sha256=sha256_hex(document),
            index_root=case.run.completed.envelope.body["index_root"],
            rows=proof.rows,
            position=proof.position,
            vector=proof.vector,
            scale=proof.scale,
            line=proof.line,
            proof=tuple(proof.path),
            score=int(scores_of(index, read_sketch(evidence.sketch))[proof.position]),
        )
    )
    check_packet(data, bundle=bundle, trusted_vkey=files.vkey)
    return data, bundle


def replay(
    files: AuditFiles, run: str, *, base: Path | None, anyway: bool, tell: Tell
) -> tuple["Replayed", Path]:
    """What training a completed run again comes to, and the folder of the adapter it made.

    Needs a key that may read the rows. A replay that was killed goes on where it stood.
    """
    with _extra("workers"):
        from workers import base_model
        from workers.training import replay as training
    case = files.run(run)
    rows = _training_rows(case, files.texts(case))
    out = files.cache / "replays" / str(check_uuid(run, "run"))

    def once() -> "Replayed":
        return training.replay(
            case.manifest, rows, base_model.folder(base), out, anyway=anyway, on_progress=tell
        )

    try:
        return once(), out
    except Conflict:  # what lies there is of another environment: make it afresh
        shutil.rmtree(out)
        return once(), out


def _claim(case: AnswerCase) -> "Claim":
    from workers.attribution.audit import claim_of

    return claim_of(
        case.attribution.envelope.body,
        case.run.completed.envelope.body,
        base_model=case.run.requested.envelope.body["base_model"],
        inference_index=case.inference.index,
        attribution_index=case.attribution.index,
        rows=[_trained(case.run, line) for line in case.run.rows],
    )


def _trained(case: RunCase, line: Any) -> "TrainedRow":
    """A row of the manifest, under the name of whoever signed for its contribution."""
    from workers.attribution.audit import TrainedRow

    recorded = case.recorded[line["contribution"]]
    return TrainedRow(
        contribution=line["contribution"],
        index=line["row"],
        row_hash=line["row_hash"],
        contributor=recorded.envelope.actor,
        registered_index=recorded.index,
    )


def _indexed_rows(case: RunCase, texts: Texts) -> list["IndexedRow"]:
    from workers.attribution.index import IndexedRow

    rows = []
    for line in case.rows:
        known = _trained(case, line)
        text = row_of(texts, known.contribution, known.index, known.row_hash)
        rows.append(
            IndexedRow(
                contribution=known.contribution,
                index=known.index,
                row_hash=known.row_hash,
                contributor=known.contributor,
                registered_index=known.registered_index,
                prompt=text.prompt,
                completion=text.completion,
            )
        )
    return rows


def _training_rows(case: RunCase, texts: Texts) -> list["TrainingRow"]:
    from workers.training.replay import wanted_rows
    from workers.training.trainer import TrainingRow

    rows = []
    for contribution, number, row_hash in wanted_rows(case.manifest):
        text = row_of(texts, contribution, number, row_hash)
        rows.append(
            TrainingRow(
                contribution=contribution,
                index=number,
                row_hash=text.hash.hex(),
                prompt=text.prompt,
                completion=text.completion,
            )
        )
    return rows


def _still_trusted(
    case: AnswerCase, *, weights: bool, index: bool, key: str | None, nobody: bool
) -> list[str]:
    said = []
    if key is None:
        said.append(f"That the log's key is {case.run.verdict.facts['vkey']}: give it with --key.")
    if nobody:
        why = "That the answer cannot be attributed: --weights looks at its transcript."
        return said if weights else [*said, why]
    if not weights:
        said.append("That the sketch is that of this answer: --weights makes it again.")
    if not index:
        said.append("That the index came out of the rows' texts: --index builds it again.")
    return [*said, "That the adapter was trained on these rows: `tributary attribution replay`."]


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """A clear error where the libraries of an extra are missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: this needs `pip install 'tributary-ledger[client,"
            f"{name}]'`"
        ) from error
