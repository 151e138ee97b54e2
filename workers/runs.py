"""One training run from rows to recorded artefacts, without Ray.

Knows the client, the trainer and the index builder; who calls it, and on which machine, is the
matter of `actors` and `jobs`. What lies in `<home>/runs/<run>`:

    <inputs>/adapter/     the trainer's folder: snapshot while it trains, adapter and manifest after
    <inputs>/index/       the attribution index, whole or not there
    progress.json         phase, done, total, loss: for people, never for decisions
    outbox/               the run's terminal event, until the ledger has it

`<inputs>` names the rows and settings by hash, so an attempt that finds other rows (one was
withdrawn between two attempts) starts afresh beside the old folder, and one that finds the same
goes on where the last one was killed. Blobs are stored before the event that names them is signed.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from ledger.client import Client
from ledger.domain.canonical import canonical_json
from ledger.domain.ids import sha256_hex
from ledger.domain.rows import DataRow, decode_rows, rows_root
from ledger.errors import Conflict, Inconsistent, InvalidEvent, LedgerError
from workers.artefacts import ADAPTER_CONFIG, ADAPTER_FILE, INDEX_MANIFEST, files_of_index
from workers.attribution.build import build_index, config_of
from workers.attribution.index import Index, IndexedRow, load_index
from workers.link import WorkerSpec
from workers.screen import screened
from workers.training.config import TrainingConfig
from workers.training.trainer import MAX_ROWS, TrainingResult, train

log = structlog.get_logger(__name__)

PROGRESS_S = 0.5

Phase = Callable[[str, int, int, str | None], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The body of `run.completed`, less run and attempt."""

    manifest_sha256: str
    adapter_sha256: str
    adapter_config_sha256: str
    index_sha256: str
    index_root: str
    rows_count: int
    contributions_count: int
    steps: int
    loss: str


def execute(spec: WorkerSpec, run: Mapping[str, Any], client: Client) -> Outcome:
    """Fetch, train, index and store; idempotent: finished parts are taken from disk.

    `run` is the ledger's row of the run. Raises InvalidEvent for a run that can never work (its
    settings, its base model, no rows), other LedgerErrors for what may work later.
    """
    from workers import base_model

    config = TrainingConfig.from_dict(run["config"])
    base = spec.base_path()
    digest = base_model.digest(base)
    if run["base_model"] != digest:
        raise InvalidEvent(
            f"the run asks for base model {run['base_model']} ({run['base_id']}); these workers "
            f"have {digest}. Request a run on that one, or start workers with the other"
        )
    folder = spec.run_folder(str(run["run"]))
    report = _Reporter(folder)
    report("rows", 0, 0)
    rows = list(fetch_rows(client, str(run["run"])))
    report("screen", 0, len(rows))
    rows = screened(client, str(run["run"]), rows)
    if not rows:
        raise InvalidEvent(
            "the run has no rows: none of its datanets holds an approved contribution that is "
            "neither withdrawn nor held"
        )
    work = folder / _inputs_name(rows, config, digest)
    result = _train(config, base, rows, work / "adapter", report)
    index = _index(config, base, rows, work, result, report)
    report("store", 0, 0)
    _store(client, work, index)
    report("done", 1, 1)
    return Outcome(
        manifest_sha256=result.manifest_sha256,
        adapter_sha256=result.adapter_sha256,
        adapter_config_sha256=result.config_sha256,
        index_sha256=index.manifest_sha256,
        index_root=index.row_root,
        rows_count=len(rows),
        contributions_count=len({row.contribution for row in rows}),
        steps=result.steps,
        loss=result.final_loss,
    )


def fetch_rows(client: Client, run: str) -> Iterator[IndexedRow]:
    """The run's rows in log order, each contribution held against what its event committed to."""
    count = 0
    for found in client.pages(f"/v1/runs/{run}/contributions"):
        rows = contribution_rows(client, found)
        count += len(rows)
        if count > MAX_ROWS:
            raise InvalidEvent(f"the run has more than {MAX_ROWS} rows (MAX_ROWS)")
        for number, row in enumerate(rows):
            yield IndexedRow(
                contribution=found["contribution"],
                index=number,
                row_hash=row.hash.hex(),
                contributor=found["contributor"],
                prompt=row.prompt,
                completion=row.completion,
                registered_index=int(found["index"]),
            )


def contribution_rows(client: Client, found: Mapping[str, Any]) -> list[DataRow]:
    """The rows of one listed contribution; Inconsistent when they are not what its event says."""
    rows = decode_rows(client.get_blob(found["rows_sha256"]))
    if len(rows) != found["rows_count"] or rows_root(rows).hex() != found["rows_root"]:
        raise Inconsistent(
            f"the rows of contribution {found['contribution']} are not those its event committed "
            f"to: {len(rows)} rows, expected {found['rows_count']} with root {found['rows_root']}"
        )
    return rows


def _inputs_name(rows: list[IndexedRow], config: TrainingConfig, digest: str) -> str:
    inputs = {
        "rows": [[r.contribution, r.index, r.row_hash] for r in rows],
        "config": config.to_dict(),
        "base": digest,
    }
    return sha256_hex(canonical_json(inputs))[:16]


def _train(
    config: TrainingConfig, base: Path, rows: list[IndexedRow], out: Path, report: "_Reporter"
) -> TrainingResult:
    def on_progress(done: int, total: int, loss: float) -> None:
        report("train", done, total, f"{loss:.4f}")

    try:
        return train(config, base, rows, out, on_progress=on_progress)
    except Conflict as error:
        # Same rows and settings, other library versions: the snapshot cannot be gone on with.
        log.warning("snapshot of another environment, starting over", reason=error.message)
        return train(config, base, rows, out, on_progress=on_progress, resume=False)


def _index(
    config: TrainingConfig,
    base: Path,
    rows: list[IndexedRow],
    work: Path,
    result: TrainingResult,
    report: "_Reporter",
) -> Index:
    folder = work / "index"
    if folder.exists():
        with contextlib.suppress(LedgerError):
            index = load_index(folder)
            if index.manifest["adapter_sha256"] == result.adapter_sha256:
                return index
        shutil.rmtree(folder)
    import torch

    from workers import base_model

    torch.set_num_threads(config.threads)  # part of what an index's floats depend on
    model, tokenizer = base_model.load(base)
    lora = base_model.with_adapter(model, work / "adapter")
    return build_index(
        lora,
        tokenizer,
        rows,
        folder,
        adapter_sha256=result.adapter_sha256,
        base_digest=result.base_sha256,
        config=config_of(config, model),
        progress=lambda phase, done, total: report(f"index: {phase}", done, total),
    )


def _store(client: Client, work: Path, index: Index) -> None:
    """All artefacts into the blob store. A blob is named by its hash: storing twice is harmless."""
    adapter = work / "adapter"
    paths = [adapter / name for name in (ADAPTER_FILE, ADAPTER_CONFIG, "manifest.json")]
    manifest = index.path / INDEX_MANIFEST
    paths += [index.path / name for name in files_of_index(manifest.read_bytes())] + [manifest]
    for path in paths:
        client.put_blob(path.read_bytes())


class _Reporter:
    """Progress for people: a small file, at most every PROGRESS_S seconds."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "progress.json"
        self._last = ("", 0.0)

    def __call__(self, phase: str, done: int, total: int, loss: str | None = None) -> None:
        now = time.monotonic()
        if phase == self._last[0] and done < total and now - self._last[1] < PROGRESS_S:
            return
        if phase != self._last[0]:
            log.info("run phase", run=self._path.parent.name, phase=phase)
        self._last = (phase, now)
        value = {"phase": phase, "done": done, "total": total, "loss": loss}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(self._path)
