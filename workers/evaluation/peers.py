"""Other people's methods, each in its best honest configuration, behind its own import.

A peer must see what we see: the same summed losses, the same tokens, the LoRA matrices alone. What
each needs for that is written where it is set. Nothing here is needed to attribute or to pay.
"""

import re

import numpy as np
from numpy.typing import NDArray

from workers.evaluation.scene import NotInstalled, Scene

Floats = NDArray[np.float64]
HINT = "`make peers` installs it"


def bm25(scene: Scene) -> Floats:
    """Okapi BM25 over words of prompt and completion: lexical search, no model at all."""
    try:
        import bm25s
    except ImportError as error:
        raise NotInstalled(f"bm25s is not installed: {HINT}") from error
    retriever = bm25s.BM25()
    retriever.index([words(f"{r.prompt} {r.completion}") for r in scene.rows], show_progress=False)
    found = [retriever.get_scores(words(f"{q.prompt} {q.answer}")) for q in scene.queries]
    return np.stack(found).astype(np.float64)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or [""]


def kronfluence(scene: Scene, *, damping: float | None = None) -> Floats:
    """kronfluence's EK-FAC; `damping` None is its heuristic (see `peer_kronfluence.py`)."""
    try:
        from workers.evaluation import peer_kronfluence
    except ImportError as error:
        raise NotInstalled(f"kronfluence is not installed ({error}): {HINT}") from error
    fitted = peer_kronfluence.fit(scene)
    return fitted.scores(scene.query_examples(), damping=damping)[0]


def datainf(scene: Scene) -> Floats:
    """DataInf through dattri: the closed form that OpenLedger names for LoRA models."""
    try:
        from workers.evaluation import peer_dattri
    except ImportError as error:
        raise NotInstalled(f"dattri is not installed ({error}): {HINT}") from error
    return peer_dattri.datainf(scene)
