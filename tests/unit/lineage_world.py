"""One answer's whole life as signed events, with a log that signs it, in memory.

Built from raw envelopes and not through the aggregates, so that a test can make a log that lies:
`tell(lies)` takes, per event type, a change to the body, another signer, or None to leave it out.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from nacl.signing import SigningKey

from ledger.chain.payouts import PayoutTree, build_payout_tree, load_payout_tree
from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import Entry, decode_entry, sign_event
from ledger.domain.fees import fee_wei
from ledger.domain.ids import actor_of
from ledger.domain.rows import DataRow, rows_root
from ledger.log.ancestry import Thing
from ledger.log.bundle import Bundler
from ledger.log.sequencer import Sequencer
from ledger.log.signer import LogSigner
from ledger.ports import EntryLog, StoredCheckpoint
from ledger.verify.note import format_vkey
from tests.fakes import MemoryBlobStore, MemoryEntryLog, MemoryTileStore

ORIGIN = "ledger.example/test"
NOW = 1_700_000_000_000_000
H = "ab" * 32
BASE, CONFIG, ADAPTER, INDEX = ("01" * 32, "02" * 32, "03" * 32, "04" * 32)
LICENCE = "CC-BY-4.0"

Change = Callable[[dict[str, Any]], dict[str, Any]]

# Of those who earn something: ann and ben contributed, dev owns the adapter.
ADDRESSES = {"ann": "0x" + "a1" * 20, "ben": "0x" + "b2" * 20, "dev": "0x" + "d3" * 20}


def name(what: str) -> str:
    return str(uuid5(NAMESPACE_URL, what))


def key(who: str) -> SigningKey:
    return SigningKey(sha256(who.encode()).digest())


def actor(who: str) -> str:
    return actor_of(bytes(key(who).verify_key))


def rows(who: str, count: int = 3) -> list[DataRow]:
    return [
        DataRow(prompt=f"{who} {n}?", completion=f"{n}.", salt=f"{n:032x}") for n in range(count)
    ]


def manifest(**changes: Any) -> bytes:
    """The training manifest over all rows of ann's and ben's contributions."""
    value = {
        "v": 1,
        "rows": [
            {"contribution": name(who), "row": n, "row_hash": row.hash.hex()}
            for who in ("ann", "ben")
            for n, row in enumerate(rows(who))
        ],
        "base_sha256": BASE,
        "adapter_sha256": ADAPTER,
        "config_sha256": CONFIG,
        "steps": 7,
        "losses": ["1.5"],
        **changes,
    }
    return canonical_json(value)


class World:
    """A log, its sequencer and its bundler. `lies` maps an event type to a change of its body."""

    def __init__(self, folder: Path, *, origin: str = ORIGIN) -> None:
        self.origin = origin
        self.log = MemoryEntryLog()
        self.tiles = MemoryTileStore()
        self.blobs = MemoryBlobStore()
        self.signer = LogSigner(origin=origin, key=key("log"), state_path=folder / "signer.json")
        self.vkey = format_vkey(self.signer.vkey)
        self.sequencer = Sequencer(
            log=self.log, tiles=self.tiles, signer=self.signer, clock=lambda: NOW
        )
        self.ids: dict[str, UUID] = {}

    def add(self, who: str, type: str, body: Mapping[str, Any], *, label: str = "") -> int:
        id = UUID(name(f"event {len(self.ids)} {type}"))
        self.ids[label or type] = id
        raw = sign_event(key(who), type=type, log=self.origin, body=body, id=id, at=NOW)
        return self.log.append(raw, event_id=id, recorded_at=NOW)

    def checkpoint(self) -> StoredCheckpoint:
        """Sign all there is."""
        while self.sequencer.step():
            pass
        latest = self.tiles.latest()
        assert latest
        return latest

    def bundler(self) -> Bundler:
        return Bundler(
            log=self.log,
            tiles=self.tiles,
            blobs=self.blobs,
            index=ScannedIndex(self.log),
            vkey=self.signer.vkey,
            prove_payout=prove_payout,
        )

    def index_of(self, label: str) -> int:
        index = self.log.index_of(str(self.ids[label]))
        assert index is not None, label
        return index

    def bundle(self, label: str = "inference.recorded", **asked: Any) -> bytes:
        return self.bundler().bundle(self.index_of(label), **asked)

    def tell(
        self,
        lies: Mapping[str, Change | None] | None = None,
        signers: Mapping[str, str] | None = None,
        *,
        training: bytes | None = None,
    ) -> "World":
        """The story, event by event. A lie of None leaves the event out; keys are labels."""
        lies, signers = lies or {}, signers or {}
        training = manifest() if training is None else training
        if lies.get("run.completed", len):
            self.blobs.put(training)
        return self._tell(story(sha256(training).hexdigest()), lies, signers)

    def tell_consent(
        self,
        lies: Mapping[str, Change | None] | None = None,
        signers: Mapping[str, str] | None = None,
    ) -> "World":
        """The same for `consent_story`, after `tell`."""
        return self._tell(consent_story(), lies or {}, signers or {})

    def _tell(
        self,
        told: Mapping[str, tuple[str, str, dict[str, Any]]],
        lies: Mapping[str, Change | None],
        signers: Mapping[str, str],
    ) -> "World":
        for label, (who, type, body) in told.items():
            change = lies.get(label, lambda body: body)
            if change is not None:
                self.add(signers.get(label, who), type, change(dict(body)), label=label)
        return self


class ScannedIndex:
    """`ledger.log.ancestry.EventIndex` by reading the whole log each time: slow and plain."""

    def __init__(self, log: EntryLog) -> None:
        self._log = log

    def position(self) -> int:
        return self._log.size()

    def entries(self, before: int | None = None) -> Iterator[Entry]:
        for data in self._log.entries(0, self._log.size() if before is None else before):
            yield decode_entry(data, verify=False)

    def firsts(self, wanted: Collection[Thing]) -> dict[Thing, int]:
        found: dict[Thing, int] = {}
        for entry in self.entries():
            event = entry.envelope
            for field, value in {**event.body, "actor": event.actor, "log": event.log}.items():
                thing = (event.type, field, str(value))
                if thing in wanted:
                    found.setdefault(thing, entry.index)
        return found

    def bindings(self, account: str) -> list[int]:
        return [
            entry.index
            for entry in self.entries()
            if entry.envelope.type == "identity.evm_bound"
            and entry.envelope.body["address"].lower() == account
        ]

    def settlements(self, before: int) -> list[int]:
        types = ("period.cutoff", "payout.vetoed", "period.abandoned")
        return [e.index for e in self.entries(before + 1) if e.envelope.type in types]

    def earnings(self, owners: Collection[str], before: int, limit: int) -> list[int]:
        found = []
        contributor_of: dict[str, str] = {}
        for entry in self.entries(before):
            event = entry.envelope
            if event.type == "contribution.recorded":
                contributor_of[event.body["contribution"]] = event.actor
            if event.type == "fee.charged":
                earners = {event.body["owner"], event.actor}
            elif event.type == "attribution.recorded":
                earners = {share["contributor"] for share in event.body["shares"]}
            elif event.type in ("contribution.held", "contribution.released"):
                earners = {contributor_of[event.body["contribution"]]}
            else:
                continue
            if earners & set(owners):
                found.append(entry.index)
        return found[:limit]

    def claimed_period(self, account: str, cumulative_wei: int, before: int) -> int | None:
        periods = [
            entry.envelope.body["period"]
            for entry in self.entries(before)
            if entry.envelope.type == "payout.activated"
            and TREES[entry.envelope.body["root"]].amounts.get(account) == cumulative_wei
        ]
        return max(periods, default=None)


TREES: dict[str, PayoutTree] = {}
"""The payout trees of `settled`, by root."""


def prove_payout(dump: dict[str, Any], account: str) -> dict[str, Any]:
    tree = load_payout_tree(dump)
    return {
        "cumulative_wei": str(tree.amount(account)),
        "proof": ["0x" + node.hex() for node in tree.proof(account)],
    }


def story(manifest_sha256: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """(signer, type, body) by label, in log order."""
    told: dict[str, tuple[str, str, dict[str, Any]]] = {
        "datanet.created": (
            "owner",
            "datanet.created",
            {
                "datanet": name("net"), "name": "docs", "description": "", "licence": LICENCE,
                "reviewers": [actor("reviewer")],
            },
        ),
    }  # fmt: skip
    for who in ("ann", "ben"):
        mine = {"contribution": name(who), "datanet": name("net")}
        told[f"recorded {who}"] = (
            who,
            "contribution.recorded",
            {
                **mine, "licence": LICENCE, "rows_root": rows_root(rows(who)).hex(),
                "rows_count": 3, "rows_sha256": H, "title": f"rows of {who}",
            },
        )  # fmt: skip
        told[f"approved {who}"] = ("reviewer", "contribution.approved", {**mine, "note": ""})
    told["run.requested"] = (
        "dev",
        "run.requested",
        {
            "run": name("run"), "name": "a run", "datanets": [name("net")], "base_model": BASE,
            "base_id": "tiny", "config": {"r": 8},
        },
    )  # fmt: skip
    told["run.completed"] = (
        "worker",
        "run.completed",
        {
            "run": name("run"), "attempt": 1, "manifest_sha256": manifest_sha256,
            "adapter_sha256": ADAPTER, "adapter_config_sha256": CONFIG, "index_sha256": INDEX,
            "index_root": H, "rows_count": 6, "contributions_count": 2, "steps": 7, "loss": "1.5",
        },
    )  # fmt: skip
    told["adapter.published"] = (
        "dev",
        "adapter.published",
        {
            "adapter": name("adapter"), "run": name("run"), "model": "dev/answers",
            "adapter_sha256": ADAPTER, "base_model": BASE, "input_wei_per_token": "10",
            "output_wei_per_token": "20",
        },
    )  # fmt: skip
    fee = fee_wei(5, 4, input_wei_per_token=10, output_wei_per_token=20)
    told["inference.recorded"] = (
        "operator",
        "inference.recorded",
        {
            "inference": name("inference"), "adapter": name("adapter"),
            "consumer": actor("consumer"), "prompt_commitment": H, "output_commitment": H,
            "transcript_sha256": H, "prompt_tokens": 5, "completion_tokens": 4, "max_tokens": 16,
            "seed": 1, "temperature_ppm": 0, "top_p_ppm": 1_000_000, "finish_reason": "stop",
            "fee_wei": str(fee),
        },
    )  # fmt: skip
    told["fee.charged"] = (
        "operator",
        "fee.charged",
        {
            "account": actor("consumer"), "inference": name("inference"),
            "adapter": name("adapter"), "policy_version": 1, "amount_wei": str(fee),
            "protocol_wei": "30", "owner": actor("dev"), "owner_wei": "20", "operator_wei": "0",
            "contributors_wei": str(fee - 50),
        },
    )  # fmt: skip
    told["attribution.recorded"] = (
        "worker",
        "attribution.recorded",
        {
            "inference": name("inference"), "adapter": name("adapter"), "run": name("run"),
            "method": "ekfac", "index_sha256": INDEX, "evidence_sha256": H,
            "shares": [
                {"contributor": actor("ann"), "ppm": 600_000},
                {"contributor": actor("ben"), "ppm": 300_000},
            ],
            "unattributed_ppm": 100_000,
        },
    )  # fmt: skip
    return told


def consent_story() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """What may follow on `story`: a policy, a hold and its end, appeals, a withdrawal, a recall."""
    net, ann = {"datanet": name("net")}, {"contribution": name("ann"), "datanet": name("net")}
    limits = {
        "max_rows_per_contribution": 10, "max_contributions_per_day": 2, "max_rows_per_day": 20,
    }  # fmt: skip
    held = {**ann, "reason": "junk", "note": "see", "evidence_sha256": None}
    recalled = {"adapter": name("adapter"), **ann, "reason": "withdrawn"}
    return {
        "policy": ("owner", "datanet.policy_set", {**net, **limits, "on_withdrawal": "retire"}),
        "held": ("worker", "contribution.held", held),
        "released": ("reviewer", "contribution.released", {**ann, "note": "a mistake"}),
        "appealed": ("ann", "cluster.appealed", {**ann, "row": 2, "reason": "my own words"}),
        "split": ("reviewer", "cluster.split", {**ann, "row": 2, "note": "so it is"}),
        "appealed again": ("ann", "cluster.appealed", {**ann, "row": 0, "reason": "this, too"}),
        "upheld": ("owner", "cluster.upheld", {**ann, "row": 0, "note": "no"}),
        "withdrawn": ("ann", "contribution.withdrawn", {**ann, "reason": "mine"}),
        "recalled": ("worker", "adapter.recalled", recalled),
    }


def paid_after_a_hold(world: World, *, released: bool, claims_all: bool = False) -> bytes:
    """Go on from `story`: ann is held, a second answer earns her 40 wei more than the 48 before,
    the hold ends or not, a period closes. The bundle of her payout, which is honest unless
    `claims_all` has her paid while the hold lasts."""
    world.add(*consent_story()["held"], label="held")
    world.add("ann", "identity.evm_bound", {"address": ADDRESSES["ann"], "signature": "0x"})
    _answer_again(world)
    if released:
        world.add(*consent_story()["released"], label="released")
    tree = build_payout_tree({ADDRESSES["ann"]: 88 if released or claims_all else 48})
    _pay(world, 1, tree, keep=True)
    world.checkpoint()
    return world.bundle("period.closed 1", account=ADDRESSES["ann"])


def settled(world: World, *, keep_trees: bool = False) -> tuple[PayoutTree, PayoutTree]:
    """Go on from `story`: addresses, a period with payouts that ann claims, a second answer of
    which ann gets all that is attributed, a second period; the two payout trees. Amounts follow
    from the events, and are written out here by hand. `keep_trees` puts the trees among the blobs,
    where a bundler looks for them."""
    for who, address in ADDRESSES.items():
        # As a wallet writes it: letter case is the checksum, and means nothing to the ledger.
        body = {"address": "0x" + address[2:].upper(), "signature": "0x" + "00" * 65}
        world.add(who, "identity.evm_bound", body, label=f"bound {who}")
    trees = []
    claimed_wei = 0
    for period, due in (
        (1, {"ann": 48, "ben": 24, "dev": 20}),
        (2, {"ann": 88, "ben": 24, "dev": 40}),
    ):
        if period == 2:
            _answer_again(world)
        tree = build_payout_tree({ADDRESSES[who]: wei for who, wei in due.items()})
        _pay(world, period, tree, keep=keep_trees)
        tree_wei = tree.amount(ADDRESSES["ann"])
        claim = {
            "address": ADDRESSES["ann"], "amount_wei": str(tree_wei - claimed_wei),
            "cumulative_wei": str(tree_wei), **on_chain(f"claim {period}"), "log_index": 0,
        }  # fmt: skip
        world.add("operator", "payout.claimed", claim, label=f"payout.claimed {period}")
        claimed_wei = tree_wei
        trees.append(tree)
    return trees[0], trees[1]


def on_chain(what: str) -> dict[str, Any]:
    return {
        "chain_id": 31337,
        "contract": "0x" + "12" * 20,
        "tx_hash": "0x" + sha256(what.encode()).hexdigest(),
        "block_number": 7,
    }


def _answer_again(world: World) -> None:
    """The story's answer once more, as inference "again", attributed to ann and nobody."""
    told = story("00" * 32)
    for label in ("inference.recorded", "fee.charged", "attribution.recorded"):
        who, type, body = told[label]
        body = {**body, "inference": name("again")}
        if label == "attribution.recorded":
            body["shares"] = [{"contributor": actor("ann"), "ppm": 500_000}]
            body["unattributed_ppm"] = 500_000
        world.add(who, type, body, label=f"{label} again")


def _pay(world: World, period: int, tree: PayoutTree, *, keep: bool) -> None:
    root = "0x" + tree.root.hex()
    TREES[root] = tree
    tree_sha256 = world.blobs.put(canonical_json(tree.dump())) if keep else H
    closed = {
        "period": period, "log_size": world.log.size(), "root": root, "total_wei": str(tree.total),
        "accounts": len(tree.amounts), "tree_sha256": tree_sha256,
    }  # fmt: skip
    for type, body in (
        ("period.cutoff", {"period": period}),
        ("period.closed", closed),
        ("payout.proposed", {"period": period, "root": root, **on_chain(f"propose {period}")}),
        ("payout.activated", {"period": period, "root": root, **on_chain(f"activate {period}")}),
    ):
        world.add("operator", type, body, label=f"{type} {period}")
