"""The GPU bench runs on a CPU too, at a size for that, with nothing but what it says it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.openlora import bench
from workers.openlora.bench_report import markdown
from workers.openlora.bench_world import SHAPES, AdapterMaker, random_llama

ROOT = Path(__file__).parents[2]
SMALL = [
    "--device=cpu",
    "--shape=tiny",
    "--batch=3",
    "--adapters=3",
    "--resident=7",
    "--steps=3",
    "--warm-steps=2",
    "--repeats=1",
    "--prompt=6",
]
NOT_NEEDED = ("structlog", "nacl", "pydantic", "peft", "ray", "httpx", "fastapi", "accelerate")
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED}))  # importing any of them is an ImportError
from workers.openlora.bench import main
sys.exit(main(sys.argv[1:]))
"""


def test_every_section_runs_on_a_machine_that_has_torch_and_little_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SMALL, f"--out={tmp_path}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "openlora_bench.json").read_text())
    sections = report["sections"]
    assert list(sections) == list(bench.SECTIONS)
    assert all(s["ok"] for s in sections.values())
    assert sections["greedy"]["fp32"] == {"answers": 10, "identical": 10, "distinct": 10}
    for case in bench.CASES:
        measured = sections["decode"][case]
        _check_limit(measured)
        assert measured["distinct_adapters"] == 3
        assert measured["decoder"]["eager"] == 0 < measured["decoder"]["replayed"]
        assert len(sections["ttft"][case]["ms"]["disk"]) == 1
    resident = sections["resident"]
    assert (resident["resident"], resident["through_the_store"]) == (7, 3)
    assert resident["bytes_per_adapter_ratio"] == 1.0, "rank 16 of 16: no padding"
    assert resident["slot_bytes"] == 7 * resident["adapter_bytes"]
    text = (tmp_path / "openlora_bench.md").read_text()
    assert text == markdown(report)
    assert "3 x all linears r16" in text


def _check_limit(measured: dict[str, Any]) -> None:
    """The bound again, from the shape alone."""
    s = SHAPES["tiny"]
    dim = s.hidden // s.heads
    kv_width = s.kv_heads * dim
    square, wide = s.hidden * s.hidden, s.hidden * s.inner
    layer = 2 * square + 2 * s.hidden * kv_width + 3 * wide + 2 * s.hidden  # two norms
    weights = 4 * (s.layers * layer + s.hidden + s.vocab * s.hidden)  # last norm, output head
    assert measured["bytes"]["weights"] == weights
    kv = measured["bytes"]["kv"]
    assert kv == int(2 * 4 * s.layers * kv_width * (6 + 1 + 2 + 1.5) * 3)
    read = measured["bytes"]["adapters"]
    assert measured["limit"] == pytest.approx((weights + kv) / (weights + kv + read))
    assert measured["share_of_limit"] == pytest.approx(measured["fraction"] / measured["limit"])


def test_adapter_bytes_are_those_of_a_and_b() -> None:
    model = random_llama(SHAPES["8b"], torch.device("meta"), torch.bfloat16, window=8)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248, "Llama 3.1 8B's own count"
    shape = SHAPES["tiny"]
    tiny = random_llama(shape, torch.device("cpu"), torch.bfloat16, window=8)
    maker = AdapterMaker(tiny, ("q_proj", "v_proj"), 8, 0.1)
    q, v = 2 * shape.hidden, shape.hidden + shape.hidden // 2
    assert maker.nbytes == 2 * 8 * shape.layers * (q + v)


def test_a_section_that_fails_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(b: bench.Bench) -> dict[str, Any]:
        b.partial["got"] = 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(bench.RUNNERS, "decode", broken)
    arguments = [*SMALL, "--sections=decode,kernels", f"--out={tmp_path}"]
    assert bench.main(arguments) == 1
    sections = json.loads((tmp_path / "openlora_bench.json").read_text())["sections"]
    assert not sections["decode"]["ok"]
    assert "illegal memory access" in sections["decode"]["error"]
    assert sections["decode"]["got"] == 1
    assert sections["kernels"]["ok"]
    assert "failed: RuntimeError" in capsys.readouterr().out
    assert bench.main([*SMALL, "--budget-s=0", "--sections=kernels", f"--out={tmp_path}"]) == 1
    report = json.loads((tmp_path / "openlora_bench.json").read_text())
    assert "skipped" in report["sections"]["kernels"]["error"]


def test_a_broken_device_is_left_to_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(b: bench.Bench) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(bench.RUNNERS, "kernels", broken)
    monkeypatch.setattr(bench, "device_works", lambda device: False)
    arguments = [*SMALL, "--sections=kernels,greedy,ttft", f"--out={tmp_path}"]
    assert bench.main(arguments) == 1
    sections = json.loads((tmp_path / "openlora_bench.json").read_text())["sections"]
    assert [(name, s["ok"]) for name, s in sections.items()] == [
        ("kernels", False),
        ("greedy", True),
        ("ttft", True),
    ]
    assert sections["greedy"]["kernels_option"] == "torch"
    assert bench.device_works(torch.device("cpu")) is False
    monkeypatch.undo()
    assert bench.device_works(torch.device("cpu"))


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--sections=decode,prefill"])
    assert "no such section: prefill" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "said"), [("cuda", "sees no CUDA device"), ("gpu", "is no device")]
)
def test_a_device_that_is_not_there_is_said_at_once(
    device: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        bench.main([f"--device={device}"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
