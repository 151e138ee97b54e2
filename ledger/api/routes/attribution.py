"""What an auditor recomputes shares from: the files of a run's attribution index, the evidence of
an answer. Vectors and evidence are public; the words of rows and answers are not."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from ledger.api.auth import Anyone, Box
from ledger.api.services import Services
from ledger.api.shapes import found, plain
from ledger.domain.canonical import parse_canonical
from ledger.errors import Inconsistent, InvalidEvent, NotFound

router = APIRouter(tags=["attribution"])

MANIFEST = "manifest.json"
FOREVER = "public, max-age=31536000, immutable"


@router.get("/v1/runs/{run}/index/{name}", summary="A file of a run's attribution index")
def index_file(run: str, name: str, request: Request, who: Anyone, box: Box) -> Response:
    """`manifest.json`, and the files that it names with their SHA-256. One byte range may be asked
    for; the ETag is the file's SHA-256."""
    row = found(box.queries.run(run), f"run {run}")
    if row["index_sha256"] is None:
        raise NotFound(f"run {run} is {row['status']}: it has no attribution index")
    sha256 = row["index_sha256"] if name == MANIFEST else _named(box, row["index_sha256"], name)
    headers = {"etag": f'"{sha256}"', "cache-control": FOREVER, "accept-ranges": "bytes"}
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return _ranged(box.blobs.get(sha256), request.headers.get("range"), headers)


@router.get("/v1/inferences/{inference}/attribution", summary="Why an answer paid whom")
def attribution(inference: str, who: Anyone, box: Box) -> dict[str, Any]:
    """The attribution as recorded, and its evidence as the worker signed for it. Who may read the
    transcript gets the words of each verbatim span, too."""
    row = found(box.queries.inference(inference), f"inference {inference}")
    if row["attribution"] is None:
        raise NotFound(f"inference {inference} is not attributed yet: a worker does it in seconds")
    sha256 = row["attribution"]["evidence_sha256"]
    evidence = _json_object(box.blobs.get(sha256), f"the evidence {sha256}")
    if who is not None and (who == row["consumer"] or box.has_role(who, "operator")):
        transcript = box.read_json(row["transcript_sha256"])
        _add_words(evidence.get("spans"), str(transcript["output"]))
    return {"inference": inference, "attribution": plain(row["attribution"]), "evidence": evidence}


def _named(box: Services, manifest_sha256: str, name: str) -> str:
    """The SHA-256 of a file that the index's manifest names, and which holds nobody's words."""
    manifest = _json_object(box.blobs.get(manifest_sha256), "the index manifest")
    files = manifest.get("files")
    stamp = files.get(name) if isinstance(files, Mapping) else None
    if not isinstance(stamp, Mapping):
        names = ", ".join(sorted(files)) if isinstance(files, Mapping) else "none"
        raise NotFound(f"this index has no file {name[:80]!r}; it has {MANIFEST}, {names}")
    sha256 = str(stamp.get("sha256"))
    # A manifest is a worker's word: it must not make rows or a transcript public. What holds rest
    # on is not asked for: a copy of an index file as such evidence would stop all audits of it.
    if box.queries.holds_words(sha256):
        raise Inconsistent(f"the index manifest names a private blob as its file {name[:80]!r}")
    return sha256


def _ranged(data: bytes, asked: str | None, headers: Mapping[str, str]) -> Response:
    """All of it, or one `bytes=first-last` (RFC 9110 section 14); other ranges are ignored."""
    unit, _, span = (asked or "").partition("=")
    first, dash, last = span.strip().partition("-")
    if unit.strip() != "bytes" or not dash or not _is_range(first, last):
        return _binary(data, 200, headers)
    size = len(data)
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        return _binary(b"", 416, {**headers, "content-range": f"bytes */{size}"})
    where = {**headers, "content-range": f"bytes {start}-{stop - 1}/{size}"}
    return _binary(data[start:stop], 206, where)


def _is_range(first: str, last: str) -> bool:
    parts = [part for part in (first, last) if part]
    return bool(parts) and all(
        part.isascii() and part.isdigit() and len(part) < 19 for part in parts
    )


def _binary(data: bytes, status: int, headers: Mapping[str, str]) -> Response:
    return Response(data, status, dict(headers), media_type="application/octet-stream")


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = parse_canonical(data)
    except InvalidEvent as error:
        raise Inconsistent(f"{what} is no canonical JSON: {error}") from error
    if not isinstance(value, dict):
        raise Inconsistent(f"{what} is no JSON object")
    return value


def _add_words(spans: Any, output: str) -> None:
    """`text` for each span of the evidence lane: characters [start, end) of the answer."""
    listed = spans.get("spans") if isinstance(spans, dict) else None
    for span in listed if isinstance(listed, list) else []:
        if isinstance(span, dict) and all(type(span.get(at)) is int for at in ("start", "end")):
            span["text"] = output[span["start"] : span["end"]]
