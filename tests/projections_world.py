"""A small ledger for projection tests: unsigned entries of valid events, and random histories.

Entries carry a signature of zeros: folds never verify one. Bodies pass the real `check_body`, so a
test cannot feed a fold what the log would refuse.
"""

import base64
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import Entry, encode_entry
from ledger.domain.events import check_body
from ledger.domain.fees import FeePolicy
from projections.memory import MemoryRows
from projections.registry import TABLES, fold, read_entry

LOG = "ledger.example/projections"
START_US = 1_700_000_000_000_000
HASH = "ab" * 32
HEX = "0x" + "cd" * 32
CONTRACT = "0x" + "Ee" * 20
NO_SIGNATURE = base64.b64encode(bytes(64)).decode()
POLICY = {"protocol_bps": 500, "owner_bps": 2_500, "operator_bps": 2_000, "contributors_bps": 5_000}


def actor(n: int) -> str:
    return f"ed25519:{n:064x}"


def uuid(n: int) -> str:
    return str(UUID(int=n))


def address(n: int) -> str:
    """Mixed case, as a checksummed address has it."""
    return "0x" + f"{n:036x}" + "AbCd"


OPERATOR, WORKER = actor(1), actor(2)


class World:
    """Appends events; `entries` is the log."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self._next = 1_000
        self._logs = 0

    def add(self, type_name: str, signer: str, **body: Any) -> int:
        """Append an event and return its leaf index."""
        check_body(type_name, body)
        index = len(self.entries)
        envelope = {
            "v": 1, "type": type_name, "id": uuid(10**9 + index), "log": LOG,
            "at": START_US + index, "actor": signer, "body": body, "sig": NO_SIGNATURE,
        }  # fmt: skip
        self.entries.append(encode_entry(index, START_US + index, canonical_json(envelope)))
        return index

    def new_id(self) -> str:
        self._next += 1
        return uuid(self._next)

    def on_chain(self, *, log_index: bool = False) -> dict[str, Any]:
        self._logs += 1
        found: dict[str, Any] = {
            "chain_id": 31_337,
            "contract": CONTRACT,
            "tx_hash": f"0x{self._logs:064x}",
            "block_number": self._logs,
        }
        return found | {"log_index": 0} if log_index else found

    # -- one call per step of an answer's life ---------------------------------------------------

    def open(self) -> None:
        self.add("ledger.opened", OPERATOR, name="test")
        self.add("role.granted", OPERATOR, member=WORKER, role="worker")
        self.add("fee_policy.set", OPERATOR, version=1, **POLICY)

    def datanet(self, owner: str) -> str:
        datanet = self.new_id()
        self.add(
            "datanet.created", owner, datanet=datanet, name="net", description="about",
            licence="MIT", reviewers=[],
        )  # fmt: skip
        return datanet

    def contribute(self, who: str, datanet: str, *, rows_count: int = 10) -> str:
        contribution = self.new_id()
        self.add(
            "contribution.recorded", who, contribution=contribution, datanet=datanet,
            licence="MIT", rows_root=HASH, rows_count=rows_count, rows_sha256=HASH, title="rows",
        )  # fmt: skip
        return contribution

    def decide(self, who: str, datanet: str, contribution: str, status: str = "approved") -> int:
        field = "note" if status == "approved" else "reason"
        body = {"contribution": contribution, "datanet": datanet, field: "because"}
        return self.add(f"contribution.{status}", who, **body)

    def set_policy(self, who: str, datanet: str, on_withdrawal: str = "keep") -> int:
        return self.add(
            "datanet.policy_set", who, datanet=datanet, max_rows_per_contribution=10,
            max_contributions_per_day=3, max_rows_per_day=25, on_withdrawal=on_withdrawal,
        )  # fmt: skip

    def hold(self, who: str, datanet: str, contribution: str, reason: str = "junk") -> int:
        return self.add(
            "contribution.held", who, contribution=contribution, datanet=datanet, reason=reason,
            note="look", evidence_sha256=HASH,
        )  # fmt: skip

    def release(self, who: str, datanet: str, contribution: str) -> int:
        body = {"contribution": contribution, "datanet": datanet, "note": "fine"}
        return self.add("contribution.released", who, **body)

    def appeal(self, who: str, datanet: str, contribution: str, row: int) -> int:
        body = {"contribution": contribution, "datanet": datanet, "row": row}
        return self.add("cluster.appealed", who, **body, reason="mine")

    def judge(self, what: str, who: str, datanet: str, contribution: str, row: int) -> int:
        body = {"contribution": contribution, "datanet": datanet, "row": row}
        return self.add(f"cluster.{what}", who, **body, note="looked at")

    def request_run(self, who: str, *datanets: str) -> str:
        run = self.new_id()
        self.add(
            "run.requested", who, run=run, name="a run", datanets=list(datanets),
            base_model=HASH, base_id="base", config={"seed": 1, "lr": "0.001"},
        )  # fmt: skip
        return run

    def complete_run(self, run: str, adapter_sha256: str = HASH) -> None:
        self.add("run.started", WORKER, run=run, attempt=1, submission_id=run + "-1")
        self.add(
            "run.completed", WORKER, run=run, attempt=1, manifest_sha256=HASH,
            adapter_sha256=adapter_sha256, adapter_config_sha256=HASH, index_sha256=HASH,
            index_root=HASH, rows_count=20, contributions_count=2, steps=30, loss="0.5",
        )  # fmt: skip

    def publish(self, owner: str, run: str, model: str = "dev/model") -> str:
        adapter = self.new_id()
        self.add(
            "adapter.published", owner, adapter=adapter, run=run, model=model, adapter_sha256=HASH,
            base_model=HASH, input_wei_per_token="3", output_wei_per_token="7",
        )  # fmt: skip
        return adapter

    def deposit(self, account: str, amount_wei: int) -> int:
        chain = self.on_chain(log_index=True)
        return self.add("deposit.recorded", OPERATOR, account=account,
                        amount_wei=str(amount_wei), **chain)  # fmt: skip

    def infer(self, consumer: str, adapter: str, fee_wei: int, inference: str = "") -> str:
        inference = inference or self.new_id()
        self.add(
            "inference.recorded", OPERATOR, inference=inference, adapter=adapter,
            consumer=consumer, prompt_commitment=HASH, output_commitment=HASH,
            transcript_sha256=HASH, prompt_tokens=11, completion_tokens=22, max_tokens=64, seed=0,
            temperature_ppm=0, top_p_ppm=1_000_000, finish_reason="stop", fee_wei=str(fee_wei),
        )  # fmt: skip
        return inference

    def interrupt(self, consumer: str, adapter: str) -> str:
        inference = self.new_id()
        self.add(
            "inference.interrupted", OPERATOR, inference=inference, adapter=adapter,
            consumer=consumer, prompt_commitment=HASH, output_commitment=HASH,
            transcript_sha256=HASH, prompt_tokens=11, completion_tokens=2, max_tokens=64, seed=0,
            temperature_ppm=0, top_p_ppm=1_000_000, reason="crashed",
        )  # fmt: skip
        return inference

    def charge(
        self, consumer: str, adapter: str, inference: str, owner: str, amount_wei: int
    ) -> int:
        split = FeePolicy(version=1, **POLICY).split(amount_wei)
        return self.add(
            "fee.charged", OPERATOR, account=consumer, inference=inference, adapter=adapter,
            policy_version=1, amount_wei=str(amount_wei), owner=owner,
            **{f"{part}_wei": str(wei) for part, wei in split.items()},
        )  # fmt: skip

    def attribute(
        self, adapter: str, run: str, inference: str, shares: dict[str, int], rest_ppm: int
    ) -> int:
        return self.add(
            "attribution.recorded", WORKER, inference=inference, adapter=adapter, run=run,
            method="test/v1", index_sha256=HASH, evidence_sha256=HASH, unattributed_ppm=rest_ppm,
            shares=[{"contributor": who, "ppm": ppm} for who, ppm in shares.items()],
        )  # fmt: skip

    def bind(self, who: str, to: str) -> int:
        return self.add("identity.evm_bound", who, address=to, signature="0x00")

    def cutoff(self, period: int) -> int:
        return self.add("period.cutoff", OPERATOR, period=period)

    def close(self, period: int, root: str = HEX) -> int:
        return self.add(
            "period.closed", OPERATOR, period=period, log_size=max(1, len(self.entries)),
            root=root, total_wei="1", accounts=1, tree_sha256=HASH,
        )  # fmt: skip

    def propose(self, period: int, root: str = HEX) -> int:
        return self.add("payout.proposed", OPERATOR, period=period, root=root, **self.on_chain())

    def activate(self, period: int, root: str = HEX) -> int:
        return self.add("payout.activated", OPERATOR, period=period, root=root, **self.on_chain())

    def veto(self, period: int) -> int:
        return self.add("payout.vetoed", OPERATOR, period=period, **self.on_chain())

    def claim(self, to: str, amount_wei: int, cumulative_wei: int | None = None) -> int:
        cumulative_wei = amount_wei if cumulative_wei is None else cumulative_wei
        return self.add(
            "payout.claimed", OPERATOR, address=to, amount_wei=str(amount_wei),
            cumulative_wei=str(cumulative_wei), **self.on_chain(log_index=True),
        )  # fmt: skip

    def anchor(self, size: int) -> int:
        return self.add("checkpoint.anchored", OPERATOR, size=size, root=HASH, block_hash=HEX,
                        l1_sha256=HASH, **self.on_chain())  # fmt: skip


class Folding:
    """Rows in memory that follow a world."""

    def __init__(self, world: World) -> None:
        self.world, self.position = world, 0
        self.rows = MemoryRows(TABLES)

    def catch_up(self) -> MemoryRows:
        while self.position < len(self.world.entries):
            fold(self.rows, self.entry(self.position))
            self.position += 1
        return self.rows

    def entry(self, index: int) -> Entry:
        return read_entry(self.world.entries[index])

    def balance(self, owner: str, bucket: str) -> int:
        row = self.catch_up().get("balances", (owner, bucket))
        return 0 if row is None else int(row["amount_wei"])

    def codes(self) -> list[str]:
        """Codes of all anomalies, in order."""
        return [row["code"] for _, row in self.catch_up().scan("anomalies")]


class ListLog:
    """The port `EntryLog` over a list, for a runner. `pause_s` slows reads down."""

    def __init__(self, entries: Sequence[bytes], pause_s: float = 0) -> None:
        self.stored, self._pause_s = entries, pause_s

    def size(self) -> int:
        return len(self.stored)

    def entries(self, start: int, stop: int) -> list[bytes]:
        time.sleep(self._pause_s)
        return list(self.stored[start:stop])

    def leaf_hashes(self, start: int, stop: int) -> list[bytes]:
        raise NotImplementedError

    def index_of(self, event_id: str) -> int | None:
        raise NotImplementedError

    def entries_of(self, event_ids: Sequence[UUID]) -> Mapping[UUID, bytes]:
        raise NotImplementedError

    def wait(self, size: int, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while len(self.stored) <= size and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(self.stored)


def random_history(seed: int, events: int) -> list[bytes]:
    """At least `events` entries of every money-moving kind, some of them out of order."""
    choose = random.Random(seed)
    world = World()
    world.open()
    people = [actor(n) for n in range(10, 18)]
    datanet = world.datanet(people[0])
    contributions = [world.contribute(person, datanet) for person in people]
    for contribution in contributions:
        world.decide(people[0], datanet, contribution, choose.choice(("approved", "rejected")))
    run = world.request_run(people[0], datanet)
    world.complete_run(run)
    adapter = world.publish(people[0], run)
    waiting: list[str] = []
    period = 0

    def answer() -> None:
        fee_wei, consumer = choose.randrange(0, 5_000), choose.choice(people)
        inference = world.infer(consumer, adapter, fee_wei)
        world.charge(consumer, adapter, inference, people[0], fee_wei)
        waiting.append(inference)

    def attribute() -> None:
        if not waiting:
            return
        inference = waiting.pop(choose.randrange(len(waiting)))
        world.attribute(adapter, run, inference, *random_shares(choose, people))

    def settle() -> None:
        nonlocal period
        period += 1
        world.cutoff(period)
        world.close(period)
        world.propose(period)
        (world.veto if choose.random() < 0.3 else world.activate)(period)

    def suspend() -> None:
        step = choose.choice((world.hold, world.release))
        step(WORKER, datanet, choose.choice(contributions))

    def dispute() -> None:
        which, row = choose.choice(contributions), choose.randrange(10)
        world.appeal(people[0], datanet, which, row)
        world.judge(choose.choice(("split", "upheld")), people[1], datanet, which, row)

    steps: list[tuple[Callable[[], object], int]] = [
        (suspend, 3),
        (dispute, 1),
        (lambda: world.set_policy(people[0], datanet), 1),
        (lambda: world.deposit(choose.choice(people), choose.randrange(1, 20_000)), 4),
        (answer, 10),
        (attribute, 10),
        (lambda: world.bind(choose.choice(people), address(choose.randrange(6))), 1),
        (settle, 1),
        (lambda: world.claim(address(choose.randrange(6)), choose.randrange(1, 500)), 2),
        (lambda: world.anchor(len(world.entries)), 1),
    ]
    while len(world.entries) < events:
        choose.choices([step for step, _ in steps], [weight for _, weight in steps])[0]()
    return world.entries


def random_shares(choose: random.Random, people: Sequence[str]) -> tuple[dict[str, int], int]:
    chosen = choose.sample(list(people), choose.randrange(0, len(people)))
    cuts = sorted(choose.sample(range(1, 1_000_000), len(chosen)))
    shares = {who: high - low for who, low, high in zip(chosen, [0, *cuts], cuts, strict=False)}
    return shares, 1_000_000 - sum(shares.values())
