"""The folder in which an index is made, and from which a killed build goes on.

    .building-<name>/inputs.json     what the index is made of; another build starts afresh
                     lens.safetensors  there when it is whole: the next build takes it as it is
                     vectors.i8, steps.f64   row by row, in the order of the batches
                     done.u8         one byte a row: 1 once the row's bytes are on disk

A crash leaves rows that are written and not yet marked: they are written again, to the same bytes.
A folder that lost one of these files is no build to go on with, and is made afresh.
When all else is there the manifest is written, everything forced to disk, and the folder renamed:
an index is whole or not there.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ledger.domain.canonical import canonical_json
from ledger.errors import StorageError
from workers.attribution.index import LENS, MANIFEST, VECTORS

INPUTS, STEPS, DONE = "inputs.json", "steps.f64", "done.u8"
MARK_BATCHES = 32
"""Batches between two marks: what a killed build does again, at most."""


class Workshop:
    """`inputs` (canonical JSON) names everything that the index's bytes depend on."""

    def __init__(self, out_dir: Path, inputs: dict[str, Any]) -> None:
        self.folder = out_dir.parent / f".building-{out_dir.name}"
        self._out_dir = out_dir
        wanted = canonical_json(inputs)
        path = self.folder / INPUTS
        self.resumed = path.is_file() and path.read_bytes() == wanted
        if not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            _write(path, wanted)

    def lens(self) -> dict[str, Tensor] | None:
        """The lens of the build that was killed, if it got that far and its rows are all there."""
        path = self.folder / LENS
        if not all((self.folder / name).is_file() for name in (LENS, VECTORS, STEPS, DONE)):
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            return None

    def keep_lens(self, tensors: dict[str, Tensor]) -> None:
        part = self.folder / f"{LENS}.part"
        save_file(tensors, part)
        _settle(part, self.folder / LENS)

    def open_rows(self, count: int, dim: int) -> "RowFiles":
        """The rows of the build that was killed.

        Raises StorageError, and starts afresh the next time, when a file was cut: rows marked as
        done would be zeros.
        """
        for name, size in _sizes(count, dim).items():
            if (self.folder / name).stat().st_size != size:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise StorageError(
                    f"{self.folder / name} of a killed build was cut; the index is built afresh"
                )
        return RowFiles(self.folder, count, dim)

    def fresh_rows(self, count: int, dim: int) -> "RowFiles":
        """No rows yet: what lies there was made with another lens, or none."""
        for name in (VECTORS, STEPS, DONE):
            (self.folder / name).unlink(missing_ok=True)
        return RowFiles(self.folder, count, dim)

    def publish(self, manifest: bytes) -> None:
        """The manifest last, everything on disk, then one rename."""
        for name in (INPUTS, STEPS, DONE):
            (self.folder / name).unlink()
        (self.folder / MANIFEST).write_bytes(manifest)
        for path in sorted(self.folder.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self.folder.rename(self._out_dir)
        _sync_folder(self._out_dir.parent)


class RowFiles:
    """Vectors (rows, dim), steps (rows,) and marks (rows,), memory-mapped."""

    def __init__(self, folder: Path, count: int, dim: int) -> None:
        for name, size in _sizes(count, dim).items():
            _reserve(folder / name, size)
        self.vectors = np.memmap(folder / VECTORS, np.int8, "r+", shape=(count, dim))
        self.steps = np.memmap(folder / STEPS, np.float64, "r+", shape=(count,))
        self._done = np.memmap(folder / DONE, np.uint8, "r+", shape=(count,))
        self._unmarked: list[list[int]] = []

    def has(self, rows: list[int]) -> bool:
        return bool(self._done[rows].all())

    def put(self, rows: list[int], vectors: NDArray[np.int8], steps: NDArray[np.float64]) -> None:
        self.vectors[rows], self.steps[rows] = vectors, steps
        self._unmarked.append(rows)
        if len(self._unmarked) >= MARK_BATCHES:
            self.mark()

    def mark(self) -> None:
        """Bytes first, marks after: a mark never promises what a power cut can take."""
        self.vectors.flush()
        self.steps.flush()
        for rows in self._unmarked:
            self._done[rows] = 1
        self._done.flush()
        self._unmarked.clear()


def _sizes(count: int, dim: int) -> dict[str, int]:
    """Bytes of the row files."""
    return {VECTORS: count * dim, STEPS: count * 8, DONE: count}


def _reserve(path: Path, size: int) -> None:
    """A file of that size, zero where nothing was written; what is there stays.

    Its blocks are taken now: a mapped file that meets a full disk ends the process (SIGBUS).
    """
    try:
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise StorageError(
            f"{path.parent} has no room for {size} bytes of the index: {error.strerror}; make "
            "room, and the build goes on"
        ) from error


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    _settle(part, path)


def _settle(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
