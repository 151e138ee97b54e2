"""Units of retraining on the bundled model: what a unit is, and what a kill leaves of it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ledger import bootstrap
from ledger.config import Settings
from ledger.errors import InvalidEvent, TooLarge
from workers import base_model
from workers.attribution.gradients import loss_sums
from workers.attribution.query import encode_answer
from workers.evaluation import harness, report, retrain
from workers.evaluation.canaries import canaries, recall
from workers.evaluation.harness import Bench, Job
from workers.evaluation.retrain import Query, Trial, Unit
from workers.evaluation.world import World, draw, rows_from
from workers.training import trainer
from workers.training.config import TrainingConfig
from workers.training.data import collate, pad_id

CONFIG = TrainingConfig(r=4, epochs=2, batch_size=4, max_len=64, warmup_steps=2, snapshot_steps=1)
TEXTS = {
    f"person-{who}": [
        {
            "prompt": f"What does tool{who}.part{n} do?",
            "completion": f"It turns {who * 7 + n} wheels of the mill.",
        }
        for n in range(4)
    ]
    for who in range(5)
}
ROWS = rows_from(TEXTS)
QUERIES = (
    Query(prompt=ROWS[0].prompt, answer=ROWS[0].completion),
    Query(prompt=ROWS[9].prompt, answer="It turns the mill."),
)
UNIT = Unit(subset=(0, 1, 2, 3, 8, 9), seed=1)
STEPS = 2 * 2


class Killed(Exception):
    """Stands for SIGKILL: nothing of the harness catches it."""


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(
        base_path=base_model.BUNDLED,
        rows=tuple(ROWS),
        queries=QUERIES,
        config=CONFIG,
        folder=tmp_path,
    )


def key_of(trial: Trial, unit: Unit = UNIT) -> str:
    return retrain.unit_key(trial, trial.shared(), unit)


# --- a unit -----------------------------------------------------------------------------------


def test_an_untrained_unit_is_the_bare_model(trial: Trial) -> None:
    unit = Unit(subset=(), seed=0)
    found = retrain.measure(trial, unit, key_of(trial, unit))
    model, tokenizer = base_model.load()
    for query, value in zip(QUERIES, found, strict=True):
        example = encode_answer(tokenizer, query.prompt, query.answer, max_len=512)
        batch = collate([example], pad_id(tokenizer))
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"]).logits
        assert value == pytest.approx(-float(loss_sums(logits, batch["labels"])), abs=1e-3)


def test_training_on_a_row_makes_it_likelier_and_leaves_one_file(trial: Trial) -> None:
    bare = retrain.measure(trial, Unit(subset=(), seed=0), key_of(trial, Unit(subset=(), seed=0)))
    taught = retrain.measure(trial, UNIT, key_of(trial))
    assert taught[0] > bare[0] + 1
    assert sorted(p.suffix for p in trial.folder.iterdir()) == [".json", ".json"]


def test_the_key_names_everything_that_determines_the_result(trial: Trial, tmp_path: Path) -> None:
    other_rows = (*ROWS[:9], replace(ROWS[9], completion="Something else."), *ROWS[10:])
    outside = (*ROWS[:5], replace(ROWS[5], completion="Something else."), *ROWS[6:])
    base = tmp_path / "base"
    shutil.copytree(base_model.BUNDLED, base)
    (base / "generation_config.json").write_text('{"do_sample": true}')
    keys = [
        key_of(trial),
        key_of(trial, replace(UNIT, seed=2)),
        key_of(trial, Unit(subset=(0, 1, 2, 3, 8), seed=1)),
        key_of(replace(trial, config=replace(CONFIG, epochs=3))),
        key_of(replace(trial, queries=QUERIES[:1])),
        key_of(replace(trial, rows=other_rows)),
        key_of(replace(trial, base_path=base)),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(replace(trial, rows=outside)) == keys[0]  # a row that this unit leaves out
    assert key_of(replace(trial, config=replace(CONFIG, snapshot_steps=9))) == keys[0]


@pytest.mark.parametrize(
    "damage", ["", "{", '{"log_likelihoods": [1.0]}', '{"log_likelihoods": 1}']
)
def test_a_damaged_result_is_measured_again(trial: Trial, damage: str) -> None:
    unit = Unit(subset=(), seed=0)
    key = key_of(trial, unit)
    good = retrain.measure(trial, unit, key)
    (trial.folder / f"{key}.json").write_text(damage)
    assert retrain.finished(trial, key) is None
    assert retrain.measure(trial, unit, key) == good


# --- killed -----------------------------------------------------------------------------------


def test_killed_while_training_it_goes_on_at_the_snapshot(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = retrain.measure(replace(trial, folder=tmp_path / "whole"), UNIT, key_of(trial))
    steps: list[int] = []
    real = trainer.train

    def killed_at(step: int | None) -> None:
        def training(*args: object, **more: object) -> object:
            def progress(done: int, total: int, loss: float) -> None:
                steps.append(done)
                if done == step:
                    raise Killed

            return real(*args, **more, on_progress=progress)  # type: ignore[arg-type]

        monkeypatch.setattr(retrain, "train", training)

    killed_at(3)
    with pytest.raises(Killed):
        retrain.measure(trial, UNIT, key_of(trial))
    assert retrain.finished(trial, key_of(trial)) is None
    killed_at(None)
    assert retrain.measure(trial, UNIT, key_of(trial)) == whole
    assert steps.count(1) == 1  # the second try did not begin at the beginning
    assert [p.suffix for p in trial.folder.iterdir() if p.is_file()] == [".json"]


def test_killed_between_result_and_clean_up_the_folder_goes_next_time(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **more: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        with pytest.raises(Killed):
            retrain.measure(trial, UNIT, key_of(trial))
    assert (trial.folder / f"{key_of(trial)}.training").exists()
    monkeypatch.setattr(retrain, "train", stop)  # whoever trains again fails this test
    assert len(retrain.measure(trial, UNIT, key_of(trial))) == len(QUERIES)
    assert not (trial.folder / f"{key_of(trial)}.training").exists()


def test_killed_between_units_only_the_rest_is_trained(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(base_path=base_model.BUNDLED, config=CONFIG, folder=trial.folder)
    world = World(rows=tuple(ROWS), held_out=())
    mine = bench.trial(world, QUERIES)
    units = [Unit(subset=tuple(range(n, n + 4)), seed=0) for n in range(3)]
    trained: list[tuple[int, ...]] = []
    real = retrain.fit

    def fit(trial: Trial, unit: Unit, out: Path) -> None:
        if len(trained) == 2:
            raise Killed
        trained.append(unit.subset)
        real(trial, unit, out)

    monkeypatch.setattr(retrain, "fit", fit)
    with pytest.raises(Killed):
        bench.outputs("half subsets", mine, units)
    trained[:] = trained[:1]  # room for one more
    outputs = bench.outputs("half subsets", mine, units)
    assert trained[1:] == [units[2].subset]
    assert outputs.shape == (len(QUERIES), len(units))
    assert np.isfinite(outputs).all()


def test_a_job_knows_when_it_is_done(trial: Trial) -> None:
    job = Job(what="measure", trial=trial, unit=UNIT, key=key_of(trial))
    whole = Unit(subset=tuple(range(len(ROWS))), seed=0)
    fit = Job(what="fit", trial=trial, unit=whole, out=retrain.adapter_folder(trial, 0))
    assert not job.done()
    assert not fit.done()
    assert harness.one_by_one([job, fit], lambda done, total: None)[1] == []
    assert job.done()
    assert fit.done()


# --- worlds and canaries ----------------------------------------------------------------------


def test_a_world_trains_on_what_it_does_not_ask_about() -> None:
    world = draw(ROWS, count=12, held_out=4, seed=3)
    assert len(world.rows) == 12
    assert len(world.held_out) == 4
    assert not {r.row_id for r in world.rows} & {r.row_id for r in world.held_out}
    assert [r.registered_index for r in world.rows] == list(range(12))
    assert draw(ROWS, count=12, held_out=4, seed=3) == world
    assert draw(ROWS, count=12, held_out=4, seed=4) != world


def test_a_world_of_players_has_that_many() -> None:
    uneven = rows_from({**TEXTS, "brief": [{"prompt": "Who?", "completion": "Nobody."}]})
    for seed in range(5):
        world = draw(uneven, count=9, held_out=3, per_contributor=4, contributors=3, seed=seed)
        assert len({r.contributor for r in (*world.rows, *world.held_out)}) == 3
        assert "brief" not in world.contributors
        assert max(world.owners()) == len(world.contributors) - 1


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(InvalidEvent, match="MIN_ROWS"):
        draw(ROWS[:5], count=5, held_out=2)


def test_canaries_are_about_different_things_and_are_recognised() -> None:
    found = canaries(60, seed=0)
    assert canaries(60, seed=0) == found
    assert len({c.prompt for c in found}) == 60
    assert all(c.told_by(c.completion) for c in found)
    assert all(c.prompt != c.reworded for c in found)
    assert not any(a.told_by(b.completion) for a in found for b in found if a is not b)


def test_recall_counts_ties_against_us() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, 5.0, 6.0]])
    assert recall(scores, [0, 0, 1], 1) == pytest.approx(1 / 3)
    assert recall(scores, [0, 0, 1], 2) == pytest.approx(1.0)


def test_an_evaluation_without_answers_or_with_unknown_methods_is_refused(trial: Trial) -> None:
    with pytest.raises(InvalidEvent, match="no query"):
        replace(trial, queries=())
    with pytest.raises(InvalidEvent, match="no method nonsense"):
        harness.Options(methods=("nonsense",))


@pytest.mark.parametrize(
    ("amounts", "words"),
    [
        ({"subsets": 0}, "subsets is 0; expected 3 to 4096"),
        ({"subsets": 2}, "subsets is 2"),
        ({"subsets": 4_097}, "subsets is 4097"),
        ({"queries": 0}, "queries is 0"),
        ({"queries": 1_639}, "queries is 1639; expected 1 to 1638"),
        ({"seeds": 0}, "seeds is 0"),
        ({"rows": 7}, "rows is 7; expected 8 to"),
        ({"coalitions": 0}, "coalitions is 0"),
        ({"players": 1}, "players is 1; expected 2 to"),
        ({"canaries": -1}, "canaries is -1"),
        ({"seed": -1}, "seed is -1; expected 0 to"),
    ],
)
def test_senseless_amounts_are_refused_before_anything_is_trained(
    amounts: dict[str, int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidEvent, match=words) as refused:
        evaluation(tmp_path, amounts)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_measured_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    alone = {"one": [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(40)]}
    with pytest.raises(InvalidEvent, match="MIN_PLAYERS"):
        evaluation(tmp_path, {}, texts=alone)
    with pytest.raises(InvalidEvent, match="MIN_ROWS"):
        evaluation(tmp_path, {}, texts={"one": alone["one"][:7]})
    with pytest.raises(InvalidEvent, match="no part lds"):
        evaluation(tmp_path, {}, parts=["lds"])
    with pytest.raises(TooLarge, match="MAX_QUERIES"):
        evaluation(tmp_path, {}, answers=[("p", "c")] * 4_097)
    assert not (tmp_path / "out").exists()


def evaluation(tmp_path: Path, amounts: dict[str, int], **more: Any) -> Any:
    """As the command asks for it; this starts a Ray unless it is refused."""
    settings = Settings(home=tmp_path / "home")  # type: ignore[call-arg]
    asked: dict[str, Any] = {"texts": TEXTS, "answers": [], "parts": [], **more}
    return bootstrap.evaluation(
        settings, **asked, run=None, base=None, recipe={}, amounts=amounts, out=tmp_path / "out",
        cpus=1, tell=lambda *_: None,
    )  # fmt: skip


def test_without_matplotlib_there_is_no_plot_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "workers.evaluation.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = report.write({"title": "Nothing.", "missing": {"dattri": "not installed"}}, tmp_path)
    assert [path.name for path in found] == ["results.json", "results.md"]
    assert "- dattri: not installed" in (tmp_path / "results.md").read_text()


def test_results_hold_plain_numbers(trial: Trial) -> None:
    key = key_of(trial, Unit(subset=(), seed=0))
    retrain.measure(trial, Unit(subset=(), seed=0), key)
    record = json.loads((trial.folder / f"{key}.json").read_text())
    assert record["rows"] == 0
    assert all(isinstance(v, float) and v < 0 for v in record["log_likelihoods"])
