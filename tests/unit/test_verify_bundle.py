"""A bundle is believed only as a whole: every byte flipped, every field changed, every step."""

import base64
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import encode_entry, sign_event
from ledger.domain.events import CATALOGUE
from ledger.errors import (
    AnchorMismatch,
    BadSignature,
    Inconsistent,
    MalformedProof,
    NotIncluded,
    VerificationError,
)
from ledger.log.bundle import Anchored
from ledger.verify import bundle_format, l1
from ledger.verify.__main__ import main
from ledger.verify.bundle import STEP_NAMES, V1_STEPS, verify_bundle
from ledger.verify.bundle_format import Bundle, BundledEntry, format_bundle, parse_bundle
from ledger.verify.checkpoint import Checkpoint, format_checkpoint
from ledger.verify.encoding import MAX_COMMAS
from ledger.verify.manifest import parse_manifest
from ledger.verify.merkle import leaf_hash, node_hash
from ledger.verify.note import (
    COSIGNATURE,
    cosign_text,
    format_note,
    format_vkey,
    sign_text,
    vkey_of,
)
from tests.unit.lineage_world import NOW, ORIGIN, World, key, name

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world")).tell()
    world.checkpoint()
    return world


@pytest.fixture(scope="module")
def good(world: World) -> bytes:
    return world.bundle()


def test_a_good_bundle(world: World, good: bytes) -> None:
    verdict = verify_bundle(good, trusted_vkey=world.vkey)
    assert [(step.number, step.name) for step in verdict.steps] == list(STEP_NAMES.items())[
        :V1_STEPS
    ]
    assert verdict.facts["size"] == world.log.size() == 11
    assert verdict.facts["subject"] == str(world.ids["inference.recorded"])
    assert any("the key you gave" in line for line in verdict.trusted)
    json.dumps(verdict.to_json())
    assert format_bundle(parse_bundle(good)) == good


def test_shared_hashes_stand_once(good: bytes) -> None:
    value = json.loads(good)
    assert len(value["hashes"]) == len(set(value["hashes"]))
    assert len(value["hashes"]) < sum(len(entry["proof"]) for entry in value["entries"])


@pytest.mark.parametrize(("subject", "step"), [("recorded ann", 1), ("inference.recorded", 11)])
def test_no_flipped_byte_is_accepted(world: World, subject: str, step: int) -> None:
    """One bit of each byte; a bit that leaves the bundle valid would be a second spelling."""
    good = world.bundle(subject)
    for at in range(0, len(good), step):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        with pytest.raises(VerificationError):
            verify_bundle(bytes(bad))


def test_no_truncation_is_accepted(good: bytes) -> None:
    for at in (0, 1, len(good) // 2, len(good) - 1):
        with pytest.raises(MalformedProof):
            verify_bundle(good[:at])
    with pytest.raises(MalformedProof):
        verify_bundle(good + b"\n")


def spoilt(good: bytes, change: Callable[[Any], object]) -> bytes:
    value = json.loads(good)
    change(value)
    return canonical_json(value)


def flip_b64(text: str, at: int = -1) -> str:
    data = bytearray(base64.b64decode(text))
    data[at] ^= 1
    return base64.b64encode(data).decode()


def flip_hex(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


def change_blob(value: Any) -> None:
    ((sha, blob),) = value["blobs"].items()
    value["blobs"][sha] = flip_b64(blob)


def rename_blob(value: Any) -> None:
    ((sha, blob),) = value["blobs"].items()
    value["blobs"] = {flip_hex(sha): blob}


TAMPERED: list[tuple[str, Callable[[Any], object], type[VerificationError], str]] = [
    ("format", lambda v: v.update(format="x"), MalformedProof, "format"),
    ("extra field", lambda v: v.update(more=1), MalformedProof, "more"),
    ("no field", lambda v: v.pop("l1"), MalformedProof, "l1"),
    ("log", lambda v: v.update(log="other.example/log"), Inconsistent, "other.example/log"),
    ("vkey", lambda v: v.update(vkey="name+00000000+AAAA"), MalformedProof, "key"),
    ("vkey type", lambda v: v.update(vkey=7), MalformedProof, "vkey"),
    ("subject", lambda v: v.update(subject=name("nothing")), Inconsistent, "subject"),
    ("subject type", lambda v: v.update(subject="x"), MalformedProof, "subject"),
    (
        "checkpoint size",
        lambda v: v.update(checkpoint=v["checkpoint"].replace("\n11\n", "\n12\n")),
        BadSignature,
        "signature",
    ),
    ("checkpoint", lambda v: v.update(checkpoint="x"), MalformedProof, "note"),
    ("no entries", lambda v: v.update(entries=[], hashes=[]), MalformedProof, "entries"),
    ("order", lambda v: v["entries"].reverse(), MalformedProof, "ascend"),
    ("index", lambda v: v["entries"][0].update(index=-1), MalformedProof, "entries[0].index"),
    ("index moved", lambda v: v["entries"][-1].update(index=11), NotIncluded, "entry 11"),
    (
        "entry",
        lambda v: v["entries"][3].update(entry=flip_b64(v["entries"][3]["entry"])),
        NotIncluded,
        "entry 3",
    ),
    ("entry type", lambda v: v["entries"][3].update(entry=3), MalformedProof, "entries[3].entry"),
    ("proof short", lambda v: v["entries"][3]["proof"].pop(), VerificationError, ""),
    (
        "proof position",
        lambda v: v["entries"][3]["proof"].append(999),
        MalformedProof,
        "entries[3].proof",
    ),
    (
        "proof swapped",
        lambda v: v["entries"][3].update(proof=v["entries"][3]["proof"][::-1]),
        VerificationError,
        "",
    ),
    (
        "hash",
        lambda v: v["hashes"].__setitem__(0, flip_hex(v["hashes"][0])),
        NotIncluded,
        "entry 0",
    ),
    ("hash unused", lambda v: v["hashes"].append("00" * 32), MalformedProof, "one spelling"),
    ("hash form", lambda v: v["hashes"].append("zz"), MalformedProof, "hashes["),
    ("blob", change_blob, Inconsistent, "blob"),
    ("blob name", rename_blob, Inconsistent, "blob"),
    ("blob missing", lambda v: v.update(blobs={}), Inconsistent, "manifest"),
    ("blob list", lambda v: v.update(blobs=[]), MalformedProof, "blobs"),
    ("l1", lambda v: v.update(l1={"section": {}}), MalformedProof, "l1"),
]


@pytest.mark.parametrize(
    ("change", "error", "says"), [case[1:] for case in TAMPERED], ids=[c[0] for c in TAMPERED]
)
def test_a_changed_field_is_named(
    good: bytes, change: Callable[[Any], object], error: type[VerificationError], says: str
) -> None:
    with pytest.raises(error) as caught:
        verify_bundle(spoilt(good, change))
    assert says in str(caught.value)


def test_another_key_than_the_trusted_one(good: bytes) -> None:
    other = format_vkey(vkey_of(ORIGIN, key("someone else")))
    with pytest.raises(BadSignature, match="you trust"):
        verify_bundle(good, trusted_vkey=other)


def test_the_log_key_bears_the_name_of_the_log(good: bytes) -> None:
    stranger = format_vkey(vkey_of("elsewhere.example/log", key("the log")))
    with pytest.raises(Inconsistent, match="bears the log's origin"):
        verify_bundle(changed(good, vkey=stranger))


def test_a_witness_key_is_no_log_key(good: bytes) -> None:
    witness = format_vkey(vkey_of(ORIGIN, key("the log"), COSIGNATURE))
    with pytest.raises(MalformedProof, match="witness"):
        verify_bundle(changed(good, vkey=witness))


@pytest.mark.parametrize("many", [b"[0" + b",0" * MAX_COMMAS + b",0]", b"," * (MAX_COMMAS + 1)])
def test_a_file_of_nothing_but_values_is_refused_before_it_is_read(many: bytes) -> None:
    with pytest.raises(MalformedProof, match="MAX_COMMAS"):
        verify_bundle(many)
    with pytest.raises(MalformedProof, match="MAX_COMMAS"):
        parse_manifest(many)


def changed(bundle: bytes, **fields: Any) -> bytes:
    return canonical_json({**json.loads(bundle), **fields})


def signed(type: str = "identity.registered", *, log: str = ORIGIN, **body: Any) -> bytes:
    return sign_event(
        key("ann"), type=type, log=log, body=body or {"name": "ann"}, id=UUID(name("e")), at=NOW
    )


def one_entry(
    entry: bytes, *, index: int = 0, size: int = 1, proof: tuple[bytes, ...] = ()
) -> bytes:
    """A bundle of one entry, whose checkpoint a lying log signs over whatever root fits."""
    node = leaf_hash(entry)
    for sibling in proof:
        node = node_hash(sibling, node)
    text = format_checkpoint(Checkpoint(origin=ORIGIN, size=size, root=node))
    return format_bundle(
        Bundle(
            log=ORIGIN,
            vkey=format_vkey(vkey_of(ORIGIN, key("log"))),
            subject=UUID(name("e")),
            checkpoint=format_note(text, [sign_text(text, ORIGIN, key("log"))]),
            entries=(BundledEntry(index=index, entry=entry, proof=proof),),
        )
    )


def test_even_a_lying_log_cannot_move_an_entry() -> None:
    """RFC proofs let leaf 2 of 3 pass as leaf 1 of 2; the index inside the entry does not."""
    sibling = leaf_hash(b"the first two")
    verify_bundle(one_entry(encode_entry(2, NOW, signed()), index=2, size=3, proof=(sibling,)))
    with pytest.raises(Inconsistent, match="says inside that it is entry 2"):
        verify_bundle(one_entry(encode_entry(2, NOW, signed()), index=1, size=2, proof=(sibling,)))


@pytest.mark.parametrize(
    ("envelope", "error", "field"),
    [
        (signed(log="other.example/log"), Inconsistent, "log"),
        (signed().replace(b'"sig":"', b'"sig":"AAAA')[:-6] + b'=="', MalformedProof, None),
        (signed(type="no.such"), MalformedProof, "type"),
        (signed(name="x" * 500), MalformedProof, "body.name"),
        (signed(name="x", more="y"), MalformedProof, "body"),
        (signed().replace(b"ann", b"eve"), BadSignature, "sig"),
        (b"{}", MalformedProof, None),
        (signed() + b" ", MalformedProof, None),
    ],
)
def test_an_event_that_is_none(
    envelope: bytes, error: type[VerificationError], field: str | None
) -> None:
    with pytest.raises(error) as caught:
        verify_bundle(one_entry(encode_entry(0, NOW, envelope)))
    assert caught.value.detail["entry"] == 0
    if field:
        assert caught.value.detail["field"] == field


# --- witnesses and L1 ---


def with_witness(good: bytes, timestamp: int = 1_700_000_000) -> bytes:
    def add(value: Any) -> None:
        text = value["checkpoint"].rpartition("\n\n")[0] + "\n"
        line = cosign_text(text, "witness.example/w", key("witness"), timestamp)
        log_line = sign_text(text, ORIGIN, key("log"))
        value["checkpoint"] = format_note(text, [log_line, line]).decode()

    return spoilt(good, add)


def test_a_known_witness_is_named(good: bytes) -> None:
    witness = format_vkey(vkey_of("witness.example/w", key("witness"), COSIGNATURE))
    stranger = format_vkey(vkey_of("witness.example/w", key("stranger"), COSIGNATURE))
    data = with_witness(good)
    verdict = verify_bundle(data, witness_vkeys=[witness])
    assert verdict.facts["witnesses"] == ["witness.example/w"]
    assert any("saw the same tree at 2023-11-14" in line for line in verdict.proven)
    assert verify_bundle(data, witness_vkeys=[stranger]).facts["witnesses"] == []
    with pytest.raises(BadSignature):
        verify_bundle(
            spoilt(
                data,
                lambda v: v.update(checkpoint=v["checkpoint"].replace("witness.example/w AA", "")),
            ),
            trusted_vkey=witness,
        )


FACTS = {"chain_id": 31337, "contract": "0x" + "12" * 20, "block_number": 7, "block_hash": "0xab"}


def anchored_bundle(
    folder: Path,
    *,
    early: int,
    section: Callable[[int, bytes], dict[str, Any]] = lambda size, root: {"a": "section"},
) -> tuple[World, bytes]:
    """A bundle whose L1 section anchors the tree of the first `early` entries."""
    world = World(folder)
    world.add("ann", "identity.registered", {"name": "ann"})
    first = world.checkpoint()
    world.tell()
    anchor = first if early == 1 else world.checkpoint()
    world.checkpoint()
    anchored = Anchored(checkpoint=anchor, section=section(anchor.size, anchor.root))
    return world, world.bundle(anchored=anchored)


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Sections that reached `l1.verify_l1`, which is tested on its own."""
    seen: list[Mapping[str, Any]] = []

    def verify(section: Mapping[str, Any], *, size: int, root: bytes) -> dict[str, Any]:
        seen.append({"section": section, "size": size, "root": root})
        return dict(FACTS)

    monkeypatch.setattr(l1, "verify_l1", verify)
    return seen


def test_an_anchor_before_the_subject(tmp_path: Path, chain: list[Mapping[str, Any]]) -> None:
    _, data = anchored_bundle(tmp_path, early=1)
    verdict = verify_bundle(data, require_l1=True)
    assert verdict.steps[-1].status == "ok"
    assert chain[0]["size"] == 1
    assert any("came after them" in line for line in verdict.trusted)
    assert any("ask a node that you trust" in line for line in verdict.trusted)


def test_an_anchor_that_covers_all(tmp_path: Path, chain: list[Mapping[str, Any]]) -> None:
    _, data = anchored_bundle(tmp_path, early=12)
    verdict = verify_bundle(data)
    assert verdict.facts["size"] == chain[0]["size"] == 12
    assert json.loads(data)["l1"]["consistency"] == []
    assert not any("came after them" in line for line in verdict.trusted)
    assert not any("No witness and no chain" in line for line in verdict.trusted)


def test_an_anchor_of_another_history(tmp_path: Path, chain: list[Mapping[str, Any]]) -> None:
    _, data = anchored_bundle(tmp_path, early=1)
    text = format_checkpoint(Checkpoint(origin=ORIGIN, size=1, root=bytes(32)))
    note = format_note(text, [sign_text(text, ORIGIN, key("log"))]).decode()
    with pytest.raises(Inconsistent, match="not only appended to"):
        verify_bundle(spoilt(data, lambda v: v["l1"].update(checkpoint=note)))
    with pytest.raises(Inconsistent):
        verify_bundle(spoilt(data, lambda v: v["l1"]["consistency"].pop()))
    assert chain == []


def test_l1_without_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(section: Mapping[str, Any], *, size: int, root: bytes) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'rlp'", name="rlp")

    monkeypatch.setattr(l1, "verify_l1", verify)
    _, data = anchored_bundle(tmp_path, early=1)
    step = verify_bundle(data).steps[-1]
    assert step.status == "skipped"
    assert "tributary-ledger[l1]" in step.detail
    with pytest.raises(AnchorMismatch, match="required"):
        verify_bundle(data, require_l1=True)


def test_l1_required_but_absent(good: bytes) -> None:
    with pytest.raises(AnchorMismatch, match="carries no L1 section"):
        verify_bundle(good, require_l1=True)


@pytest.mark.parametrize("early", [1, 12])
def test_a_whole_bundle_with_a_real_l1_proof(tmp_path: Path, early: int) -> None:
    pytest.importorskip("trie", reason="the extra [l1] is not installed")
    from tests.unit.made_chain import l1_section

    _, data = anchored_bundle(tmp_path, early=early, section=l1_section)
    verdict = verify_bundle(data, require_l1=True)
    assert [step.status for step in verdict.steps] == ["ok"] * 6
    assert verdict.facts["l1"]["block_number"] == 7
    for at in range(data.index(b'"l1":'), data.index(b'"log":'), 3):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        with suppress(VerificationError):
            # No header names its chain, so the number is a claim: never among what is proven.
            changed = verify_bundle(bytes(bad))
            assert changed.facts["l1"].pop("chain_id") != verdict.facts["l1"]["chain_id"]
            assert changed.facts["l1"].items() <= verdict.facts["l1"].items()
            assert changed.proven == verdict.proven


def test_the_real_l1_refuses_a_made_up_section(tmp_path: Path) -> None:
    pytest.importorskip("rlp", reason="the extra [l1] is not installed")
    _, data = anchored_bundle(tmp_path, early=1)
    with pytest.raises(VerificationError):
        verify_bundle(data)


# --- hostile bytes ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | st.text(max_size=20),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.binary(max_size=300))
def test_hostile_bytes_only_fail_as_designed(data: bytes) -> None:
    with pytest.raises(VerificationError):
        verify_bundle(data)


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from(sorted(bundle_format._FIELDS)), value=json_values)
def test_hostile_fields_only_fail_as_designed(good: bytes, field: str, value: Any) -> None:
    if json.loads(good)[field] == value:
        return
    with pytest.raises(VerificationError):
        verify_bundle(spoilt(good, lambda v: v.update({field: value})))


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from(["index", "entry", "proof"]), value=json_values, at=st.integers(0, 9))
def test_hostile_entries_only_fail_as_designed(
    good: bytes, field: str, value: Any, at: int
) -> None:
    if json.loads(good)["entries"][at][field] == value:
        return
    with pytest.raises(VerificationError):
        verify_bundle(spoilt(good, lambda v: v["entries"][at].update({field: value})))


@settings(max_examples=300, deadline=None)
@given(type=st.sampled_from(sorted(CATALOGUE)), data=st.data())
def test_hostile_events_only_fail_as_designed(type: str, data: st.DataObject) -> None:
    """Well signed, well placed, and with anything in the body."""
    fields = CATALOGUE[type].fields
    body = data.draw(st.fixed_dictionaries(dict.fromkeys(fields, json_values)))
    raw = sign_event(key("ann"), type=type, log=ORIGIN, body=body, id=UUID(name("e")), at=NOW)
    with suppress(VerificationError):
        verify_bundle(one_entry(encode_entry(0, NOW, raw)))


def test_deep_nesting_and_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for hostile in (b"[" * 200_000, b'{"a":' * 200_000, b"[" * 100 + b"]" * 100, b"1" * 10_000):
        with pytest.raises(MalformedProof):
            verify_bundle(hostile)
    monkeypatch.setattr(bundle_format, "MAX_BUNDLE_BYTES", 10)
    with pytest.raises(MalformedProof, match="MAX_BUNDLE_BYTES"):
        verify_bundle(b"x" * 11)


# --- the command ---


def run(*arguments: str, data: bytes = b"", env: Mapping[str, str] | None = None) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "ledger.verify", *arguments],
        input=data,
        capture_output=True,
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        timeout=60,
        check=False,
    )


def test_command_verifies_and_says_so(tmp_path: Path, good: bytes, world: World) -> None:
    file = tmp_path / "answer.lineage.json"
    file.write_bytes(good)
    done = run(str(file), "--key", world.vkey)
    assert done.returncode == 0
    assert done.stdout.decode().startswith("VERIFIED\n")
    piped = run("-", "--json", data=good)
    assert piped.returncode == 0
    assert json.loads(piped.stdout)["verified"] is True


def test_command_fails_in_words(
    tmp_path: Path, good: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.lineage.json"
    file.write_bytes(spoilt(good, change_blob))
    assert main([str(file)]) == 1
    assert "NOT VERIFIED: inconsistent: blob" in capsys.readouterr().err
    assert main([str(file), "--json"]) == 1
    problem = json.loads(capsys.readouterr().out)
    assert problem["verified"] is False
    assert problem["error"] == "inconsistent"
    assert problem["detail"]["field"].startswith("blobs.")
    assert main([str(tmp_path / "none")]) == 4
    file.write_bytes(good)
    assert main([str(file), "--require-l1"]) == 1
    with pytest.raises(SystemExit, match="2"):  # wrong usage accuses no file
        main([str(file), "--key", "\udcff+x+y"])
    assert "Traceback" not in capsys.readouterr().err


def test_command_never_shows_a_traceback(tmp_path: Path, good: bytes) -> None:
    rng = random.Random(7)
    hostile = [rng.randbytes(200), b"", b"\x00", b"{}", good[:-1], b'"\\ud800"', b"[" * 100_000]
    for data in hostile:
        done = run("-", data=data)
        assert done.returncode == 1
        assert b"Traceback" not in done.stderr
        assert done.stderr.startswith(b"NOT VERIFIED")


def test_a_bug_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops\x1b[2J")

    monkeypatch.setattr("ledger.verify.__main__.verify_bundle", broken)
    file = tmp_path / "x"
    file.write_bytes(b"")
    assert main([str(file)]) == 8
    assert "a bug of this verifier: ZeroDivisionError: oops?[2J" in capsys.readouterr().err


PYNACL = {"nacl", "_sodium", "cffi", "_cffi_backend", "__main__"}
ISOLATED = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = ["verify", *sys.argv[2:]]
code = 0
try:
    runpy.run_module("ledger.verify", run_name="__main__", alter_sys=False)
except SystemExit as done:
    code = done.code
tops = {name.partition(".")[0] for name in sys.modules}
print("MODULES", *sorted(tops - set(sys.stdlib_module_names)))
sys.exit(code)
"""


def test_nothing_but_pynacl_is_needed(tmp_path: Path, good: bytes) -> None:
    """An interpreter without site-packages sees the project, PyNaCl and cffi, and no more."""
    import _cffi_backend
    import cffi
    import nacl

    room = tmp_path / "room"
    room.mkdir()
    (room / "ledger").symlink_to(REPOSITORY / "ledger")
    for module in (nacl, cffi):
        folder = Path(str(module.__file__)).parent
        (room / folder.name).symlink_to(folder)
    backend = Path(str(_cffi_backend.__file__))
    (room / backend.name).symlink_to(backend)
    (room / "good").write_bytes(good)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ISOLATED, str(room), str(room / "good")],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode()
    assert out.startswith("VERIFIED")
    modules = set(out.rpartition("MODULES ")[2].split())
    assert modules <= {"ledger", *PYNACL}
