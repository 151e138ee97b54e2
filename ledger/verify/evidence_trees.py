"""Evidence about trees: two signed checkpoints, files that do not fit one. Pure.

`nodes` are the hashes of which RFC 9162 section 2.1.4 makes a consistency proof, with none left
out. They lead to the newer root, so they *are* that tree's (SHA-256 has no collisions), and they
also yield the root that its beginning has. If the log signed another one for that size, it forked,
and no leaf needs to be shown.
"""

from ledger.domain.envelope import node_hash
from ledger.errors import Inconsistent, MalformedProof, VerificationError
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.encoding import printable
from ledger.verify.evidence_case import Case, Finding, signed, sizes
from ledger.verify.evidence_entries import other_entry
from ledger.verify.evidence_format import one_line
from ledger.verify.merkle import HASH_BYTES, MAX_CONSISTENCY_HASHES

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


def node_list(data: bytes, name: str) -> list[bytes]:
    if len(data) % HASH_BYTES or len(data) > MAX_CONSISTENCY_HASHES * HASH_BYTES:
        raise MalformedProof(
            f"items.{name} must be at most {MAX_CONSISTENCY_HASHES} hashes of {HASH_BYTES} bytes"
        )
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


def beginning(older: Checkpoint, newer: Checkpoint, nodes: bytes) -> bytes:
    """The root that the newer tree had at the older one's size; it must not be the older root."""
    old, new = prefix_roots(older.size, newer.size, node_list(nodes, "nodes"))
    if new != newer.root:
        raise Inconsistent("the nodes do not lead to the newer root: they are not of that tree")
    if old == older.root:
        raise Inconsistent("the older tree is the beginning of the newer: nothing is wrong here")
    return old


# --- two checkpoints ---


def _pair(case: Case) -> tuple[Checkpoint, Checkpoint]:
    return case.head("checkpoint_1"), case.head("checkpoint_2")


def split_view(case: Case) -> Finding:
    one, two = _pair(case)
    if one.size != two.size or one.root == two.root:
        raise Inconsistent("a split view is two roots for one size; these checkpoints are none")
    return Finding(
        proven=[*signed(case, one, two), "It signed two different histories of one length."],
        facts=sizes(one, two),
    )


def rollback(case: Case) -> Finding:
    larger, smaller = _pair(case)
    if smaller.size >= larger.size:
        raise Inconsistent("a rollback ends at a smaller tree; this one does not")
    return Finding(
        proven=signed(case, larger, smaller),
        testimony=[
            f"that the log showed size {smaller.size} after it had shown size {larger.size}. "
            "Nobody signed that order: an old checkpoint kept in some cache looks the same."
        ],
        facts=sizes(larger, smaller),
    )


def inconsistent(case: Case) -> Finding:
    names = frozenset(case.items)
    if "entry" in names:
        return other_entry(case)
    if "path" in names:
        return other_tile(case)
    if "checkpoint" in names:
        head = case.head()
        return Finding(
            proven=signed(case, head),
            testimony=["that neither the entries nor the tiles it hands out lead to that root."],
            facts=sizes(head),
        )
    older, newer = _pair(case)
    if not 0 < older.size < newer.size:
        raise Inconsistent("the second checkpoint must be of a larger tree than the first")
    finding = Finding(proven=signed(case, older, newer), facts=sizes(older, newer))
    if "nodes" in names:
        old = beginning(older, newer, case.items["nodes"])
        finding.proven.append(forked(older, newer, old))
    elif "consistency" in names:
        _failed_proof(finding, older, newer, node_list(case.items["consistency"], "consistency"))
    else:
        finding.testimony.append(
            "that neither the entries nor the tiles it hands out lead from the first to the second."
        )
    return finding


def forked(older: Checkpoint, newer: Checkpoint, old: bytes) -> str:
    return (
        f"The tree of {newer.size} had root {old.hex()} at size {older.size}, not the one that was "
        "signed: history was rewritten."
    )


def _failed_proof(
    finding: Finding, older: Checkpoint, newer: Checkpoint, proof: list[bytes]
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
        finding.proven.append(forked(older, newer, old))
        return
    finding.proven.append("The consistency proof in this file does not lead from one to the other.")
    finding.testimony.append("that this is the proof the log gave.")


# --- files that do not fit ---


def other_tile(case: Case) -> Finding:
    head, path = case.head(), case.path_under(case.head())
    if case.items["served"] == case.items["computed"]:
        raise Inconsistent(f"{path} was served as it was computed: nothing is wrong here")
    return Finding(
        proven=[*signed(case, head), f"A tree of that size has the file {path}."],
        testimony=[f"that the log served {path} with bytes that its own entries do not yield."],
        facts={**sizes(head), "path": path},
    )


def missing_file(case: Case) -> Finding:
    head, path = case.head(), case.path_under(case.head())
    return Finding(
        proven=[*signed(case, head), f"A tree of that size has the file {path}."],
        testimony=[f"that the log did not hand out {path} whole and well-formed."],
        facts={**sizes(head), "path": path},
    )


def bad_checkpoint(case: Case) -> Finding:
    try:
        case.head()
    except VerificationError as error:
        reason = one_line(str(error))
    else:
        raise Inconsistent("the checkpoint opens under the log's key: nothing is wrong here")
    return Finding(
        proven=[f"The bytes are no checkpoint of {printable(case.log)} under its key: {reason}"],
        testimony=["that the log's address served them. Anyone can write such bytes."],
    )
