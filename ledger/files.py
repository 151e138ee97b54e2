"""Files that survive a crash: written whole or not at all, on disk when the call returns.
Stdlib only.

The order is the whole point: temporary file beside the target, fsync of its bytes, rename over the
target, fsync of the folder. A crash before the rename leaves the old file and a `.new` beside it,
which the next write of that path replaces; after the rename it leaves the new file. Without the
last fsync a power cut may bring the old name back: an older memory, silently.

Errors are the system's own (OSError): what a failed write means, only the caller knows.
"""

import os
from contextlib import suppress
from pathlib import Path

STAGED_SUFFIX = ".new"
PRIVATE, PUBLIC = 0o600, 0o644


def write_durably(path: Path, data: bytes, *, mode: int = PRIVATE, sync: bool = True) -> None:
    """Replace the file in one step; folders are made as needed. One writer per path at a time.

    `sync=False` leaves the folder's own fsync to the caller, who writes many files into it and
    calls `sync_folder` once, before anything points at them. Raises OSError, and then the old file
    is as it was (or, when the folder's fsync failed, the new one may be there).
    """
    make_folder(path.parent)
    staged = path.with_name(path.name + STAGED_SUFFIX)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        try:
            os.fchmod(descriptor, mode)  # whatever the umask is
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(staged, path)
    except OSError:
        with suppress(OSError):
            staged.unlink()  # on a full disk these bytes are wanted elsewhere
        raise
    if sync:
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """The folder and those above it; each new name is on disk when this returns."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
