"""Withdrawal, holds, appeals, limits and what auditors read, over HTTP on a real PostgreSQL.

Each test makes datanets and runs of its own; nothing here trains, the manifests are written by
hand."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner, Result

from ledger.api.routes import consent
from ledger.cli.app import app
from ledger.domain.canonical import canonical_json
from ledger.domain.rows import DataRow, encode_rows, rows_root
from ledger.errors import (
    Backpressure,
    ConfigError,
    Conflict,
    Forbidden,
    InvalidEvent,
    NotFound,
    TooLarge,
    VerificationError,
)
from tests.api_world import MODEL, LocalEngine, Service, key_of, service
from tests.integration.test_api_events import problem
from tests.integration.test_api_money import HELLO
from workers.attribution.terms import Terms

LIMITS = {
    "max_rows_per_contribution": 100, "max_contributions_per_day": 100, "max_rows_per_day": 1_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine(), requests_per_minute=60_000) as running:
        running.tell(home / "adapters")
        running.deposit("eve", 10**24)
        yield running


def datanet(api: Service, on_withdrawal: str | None = None, **limits: int) -> str:
    name = str(uuid4())
    body = {"datanet": name, "name": "n", "description": "", "licence": "CC0-1.0", "reviewers": []}
    api.client("owner").append("datanet.created", body)
    if on_withdrawal:
        policy = {"datanet": name, **LIMITS, **limits, "on_withdrawal": on_withdrawal}
        api.client("owner").append("datanet.policy_set", policy)
        api.settle()
    return name


def ids(given: dict[str, Any]) -> dict[str, Any]:
    return {field: given[field] for field in ("contribution", "datanet")}


def request_run(api: Service, net: str) -> str:
    run = str(uuid4())
    base = api.client("dev").get("/v1/info")["base_model"]
    body = {
        "run": run, "name": "r", "datanets": [net], "config": {"seed": 1},
        "base_model": base["digest"], "base_id": base["id"],
    }  # fmt: skip
    api.client("dev").append("run.requested", body)
    return run


def complete_run(api: Service, run: str, given: Sequence[dict[str, Any]]) -> str:
    """As a trainer that used these contributions would; the adapter, published."""
    worker, saved = api.client("worker"), api.made["saved"]
    worker.append("run.started", {"run": run, "attempt": 1, "submission_id": f"{run}-1"})
    manifest = {
        "v": 1, "base_sha256": worker.get("/v1/info")["base_model"]["digest"], "steps": 3,
        "adapter_sha256": saved.sha256, "config_sha256": saved.config_sha256, "losses": ["1.5"],
        "run": run,
        "rows": [
            {"contribution": body["contribution"], "row": n, "row_hash": row.hash.hex()}
            for body in given
            for n, row in enumerate(body["rows"])
        ],
    }  # fmt: skip
    completed = {
        **api.made["completed"], "run": run, "rows_count": len(manifest["rows"]),
        "contributions_count": len(given),
        "manifest_sha256": worker.put_blob(canonical_json(manifest)),
    }  # fmt: skip
    worker.append("run.completed", completed)
    return api.publish(run, saved, f"dev/{run[:8]}")


def hold(api: Service, given: dict[str, Any], who: str = "worker", **changes: Any) -> int:
    body = {**ids(given), "reason": "junk", "note": "", "evidence_sha256": None, **changes}
    return api.client(who).append("contribution.held", body)


def terms(api: Service, run: str) -> dict[str, Any]:
    size = api.settle()
    found: dict[str, Any] = api.client("worker").get(f"/v1/runs/{run}/terms")
    assert found["log_size"] == size
    Terms.from_dict(found)  # the workers read it as it is
    return found


# --- terms, inputs ----------------------------------------------------------------------------


def test_terms_follow_the_log_and_training_leaves_out_what_they_name(api: Service) -> None:
    net = datanet(api)
    ann, ben, eve = (api.contribute(name, net) for name in ("ann", "ben", "eve"))
    run = request_run(api, net)
    assert terms(api, run) | {"log_size": 0} == {
        "log_size": 0, "withdrawn": [], "held": [], "splits": [],
    }  # fmt: skip
    for row in (2, 0, 1):
        api.client("ben").append("cluster.appealed", {**ids(ben), "row": row, "reason": "mine"})
    for row, what in ((2, "split"), (0, "split"), (1, "upheld")):
        api.client("owner").append(f"cluster.{what}", {**ids(ben), "row": row, "note": ""})
    hold(api, eve)
    api.client("ann").append("contribution.withdrawn", {**ids(ann), "reason": ""})
    found = terms(api, run)
    assert found["withdrawn"] == [ann["contribution"]]
    assert found["held"] == [eve["contribution"]]
    assert found["splits"] == [[ben["contribution"], 0], [ben["contribution"], 2]]
    trained = api.client("worker").get(f"/v1/runs/{run}/contributions")["items"]
    assert [row["contribution"] for row in trained] == [ben["contribution"]]
    api.client("owner").append("contribution.released", {**ids(eve), "note": ""})
    assert terms(api, run)["held"] == []
    trained = api.client("worker").get(f"/v1/runs/{run}/contributions")["items"]
    assert {row["contribution"] for row in trained} == {ben["contribution"], eve["contribution"]}
    later = request_run(api, net)
    assert terms(api, later)["withdrawn"] == [], "it is no input of a later run"
    with pytest.raises(NotFound, match="run"):
        api.client("worker").get(f"/v1/runs/{uuid4()}/terms")


def test_a_held_contribution_is_no_input_of_runs_requested_meanwhile(api: Service) -> None:
    net = datanet(api)
    ann, ben = (api.contribute(name, net) for name in ("ann", "ben"))
    hold(api, ann, who="owner")
    run = request_run(api, net)
    api.client("owner").append("contribution.released", {**ids(ann), "note": ""})
    after = request_run(api, net)
    api.settle()
    for which, given in (
        (run, {ben["contribution"]}),
        (after, {c["contribution"] for c in (ann, ben)}),
    ):
        rows = api.client("worker").get(f"/v1/runs/{which}/contributions")["items"]
        assert {row["contribution"] for row in rows} == given


def test_a_contribution_shows_its_hold(api: Service) -> None:
    net = datanet(api)
    given = api.contribute("ann", net)
    evidence = api.client("worker").put_blob(f"lines of {net}".encode())
    with pytest.raises(NotFound, match="not uploaded"):
        hold(api, given, evidence_sha256="0f" * 32)
    hold(api, given, evidence_sha256=evidence, note="the same line forty times")
    api.settle()
    shown = api.client("eve").get(f"/v1/contributions/{given['contribution']}")
    assert (shown["hold"]["active"], shown["hold"]["reason"]) == (True, "junk")
    listed = api.client("eve").get("/v1/contributions", datanet=net)["items"]
    assert [row["held"] for row in listed] == [True]
    assert api.client("ann").get_blob(evidence) == f"lines of {net}".encode()
    assert api.client("owner").get_blob(evidence)
    for stranger in ("ben", "eve"):
        with pytest.raises(Forbidden):
            api.client(stranger).get_blob(evidence)
    with pytest.raises(Forbidden, match="30 days"):
        api.client("ann").append("contribution.released", {**ids(given), "note": ""})


def test_naming_a_blob_as_evidence_gives_nobody_its_bytes(api: Service) -> None:
    """Hashes are public: a reviewer of some datanet must not read another's rows, or an answer's
    transcript, by holding a friend's contribution with them as evidence."""
    theirs = api.contribute("ann", datanet(api))
    answer = api.client("eve").chat(MODEL, HELLO, max_tokens=8)
    api.settle()
    about = api.client("ben").get(f"/v1/inferences/{answer['tributary']['inference']}")
    friends = api.contribute("ben", datanet(api))
    for private in (theirs["rows_sha256"], about["transcript_sha256"]):
        with pytest.raises(NotFound, match="not uploaded"):
            hold(api, friends, who="owner", evidence_sha256=private)
        api.settle()
        with pytest.raises(Forbidden):
            api.client("ben").get_blob(private)


# --- withdrawal and recall --------------------------------------------------------------------


def test_a_withdrawal_names_its_adapters_at_once(api: Service) -> None:
    net = datanet(api, "retire")
    ann, ben = (api.contribute(name, net) for name in ("ann", "ben"))
    early, late = request_run(api, net), request_run(api, net)
    used = complete_run(api, early, [ann, ben])
    api.client("ann").append("contribution.withdrawn", {**ids(ann), "reason": "mine"})
    clean = complete_run(api, late, [ben])
    api.settle()
    client = api.client("eve")
    path = f"/v1/contributions/{ann['contribution']}/adapters"
    (found,) = client.get(path)["items"]
    assert (found["adapter"], found["status"], found["rows"]) == (used, "published", 3)
    assert found["model"] == f"dev/{early[:8]}"
    both = client.get(f"/v1/contributions/{ben['contribution']}/adapters")["items"]
    assert [row["adapter"] for row in both] == [used, clean]
    (due,) = [d for d in client.get("/v1/adapters", recall="due")["items"] if d["datanet"] == net]
    assert (due["adapter"], due["contribution"], due["withdrawal"]) == (
        used, ann["contribution"], "mine",
    )  # fmt: skip
    body = {"adapter": clean, **ids(ann), "reason": "withdrawn"}
    with pytest.raises(Conflict, match="trained without"):
        api.client("worker").append("adapter.recalled", body)
    api.client("worker").append("adapter.recalled", {**body, "adapter": used})
    api.settle()
    assert not [d for d in client.get("/v1/adapters", recall="due")["items"] if d["datanet"] == net]
    (found,) = client.get(path)["items"]
    assert (found["status"], found["reason"]) == ("retired", "withdrawn")
    with pytest.raises(NotFound):
        api.client("eve").chat(f"dev/{early[:8]}", HELLO)
    with pytest.raises(NotFound, match="contribution"):
        client.get(f"/v1/contributions/{uuid4()}/adapters")


def test_listings_are_paged_to_the_end(api: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a page has nothing to show: what a run might have used, and did not."""
    net = datanet(api, "retire")
    ann, ben = (api.contribute(name, net) for name in ("ann", "ben"))
    runs = [request_run(api, net) for _ in range(4)]
    used = [complete_run(api, run, [ann, ben]) for run in runs[:2]]
    complete_run(api, runs[2], [ben])
    used.append(complete_run(api, runs[3], [ann]))
    for row in range(3):
        api.client("ann").append("cluster.appealed", {**ids(ann), "row": row, "reason": "mine"})
    api.client("ann").append("contribution.withdrawn", {**ids(ann), "reason": ""})
    api.settle()
    monkeypatch.setattr(consent, "MAX_SEEN", 1)
    client = api.client("eve")
    listed = list(client.pages(f"/v1/contributions/{ann['contribution']}/adapters"))
    assert [row["adapter"] for row in listed] == used
    due = [row for row in client.pages("/v1/adapters", recall="due") if row["datanet"] == net]
    assert [row["adapter"] for row in due] == used
    assert len(list(client.pages("/v1/appeals", datanet=net))) == 3


def test_where_the_policy_keeps_them_nothing_is_due(api: Service) -> None:
    net = datanet(api)
    ann = api.contribute("ann", net)
    complete_run(api, request_run(api, net), [ann])
    api.client("ann").append("contribution.withdrawn", {**ids(ann), "reason": ""})
    api.settle()
    items = api.client("eve").get("/v1/adapters", recall="due")["items"]
    assert not [row for row in items if row["datanet"] == net]
    assert api.client("eve").get(f"/v1/datanets/{net}")["policy"] == {
        "max_rows_per_contribution": 100_000, "max_contributions_per_day": 1_000,
        "max_rows_per_day": 1_000_000, "on_withdrawal": "keep",
    }  # fmt: skip
    with api.http() as http:
        problem(http.get("/v1/adapters?recall=soon"), 422, "invalid-request")
        problem(http.get("/v1/adapters?recall=due&after=x"), 422, "invalid-request")


def test_appeals_are_listed(api: Service) -> None:
    net = datanet(api)
    given = api.contribute("ann", net)
    for row in range(3):
        api.client("ann").append("cluster.appealed", {**ids(given), "row": row, "reason": "mine"})
    api.client("owner").append("cluster.upheld", {**ids(given), "row": 1, "note": "a copy"})
    api.settle()
    client = api.client("eve")
    open_rows = client.get("/v1/appeals", datanet=net, status="open")["items"]
    assert [row["row"] for row in open_rows] == [0, 2]
    (upheld,) = client.get("/v1/appeals", contribution=given["contribution"], status="upheld")[
        "items"
    ]
    assert (upheld["note"], upheld["decided_by"]) == ("a copy", api.actor("owner"))
    with api.http() as http:
        problem(http.get("/v1/appeals?status=lost"), 422, "invalid-request")


# --- limits of a datanet ----------------------------------------------------------------------


def give(api: Service, name: str, net: str, count: int) -> dict[str, Any]:
    """A signed-for contribution, ready to append."""
    rows = [DataRow(prompt="p", completion="c", salt=uuid4().hex) for _ in range(count)]
    return {
        "contribution": str(uuid4()), "datanet": net, "licence": "CC0-1.0", "title": "t",
        "rows_root": rows_root(rows).hex(), "rows_count": count,
        "rows_sha256": api.client(name).put_blob(encode_rows(rows)),
    }  # fmt: skip


def test_a_day_has_room_for_so_much(api: Service) -> None:
    net = datanet(api, "keep", max_contributions_per_day=3, max_rows_per_day=10)
    ann, ben = api.client("ann"), api.client("ben")
    first = give(api, "ann", net, 5)
    before = api.size
    ann.append("contribution.recorded", first)
    with pytest.raises(Conflict):  # the same one again is refused for itself, and counts once
        ann.append("contribution.recorded", first)
    with pytest.raises(TooLarge, match="max_rows_per_day = 10"):
        ann.append("contribution.recorded", give(api, "ann", net, 11))
    with pytest.raises(Backpressure, match=r"you gave 1 with 5 rows, these are 1 with 6") as caught:
        ann.append("contribution.recorded", give(api, "ann", net, 6))
    assert 86_000 < caught.value.retry_after_s <= 86_402
    api.settle()  # now the rows know it, and this process remembers it: counted once
    ann.append("contribution.recorded", give(api, "ann", net, 4))
    ann.append("contribution.recorded", give(api, "ann", net, 1))
    api.settle()
    ben.append("contribution.recorded", give(api, "ben", net, 10))
    with pytest.raises(Backpressure, match="max_contributions_per_day = 3"):
        ann.append("contribution.recorded", give(api, "ann", net, 1))
    assert api.size == before + 4


def test_a_batch_is_counted_together(api: Service) -> None:
    net = datanet(api, "keep", max_contributions_per_day=3, max_rows_per_day=6)
    ann = api.client("ann")

    def batch(count: int, rows: int) -> int:
        lines = [
            ann.sign("contribution.recorded", give(api, "ann", net, rows)) for _ in range(count)
        ]
        with api.http("ann") as http:
            return http.post("/v1/events/batch", content=b"\n".join(lines)).status_code

    assert batch(4, 1) == 413
    assert batch(2, 4) == 413
    assert batch(2, 2) == 201
    assert batch(2, 1) == 429
    assert batch(1, 2) == 201


# --- what auditors read -----------------------------------------------------------------------


def test_index_files_are_public_and_those_of_the_manifest_only(api: Service) -> None:
    run = api.made["run"]
    with api.http() as http:
        got = http.get(f"/v1/runs/{run}/index/manifest.json")
        assert got.status_code == 200
        assert hashlib.sha256(got.content).hexdigest() == api.made["completed"]["index_sha256"]
        stamp = got.json()["files"]["vectors.i8"]
        path = f"/v1/runs/{run}/index/vectors.i8"
        whole = http.get(path)
        assert hashlib.sha256(whole.content).hexdigest() == stamp["sha256"]
        assert whole.headers["etag"] == f'"{stamp["sha256"]}"'
        for asked, first, last in (("0-0", 0, 0), ("16-31", 16, 31), ("1000-", 1_000, 1_023),
                                   ("-24", 1_000, 1_023), ("1020-9999", 1_020, 1_023)):  # fmt: skip
            part = http.get(path, headers={"range": f"bytes={asked}"})
            assert (part.status_code, part.content) == (206, whole.content[first : last + 1])
            assert part.headers["content-range"] == f"bytes {first}-{last}/1024"
        assert http.get(path, headers={"range": "bytes=1024-"}).status_code == 416
        for odd in ("bytes=5-2", "bytes=-0"):
            assert http.get(path, headers={"range": odd}).status_code == 416
        for odd in ("bytes=a-b", "rows=0-1", "bytes=0-1,4-5", "bytes=-"):
            assert http.get(path, headers={"range": odd}).content == whole.content
        unchanged = http.get(path, headers={"if-none-match": whole.headers["etag"]})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        for name in ("rows.txt", "%2e%2e%2fmanifest.json", "VECTORS.i8", "x" * 300):
            problem(http.get(f"/v1/runs/{run}/index/{name}"), 404, "not-found")
        waiting = request_run(api, api.made["datanet"])
        api.settle()
        detail = problem(http.get(f"/v1/runs/{waiting}/index/manifest.json"), 404, "not-found")
        assert "no attribution index" in detail["detail"]


def test_an_index_cannot_make_rows_public(api: Service) -> None:
    net = datanet(api)
    ann = api.contribute("ann", net)
    run = request_run(api, net)
    stamp = {"bytes": 1, "sha256": ann["rows_sha256"]}
    manifest = canonical_json({"files": {"vectors.i8": stamp}, "run": run})
    kept = api.made["completed"]
    sha256 = api.client("worker").put_blob(manifest)
    api.made["completed"] = {**kept, "index_sha256": sha256}
    complete_run(api, run, [ann])
    api.made["completed"] = kept
    with api.http("eve") as http:
        assert http.get(f"/v1/runs/{run}/index/manifest.json").content == manifest
        problem(http.get(f"/v1/runs/{run}/index/vectors.i8"), 422, "inconsistent")


def test_a_hold_cannot_make_an_index_file_private(api: Service) -> None:
    """Or anybody could stop all audits of a run, with a copy of its vectors as evidence."""
    given = api.contribute("ann", datanet(api))
    with api.http() as http:
        path = f"/v1/runs/{api.made['run']}/index/vectors.i8"
        vectors = http.get(path).content
        hold(api, given, who="owner", evidence_sha256=api.client("owner").put_blob(vectors))
        api.settle()
        assert http.get(path).content == vectors


def test_the_evidence_of_an_answer_and_its_words_for_who_paid(api: Service) -> None:
    answer = api.client("eve").chat(MODEL, HELLO, max_tokens=8)
    inference = answer["tributary"]["inference"]
    api.settle()
    path = f"/v1/inferences/{inference}/attribution"
    with pytest.raises(NotFound, match="not attributed yet"):
        api.client("eve").get(path)
    row = {"contribution": api.made["ann"]["contribution"], "row": 0,
           "contributor": api.actor("ann"), "licence": "CC0-1.0"}  # fmt: skip
    spans = {
        "v": 1, "min_tokens": 2, "none": False,
        "spans": [{"start": 1, "end": 5, "rows": [row], "count": 1}],
    }  # fmt: skip
    api.attribute(inference, spans=spans)
    text = answer["choices"][0]["message"]["content"]
    for reader, words in (("eve", text[1:5]), ("operator", text[1:5]), ("ann", None), (None, None)):
        with api.http(reader) as http:
            found = http.get(path).json()
        (span,) = found["evidence"]["spans"]["spans"]
        assert span.get("text") == words
        assert span["rows"] == [row]
        assert found["attribution"]["shares"][0] == {
            "contributor": api.actor("ann"),
            "ppm": 600_000,
        }
        if words is None:
            assert text[1:5] not in json.dumps(found["evidence"])


def test_evidence_that_is_no_json_is_said_to_be_none(api: Service) -> None:
    inference = api.client("eve").chat(MODEL, HELLO, max_tokens=4)["tributary"]["inference"]
    worker = api.client("worker")
    body = {
        "inference": inference, "adapter": api.made["adapter"], "run": api.made["run"],
        "method": "odd/v1", "index_sha256": api.made["completed"]["index_sha256"],
        "evidence_sha256": worker.put_blob(b"\xff not json"), "shares": [],
        "unattributed_ppm": 1_000_000,
    }  # fmt: skip
    worker.append("attribution.recorded", body)
    api.settle()
    with api.http() as http:
        problem(http.get(f"/v1/inferences/{inference}/attribution"), 422, "inconsistent")


# --- on the command line ----------------------------------------------------------------------


@pytest.fixture
def home(api: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIBUTARY_HOME", str(tmp_path))
    monkeypatch.setenv("TRIBUTARY_API", api.url)
    (tmp_path / "keys").mkdir()
    for name in ("owner", "ann", "ben", "worker"):
        (tmp_path / "keys" / f"{name}.key").write_text(bytes(key_of(name)).hex())
    return tmp_path


def tributary(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def said(*words: str) -> str:
    done = tributary(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.output.split())


def test_a_policy_is_shown_and_set_in_parts(api: Service, home: Path) -> None:
    net = datanet(api)
    api.settle()
    shown = json.loads(said("datanet", "policy", net, "--json"))
    assert (shown["on_withdrawal"], shown["max_rows_per_day"]) == ("keep", 1_000_000)
    said("datanet", "policy", net, "--on-withdrawal", "retire", "--as", "owner")
    api.settle()
    said("datanet", "policy", net, "--max-rows", "7", "--as", "owner")
    api.settle()
    shown = json.loads(said("datanet", "policy", net, "--json"))
    assert (shown["on_withdrawal"], shown["max_rows_per_contribution"]) == ("retire", 7)
    refused = tributary("datanet", "policy", net, "--max-rows", "9", "--as", "ann")
    assert isinstance(refused.exception, Forbidden)
    assert tributary("datanet", "policy", net, "--on-withdrawal", "burn").exit_code == 2


def test_hold_release_appeal_and_decide(api: Service, home: Path) -> None:
    net = datanet(api)
    given = api.contribute("ann", net)["contribution"]
    api.settle()
    (home / "seen.txt").write_text("forty times the same")
    seen = ("--evidence", str(home / "seen.txt"))
    assert "held at index" in said(
        "contribution", "hold", given, "--reason", "junk", "--note", "x", *seen, "--as", "worker"
    )
    api.settle()
    hold = json.loads(said("contribution", "show", given, "--json"))["hold"]
    assert hold["active"]
    assert api.client("ann").get_blob(hold["evidence_sha256"]) == b"forty times the same"
    (line,) = (x for x in said("contribution", "list", "--datanet", net).splitlines() if given in x)
    assert "approved" in line, "its status is as it was"
    assert "True" in line, "and it is held"
    early = tributary("contribution", "release", given, "--as", "ann")
    assert isinstance(early.exception, Forbidden)
    assert "released at index" in said("contribution", "release", given, "--as", "owner")
    for row in ("0", "1"):
        said("contribution", "appeal", given, "--row", row, "--reason", "mine", "--as", "ann")
    said("contribution", "split", given, "--row", "0", "--as", "owner")
    said("contribution", "uphold", given, "--row", "1", "--note", "a copy", "--as", "owner")
    api.settle()
    listed = json.loads(said("contribution", "appeals", "--datanet", net, "--json"))
    assert [(row["row"], row["status"]) for row in listed] == [(0, "split"), (1, "upheld")]
    assert tributary("contribution", "hold", given, "--reason", "dislike").exit_code == 2


def test_a_run_excludes_or_it_does_not(
    api: Service, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = datanet(api)
    ann, ben = (api.contribute(name, net) for name in ("ann", "ben"))
    first, second = request_run(api, net), request_run(api, net)
    complete_run(api, first, [ann, ben])
    api.client("ann").append("contribution.withdrawn", {**ids(ann), "reason": ""})
    complete_run(api, second, [ben])
    api.settle()
    before = tributary("run", "excludes", first, ann["contribution"])
    assert before.exit_code == 1
    assert "was trained on 3 of the rows" in " ".join(before.output.split())
    text = said("run", "excludes", second, ann["contribution"])
    done = api.client("eve").get(f"/v1/runs/{second}")
    assert "none of its rows is among the 3 that it was trained on" in text
    assert f"manifest {done['manifest_sha256']}, by run.completed" in text
    assert f"at index {done['finished_index']}" in text
    found = json.loads(said("run", "excludes", second, ann["contribution"], "--json"))
    assert (found["excluded"], found["rows"], found["index"]) == (True, [], done["finished_index"])
    listed = json.loads(said("contribution", "adapters", ann["contribution"], "--json"))
    assert [(row["run"], row["rows"]) for row in listed] == [(first, 3)]
    with api.http() as http:
        vkey = http.get("/log/vkey").text.strip()
        (home / "run.json").write_bytes(http.get(f"/v1/bundles/{done['finished_index']}").content)
    asked = ("--bundle", str(home / "run.json"), "--key", vkey)
    monkeypatch.setenv("TRIBUTARY_API", "http://127.0.0.1:9")
    assert "verified in the log" in said("run", "excludes", second, ann["contribution"], *asked)
    other = tributary("run", "excludes", second, ben["contribution"], *asked)
    assert (other.exit_code, other.exception.__class__) == (1, SystemExit)
    for typo in ("", "typo", ben["contribution"].upper(), f" {ben['contribution']}"):
        mistaken = tributary("run", "excludes", second, typo, *asked)
        assert isinstance(mistaken.exception, InvalidEvent), "which proves nothing about ben's"
    slip = tributary("run", "excludes", second, ben["contribution"], *asked[:3], vkey[:-1])
    assert isinstance(slip.exception, ConfigError)
    absent = tributary("run", "excludes", first, ann["contribution"], *asked)
    assert isinstance(absent.exception, NotFound)
    (home / "run.json").write_bytes(
        (home / "run.json").read_bytes().replace(b"entries", b"Entries")
    )
    broken = tributary("run", "excludes", second, ann["contribution"], *asked)
    assert isinstance(broken.exception, VerificationError)
    monkeypatch.setenv("TRIBUTARY_API", api.url)
    nobody = tributary("run", "excludes", second, str(uuid4()))
    assert isinstance(nobody.exception, NotFound)
    waiting = request_run(api, net)
    api.settle()
    unfinished = tributary("run", "excludes", waiting, ann["contribution"])
    assert isinstance(unfinished.exception, Conflict)
