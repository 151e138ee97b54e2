"""Notes, checkpoints, proofs and tile names: what is refused, and with which error."""

from contextlib import suppress
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from ledger.errors import BadSignature, Inconsistent, MalformedProof, VerificationError
from ledger.verify.checkpoint import (
    Checkpoint,
    format_checkpoint,
    open_checkpoint,
    parse_checkpoint,
)
from ledger.verify.encoding import decode_base64, decode_decimal, printable
from ledger.verify.merkle import EMPTY_ROOT
from ledger.verify.note import (
    COSIGNATURE,
    MAX_NOTE_BYTES,
    MAX_SIGNATURES,
    VerifierKey,
    cosign_text,
    format_note,
    format_skey,
    format_vkey,
    open_note,
    parse_note,
    parse_skey,
    parse_vkey,
    sign_text,
    vkey_of,
)
from ledger.verify.tiles import (
    Tile,
    decode_entries,
    encode_entries,
    parse_tile_path,
    tile_hashes,
    tile_path,
    tiles_of,
)
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof, parse_tlog_proof

LOG, WITNESS = (SigningKey(sha256(n).digest()) for n in (b"log", b"witness"))
NAME, WITNESS_NAME = "log.example/one", "witness.example/w"
LOG_KEY = vkey_of(NAME, LOG)
WITNESS_KEY = vkey_of(WITNESS_NAME, WITNESS, COSIGNATURE)
TEXT = format_checkpoint(Checkpoint(origin=NAME, size=7, root=bytes(32)))
SIGNED = format_note(TEXT, [sign_text(TEXT, NAME, LOG)])
BOTH = format_note(
    TEXT, [sign_text(TEXT, NAME, LOG), cosign_text(TEXT, WITNESS_NAME, WITNESS, 1_679_315_147)]
)


def test_keys_travel_as_text() -> None:
    assert parse_vkey(format_vkey(WITNESS_KEY)) == WITNESS_KEY
    name, key = parse_skey(format_skey(NAME, LOG))
    assert (name, bytes(key)) == (NAME, bytes(LOG))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "na me+00000000+AA==",
        "na\u2003me+00000000+AA==",
        "+00000000+AA==",
        format_vkey(LOG_KEY)[:-1],
        format_vkey(LOG_KEY).replace("one", "two"),
        format_vkey(LOG_KEY).upper(),
        format_vkey(VerifierKey(name=NAME, type=1, public_key=bytes(31))),
        format_vkey(VerifierKey(name=NAME, type=2, public_key=bytes(32))),
        "x" * 2_000,
        "\udcff+00000000+AA==",
    ],
)
def test_bad_vkeys(text: str) -> None:
    with pytest.raises(MalformedProof):
        parse_vkey(text)


@pytest.mark.parametrize(
    "text",
    [
        format_vkey(LOG_KEY),
        "PRIVATE+KEY+x",
        format_skey(NAME, LOG)[:-4],
        format_skey(NAME, LOG).replace("one", "two"),
    ],
)
def test_bad_skeys(text: str) -> None:
    with pytest.raises(MalformedProof):
        parse_skey(text)


def test_a_cosignature_carries_its_time() -> None:
    opened = open_checkpoint(BOTH, LOG_KEY, witnesses=[WITNESS_KEY])
    assert [(w.key, w.timestamp) for w in opened.witnesses] == [(WITNESS_KEY, 1_679_315_147)]
    assert open_checkpoint(BOTH, LOG_KEY).witnesses == ()


def test_a_cosignature_does_not_replace_the_logs_own() -> None:
    alone = format_note(TEXT, [cosign_text(TEXT, WITNESS_NAME, WITNESS, 1)])
    with pytest.raises(BadSignature, match="only by witnesses"):
        open_checkpoint(alone, LOG_KEY, witnesses=[WITNESS_KEY])
    # Nor where the witness's key is offered as the log's.
    with pytest.raises(MalformedProof, match="a witness's"):
        open_checkpoint(alone, WITNESS_KEY, origin=NAME)


def test_a_cosignature_of_another_time_does_not_verify() -> None:
    line = cosign_text(TEXT, WITNESS_NAME, WITNESS, 1)
    later = (2).to_bytes(8, "big") + line.signature[8:]
    bad = type(line)(name=line.name, key_id=line.key_id, signature=later)
    with pytest.raises(BadSignature, match="does not verify"):
        open_note(format_note(TEXT, [bad]), [WITNESS_KEY])


def test_a_bad_signature_of_a_known_key_refuses_the_whole_note() -> None:
    forged = sign_text(TEXT.replace("7", "8"), NAME, LOG)
    with pytest.raises(BadSignature):
        open_note(format_note(TEXT, [forged, sign_text(TEXT, NAME, LOG)]), [LOG_KEY])
    short = type(forged)(name=NAME, key_id=forged.key_id, signature=b"x")
    with pytest.raises(BadSignature):
        open_note(format_note(TEXT, [short]), [LOG_KEY])


def test_a_repeated_or_unknown_signature_is_ignored() -> None:
    mine = sign_text(TEXT, NAME, LOG)
    stranger = sign_text(TEXT, NAME, WITNESS)  # same name, another key id
    opened = open_note(format_note(TEXT, [stranger, mine, mine]), [LOG_KEY])
    assert len(opened.verified) == 1
    assert opened.unverified == (stranger,)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text\n",
        b"text\n\n",
        SIGNED[:-1],
        SIGNED.replace(b"\n\n", b"\n"),
        SIGNED.replace("—".encode(), b"-"),
        SIGNED + b"more\n",
        SIGNED.replace(b"log.example/one\n7", b"log.example/one\r\n7"),
        SIGNED.replace(b"7", b"\x007"),
        b"\xff" + SIGNED,
        SIGNED[:-4] + b"B==\n",
        "x\n\n— a AAAA\n".encode(),
        "x\n\n— AAAAAAAA\n".encode(),
        format_note(TEXT, [sign_text(TEXT, NAME, LOG)] * (MAX_SIGNATURES + 1)),
        b"x" * (MAX_NOTE_BYTES + 1),
    ],
)
def test_malformed_notes(data: bytes) -> None:
    with pytest.raises(MalformedProof):
        parse_note(data)


def test_text_may_hold_empty_lines() -> None:
    text = "a\n\nb\n"
    opened = open_note(format_note(text, [sign_text(text, NAME, LOG)]), [LOG_KEY])
    assert opened.text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "origin\n",
        "origin\n7\n",
        TEXT[:-1],
        TEXT.replace("\n7\n", "\n07\n"),
        TEXT.replace("\n7\n", "\n-7\n"),
        TEXT.replace("\n7\n", "\n7 \n"),
        TEXT.replace("\n7\n", "\n٧\n"),
        TEXT.replace("\n7\n", f"\n{2**63}\n"),
        TEXT.replace("\n7\n", "\n0\n"),
        TEXT.replace("AAA=", "AAB="),
        TEXT.replace("AAA=", "AA=="),
        TEXT + "\n",
        "\n" + TEXT,
    ],
)
def test_malformed_checkpoints(text: str) -> None:
    with pytest.raises(MalformedProof):
        parse_checkpoint(text)


def test_checkpoints_kept_whole() -> None:
    extended = parse_checkpoint(TEXT + "an extension\n")
    assert extended.extensions == ("an extension",)
    assert format_checkpoint(extended) == TEXT + "an extension\n"
    empty = Checkpoint(origin=NAME, size=0, root=EMPTY_ROOT)
    assert parse_checkpoint(format_checkpoint(empty)) == empty


def test_another_logs_checkpoint() -> None:
    with pytest.raises(Inconsistent, match="another log"):
        open_checkpoint(SIGNED, LOG_KEY, origin="log.example/two")
    text = TEXT.replace("one", "two")
    with pytest.raises(Inconsistent):
        open_checkpoint(format_note(text, [sign_text(text, NAME, LOG)]), LOG_KEY)


PROOF = format_tlog_proof(TlogProof(index=3, proof=(bytes(32),), checkpoint=SIGNED, extra=b"x"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PROOF[:40],
        PROOF.replace(b"@v1", b"@v2"),
        PROOF.replace(b"index 3", b"index 03"),
        PROOF.replace(b"index 3\n", b""),
        PROOF.replace(b"extra eA==", b"extra eA"),
        PROOF.replace(b"AAA=\n", b"AA=\n", 1),
        PROOF.replace(b"index", b"\xc3\xa4ndex"),
        format_tlog_proof(TlogProof(index=0, proof=(bytes(32),) * 64, checkpoint=SIGNED)),
        format_tlog_proof(TlogProof(index=0, proof=(), checkpoint=b"")),
        PROOF + b"x" * 2 * MAX_NOTE_BYTES,
    ],
)
def test_malformed_proofs(data: bytes) -> None:
    with pytest.raises(MalformedProof):
        parse_tlog_proof(data)


@pytest.mark.parametrize(
    "path",
    [
        "tile/0/000.p/0",
        "tile/0/000.p/256",
        "tile/0/000.p/01",
        "tile/00/000",
        "tile/64/000",
        "tile/0/0",
        "tile/0/0001",
        "tile/0/x000/001",
        "tile/0/001/x002",
        "tile/0/x001/002/",
        "/tile/0/000",
        "tile/entries/000.p/",
        "tile/data/000",
        "tile/0/٠٠٠",
        "tile/0/" + "x999/" * 7 + "999",
        "tile/0/" + "x999/" * 70 + "999",
    ],
)
def test_bad_tile_paths(path: str) -> None:
    with pytest.raises(MalformedProof):
        parse_tile_path(path)


@given(
    level=st.none() | st.integers(0, 63),
    n=st.integers(0, 2**63 - 1) | st.integers(0, 2_000),
    width=st.integers(1, 256),
)
def test_tile_paths_both_ways(level: int | None, n: int, width: int) -> None:
    tile = Tile(level=level, n=n, width=width)
    assert parse_tile_path(tile_path(tile)) == tile


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_entry_bundles_both_ways(entries: list[bytes]) -> None:
    data = encode_entries(entries)
    assert decode_entries(data, len(entries)) == entries
    for bad in (data + b"\x00", data[:-1] if data else b"\x00\x01"):
        with pytest.raises(MalformedProof):
            decode_entries(bad, len(entries))


def test_tiles_have_their_exact_length() -> None:
    assert tile_hashes(bytes(64), 2) == [bytes(32)] * 2
    for bad in (b"", bytes(63), bytes(65), bytes(96)):
        with pytest.raises(MalformedProof):
            tile_hashes(bad, 2)
    assert tiles_of(0) == []


@given(st.binary(max_size=400))
def test_hostile_bytes_only_fail_as_designed(data: bytes) -> None:
    text = data.decode("latin-1")
    for parse in (parse_note, parse_tlog_proof, lambda d: decode_entries(d, 3)):
        with suppress(VerificationError):
            parse(data)
    for parse_text in (parse_vkey, parse_skey, parse_checkpoint, parse_tile_path):
        with suppress(VerificationError):
            parse_text(text)


def test_one_spelling_of_base64_and_decimals() -> None:
    assert decode_base64("AAE=", "x") == b"\x00\x01"
    for bad in ("AAF=", "AAE", "AAE=\n", " AAE=", "AA-_", "ä"):
        with pytest.raises(MalformedProof):
            decode_base64(bad, "x")
    assert decode_decimal("0", "x") == 0
    for bad in ("", "00", "+1", "1_0", "9" * 19, "²"):
        with pytest.raises(MalformedProof):
            decode_decimal(bad, "x")


def test_strangers_do_not_move_the_cursor() -> None:
    assert printable("a\x1b[2J\u202e\nb") == "a?[2J??b"
    assert printable("x" * 100, 5) == "xxxx…"
