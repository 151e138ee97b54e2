"""Folders fetched by hash: whole or absent, and never outside their root."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger.errors import Inconsistent as Damaged
from ledger.errors import InvalidEvent, NotFound
from tests.workers_api import WorkersApi, write_key
from workers.artefacts import ArtefactCache, files_of_index
from workers.link import WorkerClient, WorkerSpec, plain_uuid


@pytest.fixture
def api() -> Iterator[WorkersApi]:
    with WorkersApi() as api:
        yield api


@pytest.fixture
def cache(api: WorkersApi, tmp_path: Path) -> ArtefactCache:
    return ArtefactCache(WorkerClient(api.url, write_key(tmp_path)), tmp_path / "cache")


def test_fetches_once(api: WorkersApi, cache: ArtefactCache) -> None:
    weights, config = api.put(b"weights"), api.put(b"{}")
    folder = cache.adapter(weights, config)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    before = api.requests
    assert cache.adapter(weights, config) == folder
    assert api.requests == before
    cache.drop(folder)
    assert cache.adapter(weights, config) == folder
    assert api.requests > before


def test_leaves_nothing_when_a_blob_is_missing(
    api: WorkersApi, cache: ArtefactCache, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        cache.adapter(api.put(b"weights"), "ab" * 32)
    assert list((tmp_path / "cache" / "adapters").iterdir()) == []


def test_refuses_a_blob_that_is_not_what_its_name_says(
    api: WorkersApi, cache: ArtefactCache
) -> None:
    weights, config = api.put(b"weights"), api.put(b"{}")
    api.blobs[weights] = b"others"
    with pytest.raises(Damaged):
        cache.adapter(weights, config)


def test_an_index_is_what_its_manifest_names(api: WorkersApi, cache: ArtefactCache) -> None:
    manifest = json.dumps({"files": {"rows.jsonl": {"sha256": api.put(b"row\n")}}}).encode()
    folder = cache.index(api.put(manifest))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rows.jsonl"]


@pytest.mark.parametrize("name", ["../key", "/etc/passwd", "a/b", ".hidden", "manifest.json", ""])
def test_names_in_a_manifest_stay_in_the_folder(name: str) -> None:
    with pytest.raises(Damaged):
        files_of_index(json.dumps({"files": {name: {"sha256": "ab" * 32}}}).encode())


@pytest.mark.parametrize("run", ["../../etc", "", "A" * 36, "a" * 35, "a" * 36 + "\n"])
def test_ids_in_paths_are_uuids(run: str) -> None:
    with pytest.raises(InvalidEvent):
        plain_uuid(run)
    spec = WorkerSpec(api="http://x", key_file=Path("k"), home=Path("h"))
    with pytest.raises(InvalidEvent):
        spec.run_folder(run)
