"""The guard of one embedded PostgreSQL server: starts it, and ends it when its owner is gone.

Run as `python -I -S _guard.py UID GID LOG postgres ARGUMENT...` (UID -1: change no user), never
imported by the service, stdlib only. It watches its stdin, a pipe whose only writer is the owner:
the kernel closes that pipe however the owner ends, SIGKILL included. So a clean stop and a killed
owner take the same path: SIGINT, PostgreSQL's fast shutdown.

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

FAST_SHUTDOWN_S = 20.0
IMMEDIATE_SHUTDOWN_S = 5.0
POLL_S = 0.5
_PR_SET_PDEATHSIG = 1


def _die_with_guard() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the pipe suffices
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def _watch(server: "subprocess.Popen[bytes]") -> int:
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    for number, patience_s in (
        (signal.SIGINT, FAST_SHUTDOWN_S),
        (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_S),
    ):
        if server.poll() is None:
            server.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(patience_s)
    if server.poll() is None:
        server.kill()
    return server.wait()


def main(arguments: list[str]) -> int:
    """Exit status of the server."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the owner; we follow the owner
    uid, gid, log, *command = arguments
    who: dict[str, object] = {}
    if int(uid) >= 0:
        who = {"user": int(uid), "group": int(gid), "extra_groups": []}
    with open(log, "ab") as sink:
        server = subprocess.Popen(  # type: ignore[call-overload]
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            preexec_fn=_die_with_guard,
            restore_signals=True,
            start_new_session=True,
            **who,
        )
    return _watch(server)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
