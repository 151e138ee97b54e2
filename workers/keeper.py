"""Keeps the replicas of OpenLoRA up: as many as wanted, of one base, healthy, drained at the end.

Ray starts and restarts their processes; this looks at each of them on every `step` and does what
Ray cannot know of:

    not there (a new cluster, a replica that could not start)   start it, or find the one of before
    of another base model                                       drain, end, start: one at a time
    its engine has work and makes no step for STUCK_S           end its process; Ray starts another
    answers no health check, FAILURES times                     the same
    more of them than wanted                                    drain, end

State is in the cluster and in `<home>/ray/replicas`: a keeper that was killed leaves replicas that
serve on where the cluster is not its own, and the next one finds them. Every wait has a limit.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from ledger.errors import ComputeError, LedgerError
from workers import base_model as models
from workers import ray_cluster
from workers.link import WorkerSpec
from workers.replicas import registry
from workers.replicas.protocol import Hello
from workers.replicas.replica import LOOPBACK

log = structlog.get_logger(__name__)

PREFIX = "openlora"
LOAD_TIMEOUT_S = 300.0
"""Until a replica that is being started answers: a large model takes its time to be read."""
HEALTH_TIMEOUT_S = 30.0
FAILURES = 3
STUCK_S = 120.0
DRAIN_S = 8.0
"""For running answers to finish, within the supervisor's patience; what is left is resumed on other
replicas, where there are any."""
POLL_S = 0.1


class Replaced(ComputeError):
    """A replica was ended to be replaced: no news for anybody but the log."""


@dataclass(kw_only=True)
class _Kept:
    """A replica's handle in the cluster at `address`."""

    actor: Any
    address: str
    ready: bool = False
    failures: int = 0


class Keeper:
    """`step()` often; `drain()` at the end. One thread. `get` is the service's `ray.get`, which
    notices that it is to stop; `host` None chooses by the cluster."""

    def __init__(
        self, spec: WorkerSpec, *, replicas: int, threads: int, host: str | None, get: Any
    ) -> None:
        self._spec = spec
        self._names = [f"{PREFIX}-{n}" for n in range(replicas)]
        self._threads = threads
        self._host = host
        self._get = get
        self._kept: dict[str, _Kept] = {}
        self._digest = models.digest(spec.base_path())
        self._swept: str | None = None

    def step(self, info: ray_cluster.ClusterInfo) -> int:
        """Look at every replica of the cluster that is up now; how many are ready. Raises
        ComputeError for the last thing that went wrong, when all were looked at."""
        import ray

        from workers.ray_errors import designed

        trouble: LedgerError | None = None
        for work in (self._start_all, self._sweep):
            work(info)
        for name in self._names:
            try:
                self._look(name)
            except ray.exceptions.RayError as error:
                trouble = designed(error)
                died = isinstance(error, ray.exceptions.RayActorError)
                self._failed(name, trouble, died=died)
            except Replaced:
                raise  # the next one when this one is up again
            except LedgerError as error:
                trouble = error
        if trouble is not None:
            raise trouble
        return sum(kept.ready for kept in self._kept.values())

    def drain(self, limit_s: float = DRAIN_S, *, end: bool = True) -> int:
        """Have all finish what they answer, at most `limit_s`; how many answers were cut. Their
        processes end then, or with `end` False with the cluster that the caller is about to end."""
        left = self._drain(list(self._kept), limit_s)
        for name in list(self._kept):
            if end:
                self._end(name)
            registry.remove(self._spec.home, name)
        return left

    # --- one look ---

    def _start_all(self, info: ray_cluster.ClusterInfo) -> None:
        """Without waiting: they load their models at the same time."""
        gpus: float | None = None
        for name in self._names:
            kept = self._kept.get(name)
            if kept is not None and kept.address == info.address:
                continue
            gpus = self._gpus() if gpus is None else gpus
            self._kept[name] = _Kept(actor=self._started(name, info, gpus), address=info.address)

    def _look(self, name: str) -> None:
        kept = self._kept[name]
        limit_s = HEALTH_TIMEOUT_S if kept.ready else LOAD_TIMEOUT_S
        hello = Hello.from_wire(self._get(kept.actor.health.remote(), limit_s))
        kept.failures = 0
        if hello.base_model != self._digest:
            log.warning("replica of another base model", replica=name, was=hello.base_model)
            self._drain([name], DRAIN_S)
            self._end(name)
            raise Replaced(f"replica {name} served base model {hello.base_model}; replacing")
        if hello.stuck_s > STUCK_S:
            self._restart(name, f"no step for {hello.stuck_s:.0f} s")
        elif not kept.ready:
            kept.ready = True
            log.info("serving", replica=name, base_model=self._digest, pid=hello.pid)

    def _failed(self, name: str, error: LedgerError, *, died: bool) -> None:
        kept = self._kept[name]
        kept.ready = False
        kept.failures += 1
        log.warning("replica fails", replica=name, times=kept.failures, why=error.message)
        if kept.failures < FAILURES:
            return
        self._restart(name, error.message)
        if died:  # for good: its start failed, and Ray does not repeat that
            self._kept.pop(name)

    def _restart(self, name: str, why: str) -> None:
        """End its process; Ray starts another one."""
        import ray

        log.error("replica is started again", replica=name, why=why)
        kept = self._kept[name]
        kept.ready, kept.failures = False, 0
        ray_cluster.call("ray.kill", lambda: ray.kill(kept.actor, no_restart=False))

    def _end(self, name: str) -> None:
        import ray

        kept = self._kept.pop(name)
        registry.remove(self._spec.home, name)
        ray_cluster.call("ray.kill", lambda: ray.kill(kept.actor))

    def _drain(self, names: list[str], limit_s: float) -> int:
        """Answers that were still under way at the end."""
        import ray

        deadline = time.monotonic() + limit_s
        under_way: Mapping[str, int] = {}
        while names and (left_s := deadline - time.monotonic()) > 0:
            asked = {name: self._kept[name].actor.drain.remote() for name in names}
            try:
                found = ray.get(list(asked.values()), timeout=left_s)
            except ray.exceptions.RayError as error:
                log.warning("not drained", replicas=names, why=str(error)[:200])
                break
            under_way = dict(zip(asked, found, strict=True))
            names = [name for name in names if under_way[name]]
            time.sleep(min(POLL_S, left_s) if names else 0)
        return sum(under_way[name] for name in names if name in under_way)

    def _sweep(self, info: ray_cluster.ClusterInfo) -> None:
        """Once in each cluster: replicas of an earlier service that are more than wanted now."""
        if self._swept == info.address:
            return
        from workers.actors import find_actor

        for name in registry.registered(self._spec.home).keys() - set(self._names):
            actor = ray_cluster.call("ray.get_actor", lambda name=name: find_actor(name))  # type: ignore[misc]
            if actor is None:
                registry.remove(self._spec.home, name)
                continue
            self._kept[name] = _Kept(actor=actor, address=info.address)
            self._drain([name], DRAIN_S)
            self._end(name)
        self._swept = info.address

    def _started(self, name: str, info: ray_cluster.ClusterInfo, gpus: float) -> Any:
        from workers.actors import serving_actor

        # On our own loopback cluster nobody outside is to reach it; elsewhere the node's address.
        host = self._host or (LOOPBACK if info.address.startswith(LOOPBACK) else "")
        return ray_cluster.call(
            "making an actor",
            lambda: serving_actor(self._spec, name, host=host, threads=self._threads, gpus=gpus),
        )

    def _gpus(self) -> float:
        """Of each replica: one, or an equal part of one where there are more replicas."""
        import ray

        resources = ray_cluster.call("ray.cluster_resources", ray.cluster_resources)
        devices = int(resources.get("GPU", 0))
        return 1 / -(-len(self._names) // devices) if devices else 0
