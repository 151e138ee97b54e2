"""The guard of one local Ray: starts `ray start --block`, and ends it when its owner is gone.

Run as `python -I -S _ray_guard.py LOG PLACE command...` by `ray_cluster`, never imported by the
service; stdlib only. It watches its stdin, a pipe whose only writer is the owner: the kernel
closes that pipe however the owner ends, SIGKILL included, so a clean stop and a killed owner take
the same path. `ray stop` is never used: it ends every Ray of the user on the machine.

Ray's own processes follow `ray start --block` (the kernel tells them of its death), but for a few:
agents, a job's driver that just forked. Those are known by PLACE, a folder that is this Ray's
alone: they have it as working directory, or in their environment (Ray overwrites the latter with
process titles, so one alone does not do). They are ended by pid. Elsewhere than on Linux there is
no /proc, and that last sweep finds nothing.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

STOP_S = 2.0
"""For an orderly end. Ray takes over 10 s with actors alive, and there is no state worth it:
everything that must last is written to survive SIGKILL."""
SWEEP_S = 1.0
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


MARK = "TRIBUTARY_RAY"


def within(place: str) -> Iterator[int]:
    """Pids of processes, ourselves left out, that belong to `place` or a folder in it. Zombies,
    and what another user runs, are not found."""
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(_inside(path, place) for path in _places(name)):
                yield int(name)


def _places(pid: str) -> Iterator[str]:
    # A folder that is gone shows as "<path> (deleted)".
    yield os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)")
    with open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            if entry.startswith(f"{MARK}=".encode()):
                yield os.fsdecode(entry).partition("=")[2]


def _inside(path: str, place: str) -> bool:
    return path == place or path.startswith(place + "/")


def end_within(place: str, patience_s: float = SWEEP_S) -> int:
    """End them: SIGTERM, and SIGKILL for those still there `patience_s` later. How many."""
    ended: set[int] = set()
    deadline = time.monotonic() + patience_s
    while pids := list(within(place)):
        late = time.monotonic() > deadline
        for pid in pids:
            if late or pid not in ended:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        ended.update(pids)
        if time.monotonic() > deadline + patience_s:
            break
        time.sleep(POLL_S)
    return len(ended)


_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _die_with_guard() -> None:
    for number in _OURS:  # ignored signals stay ignored across exec, in all of Ray's processes
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the pipe suffices
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _watch(ray: "subprocess.Popen[bytes]") -> None:
    while ray.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    for number in (signal.SIGTERM, signal.SIGKILL):
        if ray.poll() is None:
            ray.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ray.wait(STOP_S)


def main(arguments: list[str]) -> int:
    """Exit status of `ray start`."""
    for number in _OURS:
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the owner; we follow the owner
    log, place, *command = arguments
    with open(log, "ab") as sink:
        ray = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, MARK: place},
            cwd=place,
            preexec_fn=_die_with_guard,
            restore_signals=True,
            start_new_session=True,
        )
    _watch(ray)
    end_within(place)
    return ray.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
