"""What an attribution index costs: to build, to keep, to ask.

    python -m tests.bench.bench_attribution [--rows 2000] [--scale 100000]

Times are CPU seconds of one thread, since the machine is shared; the scan alone is wall time, since
memory bounds it. Peers: an epoch of our own training for the build, numpy's float32 product (the
same integers) for the scan. Fidelity and kronfluence are in `bench_fidelity`. `--scale` builds an
index of so many rows (tldr's, and numbered variations of them) in a process of its own, and says
what memory it took.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ledger.cli.demo_data import standard_library
from workers import base_model
from workers.attribution.build import build_index
from workers.attribution.index import Index, IndexConfig, IndexedRow, RowMeta
from workers.attribution.query import (
    conclude,
    conclude_from_scores,
    context_of,
    encode_answer,
    scores_from_sketch,
    scores_from_sketches,
    sketch_examples,
)
from workers.attribution.scan import dots, float_product
from workers.attribution.sketch import Sketch
from workers.training.config import TrainingConfig
from workers.training.data import pad_id
from workers.training.trainer import train

TLDR = Path(__file__).parents[3] / "shared" / "data" / "tldr.jsonl"
SCAN_ROWS, SCAN_DIM = 100_000, 1_024
MAX_LEN = 256
ASKED = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--scale", type=int, help="build an index of so many rows, and no more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.scale:
            result = scale(Path(folder), options.scale)
        else:
            result = {**scan(), **costs(Path(folder), options.rows)}
    print(json.dumps(result, indent=2))


def scan() -> dict[str, Any]:
    """Random rows: nothing is easier for one than for another."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(-127, 128, (SCAN_ROWS, SCAN_DIM), dtype=np.int8)
    one = vectors[:1].copy()
    rows = [
        RowMeta(
            contribution=f"c{n // 50}", index=n, row_hash="", contributor=f"p{n // 50:05}",
            registered_index=n, cluster=n,
        )
        for n in range(SCAN_ROWS)
    ]  # fmt: skip
    nothing: Any = None
    # A placebo level that some hundred of the rows clear, as with a real answer.
    index = Index(
        path=Path(),
        manifest={
            "method": "", "placebo_level": str(20_000_000 << 32),
            "noise_level": str(15_000_000 << 32),
        },
        manifest_sha256="", rows=rows, clusters=np.arange(SCAN_ROWS),
        names=sorted({row.contributor for row in rows}), codes=np.arange(SCAN_ROWS) // 50,
        vectors=vectors, scales=rng.integers(1, 2**24, SCAN_ROWS, dtype=np.uint32),
        whitener=nothing, coordinates=nothing, matrix=nothing,
    )  # fmt: skip
    sketch = Sketch(vector=one[0], norm=256_000)
    times = {
        "scan": wall_ms(partial(dots, vectors, one)),
        "scores and shares": wall_ms(partial(conclude, index, sketch)),
        "scan of 16 answers, each": wall_ms(partial(dots, vectors, vectors[:16].copy())) / 16,
        "float32 product, numpy": wall_ms(partial(float_product, vectors, one)),
    }
    print(f"\n{SCAN_ROWS:,} rows x {SCAN_DIM:,}, wall time, p50 of 15")
    for name, value in times.items():
        print(f"{name:>28} {value:8.2f} ms")
    print(f"the scan is {times['float32 product, numpy'] / times['scan']:.0f} times the peer's")
    return {"scan_ms": times}


def costs(folder: Path, count: int) -> dict[str, Any]:
    """Index against an epoch of training, bytes a row, and a query, on real text."""
    rows = list(real_rows(count))
    model, tokenizer, epoch_s = fit(rows, folder / "adapter", epochs=1)
    seen: list[tuple[str, float]] = []
    build = partial(
        build_index, model, tokenizer, rows, folder / "index", adapter_sha256="", base_digest="",
        config=IndexConfig(max_len=MAX_LEN),
        progress=lambda phase, done, total: seen.append((phase, time.process_time())),
    )  # fmt: skip
    index, build_s = timed(build)
    lens_s = next(at for phase, at in seen if phase == "rows") - seen[0][1]
    files = {name: stamp["bytes"] for name, stamp in index.manifest["files"].items()}
    pad, context = pad_id(tokenizer), context_of(model)
    examples = [
        encode_answer(tokenizer, r.prompt, r.completion, max_len=context) for r in rows[:ASKED]
    ]
    sketch_examples(model, index, examples[:2], pad)
    alone = [timed(partial(sketch_examples, model, index, [e], pad))[1] for e in examples]
    sketches, together = timed(partial(sketch_examples, model, index, examples, pad))
    scores = scores_from_sketches(index, sketches)
    concluded = [
        timed(partial(conclude_from_scores, index, s, r))[1]
        for s, r in zip(sketches, scores, strict=True)
    ]
    scanned = [timed(partial(scores_from_sketch, index, s))[1] for s in sketches]
    result = {
        "rows": len(rows),
        "epoch_s": epoch_s,
        "index_s": build_s,
        "index_in_epochs": build_s / epoch_s,
        "curvature_s": lens_s,
        "bytes_a_row": (files["vectors.i8"] + files["scales.u32"]) / len(rows),
        "metadata_bytes_a_row": files["rows.jsonl"] / len(rows),
        "lens_mib": files["lens.safetensors"] / 2**20,
        "gradient_ms": 1e3 * float(np.median(alone)),
        "gradient_batched_ms": 1e3 * together / len(examples),
        "scores_ms": 1e3 * float(np.median(scanned)),
        "shares_ms": 1e3 * float(np.median(concluded)),
    }
    contributors = len({r.contributor for r in rows})
    print(f"\n{len(rows):,} rows of {contributors} contributors, CPU time of one thread")
    print(f"  an epoch of training {epoch_s:.1f} s; index {build_s:.1f} s, of it {lens_s:.1f} s "
          f"for curvature: {build_s / epoch_s:.2f} epochs")  # fmt: skip
    print(f"  {result['bytes_a_row']:.0f} bytes a row, {result['metadata_bytes_a_row']:.0f} of "
          f"metadata, and a lens of {result['lens_mib']:.1f} MiB")  # fmt: skip
    print(f"  an answer: gradient and sketch {result['gradient_ms']:.1f} ms ("
          f"{result['gradient_batched_ms']:.1f} in a batch), scores {result['scores_ms']:.2f} ms, "
          f"shares {result['shares_ms']:.2f} ms")  # fmt: skip
    return {"costs": result}


def scale(folder: Path, count: int) -> dict[str, Any]:
    """One large index: time, and the highest memory of this process."""
    small = list(real_rows(256))
    model, tokenizer, _ = fit(small, folder / "adapter", epochs=1)
    rows = list(real_rows(count))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks: dict[str, float] = {}

    def progress(phase: str, done: int, total: int) -> None:
        marks.setdefault(phase, time.process_time())
        if done == total and phase == "rows":
            marks["sketched"] = time.process_time()

    index, seconds = timed(
        lambda: build_index(
            model, tokenizer, rows, folder / "index", adapter_sha256="", base_digest="",
            config=IndexConfig(max_len=MAX_LEN), progress=progress,
        )
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(stamp["bytes"] for stamp in index.manifest["files"].values())
    example = encode_answer(tokenizer, rows[7].prompt, rows[7].completion, max_len=512)
    sketch = sketch_examples(model, index, [example], pad_id(tokenizer))[0]
    result = {
        "rows": count,
        "cpu_s": seconds,
        "ms_a_row": 1e3 * (marks["sketched"] - marks["rows"]) / count,
        "clusters_s": marks["placebo"] - marks["sketched"],
        "peak_mib": peak / 1024,
        "peak_before_mib": before / 1024,
        "index_mib": size / 2**20,
        "query_ms": wall_ms(partial(conclude, index, sketch)),
    }
    print(
        f"{count:,} rows: {seconds:.0f} s of CPU, {result['ms_a_row']:.1f} ms a row, clusters "
        f"{result['clusters_s']:.0f} s; peak memory {peak / 1024:,.0f} MiB ({before / 1024:,.0f} "
        f"before), index {size / 2**20:,.0f} MiB; scores and shares of an answer "
        f"{result['query_ms']:.1f} ms"
    )
    return {"scale": result}


def real_rows(count: int) -> Iterator[IndexedRow]:
    """tldr rows by their contributors, or the standard library's documentation; beyond their
    number, variations with a number in them."""
    if TLDR.exists():
        lines = [json.loads(line) for line in TLDR.read_text().splitlines()]
        texts = [(r["contributor"], r["prompt"], r["completion"]) for r in lines]
    else:
        texts = [
            (who, r["prompt"], r["completion"])
            for who, rs in standard_library().items()
            for r in rs
        ]
    random.Random(1).shuffle(texts)
    for n in range(count):
        who, prompt, completion = texts[n % len(texts)]
        round_ = n // len(texts)
        more = f" (case {round_ * 7919 + n})" if round_ else ""
        yield row(n, who, prompt + more, completion + more)


def row(n: int, contributor: str, prompt: str, completion: str) -> IndexedRow:
    return IndexedRow(
        contribution=contributor,
        index=n,
        row_hash=hashlib.sha256(f"{n}{prompt}".encode()).hexdigest(),
        contributor=contributor,
        prompt=prompt,
        completion=completion,
        registered_index=n,
    )


def fit(rows: list[IndexedRow], out: Path, *, epochs: int) -> tuple[Any, Any, float]:
    """Model with its adapter, tokenizer, and CPU seconds an epoch."""
    config = TrainingConfig(epochs=epochs, max_len=MAX_LEN)
    _, seconds = timed(lambda: train(config, base_model.BUNDLED, rows, out))
    model, tokenizer = base_model.load(base_model.BUNDLED)
    return PeftModel.from_pretrained(model, str(out)), tokenizer, seconds / epochs


def wall_ms(call: Callable[[], Any], times: int = 15) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    value = call()
    return value, time.process_time() - start


if __name__ == "__main__":
    main()
