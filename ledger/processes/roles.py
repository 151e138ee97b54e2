"""One process of the service: `python -m ledger.processes api|projector|chain|workers`.

Each runs until SIGTERM or SIGINT, or until its supervisor is gone: then the pipe on stdin closes,
however the supervisor ended. Logs go to stderr, one structured line each.
"""

import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import structlog

from ledger.config import Settings, load_settings
from ledger.errors import ConfigError, LedgerError, VerificationError

FOLLOW_PARENT = "TRIBUTARY_FOLLOW_STDIN"
PROCESSES_LOCK = "processes.lock"
"""Supervised processes of a home hold it shared; the next supervisor waits for the last of them."""
ORPHAN_PATIENCE_S = 3.0
"""For an orderly end without a supervisor; nothing is lost by a disorderly one."""


def configure_logging() -> None:
    """JSON lines on stderr; nothing above INFO from libraries that talk much."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    for chatty in ("httpx", "web3", "urllib3", "psycopg.pool", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )


def run_api(settings: Settings, stop: threading.Event) -> None:
    """HTTP, appending and sequencing."""
    import uvicorn

    from ledger.api.app import create_app
    from ledger.api.one_write import OneWriteProtocol
    from ledger.bootstrap import api_services, log_signer
    from ledger.log.sequencer import Sequencer

    with api_services(settings) as services:
        sequencer = Sequencer(
            log=services.entries,
            tiles=services.tiles,
            signer=log_signer(settings),
            clock=services.clock,
            cosigners=services.cosigners,
        )
        thread = threading.Thread(
            target=_sequence, args=(sequencer, stop), name="sequencer", daemon=True
        )
        thread.start()
        app = create_app(services)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=OneWriteProtocol,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # a forged X-Forwarded-For would choose its own rate limit
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        threading.Thread(target=_stop_server, args=(server, stop), daemon=True).start()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((settings.host, settings.port))
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
                    "set TRIBUTARY_PORT to a free one"
                ) from error
            server.run(sockets=[listener])
        stop.set()
        thread.join(10)


def _sequence(sequencer: "object", stop: threading.Event) -> None:
    try:
        sequencer.run(stop)  # type: ignore[attr-defined]
    except VerificationError:
        # The signer refuses to sign: appends without checkpoints would be promises we cannot keep.
        logging.getLogger(__name__).critical("the log cannot be signed; stopping the service")
        stop.set()
    except Exception:
        # Whatever it is, nobody signs any more. The supervisor starts the process again.
        logging.getLogger(__name__).exception("the sequencer ended; stopping the service")
        stop.set()


def _stop_server(server: "object", stop: threading.Event) -> None:
    stop.wait()
    server.should_exit = True  # type: ignore[attr-defined]


def run_projector(settings: Settings, stop: threading.Event) -> None:
    """Folds events into rows."""
    from ledger.bootstrap import projection_runner, store

    with store(settings, pool_size=4, name="projector") as box:
        projection_runner(box).run(stop)


def run_chain(settings: Settings, stop: threading.Event) -> None:
    """Watches, settles and anchors."""
    from ledger.bootstrap import chain_service

    with chain_service(settings) as service:
        service.run(stop)


def run_workers(settings: Settings, stop: threading.Event) -> None:
    """Ray: training dispatch, serving, attribution."""
    from ledger.bootstrap import WORKER_KEY, base_model
    from workers.service import run

    run(
        api=settings.url,
        key_file=settings.key_file(WORKER_KEY),
        home=settings.root / "workers",
        base_model=base_model(settings)["path"],
        ray_address=settings.ray_address,
        ray_cpus=settings.ray_cpus,
        replicas=settings.serving_replicas,
        serving_host=settings.serving_host,
        keep=(settings.serving_keep or "").replace(",", " ").split(),
        stop=stop,
    )


ROLES: dict[str, Callable[[Settings, threading.Event], None]] = {
    "api": run_api,
    "projector": run_projector,
    "chain": run_chain,
    "workers": run_workers,
}


def main(role: str) -> int:
    configure_logging()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = load_settings()
        with _supervised(settings, stop):
            ROLES[role](settings, stop)
    except LedgerError as error:
        structlog.get_logger(role).error("stopped", why=error.message, error=error.slug)
        return error.exit_code
    return 0


@contextlib.contextmanager
def _supervised(settings: Settings, stop: threading.Event) -> Iterator[None]:
    """As the child of a supervisor: end with it, and hold PROCESSES_LOCK for as long as we live."""
    if not os.environ.get(FOLLOW_PARENT):
        yield
        return
    threading.Thread(target=_follow_parent, args=(stop,), daemon=True).start()
    with (settings.root / PROCESSES_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _follow_parent(stop: threading.Event) -> None:
    """End with the supervisor: its end of our stdin closes when it is gone, SIGKILL included."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    stop.set()
    # Nobody is left to insist: a process that hangs in a library would stay for ever.
    time.sleep(ORPHAN_PATIENCE_S)
    os._exit(1)
