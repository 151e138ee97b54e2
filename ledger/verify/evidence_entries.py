"""Evidence about entries: what a signed tree holds at an index, and what is wrong with it. Pure."""

from ledger.domain.envelope import ENTRY_HEADER_BYTES, Entry, decode_entry, leaf_hash
from ledger.domain.events import CATALOGUE, check_body
from ledger.errors import Inconsistent, InvalidEvent
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.evidence_case import Case, Finding, signed, sizes
from ledger.verify.evidence_format import one_line


def read_entry(entry: bytes, log: str) -> Entry:
    """A well-formed, signed event of that log, its body that of its type; InvalidEvent otherwise.

    A type that this version's catalogue lacks is no fault: the log may be newer than its reader.
    Neither is the index written inside, which is judged apart.
    """
    found = decode_entry(entry, log=log)
    if found.envelope.type in CATALOGUE:
        check_body(found.envelope.type, found.envelope.body)
    return found


def entry_fault(entry: bytes, log: str) -> str | None:
    """Why the bytes are no entry of that log (`read_entry`), or None when they are one."""
    try:
        read_entry(entry, log)
    except InvalidEvent as error:
        return one_line(str(error))
    return None


# --- entries ---


def _included_entry(case: Case) -> tuple[int, int, Checkpoint]:
    """The proof's index, the one written inside the entry, and the signed tree."""
    entry = case.items["entry"]
    index, head = case.included("proof", leaf_hash(entry))
    if len(entry) <= ENTRY_HEADER_BYTES:
        raise Inconsistent("too short to have an index: that is bad-entry evidence")
    return index, int.from_bytes(entry[:8], "big"), head


def wrong_size(case: Case) -> Finding:
    index, written, head = _included_entry(case)
    if index != head.size - 1 or written <= index:
        raise Inconsistent(
            f"entry {written} stands at index {index} of {head.size}: a wrong size shows by a "
            "later entry at the last index"
        )
    return Finding(
        proven=[
            *signed(case, head),
            f"The last entry of that tree is entry {written}: the log holds more than it says, or "
            "entries were left out.",
        ],
        facts={**sizes(head), "index": index, "written": written},
    )


def misplaced_entry(case: Case) -> Finding:
    index, written, head = _included_entry(case)
    if written == index:
        raise Inconsistent(f"entry {index} stands where it says: nothing is wrong here")
    return Finding(
        proven=[
            *signed(case, head),
            f"At index {index} of that tree stands an entry that says inside that it is entry "
            f"{written}.",
        ],
        facts={**sizes(head), "index": index, "written": written},
    )


def bad_entry(case: Case) -> Finding:
    entry = case.items["entry"]
    index, head = case.included("proof", leaf_hash(entry))
    if "before" in case.items:
        return _time_runs_back(case, index, head)
    fault = entry_fault(entry, case.log)
    if fault is None:
        raise Inconsistent(f"entry {index} is a well-formed, signed event: nothing is wrong here")
    return Finding(
        proven=[*signed(case, head), f"Entry {index} of that tree is no valid event: {fault}"],
        facts={**sizes(head), "index": index},
    )


def _time_runs_back(case: Case, index: int, head: Checkpoint) -> Finding:
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
    return Finding(
        proven=[
            *signed(case, head),
            f"Entry {index} claims to be recorded at {now} us, {then - now} us before the entry "
            "that it follows.",
        ],
        facts={**sizes(head), "index": index},
    )


def other_entry(case: Case) -> Finding:
    leaf, entry = case.items["leaf"], case.items["entry"]
    index, head = case.included("proof", leaf)
    if leaf_hash(entry) == leaf:
        raise Inconsistent(f"the entry is what the tree holds at {index}: nothing is wrong here")
    return Finding(
        proven=[
            *signed(case, head),
            f"That tree holds leaf hash {leaf.hex()} at index {index}; the entry in this file "
            f"hashes to {leaf_hash(entry).hex()}.",
        ],
        testimony=[f"that the log handed out this entry for index {index}."],
        facts={**sizes(head), "index": index},
    )
