"""The guard of one development chain: starts anvil, and ends it when its owner is gone.

Run as `python -I -S _guard.py PIDFILE LOG anvil ARGUMENT...`, never imported by the service,
stdlib only. It watches its stdin, a pipe whose only writer is the owner: the kernel closes that
pipe however the owner ends, SIGKILL included. So a clean stop and a killed owner take one path:
SIGINT, on which anvil writes its state to disk.

The parent-death signal is set here, by a one-threaded process for its own death, since Linux sends
it when the *thread* that started the child ends.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

STOP_S = 10.0
POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def _die_with_guard() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the pipe suffices
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def main(arguments: list[str]) -> int:
    """Exit status of anvil."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the owner; we follow the owner
    pid_file, log, *command = arguments
    with open(log, "ab") as sink:
        anvil = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            preexec_fn=_die_with_guard,
            start_new_session=True,
        )
    with open(pid_file, "w") as file:
        file.write(str(anvil.pid))
    while anvil.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    if anvil.poll() is None:
        anvil.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            anvil.wait(STOP_S)
    if anvil.poll() is None:
        anvil.kill()
    status = anvil.wait()
    with contextlib.suppress(OSError):
        os.unlink(pid_file)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
