"""Evidence that needs others than the log: its anchor on an EVM chain, its witnesses, its receipts.
Pure."""

from collections.abc import Mapping
from typing import Any

from ledger.domain.canonical import parse_canonical
from ledger.domain.ids import check_address
from ledger.errors import BadSignature, Inconsistent, LedgerError, MalformedProof, VerificationError
from ledger.verify.checkpoint import Checkpoint, OpenedCheckpoint
from ledger.verify.encoding import printable
from ledger.verify.evidence_case import Case, Finding, signed, sizes
from ledger.verify.evidence_trees import beginning, forked
from ledger.verify.fields import count_of, hash_of, object_of, text_of
from ledger.verify.note import COSIGNATURE, Verified, VerifierKey, parse_vkey
from ledger.verify.policy import parse_policy

_ANCHOR_FIELDS = ("chain_id", "contract", "size", "root", "section")

# --- chain and witnesses ---


def anchor_mismatch(case: Case) -> Finding:
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
    finding = Finding(
        proven=signed(case, head),
        facts={**sizes(head), "anchored_size": size, "anchored_root": root.hex()},
    )
    anchored = Checkpoint(origin=case.log, size=size, root=root)
    if "nodes" in case.items:
        finding.proven.append(
            forked(anchored, head, beginning(anchored, head, case.items["nodes"]))
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
    finding: Finding, anchor: Mapping[str, Any], held: str, *, size: int, root: bytes
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
    # Anyone can put any root into a contract of their own: a section frames nobody by itself.
    finding.testimony.append(
        f"that block {facts['block_hash']} is on chain {facts['chain_id']}, and that contract "
        f"{facts['contract']} is this log's anchor. Ask a node, and who runs the log."
    )


def witness_conflict(case: Case) -> Finding:
    if "policy" in case.items:
        return _policy_unmet(case)
    witness = _witness_key(case.items["witness"])
    one, two = case.open("checkpoint_1", witness), case.open("checkpoint_2", witness)
    at = [_cosigned_at(opened, witness) for opened in (one, two)]
    heads = one.checkpoint, two.checkpoint
    name = printable(witness.name)
    finding = Finding(
        proven=[
            *signed(case, *heads),
            f"The key of {name} cosigned the first at {at[0]} and the second at {at[1]} (s).",
        ],
        trusted=[f"That the key {witness.id.hex()} is that of the witness {name}."],
        facts={**sizes(*heads), "witness": witness.name},
    )
    older, newer = sorted(heads, key=lambda head: head.size)
    at_smaller, at_larger = (t for _, t in sorted(zip((h.size for h in heads), at, strict=True)))
    if "nodes" in case.items:
        finding.proven.append(forked(older, newer, beginning(older, newer, case.items["nodes"])))
    elif older.size == newer.size and older.root != newer.root:
        finding.proven.append("Log and witness signed two different histories of one length.")
    elif older.size < newer.size and at_larger < at_smaller:
        finding.proven.append(
            "It called the smaller tree the largest that it knew after it had cosigned the larger."
        )
        finding.testimony.append(
            f"that {name} is a witness: the log did nothing wrong here, and anyone can make a key "
            "and cosign like this."
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


def _policy_unmet(case: Case) -> Finding:
    policy = parse_policy(case.items["policy"])
    opened = case.open("checkpoint", *policy.keys)
    keys = [v.key for v in opened.witnesses]
    if policy.satisfied_by(keys):
        raise Inconsistent("the checkpoint is witnessed as the policy demands: nothing is wrong")
    return Finding(
        proven=[
            *signed(case, opened.checkpoint),
            f"These bytes carry too few cosignatures: {policy.shortfall(keys)}.",
        ],
        testimony=["that the log published it like this: anyone can leave cosignatures out."],
        facts=sizes(opened.checkpoint),
    )


def broken_receipt(case: Case) -> Finding:
    from ledger.verify.receipt_verdict import recheck_broken

    found = recheck_broken(case.items, case.key)
    if case.log != case.key.name:
        raise Inconsistent("receipts are of logs whose origin is their key's name")
    finding = Finding(
        proven=[*found.proven, found.says[:1].upper() + found.says[1:] + "."],
        trusted=list(found.trusted),
        facts=dict(found.facts),
    )
    if "policy" in case.items:
        # Anyone can make witness keys, so the finder's policy frames nobody by itself.
        finding.testimony.append("that this policy names the witnesses of this log.")
    return finding
