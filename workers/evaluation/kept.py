"""Scores of methods that are not ours, kept beside the units: another engine does not change them.

A peer walks all rows for half a minute; its scores follow from the adapter, the texts, the seed and
its package's version, so they lie in a file named by the hash of these. Our own methods are never
kept: it is they that change. Raise KEPT_VERSION when an adapter to a peer changes.
"""

import hashlib
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ledger.domain.canonical import canonical_json
from workers.evaluation.scene import Scene

KEPT_VERSION = 1
PACKAGES = {
    "kronfluence": "kronfluence",
    "kronfluence-1e-8": "kronfluence",
    "datainf": "dattri",
    "bm25": "bm25s",
    "grad-dot": "torch",
    "grad-cos": "torch",
}
"""Methods whose scores are kept, and the package that computes them."""


def kept(
    folder: Path, name: str, scene: Scene, method: Callable[[Scene], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The method's scores, from `folder` when they are there; a damaged file is computed again."""
    if name not in PACKAGES or not scene.adapter_sha256:
        return method(scene)
    path = folder / f"{_key(name, scene)}.npy"
    try:
        found = np.load(path, allow_pickle=False)
        if found.shape == (len(scene.queries), len(scene.rows)):
            return np.asarray(found, dtype=np.float64)
    except (OSError, ValueError, EOFError):
        pass
    found = method(scene)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, found, allow_pickle=False)
    os.replace(part, path)
    return found


def _key(name: str, scene: Scene) -> str:
    try:
        installed = version(PACKAGES[name])
    except PackageNotFoundError:
        installed = ""
    whole = {
        "v": KEPT_VERSION,
        "method": name,
        "package": installed,
        "adapter": scene.adapter_sha256,
        "rows": [[r.prompt, r.completion] for r in scene.rows],
        "queries": [[q.prompt, q.answer] for q in scene.queries],
        "max_len": scene.max_len,
        "seed": scene.seed,
    }
    return hashlib.sha256(canonical_json(whole)).hexdigest()
