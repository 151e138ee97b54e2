"""The guard of one embedded PostgreSQL server: starts it, and ends it when its owner is gone.

Run as `python -I -S _guard.py UID GID LOG postgres ARGUMENT...` (UID -1: change no user), never
imported by the service, stdlib only. It watches its stdin, a pipe whose only writer is the owner:
the kernel closes that pipe however the owner ends, SIGKILL included. So a clean stop and a killed
owner take the same path: SIGINT, PostgreSQL's fast shutdown. A server that dies by itself is
started again, and recovers from its write-ahead log; one that keeps dying is given up.

A parent-death signal set by the owner itself would not do: Linux sends it when the *thread* that
started the child ends. Here it is set too, by this one-threaded process, for its own death.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

FAST_SHUTDOWN_S = 20.0
IMMEDIATE_SHUTDOWN_S = 5.0
RESTART_S = 0.2
QUICK_END_S = 5.0
MAX_QUICK_ENDS = 5
_PR_SET_PDEATHSIG = 1


def _die_with_guard() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the pipe suffices
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def _owner_gone(wakeup: int, timeout_s: float | None) -> bool:
    """Wait for a dead child, a dead owner or the time; whether it is the owner."""
    readable, _, _ = select.select([sys.stdin, wakeup], [], [], timeout_s)
    if wakeup in readable:
        os.read(wakeup, 4096)
    return sys.stdin in readable and not os.read(sys.stdin.fileno(), 1)


def _stop(server: "subprocess.Popen[bytes]") -> None:
    for number, patience_s in (
        (signal.SIGINT, FAST_SHUTDOWN_S),
        (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_S),
        (signal.SIGKILL, IMMEDIATE_SHUTDOWN_S),
    ):
        if server.poll() is None:
            server.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(patience_s)


def _child_signals() -> int:
    """A file descriptor that is readable once a child has ended, so that select() notices."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return readable


def main(arguments: list[str]) -> int:
    """Exit status of the server."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the owner; we follow the owner
    uid, gid, log, *command = arguments
    who: dict[str, object] = {}
    if int(uid) >= 0:
        who = {"user": int(uid), "group": int(gid), "extra_groups": []}
    wakeup = _child_signals()
    quick_ends = 0
    while True:
        started = time.monotonic()
        with open(log, "ab") as sink:
            server = subprocess.Popen(  # type: ignore[call-overload]
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                preexec_fn=_die_with_guard,
                start_new_session=True,
                **who,
            )
        while server.poll() is None:
            if _owner_gone(wakeup, None):
                _stop(server)
                return 0
        quick_ends = quick_ends + 1 if time.monotonic() - started < QUICK_END_S else 0
        # Backends outlive a killed postmaster for a moment and keep a new one from starting.
        if quick_ends > MAX_QUICK_ENDS or _owner_gone(wakeup, RESTART_S):
            return server.returncode or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
