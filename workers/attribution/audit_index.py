"""The index of an attribution once more, from the weights and the rows: did it come out of them?

Step 12 of an audit. On the same platform, versions and thread count a rebuild gives the same bytes,
and the manifest's hash says it all. Elsewhere floats differ in their last bits, and principal
directions may come out turned, so bytes cannot be compared: then what scores are made of is, the
similarity of row to row, which no turn of the directions changes. Clusters and names come from
texts alone and must be equal to the byte on every machine.

Rows' texts are private: this step is for whom the ledger lets read them, a worker or the operator.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ledger.domain.money import PPM_WHOLE
from ledger.errors import Inconsistent, LedgerError
from workers.attribution.audit import Audit
from workers.attribution.build import build_index
from workers.attribution.committed import CommittedIndex, open_committed
from workers.attribution.index import IndexConfig, IndexedRow

SAMPLED_ROWS = 256
"""Drawn rows: every row's similarity to them is compared."""
MAX_SIMILARITY_PPM = 20_000
"""Largest difference of two rows' similarity (1,000,000 for a row with itself, about)."""
MAX_LEVEL_PPM = 100_000
"""Difference of the placebo or the noise levels, in millionths of the rebuilt one."""
MAX_THREADS = 256
MAX_EXPONENT = 900
"""Of two, either way, for the unit of the scales: what a float holds."""
_CHUNK = 4_096


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """`identical`, or how far apart. `same_environment` is whether the manifest names the versions
    and platform that are here."""

    identical: bool
    same_environment: bool
    similarity_ppm: int
    level_ppm: int


def audit_index(
    audit: Audit,
    committed: CommittedIndex,
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[IndexedRow],
    work: Path,
    config: IndexConfig,
) -> Rebuild:
    """Step 12: build the index of `rows` again in `work` and compare.

    `model` has the run's adapter active; `config` is what the run's recipe gives
    (`build.config_of`). Raises Inconsistent when the manifest has other settings (a worker could
    choose a level, or let copies pass), or the two differ by more than another machine explains.
    """
    with audit.taking("rebuilt index"):
        threads = _threads(committed.manifest, config)
        again = _rebuild(
            committed.manifest, model, tokenizer, rows, work / "index", config, threads
        )
        found = compare_indexes(committed, again)
        _judge(found)
    audit.ok("rebuilt index", _say(found))
    return found


def _rebuild(
    manifest: dict[str, Any],
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[IndexedRow],
    folder: Path,
    config: IndexConfig,
    threads: int,
) -> CommittedIndex:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        built = build_index(
            model,
            tokenizer,
            rows,
            folder,
            adapter_sha256=str(manifest["adapter_sha256"]),
            base_digest=str(manifest["base_digest"]),
            config=config,
        )
    except (LedgerError, ValueError, RuntimeError, MemoryError) as error:
        raise Inconsistent(f"no index can be built with these settings: {error}") from error
    finally:
        torch.set_num_threads(before)
    return open_committed(folder, manifest_sha256=built.manifest_sha256)


def _threads(manifest: dict[str, Any], config: IndexConfig) -> int:
    """The thread count, once all other settings are those of `config`."""
    said, threads = manifest.get("config"), manifest.get("threads")
    if said != asdict(config):
        raise Inconsistent(
            f"the index was made with settings {str(said)[:300]}; the run's recipe gives {config}"
        )
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise Inconsistent(f"{str(threads)[:40]} threads; expected 1 to {MAX_THREADS=}")
    return threads


def compare_indexes(committed: CommittedIndex, again: CommittedIndex) -> Rebuild:
    """Raises Inconsistent where what texts and settings decide differs."""
    if committed.lines != again.lines:
        n = next(
            (n for n, pair in enumerate(zip(committed.lines, again.lines, strict=False))
             if pair[0] != pair[1]),
            min(len(committed.lines), len(again.lines)),
        )  # fmt: skip
        raise Inconsistent(
            f"line {n + 1} of rows.jsonl comes out differently: another row, order, or cluster"
        )
    for name in ("config", "sites", "width", "rows_sha256"):
        if committed.manifest.get(name) != again.manifest.get(name):
            raise Inconsistent(f"{name} of the manifest comes out differently")
    levels = (
        (committed.placebo_level, again.placebo_level),
        (committed.noise_level, again.noise_level),
    )
    return Rebuild(
        identical=committed.manifest_sha256 == again.manifest_sha256,
        same_environment=committed.manifest.get("versions") == again.manifest["versions"],
        similarity_ppm=_apart(committed, again),
        level_ppm=max(abs(a - b) * PPM_WHOLE // max(b, 1) for a, b in levels),
    )


def _apart(a: CommittedIndex, b: CommittedIndex) -> int:
    """Largest difference of a row's similarity to a drawn row, over all rows, in millionths.

    The drawn rows are this auditor's own: nobody can build an index that is right for them alone.
    """
    count = len(a.rows)
    chosen = secrets.SystemRandom().sample(range(count), min(count, SAMPLED_ROWS))
    drawn = [(index, _units(index, chosen)) for index in (a, b)]
    worst = 0.0
    for start in range(0, count, _CHUNK):
        rows = list(range(start, min(start + _CHUNK, count)))
        left, right = (_units(index, rows) @ sample.T for index, sample in drawn)
        worst = max(worst, float(np.abs(left - right).max()))
        # Norms, too: a row that no drawn one resembles would hide a change of its scale.
        left, right = ((_units(index, rows) ** 2).sum(axis=1) for index, _ in drawn)
        worst = max(worst, float(np.abs(left - right).max()))
    return math.ceil(worst * PPM_WHOLE)


def _units(index: CommittedIndex, rows: Sequence[int]) -> NDArray[np.float64]:
    """(rows, dim): rows that had norm 1 before they were projected."""
    exponent = index.manifest.get("unit_exponent")
    if type(exponent) is not int or abs(exponent) > MAX_EXPONENT:
        raise Inconsistent(f"unit_exponent must be an integer within {MAX_EXPONENT=}")
    unit = 2.0**exponent
    found: NDArray[np.float64] = index.vectors[rows].astype(np.float64)
    found *= index.scales[rows, None] * unit
    return found


def _judge(found: Rebuild) -> None:
    if found.identical:
        return
    if found.similarity_ppm > MAX_SIMILARITY_PPM or found.level_ppm > MAX_LEVEL_PPM:
        raise Inconsistent(
            f"similarities of rows are {found.similarity_ppm} ppm apart, levels "
            f"{found.level_ppm}; another machine explains {MAX_SIMILARITY_PPM=} and "
            f"{MAX_LEVEL_PPM=}: these rows and weights give another index"
        )


def _say(found: Rebuild) -> str:
    if found.identical:
        return "the same bytes"
    where = "the same versions, another machine" if found.same_environment else "another platform"
    return (
        f"built on {where}: not the same bytes; similarities of rows {found.similarity_ppm} ppm "
        f"apart, levels {found.level_ppm} ppm; clusters and names equal to the byte"
    )
