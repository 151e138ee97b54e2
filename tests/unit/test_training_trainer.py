"""workers/training/trainer.py: same inputs, same bytes; killed anywhere, same bytes."""

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from ledger.domain.canonical import parse_canonical
from ledger.errors import ComputeError, Conflict, InvalidEvent, TooLarge
from workers import base_model
from workers.attribution.index import IndexedRow
from workers.training import trainer
from workers.training.config import TrainingConfig
from workers.training.trainer import (
    ADAPTER_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    SNAPSHOT_FILE,
    TrainingResult,
    TrainingRow,
    epoch_batches,
    train,
)

CONFIG = TrainingConfig(
    r=4,
    dropout=Decimal("0.1"),
    epochs=3,
    batch_size=4,
    max_len=48,
    warmup_steps=2,
    snapshot_steps=2,
    seed=11,
)
ROWS = [
    TrainingRow(
        contribution=f"c-{i}",
        index=i % 2,
        row_hash=hashlib.sha256(bytes([i])).hexdigest(),
        prompt=f"What does tool{i}.run do?",
        completion=f"It runs part {i * 37} of the plan.",
    )
    for i in range(10)
]
STEPS = 9  # 3 epochs of ceil(10 / 4) batches


class Killed(Exception):
    """Stands for SIGKILL: nothing of the trainer catches it."""


def run(folder: Path, config: TrainingConfig = CONFIG, **kwargs: Any) -> TrainingResult:
    return train(config, base_model.BUNDLED, ROWS, folder, **kwargs)


def kill_at(step: int) -> Any:
    def on_progress(done: int, total: int, loss: float) -> None:
        if done == step:
            raise Killed

    return on_progress


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingResult, Path]:
    folder = tmp_path_factory.mktemp("reference")
    return run(folder), folder


def test_two_trainings_give_the_same_bytes(
    reference: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    torch.manual_seed(999)  # the process's own randomness must not matter, nor be disturbed
    state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    assert run(tmp_path) == reference[0]
    assert contents(tmp_path) == contents(reference[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_row_of_the_index_trains_as_it_is(reference: tuple[TrainingResult, Path]) -> None:
    rows = [IndexedRow(**asdict(row), contributor="ann", registered_index=7) for row in ROWS]
    # A finished run is found by the hash of all its inputs; other ones are a Conflict.
    assert train(CONFIG, base_model.BUNDLED, rows, reference[1]) == reference[0]
    with pytest.raises(Conflict):
        train(CONFIG, base_model.BUNDLED, rows[1:], reference[1])


def test_another_seed_gives_another_adapter(
    reference: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    other = run(tmp_path, replace(CONFIG, seed=12))
    assert other.adapter_sha256 != reference[0].adapter_sha256


@pytest.mark.parametrize("step", [1, 2, 3, 6, STEPS])
def test_a_killed_run_goes_on_to_the_same_bytes(
    reference: tuple[TrainingResult, Path], tmp_path: Path, step: int
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, on_progress=kill_at(step))
    assert not (tmp_path / MANIFEST_FILE).exists()
    seen: list[int] = []
    result = run(tmp_path, on_progress=lambda done, total, loss: seen.append(done))
    saved = (step // 2) * 2 if step < STEPS else 8
    assert seen == list(range(saved + 1, STEPS + 1)), "resumed from the last snapshot"
    assert result == reference[0]
    assert contents(tmp_path) == contents(reference[1])


def test_a_run_killed_twice_goes_on_to_the_same_bytes(
    reference: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    for step in (3, 7):
        with pytest.raises(Killed):
            run(tmp_path, on_progress=kill_at(step))
    assert run(tmp_path) == reference[0]


@pytest.mark.parametrize("written", [ADAPTER_FILE, CONFIG_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("kept", [True, False])
def test_each_last_write_lost_or_kept(
    reference: tuple[TrainingResult, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: str,
    kept: bool,
) -> None:
    settle = trainer._settle

    def failing(part: Path, path: Path) -> str:
        if path.name != written:
            return settle(part, path)
        if kept:
            settle(part, path)
        raise Killed

    monkeypatch.setattr(trainer, "_settle", failing)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    assert run(tmp_path) == reference[0]
    assert contents(tmp_path) == contents(reference[1])


def test_a_finished_run_is_not_trained_again(
    reference: tuple[TrainingResult, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_fit", lambda *_: pytest.fail("trained again"))
    assert run(reference[1]) == reference[0]


def test_an_altered_adapter_is_noticed_and_made_again(
    reference: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    for name, data in contents(reference[1]).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ADAPTER_FILE).write_bytes(b"altered")
    assert run(tmp_path) == reference[0]
    assert contents(tmp_path) == contents(reference[1])


def test_a_folder_of_another_run_is_a_conflict(
    reference: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    other = replace(CONFIG, seed=12)
    with pytest.raises(Conflict, match="another run"):
        run(reference[1], other)
    with pytest.raises(Killed):
        run(tmp_path, on_progress=kill_at(4))
    with pytest.raises(Conflict, match="another run"):
        run(tmp_path, other)
    assert run(tmp_path, other, resume=False).adapter_sha256 != reference[0].adapter_sha256


def test_a_broken_snapshot_is_said_so(tmp_path: Path) -> None:
    (tmp_path / SNAPSHOT_FILE).write_bytes(b"\x00" * 64)
    with pytest.raises(ComputeError, match="Remove it to start over"):
        run(tmp_path)


def test_the_manifest_says_what_was_trained(reference: tuple[TrainingResult, Path]) -> None:
    result, folder = reference
    data = (folder / MANIFEST_FILE).read_bytes()
    manifest = parse_canonical(data)
    assert hashlib.sha256(data).hexdigest() == result.manifest_sha256
    assert [(r["contribution"], r["row"], r["row_hash"]) for r in manifest["rows"]] == [
        (r.contribution, r.index, r.row_hash) for r in ROWS
    ]
    assert manifest["tokens"] == CONFIG.epochs * sum(r["tokens"] for r in manifest["rows"])
    assert manifest["base_sha256"] == base_model.digest(base_model.BUNDLED)
    assert TrainingConfig.from_dict(manifest["config"]) == CONFIG
    assert len(manifest["losses"]) == manifest["steps"] == STEPS
    assert float(manifest["losses"][-1]) < float(manifest["losses"][0])
    for name, field in ((ADAPTER_FILE, "adapter_sha256"), (CONFIG_FILE, "config_sha256")):
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert manifest[field] == found == asdict(result)[field]
    for file in (folder / MANIFEST_FILE, folder / CONFIG_FILE):
        assert str(base_model.BUNDLED).encode() not in file.read_bytes()
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    assert config["base_model_name_or_path"] == f"sha256:{result.base_sha256}"


def test_peft_loads_it_and_the_answer_changes(reference: tuple[TrainingResult, Path]) -> None:
    from peft import PeftModel

    model, _ = base_model.load(base_model.BUNDLED)
    ids = torch.tensor([[1, 2, 100, 200, 3]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(model, str(reference[1])).eval()
        after = loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            without = loaded(input_ids=ids).logits
    assert (after - before).abs().max() > 0.01
    assert torch.allclose(without, before)


@pytest.mark.parametrize("count", [1, 3, 4, 10, 32, 33, 100])
def test_every_epoch_holds_each_row_once_in_an_order_of_its_own(count: int) -> None:
    lengths = [7 * i % 23 for i in range(count)]
    epochs = [epoch_batches(11, epoch, lengths, 4) for epoch in range(2)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert len(batches) == trainer.steps_in_all(replace(CONFIG, epochs=1), count)
        assert all(0 < len(batch) <= 4 for batch in batches)
    assert epochs == [epoch_batches(11, epoch, lengths, 4) for epoch in range(2)]
    assert count <= 4 or epochs[0] != epochs[1]


def test_progress_reports_every_step(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(tmp_path, on_progress=lambda done, total, loss: seen.append((done, total)))
    assert seen == [(i, STEPS) for i in range(1, STEPS + 1)]


def test_wrong_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(rows: list[TrainingRow]) -> None:
        train(CONFIG, base_model.BUNDLED, rows, tmp_path)

    with pytest.raises(InvalidEvent, match="at least one row"):
        attempt([])
    with pytest.raises(InvalidEvent, match="c-0#0 is given twice"):
        attempt([ROWS[0], ROWS[0]])
    with pytest.raises(InvalidEvent, match="64 lower-case hex"):
        attempt([replace(ROWS[0], row_hash="ABC")])
    with pytest.raises(InvalidEvent, match="row c-0#0: the completion is empty"):
        attempt([replace(ROWS[0], completion="  ")])
    monkeypatch.setattr(trainer, "MAX_ROWS", 5)
    with pytest.raises(TooLarge, match="at most 5"):
        attempt(ROWS)
    monkeypatch.setattr(trainer, "MAX_ROW_CHARS", 10)
    with pytest.raises(TooLarge, match="MAX_ROW_CHARS"):
        attempt(ROWS[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_row_longer_than_max_len_is_trained_cut(tmp_path: Path) -> None:
    long = replace(ROWS[0], prompt="word " * 500, completion="answer " * 500)
    result = train(replace(CONFIG, epochs=1), base_model.BUNDLED, [long], tmp_path)
    assert (result.steps, result.tokens) == (1, CONFIG.max_len)


def test_modules_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidEvent, match="target modules"):
        run(tmp_path, replace(CONFIG, target_modules=("c_attn",)))


def test_divergence_is_an_error_and_leaves_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_rate", lambda step, plan: float("inf"))
    with pytest.raises(ComputeError, match="diverged"):
        run(tmp_path)
    assert not (tmp_path / MANIFEST_FILE).exists()


def test_a_worker_killed_by_the_system_leaves_what_the_next_one_needs(
    reference: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    """The same as above with a real SIGKILL, and in another process than the reference."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.unit.test_training_trainer import run\n"
        "def die(done, total, loss):\n"
        "    if done == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(Path(sys.argv[1]), on_progress=die)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert process.returncode == -signal.SIGKILL
    assert set(contents(tmp_path)) == {SNAPSHOT_FILE}
    assert run(tmp_path) == reference[0]
