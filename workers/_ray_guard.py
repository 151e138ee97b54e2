"""The guard of one local Ray: starts `ray start --block`, and ends it when its owner is gone.

Run as `python -I -S _ray_guard.py LOG MARK command...` by `ray_cluster`, never imported by the
service; stdlib only. It watches its stdin, a pipe whose only writer is the owner: the kernel
closes that pipe however the owner ends, SIGKILL included, so a clean stop and a killed owner take
the same path. `ray stop` is never used: it ends every Ray of the user on the machine.

Ray's own processes follow `ray start --block` (the kernel tells them of its death). What may
outlive it, a job's driver that just forked, is found by MARK (`NAME=value`), an environment
variable that all of this Ray's processes inherit, and ended by pid. Elsewhere than on Linux there
is no /proc, and that last sweep finds nothing.
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


def marked(mark: str) -> Iterator[int]:
    """Pids of this user's processes, ourselves left out, whose environment holds `mark`
    (`NAME=value`). Zombies have no environment and are not found."""
    wanted = mark.encode()
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                yield int(name)


def end_marked(mark: str, patience_s: float = SWEEP_S) -> int:
    """End them: SIGTERM, and SIGKILL for those still there `patience_s` later. How many."""
    ended: set[int] = set()
    deadline = time.monotonic() + patience_s
    while pids := list(marked(mark)):
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


def _die_with_guard() -> None:
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the owner; we follow the owner
    log, mark, *command = arguments
    name, _, value = mark.partition("=")
    with open(log, "ab") as sink:
        ray = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, name: value},
            preexec_fn=_die_with_guard,
            restore_signals=True,
            start_new_session=True,
        )
    # Only what Ray starts carries the mark, never the guard: so it cannot end itself.
    _watch(ray)
    end_marked(mark)
    return ray.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
