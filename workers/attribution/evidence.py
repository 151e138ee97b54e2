"""The evidence of one attribution: the document that `attribution.recorded` names by its hash.

Canonical JSON, public, and enough for an auditor: the sketch of the answer, the hash of every
row's score, the terms in force, and the rows that mattered most, for and against. From it and the
index anyone recomputes the shares (`audit.py`). docs/FORMATS.md, "Attribution evidence", has the
bytes. Pure: no torch, no numpy, no files.

Version 1 documents, of answers attributed before terms were recorded, stay readable: their terms
are empty. An answer that nobody can attribute has a document of its own, which says why.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.events import MAX_INTEGER, MAX_TEXT_CHARS
from ledger.domain.ids import check_actor, check_hash, check_uuid, sha256_hex
from ledger.errors import Inconsistent, InvalidEvent, TooLarge
from workers.attribution.terms import NO_TERMS, Terms

VERSION = 2
NONE_METHOD = "none/v1"
MAX_EVIDENCE_BYTES = 16 * 2**20
"""Room for the terms: their two lists of MAX_TERMS are most of a document of that size."""
MAX_NAMED_ROWS = 10
"""Rows in `top_rows`, in `against`, and under one span."""
MAX_SPANS = 10_000
MAX_METHOD_CHARS = 64

_SHARED = ("v", "inference", "method", "index_sha256", "sketch", "sketch_sha256", "scores_sha256",
           "placebo", "top_rows")  # fmt: skip
_SCORE = re.compile(r"0|-?[1-9][0-9]{0,24}")
_ROW = re.compile(r"([0-9a-f-]{36})/(0|[1-9][0-9]{0,15})")


@dataclass(frozen=True, kw_only=True)
class NamedRow:
    """`row` is `<contribution>/<row number>`; `score` its influence on the answer."""

    row: str
    contributor: str
    score: int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One attributed answer. `placebo` is in the unit of the scores; `spans` is the evidence lane
    (verbatim matches, `spans.py`), which pays nobody."""

    inference: str
    method: str
    index_sha256: str
    sketch: bytes = field(repr=False)
    scores_sha256: str
    placebo: int
    terms: Terms = NO_TERMS
    top_rows: tuple[NamedRow, ...] = ()
    against: tuple[NamedRow, ...] = ()
    spans: Mapping[str, Any] | None = None
    version: int = VERSION

    @property
    def sketch_sha256(self) -> str:
        """Hex SHA-256 over the sketch's bytes."""
        return sha256_hex(self.sketch)

    def to_bytes(self) -> bytes:
        """The document. `parse` reads it back to an equal value."""
        document: dict[str, Any] = {
            "v": self.version,
            "inference": self.inference,
            "method": self.method,
            "index_sha256": self.index_sha256,
            "sketch": base64.b64encode(self.sketch).decode(),
            "sketch_sha256": self.sketch_sha256,
            "scores_sha256": self.scores_sha256,
            # Scores may pass 2^53: decimal strings.
            "placebo": str(self.placebo),
            "top_rows": _spell(self.top_rows),
        }
        if self.version >= 2:
            document["against"] = _spell(self.against)
            document["terms"] = self.terms.to_dict()
            document["spans"] = None if self.spans is None else dict(self.spans)
        return canonical_json(document)


@dataclass(frozen=True, kw_only=True)
class NotAttributed:
    """An answer that cannot be attributed at all, and why."""

    reason: str
    method: str = NONE_METHOD

    def to_bytes(self) -> bytes:
        return canonical_json({"v": 1, "method": self.method, "reason": self.reason})


class Result(Protocol):
    """What an attribution leaves behind (`query.AttributionResult`), named here without torch."""

    @property
    def sketch(self) -> bytes: ...
    @property
    def scores_sha256(self) -> str: ...
    @property
    def index_sha256(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def placebo(self) -> int: ...
    @property
    def top_rows(self) -> Sequence[tuple[str, str, int]]: ...
    @property
    def against(self) -> Sequence[tuple[str, str, int]]: ...
    @property
    def terms(self) -> Terms: ...


def evidence_of(
    result: Result, inference: str, *, spans: Mapping[str, Any] | None = None
) -> Evidence:
    """The document of `result` for the ledger's inference of that id."""
    return Evidence(
        inference=inference,
        method=result.method,
        index_sha256=result.index_sha256,
        sketch=result.sketch,
        scores_sha256=result.scores_sha256,
        placebo=result.placebo,
        terms=result.terms,
        top_rows=_named(result.top_rows),
        against=_named(result.against),
        spans=spans,
    )


def none_document(reason: str) -> bytes:
    """The document of an answer that cannot be attributed; all of it is then unattributed."""
    return NotAttributed(reason=reason).to_bytes()


def parse(data: bytes) -> Evidence | NotAttributed:
    """Read a document of version 1 or 2, whatever it claims to be.

    Raises InvalidEvent when the bytes are not of the format (TooLarge beyond MAX_EVIDENCE_BYTES),
    Inconsistent when the document contradicts itself: the sketch has another hash, or rows do not
    stand in the order of their scores.
    """
    if len(data) > MAX_EVIDENCE_BYTES:
        raise TooLarge(f"{len(data)} bytes; evidence is at most {MAX_EVIDENCE_BYTES=}")
    value = parse_canonical(data)
    if not isinstance(value, dict) or type(value.get("v")) is not int:
        raise InvalidEvent("attribution evidence is a JSON object with a version number v")
    if value.get("method") == NONE_METHOD:
        return _not_attributed(value)
    if value["v"] not in (1, VERSION):
        raise InvalidEvent(f"attribution evidence of version {value['v']}; known are 1 and 2")
    more = ("against", "spans", "terms") if value["v"] == VERSION else ()
    _exactly(value, {*_SHARED, *more}, "the document")
    return Evidence(
        version=value["v"],
        inference=str(check_uuid(value["inference"], "inference")),
        method=_method(value["method"]),
        index_sha256=check_hash(value["index_sha256"], "index_sha256"),
        sketch=_sketch(value),
        scores_sha256=check_hash(value["scores_sha256"], "scores_sha256"),
        placebo=_score(value["placebo"], "placebo", low=0),
        top_rows=_rows(value["top_rows"], "top_rows", sign=-1),
        **(_second_version(value) if more else {}),
    )


def _second_version(value: Mapping[str, Any]) -> dict[str, Any]:
    terms = Terms.from_dict(value["terms"])
    if terms.to_dict() != value["terms"]:
        raise InvalidEvent("terms must be log_size, splits and withdrawn, sorted, nothing twice")
    against = _rows(value["against"], "against", sign=1)
    if any(row.score >= 0 for row in against):
        raise Inconsistent("a row in `against` did not score below zero")
    spans = None if value["spans"] is None else _spans(value["spans"])
    return {"terms": terms, "against": against, "spans": spans}


def _not_attributed(value: Mapping[str, Any]) -> NotAttributed:
    _exactly(value, {"v", "method", "reason"}, "a document of method none/v1")
    if value["v"] != 1:
        raise InvalidEvent(f"a document of method none/v1 has v 1, not {value['v']}")
    return NotAttributed(reason=_text(value["reason"], "reason"))


def _sketch(value: Mapping[str, Any]) -> bytes:
    text = value["sketch"]
    try:
        sketch = base64.b64decode(_text(text, "sketch", MAX_EVIDENCE_BYTES), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidEvent(f"sketch is not base64: {error}", field="sketch") from error
    if base64.b64encode(sketch).decode() != text:
        raise InvalidEvent("sketch is not base64 in its one canonical form", field="sketch")
    claimed = check_hash(value["sketch_sha256"], "sketch_sha256")
    if sha256_hex(sketch) != claimed:
        raise Inconsistent(f"the sketch hashes to {sha256_hex(sketch)}; it is said to be {claimed}")
    return sketch


def _rows(value: object, where: str, *, sign: int) -> tuple[NamedRow, ...]:
    """Rows of `value`, whose scores times `sign` must not fall; no row twice."""
    rows = tuple(
        _row(item, f"{where}[{n}]") for n, item in enumerate(_list(value, where, MAX_NAMED_ROWS))
    )
    keys = [sign * row.score for row in rows]
    if keys != sorted(keys) or len({row.row for row in rows}) != len(rows):
        raise Inconsistent(f"{where} is not in the order of its scores, or names a row twice")
    return rows


def _row(value: object, where: str) -> NamedRow:
    fields = _exactly(value, {"row", "contributor", "score"}, where)
    return NamedRow(
        row=row_id(fields["row"], f"{where}.row"),
        contributor=check_actor(fields["contributor"], f"{where}.contributor"),
        score=_score(fields["score"], f"{where}.score"),
    )


def row_id(value: object, where: str) -> str:
    """`<contribution>/<row number>`; InvalidEvent otherwise."""
    found = _ROW.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise InvalidEvent(f"{where} must be <contribution>/<row number>", field=where)
    check_uuid(found[1], where)
    return found[0]


def _spans(value: object) -> dict[str, Any]:
    lane = _exactly(value, {"v", "min_tokens", "spans", "none"}, "spans")
    spans = _list(lane["spans"], "spans.spans", MAX_SPANS)
    if lane["v"] != 1 or type(lane["none"]) is not bool or lane["none"] != (not spans):
        raise InvalidEvent("spans must have v 1, and `none` exactly when there is no span")
    _count(lane["min_tokens"], "spans.min_tokens")
    for n, item in enumerate(spans):
        where = f"spans.spans[{n}]"
        span = _exactly(item, {"start", "end", "rows", "count"}, where)
        rows = _list(span["rows"], f"{where}.rows", MAX_NAMED_ROWS)
        start, end = _count(span["start"], where), _count(span["end"], where)
        if start >= end or not 0 < len(rows) <= _count(span["count"], f"{where}.count"):
            raise InvalidEvent(f"{where} must have start < end, and at least the rows it names")
        for k, row in enumerate(rows):
            _span_row(row, f"{where}.rows[{k}]")
    return dict(lane)


def _span_row(value: object, where: str) -> None:
    row = _exactly(value, {"contribution", "row", "contributor", "licence"}, where)
    check_uuid(row["contribution"], f"{where}.contribution")
    _count(row["row"], f"{where}.row")
    check_actor(row["contributor"], f"{where}.contributor")
    _text(row["licence"], f"{where}.licence")


def _exactly(value: object, fields: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or value.keys() != fields:
        raise InvalidEvent(f"{where} must be an object with exactly {', '.join(sorted(fields))}")
    return value


def _list(value: object, where: str, limit: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        raise InvalidEvent(f"{where} must be a list of at most {limit}", field=where)
    return value


def _text(value: object, where: str, limit: int = MAX_TEXT_CHARS) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise InvalidEvent(f"{where} must be a string of 1 to {limit} characters", field=where)
    return value


def _method(value: object) -> str:
    return _text(value, "method", MAX_METHOD_CHARS)


def _count(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise InvalidEvent(f"{where} must be a whole number from 0", field=where)
    return value


def _score(value: object, where: str, low: int | None = None) -> int:
    if not isinstance(value, str) or not _SCORE.fullmatch(value):
        raise InvalidEvent(f"{where} must be an integer as a decimal string", field=where)
    if low is not None and int(value) < low:
        raise InvalidEvent(f"{where} must be {low} or more", field=where)
    return int(value)


def _named(rows: Sequence[tuple[str, str, int]]) -> tuple[NamedRow, ...]:
    return tuple(NamedRow(row=row, contributor=who, score=score) for row, who, score in rows)


def _spell(rows: Sequence[NamedRow]) -> list[dict[str, str]]:
    return [{"row": r.row, "contributor": r.contributor, "score": str(r.score)} for r in rows]
