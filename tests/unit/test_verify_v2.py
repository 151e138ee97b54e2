"""Version 2 of the bundle: rows shown, payout lines, policies, and what the verdict makes of them.

The frozen vectors (tests/vectors/bundles/v2) break every rule once; here is what they leave out:
every byte flipped, hostile values in every field, a missing library, the verdict's words.
"""

import builtins
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.domain.canonical import canonical_json
from ledger.errors import BadSignature, MalformedProof, VerificationError
from ledger.verify.__main__ import main
from ledger.verify.bundle import STEP_NAMES, verify_bundle
from ledger.verify.bundle_format import FORMAT_V2, format_bundle, parse_bundle
from ledger.verify.disclosure import MAX_DISCLOSED
from ledger.verify.policy import parse_policy
from tests.unit.lineage_world import World, name, settled
from tests.unit.test_verify_bundle import json_values, spoilt
from tests.vectors.freeze_bundles import WITNESSES, witness_vkey

REPOSITORY = Path(__file__).parents[2]
FROZEN = REPOSITORY / "tests" / "vectors" / "bundles" / "v2"
LISTS = ("disclosed", "payouts")


def frozen(name: str) -> bytes:
    return (FROZEN / f"{name}.lineage.json").read_bytes()


@pytest.fixture(scope="module")
def whole() -> bytes:
    """Rows, payout lines, two witnesses and an L1 section."""
    return frozen("everything")


def test_both_ways(whole: bytes) -> None:
    assert format_bundle(parse_bundle(whole)) == whole
    assert parse_bundle(whole).format == FORMAT_V2


def test_every_step_is_numbered(whole: bytes) -> None:
    assert [(s.number, s.name) for s in verify_bundle(whole).steps] == list(STEP_NAMES.items())


@pytest.mark.parametrize("field", LISTS)
def test_no_flipped_byte_of_the_lists_is_accepted(whole: bytes, field: str) -> None:
    start = whole.index(b'"%s":' % field.encode())
    end = whole.index(b'"entries":' if field == "disclosed" else b'"subject":')
    for at in range(start, end, 2):
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        with pytest.raises(VerificationError):
            verify_bundle(bytes(bad))


def items(field: str) -> list[str]:
    return {
        "disclosed": ["contribution", "row", "value", "proof"],
        "payouts": ["period", "account", "cumulative_wei", "proof"],
    }[field]


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(LISTS), value=json_values, data=st.data())
def test_hostile_items_only_fail_as_designed(field: str, value: Any, data: st.DataObject) -> None:
    whole = frozen("everything")
    there = json.loads(whole)
    where = data.draw(st.sampled_from(["list", "item", "member", "row"]))
    at = data.draw(st.integers(0, 2))
    if where == "list":
        change: Callable[[Any], object] = lambda v: v.update({field: value})  # noqa: E731
        same = value == []  # the other list is still there: a good bundle
    elif where == "item":
        change = lambda v: v[field].__setitem__(at, value)  # noqa: E731
        same = there[field][at] == value
    elif where == "member" or field == "payouts":
        member = data.draw(st.sampled_from(items(field)))
        change = lambda v: v[field][at].update({member: value})  # noqa: E731
        same = there[field][at][member] == value
    else:
        member = data.draw(st.sampled_from(["prompt", "completion", "salt", "more"]))
        change = lambda v: v[field][at]["value"].update({member: value})  # noqa: E731
        same = there[field][at]["value"].get(member) == value
    if same:
        return
    with pytest.raises(VerificationError):
        verify_bundle(spoilt(whole, change))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "contribution": st.sampled_from([name("ann"), name("ben"), name("eve")]),
                "row": st.integers(-1, 2**53 - 1),
                "value": st.fixed_dictionaries(
                    {"prompt": st.text(max_size=9), "completion": st.text(max_size=9),
                     "salt": st.sampled_from(["00" * 16, "0" * 31, "AA" * 16])}
                ),
                "proof": st.lists(st.sampled_from(["ab" * 32, "", "zz"]), max_size=70),
            }
        ),
        max_size=MAX_DISCLOSED + 2,
    )
)  # fmt: skip
def test_well_formed_lies_only_fail_as_designed(rows: list[Any]) -> None:
    with pytest.raises(VerificationError):
        verify_bundle(spoilt(frozen("row-of-adapter"), lambda v: v.update(disclosed=rows)))


# --- a missing library ---


def without_keccak(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def missing(module: str, *rest: Any, **more: Any) -> Any:
        if module.startswith(("eth_hash", "rlp")):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return honest(module, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_keccak_payouts_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_keccak(monkeypatch)
    verdict = verify_bundle(frozen("payout-lines"))
    assert verdict.steps[-1].status == "skipped"
    assert "tributary-ledger[l1]" in verdict.steps[-1].detail
    assert not any("is owed" in line for line in verdict.proven)
    assert any("without a keccak library" in line for line in verdict.trusted)
    assert not any(line["checked"] for line in verdict.facts["payouts"])
    # What needs no keccak is checked all the same.
    with pytest.raises(VerificationError):
        verify_bundle(frozen("bad-payout-period-absent"))
    unread = verify_bundle(frozen("everything"))
    assert any("L1 section" in line for line in unread.trusted)


def test_a_lie_about_a_payout_is_seen_as_soon_as_the_library_is_there() -> None:
    for case in ("payout-amount-changed", "payout-account-changed"):
        with pytest.raises(VerificationError) as caught:
            verify_bundle(frozen(f"bad-{case}"))
        assert caught.value.detail["step"] == 8


# --- the words ---


def test_a_shown_row_in_plain_words() -> None:
    verdict = verify_bundle(frozen("row-of-adapter"))
    (said,) = [line for line in verdict.proven if line.startswith("Row ")]
    assert said.startswith(f"Row 1 of the contribution {name('ann')}, which ed25519:")
    assert "prompt “ann 1?”, completion “1.”" in said
    assert f"part of the training manifest of the adapter {name('adapter')} (dev/answers)" in said
    assert verdict.facts["disclosed"] == [
        {"contribution": name("ann"), "row": 1, "runs": [name("run")],
         "adapters": [name("adapter")]}
    ]  # fmt: skip


def test_a_row_without_a_manifest_says_so() -> None:
    verdict = verify_bundle(frozen("rows-of-contribution"))
    assert not any("training manifest" in line for line in verdict.proven)
    assert any("carries no training manifest" in line for line in verdict.trusted)
    partial = verify_bundle(frozen("row-of-partial"))
    assert any(f"manifest of the training run {name('run')}" in line for line in partial.proven)


def test_a_row_cannot_move_the_cursor() -> None:
    text = verify_bundle(frozen("row-of-one-in-strange-letters")).to_text()
    assert "日本語" in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_payout_is_added_up() -> None:
    verdict = verify_bundle(frozen("payout-claimed"))
    account = "0x" + "a1" * 20
    first, second = verdict.facts["payouts"]
    assert (first["accounted_wei"], first["cumulative_wei"], first["events"]) == ("48", "48", 1)
    assert (second["accounted_wei"], second["cumulative_wei"], second["events"]) == ("88", "88", 2)
    said = "\n".join(verdict.proven)
    assert f"period 2 was closed with, {account} is owed 0.000000000000000088 OPEN" in said
    assert "48 OPEN of this payout are accounted for by 1 event in this bundle, to the last" in said
    assert any("did what the event says" in line for line in verdict.trusted)


def test_a_payout_whose_earnings_are_not_there_is_not_added_up() -> None:
    """The lines are proven; what made them is not in that bundle."""
    verdict = verify_bundle(frozen("payout-lines"))
    assert all(line["accounted_wei"] == "0" for line in verdict.facts["payouts"])
    assert not any("accounted for" in line for line in verdict.proven)
    open_wei = [line for line in verdict.trusted if "0 OPEN of 0.00000000000000002 OPEN" in line]
    assert len(open_wei) == 1
    assert "the remaining 0.00000000000000002 OPEN are not accounted for here" in open_wei[0]


def test_fees_against_their_policy(tmp_path: Path) -> None:
    """The story's fee of 130 wei is split 30, 20, 0, 80: a policy that says so, and one that does
    not."""
    world = World(tmp_path)
    policy = {"version": 1, "protocol_bps": 2_308, "owner_bps": 1_538, "operator_bps": 0}
    world.add("operator", "fee_policy.set", {**policy, "contributors_bps": 6_154})
    world.tell()
    world.checkpoint()
    assert any("as the fee policy" in line for line in verify_bundle(world.bundle()).proven)
    other = World(tmp_path / "b")
    other.add(
        "operator", "fee_policy.set", {**policy, "owner_bps": 1_438, "contributors_bps": 6_254}
    )
    other.tell()
    other.checkpoint()
    verdict = verify_bundle(other.bundle())
    odd = other.index_of("fee.charged")
    assert any(f"the fee of entry {odd} is not split" in line for line in verdict.trusted)


def test_every_subject_is_named_in_words(tmp_path: Path) -> None:
    world = World(tmp_path).tell()
    settled(world, keep_trees=True)
    world.checkpoint()
    for label in world.ids:
        said = verify_bundle(world.bundle(label)).proven[3]
        assert "which says: " in said
        assert "{" not in said


# --- policies ---


def policy_text(*, quorum: str = "both", vkey: str = "") -> str:
    a, b = (witness_vkey(n) for n in WITNESSES)
    lines = [f"log {vkey}"] if vkey else []
    return "\n".join(
        [*lines, f"witness A {a}", f"witness B {b}", f"witness C {witness_vkey('other/w')}",
         "group both 2 A B", "group all all both C", f"quorum {quorum}", ""]
    )  # fmt: skip


def test_a_quorum_that_is_met() -> None:
    data = frozen("witnessed")
    verdict = verify_bundle(data, policy=parse_policy(policy_text()))
    assert verdict.facts["witnesses"] == list(WITNESSES)
    assert "2 of the 2 needed in both" in verdict.facts["policy"]
    assert any("Enough witnesses saw it" in line for line in verdict.proven)
    assert verdict.facts["policy"] in verdict.steps[1].detail
    none = verify_bundle(data, policy=parse_policy("quorum none\n"))
    assert none.facts["policy"] is None


def test_a_quorum_that_is_not_met() -> None:
    with pytest.raises(BadSignature, match="not witnessed as the policy demands") as caught:
        verify_bundle(frozen("witnessed"), policy=parse_policy(policy_text(quorum="all")))
    assert caught.value.detail["step"] == 2
    with pytest.raises(BadSignature):
        verify_bundle(frozen("row-of-adapter"), policy=parse_policy(policy_text()))


def test_a_policy_names_the_logs_it_is_about() -> None:
    data = frozen("witnessed")
    vkey = parse_bundle(data).vkey
    verdict = verify_bundle(data, policy=parse_policy(policy_text(vkey=vkey)))
    assert any("the key you gave" in line for line in verdict.trusted)
    other = parse_policy(
        policy_text(vkey="PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    )
    with pytest.raises(BadSignature, match="none of the 1 logs of your policy"):
        verify_bundle(data, policy=other)


def test_a_witness_named_twice_counts_once() -> None:
    vkeys = [witness_vkey(name) for name in WITNESSES]
    verdict = verify_bundle(
        frozen("witnessed"), witness_vkeys=[*vkeys, vkeys[0]], policy=parse_policy(policy_text())
    )
    assert verdict.facts["witnesses"] == list(WITNESSES)


def test_the_command_takes_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, policy = str(FROZEN / "witnessed.lineage.json"), tmp_path / "policy.txt"
    policy.write_text(policy_text())
    assert main([file, "--policy", str(policy)]) == 0
    assert "2 of the 2 needed in both" in capsys.readouterr().out
    policy.write_text(policy_text(quorum="all"))
    assert main([file, "--policy", str(policy), "--json"]) == 1
    problem = json.loads(capsys.readouterr().out)
    assert (problem["error"], problem["detail"]["step"]) == ("bad-signature", 2)
    assert main([file, "--policy", str(policy)]) == 1
    assert "It failed in step 2, checkpoint signature." in capsys.readouterr().err
    policy.write_text("quorum")
    assert main([file, "--policy", str(policy)]) == 1
    assert main([file, "--policy", str(tmp_path / "none")]) == 4
    policy.write_bytes(b"#" * 70_000)
    assert main([file, "--policy", str(policy)]) == 1


def test_hostile_files_never_show_a_traceback() -> None:
    rng = random.Random(11)
    whole = json.loads(frozen("everything"))
    for _ in range(6):
        value = dict(whole)
        field = rng.choice(LISTS)
        value[field] = [dict(item) for item in value[field]]
        value[field][rng.randrange(3)][rng.choice(items(field))] = rng.choice(
            [None, "\u202e", -1, [], {}, "x" * 9_999, 2**53 - 1]
        )
        done = subprocess.run(
            [sys.executable, "-m", "ledger.verify", "-"],
            input=canonical_json(value), capture_output=True, cwd=REPOSITORY, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith(b"NOT VERIFIED")
        assert b"Traceback" not in done.stderr


def test_malformed_lists_name_the_place() -> None:
    data = spoilt(frozen("row-of-adapter"), lambda v: v["disclosed"][0].update(row=1.5e300 > 1))
    with pytest.raises(MalformedProof, match=r"disclosed\[0\]\.row"):
        verify_bundle(data)
