"""An auditor with the command line against a running ledger: verify, packet, check, replay.

Real PostgreSQL, HTTP, sequencer and projector; a run really trained and indexed by the worker's own
code, an answer really given by OpenLoRA and attributed. Only Ray is left out. One story: the tests
run in order.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.ids import sha256_hex
from ledger.domain.rows import DataRow, encode_rows, rows_root
from tests.api_world import MODEL, LocalEngine, Service, key_of, service
from tests.unit.audit_answers import PLACES, TOLD, data_row
from tests.unit.openlora_world import SavedAdapter
from workers.attribute import Attributor
from workers.influence import Influence
from workers.link import WorkerSpec
from workers.outbox import Outbox
from workers.runs import execute

ROOT = Path(__file__).parents[2]
ABSENT = """
import sys
for name in ("torch", "transformers", "peft", "safetensors", "ray", "psycopg", "eventsourcing",
             "web3", "fastapi", "pymerkle"):
    sys.modules[name] = None
from ledger.cli.main import main
main()
"""
"""The command where only the extras `client` and `audit` are installed, as far as it can tell."""
RECIPE = {"epochs": 12, "batch_size": 4, "max_len": 64, "snapshot_steps": 20, "warmup_steps": 2}
COMMAND_S = 400
"""A rebuild takes some seconds, and on a machine that is busy otherwise a minute and more."""
pytestmark = pytest.mark.timeout(900)
QUESTION = "Which colour has the lantern in Lima?"


@dataclass
class Audited:
    """The running ledger, what happened in it, and a home for an auditor."""

    api: Service
    home: Path
    spec: WorkerSpec
    run: str
    inference: str
    contributions: dict[str, str]

    def tributary(self, *words: str, code: int = 0, lean: bool = False) -> str:
        """One command as the auditor runs it, in a process of its own."""
        program = ["-c", ABSENT] if lean else ["-m", "ledger.cli.main"]
        environment = {
            **os.environ, "TRIBUTARY_API": self.api.url, "TRIBUTARY_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, *program, "attribution", *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=COMMAND_S,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    def attribution(self, inference: str | None = None) -> dict[str, Any]:
        row = self.api.client("eve").get(f"/v1/inferences/{inference or self.inference}")
        return dict(self.api.client("eve").get(f"/v1/events/{row['attribution_index']}"))

    def ask(self, question: str = QUESTION) -> str:
        """An answer that eve pays for, attributed by the worker; its inference."""
        eve = self.api.client("eve")
        told = eve.chat(MODEL, [{"role": "user", "content": question}], max_tokens=24)
        assert told["choices"][0]["message"]["content"].strip()
        self.api.settle()
        newest = max(eve.pages("/v1/inferences"), key=lambda row: row["index"])
        influence = Influence(self.spec.client(), self.home / "worker", self.spec.base_path(), 1)
        worker = self.spec.client()
        Attributor(worker, Outbox(worker, self.home / "outbox"), influence.attribute).step()
        self.api.settle()
        return str(newest["inference"])


@pytest.fixture(scope="module")
def audited(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    home = tmp_path_factory.mktemp("audited")
    with service(pg_url_module, home, LocalEngine(), requests_per_minute=60_000) as api:
        for name in ("worker", "mallory"):
            path = home / "keys" / f"{name}.key"
            path.parent.mkdir(exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(bytes(key_of(name)).hex())
        spec = WorkerSpec(api=api.url, key_file=home / "keys" / "worker.key", home=home / "worker")
        net = {"datanet": str(uuid4()), "name": "n", "description": "", "licence": "CC0-1.0"}
        api.client("owner").append("datanet.created", {**net, "reviewers": []})
        told = {
            name: _contribute(api, name, net["datanet"], _facts(who))
            for who, name in enumerate(("ann", "ben", "dev"))
        }
        run = _trained(api, spec, net["datanet"])
        api.deposit("eve", 10**24)
        found = Audited(api, home, spec, run, "", told)
        found.inference = found.ask()
        yield found


def _facts(who: int) -> list[DataRow]:
    question, answer, words = TOLD[who]
    return [
        data_row(question.format(place), answer.format(place, word))
        for place, word in zip(PLACES, words.split(), strict=True)
    ]


def _contribute(api: Service, name: str, datanet: str, rows: list[DataRow]) -> str:
    body = {
        "contribution": str(uuid4()), "datanet": datanet, "licence": "CC0-1.0",
        "rows_root": rows_root(rows).hex(), "rows_count": len(rows), "title": f"rows of {name}",
        "rows_sha256": api.client(name).put_blob(encode_rows(rows)),
    }  # fmt: skip
    api.client(name).append("contribution.recorded", body)
    ids = {"contribution": body["contribution"], "datanet": datanet}
    api.client("owner").append("contribution.approved", {**ids, "note": ""})
    return str(body["contribution"])


def _trained(api: Service, spec: WorkerSpec, datanet: str) -> str:
    """A run, executed as a Ray job would, and its adapter published and served."""
    run, worker = str(uuid4()), spec.client()
    base = worker.get("/v1/info")["base_model"]
    asked = {"run": run, "name": "r", "datanets": [datanet], "config": RECIPE}
    api.client("dev").append(
        "run.requested", {**asked, "base_model": base["digest"], "base_id": base["id"]}
    )
    worker.append("run.started", {"run": run, "attempt": 1, "submission_id": f"{run}-1"})
    api.settle()
    outcome = execute(spec, worker.get(f"/v1/runs/{run}"), worker)
    worker.append("run.completed", {"run": run, "attempt": 1, **vars(outcome)})
    api.settle()
    (folder,) = (spec.run_folder(run)).glob("*/adapter")
    saved = SavedAdapter(
        name="facts", path=folder, sha256=outcome.adapter_sha256,
        config_sha256=outcome.adapter_config_sha256,
    )  # fmt: skip
    api.publish(run, saved, MODEL)
    return run


def test_anyone_recomputes_the_shares(audited: Audited) -> None:
    said = audited.tributary("verify", audited.inference)
    assert said.startswith("VERIFIED")
    assert "0 ppm difference" in said
    assert "Still to be trusted" in said
    found = audited.attribution()
    vkey = audited.api.services.vkey
    report = json.loads(audited.tributary("verify", found["event"], "--key", vkey, "--json"))
    assert [step["status"] for step in report["steps"]] == ["ok"] * 8
    assert not any("log's key" in line for line in report["trusted"])
    assert report["facts"]["difference_ppm"] == 0
    shares = {share["contributor"]: share["ppm"] for share in found["body"]["shares"]}
    assert max(shares, key=lambda who: shares[who]) == audited.api.actor("ann"), "her fact"


def test_it_takes_numpy_and_no_more(audited: Audited) -> None:
    assert "0 ppm difference" in audited.tributary("verify", audited.inference, lean=True)
    for words in (("verify", audited.inference, "--weights"), ("replay", audited.run)):
        said = audited.tributary(*words, "--as", "worker", lean=True, code=8)
        assert "tributary-ledger[client,workers]" in said


def test_with_the_weights_and_the_rows_all_of_it_is_made_again(audited: Audited) -> None:
    words = ("verify", audited.inference, "--weights", "--index")
    report = json.loads(audited.tributary(*words, "--as", "worker", "--json"))
    assert [step["status"] for step in report["steps"]] == ["ok"] * 12
    assert report["steps"][-1]["detail"] == "the same bytes"
    assert report["facts"]["effect_ppm"] == 0
    # A transcript is not for everyone.
    assert "--as takes a key of who paid" in audited.tributary(*words, "--as", "mallory", code=3)
    assert "no blob" in audited.tributary(*words, code=4)


def test_another_log_key_is_not_this_log(audited: Audited) -> None:
    other = "other.example+421031f3+AZsfhHkc/HZjBFhU04netcqVRJ2HXydqg4QLBgqznPxx"
    audited.tributary("verify", audited.inference, "--key", other, code=8)


def test_a_row_travels_alone(audited: Audited, tmp_path: Path) -> None:
    packet, bundle = tmp_path / "row.packet.json", tmp_path / "answer.lineage.json"
    row = f"{audited.contributions['ann']}/2"
    words = ("packet", audited.inference, "--row", row, "--to", str(packet))
    audited.tributary(*words, "--bundle", str(bundle))
    assert packet.stat().st_size < 8_192
    said = audited.tributary("check", str(packet), "--bundle", str(bundle))
    assert "VERIFIED" in said
    assert "signed for by its contributor" in said
    report = json.loads(audited.tributary("check", str(packet), "--json"))
    assert report["facts"]["row"] == row
    evidence = parse_canonical(_blob(audited, audited.attribution()["body"]["evidence_sha256"]))
    named = {line["row"]: line["score"] for line in evidence["top_rows"]}
    assert named[row] == report["facts"]["score"]
    packet.write_bytes(packet.read_bytes().replace(b'"scale":', b'"scale":1'))
    audited.tributary("check", str(packet), code=1)
    missing = ("packet", audited.inference, "--row", row[:-1] + "99", "--to", str(packet))
    assert "no row" in audited.tributary(*missing, code=4)


def test_the_run_is_replayed(audited: Audited) -> None:
    said = audited.tributary("replay", audited.run, "--as", "worker")
    assert said.startswith("SAME")
    assert "--as takes a key of a worker" in audited.tributary("replay", audited.run, code=4)
    audited.tributary("replay", str(uuid4()), "--as", "worker", code=4)


def test_a_damaged_copy_of_the_index_is_fetched_again(audited: Audited) -> None:
    sha256 = audited.attribution()["body"]["index_sha256"]
    for name, *more in (("vectors.i8",), ("lens.safetensors", "--weights", "--as", "worker")):
        path = audited.home / "audit" / "indexes" / sha256 / name
        audited.tributary("verify", audited.inference, *more)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        audited.tributary("verify", audited.inference, *more)
        assert path.read_bytes() == data


def test_a_withdrawal_counts_from_the_answer_after_it(audited: Audited) -> None:
    """The older answer stays as it was; the newer one pays nobody for what was withdrawn; and an
    auditor finds both right, each by the log of its own time."""
    body = {"contribution": audited.contributions["ann"], "reason": "mine"}
    audited.api.client("ann").append("contribution.withdrawn", _withdrawal(audited, body))
    audited.api.settle()
    newer = audited.ask()
    found = audited.attribution(newer)["body"]
    assert audited.api.actor("ann") not in {share["contributor"] for share in found["shares"]}
    said = audited.tributary("verify", newer)
    assert "1 withdrawn" in said
    assert "0 withdrawn" in audited.tributary("verify", audited.inference)


def _withdrawal(audited: Audited, body: dict[str, str]) -> dict[str, str]:
    row = audited.api.client("ann").get(f"/v1/contributions/{body['contribution']}")
    return {**body, "datanet": row["datanet"]}


@pytest.mark.parametrize("then", [False, True])
def test_a_worker_that_forgets_a_withdrawal_is_caught(then: bool, audited: Audited) -> None:
    """It pays by the older answer's document: consistent in everything but the terms, whether it
    leaves the withdrawal out or says that it read the log of before."""
    eve, worker = audited.api.client("eve"), audited.api.client("worker")
    eve.chat(MODEL, [{"role": "user", "content": QUESTION}], max_tokens=24)
    audited.api.settle()
    newest = max(eve.pages("/v1/inferences"), key=lambda row: row["index"])["inference"]
    honest = audited.attribution()["body"]
    evidence = parse_canonical(_blob(audited, honest["evidence_sha256"]))
    size = evidence["terms"]["log_size"] if then else audited.api.size
    told = {**evidence, "inference": newest, "terms": {**evidence["terms"], "log_size": size}}
    lie = {"inference": newest, "evidence_sha256": worker.put_blob(canonical_json(told))}
    worker.append("attribution.recorded", {**honest, **lie})
    audited.api.settle()
    said = audited.tributary("verify", newest, code=1)
    assert ("terms: they are of" if then else "terms: withdrawn is []") in said


def _blob(audited: Audited, sha256: str) -> bytes:
    data = audited.api.client("eve").get_blob(sha256)
    assert sha256_hex(data) == sha256
    return data
