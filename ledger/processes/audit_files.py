"""What an auditor fetches from somebody's ledger, checked and kept by hash.

Bundles, indexes, adapters, transcripts and rows come over HTTP, from routes that anyone may read
but for the last two. Nothing is believed for having been served: each byte is checked by a hash
that an event of a verified bundle names, here or by whoever opens the file.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ledger.client import Client
from ledger.domain.canonical import parse_canonical
from ledger.domain.ids import check_hash, check_uuid, sha256_hex
from ledger.domain.rows import DataRow, decode_rows, rows_root
from ledger.domain.transcript import words_of
from ledger.errors import Forbidden, Inconsistent, InvalidEvent, NotFound
from ledger.files import write_durably
from ledger.log.answer_case import AnswerCase, RunCase, run_case
from ledger.verify.bundle import MAX_BUNDLE_BYTES

if TYPE_CHECKING:
    from workers.attribution.committed import CommittedIndex

MANIFEST, LENS = "manifest.json", "lens.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

Messages = list[dict[str, str]]
Texts = Mapping[str, Sequence[DataRow]]
"""Rows by contribution, in the contribution's own order."""


class AuditFiles:
    """`cache` has a folder for each index and adapter; `vkey` is the log's key, where known."""

    def __init__(self, client: Client, cache: Path, *, vkey: str | None = None) -> None:
        self.cache = cache
        self.vkey = vkey
        self._client = client

    def bundle(self, subject: str) -> bytes:
        """The lineage bundle of an answer (with its attribution), an event or a leaf index."""
        data = self._client.get_bytes(f"/v1/bundles/{quote(subject, safe='')}")
        if len(data) > MAX_BUNDLE_BYTES:
            raise Inconsistent(f"the bundle is over {MAX_BUNDLE_BYTES=}")
        return data

    def run(self, run: str) -> RunCase:
        """A completed run. Raises NotFound when it is not, or not yet."""
        row = self._client.get(f"/v1/runs/{check_uuid(run, 'run')}")
        if row["status"] != "completed":
            raise NotFound(f"run {run} is {row['status']}: it made no adapter to compare with")
        return run_case(self.bundle(str(row["finished_index"])), run, trusted_vkey=self.vkey)

    def blob(self, sha256: str) -> bytes:
        data = self._client.get_blob(check_hash(sha256, "blob"))
        if sha256_hex(data) != sha256:
            raise Inconsistent(f"the ledger's blob {sha256} hashes to something else")
        return data

    def _private(self, sha256: str, what: str) -> bytes:
        """The same for what not everyone may read: the refusal says whose key it takes."""
        try:
            return self.blob(sha256)
        except (Forbidden, NotFound) as error:
            who = "of who paid, " if what == "the transcript" else ""
            raise type(error)(
                f"{what}: {error.message}; --as takes a key {who}of a worker or the operator"
            ) from error

    def index(self, case: RunCase, *, lens: bool) -> "CommittedIndex":
        """The run's index, hash-checked; fetched where it is not kept or the copy is damaged."""
        from workers.attribution.committed import open_committed

        body = case.completed.envelope.body
        sha256 = body["index_sha256"]
        folder = self.index_folder(sha256)
        self._fetch_index(body["run"], folder, lens=lens)
        try:
            index = open_committed(folder, manifest_sha256=sha256)
            if lens:
                _check_lens(folder / LENS, index.manifest)
            return index
        except (Inconsistent, NotFound):
            shutil.rmtree(folder)
            self._fetch_index(body["run"], folder, lens=lens)
            return open_committed(folder, manifest_sha256=sha256)

    def index_folder(self, sha256: str) -> Path:
        return self.cache / "indexes" / check_hash(sha256, "index_sha256")

    def _fetch_index(self, run: str, folder: Path, *, lens: bool) -> None:
        """Files that are not there yet; each is checked by whoever opens the index."""
        from workers.attribution.committed import SCORED_FILES

        for name in (MANIFEST, *SCORED_FILES, *((LENS,) if lens else ())):
            path = folder / name
            if not path.exists():
                write_durably(path, self._client.get_bytes(f"/v1/runs/{run}/index/{name}"))

    def adapter(self, case: RunCase) -> Path:
        """A folder in peft's format."""
        body = case.completed.envelope.body
        folder = self.cache / "adapters" / check_hash(body["adapter_sha256"], "adapter_sha256")
        for name, sha256 in (
            (ADAPTER_FILE, body["adapter_sha256"]),
            (ADAPTER_CONFIG, body["adapter_config_sha256"]),
        ):
            path = folder / name
            if not path.exists() or sha256_hex(path.read_bytes()) != sha256:
                write_durably(path, self.blob(sha256))
        return folder

    def transcript(self, case: AnswerCase) -> tuple[Messages, str]:
        """Messages and output, as the answer's own event committed to them. For who paid, workers
        and the operator."""
        data = self._private(case.inference.envelope.body["transcript_sha256"], "the transcript")
        try:
            return words_of(parse_canonical(data))
        except (InvalidEvent, KeyError, TypeError, ValueError) as error:
            raise Inconsistent(f"the transcript is of another form: {error}") from error

    def texts(self, case: RunCase) -> Texts:
        """The rows of the run's contributions, as their contributors signed for them. For workers
        and the operator; a contributor reads their own."""
        found = {}
        for contribution in dict.fromkeys(row["contribution"] for row in case.rows):
            body = case.recorded[contribution].envelope.body
            what = f"the rows of contribution {contribution}"
            rows = decode_rows(self._private(body["rows_sha256"], what))
            if len(rows) != body["rows_count"] or rows_root(rows).hex() != body["rows_root"]:
                raise Inconsistent(f"{what} are not those signed")
            found[contribution] = rows
        return found


def _check_lens(path: Path, manifest: Mapping[str, Any]) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    stamp = manifest["files"].get(LENS)
    if not isinstance(stamp, dict) or stamp.get("sha256") != found:
        raise Inconsistent(f"{path} hashes to {found}; the manifest says another")


def row_of(texts: Texts, contribution: str, number: int, row_hash: str) -> DataRow:
    """A row by its place in the manifest; Inconsistent unless it has the hash that stands there."""
    rows = texts.get(contribution, [])
    if not 0 <= number < len(rows) or rows[number].hash.hex() != row_hash:
        raise Inconsistent(f"row {contribution}/{number} does not have the hash of the manifest")
    return rows[number]
