"""What the events of a bundle claim of each other: the graph of one answer. Pure.

::

    attribution.recorded ---.
    fee.charged -----------. \\
                            v v
    inference.recorded -> adapter.published -> run.completed -> run.requested -> datanet.created
                                                    |                                 ^
                                                    '-> manifest (blob) -> contribution.recorded
                                                                               ^      |
                                                        contribution.approved -'------'

Every arrow must end at an event of the bundle that stands *earlier* in the log, and the two ends
must agree. These are the rules that `ledger.aggregates` enforced when the events were appended;
here a stranger enforces them again. Not repeated, because absence cannot be shown by inclusion: who
held which role at the time, and that nothing was withdrawn or retired before.

`tests/unit/test_verify_lineage.py` breaks each rule once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NoReturn
from uuid import UUID

from ledger.domain.envelope import Entry
from ledger.domain.events import CREATES, references
from ledger.domain.fees import fee_wei
from ledger.errors import Inconsistent, MalformedProof
from ledger.verify.encoding import printable
from ledger.verify.manifest import Manifest, parse_manifest, rows_match

MAX_RUNS = 16
"""Completed runs in one bundle: each costs a walk over its contributions."""
MANIFEST = "body.manifest_sha256"


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The checked graph. `contributions` are those that the subject rests on, by id; of the
    `partial` ones the run used only some rows, which are therefore not bound to `rows_root`.

    About the bundle as a whole: `recorded` has its contribution.recorded by contribution,
    `manifests` the training manifest of each completed run by run, `published` the first
    adapter.published by run, `closed` the first period.closed by period."""

    subject: Entry
    run: Entry | None = None
    adapter: Entry | None = None
    inference: Entry | None = None
    attribution: Entry | None = None
    fee: Entry | None = None
    contributions: Mapping[str, Entry] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    rows_count: int = 0
    recorded: Mapping[str, Entry] = field(default_factory=dict)
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    published: Mapping[str, Entry] = field(default_factory=dict)
    closed: Mapping[int, Entry] = field(default_factory=dict)


def check_lineage(entries: Sequence[Entry], blobs: Mapping[str, bytes], subject: UUID) -> Lineage:
    """Check every rule between the entries (ascending, envelopes verified) and their blobs.

    Raises Inconsistent or MalformedProof; the message and `detail` name entry and field.
    """
    _check_blobs(entries, blobs)
    if sum(entry.envelope.type == "run.completed" for entry in entries) > MAX_RUNS:
        raise MalformedProof(f"a bundle has at most MAX_RUNS = {MAX_RUNS} completed runs")
    graph = _Graph(entries, blobs)
    for entry in entries:
        for name, kind, id in references(entry.envelope.type, entry.envelope.body):
            graph.created(entry, f"body.{name}", kind, id)
        rule = _RULES.get(entry.envelope.type)
        if rule:
            rule(graph, entry)
    return _around(graph, entries, subject)


class _Graph:
    """The entries by id and by what they are about. Every look-up costs the same however large the
    bundle is, so that a hostile one cannot buy much time."""

    def __init__(self, entries: Sequence[Entry], blobs: Mapping[str, bytes]) -> None:
        self._blobs = blobs
        self._ids: dict[UUID, Entry] = {}
        self._first: dict[tuple[str, str, str], Entry] = {}
        self._manifests: dict[str, Manifest] = {}
        self._trained_on: dict[UUID, dict[str, Entry]] = {}
        for entry in entries:
            event = entry.envelope
            if self._ids.setdefault(event.id, entry) is not entry:
                fail(entry, "id", f"event {event.id} stands in the log twice")
            for kind in CREATES:
                if kind in event.body:
                    self._place(entry, kind)

    def _place(self, entry: Entry, kind: str) -> None:
        event = entry.envelope
        first = self._first.setdefault((event.type, kind, event.body[kind]), entry)
        if first is not entry and ONCE.get(event.type) == kind:
            fail(entry, f"body.{kind}", f"repeats entry {first.index}; this happens only once")

    def event(self, id: UUID) -> Entry | None:
        return self._ids.get(id)

    def first(
        self, event_type: str, kind: str, id: str, *, before: Entry | None = None
    ) -> Entry | None:
        """The first event of a type about a thing, if it stands before another event."""
        found = self._first.get((event_type, kind, id))
        return found if found and (before is None or found.index < before.index) else None

    def created(self, entry: Entry, field: str, kind: str, id: str) -> Entry:
        """The event that made what `entry` refers to."""
        found = self.first(CREATES[kind], kind, id, before=entry)
        if not found:
            fail(
                entry,
                field,
                f"names {kind} {id}, but no earlier {CREATES[kind]} of it is in the bundle",
            )
        return found

    def completed(self, entry: Entry) -> Entry:
        """The run.completed before `entry`, whose body names the run."""
        found = self.first("run.completed", "run", entry.envelope.body["run"], before=entry)
        if not found:
            fail(entry, "body.run", "no earlier run.completed of it is in the bundle")
        return found

    def manifest(self, completed: Entry) -> Manifest:
        """The training manifest that a run.completed names."""
        name = completed.envelope.body["manifest_sha256"]
        if name not in self._blobs:
            fail(completed, MANIFEST, "the training manifest of that hash is not in the bundle")
        if name not in self._manifests:
            try:
                self._manifests[name] = parse_manifest(self._blobs[name])
            except MalformedProof as error:
                raise MalformedProof(
                    f"entry {completed.index} ({completed.envelope.type}), {MANIFEST}: {error}",
                    entry=completed.index,
                    field=MANIFEST,
                ) from error
        return self._manifests[name]

    def trained_on(self, completed: Entry) -> dict[str, Entry]:
        """contribution.recorded by contribution id, for every contribution of a run's manifest."""
        id = completed.envelope.id
        if id not in self._trained_on:
            self._trained_on[id] = {
                contribution: self.created(completed, MANIFEST, "contribution", contribution)
                for contribution in self.manifest(completed).rows
            }
        return self._trained_on[id]


# Event types that happen at most once for the thing they are about.
ONCE: Mapping[str, str] = {
    **{event_type: kind for kind, event_type in CREATES.items()},
    "contribution.approved": "contribution",
    "run.completed": "run",
    "attribution.recorded": "inference",
    "fee.charged": "inference",
}


def _check_blobs(entries: Sequence[Entry], blobs: Mapping[str, bytes]) -> None:
    """Each blob hashes to its name, and some event names it."""
    bodies = (entry.envelope.body for entry in entries)
    named = {value for body in bodies for value in body.values() if isinstance(value, str)}
    for name, data in blobs.items():
        actual = sha256(data).hexdigest()
        if actual != name:
            raise Inconsistent(f"blob {name} hashes to {actual}: altered", field=f"blobs.{name}")
        if name not in named:
            raise Inconsistent(f"no event here names blob {name}", field=f"blobs.{name}")


def _approved(graph: _Graph, entry: Entry) -> None:
    body = entry.envelope.body
    recorded = graph.created(entry, "body.contribution", "contribution", body["contribution"])
    datanet = graph.created(entry, "body.datanet", "datanet", body["datanet"])
    _agree(entry, "datanet", recorded)
    actor = entry.envelope.actor
    if actor not in {datanet.envelope.actor, *datanet.envelope.body["reviewers"]}:
        fail(entry, "actor", "is neither owner nor reviewer of the datanet")
    if actor == recorded.envelope.actor:
        fail(entry, "actor", "approves their own contribution")


def _about_contribution(graph: _Graph, entry: Entry) -> Entry:
    """The contribution.recorded of what an event speaks of, whose datanet must be the event's."""
    id = entry.envelope.body["contribution"]
    recorded = graph.created(entry, "body.contribution", "contribution", id)
    _agree(entry, "datanet", recorded)
    return recorded


def _held(graph: _Graph, entry: Entry) -> None:
    if entry.envelope.actor == _about_contribution(graph, entry).envelope.actor:
        fail(entry, "actor", "holds their own contribution")


def _appealed(graph: _Graph, entry: Entry) -> None:
    recorded = _about_row(graph, entry)
    if entry.envelope.actor != recorded.envelope.actor:
        fail(entry, "actor", "is not the contributor")


def _judged(graph: _Graph, entry: Entry) -> None:
    recorded = _about_row(graph, entry)
    if entry.envelope.actor == recorded.envelope.actor:
        fail(entry, "actor", "decides their own appeal")


def _about_row(graph: _Graph, entry: Entry) -> Entry:
    recorded = _about_contribution(graph, entry)
    if entry.envelope.body["row"] >= recorded.envelope.body["rows_count"]:
        fail(entry, "body.row", "is beyond the contribution's last row")
    return recorded


def _recorded(graph: _Graph, entry: Entry) -> None:
    datanet = graph.created(entry, "body.datanet", "datanet", entry.envelope.body["datanet"])
    _agree(entry, "licence", datanet)


def _completed(graph: _Graph, entry: Entry) -> None:
    body = entry.envelope.body
    requested = graph.created(entry, "body.run", "run", body["run"])
    manifest, contributions = graph.manifest(entry), graph.trained_on(entry)
    for name, have, want in (
        ("body.contributions_count", body["contributions_count"], len(contributions)),
        ("body.rows_count", body["rows_count"], manifest.rows_count),
        ("body.steps", body["steps"], manifest.summary["steps"]),
        ("body.adapter_sha256", body["adapter_sha256"], manifest.summary["adapter_sha256"]),
        ("body.adapter_config_sha256", body["adapter_config_sha256"],
         manifest.summary["config_sha256"]),
        (MANIFEST, requested.envelope.body["base_model"], manifest.summary["base_sha256"]),
    ):  # fmt: skip
        if have != want or type(have) is not type(want):  # in JSON, true is not 1
            fail(entry, name, f"the training manifest says {printable(str(want))}, not {have}")
    datanets = set(requested.envelope.body["datanets"])
    for id, recorded in contributions.items():
        if recorded.envelope.body["datanet"] not in datanets:
            fail(entry, MANIFEST, f"contribution {id} is of a datanet the run did not ask for")
        if not graph.first("contribution.approved", "contribution", id, before=entry):
            fail(entry, MANIFEST, f"no earlier approval of contribution {id} is in the bundle")
        if rows_match(manifest.rows[id], recorded.envelope.body) is False:
            fail(entry, MANIFEST, f"its rows of contribution {id} are not those of its rows_root")


def _published(graph: _Graph, entry: Entry) -> None:
    requested = graph.created(entry, "body.run", "run", entry.envelope.body["run"])
    completed = graph.completed(entry)
    _agree(entry, "adapter_sha256", completed)
    _agree(entry, "base_model", requested)
    if entry.envelope.actor != requested.envelope.actor:
        fail(entry, "actor", "is not the actor that requested the run")


def _answered(graph: _Graph, entry: Entry) -> None:
    body = entry.envelope.body
    adapter = graph.created(entry, "body.adapter", "adapter", body["adapter"])
    price = fee_wei(
        body["prompt_tokens"],
        body["completion_tokens"],
        input_wei_per_token=int(adapter.envelope.body["input_wei_per_token"]),
        output_wei_per_token=int(adapter.envelope.body["output_wei_per_token"]),
    )
    if int(body["fee_wei"]) != price:
        fail(entry, "body.fee_wei", f"at the adapter's prices the fee is {price}")


def _attributed(graph: _Graph, entry: Entry) -> None:
    body = entry.envelope.body
    inference = graph.created(entry, "body.inference", "inference", body["inference"])
    adapter = graph.created(entry, "body.adapter", "adapter", body["adapter"])
    _agree(entry, "adapter", inference)
    _agree(entry, "run", adapter)
    completed = graph.completed(entry)
    _agree(entry, "index_sha256", completed)
    contributors = {e.envelope.actor for e in graph.trained_on(completed).values()}
    for n, share in enumerate(body["shares"]):
        if share["contributor"] not in contributors:
            fail(
                entry,
                f"body.shares[{n}].contributor",
                f"{share['contributor']} contributed nothing that the run was trained on",
            )


def _charged(graph: _Graph, entry: Entry) -> None:
    body = entry.envelope.body
    inference = graph.created(entry, "body.inference", "inference", body["inference"])
    adapter = graph.created(entry, "body.adapter", "adapter", body["adapter"])
    _agree(entry, "adapter", inference)
    _agree(entry, "account", inference, "consumer")
    _agree(entry, "amount_wei", inference, "fee_wei")
    if body["owner"] != adapter.envelope.actor:
        fail(entry, "body.owner", "is not who published the adapter")


_RULES: Mapping[str, Callable[[_Graph, Entry], object]] = {
    "contribution.recorded": _recorded,
    "contribution.approved": _approved,
    "contribution.held": _held,
    "contribution.released": _about_contribution,
    "cluster.appealed": _appealed,
    "cluster.split": _judged,
    "cluster.upheld": _judged,
    "run.completed": _completed,
    "adapter.published": _published,
    "adapter.recalled": _about_contribution,
    "inference.recorded": _answered,
    "attribution.recorded": _attributed,
    "fee.charged": _charged,
}


def _agree(entry: Entry, field: str, other: Entry, other_field: str | None = None) -> None:
    """`entry`'s body field must equal that of an event it rests on."""
    have, want = entry.envelope.body[field], other.envelope.body[other_field or field]
    if have != want:
        fail(
            entry,
            f"body.{field}",
            f"is {have}, but entry {other.index} ({other.envelope.type}) has {want}",
        )


def fail(entry: Entry, field: str, problem: str) -> NoReturn:
    raise Inconsistent(
        f"entry {entry.index} ({entry.envelope.type}), {field}: {problem}",
        entry=entry.index,
        field=field,
    )


def _around(graph: _Graph, entries: Sequence[Entry], subject: UUID) -> Lineage:
    """What stands around the subject, for the verdict's sentences, and what the bundle holds."""
    entry = graph.event(subject)
    if entry is None:
        raise Inconsistent(f"the bundle's subject, event {subject}, is not in it", field="subject")

    def first(event_type: str, kind: str, owner: Entry | None) -> Entry | None:
        id = owner.envelope.body.get(kind) if owner else None
        return graph.first(event_type, kind, id) if isinstance(id, str) else None

    inference = first("inference.recorded", "inference", entry)
    adapter = first("adapter.published", "adapter", inference or entry)
    completed = first("run.completed", "run", adapter or entry)
    rows = graph.manifest(completed).rows if completed else {}
    contributions = graph.trained_on(completed) if completed else {}
    partial = frozenset(
        id
        for id, recorded in contributions.items()
        if len(rows[id]) < recorded.envelope.body["rows_count"]
    )
    return Lineage(
        subject=entry,
        run=completed,
        adapter=adapter,
        inference=inference,
        attribution=first("attribution.recorded", "inference", inference),
        fee=first("fee.charged", "inference", inference),
        contributions=contributions,
        partial=partial,
        rows_count=sum(map(len, rows.values())),
        recorded=_by(entries, "contribution.recorded", "contribution"),
        manifests={
            run: graph.manifest(completed)
            for run, completed in _by(entries, "run.completed", "run").items()
        },
        published=_by(entries, "adapter.published", "run"),
        closed=_by(entries, "period.closed", "period"),
    )


def _by(entries: Sequence[Entry], event_type: str, field: str) -> dict[Any, Entry]:
    """The first event of a type for each value of a body field."""
    found: dict[Any, Entry] = {}
    for entry in entries:
        if entry.envelope.type == event_type:
            found.setdefault(entry.envelope.body[field], entry)
    return found
