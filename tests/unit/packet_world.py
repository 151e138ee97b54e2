"""A log with one attributed answer over an index of integers that nobody trained: audit packets
without a model. Everything comes from fixed seeds, so that the same bytes come out every time."""

from pathlib import Path
from random import Random
from typing import Any

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import leaf_hash
from ledger.domain.ids import sha256_hex
from ledger.domain.rows import tree_path, tree_root
from ledger.verify.encoding import encode_base64
from ledger.verify.packet import SKETCH_MAGIC, Packet, format_packet
from tests.unit.lineage_world import World, actor, name, rows

DIM = 24
WHO = ("ann", "ben")
METHOD = "ekfac-lora/v1"
NAMED = 40
"""Of a large index, the evidence names rows among the first so many: enough for its size."""
ROW = f"{name('ben')}/1"
"""The row that packets here are about: the fifth of six."""


def signed(numbers: list[int]) -> bytes:
    return bytes(number & 0xFF for number in numbers)


class PacketWorld:
    """`packet(n)` and `bundle`. `top` rows of the evidence have their true scores."""

    def __init__(self, folder: Path, *, dim: int = DIM, extra: int = 0, **lies: Any) -> None:
        random = Random(7)
        self.lines = self._lines(extra)
        self.vectors = [random.randbytes(dim).replace(b"\x80", b"\x81") for _ in self.lines]
        self.scales = [random.randint(1, 2**24) for _ in self.lines]
        self.sketch = [random.randint(-127, 127) for _ in range(dim)]
        self.leaves = [
            leaf_hash(vector + scale.to_bytes(4, "big") + canonical_json(line))
            for vector, scale, line in zip(self.vectors, self.scales, self.lines, strict=True)
        ]
        self.root = tree_root(self.leaves).hex()
        self.evidence = {**self._evidence(), **lies.get("evidence", {})}
        self.evidence_sha256 = sha256_hex(canonical_json(self.evidence))
        self.world = World(folder).tell(
            {
                "run.completed": lambda body: {
                    **body, "index_root": self.root, "index_sha256": "1d" * 32,
                    "rows_count": 6,
                },
                "attribution.recorded": lambda body: {
                    **body, "evidence_sha256": self.evidence_sha256, "index_sha256": "1d" * 32,
                    "method": METHOD,
                },
            }
        )  # fmt: skip
        self.world.checkpoint()
        self.vkey = self.world.vkey

    @property
    def bundle(self) -> bytes:
        return self.world.bundle("attribution.recorded")

    def score(self, n: int) -> int:
        entries = [byte - 256 if byte > 127 else byte for byte in self.vectors[n]]
        return self.scales[n] * sum(a * b for a, b in zip(entries, self.sketch, strict=True))

    def packet(self, n: int = 4, **changes: Any) -> Packet:
        parts: dict[str, Any] = {
            "evidence": self.evidence,
            "evidence_sha256": self.evidence_sha256,
            "index_root": self.root,
            "rows": len(self.lines),
            "position": n,
            "vector": self.vectors[n],
            "scale": self.scales[n],
            "line": self.lines[n],
            "proof": tuple(tree_path(self.leaves, n)),
            "score": self.score(n),
        }
        return Packet(**{**parts, **changes})

    def bytes(self, n: int = 4, **changes: Any) -> bytes:
        return format_packet(self.packet(n, **changes))

    def _lines(self, extra: int) -> list[dict[str, Any]]:
        """The six rows of the story, as its events and manifest have them, and more."""
        lines: list[dict[str, Any]] = []
        for who, registered in zip(WHO, (1, 3), strict=True):
            for n, row in enumerate(rows(who)):
                lines.append(self._line(who, n, row.hash.hex(), registered, len(lines)))
        for n in range(extra):
            lines.append(self._line("ben", 3 + n, f"{n:064x}", 3, len(lines)))
        lines[5]["cluster"] = 1  # a near-copy of one of ann's
        return lines

    def _line(self, who: str, n: int, row_hash: str, at: int, place: int) -> dict[str, Any]:
        return {
            "contribution": name(who), "index": n, "row_hash": row_hash, "contributor": actor(who),
            "registered_index": at, "cluster": place,
        }  # fmt: skip

    def _evidence(self) -> dict[str, Any]:
        sketch = SKETCH_MAGIC + (9_999).to_bytes(8, "big") + len(self.sketch).to_bytes(4, "big")
        sketch += signed(self.sketch)
        named = [
            {
                "row": f"{line['contribution']}/{line['index']}",
                "contributor": line["contributor"],
                "score": str(self.score(n)),
            }
            for n, line in enumerate(self.lines[:NAMED])
            if line["cluster"] == n
        ]
        ranked = sorted(named, key=lambda row: -int(row["score"]))
        return {
            "v": 2,
            "inference": name("inference"),
            "method": METHOD,
            "index_sha256": "1d" * 32,
            "sketch": encode_base64(sketch),
            "sketch_sha256": sha256_hex(sketch),
            "scores_sha256": "5c" * 32,
            "placebo": "12345",
            "terms": {"log_size": 9, "splits": [], "withdrawn": []},
            "top_rows": ranked[:10],
            "against": [row for row in reversed(ranked) if int(row["score"]) < 0][:10],
            "spans": None,
        }
