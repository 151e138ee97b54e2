"""The browser verifier says what the Python one says: of every frozen bundle and its mutations, of
logs that lie in any field, and of signatures at the edges of Ed25519."""

import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ledger.console.pages import VERIFIER
from ledger.domain.events import CATALOGUE
from ledger.verify.lineage import ONCE
from tests.browser.verifier_world import (
    BUNDLES,
    Core,
    comparable,
    mutations,
    python_says,
    whole_bundle,
)
from tests.unit.lineage_world import World, actor, consent_story, paid_after_a_hold, story

EDGES = json.loads((BUNDLES.parent / "ed25519_edges.json").read_bytes())["cases"]
GOOD = sorted(p for p in BUNDLES.glob("v*/*.lineage.json") if not p.name.startswith("bad-"))
MUTATIONS_EACH = 60
NEVER = (
    "fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "EventSource", "innerHTML",
    "insertAdjacentHTML", "document.write", "eval(", "new Function", "import(",
)  # fmt: skip
BATCH = 40


def check_alike(core: Core, bundles: dict[str, bytes]) -> list[str]:
    """The errors and verdicts that came, after comparing each with Python's."""
    names, said = list(bundles), []
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        for name, verdict in zip(batch, core.verify([bundles[n] for n in batch]), strict=True):
            assert comparable(verdict) == comparable(python_says(bundles[name])), (name, verdict)
            said.append(verdict.get("error") or "verified")
    return said


def test_the_catalogue_is_the_same(core: Core) -> None:
    fields = core.call("() => Object.entries(core.FIELDS).map(([t, f]) => [t, Object.keys(f)])")
    assert dict(fields) == {name: list(kind.fields) for name, kind in CATALOGUE.items()}
    references = {name: dict(k.references) for name, k in CATALOGUE.items() if k.references}
    assert core.call("() => core.REFERENCES") == references
    assert core.call("() => core.ONCE") == dict(ONCE)


@pytest.mark.parametrize("path", GOOD, ids=lambda path: f"{path.parent.name}-{path.name[:-13]}")
def test_mutated_bundles_fail_alike(core: Core, path: Path) -> None:
    data = path.read_bytes()
    seed = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "big")
    altered = list(mutations(data, MUTATIONS_EACH, seed))
    said = check_alike(core, {f"{path.name} mutation {n}": d for n, d in enumerate(altered)})
    # Few changes leave a good bundle: one row less, another subject, a witness nobody knows.
    assert said.count("verified") <= MUTATIONS_EACH / 10


Lie = tuple[str, str, Any]  # label of an event of the story, body field, what it holds instead

STRANGE: list[Any] = [
    None, True, 0, -1, 1, 7, 2**53 - 1, "", "x", "0", "00", "130", "9" * 60, "9" * 61, "a\tb\n",
    "é" * 120, "é" * 121, "😀" * 120, "\u0085", "\u007f", "\u202e", [], {}, ["x"],
    [actor("ann")] * 2, [actor("ann"), actor("ben")], "ab" * 32, "0x" + "ab" * 32, "CC0-1.0",
    actor("ann"),
]  # fmt: skip
CONFIGS: list[Any] = [
    {"r": 8, "on": True, "names": ["a", "b"], "it's": 'a "quote" \\ \u2028'}, {"r": None},
    {"a": "x" * 3_989}, {"a": "x" * 3_992}, {"a": "x" * 3_993}, {"a": "\u00ad" * 998},
    {"a": "\u00ad" * 999}, {f"k{n}": n for n in range(41)}, {"k" * 121: 1}, {"a": ["b", 1]},
]  # fmt: skip
SHARES: list[Any] = [
    [{"contributor": actor("ann"), "ppm": 900_000}],
    [{"contributor": actor("ann"), "ppm": 0}, {"contributor": actor("ben"), "ppm": 900_000}],
    [{"contributor": actor("ann"), "ppm": 450_000}, {"contributor": actor("ann"), "ppm": 450_000}],
    [{"contributor": actor("ann"), "ppm": 899_999}, {"contributor": actor("ben"), "ppm": 1}],
    [{"contributor": actor("owner"), "ppm": 900_000}],
]


def lies() -> Iterator[Lie]:
    """For every field of every event of the story some values that it should not have, and some
    that only look strange."""
    chance = random.Random(3)
    for label, (_, _, body) in story("ab" * 32).items():
        for field in body:
            yield from ((label, field, value) for value in chance.sample(STRANGE, 4))
    yield from (("run.requested", "config", value) for value in [*CONFIGS, *STRANGE])
    yield from (("attribution.recorded", "shares", value) for value in SHARES)


def consent_lies() -> Iterator[Lie]:
    """The same for holds, appeals, recalls and policies."""
    chance = random.Random(4)
    other = "ab" * 4 + "-abab-abab-abab-" + "ab" * 6
    strange = [*STRANGE, 3, 99_999, 100_000, 100_001, "retire", "junk", "ab" * 32, other]
    for label, (_, _, body) in consent_story().items():
        for field in body:
            yield from ((label, field, value) for value in chance.sample(strange, 6))


def _with(field: str, value: Any, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, field: value}


def test_logs_that_lie_are_judged_alike(core: Core, tmp_path: Path) -> None:
    """Signed, logged and proven all the same: what is left is the catalogue and the lineage."""
    bundles = {}
    for n, (label, field, value) in enumerate(lies()):
        (folder := tmp_path / str(n)).mkdir()
        world = World(folder).tell({label: partial(_with, field, value)})
        bundles[f"{n}: {label}.{field}"] = whole_bundle(world, "attribution.recorded")
    said = check_alike(core, bundles)
    assert len(said) > 300
    assert {"verified", "malformed-proof", "inconsistent"} <= set(said)


def test_holds_and_appeals_that_lie_are_judged_alike(core: Core, tmp_path: Path) -> None:
    bundles = {}
    for n, (label, field, value) in enumerate(consent_lies()):
        (folder := tmp_path / str(n)).mkdir()
        world = World(folder).tell().tell_consent({label: partial(_with, field, value)})
        bundles[f"{n}: {label}.{field}"] = whole_bundle(world, label)
    for label, signer in (("held", "ann"), ("split", "ann"), ("appealed", "owner")):
        (folder := tmp_path / f"{label} {signer}").mkdir()
        world = World(folder).tell().tell_consent(signers={label: signer})
        bundles[f"{label} by {signer}"] = whole_bundle(world, label)
    said = check_alike(core, bundles)
    assert len(said) > 100
    assert {"verified", "malformed-proof", "inconsistent"} <= set(said)


def test_what_is_withheld_is_added_up_alike(core: Core, tmp_path: Path) -> None:
    bundles = {}
    for released, claims_all in ((False, False), (True, False), (False, True)):
        (folder := tmp_path / f"{released}-{claims_all}").mkdir()
        world = World(folder).tell()
        bundles[folder.name] = paid_after_a_hold(world, released=released, claims_all=claims_all)
    assert check_alike(core, bundles) == ["verified"] * 3


@pytest.mark.parametrize("way", ["verifyEd25519", "verifyByEquation"])
def test_signatures_at_the_edges(core: Core, way: str) -> None:
    """With crypto.subtle, as the page does it in Chromium, and by noble's points alone."""
    assert core.call("() => Boolean(crypto.subtle)")
    found = core.call(
        """async ([cases, way]) => {
          const bytes = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (h) => parseInt(h, 16));
          return Promise.all(cases.map((c) =>
            core[way](bytes(c.public_key), bytes(c.message), bytes(c.signature))));
        }""",
        [EDGES, way],
    )
    wrong = {
        case["name"]: valid
        for case, valid in zip(EDGES, found, strict=True)
        if valid is not case["valid"]
    }
    assert wrong == {}


def test_the_committed_page_is_what_the_sources_build_to() -> None:
    folder = VERIFIER.parent
    if not shutil.which("node") or not (folder / "node_modules" / "esbuild").exists():
        pytest.skip("needs Node and `npm ci` in ledger/console/verifier")
    done = subprocess.run(
        ["node", "build.mjs", "--check"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_page_carries_what_it_needs_and_no_address() -> None:
    html = VERIFIER.read_text("utf-8")
    assert "The MIT License (MIT)" in html
    code = html.split("<script>")[1]
    for word in NEVER:
        assert word not in code, word
    assert "resolved" not in (VERIFIER.parent / "package-lock.json").read_text("utf-8")
