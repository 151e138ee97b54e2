"""The payout tree against OpenZeppelin's own library, and its edges."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.chain.payouts import build_payout_tree, load_payout_tree, verify_payout
from ledger.errors import InvalidEvent, NotFound

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "payout_trees.json").read_text())
A, B = "0x" + "aa" * 20, "0x" + "bb" * 20
ACCOUNTS = st.binary(min_size=20, max_size=20).map(lambda b: "0x" + b.hex())


@pytest.mark.parametrize("vector", VECTORS["trees"], ids=lambda v: str(len(v["values"])))
def test_same_bytes_as_openzeppelin(vector: dict) -> None:
    tree = build_payout_tree({account: int(amount) for account, amount in vector["values"]})
    assert "0x" + tree.root.hex() == vector["root"]
    dump = tree.dump()
    assert dump["tree"] == vector["tree"]
    indexes = {v["value"][0]: v["treeIndex"] for v in dump["values"]}
    for (account, amount), index, proof in zip(
        vector["values"], vector["indexes"], vector["proofs"], strict=True
    ):
        assert indexes[account] == index
        assert ["0x" + p.hex() for p in tree.proof(account)] == proof
        assert verify_payout(tree.root, account, int(amount), tree.proof(account))


def test_the_example_of_openzeppelins_readme() -> None:
    tree = build_payout_tree({"0x" + "11" * 20: 5 * 10**18, "0x" + "22" * 20: 25 * 10**17})
    assert tree.root.hex() == "d4dee0beab2d53f2cc83e567171bd2820e49898130a22622b10ead383e90bd77"
    assert tree.total == 75 * 10**17


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(ACCOUNTS, st.integers(0, 2**256 - 1), min_size=1, max_size=24))
def test_every_account_is_proved_and_no_other_amount(amounts: dict[str, int]) -> None:
    tree = build_payout_tree(amounts)
    assert load_payout_tree(json.loads(json.dumps(tree.dump()))) == tree
    for account, amount in amounts.items():
        proof = tree.proof(account)
        assert verify_payout(tree.root, account, amount, proof)
        assert not verify_payout(tree.root, account, amount ^ 1, proof)


def test_the_order_given_does_not_matter() -> None:
    assert build_payout_tree({A: 1, B: 2}).dump() == build_payout_tree({B: 2, A: 1}).dump()


@pytest.mark.parametrize(
    "amounts",
    [{}, {A: -1}, {A: 2**256}, {"0x12": 1}, {A: 1, A.upper().replace("X", "x"): 2}],
    ids=["empty", "negative", "too large", "no address", "twice"],
)
def test_refused(amounts: dict[str, int]) -> None:
    with pytest.raises(InvalidEvent):
        build_payout_tree(amounts)


def test_an_account_that_is_not_there() -> None:
    with pytest.raises(NotFound, match="earned nothing"):
        build_payout_tree({A: 1}).proof(B)


def test_a_changed_dump_is_refused() -> None:
    dump = build_payout_tree({A: 1, B: 2}).dump()
    dump["values"][0]["value"][1] = "3"
    with pytest.raises(InvalidEvent, match="changed"):
        load_payout_tree(dump)
    with pytest.raises(InvalidEvent, match="no dump"):
        load_payout_tree({"values": [{}]})
