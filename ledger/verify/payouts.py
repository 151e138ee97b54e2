"""Payout lines: is this amount for that account under the root that a period was closed with. Pure.

The tree is OpenZeppelin's StandardMerkleTree over ["address", "uint256"]: leaf =
keccak256(keccak256(abi.encode(account, cumulative base units))), an inner node the keccak256 of its
two children, the smaller first. Leaves are hashed twice, so that no inner node passes for one. The
same tree is what `PayoutDistributor.claim` checks on chain. In a bundle (docs/FORMATS.md,
version 2)::

    {"period": n, "account": "0x<40>", "cumulative_wei": <decimal>, "proof": ["0x<64>", ...]}

keccak256 comes from eth-hash, imported when a line is checked: a bundle without payout lines needs
PyNaCl alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ledger.domain.envelope import Entry
from ledger.domain.money import parse_amount
from ledger.errors import Inconsistent, MalformedProof, NotIncluded
from ledger.verify.fields import check_ascending, count_of, list_of, object_of, text_of

MAX_PAYOUTS = 100
MAX_PAYOUT_HASHES = 64

_FIELDS = ("period", "account", "cumulative_wei", "proof")
_ACCOUNT = re.compile(r"0x[0-9a-f]{40}")
_HEX32 = re.compile(r"0x[0-9a-f]{64}")

Keccak = Callable[[bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class PayoutLine:
    """What `account` (lower-case address) was due in all when `period` was closed, in wei."""

    period: int
    account: str
    cumulative_wei: int
    proof: tuple[bytes, ...]


def read_payouts(value: Any) -> tuple[PayoutLine, ...]:
    """The list `payouts` of a bundle; nothing is verified. Raises MalformedProof."""
    items = list_of(value, MAX_PAYOUTS, "payouts")
    lines = tuple(_read(item, f"payouts[{n}]") for n, item in enumerate(items))
    check_ascending(((line.period, line.account) for line in lines), "payouts")
    return lines


def write_payouts(lines: Sequence[PayoutLine]) -> list[dict[str, Any]]:
    return [
        {
            "period": line.period,
            "account": line.account,
            "cumulative_wei": str(line.cumulative_wei),
            "proof": ["0x" + node.hex() for node in line.proof],
        }
        for line in lines
    ]


def check_payouts(lines: Sequence[PayoutLine], closed: Mapping[int, Entry]) -> None:
    """Check each line against the root of its period (`closed`: period.closed by number).

    Raises Inconsistent where the period's closing is not in the bundle, NotIncluded where the proof
    does not lead to its root, ImportError where eth-hash is missing; never passes in silence.
    """
    for n, line in enumerate(lines):
        if line.period not in closed:
            raise Inconsistent(
                f"payouts[{n}] is of period {line.period}, whose period.closed is not in the "
                "bundle",
                field=f"payouts[{n}].period",
            )
    if not lines:
        return
    from eth_hash.auto import keccak

    for n, line in enumerate(lines):
        entry = closed[line.period]
        root = bytes.fromhex(entry.envelope.body["root"][2:])
        if payout_root(line, keccak) != root:
            raise NotIncluded(
                f"payouts[{n}]: the root that period {line.period} was closed with does not hold "
                f"{line.cumulative_wei} wei for {line.account}",
                field=f"payouts[{n}]",
                entry=entry.index,
            )


def payout_root(line: PayoutLine, keccak: Keccak) -> bytes:
    """The root that a line's proof leads to."""
    account = bytes(12) + bytes.fromhex(line.account[2:])
    node = keccak(keccak(account + line.cumulative_wei.to_bytes(32, "big")))
    for sibling in line.proof:
        node = keccak(min(node, sibling) + max(node, sibling))
    return node


def _read(value: Any, where: str) -> PayoutLine:
    fields = object_of(value, _FIELDS, where)
    proof = list_of(fields["proof"], MAX_PAYOUT_HASHES, f"{where}.proof")
    return PayoutLine(
        period=count_of(fields["period"], f"{where}.period", low=1),
        account=_matching(_ACCOUNT, fields["account"], f"{where}.account", "0x and 40"),
        cumulative_wei=parse_amount(fields["cumulative_wei"], f"{where}.cumulative_wei"),
        proof=tuple(
            bytes.fromhex(_matching(_HEX32, node, f"{where}.proof[{n}]", "0x and 64")[2:])
            for n, node in enumerate(proof)
        ),
    )


def _matching(form: re.Pattern[str], value: Any, where: str, what: str) -> str:
    if not form.fullmatch(text_of(value, where)):
        raise MalformedProof(f"{where} must be {what} lower-case hex digits", field=where)
    return str(value)
