"""Retrain on a subset and write down what the model then says of every query: one unit of truth.

Knows torch and the trainer; neither Ray nor the network (`workers/evaluate.py` deals units out).
A unit is one subset and one training seed. Its result is a file named by the hash of everything
that determines it: base model, settings, the rows' and queries' texts, library versions. So a
result is never taken for another's, an evaluation that was killed goes on where it stood, and one
whose engine changed retrains nothing.

What a crash leaves: `<key>.training/` with the trainer's own snapshot, which the next try of the
same unit goes on from, and no `<key>.json`. The result is written beside its name, synced, renamed;
the training folder goes last, and a crash before that leaves it for the next try to remove.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ledger.domain.canonical import canonical_json
from ledger.errors import InvalidEvent, TooLarge
from workers import base_model
from workers.attribution.gradients import loss_sums
from workers.attribution.index import IndexedRow
from workers.attribution.query import encode_answer
from workers.evaluation.subsets import Subset
from workers.training.config import TrainingConfig
from workers.training.data import collate, pad_id, prompt_ids
from workers.training.trainer import MANIFEST_FILE, train

UNIT_VERSION = 1
MAX_QUERIES = 4_096
QUERY_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Query:
    """An answer to a prompt, whose log-likelihood is measured. `kind` groups the report."""

    prompt: str
    answer: str
    kind: str = "given"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """All that the units of one evaluation share."""

    base_path: Path
    rows: tuple[IndexedRow, ...]
    queries: tuple[Query, ...]
    config: TrainingConfig
    folder: Path
    """Where results lie, `<key>.json` each."""

    def __post_init__(self) -> None:
        if not self.queries:
            raise InvalidEvent("no query: an evaluation measures answers; give one or more")
        if len(self.queries) > MAX_QUERIES:
            raise TooLarge(f"{len(self.queries)} queries; expected MAX_QUERIES = {MAX_QUERIES}")

    def shared(self) -> dict[str, Any]:
        """The part of a unit's key that is the same for all of them; hashes the base model."""
        queries = [[q.prompt, q.answer] for q in self.queries]
        return {
            "v": UNIT_VERSION,
            "base_sha256": base_model.digest(self.base_path),
            "config": {k: v for k, v in self.config.to_dict().items() if k not in _KEPT_OUT},
            "queries_sha256": hashlib.sha256(canonical_json(queries)).hexdigest(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            "platform": [platform.system(), platform.machine()],
        }


_KEPT_OUT = ("seed", "snapshot_steps")
"""Settings that the key has elsewhere (each unit's own seed), or that change no result."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One retraining: `subset` of the trial's rows, with `seed` as the training seed."""

    subset: Subset
    seed: int


def unit_key(trial: Trial, shared: dict[str, Any], unit: Unit) -> str:
    """64 hex digits. Rows count by text and order, not by number: the same halves of the same
    texts are the same unit, whatever else the trial holds."""
    texts = [[trial.rows[i].prompt, trial.rows[i].completion] for i in unit.subset]
    texts_sha256 = hashlib.sha256(canonical_json(texts)).hexdigest()
    whole = {**shared, "rows_sha256": texts_sha256, "rows": len(texts), "seed": unit.seed}
    return hashlib.sha256(canonical_json(whole)).hexdigest()


def finished(trial: Trial, key: str) -> list[float] | None:
    """Log-likelihoods of the queries, in nats, when the unit is done; otherwise None.

    A file that is not whole (a disk that lied) counts as not done, and is measured again.
    """
    try:
        record = json.loads((trial.folder / f"{key}.json").read_bytes())
        values = [float(v) for v in record["log_likelihoods"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values if len(values) == len(trial.queries) else None


def measure(trial: Trial, unit: Unit, key: str) -> list[float]:
    """The unit's result: read when it is there, otherwise trained, measured and written."""
    done = finished(trial, key)
    work = trial.folder / f"{key}.training"
    if done is None:
        trial.folder.mkdir(parents=True, exist_ok=True)
        if unit.subset:
            fit(trial, unit, work)
        done = log_likelihoods(trial, work if unit.subset else None)
        record = {"rows": len(unit.subset), "seed": unit.seed, "log_likelihoods": done}
        _settle(trial.folder / f"{key}.json", json.dumps(record).encode())
    shutil.rmtree(work, ignore_errors=True)
    return done


def adapter_folder(trial: Trial, seed: int) -> Path:
    """Where the adapter of all rows lies, by the hash of what it was trained from; kept."""
    everything = Unit(subset=tuple(range(len(trial.rows))), seed=seed)
    shared = {k: v for k, v in trial.shared().items() if k != "queries_sha256"}
    return trial.folder / f"{unit_key(trial, shared, everything)[:32]}.adapter"


def fit(trial: Trial, unit: Unit, out: Path) -> None:
    """Train the adapter of one unit into `out`; returns at once when it lies there finished."""
    rows = [trial.rows[i] for i in unit.subset]
    train(replace(trial.config, seed=unit.seed), trial.base_path, rows, out)


def trained(out: Path) -> bool:
    """Whether a finished adapter lies in `out`: its manifest is written last."""
    return (out / MANIFEST_FILE).exists()


def load(trial: Trial, adapter: Path | None) -> tuple[Any, Any]:
    """(model, tokenizer): the base with the adapter in `adapter`, or bare."""
    model, tokenizer = base_model.load(trial.base_path)
    if adapter is not None:
        model = base_model.with_adapter(model, adapter).eval()
    return model, tokenizer


def log_likelihoods(trial: Trial, adapter: Path | None) -> list[float]:
    """Of each query's answer given its prompt: the sum over the answer's tokens, in nats."""
    model, tokenizer = load(trial, adapter)
    context = int(model.config.max_position_embeddings)
    examples = [
        encode_answer(tokenizer, q.prompt, q.answer, max_len=context) for q in trial.queries
    ]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    values = [0.0] * len(examples)
    threads = torch.get_num_threads()
    torch.set_num_threads(trial.config.threads)
    try:
        for start in range(0, len(order), QUERY_BATCH):
            chosen = order[start : start + QUERY_BATCH]
            batch = collate([examples[i] for i in chosen], pad_id(tokenizer))
            with torch.inference_mode():
                logits = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits.float()
                losses = loss_sums(logits, batch["labels"])
            for i, loss in zip(chosen, losses.tolist(), strict=True):
                values[i] = -loss
    finally:
        torch.set_num_threads(threads)
    return values


def answers(
    trial: Trial, adapter: Path, prompts: Sequence[str], *, max_new_tokens: int = 48
) -> list[str]:
    """What the adapter says to each prompt, greedily; "" where it says nothing."""
    model, tokenizer = load(trial, adapter)
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": prompt}])])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad_id(tokenizer),
            )
        said.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return said


def _settle(path: Path, data: bytes) -> None:
    """Whole or not there. The name is not synced: a power cut may cost a unit, never spoil one."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
