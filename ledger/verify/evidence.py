"""Judge an evidence file: what its bytes prove against a log, and what is only its finder's word.
Pure.

`check_evidence` re-proves everything offline, under the log's key, so that neither finder nor log
has to be believed. Three results are possible. *Conclusive*: the log's own signatures contradict
each other or its rules, whoever shows them. *Testimony*: the signatures check, but what makes them
a fault (that a smaller tree was shown later, that a file was missing) nobody signed; it is the
finder's word, and the verdict says so. Anything else is a `VerificationError`: the file proves
nothing, whatever it claims.

Two forms of proof carry most of it. An entry under a signed root (`proof` is a tlog-proof file)
shows what the log holds at an index. And `nodes`, the hashes of which RFC 9162 section 2.1.4 makes
a consistency proof, with none left out: they lead to the newer root, so they *are* that tree's
(SHA-256 has no collisions), and they also yield the root that its beginning has. If the log signed
another one for that size, it forked; no leaf needs to be shown.

`tests/unit/test_verify_evidence.py` makes each kind, alters it, and tries to frame an honest log.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ledger.domain.canonical import parse_canonical
from ledger.domain.envelope import ENTRY_HEADER_BYTES, decode_entry, leaf_hash, node_hash
from ledger.domain.events import CATALOGUE, check_body
from ledger.domain.ids import check_address
from ledger.errors import (
    BadSignature,
    Inconsistent,
    InvalidEvent,
    LedgerError,
    MalformedProof,
    VerificationError,
)
from ledger.verify.checkpoint import Checkpoint, OpenedCheckpoint, open_checkpoint
from ledger.verify.encoding import printable
from ledger.verify.evidence_format import (
    FORMAT,
    MAX_EVIDENCE_BYTES,
    SHAPES,
    Evidence,
    format_evidence,
    one_line,
    parse_evidence,
)
from ledger.verify.fields import count_of, hash_of, object_of, text_of
from ledger.verify.merkle import HASH_BYTES, MAX_CONSISTENCY_HASHES
from ledger.verify.note import COSIGNATURE, Verified, VerifierKey, parse_vkey
from ledger.verify.policy import parse_policy
from ledger.verify.tiles import parse_tile_path
from ledger.verify.tlog_proof import parse_tlog_proof, verify_tlog_proof
from ledger.verify.verdict import Step, Verdict

__all__ = [
    "FORMAT",
    "MAX_EVIDENCE_BYTES",
    "SHAPES",
    "Evidence",
    "check_evidence",
    "entry_fault",
    "format_evidence",
    "one_line",
    "parse_evidence",
    "prefix_roots",
]

STEP_NAMES = {1: "log key", 2: "signatures", 3: "claim"}
_ANCHOR_FIELDS = ("chain_id", "contract", "size", "root", "section")


@dataclass(kw_only=True)
class _Finding:
    """What the judge of one kind found. `testimony` is what only the finder vouches for; none means
    that the evidence is conclusive."""

    proven: list[str]
    testimony: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """An evidence file under the key that it is judged by."""

    log: str
    key: VerifierKey
    items: Mapping[str, bytes]

    def open(self, name: str, *witnesses: VerifierKey) -> OpenedCheckpoint:
        return open_checkpoint(self.items[name], self.key, origin=self.log, witnesses=witnesses)

    def head(self, name: str = "checkpoint") -> Checkpoint:
        return self.open(name).checkpoint

    def included(self, proof: str, leaf: bytes) -> tuple[int, Checkpoint]:
        """The index at which the signed tree of the tlog-proof item holds this leaf hash."""
        if parse_tlog_proof(self.items[proof]).extra is not None:
            raise MalformedProof(f"items.{proof} has an extra line, which nothing authenticates")
        found, opened = verify_tlog_proof(self.items[proof], leaf, self.key, origin=self.log)
        return found.index, opened.checkpoint


def check_evidence(evidence: Evidence, trusted_vkey: str | None = None) -> Verdict:
    """Re-prove what the saved bytes prove; the verdict also says what is only testimony.

    1. The log's key is `trusted_vkey`, if given (else the file's own, which is then to be trusted).
    2. Every signature that the kind needs checks under it.
    3. The claim of the kind holds.

    `facts["conclusive"]` is whether the bytes alone, with the log's key, show that the log (for
    `witness-conflict`: the witness too) broke a rule. Raises a VerificationError when they show
    nothing of the kind, and nothing else, whatever the items hold.
    """
    key = _log_key(evidence.vkey, trusted_vkey)
    case = _Case(log=evidence.log, key=key, items=evidence.items)
    finding = _JUDGES[evidence.kind](case)
    conclusive = not finding.testimony
    own = (
        f"That the key you gave is that of the log {printable(evidence.log)}."
        if trusted_vkey is not None
        else f"The log's key came from the evidence file itself: compare id {key.id.hex()} of "
        f"{printable(key.name)} with one that you got elsewhere."
    )
    signed = ", ".join(sorted(evidence.items))
    said = f"{evidence.kind}: " + ("shown by the bytes alone" if conclusive else "testimony")
    return Verdict(
        steps=(
            _step(1, f"{printable(key.name)} ({key.id.hex()})"),
            _step(2, f"checked what is signed in {signed}"),
            _step(3, said),
        ),
        proven=tuple(finding.proven),
        trusted=(own, *finding.trusted, *(f"Testimony: {line}" for line in finding.testimony)),
        facts={
            "kind": evidence.kind,
            "log": evidence.log,
            "vkey": evidence.vkey,
            "found_at": evidence.found_at,
            "conclusive": conclusive,
            **finding.facts,
        },
    )


def _step(number: int, detail: str) -> Step:
    return Step(number=number, name=STEP_NAMES[number], status="ok", detail=detail)


def _log_key(vkey: str, trusted_vkey: str | None) -> VerifierKey:
    key = parse_vkey(vkey)
    if trusted_vkey is not None and parse_vkey(trusted_vkey.strip()) != key:
        raise BadSignature(
            f"the evidence is against the key {printable(vkey, 200)}, you asked for "
            f"{printable(trusted_vkey, 200)}: another log's, or made up",
            field="vkey",
        )
    return key


# --- maths ---


def prefix_roots(size1: int, size2: int, nodes: list[bytes]) -> tuple[bytes, bytes]:
    """Roots of the first `size1` leaves and of all `size2`, as `nodes` yield them.

    `nodes` are the hashes of a consistency proof (RFC 9162 section 2.1.4.1, `SUBPROOF` with b
    false throughout: the subtree it starts from is never left out), deepest first. Needs
    0 < size1 < size2. Raises MalformedProof when there are too few or too many.
    """
    if not 0 < size1 < size2 or len(nodes) > MAX_CONSISTENCY_HASHES:
        raise MalformedProof(f"no {len(nodes)} nodes lead from size {size1} to size {size2}")
    left = list(nodes)
    roots = _subtree_roots(size1, size2, left)
    if left:
        raise MalformedProof(f"{len(left)} nodes more than lead from {size1} to {size2} leaves")
    return roots


def _subtree_roots(m: int, n: int, nodes: list[bytes]) -> tuple[bytes, bytes]:
    if not nodes:
        raise MalformedProof("fewer nodes than lead from the older tree to the newer")
    node = nodes.pop()
    if m == n:
        return node, node
    split = 1 << (n - 1).bit_length() - 1
    if m <= split:
        old, new = _subtree_roots(m, split, nodes)
        return old, node_hash(new, node)
    old, new = _subtree_roots(m - split, n - split, nodes)
    return node_hash(node, old), node_hash(node, new)


def _nodes(data: bytes, name: str) -> list[bytes]:
    if len(data) % HASH_BYTES or len(data) > MAX_CONSISTENCY_HASHES * HASH_BYTES:
        raise MalformedProof(
            f"items.{name} must be at most {MAX_CONSISTENCY_HASHES} hashes of {HASH_BYTES} bytes"
        )
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


def _beginning(older: Checkpoint, newer: Checkpoint, nodes: bytes) -> bytes:
    """The root that the newer tree had at the older one's size; it must not be the older root."""
    old, new = prefix_roots(older.size, newer.size, _nodes(nodes, "nodes"))
    if new != newer.root:
        raise Inconsistent("the nodes do not lead to the newer root: they are not of that tree")
    if old == older.root:
        raise Inconsistent("the older tree is the beginning of the newer: nothing is wrong here")
    return old


def entry_fault(entry: bytes, log: str) -> str | None:
    """Why the bytes are no entry of that log, or None when they are a well-formed, signed event.

    A type that this version's catalogue lacks is no fault: the log may be newer than its reader.
    Neither is the index written inside, which is judged apart.
    """
    try:
        found = decode_entry(entry, log=log)
        if found.envelope.type in CATALOGUE:
            check_body(found.envelope.type, found.envelope.body)
    except InvalidEvent as error:
        return one_line(str(error))
    return None


# --- two checkpoints ---


def _pair(case: _Case) -> tuple[Checkpoint, Checkpoint]:
    return case.head("checkpoint_1"), case.head("checkpoint_2")


def _signed(case: _Case, *heads: Checkpoint) -> list[str]:
    name = printable(case.log)
    return [f"The log {name} signed size {head.size}, root {head.root.hex()}." for head in heads]


def _sizes(*heads: Checkpoint) -> dict[str, Any]:
    return {"sizes": [h.size for h in heads], "roots": [h.root.hex() for h in heads]}


def _split_view(case: _Case) -> _Finding:
    one, two = _pair(case)
    if one.size != two.size or one.root == two.root:
        raise Inconsistent("a split view is two roots for one size; these checkpoints are none")
    return _Finding(
        proven=[*_signed(case, one, two), "It signed two different histories of one length."],
        facts=_sizes(one, two),
    )


def _rollback(case: _Case) -> _Finding:
    larger, smaller = _pair(case)
    if smaller.size >= larger.size:
        raise Inconsistent("a rollback ends at a smaller tree; this one does not")
    return _Finding(
        proven=_signed(case, larger, smaller),
        testimony=[
            f"that the log showed size {smaller.size} after it had shown size {larger.size}. "
            "Nobody signed that order: an old checkpoint kept in some cache looks the same."
        ],
        facts=_sizes(larger, smaller),
    )


def _inconsistent(case: _Case) -> _Finding:
    names = frozenset(case.items)
    if "entry" in names:
        return _other_entry(case)
    if "path" in names:
        return _other_tile(case)
    if "checkpoint" in names:
        head = case.head()
        return _Finding(
            proven=_signed(case, head),
            testimony=["that neither the entries nor the tiles it hands out lead to that root."],
            facts=_sizes(head),
        )
    older, newer = _pair(case)
    if not 0 < older.size < newer.size:
        raise Inconsistent("the second checkpoint must be of a larger tree than the first")
    finding = _Finding(proven=_signed(case, older, newer), facts=_sizes(older, newer))
    if "nodes" in names:
        old = _beginning(older, newer, case.items["nodes"])
        finding.proven.append(_forked(older, newer, old))
    elif "consistency" in names:
        _failed_proof(finding, older, newer, _nodes(case.items["consistency"], "consistency"))
    else:
        finding.testimony.append(
            "that neither the entries nor the tiles it hands out lead from the first to the second."
        )
    return finding


def _forked(older: Checkpoint, newer: Checkpoint, old: bytes) -> str:
    return (
        f"The tree of {newer.size} had root {old.hex()} at size {older.size}, not the one that was "
        "signed: history was rewritten."
    )


def _failed_proof(
    finding: _Finding, older: Checkpoint, newer: Checkpoint, proof: list[bytes]
) -> None:
    """A consistency proof that was served and does not check."""
    # From a power of two the proof leaves out the old tree itself, so it cannot show another root.
    whole = older.size & (older.size - 1) == 0
    try:
        old, new = prefix_roots(older.size, newer.size, [older.root, *proof] if whole else proof)
    except MalformedProof:
        old = new = b""
    if (old, new) == (older.root, newer.root):
        raise Inconsistent("the consistency proof checks: nothing is wrong here")
    if new == newer.root:
        finding.proven.append(_forked(older, newer, old))
        return
    finding.proven.append("The consistency proof in this file does not lead from one to the other.")
    finding.testimony.append("that this is the proof the log gave.")


def _other_entry(case: _Case) -> _Finding:
    leaf, entry = case.items["leaf"], case.items["entry"]
    index, head = case.included("proof", leaf)
    if leaf_hash(entry) == leaf:
        raise Inconsistent(f"the entry is what the tree holds at {index}: nothing is wrong here")
    return _Finding(
        proven=[
            *_signed(case, head),
            f"That tree holds leaf hash {leaf.hex()} at index {index}; the entry in this file "
            f"hashes to {leaf_hash(entry).hex()}.",
        ],
        testimony=[f"that the log handed out this entry for index {index}."],
        facts={**_sizes(head), "index": index},
    )


def _other_tile(case: _Case) -> _Finding:
    head = case.head()
    try:
        path = case.items["path"].decode("ascii")
    except UnicodeDecodeError as error:
        raise MalformedProof("items.path names no file of a log") from error
    parse_tile_path(path)
    if case.items["served"] == case.items["computed"]:
        raise Inconsistent(f"{path} was served as it was computed: nothing is wrong here")
    return _Finding(
        proven=_signed(case, head),
        testimony=[f"that the log served {path} with bytes that its own entries do not yield."],
        facts={**_sizes(head), "path": path},
    )


# --- entries ---


def _included_entry(case: _Case) -> tuple[int, int, Checkpoint]:
    """The proof's index, the one written inside the entry, and the signed tree."""
    entry = case.items["entry"]
    index, head = case.included("proof", leaf_hash(entry))
    if len(entry) <= ENTRY_HEADER_BYTES:
        raise Inconsistent("too short to have an index: that is bad-entry evidence")
    return index, int.from_bytes(entry[:8], "big"), head


def _wrong_size(case: _Case) -> _Finding:
    if "path" in case.items:
        return _missing(case)
    index, written, head = _included_entry(case)
    if index != head.size - 1 or written <= index:
        raise Inconsistent(
            f"entry {written} stands at index {index} of {head.size}: a wrong size shows by a "
            "later entry at the last index"
        )
    return _Finding(
        proven=[
            *_signed(case, head),
            f"The last entry of that tree is entry {written}: the log holds more than it says, or "
            "entries were left out.",
        ],
        facts={**_sizes(head), "index": index, "written": written},
    )


def _missing(case: _Case) -> _Finding:
    head = case.head()
    try:
        path = case.items["path"].decode("ascii")
    except UnicodeDecodeError as error:
        raise MalformedProof("items.path names no file of a log") from error
    tile = parse_tile_path(path)
    if tile.n * 256 + tile.width > head.size >> (8 * (tile.level or 0)):
        raise Inconsistent(f"a tree of {head.size} has no {path}: nothing is wrong here")
    return _Finding(
        proven=[*_signed(case, head), f"A tree of that size has the file {path}."],
        testimony=[f"that the log did not have {path} in its whole width."],
        facts={**_sizes(head), "path": path},
    )


def _misplaced_entry(case: _Case) -> _Finding:
    index, written, head = _included_entry(case)
    if written == index:
        raise Inconsistent(f"entry {index} stands where it says: nothing is wrong here")
    return _Finding(
        proven=[
            *_signed(case, head),
            f"At index {index} of that tree stands an entry that says inside that it is entry "
            f"{written}.",
        ],
        facts={**_sizes(head), "index": index, "written": written},
    )


def _bad_entry(case: _Case) -> _Finding:
    entry = case.items["entry"]
    index, head = case.included("proof", leaf_hash(entry))
    if "before" in case.items:
        return _time_runs_back(case, index, head)
    fault = entry_fault(entry, case.log)
    if fault is None:
        raise Inconsistent(f"entry {index} is a well-formed, signed event: nothing is wrong here")
    return _Finding(
        proven=[*_signed(case, head), f"Entry {index} of that tree is no valid event: {fault}"],
        facts={**_sizes(head), "index": index},
    )


def _time_runs_back(case: _Case, index: int, head: Checkpoint) -> _Finding:
    before = case.items["before"]
    index_before, head_before = case.included("before_proof", leaf_hash(before))
    short = min(len(before), len(case.items["entry"])) <= ENTRY_HEADER_BYTES
    if short or index_before + 1 != index or head_before != head:
        raise Inconsistent("needed are two entries, one right behind the other, of one tree")
    then, now = (int.from_bytes(e[8:16], "big") for e in (before, case.items["entry"]))
    if then <= now:
        raise Inconsistent(
            f"entry {index} was not recorded before {index_before}: nothing is wrong"
        )
    return _Finding(
        proven=[
            *_signed(case, head),
            f"Entry {index} claims to be recorded at {now} us, {then - now} us before the entry "
            "that it follows.",
        ],
        facts={**_sizes(head), "index": index},
    )


# --- chain and witnesses ---


def _anchor_mismatch(case: _Case) -> _Finding:
    head = case.head()
    try:
        anchor = object_of(parse_canonical(case.items["anchor"]), _ANCHOR_FIELDS, "items.anchor")
        size, root = count_of(anchor["size"], "size", low=1), hash_of(anchor["root"], "root")
        chain_id = count_of(anchor["chain_id"], "chain_id")
        contract = text_of(anchor["contract"], "contract")
        check_address(contract, "contract")
    except VerificationError:
        raise
    except LedgerError as error:
        raise MalformedProof(f"items.anchor: {error}", **error.detail) from error
    held = f"contract {contract} on chain {chain_id} holds size {size}, root {root.hex()}"
    finding = _Finding(
        proven=_signed(case, head),
        facts={**_sizes(head), "anchored_size": size, "anchored_root": root.hex()},
    )
    anchored = Checkpoint(origin=case.log, size=size, root=root)
    if "nodes" in case.items:
        finding.proven.append(
            _forked(anchored, head, _beginning(anchored, head, case.items["nodes"]))
        )
    elif size == head.size and root == head.root:
        raise Inconsistent("contract and log have the same tree: nothing is wrong here")
    elif size < head.size:
        finding.testimony.append("that what the log hands out does not lead to the anchored tree.")
    elif size > head.size:
        finding.testimony.append(f"that the log showed no larger tree when the {held}.")
    _judge_section(finding, anchor, held, size=size, root=root)
    return finding


def _judge_section(
    finding: _Finding, anchor: Mapping[str, Any], held: str, *, size: int, root: bytes
) -> None:
    section = anchor["section"]
    if section is None:
        finding.testimony.append(f"that the {held}: the finder's node said so.")
        return
    try:
        from ledger.verify.l1 import verify_l1

        facts = verify_l1(section, size=size, root=root)
    except ImportError as error:
        finding.testimony.append(
            f"that the {held}: the proof in this file was not checked, since a library is missing "
            f"({printable(str(error))}); pip install 'tributary-ledger[l1]'"
        )
        return
    if (facts["chain_id"], facts["contract"]) != (anchor["chain_id"], anchor["contract"]):
        raise Inconsistent("the L1 section is of another contract than the anchor says")
    finding.proven.append(f"Block {facts['block_hash']} has it that {held}.")
    finding.trusted.append(
        f"That block {facts['block_hash']} is on chain {facts['chain_id']}, and that contract "
        f"{facts['contract']} is this log's anchor."
    )


def _witness_conflict(case: _Case) -> _Finding:
    if "policy" in case.items:
        return _policy_unmet(case)
    witness = _witness_key(case.items["witness"])
    one, two = case.open("checkpoint_1", witness), case.open("checkpoint_2", witness)
    at = [_cosigned_at(opened, witness) for opened in (one, two)]
    heads = one.checkpoint, two.checkpoint
    name = printable(witness.name)
    finding = _Finding(
        proven=[
            *_signed(case, *heads),
            f"The witness {name} cosigned the first at {at[0]} and the second at {at[1]} (s).",
        ],
        trusted=[f"That the key {witness.id.hex()} is that of the witness {name}."],
        facts={**_sizes(*heads), "witness": witness.name},
    )
    older, newer = sorted(heads, key=lambda head: head.size)
    earlier, later = (t for _, t in sorted(zip((h.size for h in heads), at, strict=True)))
    if "nodes" in case.items:
        finding.proven.append(_forked(older, newer, _beginning(older, newer, case.items["nodes"])))
    elif older.size == newer.size and older.root != newer.root:
        finding.proven.append("Log and witness signed two different histories of one length.")
    elif older.size < newer.size and later < earlier:
        finding.proven.append(
            "It called the smaller tree the largest that it knew after it had cosigned the larger."
        )
    else:
        raise Inconsistent("these two cosignatures do not contradict each other")
    return finding


def _witness_key(data: bytes) -> VerifierKey:
    try:
        key = parse_vkey(data.decode().strip())
    except UnicodeDecodeError as error:
        raise MalformedProof("items.witness must be a vkey") from error
    if key.type != COSIGNATURE:
        raise MalformedProof(f"the key {printable(key.name)} is no witness's (type 0x04)")
    return key


def _cosigned_at(opened: OpenedCheckpoint, witness: VerifierKey) -> int:
    found: list[Verified] = [v for v in opened.witnesses if v.key == witness]
    if not found:
        raise BadSignature(f"the witness {printable(witness.name)} cosigned only one of the two")
    return found[0].timestamp or 0


def _policy_unmet(case: _Case) -> _Finding:
    policy = parse_policy(case.items["policy"])
    opened = case.open("checkpoint", *policy.keys)
    keys = [v.key for v in opened.witnesses]
    if policy.satisfied_by(keys):
        raise Inconsistent("the checkpoint is witnessed as the policy demands: nothing is wrong")
    return _Finding(
        proven=[
            *_signed(case, opened.checkpoint),
            f"These bytes carry too few cosignatures: {policy.shortfall(keys)}.",
        ],
        testimony=["that the log published it like this: anyone can leave cosignatures out."],
        facts=_sizes(opened.checkpoint),
    )


def _bad_checkpoint(case: _Case) -> _Finding:
    try:
        case.head()
    except VerificationError as error:
        reason = one_line(str(error))
    else:
        raise Inconsistent("the checkpoint opens under the log's key: nothing is wrong here")
    return _Finding(
        proven=[f"The bytes are no checkpoint of {printable(case.log)} under its key: {reason}"],
        testimony=["that the log's address served them. Anyone can write such bytes."],
    )


def _broken_receipt(case: _Case) -> _Finding:
    raise MalformedProof("receipts cannot be judged by this version")


_JUDGES: Mapping[str, Callable[[_Case], _Finding]] = {
    "split-view": _split_view,
    "rollback": _rollback,
    "inconsistent": _inconsistent,
    "wrong-size": _wrong_size,
    "bad-entry": _bad_entry,
    "misplaced-entry": _misplaced_entry,
    "broken-receipt": _broken_receipt,
    "anchor-mismatch": _anchor_mismatch,
    "witness-conflict": _witness_conflict,
    "bad-checkpoint": _bad_checkpoint,
}
assert _JUDGES.keys() == SHAPES.keys()
