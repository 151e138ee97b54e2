"""What an audit of an attribution costs, and what another machine does to its floats.

    python -m tests.bench.bench_attribution_audit [--data ../shared/data] [--rows 100000]

Sketches and an index are made again with another thread count, in batches, and with instruction
sets switched off (a process each; as near to other machines as one machine comes), and compared
with the first. `workers/attribution/audit_weights.py` takes its tolerances from here. Then an audit
of recomputed integers at size. Times are CPU seconds, since the machine is shared.
"""

import argparse
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import leaf_hash
from ledger.domain.ids import sha256_hex
from ledger.domain.rows import tree_root
from tests.gates_world import SHARED, real
from tests.unit.audit_answers import INFERENCE, contribution, contributor, fact
from workers import base_model
from workers.attribution import audit
from workers.attribution.audit_index import compare_indexes
from workers.attribution.audit_weights import compare
from workers.attribution.build import build_index
from workers.attribution.committed import (
    FORMAT,
    CommittedIndex,
    CommittedSketch,
    open_committed,
    read_sketch,
    scores_of,
    scores_sha256,
)
from workers.attribution.evidence import Evidence, NamedRow
from workers.attribution.index import IndexConfig, IndexedRow, load_index
from workers.attribution.query import context_of, encode_answer, sketch_examples
from workers.attribution.shares import Shares
from workers.attribution.sketch import Sketch
from workers.attribution.terms import NO_TERMS, Terms
from workers.training.config import TrainingConfig
from workers.training.data import pad_id
from workers.training.trainer import train

ROWS, EPOCHS, CONTRIBUTORS = 240, 3, 40
HELD_OUT = 40
VARIANTS: dict[str, dict[str, str]] = {
    "as committed": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "in batches of 16": {"AUDIT_BATCH": "16"},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "SSE4": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}  # fmt: skip
DIM = 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.data / "tldr.jsonl").exists():
        print(f"no data in {options.data}: nothing measured")
        return
    if options.child is not None:
        child(options.folder, options.child, options.data)
        return
    with tempfile.TemporaryDirectory() as folder:
        machines(Path(folder), options.data)
    with tempfile.TemporaryDirectory() as folder:
        integers(Path(folder), options.rows)


def texts(data: Path) -> list[IndexedRow]:
    """Real rows dealt to contributors, and behind them as many as are held out."""
    rows = real("tldr.jsonl", data=data)
    step = len(rows) // (ROWS + HELD_OUT)
    return [
        fact(n % CONTRIBUTORS, n, row.prompt, row.completion)
        for n, row in enumerate(rows[:: max(1, step)][: ROWS + HELD_OUT])
    ]


# --- floats ---


def machines(folder: Path, data: Path) -> None:
    for name, changes in VARIANTS.items():
        command = [sys.executable, "-m", "tests.bench.bench_attribution_audit"]
        command += ["--child", name, "--folder", str(folder), "--data", str(data)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    first, *others = VARIANTS
    index, known = opened(folder / first), made(folder / first)
    print(
        f"{len(known)} answers ({HELD_OUT} of them to questions nobody taught) by an adapter of "
        f"{ROWS} rows of tldr, dim {index.manifest['dim']}; made again, beside the first time"
    )
    print(
        f"{'':18} {'same bytes':>11} {'cosine':>9} {'entry':>6} {'norm ppm':>9} {'shares ppm':>11}"
    )
    for name in others:
        again = made(folder / name)
        found = [compare(a, b) for a, b in zip(known, again, strict=True)]
        moved = [
            audit.difference_ppm(shares(index, a), shares(index, b))
            for a, b in zip(known, again, strict=True)
        ]
        same = sum(
            a.norm == b.norm and bool((a.vector == b.vector).all())
            for a, b in zip(known, again, strict=True)
        )
        cosine = min(f.cosine_ppm for f in found) / 1e6
        steps, norm = max(f.entry_steps for f in found), max(f.norm_ppm for f in found)
        print(
            f"{name:18} {same:4} of {len(known):3} {cosine:9.6f} {steps:6} {norm:9} {max(moved):11}"
        )
    strangers = [compare(a, b).cosine_ppm for a, b in pairwise(known)]
    print(
        f"sketches of two different answers: cosine at most {max(strangers) / 1e6:.6f}, median "
        f"{sorted(strangers)[len(strangers) // 2] / 1e6:.6f}"
    )
    for name in others:
        if (folder / name / "manifest.json").exists():
            rebuilt = compare_indexes(index, opened(folder / name))
            print(
                f"index, {name}: {'the same' if rebuilt.identical else 'other'} bytes, "
                f"similarities {rebuilt.similarity_ppm} ppm apart, placebo level "
                f"{rebuilt.level_ppm} ppm"
            )


def child(folder: Path, name: str, data: Path) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = texts(data)
    adapter = folder / "adapter"
    config = TrainingConfig(epochs=EPOCHS, seed=1)
    if not adapter.exists():
        train(config, base_model.BUNDLED, rows[:ROWS], adapter)
    model, tokenizer = base_model.load(base_model.BUNDLED)
    lora = PeftModel.from_pretrained(model, str(adapter))
    lora.eval()
    batch = int(os.environ.get("AUDIT_BATCH", "1"))
    if batch == 1:
        build_index(
            lora, tokenizer, rows[:ROWS], folder / name, adapter_sha256="ad" * 32,
            base_digest="ba" * 32, config=IndexConfig(seed=3),
        )  # fmt: skip
    index = load_index(folder / "as committed")
    asked = [
        encode_answer(tokenizer, row.prompt, row.completion, max_len=context_of(lora))
        for row in [*rows[:HELD_OUT], *rows[ROWS:]]
    ]
    groups = [asked] if batch > 1 else [[one] for one in asked]
    sketches = [s for part in groups for s in sketch_examples(lora, index, part, pad_id(tokenizer))]
    (folder / f"{name}.sketches").write_bytes(pickle.dumps([s.to_bytes() for s in sketches]))


def made(folder: Path) -> list[CommittedSketch]:
    path = folder.with_name(f"{folder.name}.sketches")
    return [read_sketch(data) for data in pickle.loads(path.read_bytes())]


def opened(folder: Path) -> CommittedIndex:
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    return open_committed(folder, manifest_sha256=sha256)


def shares(index: CommittedIndex, sketch: CommittedSketch) -> Shares:
    speaking = audit.speaking_rows(index, NO_TERMS)
    return audit.shares_of(index, scores_of(index, sketch), sketch, speaking, NO_TERMS)


# --- integers ---


def integers(folder: Path, count: int) -> None:
    claim, evidence = synthetic(folder, count)
    started = time.process_time()
    index = open_committed(folder, manifest_sha256=claim.index_sha256)
    read = time.process_time()
    found = audit.Audit()
    assert audit.read_evidence(found, claim, evidence.to_bytes()) == evidence
    audit.audit_shares(found, claim, evidence, index, evidence.terms)
    done = time.process_time()
    print(
        f"audit of {count:,} rows x {DIM}: opening and hashing {read - started:.1f} s, "
        f"steps 1 to 8 {done - read:.1f} s; {found.facts['difference_ppm']} ppm difference"
    )


def synthetic(folder: Path, count: int) -> tuple[audit.Claim, Evidence]:
    """An index of random integers under true hashes, and an attribution by it."""
    random = np.random.default_rng(0)
    vectors = random.integers(-127, 128, (count, DIM), dtype=np.int8)
    scales = random.integers(1, 2**24, count).astype(">u4")
    lines = [
        canonical_json(
            {
                "contribution": contribution(n % CONTRIBUTORS), "index": n // CONTRIBUTORS,
                "row_hash": f"{n:064x}", "contributor": contributor(n % CONTRIBUTORS),
                "registered_index": n % CONTRIBUTORS, "cluster": n,
            }
        )
        for n in range(count)
    ]  # fmt: skip
    files = {
        "vectors.i8": vectors.tobytes(),
        "scales.u32": scales.tobytes(),
        "rows.jsonl": b"".join(line + b"\n" for line in lines),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    leaves = [
        leaf_hash(vectors[n].tobytes() + int(scales[n]).to_bytes(4, "big") + line)
        for n, line in enumerate(lines)
    ]
    manifest = canonical_json(
        {
            "format": FORMAT, "method": "ekfac-lora/v2", "rows": count, "dim": DIM,
            "adapter_sha256": "ad" * 32, "base_digest": "ba" * 32,
            "placebo_level": str(2**50), "noise_level": str(2**49),
            "row_root": tree_root(leaves).hex(),
            "files": {n: {"bytes": len(d), "sha256": sha256_hex(d)} for n, d in files.items()},
        }
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(manifest)
    index = open_committed(folder, manifest_sha256=sha256_hex(manifest))
    vector = random.integers(-127, 128, DIM, dtype=np.int8)
    sketch = Sketch(vector=vector, norm=int(256 * np.linalg.norm(vector.astype(float))))
    read = read_sketch(sketch.to_bytes())
    scores, terms = scores_of(index, read), Terms(log_size=8)
    named = sorted(range(count), key=lambda n: (-int(scores[n]), n))

    def rows(chosen: list[int]) -> tuple[NamedRow, ...]:
        return tuple(
            NamedRow(
                row=index.rows[n].row_id,
                contributor=index.rows[n].contributor,
                score=int(scores[n]),
            )
            for n in chosen
        )

    evidence = Evidence(
        inference=INFERENCE, method="ekfac-lora/v2", index_sha256=sha256_hex(manifest),
        sketch=sketch.to_bytes(), scores_sha256=scores_sha256(scores),
        placebo=audit.placebo_of(index, read), terms=terms, top_rows=rows(named[:10]),
        against=rows(sorted(range(count), key=lambda n: (int(scores[n]), n))[:10]),
    )  # fmt: skip
    paid = shares(index, read)
    trained = [
        audit.TrainedRow(
            contribution=row.contribution, index=row.index, row_hash=row.row_hash,
            contributor=row.contributor, registered_index=row.registered_index,
        )
        for row in index.rows
    ]  # fmt: skip
    return audit.Claim(
        inference=INFERENCE, method="ekfac-lora/v2", base_model="ba" * 32,
        evidence_sha256=sha256_hex(evidence.to_bytes()), index_sha256=sha256_hex(manifest),
        shares=paid.contributors, unattributed_ppm=paid.unattributed_ppm,
        index_root=tree_root(leaves).hex(), run_index_sha256=sha256_hex(manifest),
        adapter_sha256="ad" * 32, inference_index=5, attribution_index=9, rows=trained,
    ), evidence  # fmt: skip


if __name__ == "__main__":
    main()
