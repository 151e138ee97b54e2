"""The entry point of a training attempt: one Ray Job, which drives one trainer actor.

`python -m workers.jobs train --run ID --attempt N --api URL --key-file F --home DIR` (in a Ray
Job, RAY_ADDRESS and the token are in the environment). The dispatcher submits it; the ledger,
not Ray, decides whether there is another attempt. Secrets are never arguments: a key is a path.

How an attempt ends, and with what exit status:

    0  the run has its terminal event: completed; or failed, when it could never work (settings
       that do not parse, another base model, no rows); or it is no longer ours (cancelled, or a
       later attempt was started): nothing to do
    1  it failed in a way that another attempt may survive; the reason is in the log
    2  wrong arguments

A killed trainer process costs the work since its last snapshot: Ray restarts the actor, and the
call is made again, at most TRAINER_RESTARTS times an attempt. A killed driver ends its actor; the
next attempt goes on at the snapshot. The terminal event's id is derived from the run, so however
many attempts think they finished, the ledger holds one.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from ledger.client import Client
from ledger.domain.events import MAX_TEXT_CHARS
from ledger.domain.ids import derived_id
from ledger.errors import ComputeError, Conflict, InvalidEvent, LedgerError
from workers.link import WorkerSpec
from workers.outbox import Outbox
from workers.training.config import TrainingConfig

log = structlog.get_logger(__name__)

TERMINAL = ("completed", "failed", "cancelled")
MAX_CALLS = 6
"""Calls of a trainer within one attempt: the first, and one for each restart of its process."""


def completed_id(run: str) -> UUID:
    """Id of the one `run.completed` that a run can have."""
    return derived_id("run.completed", run)


def failed_id(run: str) -> UUID:
    return derived_id("run.failed", run)


def outbox_of(spec: WorkerSpec, run: str, client: Client) -> Outbox:
    """Where a run's terminal event waits for the ledger; the dispatcher replays it too."""
    return Outbox(client, spec.run_folder(run) / "outbox")


def fail(outbox: Outbox, run: str, attempt: int, reason: str) -> int:
    """Append `run.failed`; its leaf index."""
    body = {"run": run, "attempt": attempt, "reason": reason[:MAX_TEXT_CHARS]}
    return outbox.append("run.failed", body, id=failed_id(run))


def train(spec: WorkerSpec, run: str, attempt: int) -> int:
    """One attempt, from rows to the terminal event; the exit status."""
    client = spec.client()
    outbox = outbox_of(spec, run, client)
    try:
        if outbox.replay():
            return 0  # an earlier attempt finished, and only its event was missing
        row = client.get(f"/v1/runs/{run}")
        if row["status"] in TERMINAL or int(row["attempt"]) > attempt:
            log.info("not ours any more", run=run, attempt=attempt, status=row["status"])
            return 0
        try:
            TrainingConfig.from_dict(row["config"])  # before an actor starts for nothing
            outcome = _trained(spec, row, attempt)
        except InvalidEvent as error:
            log.warning("run can never work", run=run, reason=error.message)
            fail(outbox, run, attempt, error.message)
            return 0
        # The blobs are stored. A crash before `put` repeats the attempt, which finds all on disk;
        # a crash after it leaves the event in the outbox.
        outbox.append(
            "run.completed",
            {"run": run, "attempt": attempt, **asdict(outcome)},
            id=completed_id(run),
        )
    except Conflict as error:
        log.info("the ledger moved on", run=run, attempt=attempt, reason=error.message)
        return 0
    except LedgerError as error:
        log.error("attempt failed", run=run, attempt=attempt, error=error.slug, why=error.message)
        return 1
    return 0


def _trained(spec: WorkerSpec, row: Mapping[str, Any], attempt: int) -> Any:
    """`runs.Outcome`, made by a trainer actor that may die MAX_CALLS - 1 times."""
    import ray

    from workers import ray_cluster
    from workers.actors import trainer_actor
    from workers.ray_errors import designed

    ray_cluster.call(
        "ray.init",
        lambda: ray.init(
            namespace=ray_cluster.NAMESPACE, log_to_driver=False, configure_logging=False
        ),
        ray_cluster.JOIN_TIMEOUT_S,
    )
    trainer = trainer_actor(spec, f"trainer-{row['run']}-{attempt}")
    for call in range(1, MAX_CALLS + 1):
        try:
            return ray.get(trainer.execute.remote(dict(row)))
        except ray.exceptions.RayActorError as error:
            log.warning("trainer died", run=row["run"], call=call, why=str(error)[:300])
            if call == MAX_CALLS:
                raise designed(error) from error
        except ray.exceptions.RayError as error:
            raise designed(error) from error
    raise ComputeError("the trainer kept dying")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.jobs", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("train")
    command.add_argument("--run", required=True)
    command.add_argument("--attempt", required=True, type=int)
    command.add_argument("--api", required=True, help="URL of the ledger")
    command.add_argument("--key-file", required=True, type=Path, help="the worker's key, 0600")
    command.add_argument("--home", required=True, type=Path, help="the workers' folder")
    command.add_argument("--base-model", type=Path, help="model folder; default: the bundled one")
    given = parser.parse_args(arguments)
    spec = WorkerSpec(
        api=given.api, key_file=given.key_file, home=given.home, base_model=given.base_model
    )
    return train(spec, given.run, given.attempt)


def entrypoint(python: str, spec: WorkerSpec, run: str, attempt: int) -> list[str]:
    """The command line that `main` reads, for the dispatcher."""
    words = [python, "-m", "workers.jobs", "train", "--run", run, "--attempt", str(attempt)]
    words += ["--api", spec.api, "--key-file", str(spec.key_file), "--home", str(spec.home)]
    if spec.base_model is not None:
        words += ["--base-model", str(spec.base_model)]
    return words


if __name__ == "__main__":
    sys.exit(main())
