"""The log's files over HTTP, held against c2sp.org/tlog-tiles sentence by sentence: types, caching,
compression, partial tiles, what does not exist. The log here is made by the real sequencer on the
real PostgreSQL; its entries are small and many, so that there are three full tiles and a part."""

import gzip
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from ledger.api.routes.log import accepts_gzip
from ledger.client import now_us
from ledger.domain.envelope import leaf_hash, sign_event
from ledger.log.audit import audit_log
from ledger.log.audit_files import FilesOpener
from ledger.log.export import export_log
from ledger.log.records import parse_records
from ledger.remote import HttpSource
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.merkle import tree_root
from ledger.verify.note import parse_vkey
from ledger.verify.tiles import Tile, decode_entries, tile_hashes, tile_path
from tests.api_world import LOG, LocalEngine, Service, key_of, service
from tests.integration.test_api_events import net, problem

MANY = 800
IDENTITY = {"accept-encoding": "identity"}


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(pg_url_module, tmp_path_factory.mktemp("api"), LocalEngine()) as running:
        owner = key_of("owner")
        raws = [
            sign_event(owner, type="datanet.created", log=LOG, body=net(), id=uuid4(), at=now_us())
            for _ in range(MANY)
        ]
        with running.http() as http:
            for start in range(0, MANY, 400):
                body = b"\n".join(raws[start : start + 400])
                assert http.post("/v1/events/batch", content=body).status_code == 201
        running.settle()
        yield running


@pytest.fixture
def http(api: Service) -> Iterator[httpx.Client]:
    with api.http() as client:
        yield client


def test_the_checkpoint_is_text_and_not_to_be_kept(api: Service, http: httpx.Client) -> None:
    found = http.get("/log/checkpoint")
    assert found.headers["content-type"] == "text/plain; charset=utf-8"
    assert found.headers["cache-control"] == "no-cache"
    assert "content-encoding" not in found.headers
    key = parse_vkey(http.get("/log/vkey").text.strip())
    opened = open_checkpoint(found.content, key)
    assert opened.checkpoint.size == api.size
    assert opened.checkpoint.extensions == ()
    assert opened.checkpoint.origin == key.name == LOG


def test_tiles_are_bytes_and_may_be_kept_for_ever(api: Service, http: httpx.Client) -> None:
    last = api.size % 256
    for path in ("tile/0/000", f"tile/0/003.p/{last}", "tile/1/000.p/3", "tile/entries/002"):
        found = http.get(f"/log/{path}")
        assert found.status_code == 200, path
        assert found.headers["content-type"] == "application/octet-stream"
        assert found.headers["cache-control"] == "public, max-age=31536000, immutable"


def test_full_tiles_are_8192_bytes_and_parts_are_their_beginnings(
    api: Service, http: httpx.Client
) -> None:
    entries = api.services.entries.entries(0, api.size)
    for n in range(3):
        full = http.get(f"/log/tile/0/{n:03}").content
        bundle = http.get(f"/log/tile/entries/{n:03}").content
        assert len(full) == 8_192
        assert decode_entries(bundle, 256) == entries[256 * n : 256 * (n + 1)]
        assert tile_hashes(full, 256) == [leaf_hash(e) for e in decode_entries(bundle, 256)]
        # The full tile is there; its parts stay, of every width a checkpoint may have had.
        for width in (1, 2, 17, 254, 255):
            assert http.get(f"/log/tile/0/{n:03}.p/{width}").content == full[: 32 * width]
            part = http.get(f"/log/tile/entries/{n:03}.p/{width}").content
            assert bundle.startswith(part)
            assert len(decode_entries(part, width)) == width
        upper = http.get(f"/log/tile/1/000.p/{n + 1}").content
        assert upper[32 * n :] == tree_root(tile_hashes(full, 256))


def test_what_is_beyond_the_checkpoint_or_spelt_otherwise_is_not_there(
    api: Service, http: httpx.Client
) -> None:
    last = api.size % 256
    assert 0 < last < 255
    for path in (
        f"tile/0/003.p/{last + 1}", f"tile/entries/003.p/{last + 1}", "tile/0/003",
        "tile/0/004.p/1", "tile/entries/003", "tile/1/000.p/4", "tile/1/000", "tile/2/000.p/1",
        "tile/0/000.p/0", "tile/0/000.p/256", "tile/0/000.p/01", "tile/0/000.p/", "tile/0/000.p",
        "tile/0/x000/000", "tile/0/0000", "tile/entries/x000/000", "tile/8/0/000",
        "tile/8/data/000", "tile/64/000", "tile/00/000", "Checkpoint", "checkpoint.1",
    ):  # fmt: skip
        found = http.get(f"/log/{path}")
        problem(found, 404, "not-found")
        assert found.headers["cache-control"] == "no-store", "it may be there in a second"


def test_every_signed_checkpoint_is_there_and_not_for_caching(
    api: Service, http: httpx.Client
) -> None:
    found = http.get("/log/checkpoints/000")
    assert found.status_code == 200
    assert found.headers["content-type"] == "text/plain; charset=utf-8"
    assert found.headers["cache-control"] == "no-cache"
    lines = parse_records(found.content, 0)
    vkey = parse_vkey(http.get("/log/vkey").text.strip())
    leaves = [leaf_hash(entry) for entry in api.services.entries.entries(0, api.size)]
    for line in lines:
        head = open_checkpoint(line.checkpoint.note, vkey).checkpoint
        assert head.root == tree_root(leaves[: head.size])
    assert len(lines) > 1
    assert lines[-1].checkpoint.note == http.get("/log/checkpoint").content
    for path in ("001", "0", "0000", "x000/000", "-01", "000.p/1", "", "٠٠٠", "x999/" * 9 + "999"):
        problem(http.get(f"/log/checkpoints/{path}"), 404, "not-found")


def test_audit_and_export_over_http_see_every_signed_checkpoint(
    api: Service, tmp_path: Path
) -> None:
    key = parse_vkey(api.services.vkey)
    signed = api.services.tiles.checkpoints(0, api.size + 1)
    with HttpSource(f"{api.url}/log") as source:
        export_log(source, tmp_path, key)
    mirrored = parse_records((tmp_path / "checkpoints/000").read_bytes(), 0)
    assert [line.checkpoint for line in mirrored] == signed
    opener = FilesOpener(open_source=partial(HttpSource, f"{api.url}/log"))
    report = audit_log(opener, key, pymerkle=False)
    assert report.ok
    said = next(step.says for step in report.steps if step.name == "checkpoints")
    assert said.startswith(f"{len(signed)} stored checkpoints")


def test_head_says_what_get_would(api: Service, http: httpx.Client) -> None:
    for path in (
        "checkpoint", "checkpoints/000", "tile/0/000", "tile/entries/000", "tile/0/000.p/7"
    ):  # fmt: skip
        get, head = (http.request(m, f"/log/{path}", headers=IDENTITY) for m in ("GET", "HEAD"))
        assert head.status_code == 200
        assert head.content == b""
        for name in ("content-type", "content-length", "cache-control"):
            assert head.headers[name] == get.headers[name], (path, name)
    missing = http.head("/log/tile/5/000")
    assert missing.status_code == 404


def test_entry_bundles_are_compressed_for_who_accepts_it(http: httpx.Client) -> None:
    plain = http.get("/log/tile/entries/000", headers=IDENTITY)
    assert "content-encoding" not in plain.headers
    assert plain.headers["vary"] == "accept-encoding"
    with http.stream("GET", "/log/tile/entries/000", headers={"accept-encoding": "gzip"}) as packed:
        raw = b"".join(packed.iter_raw())
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == "accept-encoding"
    assert gzip.decompress(raw) == plain.content
    assert len(raw) < len(plain.content) / 2
    hashes = http.get("/log/tile/0/000", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in hashes.headers


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True), ("GZIP", True), ("br, gzip;q=0.5", True), ("*", True), ("br;q=1, *", True),
        ("gzip;q=1.0", True), ("gzip; q=0.001", True), ("", False), ("identity", False),
        ("gzip;q=0", False), ("gzip; q=0.000", False), ("*;q=1, gzip;q=0", False),
        ("deflate, br", False), ("x-gzip-like", False),
    ],
)  # fmt: skip
def test_accept_encoding(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


def test_tile_paths_of_this_tree_are_the_ones_c2sp_names() -> None:
    assert tile_path(Tile(level=0, n=273, width=112)) == "tile/0/273.p/112"
    assert tile_path(Tile(level=None, n=1_234_067)) == "tile/entries/x001/x234/067"
