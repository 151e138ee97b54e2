"""The index of the evidence lane: every training row's text as a searchable folder. Private.

Numpy and files; no model, no network. The folder holds row text, so it stays on the worker that
may read the rows: folder 0700, files 0600, never a blob of the ledger.

    manifest.json      canonical JSON: counts, size and SHA-256 of each file, and a check of itself
    sources.json       [contribution, contributor, licence, registered_index] of each contribution
    words.json         the distinct pieces of text (`span_words.split`), by id from 1
    tokens.u32         all distinct texts as ids, big-endian, each text closed by SEPARATOR
    suffixes.u32       starts of the suffixes that begin with a word, in order of their text
    starts.u32         (texts + 1,) where each text begins in tokens.u32
    weights.u32        (words + 1,) bits/1000 that a word says: log2 of how rare it is
    holders.u32        rows that hold each text, text by text; holder_starts.u32 (texts + 1,)
    row_sources.u32, row_positions.u32, row_ranks.u32   (rows,) whose row, which, and how early

Prompt and completion are texts of their own, and a separator matches nothing: no span crosses a
field or row border. A text that several rows hold is kept once, so copies cost nothing and do not
make a phrase look common. Integers but tokens.u32 are little-endian; tokens are big-endian so that
comparing bytes compares texts.

`load_span_index` hashes everything and refuses what is damaged; the owner then builds it again.
A crash while building leaves a `.building-*` folder that nobody opens; `build_span_index` removes
those of its own folder that are older than STALE_S.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.errors import Inconsistent, InvalidEvent, NotFound, TooLarge
from workers.attribution.span_words import is_word, split
from workers.attribution.suffix_array import suffix_array

FORMAT = "tributary/span-index/v1"
MANIFEST, SOURCES, WORDS, TOKENS = "manifest.json", "sources.json", "words.json", "tokens.u32"
ARRAYS = (
    "suffixes",
    "starts",
    "weights",
    "holders",
    "holder_starts",
    "row_sources",
    "row_positions",
    "row_ranks",
)
SEPARATOR = 0
UNKNOWN = 2**32 - 2
"""A word of an answer that no row has: it equals no token, and a larger number exists."""
MAX_SPAN_TOKENS = 16_000_000
"""Pieces of distinct text in one index, about 60 MB of prose."""
MILLIBITS = 1_000
STALE_S = 3_600

Numbers = NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class SpanRow:
    """One training row. `row` is its place in the contribution, `registered_index` the
    contribution's in the ledger."""

    contribution: str
    row: int
    contributor: str
    licence: str
    registered_index: int
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A contribution as evidence names it."""

    contribution: str
    contributor: str
    licence: str
    registered_index: int


@dataclass(frozen=True, kw_only=True)
class SpanIndex:
    """An opened index. `tokens` is the mapped file: 4 bytes a token, big-endian.

    `longest` is the number of pieces of the longest text, `words` the number of words in all.
    """

    path: Path
    rows: int
    texts: int
    words: int
    longest: int
    sources: list[Source]
    ids: Mapping[str, int] = field(repr=False)
    tokens: mmap.mmap = field(repr=False)
    suffixes: memoryview = field(repr=False)
    arrays: Mapping[str, Numbers] = field(repr=False)

    def texts_of(self, first: int, last: int) -> Numbers:
        """The distinct texts in which the suffixes `first` to `last` (exclusive) lie."""
        starts = np.sort(self.arrays["suffixes"][first:last])
        return np.unique(np.searchsorted(self.arrays["starts"], starts, side="right") - 1).astype(
            np.uint32
        )

    def holders_of(self, texts: Numbers) -> Numbers:
        """The distinct rows that hold one of these texts."""
        edges = self.arrays["holder_starts"]
        first = edges[texts].astype(np.int64)
        count = edges[texts + 1].astype(np.int64) - first
        shift = np.repeat(first - (np.cumsum(count) - count), count)
        return np.unique(self.arrays["holders"][shift + np.arange(len(shift))])

    def rows_of(self, texts: Numbers) -> Numbers:
        """The same rows, earliest registration first."""
        found = self.holders_of(texts)
        return found[np.argsort(self.arrays["row_ranks"][found])]


def build_span_index(rows: Iterable[SpanRow], out_dir: Path) -> SpanIndex:
    """Index `rows` (read once, in any order); the folder appears whole.

    The text of one row at a time is in memory, and about 45 bytes a token (measured: 5.0 million
    tokens, 222 MB). When another process
    was quicker, its folder is opened. Raises InvalidEvent for no rows or two of one id, TooLarge
    beyond MAX_SPAN_TOKENS.
    """
    corpus = _Corpus()
    for row in rows:
        corpus.add(row)
    if not corpus.positions:
        raise InvalidEvent("a span index needs at least one row; none can be read")
    out_dir.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(out_dir)
    with tempfile.TemporaryDirectory(prefix=_prefix(out_dir), dir=out_dir.parent) as part:
        work = Path(part) / "whole"
        work.mkdir(mode=0o700)
        corpus.write(work)
        try:
            work.rename(out_dir)
        except OSError:
            if not out_dir.is_dir():
                raise
    return load_span_index(out_dir)


def load_span_index(path: Path) -> SpanIndex:
    """Open an index after hashing every byte. Raises NotFound where there is none, Inconsistent
    when it is not what was written: build it again."""
    manifest = _manifest(path)
    for name, stamp in manifest["files"].items():
        _check_file(path / name, stamp)
    arrays = {name: _mapped(path / f"{name}.u32") for name in ARRAYS}
    with (path / TOKENS).open("rb") as file:
        tokens = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        words = json.loads((path / WORDS).read_bytes())
        sources = [
            Source(contribution=c, contributor=who, licence=licence, registered_index=at)
            for c, who, licence, at in json.loads((path / SOURCES).read_bytes())
        ]
    except (ValueError, TypeError) as error:
        raise Inconsistent(f"{path}: words or sources cannot be read: {error}") from error
    return SpanIndex(
        path=path,
        rows=manifest["rows"],
        texts=manifest["texts"],
        words=manifest["words"],
        longest=manifest["longest"],
        sources=sources,
        ids={word: n for n, word in enumerate(words, start=1)},
        tokens=tokens,
        suffixes=np.ascontiguousarray(arrays["suffixes"], np.uint32).data,
        arrays=arrays,
    )


class _Corpus:
    """Rows on their way into an index."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.tokens = array("I")
        self.starts = array("I", [0])
        self.sources: dict[str, int] = {}
        self.about: list[tuple[str, str, str, int]] = []
        self.row_sources, self.positions = array("I"), array("I")
        self.held: tuple[array[int], array[int]] = (array("I"), array("I"))
        self._texts: dict[bytes, int] = {}
        self._seen: set[tuple[int, int]] = set()

    def add(self, row: SpanRow) -> None:
        about = (row.contribution, row.contributor, row.licence, row.registered_index)
        source = self.sources.setdefault(row.contribution, len(self.sources))
        if source == len(self.about):
            self.about.append(about)
        if (source, row.row) in self._seen:
            raise InvalidEvent(f"row {row.contribution}/{row.row} is there twice; list it once")
        self._seen.add((source, row.row))
        number = len(self.positions)
        self.row_sources.append(source)
        self.positions.append(row.row)
        for text in {self._text(row.prompt), self._text(row.completion)}:
            self.held[0].append(text)
            self.held[1].append(number)

    def _text(self, text: str) -> int:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = self._texts.get(digest)
        if known is not None:
            return known
        number = self._texts[digest] = len(self._texts)
        pieces = [self.ids.setdefault(piece, len(self.ids) + 1) for piece in split(text)]
        self.tokens.extend([*pieces, SEPARATOR])
        self.starts.append(len(self.tokens))
        if len(self.tokens) > MAX_SPAN_TOKENS:
            raise TooLarge(
                f"the rows have more than {MAX_SPAN_TOKENS} words and marks (MAX_SPAN_TOKENS); "
                "the evidence lane does not serve this run"
            )
        return number

    def write(self, folder: Path) -> None:
        tokens = np.frombuffer(self.tokens, np.uint32)
        starts = np.frombuffer(self.starts, np.uint32)
        words = list(self.ids)
        counted = np.array([False, *(is_word(word) for word in words)])
        held, holders = (np.frombuffer(part, np.uint32) for part in self.held)
        suffixes = suffix_array(tokens)
        positions = np.frombuffer(self.positions, np.uint32)
        row_sources = np.frombuffer(self.row_sources, np.uint32)
        registered = np.array([at for *_, at in self.about], np.int64)[row_sources]
        ranks = np.empty(len(positions), np.uint32)
        ranks[np.lexsort((positions, row_sources, registered))] = np.arange(len(positions))
        arrays = {
            "suffixes": suffixes[counted[tokens[suffixes]]],
            "starts": starts,
            "weights": _weights(tokens, counted),
            "holders": holders[np.argsort(held, kind="stable")],
            "holder_starts": np.concatenate(
                ([0], np.cumsum(np.bincount(held, minlength=len(starts) - 1)))
            ),
            "row_sources": row_sources,
            "row_positions": positions,
            "row_ranks": ranks,
        }
        files = {f"{name}.u32": values.astype("<u4").tobytes() for name, values in arrays.items()}
        files[TOKENS] = tokens.astype(">u4").tobytes()
        files[WORDS] = json.dumps(words).encode()
        files[SOURCES] = json.dumps(self.about).encode()
        manifest = {
            "format": FORMAT,
            "rows": len(positions),
            "texts": len(starts) - 1,
            "words": int(counted[tokens].sum()),
            "longest": int(np.diff(starts).max()) - 1,
            "files": {name: _write(folder / name, data) for name, data in files.items()},
        }
        manifest["check"] = _check_of(manifest)
        _write(folder / MANIFEST, canonical_json(manifest))


def _weights(tokens: Numbers, counted: NDArray[np.bool_]) -> Numbers:
    """(words + 1,) millibits: log2(all words / occurrences of this one); 0 for white space."""
    occurrences = np.where(counted, np.bincount(tokens, minlength=len(counted)), 0)
    total = max(int(occurrences.sum()), 1)
    bits = np.log2(total / np.maximum(occurrences, 1))
    return np.where(occurrences > 0, np.rint(bits * MILLIBITS), 0).astype(np.uint32)


def _check_of(manifest: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in manifest.items() if name != "check"}
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def _manifest(path: Path) -> dict[str, Any]:
    try:
        raw = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"{path} holds no span index ({MANIFEST} is missing)") from error
    try:
        manifest = parse_canonical(raw)
        whole = manifest["format"] == FORMAT and manifest["check"] == _check_of(manifest)
    except (InvalidEvent, KeyError, TypeError) as error:
        raise Inconsistent(f"{path}: the manifest is damaged: build the index again") from error
    if not whole:
        raise Inconsistent(f"{path}: the manifest is damaged or of another format: build it again")
    return dict(manifest)


def _check_file(path: Path, stamp: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != stamp["bytes"]:
        found = "missing" if size < 0 else f"{size} bytes"
        raise Inconsistent(f"{path}: {found}, expected {stamp['bytes']} bytes: build it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != stamp["sha256"]:
        raise Inconsistent(f"{path}: hashes to {digest}, expected {stamp['sha256']}")


def _mapped(path: Path) -> Numbers:
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint32)
    return np.memmap(path, "<u4", "r")


def _write(path: Path, data: bytes) -> dict[str, Any]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)  # no fsync: what a power cut leaves of a cache fails its hash
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _prefix(out_dir: Path) -> str:
    return f".building-{out_dir.name}-"


def _sweep(out_dir: Path) -> None:
    for left in out_dir.parent.glob(f"{_prefix(out_dir)}*"):
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)
