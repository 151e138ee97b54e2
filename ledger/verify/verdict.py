"""What a verification says in the end: the steps taken, what they prove, what is left to trust.
Pure.

A verdict exists only when nothing failed; a failure is a `VerificationError` instead. `trusted` is
never empty: no proof stands on nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FORMAT = "tributary/verdict/v1"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One numbered step. `skipped` proves nothing, and `detail` says why it was skipped."""

    number: int
    name: str
    status: Literal["ok", "skipped"]
    detail: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`facts` is for programs: ids, sizes and hashes that the sentences speak of."""

    steps: tuple[Step, ...]
    proven: tuple[str, ...]
    trusted: tuple[str, ...]
    facts: Mapping[str, Any]

    def to_text(self) -> str:
        """For people: steps, then two lists of plain sentences."""
        marks = {"ok": "ok", "skipped": "--"}
        lines = [f"{s.number}. [{marks[s.status]}] {s.name}: {s.detail}" for s in self.steps]
        lines += ["", "Proven", *(f"  + {line}" for line in self.proven)]
        lines += ["", "Still to be trusted", *(f"  ? {line}" for line in self.trusted)]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "verified": True,
            "steps": [
                {"number": s.number, "name": s.name, "status": s.status, "detail": s.detail}
                for s in self.steps
            ],
            "proven": list(self.proven),
            "trusted": list(self.trusted),
            "facts": dict(self.facts),
        }
