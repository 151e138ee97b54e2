"""The committed ABI and bytecode of our contracts, as contracts/build.py wrote them.

Read-only data of this package. That they are what contracts/src compiles to is held by
tests/unit/test_chain_artefacts.py.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ABI_DIR = Path(__file__).parent / "abi"
CONTRACTS = ("WOPEN", "PayoutDistributor", "Escrow", "CheckpointAnchor")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One compiled contract: its ABI (JSON items) and its creation bytecode."""

    name: str
    abi: tuple[dict[str, Any], ...]
    bytecode: bytes


@cache
def artefact(name: str) -> Artefact:
    assert name in CONTRACTS, name
    value = json.loads((ABI_DIR / f"{name}.json").read_text())
    return Artefact(
        name=name,
        abi=tuple(value["abi"]),
        bytecode=bytes.fromhex(value["bytecode"].removeprefix("0x")),
    )
