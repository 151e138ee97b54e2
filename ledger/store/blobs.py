"""The port BlobStore: content-addressed bytes in a local folder, or wherever fsspec reaches.

A blob is named by its SHA-256 and lies at <root>/<first two hex digits>/<next two>/<name>. What is
read is hashed again, so a store that is not trusted can lose blobs but never change one. Locally
files are 0600 in folders of 0700, and appear by rename: a crash leaves the whole blob or an
unnamed temporary file, which `put` of the same blob does not mind.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ledger.errors import LedgerError, NotFound, StorageError, TooLarge

MAX_BLOB_BYTES = 512 * 2**20
_NAME = re.compile(r"[0-9a-f]{64}")


class FsspecBlobStore:
    """`url` is a folder: a local path, or `s3://bucket/prefix`, `gs://...`, `memory://...`."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        with _storage_errors(self.url):
            self._fs, root = fsspec.core.url_to_fs(self.url)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(self, data: bytes) -> str:
        """Store and return the name. Storing what is there already costs a look only."""
        if len(data) > MAX_BLOB_BYTES:
            raise TooLarge(
                f"the blob is {len(data)} bytes; MAX_BLOB_BYTES = {MAX_BLOB_BYTES}: split it"
            )
        name = hashlib.sha256(data).hexdigest()
        path = self._path(name)
        with _storage_errors(self.url):
            if self._size(path) != len(data):
                if self._local:
                    _write_local(Path(path), data)
                else:
                    self._fs.pipe_file(path, data)  # object stores make a PUT visible at once
            if self._local:
                # Or the name may be lost with the power. Also of a blob that is there already:
                # whoever wrote it may have been killed before this.
                for folder in Path(path).parents[:3]:
                    _sync_folder(folder)
        return name

    def get(self, sha256: str) -> bytes:
        _check_name(sha256)
        try:
            with _storage_errors(self.url):
                path = self._path(sha256)
                data = Path(path).read_bytes() if self._local else bytes(self._fs.cat_file(path))
        except FileNotFoundError:
            raise NotFound(f"no blob {sha256} in {self.url}", sha256=sha256) from None
        actual = hashlib.sha256(data).hexdigest()
        if actual != sha256:
            raise StorageError(
                f"blob {sha256} in {self.url} now holds bytes of SHA-256 {actual}: delete that "
                "file and put the original again",
                sha256=sha256,
            )
        return data

    def has(self, sha256: str) -> bool:
        """Whether a blob of that name is there; its bytes are not read."""
        if not _NAME.fullmatch(sha256):
            return False
        with _storage_errors(self.url):
            return self._size(self._path(sha256)) is not None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name[2:4]}/{name}"

    def _size(self, path: str) -> int | None:
        try:
            return int(self._fs.info(path)["size"])
        except FileNotFoundError:
            return None


def _check_name(sha256: str) -> None:
    """Names reach paths: nothing but 64 hex digits passes."""
    if not _NAME.fullmatch(sha256):
        raise NotFound("a blob is named by 64 lower-case hex digits, its SHA-256")


def _write_local(path: Path, data: bytes) -> None:
    fan_out = path.parent
    if not fan_out.is_dir():
        fan_out.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (fan_out.parent, fan_out):
            folder.mkdir(exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(dir=fan_out, prefix=".put-")  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    """Every object store has its own exceptions; all of them mean the same to us."""
    try:
        yield
    except (LedgerError, FileNotFoundError):
        raise
    except Exception as error:
        raise StorageError(f"the blob store {url} failed: {error}; check BLOB_URL") from error
