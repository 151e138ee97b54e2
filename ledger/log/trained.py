"""Which contributions a run trained on, read from its manifest.

The lineage of a run names what it *might* use when it was requested; what was withdrawn or held
before training began is left out, and only the manifest that `run.completed` commits to says so.
"""

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock

from ledger.ports import BlobStore
from ledger.verify.manifest import parse_manifest

MAX_KEPT = 256
"""Manifests whose counts are kept; a manifest never changes under its hash."""


class TrainedOn:
    """Rows by contribution of training manifests. Thread-safe."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._kept: OrderedDict[str, Mapping[str, int]] = OrderedDict()
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
            self._kept[manifest_sha256] = found
            self._kept.move_to_end(manifest_sha256)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return found
