"""The worker service: Ray, serving, training and attribution of one ledger, in one foreground
process. `python -m workers.service --api URL --key-file F --home DIR`.

The composition root of `workers`. It starts the local Ray (or uses the one at RAY_ADDRESS), keeps
the OpenLoRA replicas up, and runs the dispatcher's and the attribution loop on a thread each until
SIGTERM; then the replicas finish their answers, for `keeper.DRAIN_S` at most. It holds no state:
killed with -9, its Ray ends with it, and the next start goes on from the ledger, the outboxes and
the snapshots in `home`. When Ray dies under it, it starts another; when Ray hangs in it, it ends
itself, and its supervisor starts it again.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from ledger.errors import ComputeError, ConfigError, LedgerError, Unavailable
from workers import ray_cluster
from workers.attribute import Attributed, Attributor
from workers.bounded import Hangs
from workers.dispatch import Dispatcher, RayJobs
from workers.keeper import Keeper
from workers.link import WorkerSpec
from workers.outbox import Outbox

log = structlog.get_logger(__name__)

WATCH_S = 1.0
LOOK_S = 3.0
MAX_PAUSE_S = 15.0
STOP_S = 5.0
CALL_TIMEOUT_S = 300.0
MAX_REPLICAS = 64


def run(
    *,
    api: str,
    key_file: Path,
    home: Path,
    stop: threading.Event,
    base_model: str | Path | None = None,
    ray_address: str | None = None,
    ray_cpus: int | None = None,
    threads: int = 1,
    replicas: int = 1,
    serving_host: str | None = None,
    keep: Iterable[str] = (),
) -> None:
    """Serve until `stop`. `ray_address` None means RAY_ADDRESS of the environment, or a local Ray.
    `replicas` of OpenLoRA listen on `serving_host`: by default loopback in a local Ray, and each
    node's own address in another. `keep` names models or adapters that they never evict.

    Raises ConfigError for a key or base model that is not there, ComputeError when Ray does not
    start. Where Ray hangs, the process ends here: nothing else would end it.
    """
    if not 1 <= replicas <= MAX_REPLICAS:
        raise ConfigError(f"replicas: expected 1 to {MAX_REPLICAS}, got {replicas}")
    spec = WorkerSpec(
        api=api,
        key_file=Path(key_file).absolute(),
        home=Path(home).absolute(),
        base_model=Path(base_model).absolute() if base_model else None,
        keep=frozenset(keep),
    )
    spec.base_path()  # fail at once, and not in an actor's log
    client = spec.client()
    spec.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    cluster = ray_cluster.open_cluster(
        spec.home, address=ray_address or os.environ.get("RAY_ADDRESS"), num_cpus=ray_cpus
    )
    actors = _Actors(spec, cluster, threads, stop)
    keeper = Keeper(spec, replicas=replicas, threads=threads, host=serving_host, get=actors.get)
    loops: list[threading.Thread] = []
    ended = threading.Event()
    try:
        _start(cluster)
        _wait_for_ledger(client, stop)
        outbox = Outbox(client, spec.home / "outbox")
        dispatcher = Dispatcher(spec, client, outbox, RayJobs(lambda: cluster.info, spec))
        attributor = Attributor(
            client, Outbox(client, spec.home / "outbox-attribution"), actors.attribute
        )
        loops = [
            threading.Thread(target=_loop, args=(work, stop, ended), name=name, daemon=True)
            for name, work in (("dispatch", dispatcher.run), ("attribution", attributor.run))
        ]
        for loop in loops:
            loop.start()
        _watch(cluster, actors, keeper, stop, ended)
    finally:
        stop.set()
        _drain(cluster, keeper)
        for loop in loops:
            loop.join(STOP_S)  # one may wait for Ray; it holds nothing that a kill would break
        ray_cluster.disconnect()
        cluster.stop()
        client.close()
        log.info("worker service stopped")
        if ray_cluster.hung():
            os._exit(ComputeError.exit_code)  # any other end would wait for Ray


class _Actors:
    """Handles in the cluster that is up now. `attribute` is called by one thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        cluster: ray_cluster.LocalRay | ray_cluster.AttachedRay,
        threads: int,
        stop: threading.Event,
    ) -> None:
        self._spec = spec
        self._cluster = cluster
        self._threads = threads
        self._stop = stop
        self._attribution: tuple[str, Any] | None = None

    def attribute(
        self, inferences: Sequence[Mapping[str, Any]]
    ) -> Sequence[Attributed | LedgerError]:
        info = self.connected()
        import ray

        from workers.actors import attribution_actor
        from workers.ray_errors import designed

        try:
            if self._attribution is None or self._attribution[0] != info.address:
                actor = ray_cluster.call(
                    "making an actor", lambda: attribution_actor(self._spec, self._threads)
                )
                self._attribution = (info.address, actor)
            asked = [dict(inference) for inference in inferences]
            found: list[Attributed | LedgerError] = self.get(
                self._attribution[1].attribute.remote(asked)
            )
            return found
        except ray.exceptions.RayError as error:
            raise designed(error) from error

    def get(self, reference: Any, limit_s: float = CALL_TIMEOUT_S) -> Any:
        """`ray.get` that notices within a second that the service is to stop, or that Ray died:
        a call to an actor may then stay open for ever."""
        import ray

        deadline = time.monotonic() + limit_s
        while True:
            try:
                return ray.get(reference, timeout=1.0)
            except ray.exceptions.GetTimeoutError:
                if self._stop.is_set():
                    raise ComputeError("the worker service is stopping") from None
                if not self._cluster.alive():
                    raise ComputeError("Ray died; another one is being started") from None
                if time.monotonic() > deadline:
                    raise

    def connected(self) -> ray_cluster.ClusterInfo:
        info = self._cluster.info
        ray_cluster.connect(info)
        return info


def _start(cluster: ray_cluster.LocalRay | ray_cluster.AttachedRay) -> None:
    cluster.start()
    if isinstance(cluster, ray_cluster.LocalRay) and not cluster.owned:
        raise ConfigError(
            f"another worker service runs in {cluster.folder.parent}; stop it, or give --home"
        )
    log.info("ray is up", address=cluster.info.address, jobs=cluster.info.jobs_url)


def _wait_for_ledger(client: Any, stop: threading.Event) -> None:
    """The API may be starting beside us. Its address being wrong shows in the log."""
    pause_s = 0.2
    while not stop.is_set():
        try:
            log.info("ledger found", log=client.log, url=client.url)
            return
        except Unavailable as error:
            log.info("waiting for the ledger", why=error.message)
            pause_s = min(MAX_PAUSE_S, 1.5 * pause_s)
            stop.wait(pause_s)


def _watch(
    cluster: ray_cluster.LocalRay | ray_cluster.AttachedRay,
    actors: _Actors,
    keeper: Keeper,
    stop: threading.Event,
    ended: threading.Event,
) -> None:
    pause_s = 0.0
    while not stop.wait(pause_s) and not ended.is_set():
        pause_s = LOOK_S
        try:
            if not cluster.alive():
                log.error("ray died, starting another")
                ray_cluster.disconnect()
                _start(cluster)
            keeper.step(actors.connected())
        except Hangs:
            raise
        except LedgerError as error:
            log.warning("serving waits", error=error.slug, why=error.message)
            pause_s = WATCH_S
        if ray_cluster.hung():
            raise ComputeError(f"{ray_cluster.hung()} hangs: the service has to be started again")
    if ended.is_set() and not stop.is_set():
        raise ComputeError("a loop of the worker service ended by a mistake; see the log above")


def _drain(cluster: ray_cluster.LocalRay | ray_cluster.AttachedRay, keeper: Keeper) -> None:
    """Let running answers finish, where Ray still does what it is told."""
    try:
        if not ray_cluster.hung() and cluster.alive():
            # Ours ends by its pids: no need to ask it, who may not listen any more.
            cut = keeper.drain(end=isinstance(cluster, ray_cluster.AttachedRay))
            log.info("replicas drained", answers_cut=cut)
    except Exception as error:  # whatever it is, the end must come
        log.warning("replicas not drained", why=str(error)[:300])


def _loop(work: Any, stop: threading.Event, ended: threading.Event) -> None:
    try:
        work(stop)
    except Exception:
        # Our own mistake: say so, and end the service, which its supervisor starts again.
        log.exception("loop ended")
        ended.set()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.service", description=__doc__)
    parser.add_argument("--api", required=True, help="URL of the ledger")
    parser.add_argument("--key-file", required=True, type=Path, help="the worker's key, 0600")
    parser.add_argument("--home", required=True, type=Path, help="the workers' folder")
    parser.add_argument("--base-model", type=Path, help="model folder; default: the bundled one")
    parser.add_argument("--ray-address", help="host:port of a cluster; default: RAY_ADDRESS")
    parser.add_argument("--ray-cpus", type=int, help="CPUs of a local Ray; default: all")
    parser.add_argument("--replicas", type=int, default=1, help="engines, one per device")
    parser.add_argument("--serving-host", help="address that replicas listen on")
    parser.add_argument("--keep", action="append", default=[], help="model or adapter to keep")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per serving actor")
    given = parser.parse_args(arguments)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(stop=stop, **vars(given))
    except LedgerError as error:
        print(f"{error.title}: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
