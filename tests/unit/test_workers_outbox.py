"""The outbox: kept before sent, sent again after a crash, one event in the ledger."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from ledger.domain.ids import derived_id
from ledger.errors import Conflict, Unavailable
from tests.workers_api import WorkersApi, write_key
from workers.link import WorkerClient
from workers.outbox import Outbox


@pytest.fixture
def api() -> Iterator[WorkersApi]:
    with WorkersApi() as api:
        yield api


@pytest.fixture
def client(api: WorkersApi, tmp_path: Path) -> WorkerClient:
    return WorkerClient(api.url, write_key(tmp_path))


def started(api: WorkersApi) -> tuple[str, dict[str, object]]:
    run = api.request_run([api.datanet()])
    return run, {"run": run, "attempt": 1, "submission_id": f"{run}-1"}


def test_delivers_and_forgets(api: WorkersApi, client: WorkerClient, tmp_path: Path) -> None:
    box = Outbox(client, tmp_path / "outbox")
    run, body = started(api)
    index = box.append("run.started", body, id=derived_id("x", run))
    assert api.entries[-1].index == index
    assert box.pending() == []
    assert box.append("run.started", body, id=derived_id("x", run)) == index, "replay = success"
    assert len(api.events("run.started")) == 1


def test_keeps_while_the_ledger_is_down(
    api: WorkersApi, client: WorkerClient, tmp_path: Path
) -> None:
    box = Outbox(client, tmp_path / "outbox")
    run, body = started(api)
    assert client.log
    api.down = True
    with pytest.raises(Unavailable):
        box.append("run.started", body, id=derived_id("x", run))
    with pytest.raises(Unavailable):
        box.replay()
    kept = box.pending()[0].read_bytes()
    api.down = False
    # A new process: nothing but the folder is left.
    again = Outbox(client, tmp_path / "outbox")
    assert [d.id for d in again.replay()] == [derived_id("x", run)]
    assert api.entries[-1].envelope.raw == kept, "the bytes that were signed first"
    assert again.replay() == []


def test_an_answer_lost_on_the_way(api: WorkersApi, client: WorkerClient, tmp_path: Path) -> None:
    box = Outbox(client, tmp_path / "outbox")
    run, body = started(api)
    assert client.log
    api.lose_answers = 1
    with pytest.raises(Unavailable):
        box.append("run.started", body, id=derived_id("x", run))
    assert len(api.events("run.started")) == 1, "it happened, and we do not know"
    assert [d.index for d in box.replay()] == [api.entries[-1].index]
    assert len(api.events("run.started")) == 1


def test_refused_events_are_set_aside(
    api: WorkersApi, client: WorkerClient, tmp_path: Path
) -> None:
    box = Outbox(client, tmp_path / "outbox")
    run, body = started(api)
    with pytest.raises(Conflict):
        box.append("run.started", {**body, "attempt": 7}, id=derived_id("x", run))
    assert box.pending() == []
    refused = tmp_path / "outbox" / "refused"
    assert "attempt 1" in (refused / f"{derived_id('x', run)}.reason").read_text()
    # One refused event does not hold up the next.
    box.put("run.started", {**body, "attempt": 9}, id=derived_id("y", run))
    box.put("run.started", body, id=derived_id("z", run))
    assert [d.id for d in box.replay()] == [derived_id("z", run)]


def test_half_written_files_are_nobodys_events(client: WorkerClient, tmp_path: Path) -> None:
    box = Outbox(client, tmp_path / "outbox")
    (tmp_path / "outbox" / f".{uuid4()}.json.123.part").write_bytes(b'{"v":1')
    assert box.pending() == []
    assert box.replay() == []


def test_signs_in_again_when_its_credential_is_gone(api: WorkersApi, client: WorkerClient) -> None:
    sha256 = client.put_blob(b"rows")
    api.tokens.clear()
    assert client.get_blob(sha256) == b"rows"
