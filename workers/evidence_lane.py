"""The evidence lane on a worker: which rows of a run say verbatim what an answer says.

Knows the client and files; no Ray, no model. `attribution.spans` finds the spans; this module gets
it the rows: those of the run's attribution index, of contributions that the ledger still lists for
the run, each held against the root its event committed to. What it makes of them is private (row
text), stays under the worker's cache in `spans/<index>`, and may be deleted at any time.

A withdrawn contribution leaves: as soon as a caller names it in `withdrawn`, its text is built out
of the folder. Evidence never fails an attribution: what cannot be had is None, with the reason in
the log, and is not tried again for RETRY_S. One thread at a time.
"""

import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from ledger.client import Client
from ledger.domain.ids import check_hash, sha256_hex
from ledger.errors import Inconsistent, LedgerError, NotFound
from workers.artefacts import INDEX_MANIFEST, ArtefactCache, files_of_index
from workers.attribution.span_index import SpanIndex, SpanRow, build_span_index, load_span_index
from workers.attribution.spans import spans_document
from workers.link import plain_uuid
from workers.runs import contribution_rows

log = structlog.get_logger(__name__)

INDEX_ROWS = "rows.jsonl"
MAX_OPEN = 4
"""Span indexes that stay open: a mapped file and the words of the rows each."""
MAX_KEPT = 64
"""Span indexes on disk; the one not used for longest goes, and is built again when asked for."""
RETRY_S = 60.0
REFRESH_S = 600.0
"""After this, a span index that lacks contributions of the attribution index is built again: held
ones are not listed, and come back when they are released."""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """`missing`: contributions of the attribution index that the spans lack; `at`: when opened."""

    index: SpanIndex
    missing: frozenset[str]
    at: float


class EvidenceLane:
    """`document` answers with the `spans` part of an evidence document (docs/FORMATS.md)."""

    def __init__(
        self, client: Client, cache_dir: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._artefacts = ArtefactCache(client, cache_dir)
        self._folder = cache_dir / "spans"
        self._clock = clock
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._failed_at: dict[str, float] = {}

    def document(
        self,
        run: Mapping[str, Any],
        index_sha256: str,
        answer: str,
        *,
        withdrawn: Collection[str] = frozenset(),
    ) -> dict[str, Any] | None:
        """Spans of `answer` in the rows that `index_sha256` indexes, less the contributions in
        `withdrawn`; None when those rows cannot be read now. `run` is the ledger's row of it."""
        failed_at = self._failed_at.get(index_sha256)
        if failed_at is not None and self._clock() - failed_at < RETRY_S:
            return None
        try:
            index = self._index(run, index_sha256, withdrawn)
        except (LedgerError, OSError) as error:
            self._failed_at[index_sha256] = self._clock()
            log.warning("no evidence lane", run=run["run"], index=index_sha256, why=str(error))
            return None
        self._failed_at.pop(index_sha256, None)
        return spans_document(index, answer)

    def _index(
        self, run: Mapping[str, Any], index_sha256: str, withdrawn: Collection[str]
    ) -> SpanIndex:
        """The open index, or the one on disk, or a fresh one: the first that is good enough."""
        folder = self._folder / check_hash(index_sha256, "index")
        opened = self._open.pop(index_sha256, None)
        if opened is None and (index := self._on_disk(folder)):
            opened = self._opened(index, index_sha256)
        if opened is not None and self._stale(opened, withdrawn):
            log.info("rows were withdrawn or came back, spans are built again", run=run["run"])
            shutil.rmtree(folder, ignore_errors=True)
            opened = None
        if opened is None:
            index = build_span_index(self._rows(run, index_sha256, withdrawn), folder)
            log.info("span index built", run=run["run"], rows=index.rows, texts=index.texts)
            opened = self._opened(index, index_sha256)
            self._evict()
        self._open[index_sha256] = opened
        while len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return opened.index

    def _opened(self, index: SpanIndex, index_sha256: str) -> _Opened:
        there = {source.contribution for source in index.sources}
        missing = frozenset(self._indexed(index_sha256).keys() - there)
        return _Opened(index=index, missing=missing, at=self._clock())

    def _stale(self, opened: _Opened, withdrawn: Collection[str]) -> bool:
        if withdrawn and any(source.contribution in withdrawn for source in opened.index.sources):
            return True
        return bool(opened.missing.difference(withdrawn)) and (
            self._clock() - opened.at >= REFRESH_S
        )

    def _on_disk(self, folder: Path) -> SpanIndex | None:
        try:
            index = load_span_index(folder)
        except NotFound:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        except Inconsistent as error:
            log.warning("span index damaged, building it again", why=error.message)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        os.utime(folder)  # used now
        return index

    def _rows(
        self, run: Mapping[str, Any], index_sha256: str, withdrawn: Collection[str]
    ) -> Iterator[SpanRow]:
        indexed = self._indexed(index_sha256)
        for found in self._client.pages(f"/v1/runs/{plain_uuid(str(run['run']))}/contributions"):
            wanted = indexed.get(found["contribution"])
            if not wanted or found["contribution"] in withdrawn:
                continue
            for position, row in enumerate(contribution_rows(self._client, found)):
                if position in wanted:
                    yield SpanRow(
                        contribution=found["contribution"],
                        row=position,
                        contributor=found["contributor"],
                        licence=found["licence"],
                        registered_index=int(found["index"]),
                        prompt=row.prompt,
                        completion=row.completion,
                    )

    def _indexed(self, index_sha256: str) -> dict[str, set[int]]:
        """The rows of the attribution index, by contribution."""
        folder = self._artefacts.index(index_sha256)
        try:
            manifest = (folder / INDEX_MANIFEST).read_bytes()
            lines = (folder / INDEX_ROWS).read_bytes()
            stamp = files_of_index(manifest).get(INDEX_ROWS)
            if sha256_hex(manifest) != index_sha256 or sha256_hex(lines) != stamp:
                raise Inconsistent(f"{folder}: {INDEX_ROWS} or its manifest is damaged")
        except (Inconsistent, OSError):
            self._artefacts.drop(folder)
            raise
        indexed: dict[str, set[int]] = {}
        try:
            for line in lines.splitlines():
                row = json.loads(line)
                indexed.setdefault(str(row["contribution"]), set()).add(int(row["index"]))
        except (ValueError, KeyError, TypeError) as error:
            raise Inconsistent(f"{folder / INDEX_ROWS} is no list of rows") from error
        return indexed

    def _evict(self) -> None:
        kept = sorted(self._folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
        for folder in kept[: max(0, len(kept) - MAX_KEPT)]:
            shutil.rmtree(folder, ignore_errors=True)
