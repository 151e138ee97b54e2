"""What an audit says: one line a step, and what is wrong, to the byte."""

from dataclasses import dataclass, field
from typing import Any

from ledger.log.findings import Finding


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the report. `state` is ok, wrong or skipped."""

    name: str
    state: str
    says: str


@dataclass(kw_only=True)
class Report:
    """What was audited and what was found, the first bad byte first."""

    log: str
    size: int = 0
    root: bytes = b""
    entries: int = 0
    entry_bytes: int = 0
    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "log": self.log,
            "size": self.size,
            "root": self.root.hex(),
            "entries": self.entries,
            "entry_bytes": self.entry_bytes,
            "seconds": round(self.seconds, 3),
            "entries_per_second": round(self.entries / self.seconds) if self.seconds else 0,
            "steps": [vars(step) for step in self.steps],
            "findings": [finding.json() for finding in self.findings],
        }
