"""An attribution index as an auditor reads it: the committed integers, without torch.

`index.py` opens an index to question it with a model. Here are only the parts that a score rests
on, read from the bytes that docs/FORMATS.md ("Attribution index") describes and checked against the
manifest: `vectors.i8`, `scales.u32` and `rows.jsonl`. The lens is not needed and may be missing.
Scores are computed in plain integers, another way than the engine's, and must come out equal.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ledger.domain.canonical import parse_canonical
from ledger.domain.envelope import leaf_hash
from ledger.domain.ids import check_actor, check_hash, sha256_hex
from ledger.domain.rows import tree_path, tree_root
from ledger.errors import Inconsistent, InvalidEvent, NotFound, Unavailable

FORMAT = "tributary/attribution-index/v2"
OLDER = ("tributary/attribution-index/v1",)
"""Paid by rules that this version no longer computes."""
MANIFEST, VECTORS, SCALES, ROWS = "manifest.json", "vectors.i8", "scales.u32", "rows.jsonl"
SCORED_FILES = (VECTORS, SCALES, ROWS)
"""What scores rest on; everything else of an index is for making it."""
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_DIM = 65_536
SKETCH_MAGIC = b"tributary/attribution-sketch/v1\n"
LIMIT = 127
LEVEL_SHIFT = 32
MAX_NORM = 2**62
MAX_LEVEL_DIGITS = 40

_ROW_FIELDS = {
    "contribution", "index", "row_hash", "contributor", "registered_index", "cluster",
}  # fmt: skip
_CHUNK = 4_096


@dataclass(frozen=True, kw_only=True)
class CommittedRow:
    """One line of `rows.jsonl`. `cluster` is the index row that speaks for this one."""

    contribution: str
    index: int
    row_hash: str
    contributor: str
    registered_index: int
    cluster: int

    @property
    def row_id(self) -> str:
        return f"{self.contribution}/{self.index}"


@dataclass(frozen=True, kw_only=True)
class RowProof:
    """What an audit packet needs of one row: its leaf in parts, and the path to the root."""

    position: int
    rows: int
    vector: bytes
    scale: int
    line: dict[str, Any]
    path: list[bytes]


@dataclass(frozen=True, kw_only=True)
class CommittedIndex:
    """`vectors` int8 (rows, dim), `scales` u32 (rows,), `lines` the bytes of `rows`."""

    manifest: dict[str, Any]
    manifest_sha256: str
    vectors: NDArray[np.int8] = field(repr=False)
    scales: NDArray[np.uint32] = field(repr=False)
    rows: list[CommittedRow] = field(repr=False)
    lines: list[bytes] = field(repr=False)

    @property
    def placebo_level(self) -> int:
        """Score per unit of sketch norm, in 2^-LEVEL_SHIFT."""
        return int(self.manifest["placebo_level"])

    @property
    def noise_level(self) -> int:
        """The same of the level below which a row does not count."""
        return int(self.manifest["noise_level"])

    def leaves(self) -> list[bytes]:
        """Leaf hashes of the row tree: vector || scale (u32 big-endian) || line."""
        return [
            leaf_hash(self.vectors[n].tobytes() + int(self.scales[n]).to_bytes(4, "big") + line)
            for n, line in enumerate(self.lines)
        ]

    def row_root(self) -> str:
        """Hex root of the row tree, recomputed: what run.completed calls `index_root`."""
        return tree_root(self.leaves()).hex()

    def proof(self, row_id: str) -> RowProof:
        """Raises NotFound when no row has that id."""
        for position, row in enumerate(self.rows):
            if row.row_id == row_id:
                return RowProof(
                    position=position,
                    rows=len(self.rows),
                    vector=self.vectors[position].tobytes(),
                    scale=int(self.scales[position]),
                    line=parse_canonical(self.lines[position]),
                    path=tree_path(self.leaves(), position),
                )
        raise NotFound(f"the index has no row {row_id[:80]}; its rows are <contribution>/<number>")


@dataclass(frozen=True, kw_only=True)
class CommittedSketch:
    """`vector` int8 (dim,); `norm` of the whole gradient, in 1/256 of a quantisation step."""

    vector: NDArray[np.int8]
    norm: int


def open_committed(path: Path, *, manifest_sha256: str) -> CommittedIndex:
    """Open the index of that hash after checking every byte that is read.

    Raises NotFound when a file is missing, Inconsistent when one is not what the manifest says, or
    the manifest not what the caller expects; Unavailable for an older format.
    """
    raw = _read(path / MANIFEST, MAX_MANIFEST_BYTES)
    if sha256_hex(raw) != manifest_sha256:
        raise Inconsistent(
            f"{MANIFEST} hashes to {sha256_hex(raw)}, expected {manifest_sha256}: another index, "
            "or an altered one"
        )
    manifest = _manifest(raw)
    count, dim = manifest["rows"], manifest["dim"]
    for name, size in ((VECTORS, count * dim), (SCALES, count * 4), (ROWS, None)):
        _check(path / name, manifest["files"][name], size)
    # Mapped, not read: 100,000 rows are 100 MB, and a score needs them once.
    vectors = np.memmap(path / VECTORS, np.int8, "r", shape=(count, dim))
    scales = np.fromfile(path / SCALES, dtype=">u4").astype(np.uint32)
    lines = (path / ROWS).read_bytes().split(b"\n")
    if lines.pop() != b"" or len(lines) != count:
        raise Inconsistent(f"{ROWS} has {len(lines)} lines, the manifest says {count}")
    rows = [_row(line, n) for n, line in enumerate(lines)]
    for n, row in enumerate(rows):
        if row.cluster >= count or rows[row.cluster].cluster != row.cluster:
            raise Inconsistent(f"line {n + 1} of {ROWS}: its cluster does not represent itself")
    return CommittedIndex(
        manifest=manifest,
        manifest_sha256=manifest_sha256,
        vectors=vectors,
        scales=scales,
        rows=rows,
        lines=lines,
    )


def read_sketch(data: bytes) -> CommittedSketch:
    """A sketch's bytes (docs/FORMATS.md). Raises InvalidEvent."""
    start = len(SKETCH_MAGIC) + 12
    norm = int.from_bytes(data[start - 12 : start - 4], "big")
    vector = np.frombuffer(data[start:], dtype=np.int8)
    if (
        data[: len(SKETCH_MAGIC)] != SKETCH_MAGIC
        or data[start - 4 : start] != len(vector).to_bytes(4, "big")
        or not 1 <= len(vector) <= MAX_DIM
        or norm > MAX_NORM
        or int(vector.min()) < -LIMIT
    ):
        raise InvalidEvent("not a sketch: expected its magic line, norm, length and entries")
    return CommittedSketch(vector=vector, norm=norm)


def scores_of(index: CommittedIndex, sketch: CommittedSketch) -> NDArray[np.int64]:
    """(rows,): vector · sketch x scale of every row. Raises InvalidEvent on another length.

    In 32-bit integers: MAX_DIM entries of at most 127 x 127 stay below 2^31, and times a scale
    below 2^63.
    """
    if sketch.vector.shape != index.vectors.shape[1:]:
        raise InvalidEvent(
            f"the sketch has {len(sketch.vector)} entries, the index {index.vectors.shape[1]}: it "
            "was made for another index"
        )
    query = sketch.vector.astype(np.int32)
    parts = [
        index.vectors[start : start + _CHUNK].astype(np.int32) @ query
        for start in range(0, len(index.vectors), _CHUNK)
    ]
    return np.concatenate(parts).astype(np.int64) * index.scales.astype(np.int64)


def scores_sha256(scores: NDArray[np.int64]) -> str:
    """Hex SHA-256 over the scores as signed 64-bit big-endian, in row order."""
    return sha256_hex(scores.astype(">i8").tobytes())


def _manifest(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_canonical(raw)
        if not isinstance(value, dict) or value.get("format") not in (FORMAT, *OLDER):
            raise InvalidEvent(f"expected format {FORMAT}")
        if value["format"] in OLDER:
            raise Unavailable(
                f"the index is of format {value['format']}, which this version does not recompute "
                "(it knows nothing against it either): audit it with the version of its time"
            )
        files, levels = value["files"], (value["placebo_level"], value["noise_level"])
        ok = (
            all(type(value[name]) is int and value[name] > 0 for name in ("rows", "dim"))
            and value["dim"] <= MAX_DIM
            and all(type(files[name]["bytes"]) is int for name in SCORED_FILES)
            and all(
                isinstance(level, str)
                and level.isascii()
                and level.isdigit()
                and len(level) <= MAX_LEVEL_DIGITS
                for level in levels
            )
        )
        for name in SCORED_FILES:
            check_hash(files[name]["sha256"], f"files.{name}.sha256")
        check_hash(value["row_root"], "row_root")
    except (InvalidEvent, KeyError, TypeError) as error:
        raise Inconsistent(f"{MANIFEST} is no index manifest: {error}") from error
    if not ok:
        raise Inconsistent(f"{MANIFEST} is no index manifest: rows, dim, files or a level")
    return value


def _row(line: bytes, n: int) -> CommittedRow:
    try:
        value = parse_canonical(line)
        if not isinstance(value, dict) or value.keys() != _ROW_FIELDS:
            raise InvalidEvent(f"expected exactly {', '.join(sorted(_ROW_FIELDS))}")
        for name in ("index", "registered_index", "cluster"):
            if type(value[name]) is not int or value[name] < 0:
                raise InvalidEvent(f"{name} must be an integer from 0")
        if not isinstance(value["contribution"], str):
            raise InvalidEvent("contribution must be a string")
        check_hash(value["row_hash"], "row_hash")
        check_actor(value["contributor"], "contributor")
    except InvalidEvent as error:
        raise Inconsistent(f"line {n + 1} of {ROWS}: {error.message}") from error
    return CommittedRow(**value)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise NotFound(f"{path.name} is missing: fetch the index again") from error
    if len(data) > limit:
        raise Inconsistent(f"{path.name} has more than {limit} bytes")
    return data


def _check(path: Path, stamp: dict[str, Any], size: int | None) -> None:
    found = path.stat().st_size if path.is_file() else -1
    if found < 0:
        raise NotFound(f"{path.name} is missing: fetch the index again")
    if found != stamp["bytes"] or (size is not None and found != size):
        raise Inconsistent(
            f"{path.name} has {found} bytes, expected {stamp['bytes'] if size is None else size}: "
            "cut short, or another index's"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != stamp["sha256"]:
        raise Inconsistent(f"{path.name} hashes to {digest}, expected {stamp['sha256']}: altered")
