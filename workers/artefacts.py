"""Adapters and indexes as folders on a worker's disk, fetched from the ledger by hash.

Knows the client and files; no Ray, torch or model. A folder is named after what it must hash to,
and appears whole (made beside, then renamed). Its readers check the hashes again (`openlora`
and `attribution` both do), so a damaged disk is noticed; `drop` then makes room for a fresh copy.

Known weak spot: nothing is ever evicted; `<home>/cache` may be deleted while nothing runs.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ledger.client import Client
from ledger.domain.ids import check_hash, sha256_hex
from ledger.errors import Inconsistent

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX_MANIFEST = "manifest.json"
MAX_INDEX_FILES = 64


class ArtefactCache:
    """`adapter` and `index` fetch on first use and answer with a folder."""

    def __init__(self, client: Client, root: Path) -> None:
        self._client = client
        self._root = root

    def adapter(self, weights_sha256: str, config_sha256: str) -> Path:
        """A folder in peft's format. Raises NotFound, Unavailable, Inconsistent."""
        files = {ADAPTER_FILE: weights_sha256, ADAPTER_CONFIG: config_sha256}
        name = f"{check_hash(weights_sha256, 'adapter')}-{check_hash(config_sha256, 'config')[:16]}"
        return self._folder(self._root / "adapters" / name, files)

    def index(self, manifest_sha256: str) -> Path:
        """A folder for `workers.attribution.index.load_index`."""
        target = self._root / "indexes" / check_hash(manifest_sha256, "index")
        if target.is_dir():
            return target
        manifest = self._blob(manifest_sha256)
        files = {INDEX_MANIFEST: manifest_sha256, **files_of_index(manifest)}
        return self._folder(target, files)

    def drop(self, folder: Path) -> None:
        """Forget a folder whose bytes turned out wrong; the next use fetches it again."""
        assert self._root in folder.parents
        shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, target: Path, files: Mapping[str, str]) -> Path:
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as part:
            for name, sha256 in files.items():
                (Path(part) / name).write_bytes(self._blob(sha256))
            whole = Path(part) / "whole"
            whole.mkdir()
            for name in files:
                (Path(part) / name).rename(whole / name)
            try:
                whole.rename(target)
            except OSError:
                if not target.is_dir():  # else another process of ours was quicker
                    raise
        return target

    def _blob(self, sha256: str) -> bytes:
        data = self._client.get_blob(check_hash(sha256, "blob"))
        if sha256_hex(data) != sha256:
            raise Inconsistent(f"the ledger's blob {sha256} hashes to something else")
        return data


def files_of_index(manifest: bytes) -> dict[str, str]:
    """File name -> SHA-256 of an attribution index. Names are used as paths: only plain ones."""
    try:
        stamps = json.loads(manifest)["files"]
        files = {str(name): str(stamp["sha256"]) for name, stamp in stamps.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Inconsistent(f"the index manifest names no files: {error}") from error
    for name in files:
        if not name or name.startswith(".") or Path(name).name != name or name == INDEX_MANIFEST:
            raise Inconsistent(f"the index manifest names a file {name[:80]!r}")
    if len(files) > MAX_INDEX_FILES:
        raise Inconsistent(f"an index has at most {MAX_INDEX_FILES} files (MAX_INDEX_FILES)")
    return files
