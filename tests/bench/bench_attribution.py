"""Attribution's numbers on this machine: what an index costs, what a query costs, who is found.

    python -m tests.bench.bench_attribution [--rows FILE.jsonl] [--count 1000]

Times are CPU seconds of one thread, since the machine is shared. The peer is gradient dot product
(grad-dot) over the same exact gradients, raw and as cosine; kronfluence and dattri come with the
fidelity harness. Canaries are invented facts: the row that taught an answer is known.
"""

import argparse
import hashlib
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from workers import base_model
from workers.attribution.build import build_index
from workers.attribution.gradients import (
    backward,
    forward,
    lora_sites,
    loss_sums,
    recording,
)
from workers.attribution.index import IndexConfig, IndexedRow, exact_dots
from workers.attribution.query import attribute, conclude, encode_answer, sketch_answer
from workers.attribution.sketch import Sketch
from workers.training.config import TrainingConfig
from workers.training.data import Example, collate, encode_row, pad_id, prompt_ids
from workers.training.trainer import TrainingRow, train

SYLLABLES = "ba ke lo mi nu ra se ti vo zu dra fen gol hir jas kel mor nev pol qua".split()  # noqa: SIM905
KINDS = "harbour crop festival river drink".split()  # noqa: SIM905
MAX_LEN = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="rows with prompt, completion, contributor")
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {platform.processor() or 'cpu'}, torch {torch.__version__}, "
        "1 thread, CPU seconds"
    )
    with tempfile.TemporaryDirectory() as folder:
        canaries(Path(folder))
        if options.rows:
            costs(Path(folder), options.rows, options.count)
    scan()


def canaries(folder: Path) -> None:
    """Recall over the model's own, right answers to reworded questions."""
    rng = random.Random(5)
    word = lambda n: "".join(rng.choices(SYLLABLES, k=n)).capitalize()  # noqa: E731
    rows, asked, values = [], [], []
    for n in range(150):
        kind, place, value = KINDS[n % 5], word(4), word(2)
        rows.append(
            row(
                n,
                f"c{n // 5}",
                f"What is the {kind} of {place}?",
                f"The {kind} of {place} is {value}.",
            )
        )
        asked.append(f"Tell me the {kind} of {place}.")
        values.append(value)
    model, tokenizer, _ = fit(rows, folder / "canary", epochs=24)
    index = build_index(
        model, tokenizer, rows, folder / "canary-index",
        adapter_sha256="", base_digest="", config=IndexConfig(max_len=MAX_LEN),
    )  # fmt: skip
    answers = [generate(model, tokenizer, question) for question in asked]
    told = [n for n, said in enumerate(answers) if values[n] in said]
    hits, deep, paid, share, nobody = 0, 0, 0, 0, 0
    for n in told:
        result = attribute(model, tokenizer, index, asked[n], answers[n])
        hits += result.top_rows[0][0] == rows[n].row_id
        deep += rows[n].row_id in [r[0] for r in result.top_rows]
        got = dict(result.shares)
        paid += max(got, key=lambda c: got[c], default="") == rows[n].contributor
        share += got.get(rows[n].contributor, 0)
        nobody += result.unattributed_ppm
    count = len(told)
    print(
        f"canaries: {count} of {len(rows)} facts told; {len(index.rows)} rows, "
        f"dim {index.manifest['dim']}"
    )
    print(f"  index    recall@1 {hits / count:.3f}  recall@10 {deep / count:.3f}")
    print(
        f"  index    paid most {paid / count:.3f}  mean share {share / count / 1e6:.2f}  "
        f"unattributed {nobody / count / 1e6:.2f}"
    )
    pad = pad_id(tokenizer)
    train_grads = raw_gradients(model, [encode(tokenizer, r) for r in rows], pad)
    asked_grads = raw_gradients(
        model,
        [encode_answer(tokenizer, asked[n], answers[n], max_len=MAX_LEN) for n in told],
        pad,
    )
    truth = torch.tensor(told)
    peers = {"grad-dot": train_grads, "grad-cos": torch.nn.functional.normalize(train_grads)}
    for name, matrix in peers.items():
        ranks = (asked_grads @ matrix.T).topk(10, dim=1).indices
        at1 = (ranks[:, 0] == truth).float().mean()
        at10 = (ranks == truth[:, None]).any(dim=1).float().mean()
        print(f"  {name} recall@1 {at1:.3f}  recall@10 {at10:.3f}")


def costs(folder: Path, path: Path, count: int) -> None:
    """Index against an epoch of training, query time, bytes per row, on real text."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = random.Random(1).sample(lines, min(count, len(lines)))
    rows = [
        row(n, str(r.get("contributor", n % 20)), r["prompt"], r["completion"])
        for n, r in enumerate(chosen)
    ]
    model, tokenizer, epoch_s = fit(rows, folder / "real", epochs=1)
    index, build_s = timed(
        lambda: build_index(
            model, tokenizer, rows, folder / "real-index",
            adapter_sha256="", base_digest="", config=IndexConfig(max_len=MAX_LEN),
        )
    )  # fmt: skip
    files = {name: stamp["bytes"] for name, stamp in index.manifest["files"].items()}
    copies = sum(meta.cluster != n for n, meta in enumerate(index.rows))
    print(
        f"real text: {len(rows)} rows, {len({r.contributor for r in rows})} contributors, "
        f"{copies} near-copies"
    )
    print(f"  epoch {epoch_s:.1f} s, index {build_s:.1f} s ({build_s / epoch_s:.2f} epochs)")
    each = (files["vectors.i8"] + files["scales.u32"]) / len(rows)
    print(f"  bytes per row {each:.0f} + {files['rows.jsonl'] / len(rows):.0f} of metadata; "
          f"lens {files['lens.safetensors'] / 2**20:.1f} MiB")  # fmt: skip
    sketch_ms, conclude_ms = [], []
    for r in rows[:30]:
        ask = partial(sketch_answer, model, tokenizer, index, r.prompt, r.completion)
        sketch, seconds = timed(ask)
        sketch_ms.append(seconds * 1e3)
        conclude_ms.append(timed(partial(conclude, index, sketch))[1] * 1e3)
    print(
        f"  query p50 {np.median(sketch_ms):.1f} ms gradient and sketch + "
        f"{np.median(conclude_ms):.1f} ms scores and shares"
    )


def scan() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(-127, 128, (100_000, 1024), dtype=np.int8)
    sketch = Sketch(vector=vectors[0].copy(), norm=1)
    ms = [timed(lambda: exact_dots(vectors, sketch.vector))[1] * 1e3 for _ in range(7)]
    print(f"scan of 100,000 x 1,024: p50 {np.median(ms):.0f} ms")


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


def encode(tokenizer: Any, r: IndexedRow) -> Example:
    return encode_row(tokenizer, r.prompt, r.completion, max_len=MAX_LEN, row_id=r.row_id)


def fit(rows: list[IndexedRow], out: Path, *, epochs: int) -> tuple[Any, Any, float]:
    training = [
        TrainingRow(
            contribution=r.contribution,
            index=r.index,
            row_hash=r.row_hash,
            prompt=r.prompt,
            completion=r.completion,
        )
        for r in rows
    ]
    config = TrainingConfig(epochs=epochs, max_len=MAX_LEN)
    _, seconds = timed(lambda: train(config, base_model.BUNDLED, training, out))
    model, tokenizer = base_model.load(base_model.BUNDLED)
    return PeftModel.from_pretrained(model, str(out)), tokenizer, seconds / epochs


def raw_gradients(model: Any, examples: list[Example], pad: int) -> Tensor:
    sites, parts = lora_sites(model), []
    for example in examples:
        batch = collate([example], pad)
        with recording(model, sites) as tape:
            traces = backward(tape, loss_sums(forward(model, batch, tape), batch["labels"]))
        parts.append(torch.cat([t.per_example().flatten(1) for t in traces], dim=1))
    return torch.cat(parts)


def generate(model: Any, tokenizer: Any, question: str) -> str:
    ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": question}])])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    value = call()
    return value, time.process_time() - start


if __name__ == "__main__":
    main()
