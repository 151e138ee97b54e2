"""Answers through the attribution room as the Ray actor runs it, without Ray: a run that is really
trained and indexed, read from the workers' stand-in of the ledger over HTTP."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import sha256_hex
from ledger.errors import ConfigError, Inconsistent, LedgerError, NotFound
from tests.actors import ANN
from tests.workers_api import FACTS, WORKER, WorkersApi, write_key
from workers import base_model, runs
from workers.attribute import Attributed
from workers.attribution.evidence import Evidence, NotAttributed, parse
from workers.influence import Influence
from workers.link import WorkerSpec


@dataclass(frozen=True, kw_only=True)
class World:
    api: WorkersApi
    spec: WorkerSpec
    influence: Influence
    adapter: str
    run: str

    def attribute(self, names: Sequence[str]) -> list[Attributed | LedgerError]:
        listed = [{"inference": name, **self.api.inferences[name]} for name in names]
        return self.influence.attribute(listed)

    def one(self, prompt: str, output: str) -> Attributed:
        (found,) = self.attribute([self.api.infer(self.adapter, prompt, output)])
        assert isinstance(found, Attributed)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("influence")
    with WorkersApi() as api:
        spec = WorkerSpec(api=api.url, key_file=write_key(folder), home=folder / "home")
        run = api.facts_run()
        api.do(WORKER, "run.started", {"run": run, "attempt": 1, "submission_id": "x"})
        outcome = runs.execute(spec, api.run(run), spec.client())
        api.do(WORKER, "run.completed", {"run": run, "attempt": 1, **asdict(outcome)})
        influence = Influence(spec.client(), spec.home, base_model.BUNDLED, threads=1)
        yield World(api=api, spec=spec, influence=influence, adapter=api.publish(run), run=run)


def document(found: Attributed) -> Evidence:
    evidence = parse(found.evidence)
    assert isinstance(evidence, Evidence)
    return evidence


def test_the_one_who_taught_it_is_paid_and_quoted(world: World) -> None:
    prompt, completion = FACTS[ANN][0]
    found = world.one(prompt, completion)
    assert max(found.shares, key=lambda share: share[1])[0] == ANN.id
    assert sum(ppm for _, ppm in found.shares) + found.unattributed_ppm == 1_000_000
    evidence = document(found)
    assert evidence.top_rows[0].contributor == ANN.id
    assert evidence.terms.log_size > world.api.entries[-1].index
    assert evidence.spans is not None
    quoted = [row["contributor"] for span in evidence.spans["spans"] for row in span["rows"]]
    assert ANN.id in quoted
    assert b"What" not in found.evidence, "public: no words of the answer or of a row"


def test_one_bad_answer_does_not_hold_up_the_others(world: World) -> None:
    prompt, completion = FACTS[ANN][0]
    good, blank, lost = (
        world.api.infer(world.adapter, prompt, text) for text in (completion, "  ", "gone")
    )
    del world.api.blobs[world.api.inferences[lost]["transcript_sha256"]]
    found = world.attribute([blank, good, lost, good])
    assert isinstance(found[0], Attributed)
    assert (found[0].method, found[0].unattributed_ppm) == ("none/v1", 1_000_000)
    silence = parse(found[0].evidence)
    assert isinstance(silence, NotAttributed)
    assert "no tokens" in silence.reason
    assert isinstance(found[2], NotFound)
    assert isinstance(found[1], Attributed)
    assert isinstance(found[3], Attributed)
    assert found[1].shares == found[3].shares


def test_a_damaged_index_is_fetched_again_and_never_used(world: World) -> None:
    prompt, completion = FACTS[ANN][0]
    before = world.one(prompt, completion)
    sha256 = world.api.run(world.run)["index_sha256"]
    world.influence._indexes.clear()
    vectors = world.influence._cache.index(sha256) / "vectors.i8"
    vectors.chmod(0o600)
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"\x55")
    name = world.api.infer(world.adapter, prompt, completion)
    with pytest.raises(Inconsistent, match="was changed"):
        world.attribute([name])
    (again,) = world.attribute([name])
    assert isinstance(again, Attributed)
    assert again.shares == before.shares


def test_a_damaged_adapter_is_fetched_again_and_never_used(world: World) -> None:
    prompt, completion = FACTS[ANN][0]
    before = world.one(prompt, completion)
    spec = world.spec
    again = Influence(spec.client(), spec.home, base_model.BUNDLED, threads=1)
    run = world.api.run(world.run)
    folder = again._cache.adapter(run["adapter_sha256"], run["adapter_config_sha256"])
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.chmod(0o600)
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fresh = replace(world, influence=again)
    with pytest.raises(Inconsistent, match="is damaged"):
        fresh.one(prompt, completion)
    assert fresh.one(prompt, completion).shares == before.shares


def test_a_damaged_transcript_is_tried_again_and_never_nobodys(world: World) -> None:
    prompt, completion = FACTS[ANN][0]
    for damage in (b"", b'{"v":1}', b"\xff"):
        name = world.api.infer(world.adapter, prompt, completion)
        world.api.blobs[world.api.inferences[name]["transcript_sha256"]] = damage
        (found,) = world.attribute([name])
        assert isinstance(found, Inconsistent)
        assert "hashes to something else" in found.message
    name = world.api.infer(world.adapter, prompt, completion)
    odd = world.api.put(canonical_json({"messages": [{"role": "user"}], "output": "x"}))
    found = world.influence.attribute(
        [{"inference": name, **world.api.inferences[name], "transcript_sha256": odd}]
    )[0]
    assert isinstance(found, Inconsistent)
    assert "another form" in found.message


def test_an_adapter_of_another_base_waits_for_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = world.api.infer(world.adapter, *FACTS[ANN][0])
    monkeypatch.setattr(world.influence, "_digest", "ab" * 32)
    with pytest.raises(ConfigError, match="wait for workers"):
        world.attribute([name])


def test_what_is_withdrawn_earns_nothing_and_is_quoted_no_more(world: World) -> None:
    """Last: it changes the ledger."""
    prompt, completion = FACTS[ANN][0]
    before = world.one(prompt, completion)
    mine = dict(before.shares)[ANN.id]
    contribution = document(before).top_rows[0].row.split("/")[0]
    datanet = world.api.run(world.run)["datanets"][0]
    ids = {"contribution": contribution, "datanet": datanet, "reason": "mine"}
    world.api.do(ANN, "contribution.withdrawn", ids)
    after = world.one(prompt, completion)
    assert ANN.id not in dict(after.shares)
    assert after.unattributed_ppm >= before.unattributed_ppm + mine - 1
    evidence = document(after)
    assert evidence.terms.withdrawn == {contribution}
    assert evidence.spans is not None
    rows: list[dict[str, Any]] = [r for span in evidence.spans["spans"] for r in span["rows"]]
    assert ANN.id not in [row["contributor"] for row in rows]
    assert sha256_hex(after.evidence) != sha256_hex(before.evidence)
