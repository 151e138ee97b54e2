"""The chain process killed before each of its steps, one life at a time.

An undisturbed pass over one period (watch, close, release, propose, activate, anchor) says which
steps there are. Then, for every one of them, another period is cut off, a process dies by SIGKILL
just before that step, the next one finishes, and ledger and chain are compared event by event.
Real PostgreSQL and anvil; the passes run in children of a small server that has everything
imported, so that a life takes half a second.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from nacl.signing import SigningKey

from ledger import bootstrap
from ledger.aggregates.application import Ledger
from ledger.aggregates.governance import Governance
from ledger.aggregates.inferences import fee_event_id
from ledger.aggregates.periods import Periods
from ledger.bootstrap import Store
from ledger.chain.anchorer import STEPS
from ledger.chain.devchain import DevChain
from ledger.chain.payouts import Payouts, load_payout_tree
from ledger.config import Settings, load_settings
from ledger.domain.envelope import decode_entry, sign_event
from ledger.domain.fees import fee_wei
from ledger.domain.ids import actor_of, derived_id
from ledger.log.sequencer import Sequencer
from ledger.processes.chain import build, dev_chain
from ledger.processes.roles import configure_logging
from ledger.processes.supervisor import open_ledger
from ledger.store.recorder import system_clock
from ledger.verify.checkpoint import Checkpoint
from tests.pg import temporary_home
from tests.service_world import Log, audit_money, until

ROOT = Path(__file__).parents[2]
MAX_ROUNDS = 60
HASH = "ab" * 32
PRICES = {"input_wei_per_token": 10**12, "output_wei_per_token": 2 * 10**12}
TOKENS = (100, 200)
DEPOSIT_WEI = 10**18
COINS_WEI = 10**20

Steps = list[str]
"""`name.n`: the n-th time that a pass comes to a step of that name."""


# --- one life of the chain process ------------------------------------------------------------


def one_pass(settings: Settings, die_at: str, told: Path) -> None:
    """Everything that the period under way needs, then an anchor; or death before `die_at`. The
    steps are written to `told` as they come."""
    seen: Steps = []

    def observe(name: str) -> None:
        times = sum(step.startswith(f"{name}.") for step in seen)
        seen.append(f"{name}.{times + 1}")
        told.write_text(json.dumps(seen))
        if seen[-1] == die_at:
            os._exit(9)  # no handler, no exit code of Python's: as by SIGKILL

    with bootstrap.store(settings) as box, bootstrap.application(box) as ledger:
        service = build(
            settings,
            box,
            ledger,
            bootstrap.operator_key(settings),
            bootstrap.chain_key_file(settings),
            observe,
        )
        runner = bootstrap.projection_runner(box)
        for _ in range(MAX_ROUNDS):
            runner.catch_up()
            quiet = not service.watch()
            quiet = not service.settle() and quiet
            if quiet and ledger.need(Periods).status == "activated":
                break
        else:
            raise AssertionError(f"the period is still {ledger.need(Periods).status}")
        sequencer(settings, box).step()
        while service.anchor():
            sequencer(settings, box).step()
        runner.catch_up()


def sequencer(settings: Settings, box: Store) -> Sequencer:
    return Sequencer(
        log=box.entries,
        tiles=box.tiles,
        signer=bootstrap.log_signer(settings),
        clock=system_clock,
    )


def serve(told: Path) -> None:
    """For every line on stdin (a step, or nothing) a child that lives one life; its exit status on
    stdout. This process has no threads, so it may fork."""
    configure_logging()  # to stderr: stdout carries exit statuses
    settings = load_settings()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                one_pass(settings, line.strip(), told)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Lives:
    """The server of lives, as the test sees it."""

    def __init__(self, settings: Settings) -> None:
        self._told = settings.root / "steps.json"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.test_service_steps", str(self._told)],
            env={**os.environ, **settings.environment()},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def live(self, die_at: str = "") -> Steps:
        """One life; the steps that it came to, the deadly one included."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._told.write_text("[]")
        self._process.stdin.write(f"{die_at}\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status == (9 if die_at else 0), "see stderr"
        return list(json.loads(self._told.read_text()))

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


# --- the ledger beside it ---------------------------------------------------------------------


@dataclass(kw_only=True)
class Person:
    key: SigningKey

    @property
    def id(self) -> str:
        return actor_of(bytes(self.key.verify_key))


class Business:
    """A datanet, a trained run, a published adapter, a consumer with money; then answers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.run, self.adapter = str(uuid4()), str(uuid4())
        self.operator = Person(key=bootstrap.operator_key(settings))
        self.worker = Person(key=bootstrap.ensure_key(settings.key_file("worker")))
        self.owner, self.author, self.consumer = (
            Person(key=SigningKey.generate()) for _ in range(3)
        )
        self.author_key = settings.key_file("author-evm")

    def open(self, ledger: Ledger) -> None:
        for who in (self.owner, self.author, self.consumer):
            self.do(ledger, who, "identity.registered", {"name": "somebody"})
        self.bind(ledger, self.author, self.author_key)
        self.bind(ledger, self.owner, self.settings.key_file("owner-evm"))  # who never claims
        net, rows = str(uuid4()), str(uuid4())
        self.do(ledger, self.owner, "datanet.created", {
            "datanet": net, "name": "net", "description": "", "licence": "CC0-1.0",
            "reviewers": [],
        })  # fmt: skip
        self.do(ledger, self.author, "contribution.recorded", {
            "contribution": rows, "datanet": net, "licence": "CC0-1.0", "rows_root": HASH,
            "rows_count": 1, "rows_sha256": HASH, "title": "rows",
        })  # fmt: skip
        self.do(ledger, self.owner, "contribution.approved", {
            "contribution": rows, "datanet": net, "note": "",
        })  # fmt: skip
        self.do(ledger, self.owner, "run.requested", {
            "run": self.run, "name": "run", "datanets": [net], "base_model": HASH,
            "base_id": "base", "config": {},
        })  # fmt: skip
        attempt = {"run": self.run, "attempt": 1}
        self.do(ledger, self.worker, "run.started", {**attempt, "submission_id": "one"})
        self.do(ledger, self.worker, "run.completed", {
            **attempt, "manifest_sha256": HASH, "adapter_sha256": HASH,
            "adapter_config_sha256": HASH, "index_sha256": HASH, "index_root": HASH,
            "rows_count": 1, "contributions_count": 1, "steps": 1, "loss": "1.5",
        })  # fmt: skip
        self.do(ledger, self.owner, "adapter.published", {
            "adapter": self.adapter, "run": self.run, "model": "net/model",
            "adapter_sha256": HASH, "base_model": HASH,
            **{name: str(wei) for name, wei in PRICES.items()},
        })  # fmt: skip

    def bind(self, ledger: Ledger, who: Person, key_file: Path) -> None:
        wallet = bootstrap.wallet_of(key_file)
        proof = bootstrap.sign_binding(wallet, actor=who.id, log=ledger.log_origin)
        body = {"address": wallet.address, "signature": proof}
        self.do(ledger, who, "identity.evm_bound", body)

    def answer(self, ledger: Ledger) -> None:
        """One inference with its fee, attributed to the author."""
        inference, fee = str(uuid4()), fee_wei(*TOKENS, **PRICES)
        policy = ledger.need(Governance).policy
        assert policy is not None
        recorded = {
            "inference": inference, "adapter": self.adapter, "consumer": self.consumer.id,
            "prompt_commitment": HASH, "output_commitment": HASH, "transcript_sha256": HASH,
            "prompt_tokens": TOKENS[0], "completion_tokens": TOKENS[1], "max_tokens": TOKENS[1],
            "seed": 0, "temperature_ppm": 0, "top_p_ppm": 1_000_000, "finish_reason": "stop",
            "fee_wei": str(fee),
        }  # fmt: skip
        charged = {
            "account": self.consumer.id, "inference": inference, "adapter": self.adapter,
            "policy_version": policy.version, "amount_wei": str(fee), "owner": self.owner.id,
            **{f"{part}_wei": str(wei) for part, wei in policy.split(fee).items()},
        }  # fmt: skip
        fee_id = fee_event_id(ledger.log_origin, inference)
        ledger.append_all([
            self.sign(self.operator, "inference.recorded", recorded),
            self.sign(self.operator, "fee.charged", charged, fee_id),
        ])  # fmt: skip
        self.do(ledger, self.worker, "attribution.recorded", {
            "inference": inference, "adapter": self.adapter, "run": self.run,
            "method": "test/v1", "index_sha256": HASH, "evidence_sha256": HASH,
            "unattributed_ppm": 100_000,
            "shares": [{"contributor": self.author.id, "ppm": 900_000}],
        })  # fmt: skip

    def cut_off(self, ledger: Ledger, period: int) -> None:
        event_id = derived_id("period.cutoff", ledger.log_origin, period)
        self.do(ledger, self.operator, "period.cutoff", {"period": period}, event_id)

    def do(
        self, ledger: Ledger, who: Person, type: str, body: dict[str, Any], id: UUID | None = None
    ) -> None:
        ledger.append(self.sign(who, type, body, id))

    def sign(self, who: Person, type: str, body: dict[str, Any], id: UUID | None = None) -> bytes:
        return sign_event(
            who.key,
            type=type,
            log=self.settings.log_origin,
            body=body,
            id=id or uuid4(),
            at=system_clock(),
        )


class Scene:
    """One home, its database and chain, one period after the other."""

    def __init__(self, settings: Settings, box: Store, ledger: Ledger, chain: DevChain) -> None:
        self.settings, self.box, self.ledger, self.chain = settings, box, ledger, chain
        self.business = Business(settings)
        self.business.open(ledger)
        self.period = 0
        self.lives = Lives(settings)
        self.service = build(
            settings, box, ledger, self.business.operator.key, bootstrap.chain_key_file(settings)
        )
        self.deposit()
        assert self.service.watch() == 1

    def payouts(self, key_file: Path) -> Payouts:
        self.chain.fund(bootstrap.wallet_of(key_file).address, COINS_WEI)
        info = {"chain": bootstrap.deployed(self.settings)}
        return bootstrap.payouts(self.settings, key_file, info)  # type: ignore[no-any-return]

    def deposit(self) -> None:
        payer = self.payouts(self.settings.key_file("consumer-evm"))
        payer.deposit(self.business.consumer.id, DEPOSIT_WEI)

    def next_period(self) -> None:
        """New money on chain, an answer, a claim of what the last period made available, a cutoff:
        the next pass has a step of every kind to do."""
        if self.period:
            self.deposit()
            self.claim()
        self.business.answer(self.ledger)
        self.period += 1
        self.business.cut_off(self.ledger, self.period)
        sequencer(self.settings, self.box).step()

    def claim(self) -> None:
        address = bootstrap.wallet_of(self.business.author_key).address
        row = self.box.queries.period(self.period)
        assert row is not None
        tree = load_payout_tree(json.loads(self.box.blobs.get(row["tree_sha256"])))
        author = self.payouts(self.business.author_key)
        assert author.claim(address, tree.amount(address), tree.proof(address))

    def audit(self) -> None:
        """One event of each kind for this period; all of the ledger's agrees with the chain's."""
        newest = self.box.tiles.latest()
        assert newest is not None
        assert newest.size == self.box.entries.size()
        entries = self.box.entries.entries(0, newest.size)
        head = Checkpoint(origin=self.settings.log_origin, size=newest.size, root=newest.root)
        events = [decode_entry(entry).envelope for entry in entries]
        log = Log(note=newest.note, head=head, vkey="", entries=entries, events=events)
        for type in ("period.closed", "payout.proposed", "payout.activated"):
            periods = [event.body["period"] for event in log.of(type)]
            assert periods == list(range(1, self.period + 1)), type
        sizes = [event.body["size"] for event in log.of("checkpoint.anchored")]
        assert sizes == sorted(set(sizes))
        audit_money(log, self.settings)
        payouts = self.payouts(self.settings.key_file("consumer-evm"))
        active = payouts.active()
        row = self.box.queries.period(self.period)
        assert row is not None
        assert (active.period, "0x" + active.root.hex()) == (self.period, row["root"])
        assert (active.total, row["status"]) == (row["total_wei"], "activated")
        assert payouts.covered() == active.total, "released once, and no more than is owed"


@pytest.fixture(scope="module")
def scene(pg_url_module: str) -> Iterator[Scene]:
    with temporary_home() as home:
        given = load_settings(home=home, log_origin="log.example/steps", challenge_window_s=0)
        with dev_chain(given) as chain:
            settings = given.model_copy(
                update={
                    "database_url": pg_url_module,
                    "chain_rpc_url": chain.rpc_url,
                    "dev_chain": True,
                }
            )
            chain.fund(bootstrap.wallet_of(bootstrap.chain_key_file(settings)).address, COINS_WEI)
            open_ledger(settings)
            with bootstrap.store(settings) as box, bootstrap.application(box) as ledger:
                scene = Scene(settings, box, ledger, chain)
                try:
                    yield scene
                finally:
                    scene.lives.end()


OURS = {"chain_event", "cursor", "close", "release", "propose", "activate", "anchored"}


def test_killed_before_any_step_the_next_life_finishes(scene: Scene) -> None:
    scene.next_period()
    scene.lives.live()
    scene.audit()
    scene.next_period()
    undisturbed = scene.lives.live()
    scene.audit()
    assert {step.partition(".")[0] for step in undisturbed} == {*OURS, *STEPS}
    for step in undisturbed:
        scene.next_period()
        assert scene.lives.live(die_at=step)[-1] == step
        scene.lives.live()
        scene.audit()
    print(f"{len(undisturbed)} steps: {' '.join(undisturbed)}")


def test_what_the_ledger_tells_of_a_chain_outlives_a_killed_anvil(scene: Scene) -> None:
    """Others may never save their blocks; what was recorded of them must not be taken back."""
    settings, key_file = scene.settings, scene.settings.key_file("consumer-evm")
    chain = {**(bootstrap.deployed(settings) or {}), "development": False}  # so: nothing is saved
    payer = bootstrap.payouts(settings, key_file, {"chain": chain})
    service = scene.service
    service.watch()
    for _ in range(3):
        payer.deposit(scene.business.consumer.id, DEPOSIT_WEI)
        assert service.watch() == 1
        assert scene.chain.pid is not None
        os.kill(scene.chain.pid, signal.SIGKILL)
        until("the end of anvil", lambda: not scene.chain.alive, 5)
        scene.chain.start()
        assert service.watch() == 0, "nothing new, and nothing undone"


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
