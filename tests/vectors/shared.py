"""Where the public vectors lie, and what to say when they are not there."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parents[2].parent / "shared" / "vectors"

needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="the public vectors (../shared/vectors) are not on this machine"
)


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_bytes())


def cases(name: str, key: str = "cases") -> list[Any]:
    """Cases of a vector file as pytest parameters; none where the file is absent."""
    if not (VECTORS / name).is_file():
        return []
    return [pytest.param(case, id=str(case.get("name"))) for case in load(name)[key]]


def files(pattern: str) -> list[Any]:
    """Vector files as pytest parameters."""
    found = sorted(VECTORS.glob(pattern))
    return [pytest.param(path, id=str(path.relative_to(VECTORS))) for path in found]


def b64(text: str | None) -> bytes:
    return base64.b64decode(text or "")
