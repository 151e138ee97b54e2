"""Which contributions a run trained on, read from its manifest.

The lineage of a run names what it *might* use when it was requested; what was withdrawn or held
before training began is left out, and only the manifest that `run.completed` commits to says so.
"""

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock

from ledger.ports import BlobStore
from ledger.verify.manifest import parse_manifest

MAX_KEPT = 500_000
"""Counts that are kept, of all manifests together: some 100 MB. The one read last always is; a
manifest never changes under its hash."""


class TrainedOn:
    """Rows by contribution of training manifests. Thread-safe."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._kept: OrderedDict[str, Mapping[str, int]] = OrderedDict()
        self._counts = 0
        self._lock = Lock()

    def rows(self, manifest_sha256: str) -> Mapping[str, int]:
        """How many rows of each contribution the run used. Raises NotFound or StorageError where
        the manifest cannot be had, MalformedProof where it is none."""
        with self._lock:
            found = self._kept.get(manifest_sha256)
        if found is None:
            manifest = parse_manifest(self._blobs.get(manifest_sha256))
            found = {contribution: len(rows) for contribution, rows in manifest.rows.items()}
        with self._lock:
            self._keep(manifest_sha256, found)
        return found

    def _keep(self, manifest_sha256: str, found: Mapping[str, int]) -> None:
        if manifest_sha256 not in self._kept:
            self._counts += len(found)
        self._kept[manifest_sha256] = found
        self._kept.move_to_end(manifest_sha256)
        while self._counts > MAX_KEPT and len(self._kept) > 1:
            self._counts -= len(self._kept.popitem(last=False)[1])
