"""CPU seconds of processes, from /proc: on a machine that does other things as well, the one cost
that does not depend on them."""

import os
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system seconds of a process, all its threads; 0 when it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0


def family_cpu_s(pid: int) -> float:
    """The same of a process and its children, those that live."""
    children = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return cpu_s(pid) + sum(cpu_s(child) for child in children if _parent(child) == pid)


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
