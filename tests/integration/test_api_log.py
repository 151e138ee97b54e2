"""What a stranger fetches: the log as C2SP has it, proofs, bundles; and what they see when the
database is away."""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ledger.client import now_us
from ledger.domain.envelope import leaf_hash, parse_envelope, sign_event
from ledger.errors import VerificationError
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.verify.bundle import verify_bundle
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.merkle import tree_root, verify_consistency
from ledger.verify.note import parse_vkey
from ledger.verify.tiles import Tile, decode_entries, tile_hashes, tile_path
from ledger.verify.tlog_proof import verify_tlog_proof
from tests.api_world import LOG, MODEL, LocalEngine, Service, key_of, service
from tests.integration.test_api_events import net, problem
from tests.pg import create_database

MANY = 300  # more than one tile holds


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine()) as running:
        owner = key_of("owner")
        raws = [
            sign_event(
                owner, type="datanet.created", log=LOG, body=net(), id=uuid4(), at=now_us()
            )
            for _ in range(MANY)
        ]  # fmt: skip
        with running.http() as http:
            found = http.post("/v1/events/batch", content=b"\n".join(raws))
            assert found.status_code == 201
        running.tell(home / "adapters")
        yield running


def tiles(size: int) -> list[Tile]:
    """Every tile of hashes of a tree, partial ones last in their level."""
    found, level = [], 0
    while count := size >> (8 * level):
        found += [
            Tile(level=level, n=n, width=min(256, count - 256 * n)) for n in range(-(-count // 256))
        ]
        level += 1
    return found


def test_the_whole_log_is_rebuilt_from_its_files(api: Service) -> None:
    """As any tlog-tiles client does: checkpoint, entries, tiles, each held against the others."""
    size = api.settle()
    with api.http() as http:
        vkey = parse_vkey(http.get("/log/vkey").text.strip())
        note = http.get("/log/checkpoint")
        assert note.headers["content-type"] == "text/plain; charset=utf-8"
        assert note.headers["cache-control"] == "no-cache"
        checkpoint = open_checkpoint(note.content, vkey, origin=LOG).checkpoint
        assert checkpoint.size == size
        leaves: list[bytes] = []
        stored: list[bytes] = []
        bundles = [Tile(level=None, n=t.n, width=t.width) for t in tiles(size) if t.level == 0]
        for tile in tiles(size) + bundles:
            found = http.get(f"/log/{tile_path(tile)}")
            assert found.status_code == 200, tile
            assert found.headers["content-type"] == "application/octet-stream"
            assert "immutable" in found.headers["cache-control"]
            assert "max-age=31536000" in found.headers["cache-control"]
            if tile.level is None:
                entries = decode_entries(found.content, tile.width)
                for offset, entry in enumerate(entries):
                    index = tile.n * 256 + offset
                    assert int.from_bytes(entry[:8], "big") == index
                    parse_envelope(entry[16:], log=LOG)
                    leaves.append(leaf_hash(entry))
            elif tile.level == 0:
                stored += tile_hashes(found.content, tile.width)
    assert leaves == stored
    assert len(leaves) == size
    assert tree_root(leaves) == checkpoint.root


def test_what_is_not_signed_for_does_not_exist(api: Service) -> None:
    size = api.settle()
    with api.http() as http:
        for path in (
            f"tile/0/001.p/{size - 256 + 1}", "tile/0/002", "tile/entries/002", "tile/1/000",
            "tile/0/9999999", "tile/64/000", "tile/0/000.p/256", "tile/0/0", "tile/00/000",
            "", "nothing", "checkpoint/", "tile", "tile/entries/-01",
            "..%2f..%2fetc%2fpasswd", "tile/..%2f..%2f..%2fetc/passwd", "%2e%2e/%2e%2e/v1/info",
            "tile/0/x001/%2e%2e/000", "tile%5c0%5c000", "/etc/passwd", "file:///etc/passwd",
            "tile/entries/" + "x999/" * 500 + "000",
        ):  # fmt: skip
            problem(http.get(f"/log/{path}"), 404, "not-found")
        for size_after in (f"?old=1&new={size + 1}", "?old=2&new=1", "?old=0&new=" + "9" * 40):
            problem(http.get(f"/log/consistency{size_after}"), 404, "not-found")
        problem(http.get("/log/consistency?old=-1&new=1"), 422, "invalid-request")
        problem(http.get("/log/consistency?old=1"), 422, "invalid-request")


def test_an_inclusion_proof_verifies_with_the_key_alone(api: Service) -> None:
    api.settle()
    with api.http() as http:
        vkey = parse_vkey(http.get("/log/vkey").text.strip())
        for index in (0, 1, 255, 256, MANY, api.size - 1):
            receipt = http.get(f"/v1/events/{index}").json()
            found = http.get(f"/log/proof/{receipt['event']}")
            assert found.headers["content-type"] == "text/plain; charset=utf-8"
            assert found.headers["cache-control"] == "no-cache"
            leaf = bytes.fromhex(receipt["leaf_hash"])
            proof, _ = verify_tlog_proof(found.content, leaf, vkey, origin=LOG)
            assert proof.index == index
            with pytest.raises(VerificationError):
                verify_tlog_proof(found.content, bytes(32), vkey, origin=LOG)
        problem(http.get(f"/log/proof/{uuid4()}"), 404)
        problem(http.get("/log/proof/nonsense"), 400)


def test_an_entry_without_a_checkpoint_has_no_proof_yet(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = api.services.tiles.checkpoint(api.settle())
    index = api.client("owner").append("datanet.created", net())
    monkeypatch.setattr(api.services.tiles, "latest", lambda: older)
    with api.http() as http:
        assert "retry" in problem(http.get(f"/log/proof/{index}"), 404)["detail"]


def test_consistency_between_any_two_sizes(api: Service) -> None:
    size = api.settle()
    entries = api.services.entries.entries(0, size)
    leaves = [leaf_hash(entry) for entry in entries]
    with api.http() as http:
        for old, new in ((0, size), (1, 2), (255, 257), (256, size), (MANY, MANY), (7, size)):
            found = http.get(f"/log/consistency?old={old}&new={new}").json()
            if old:  # from the empty tree there is nothing to prove
                verify_consistency(
                    size1=old,
                    size2=new,
                    root1=tree_root(leaves[:old]),
                    root2=tree_root(leaves[:new]),
                    proof=[bytes.fromhex(node) for node in found["proof"]],
                )
            else:
                assert found["proof"] == []


# --- lineage and bundles -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(api: Service) -> str:
    api.deposit("eve", 10**9)
    asked = [{"role": "user", "content": "hello"}]
    answer = api.client("eve").chat(MODEL, asked, max_tokens=4)
    inference = str(answer["tributary"]["inference"])
    api.settle()
    api.attribute(inference)
    return inference


def test_lineage_lists_everything_an_answer_rests_on(api: Service, answered: str) -> None:
    with api.http() as http:
        found = http.get(f"/v1/lineage/{answered}").json()
        types = [event["type"] for event in found["events"]]
        indexes = [event["index"] for event in found["events"]]
        assert indexes == sorted(indexes)
        assert types[-1] == "attribution.recorded"
        expected = {
            "datanet.created", "contribution.recorded", "contribution.approved", "run.requested",
            "adapter.published", "inference.recorded",
        }  # fmt: skip
        assert expected <= set(types)
        assert types.count("contribution.recorded") == 2
        for event in found["events"]:
            assert event == http.get(f"/v1/events/{event['index']}").json()
        assert {edge["child"] for edge in found["edges"]} <= set(indexes)
        problem(http.get(f"/v1/lineage/{uuid4()}"), 404)


def fetched(api: Service, subject: str) -> tuple[bytes, str]:
    with api.http() as http:
        found = http.get(f"/v1/bundles/{subject}")
        assert found.status_code == 200, found.text
        assert ".lineage.json" in found.headers["content-disposition"]
        return found.content, http.get("/log/vkey").text.strip()


def test_a_bundle_verifies_with_nothing_but_the_file(
    api: Service, answered: str, tmp_path: Path
) -> None:
    data, vkey = fetched(api, answered)
    verify_bundle(data, trusted_vkey=vkey)
    file = tmp_path / "answer.lineage.json"
    file.write_bytes(data)
    command = [sys.executable, "-m", "ledger.verify", str(file), "--key", vkey, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for subject in ("adapter", "run", "datanet"):
        verify_bundle(fetched(api, api.made[subject])[0], trusted_vkey=vkey)
    with api.http() as http:
        problem(http.get(f"/v1/bundles/{uuid4()}"), 404)


def _other_digit(text: str) -> str:
    return ("1" if text[0] != "1" else "2") + text[1:]


def _other_entry(entry: str) -> str:
    raw = base64.b64decode(entry)
    return base64.b64encode(raw.replace(b'"at":1', b'"at":2')).decode()


Change = Callable[[dict[str, Any]], object]
TAMPERED: dict[str, tuple[Change, str]] = {
    "format": (lambda b: b.update(format="other/v1"), "format"),
    "log": (lambda b: b.update(log="other.example"), "log"),
    "subject": (lambda b: b.update(subject=str(uuid4())), "subject"),
    "checkpoint": (lambda b: b.update(checkpoint="x" + b["checkpoint"]), "signature"),
    "entry": (
        lambda b: b["entries"][3].update(entry=_other_entry(b["entries"][3]["entry"])), "entry",
    ),
    "index": (lambda b: b["entries"][3].update(index=b["entries"][3]["index"] + 1), "entry"),
    "entries": (lambda b: b["entries"].pop(), "spelling"),
    "hash": (lambda b: b["hashes"].__setitem__(0, _other_digit(b["hashes"][0])), ""),
    "blob": (
        lambda b: b["blobs"].update(dict.fromkeys(b["blobs"], "AAAA")), "blob",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_bundle_fails_and_names_what_failed(
    api: Service, answered: str, name: str
) -> None:
    data, vkey = fetched(api, answered)
    bundle = json.loads(data)
    change, word = TAMPERED[name]
    change(bundle)
    again = json.dumps(bundle, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.raises(VerificationError) as caught:
        verify_bundle(again, trusted_vkey=vkey)
    assert word in caught.value.message.lower()


def test_a_bundle_is_named_by_its_index_however_it_was_asked_for(
    api: Service, answered: str
) -> None:
    with api.http() as http:
        id = http.get("/v1/events/3").json()["event"]
        odd = id.replace("-", "").translate({ord(d): chr(0x660 + int(d)) for d in "0123456789"})
        found = http.get(f"/v1/bundles/{odd}")
        assert found.status_code == 200
        assert found.headers["content-disposition"] == 'attachment; filename="3.lineage.json"'


# --- the database goes away --------------------------------------------------------------------


def test_ready_says_no_and_alive_says_yes_without_a_database(
    embedded: EmbeddedPostgres, tmp_path: Path
) -> None:
    url = create_database(embedded.url)
    migrate(url)
    with service(url, tmp_path, LocalEngine()) as api, api.http() as http, api.http("ann") as ann:
        assert http.get("/readyz").json()["status"] == "ready"
        raw = sign_event(
            key_of("owner"), type="datanet.created", log=LOG, body=net(), id=uuid4(), at=now_us()
        )
        embedded.stop()
        try:
            for pool in (api.services.entries._pool, api.services.queries._pool):  # type: ignore[attr-defined]
                pool.timeout = 0.3
            found = problem(http.get("/readyz"), 503, "unavailable")
            assert found["extra"]["checks"][0]["name"] == "database"
            assert not found["extra"]["checks"][0]["ok"]
            for path in ("/v1/info", "/v1/totals", "/v1/events/0", "/log/checkpoint"):
                problem(http.get(path), 503)
            problem(ann.get("/v1/totals"), 503)
            started = time.monotonic()
            assert http.get("/livez").status_code == 200
            assert time.monotonic() - started < 0.2
        finally:
            embedded.start()
        deadline = time.monotonic() + 20
        while http.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, "not ready again"
            time.sleep(0.1)
        while (again := http.post("/v1/events", content=raw)).status_code == 503:
            assert time.monotonic() < deadline
        assert again.status_code == 201
