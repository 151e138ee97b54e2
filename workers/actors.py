"""The Ray actors: thin shells around the engines, each in a process of its own.

Here Ray meets code that knows no Ray: plain classes first, the handles that start them last.
torch is imported inside, when an actor starts, so that importing this module stays cheap for the
processes that only hold handles. Errors are those of `ledger.errors`; `ray_errors.designed` gives
them back to callers.

Cores: the trainer holds one of Ray's CPUs. Serving and attribution hold none: they must always
find a place, on a laptop with two cores too; their torch threads are set by hand.
"""

import os
from typing import Any

import ray

from ledger.errors import LedgerError
from workers.attribute import Attributed
from workers.link import WorkerSpec
from workers.ray_cluster import NAMESPACE

ACTOR_CALLS = 4
"""Calls of a serving actor at once: a health check need not wait for another."""
BACKGROUND_NICE = 15
TRAINER_RESTARTS = 5
"""Deaths of a trainer's process that one attempt survives."""


def give_way() -> None:
    """This process may wait: answers are made and sent before it runs. Before it has threads, which
    would keep the priority that they were started with."""
    current = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(current, BACKGROUND_NICE))


# --- training ------------------------------------------------------------------------------------


class TrainerActor:
    """Runs one training run. Restarted by Ray when its process dies; the driver then calls again,
    and training goes on at the last snapshot."""

    def __init__(self, spec: WorkerSpec) -> None:
        give_way()
        self._spec = spec

    def execute(self, run: dict[str, Any]) -> Any:
        """`runs.Outcome` of the run."""
        from workers.runs import execute

        return execute(self._spec, run, self._spec.client())


# --- serving -------------------------------------------------------------------------------------


class OpenLoRAActor:
    """A process with one replica of OpenLoRA. Its answers do not travel through Ray: clients find
    it by its file in the home, and reach it over gRPC (`workers.replicas`).

    `host` is the address to listen on; "" means this node's own. A process that Ray started again
    makes its replica here too, so it answers without being asked.
    """

    def __init__(self, spec: WorkerSpec, name: str, host: str, threads: int) -> None:
        from workers.replicas.replica import open_replica

        address = host or ray.util.get_node_ip_address()
        self._replica = open_replica(spec, name=name, host=address, threads=threads).start()

    def health(self) -> dict[str, Any]:
        """`protocol.Hello` as a dictionary, once the model is loaded."""
        return self._replica.hello().to_wire()

    def drain(self) -> int:
        """Refuse what is new; how many answers are under way."""
        return self._replica.drain()


# --- attribution ---------------------------------------------------------------------------------


class AttributionActor:
    """Whose rows shaped some answers: `influence.Influence` in a process of its own."""

    def __init__(self, spec: WorkerSpec, threads: int) -> None:
        from workers.influence import Influence

        give_way()
        self._influence = Influence(spec.client(), spec.home, spec.base_path(), threads)

    def attribute(self, inferences: list[dict[str, Any]]) -> list[Attributed | LedgerError]:
        """As `Influence.attribute`; errors of single answers come as the API's clients know them,
        since what crosses processes must be read on the other side."""
        from workers.ray_errors import designed

        return [
            designed(found) if isinstance(found, LedgerError) else found
            for found in self._influence.attribute(inferences)
        ]


# --- handles -------------------------------------------------------------------------------------


def trainer_actor(spec: WorkerSpec, name: str) -> Any:
    """A trainer that ends with its driver. `name` shows in the dashboard and in `ps`."""
    # No task retries: a call that died is for the driver to repeat, which counts and logs it.
    return _start(
        TrainerActor, spec, num_cpus=1, max_restarts=TRAINER_RESTARTS, max_task_retries=0, name=name
    )


def serving_actor(
    spec: WorkerSpec, name: str, *, host: str, threads: int = 1, gpus: float = 0
) -> Any:
    """The OpenLoRA actor of that name, started if need be. It outlives a starter that was killed:
    the next one finds it, with its adapters in memory."""
    return _start(
        OpenLoRAActor,
        spec,
        name,
        host,
        threads,
        num_cpus=0,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=ACTOR_CALLS,
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
    )


def attribution_actor(spec: WorkerSpec, threads: int = 1) -> Any:
    """An attribution actor that ends with its starter."""
    return _start(AttributionActor, spec, threads, num_cpus=0, max_restarts=-1, max_task_retries=0)


def find_actor(name: str) -> Any | None:
    """A detached actor by its name, or None."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _start(cls: type, *arguments: object, **options: object) -> Any:
    remote: Any = ray.remote(cls)
    return remote.options(**options).remote(*arguments)
