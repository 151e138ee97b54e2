"""The witness as a process of its own: its folder, its HTTP server, nothing of a ledger's."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ledger.errors import ConfigError, MalformedProof
from ledger.log.witness import KnownLog, Witness, open_witness
from ledger.verify.note import parse_vkey

MAX_CONNECTIONS = 256
"""More are answered 503: a witness has few callers, and each may be slow on purpose."""


def run_witness(
    *,
    folder: Path,
    logs: Sequence[str],
    name: str | None,
    host: str,
    port: int,
    stop: threading.Event,
    ready: Callable[[Witness, str], None],
) -> None:
    """Serve until told to stop. `ready` is called with the URL once connections are accepted.

    Raises ConfigError for keys, folder or address that cannot be used.
    """
    import uvicorn

    from ledger.api.witness import create_witness_app

    known = [known_log(text) for text in logs]
    with (
        open_witness(folder, logs=known, clock=_clock, name=name) as witness,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener,
    ):
        _bind(listener, host, port)
        config = uvicorn.Config(
            create_witness_app(witness),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # a forged X-Forwarded-For would choose its own rate limit
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        threading.Thread(target=_stop_server, args=(server, stop), daemon=True).start()
        ready(witness, f"http://{host}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def known_log(text: str) -> KnownLog:
    """The log that `--log` names: its vkey, then a space and its origin where that is another than
    the key's name. Raises ConfigError."""
    vkey, _, origin = text.strip().partition(" ")
    try:
        key = parse_vkey(vkey)
    except MalformedProof as error:
        raise ConfigError(
            f"--log takes a log's vkey, such as /log/vkey answers it: {error.message}"
        ) from error
    return KnownLog(origin=origin.strip() or key.name, key=key)


def _clock() -> int:
    return time.time_ns() // 1_000


def _bind(listener: socket.socket, host: str, port: int) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # whoever connects from now on waits for the server instead of failing
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from error


def _stop_server(server: "object", stop: threading.Event) -> None:
    stop.wait()
    server.should_exit = True  # type: ignore[attr-defined]
