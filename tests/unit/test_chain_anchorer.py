"""The anchorer's decision, without a chain."""

import pytest

from ledger.chain.anchorer import Anchored, AnchorRecord, Decision, SignedCheckpoint, decide
from ledger.domain.events import check_body
from ledger.errors import Inconsistent

R1, R2 = b"\x01" * 32, b"\x02" * 32


def held(size: int, root: bytes = R1) -> Anchored:
    return Anchored(size=size, root=root)


def signed(size: int, root: bytes = R1) -> SignedCheckpoint:
    return SignedCheckpoint(size=size, root=root, note=b"")


@pytest.mark.parametrize(
    ("anchored", "latest", "recorded", "expected"),
    [
        (held(0, bytes(32)), None, 0, Decision.NOTHING),
        (held(0, bytes(32)), signed(1), 0, Decision.COMMIT),
        (held(5), signed(5), 5, Decision.NOTHING),
        (held(5), signed(5), 0, Decision.RECORD),
        (held(5), signed(9, R2), 5, Decision.COMMIT),
        (held(5), signed(9, R2), 3, Decision.RECORD),
    ],
)
def test_decide(
    anchored: Anchored, latest: SignedCheckpoint | None, recorded: int, expected: Decision
) -> None:
    assert decide(anchored, latest, recorded) is expected


@pytest.mark.parametrize(
    ("anchored", "latest", "message"),
    [
        (held(5), None, "lost entries"),
        (held(5), signed(4), "lost entries"),
        (held(5), signed(5, R2), "forked"),
    ],
)
def test_contradictions_stop_it(
    anchored: Anchored, latest: SignedCheckpoint | None, message: str
) -> None:
    with pytest.raises(Inconsistent, match=message):
        decide(anchored, latest, 0)


def test_the_record_is_the_event_of_the_catalogue() -> None:
    record = AnchorRecord(
        size=3,
        root=R1,
        note=b"",
        chain_id=26092,
        contract="0x" + "ab" * 20,
        tx_hash=R2,
        block_number=7,
        block_hash=R1,
        log_index=0,
        l1={"chain_id": 26092},
    )
    check_body("checkpoint.anchored", record.event_body())
    assert record.key == record.key
