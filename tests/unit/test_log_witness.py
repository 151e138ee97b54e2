"""A witness cosigns one history per log: statuses and bytes of c2sp.org/tlog-witness and
c2sp.org/tlog-cosignature; lost and half-reported writes, restarts, callers at once."""

import base64
import itertools
import os
import random
import stat
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from ledger import files
from ledger.errors import BadSignature, ConfigError, MalformedProof, NotFound, StorageError
from ledger.log import kept_evidence
from ledger.log import witness as room
from ledger.log.add_checkpoint import (
    MAX_PROOF_LINES,
    MAX_REQUEST_BYTES,
    AddCheckpoint,
    checkpoint_path,
    format_request,
    parse_cosignature,
    parse_request,
    parse_size,
)
from ledger.log.witness import Answer, KnownLog, Witness, open_witness
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.evidence import check_evidence, parse_evidence
from ledger.verify.note import (
    COSIGNATURE,
    cosign_text,
    format_note,
    format_vkey,
    parse_note,
    parse_vkey,
    sign_text,
    vkey_of,
)
from tests.witness_world import LOG_KEY, LOG_VKEY, NOW_S, ORIGIN, Branch, Clock, witness_at

MAIN = Branch()


def cosigned(witness: Witness, branch: Branch, size: int, answer: Answer) -> int:
    """The timestamp, once status and signature check."""
    assert (answer.status, answer.type) == (200, "text/plain; charset=utf-8"), answer
    return parse_cosignature(answer.body, branch.text(size), witness.vkey)[1]


def evidence_in(folder: Path) -> list[tuple[str, bool]]:
    """Kind and conclusiveness of every file kept, each judged again under the log's key."""
    found = []
    for path in sorted((folder / "evidence").glob("*.json")):
        evidence = parse_evidence(path.read_bytes())
        verdict = check_evidence(evidence, format_vkey(LOG_VKEY))
        found.append((evidence.kind, verdict.facts["conclusive"]))
    return found


# --- bytes ---


def test_a_cosignature_is_what_the_specification_says_to_the_byte(tmp_path: Path) -> None:
    """Made again with hashlib and PyNaCl alone, from the words of c2sp.org/tlog-cosignature."""
    with witness_at(tmp_path) as witness:
        body = witness.add_checkpoint(MAIN.request(0, 5)).body
    secret = base64.b64decode((tmp_path / "witness.key").read_text().strip().split("+", 4)[4])[1:]
    key = SigningKey(secret)
    public = bytes(key.verify_key)
    key_id = sha256(b"w.example/1\n" + b"\x04" + public).digest()[:4]
    message = b"cosignature/v1\ntime %d\n" % NOW_S + MAIN.text(5).encode()
    blob = key_id + NOW_S.to_bytes(8, "big") + key.sign(message).signature
    assert body == b"\xe2\x80\x94 w.example/1 " + base64.b64encode(blob) + b"\n"
    vkey = f"w.example/1+{key_id.hex()}+" + base64.b64encode(b"\x04" + public).decode()
    assert witness.vkey_text == vkey


def test_a_cosignature_of_fixed_key_and_time_never_changes() -> None:
    text = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    line = cosign_text(text, "witness.example.com/w1", SigningKey(bytes(32)), 1_679_315_147)
    assert format_note(text, [line]).decode().splitlines()[-1] == (
        "— witness.example.com/w1 "
        "27pKCAAAAABkGFDLN7VCWowLNFrAx5kFlOq5Gblf9cDN74bbmX0TAuxTFK/0"
        "CM4NgMiBvbpFFyRcIVXoHLQV9IBeLzGW/URa5SA/DQ=="
    )


def test_a_real_witness_key_and_the_example_of_the_specification_are_read() -> None:
    real = parse_vkey("remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2")
    assert real.type == COSIGNATURE
    example = (
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dl"
        "rDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
    )
    line = parse_note(example.encode()).signatures[0]
    assert int.from_bytes(line.signature[:8], "big") == 1_679_315_147
    assert len(line.signature) == 8 + 64


def test_the_request_of_the_specification_is_read_and_written_back() -> None:
    example = (
        "old 20852014\n"
        "PlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=\n"
        "jrJZDmY8Y7SyJE0MWLpLozkIVMSMZcD5kvuKxPC3swk=\n"
        "5+pKlUdi2LeF/BcMHBn+Ku6yhPGNCswZZD1X/6QgPd8=\n"
        "/6WVhPs2CwSsb5rYBH5cjHV/wSmA79abXAwhXw3Kj/0=\n"
        "\n"
        "example.com/behind-the-sofa\n"
        "20852163\n"
        "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
        "\n"
        "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/"
        "Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    ).encode()
    request = parse_request(example)
    assert (request.old_size, len(request.proof)) == (20_852_014, 4)
    assert request.checkpoint.startswith(b"example.com/behind-the-sofa\n20852163\n")
    assert format_request(request) == example


# --- statuses ---


def test_it_follows_a_log_from_nothing(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness:
        for old, size in itertools.pairwise([0, 0, 1, 2, 3, 4, 4, 7, 8, 300, 300, 513]):
            answer = witness.add_checkpoint(MAIN.request(old, size))
            assert cosigned(witness, MAIN, size, answer) == NOW_S
    assert evidence_in(tmp_path) == []


def refusals(witness: Witness) -> dict[str, tuple[bytes, int]]:
    """Requests to a witness that cosigned size 5, and their statuses."""
    other_key = SigningKey(b"k" * 32)
    text = MAIN.text(7)
    forged = format_note(text, [sign_text(text, ORIGIN, other_key)])
    flipped = bytearray(MAIN.request(5, 7))
    flipped[-4] ^= 1
    junk = MAIN.proof(5, 7)[:-1]
    body = MAIN.request(5, 7)
    return {
        "unknown log": (Branch(origin="other.example").request(5, 7), 404),
        "unknown log, malformed proof": (Branch(origin="o").request(5, 7, [bytes(32)]), 404),
        "another's key": (Branch(key=other_key).request(5, 7), 403),
        "an unknown key's line alone": (b"old 5\n\n" + forged, 403),
        "a signature altered": (bytes(flipped), 403),
        "forged and above the size": (Branch(key=other_key).request(9, 7), 403),
        "old above the size": (MAIN.request(8, 7), 400),
        "stale": (MAIN.request(3, 7), 409),
        "from nothing": (MAIN.request(0, 7), 409),
        "from nothing, the same tree": (MAIN.request(0, 5), 409),
        "too new": (MAIN.request(6, 7), 409),
        "smaller": (MAIN.request(3, 4), 409),
        "smaller, from itself": (MAIN.request(4, 4), 409),
        "empty": (MAIN.request(0, 0), 409),
        "no proof": (MAIN.request(5, 7, []), 422),
        "short proof": (MAIN.request(5, 7, junk), 422),
        "long proof": (MAIN.request(5, 7, [*MAIN.proof(5, 7), bytes(32)]), 422),
        "a proof of nothing": (MAIN.request(5, 5, [bytes(32)]), 422),
        "no body": (b"", 400),
        "not UTF-8": (b"\xff" * 40, 400),
        "no empty line": (body.replace(b"\n\n", b"\n"), 400),
        "no old line": (body.removeprefix(b"old 5\n"), 400),
        "old with a sign": (body.replace(b"old 5", b"old +5"), 400),
        "old with a zero": (body.replace(b"old 5", b"old 05"), 400),
        "old with two spaces": (body.replace(b"old 5", b"old  5"), 400),
        "old in capitals": (body.replace(b"old", b"Old"), 400),
        "carriage returns": (body.replace(b"\n", b"\r\n"), 400),
        "a short hash": (body.replace(b"\n\n", b"\nAAAA\n\n", 1), 400),
        "64 proof lines": (MAIN.request(5, 7, [bytes(32)] * 63).replace(
            b"\n\n", b"\n" + base64.b64encode(bytes(32)) + b"\n\n", 1), 400),
        "no signature": (b"old 5\n\n" + text.encode() + b"\n", 400),
        "no checkpoint": (b"old 5\n\nhello\n\n\xe2\x80\x94 a AAAAAAAAAA==\n", 400),
        "too long": (body + b" " * MAX_REQUEST_BYTES, 400),
    }  # fmt: skip


def test_every_refusal_has_its_status_and_changes_nothing(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness:
        assert witness.add_checkpoint(MAIN.request(0, 5)).status == 200
        before = witness.latest(ORIGIN)
        for what, (body, status) in refusals(witness).items():
            answer = witness.add_checkpoint(body)
            assert answer.status == status, (what, answer)
            if status == 409:
                assert (answer.body, answer.type) == (b"5\n", "text/x.tlog.size"), what
            else:
                assert answer.type == "text/plain; charset=utf-8", what
            assert witness.latest(ORIGIN) == before, what
        assert parse_size(b"5\n") == 5
        assert witness.add_checkpoint(MAIN.request(5, 7)).status == 200


def test_a_log_that_was_never_seen_is_at_size_zero(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness:
        answer = witness.add_checkpoint(MAIN.request(3, 7))
        assert (answer.status, answer.body, answer.type) == (409, b"0\n", "text/x.tlog.size")
        assert witness.add_checkpoint(MAIN.request(0, 7, [bytes(32)])).status == 422
        with pytest.raises(NotFound):
            witness.checkpoint(checkpoint_path(ORIGIN).split("/")[0])
        with pytest.raises(NotFound):
            witness.checkpoint("..")


def test_63_proof_lines_are_read() -> None:
    assert len(parse_request(MAIN.request(5, 7, [bytes(32)] * MAX_PROOF_LINES)).proof) == 63


def test_lines_of_unknown_keys_are_ignored_and_not_remembered(tmp_path: Path) -> None:
    text = MAIN.text(5)
    stranger = sign_text(text, "stranger.example", SigningKey(b"s" * 32))
    note = format_note(text, [stranger, sign_text(text, ORIGIN, LOG_KEY)])
    body = format_request(AddCheckpoint(old_size=0, proof=(), checkpoint=note))
    with witness_at(tmp_path) as witness:
        assert witness.add_checkpoint(body).status == 200
        kept = witness.latest(ORIGIN)
        assert kept
        assert [s.name for s in parse_note(kept.note).signatures] == [ORIGIN, "w.example/1"]


def test_several_keys_of_one_log(tmp_path: Path) -> None:
    new = SigningKey(b"n" * 32)
    with witness_at(tmp_path, logs=[LOG_VKEY, vkey_of(ORIGIN, new)]) as witness:
        assert witness.add_checkpoint(MAIN.request(0, 5)).status == 200
        assert witness.add_checkpoint(Branch(key=new).request(5, 9)).status == 200
    # The old key is trusted no more; what was cosigned under it is remembered all the same.
    with witness_at(tmp_path, logs=[vkey_of(ORIGIN, new)]) as witness:
        assert witness.add_checkpoint(MAIN.request(9, 12)).status == 403
        assert witness.add_checkpoint(Branch(key=new).request(0, 12)).body == b"9\n"


def test_monitors_read_what_was_cosigned_last(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        witness.add_checkpoint(MAIN.request(5, 9))
        note = witness.checkpoint(sha256(ORIGIN.encode()).hexdigest())
        opened = open_checkpoint(note, LOG_VKEY, witnesses=[witness.vkey])
    assert opened.checkpoint.size == 9
    assert [v.timestamp for v in opened.witnesses] == [NOW_S]


# --- forks ---


@pytest.mark.parametrize("size", [1, 5, 8, 300])
def test_another_tree_of_the_same_size_is_refused_and_kept(tmp_path: Path, size: int) -> None:
    fork = Branch("other", fork=size // 2)
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, size))
        for _ in range(3):  # repeated, it is still one finding
            answer = witness.add_checkpoint(fork.request(size, size))
            # Without a size: a client would take it for a stale guess and try again for ever.
            assert (answer.status, answer.type) == (409, "text/plain; charset=utf-8")
        # From a wrong old size it is told the size, and its checkpoint is kept all the same.
        assert witness.add_checkpoint(fork.request(0, size)).body == f"{size}\n".encode()
        assert witness.add_checkpoint(MAIN.request(size, size + 1)).status == 200
    assert evidence_in(tmp_path) == [("split-view", True)]


@pytest.mark.parametrize("old", [3, 5, 6, 7, 100, 300])
def test_a_tree_that_does_not_extend_is_refused_and_proven(tmp_path: Path, old: int) -> None:
    """The fork's own proof leads to its own root: that shows what root it had at the old size."""
    fork = Branch("other", fork=old // 2)
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, old))
        assert witness.add_checkpoint(fork.request(old, old + 9)).status == 422
        assert witness.latest(ORIGIN).head.size == old  # type: ignore[union-attr]
    assert evidence_in(tmp_path) == [("inconsistent", True)]


def test_from_a_power_of_two_the_fork_is_kept_as_testimony(tmp_path: Path) -> None:
    """Such a proof leaves out the old tree itself, so it cannot show which one it was."""
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 8))
        assert witness.add_checkpoint(Branch("other", fork=4).request(8, 20)).status == 422
    assert evidence_in(tmp_path) == [("inconsistent", False)]


def test_a_stranger_with_a_junk_proof_frames_nobody(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        for n in range(5):
            junk = [bytes([n]) * 32] * len(MAIN.proof(5, 9))
            assert witness.add_checkpoint(MAIN.request(5, 9, junk)).status == 422
    assert all(not conclusive for _, conclusive in evidence_in(tmp_path))


def test_testimony_and_proof_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_evidence, "MAX_TESTIMONY_FILES", 2)
    monkeypatch.setattr(kept_evidence, "MAX_PROVEN_FILES", 3)
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        for n in range(6):
            witness.add_checkpoint(MAIN.request(5, 9, [bytes([n]) * 32]))
            witness.add_checkpoint(Branch(f"fork {n}").request(5, 5))
    found = evidence_in(tmp_path)
    assert found.count(("inconsistent", False)) == 2
    assert found.count(("split-view", True)) == 3


def test_evidence_that_cannot_be_stored_does_not_change_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        monkeypatch.setattr(kept_evidence, "write_durably", full)
        assert witness.add_checkpoint(Branch("fork").request(5, 5)).status == 409


# --- memory ---


def test_a_restart_remembers(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        vkey = witness.vkey_text
    known = [KnownLog(origin=ORIGIN, key=LOG_VKEY)]
    with open_witness(tmp_path, logs=known, clock=Clock()) as witness:
        assert witness.vkey_text == vkey
        assert witness.add_checkpoint(MAIN.request(0, 9)).body == b"5\n"
        assert witness.add_checkpoint(Branch("fork").request(5, 5)).status == 409
        assert witness.add_checkpoint(MAIN.request(5, 9)).status == 200
    assert stat.S_IMODE((tmp_path / "witness.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["open", "fsync", "replace", "sync_folder"])
@pytest.mark.parametrize("size", [9, 300])
def test_a_write_that_fails_is_no_cosignature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, size: int
) -> None:
    """Lost (open, fsync, replace): nothing happened. Kept though reported failed (sync_folder):
    the tree is remembered without a cosignature, and the log asks again from there."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError(5, "Input/output error")

    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        for _ in range(1 if step == "sync_folder" else 2):
            with monkeypatch.context() as broken:
                target = files if step == "sync_folder" else os
                broken.setattr(target, step, fails)
                with pytest.raises(StorageError, match="Input/output"):
                    witness.add_checkpoint(MAIN.request(5, size))
        if step == "sync_folder":
            assert witness.add_checkpoint(MAIN.request(5, size)).body == f"{size}\n".encode()
            # It is in the memory, so another tree of that size is refused even now.
            assert witness.add_checkpoint(Branch("fork", 3).request(size, size)).status == 409
            again = witness.add_checkpoint(MAIN.request(size, size))
        else:
            again = witness.add_checkpoint(MAIN.request(5, size))
        cosigned(witness, MAIN, size, again)


@pytest.mark.parametrize("spoil", ["text", "cut", "signature", "another's", "other log's", "empty"])
def test_a_memory_that_was_altered_stops_the_witness(tmp_path: Path, spoil: str) -> None:
    with witness_at(tmp_path) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        path = tmp_path / "logs" / checkpoint_path(ORIGIN)
        data = path.read_bytes()
        forger = cosign_text(MAIN.text(3), "w.example/1", SigningKey(b"f" * 32), 1)
        spoiled = {
            "text": data.replace(b"\n5\n", b"\n3\n"),
            "cut": data[: len(data) // 2],
            "signature": data[:-3] + b"A" + data[-2:],
            "another's": format_note(MAIN.text(3), [forger]),
            "other log's": b"",
            "empty": b"",
        }[spoil]
        if spoil == "other log's":
            text = Branch(origin="o.example").text(3)
            spoiled = format_note(text, [cosign_text(text, "w.example/1", witness._key, 1)])
        path.write_bytes(spoiled)
        with pytest.raises(StorageError, match="not what this witness cosigned"):
            witness.add_checkpoint(MAIN.request(0, 9))
    with pytest.raises(StorageError, match="Restore"), witness_at(tmp_path):
        pass


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    taken = pytest.raises(ConfigError, match="another process")
    with witness_at(tmp_path), taken, witness_at(tmp_path):
        pass
    with witness_at(tmp_path):  # free again
        pass


def test_keys_that_cannot_be(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness:
        own = witness._key
    for logs in ([vkey_of(ORIGIN, LOG_KEY, COSIGNATURE)], [vkey_of(ORIGIN, own)]):
        with pytest.raises(ConfigError), witness_at(tmp_path, logs=logs):
            pass
    with pytest.raises(ConfigError, match="not of other"), witness_at(tmp_path, name="other"):
        pass
    with pytest.raises(ConfigError, match="no spaces"), witness_at(tmp_path / "x", name="a b"):
        pass
    (tmp_path / "witness.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"), witness_at(tmp_path):
        pass


# --- time ---


def test_a_clock_that_jumps_back_waits_at_the_last_timestamp(tmp_path: Path) -> None:
    clock = Clock()
    with witness_at(tmp_path, clock=clock) as witness:
        times = []
        for old, size, now in ((0, 5, 0), (5, 6, -3_600), (6, 6, -(10**9)), (6, 9, 1), (9, 10, 2)):
            clock.now = (NOW_S + now) * 1_000_000
            answer = witness.add_checkpoint(MAIN.request(old, size))
            times.append(cosigned(witness, MAIN, size, answer) - NOW_S)
    assert times == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("now", [-5_000_000, 0, 999_999])
def test_the_timestamp_is_never_zero(tmp_path: Path, now: int) -> None:
    with witness_at(tmp_path, clock=Clock(now)) as witness:
        assert cosigned(witness, MAIN, 5, witness.add_checkpoint(MAIN.request(0, 5))) == 1


# --- many at once ---


def test_many_callers_never_roll_the_memory_back(tmp_path: Path) -> None:
    """Each follows the sizes it is told; what is cosigned forms one chain, each size once."""
    sizes = list(range(1, 40))
    signed: list[tuple[int, int]] = []
    with witness_at(tmp_path) as witness:
        requests = {
            (a, b): MAIN.request(a, b) for a in [0, *sizes] for b in sizes if b - a in (1, 2)
        }

        def call(seed: int) -> None:
            wishes = random.Random(seed)
            old = 0
            while old < sizes[-1]:
                new = min(old + wishes.choice((1, 2)), sizes[-1])
                answer = witness.add_checkpoint(requests[old, new])
                if answer.status == 200:
                    signed.append((old, new))
                old = new if answer.status == 200 else parse_size(answer.body)

        callers = [threading.Thread(target=call, args=(n,)) for n in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(30)
        latest = witness.latest(ORIGIN)
    signed.sort()
    assert [new for _, new in signed[:-1]] == [old for old, _ in signed[1:]]
    assert (signed[0][0], signed[-1][1]) == (0, sizes[-1])
    assert latest
    assert latest.head.size == sizes[-1]


@pytest.mark.parametrize("round", range(10))
def test_two_forks_at_once_one_is_cosigned(tmp_path: Path, round: int) -> None:
    answers: list[Answer] = []
    gate = threading.Barrier(2)
    with witness_at(tmp_path) as witness:

        def ask(branch: Branch) -> None:
            gate.wait()
            answers.append(witness.add_checkpoint(branch.request(0, 5)))

        threads = [threading.Thread(target=ask, args=(Branch(n),)) for n in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert sorted(answer.status for answer in answers) == [200, 409]
    assert evidence_in(tmp_path) == [("split-view", True)]


# --- hostile bytes ---

BODY = MAIN.request(5, 7)
PIECES = st.sampled_from(
    [b"old ", b"5", b"0", b"\n", b"\n\n", b" ", b"\xe2\x80\x94 ", b"log.example/one", b"AAAA",
     base64.b64encode(bytes(32)), MAIN.note(7), MAIN.text(7).encode(), b"\r", b"\0", b"\xff"]
)  # fmt: skip


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with witness_at(tmp_path_factory.mktemp("w")) as witness:
        witness.add_checkpoint(MAIN.request(0, 5))
        yield witness


@settings(max_examples=300, deadline=None)
@given(body=st.one_of(st.binary(max_size=400), st.lists(PIECES, max_size=25).map(b"".join)))
def test_any_bytes_get_a_status(standing: Witness, body: bytes) -> None:
    try:
        request = parse_request(body)
    except MalformedProof:
        assert standing.add_checkpoint(body).status == 400
    else:
        assert format_request(request) == body
        assert standing.add_checkpoint(body).status in (400, 403, 404, 409, 422)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(BODY) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(standing: Witness, at: int, bit: int) -> None:
    body = bytearray(BODY)
    body[at] ^= 1 << bit
    assert standing.add_checkpoint(bytes(body)).status in (400, 403, 404, 409, 422)
    assert standing.latest(ORIGIN).head.size == 5  # type: ignore[union-attr]


@settings(max_examples=200, deadline=None)
@given(body=st.one_of(st.binary(max_size=300), st.lists(PIECES, max_size=10).map(b"".join)))
def test_any_answer_is_a_cosignature_or_refused(standing: Witness, body: bytes) -> None:
    with pytest.raises((MalformedProof, BadSignature)):
        parse_cosignature(body, MAIN.text(5), standing.vkey)
    with pytest.raises(MalformedProof):
        parse_size(body + b"x")


def test_the_room_names_its_files() -> None:
    assert (room.KEY_FILE, room.LOCK_FILE) == ("witness.key", "lock")
