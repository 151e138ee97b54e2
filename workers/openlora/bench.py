"""`python -m workers.openlora.bench --device cuda`: the GPU table in one run of a few minutes.

Needs torch, transformers, triton and safetensors; no network, no files but its own temporary ones.
Sections, each of which reports its own failure while the run goes on:

- `kernels`: the LoRA kernels beside torch's on this device, in every float type.
- `greedy`: the engine's tokens beside a plain torch model with merged weights, at a small size.
- `decode`: tokens/s with and without LoRA in turns, and the share of what memory traffic allows.
- `ttft`: time to first token with the adapter on disk, in host memory, in a slot.
- `resident`: many adapters in slots at once, and what they cost.

The bound. A decode step reads every weight (W bytes, the embedding table apart, of which it reads
rows), the keys and values of its rows (KV) and the A and B of its U distinct adapters (a bytes
each). With nothing but memory traffic to wait for, LoRA leaves (W + KV) / (W + KV + U a) of the
rate without it; the measured fraction over that is `share_of_limit` (target: 0.85).
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workers.openlora import kernels
from workers.openlora.bench_report import markdown
from workers.openlora.bench_world import (
    ALL_LINEAR,
    QV,
    SHAPES,
    AdapterMaker,
    DiskAdapter,
    merged,
    plain_greedy,
    random_llama,
)
from workers.openlora.engine import Delta, Engine, EngineConfig, GenerationRequest
from workers.openlora.forms import SLOT_GATHER
from workers.openlora.gather import SlotGather

SECTIONS = ("kernels", "greedy", "decode", "ttft", "resident")
TARGET_SHARE = 0.85
MAX_STEPS_PER_PHASE = 10_000
"""An engine that never comes to the state that is waited for is a failure, not a hang."""
KERNEL_SIZES: tuple[dict[str, int], ...] = (
    {},
    {"width": 2100, "out": 333, "rank": 16, "tokens": 70},
    {"width": 4096, "out": 1024, "rank": 64, "tokens": 33},
)
"""Odd and round sizes; from 2,048 on a shrink is made in parts."""
GRACE_S = 120
"""How long a section that has begun may go on after the budget."""
WORK_BYTES = 6 << 30
"""Left free on the device for activations, logits, recordings and libraries."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class Bench:
    """Options, and what the sections share."""

    options: argparse.Namespace
    folder: Path
    device: torch.device
    dtype: torch.dtype
    partial: dict[str, Any] = field(default_factory=dict)
    """What the running section has so far: kept should it fail."""
    made: dict[tuple[tuple[str, ...], int], list[DiskAdapter]] = field(default_factory=dict)
    asked: int = 0

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what the last section's engine held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def engine(self, **config: Any) -> tuple[Engine, Any]:
        """A fresh engine with room for `--batch` rows, and its model.

        The form is the GPU's on every device, so that a run on a CPU takes the same path.
        """
        o = self.options
        model = random_llama(
            SHAPES[o.shape], self.device, self.dtype, window=o.prompt + o.answer_room
        )
        sizes: dict[str, Any] = {
            "max_rows": o.batch,
            "max_len": o.prompt + o.answer_room,
            "max_queue": 4 * o.batch,
            "prefix_rows": 0,
            "host_bytes": 32 << 30,
            "max_rank": 16,
            "lora_form": SLOT_GATHER,
            "static_decode": not o.eager,
            "lora_kernels": o.kernels,
        }
        return Engine(model, None, EngineConfig(**sizes | config)), model

    def adapters(self, targets: Sequence[str], rank: int, count: int) -> list[DiskAdapter]:
        """`count` folders, made once per run."""
        made = self.made.setdefault((tuple(targets), rank), [])
        if len(made) < count:
            maker = AdapterMaker(self.skeleton(), targets, rank, SHAPES[self.options.shape].spread)
            made += [maker.save(self.folder, number) for number in range(len(made), count)]
        return made[:count]

    def skeleton(self) -> Any:
        """The model's shapes without its memory."""
        return random_llama(SHAPES[self.options.shape], torch.device("meta"), self.dtype, window=8)


def ask(bench: Bench, engine: Engine, names: Sequence[str | None], tokens: int) -> list[str]:
    """Submit one request per name, with prompts of `--prompt` tokens that share no beginning."""
    ids = []
    for name in names:
        bench.asked += 1
        make = torch.Generator().manual_seed(bench.asked)
        prompt = torch.randint(0, engine.vocab_size, (bench.options.prompt,), generator=make)
        ids.append(f"q{bench.asked}")
        engine.submit(
            GenerationRequest(
                request_id=ids[-1],
                adapter_id=name,
                prompt_ids=tuple(prompt.tolist()),
                max_tokens=tokens,
                ignore_eos=True,
            )
        )
    return ids


def step_until(engine: Engine, done: Callable[[list[Delta]], bool]) -> None:
    """Steps until `done(deltas of the step)`. Raises RuntimeError when a request failed."""
    for _ in range(MAX_STEPS_PER_PHASE):
        deltas = engine.step()
        for d in deltas:
            if d.finish is not None and d.finish.error is not None:
                raise RuntimeError(f"{d.request_id}: {d.finish.error}")
        if done(deltas):
            return
    raise RuntimeError("the engine did not get there")


def drain(engine: Engine, ids: Sequence[str]) -> None:
    for request_id in ids:
        engine.cancel(request_id)
    step_until(engine, lambda _: not engine.has_work())


def load(engine: Engine, adapters: Sequence[DiskAdapter]) -> None:
    for a in adapters:
        engine.load_adapter(a.name, a.path, a.sha256, check=False)


# --- sections ---


def run_kernels(bench: Bench) -> dict[str, Any]:
    """Raises what Triton raises, and ArithmeticError when its kernels are not torch's within the
    type: an engine would fall back and go on, a bench has to say so."""
    found = bench.partial["kernels"] = {}
    for name, dtype in DTYPES.items():
        chosen = _kernels_of(bench)
        for sizes in KERNEL_SIZES:
            kernels.self_test(chosen, bench.device, dtype, **sizes)
        found[name] = chosen.name
    return {"kernels": found, "timed": _kernel_rates(bench)}


def _kernels_of(bench: Bench) -> kernels.Kernels:
    on_gpu = bench.device.type == "cuda" and bench.options.kernels is None
    if on_gpu and importlib.util.find_spec("triton") is not None:
        from workers.openlora.kernels_triton import Triton

        return Triton()
    return kernels.Torch()


def _kernel_rates(bench: Bench) -> list[dict[str, Any]]:
    """GB/s of one shrink and one expand at decode, each row with an adapter of its own.

    Enough slots that their bytes do not stay in a cache between two calls.
    """
    shape, o = SHAPES[bench.options.shape], bench.options
    chosen = _kernels_of(bench)
    out: list[dict[str, Any]] = []
    for rank in (8, 16):
        for width, result in ((shape.hidden, shape.inner), (shape.inner, shape.hidden)):
            slots = o.batch * (8 if bench.device.type == "cuda" else 1)
            a = torch.randn(1, slots, rank, width, device=bench.device, dtype=bench.dtype)
            b = torch.randn(slots, rank, result, device=bench.device, dtype=bench.dtype)
            ranks = torch.full((1, slots), rank, dtype=torch.int32, device=bench.device)
            x = torch.randn(o.batch, 1, width, device=bench.device, dtype=bench.dtype)
            y = torch.zeros(o.batch, 1, result, device=bench.device, dtype=bench.dtype)
            order = torch.randperm(slots).view(-1, o.batch).to(bench.device)

            def once(i: int, a: Any = a, b: Any = b, x: Any = x, y: Any = y,
                     ranks: Any = ranks, order: Any = order) -> None:  # fmt: skip
                index = order[i % order.shape[0]]
                h = chosen.shrink(x, a, index, ranks)
                chosen.expand(y, h[:, 0], b, index, ranks[0])

            seconds = _timed(bench, once)
            nbytes = o.batch * rank * (width + result) * a.element_size()
            out.append(
                {
                    "rank": rank,
                    "in": width,
                    "out": result,
                    "us": 1e6 * seconds,
                    "gb_s": nbytes / seconds / 1e9,
                }
            )
    return out


def _timed(bench: Bench, once: Callable[[int], None]) -> float:
    """Mean seconds of a call in a row of them, launches included."""
    calls = 64 if bench.device.type == "cuda" else 4
    for i in range(8 if calls > 8 else 1):
        once(i)
    bench.sync()
    began = time.perf_counter()
    for i in range(calls):
        once(i)
    bench.sync()
    return (time.perf_counter() - began) / calls


def run_greedy(bench: Bench) -> dict[str, Any]:
    """Small, in float32 on the device: identical, or this section fails. In `--dtype` the last bits
    differ between batch shapes and merging rounds once more, so near-ties fall otherwise: there it
    is counted."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(("fp32", bench.options.dtype)):
        same, total, distinct = greedy(bench, DTYPES[name])
        out[name] = {"answers": total, "identical": same, "distinct": distinct}
    if out["fp32"]["identical"] != out["fp32"]["answers"]:
        raise ArithmeticError(f"greedy tokens differ from plain torch in float32: {out}")
    return out


def greedy(bench: Bench, dtype: torch.dtype) -> tuple[int, int, int]:
    """(answers that are plain torch's, answers, distinct ones) of mixed ranks and base rows."""
    shape, tokens = SHAPES["tiny"], 12
    model = random_llama(shape, bench.device, dtype, window=64)
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    adapters = [
        AdapterMaker(model, targets, rank, 0.15).save(folder, number)
        for number, (targets, rank) in enumerate(
            [(QV, 8), (ALL_LINEAR, 16), (ALL_LINEAR, 3), (("down_proj", "k_proj"), 5)]
        )
    ]
    make = torch.Generator().manual_seed(3)
    wanted: dict[str, list[int]] = {}
    requests = []
    for i, source in enumerate([*adapters, None] * 2):
        prompt = torch.randint(0, shape.vocab, (4 + 3 * i,), generator=make).tolist()
        plain = model if source is None else merged(model, source)
        wanted[f"g{i}"] = plain_greedy(plain, prompt, tokens)
        requests.append(
            GenerationRequest(
                request_id=f"g{i}",
                adapter_id=None if source is None else source.name,
                prompt_ids=tuple(prompt),
                max_tokens=tokens,
                ignore_eos=True,
            )
        )
    config = EngineConfig(
        max_rows=6,
        max_len=64,
        slots=3,
        max_rank=16,
        prefill_chunk=16,
        lora_form=SLOT_GATHER,
        static_decode=True,
        lora_kernels=bench.options.kernels,
    )
    engine = Engine(model, None, config)
    load(engine, adapters)
    got: dict[str, list[int]] = {}
    for r in requests:
        engine.submit(r)

    def collect(deltas: list[Delta]) -> bool:
        for d in deltas:
            got.setdefault(d.request_id, []).extend(d.token_ids)
        return not engine.has_work()

    step_until(engine, collect)
    same = sum(got[name] == tokens_ for name, tokens_ in wanted.items())
    return same, len(wanted), len({tuple(t) for t in got.values()})


CASES = {"q,v r8": (QV, 8), "all linears r16": (ALL_LINEAR, 16)}


def run_decode(bench: Bench) -> dict[str, Any]:
    """Both adapter sets in one engine; each measured in turns with the base model alone."""
    o = bench.options
    engine, model = bench.engine(slots=2 * o.adapters)
    counts = _weight_bytes(model), _kv_bytes_per_position(bench)
    out: dict[str, Any] = {}
    for case, (targets, rank) in CASES.items():
        adapters = bench.adapters(targets, rank, o.adapters)
        load(engine, adapters)
        out[case] = _measure_case(bench, engine, adapters, *counts)
        out[case]["decoder"] = engine.stats()["decoder"]
        bench.partial[case] = out[case]
    return out


def _measure_case(
    bench: Bench, engine: Engine, adapters: list[DiskAdapter], weights: int, kv_position: int
) -> dict[str, Any]:
    o = bench.options
    names = [adapters[i % len(adapters)].name for i in range(o.batch)]
    rates: dict[str, list[float]] = {"lora": [], "base": []}
    for batch in (names, [None] * o.batch):  # loads, compiles and records; not counted
        _rate(bench, engine, batch)
    for repeat in range(o.repeats):
        for kind in ("lora", "base") if repeat % 2 == 0 else ("base", "lora"):
            rates[kind].append(_rate(bench, engine, names if kind == "lora" else [None] * o.batch))
    fraction = statistics.median(
        lora / base for lora, base in zip(rates["lora"], rates["base"], strict=True)
    )
    length = o.prompt + 1 + o.warm_steps + o.steps / 2
    kv = int(kv_position * length * o.batch)
    distinct = len(set(names))
    read = distinct * adapters[0].nbytes
    limit = (weights + kv) / (weights + kv + read)
    lora = statistics.median(rates["lora"])
    return {
        "batch": o.batch,
        "distinct_adapters": distinct,
        "tokens_per_s": {"lora": rates["lora"], "base": rates["base"]},
        "lora_tokens_per_s": lora,
        "base_tokens_per_s": statistics.median(rates["base"]),
        "fraction": fraction,
        "bytes": {"weights": weights, "kv": kv, "adapters": read},
        "limit": limit,
        "share_of_limit": fraction / limit,
        "gb_s": (weights + kv + read) * lora / o.batch / 1e9,
        "step_ms": 1000 * o.batch / lora,
    }


def _rate(bench: Bench, engine: Engine, names: Sequence[str | None]) -> float:
    """Tokens/s of decode steps with all rows running; prompts and warm-up are not in it."""
    o = bench.options
    ids = ask(bench, engine, names, o.answer_room - 1)
    waiting = set(ids)

    def all_running(deltas: list[Delta]) -> bool:
        waiting.difference_update(d.request_id for d in deltas)
        return not waiting

    step_until(engine, all_running)
    for _ in range(o.warm_steps):
        engine.step()
    bench.sync()
    began, tokens = time.perf_counter(), 0
    for _ in range(o.steps):
        tokens += sum(len(d.token_ids) for d in engine.step())
    bench.sync()
    seconds = time.perf_counter() - began
    drain(engine, ids)
    if tokens != o.steps * len(names):
        raise RuntimeError(f"{tokens} tokens in {o.steps} steps of {len(names)} rows")
    return tokens / seconds


def _weight_bytes(model: Any) -> int:
    """Parameters that a decode step reads: all but the embedding table, unless it is the head."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return sum(p.nbytes for p in model.parameters() if tied or p is not table)


def _kv_bytes_per_position(bench: Bench) -> int:
    shape = SHAPES[bench.options.shape]
    dim = shape.hidden // shape.heads
    return 2 * shape.layers * shape.kv_heads * dim * bench.dtype.itemsize


def run_ttft(bench: Bench) -> dict[str, Any]:
    """One request on an idle engine, from submission to its first token, in ms."""
    o = bench.options
    engine, _ = bench.engine(slots=2 * o.adapters)
    out: dict[str, Any] = {"prompt_tokens": o.prompt}
    _first_token_ms(bench, engine, None)  # kernels compile, pools are allocated
    out["base"] = [_first_token_ms(bench, engine, None) for _ in range(o.repeats)]
    for case, (targets, rank) in CASES.items():
        adapters = bench.adapters(targets, rank, 2 * o.repeats + 1)
        load(engine, adapters)
        first, *rest = [a.name for a in adapters]
        _first_token_ms(bench, engine, first)
        on_disk, in_host = rest[: o.repeats], rest[o.repeats :]
        times: dict[str, list[float]] = {"disk": [], "host": [], "slot": []}
        for cold, warm in zip(on_disk, in_host, strict=True):
            engine.store.warm(warm)
            times["disk"].append(_first_token_ms(bench, engine, cold))
            times["host"].append(_first_token_ms(bench, engine, warm))
            times["slot"].append(_first_token_ms(bench, engine, warm))
        out[case] = {"adapter_bytes": adapters[0].nbytes, "ms": times} | {
            tier: statistics.median(values) for tier, values in times.items()
        }
    out["base_ms"] = statistics.median(out["base"])
    return out


def _first_token_ms(bench: Bench, engine: Engine, name: str | None) -> float:
    bench.sync()
    began = time.perf_counter()
    ids = ask(bench, engine, [name], 4)
    step_until(engine, lambda deltas: any(d.token_ids for d in deltas))
    seconds = time.perf_counter() - began
    drain(engine, ids)
    return 1000 * seconds


def run_resident(bench: Bench) -> dict[str, Any]:
    """`--resident` r16 adapters on all linears in slots at once; a batch of distinct ones decodes.

    `--adapters` of them come through the store, from disk; the others are written from those, slot
    by slot, on the device: what they hold is repeated, the memory that they take is not.
    """
    o = bench.options
    adapters = bench.adapters(ALL_LINEAR, 16, min(o.adapters, o.resident))
    slots = _slots_that_fit(bench, adapters[0].nbytes)
    engine, _ = bench.engine(slots=slots)
    form = engine._working
    assert isinstance(form, SlotGather)
    load(engine, adapters)
    before = _allocated(bench)
    names = [a.name for a in adapters]
    for at in range(0, len(names), o.batch):
        ask(bench, engine, names[at : at + o.batch], 1)
        step_until(engine, lambda _: not engine.has_work())
    held = [s for s in range(slots) if s not in set(form.slots.free())]
    began = time.perf_counter()
    with torch.inference_mode():  # as the engine's steps, whose tensors these are
        for n, slot in enumerate(form.slots.free()):
            form.slots.write(slot, form.slots.read(held[n % len(held)]))
    bench.sync()
    write_s = time.perf_counter() - began
    filled = slots - len(form.slots.free())
    rate = _rate(bench, engine, [names[i % len(names)] for i in range(o.batch)])
    return {
        "asked": o.resident,
        "resident": filled,
        "through_the_store": len(held),
        "adapter_bytes": adapters[0].nbytes,
        "slot_bytes": form.slots.allocated_bytes,
        "bytes_per_adapter_ratio": form.slots.allocated_bytes / (filled * adapters[0].nbytes),
        "device_bytes_added": None if before is None else (_allocated(bench) or 0) - before,
        "write_ms_per_adapter": 1000 * write_s / max(1, filled - len(held)),
        "lora_tokens_per_s": rate,
    }


def _slots_that_fit(bench: Bench, adapter_bytes: int) -> int:
    """`--resident`, or what the device has memory for beside the model and the work of a step."""
    asked: int = bench.options.resident
    if bench.device.type != "cuda":
        return asked
    free, _ = torch.cuda.mem_get_info(bench.device)
    weights = sum(p.nbytes for p in bench.skeleton().parameters())
    positions = bench.options.batch * (bench.options.prompt + bench.options.answer_room)
    spare: int = free - weights - positions * _kv_bytes_per_position(bench) - WORK_BYTES
    return max(int(bench.options.batch), min(asked, spare // adapter_bytes))


def _allocated(bench: Bench) -> int | None:
    return torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else None


# --- the run ---

RUNNERS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "kernels": run_kernels,
    "greedy": run_greedy,
    "decode": run_decode,
    "ttft": run_ttft,
    "resident": run_resident,
}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on, and how fast it copies."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    out: dict[str, Any] = {"versions": versions, "device": platform.processor() or "cpu"}
    size = 1 << 26
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        out |= {
            "device": torch.cuda.get_device_name(device),
            "free_bytes": free,
            "total_bytes": total,
        }
        size = min(1 << 32, free // 8)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return out | {"copy_gb_s": 2 * size / best / 1e9}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All sections that were asked for. What is done is on disk after each: a run that is killed
    leaves what it had."""
    device, began = torch.device(options.device), time.perf_counter()
    report: dict[str, Any] = {"options": vars(options) | {"out": str(options.out)}}
    report["machine"] = machine(device)
    report["sections"] = {}
    dtype = DTYPES[options.dtype]
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as folder:
        bench = Bench(options=options, folder=Path(folder), device=device, dtype=dtype)
        for name in options.sections:
            spent = time.perf_counter() - began
            if spent > options.budget_s:
                section: dict[str, Any] = {"ok": False, "error": f"skipped: {spent:.0f} s are over"}
            else:
                section = _guarded(bench, name)
            report["sections"][name] = section
            _write(options.out, report)
            if not section["ok"] and not device_works(device):
                report["sections"] |= go_on(options, name, began)
                _write(options.out, report)
                break
            bench.free()
    return report


def device_works(device: torch.device) -> bool:
    """A kernel that went wrong leaves the process's CUDA context unusable for good."""
    try:
        return float(torch.ones(1, device=device).add_(1)) == 2
    except RuntimeError:
        return False


def go_on(options: argparse.Namespace, after: str, began: float) -> dict[str, Any]:
    """The sections after `after`, in a process of their own and without Triton's kernels: they are
    the likeliest to have broken this one's context."""
    rest = options.sections[options.sections.index(after) + 1 :]
    left = options.budget_s - (time.perf_counter() - began)
    if not rest or left <= 0:
        return {}
    out = options.out / f"after-{after}"
    arguments = [f"--sections={','.join(rest)}", f"--out={out}", f"--budget-s={left:.0f}"]
    own = [*options.arguments, *arguments, "--kernels=torch"]
    command = [sys.executable, "-m", "workers.openlora.bench", *own]
    try:
        subprocess.run(command, timeout=left + GRACE_S, check=False, stdout=subprocess.DEVNULL)
        found = json.loads((out / "openlora_bench.json").read_text())["sections"]
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        return {name: {"ok": False, "error": f"the second process: {e}"} for name in rest}
    return {name: section | {"kernels_option": "torch"} for name, section in found.items()}


def _guarded(bench: Bench, name: str) -> dict[str, Any]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    began, bench.partial = time.perf_counter(), {}
    try:
        result = RUNNERS[name](bench)
        ok = {"ok": True} | result
    except Exception as e:  # the next section may work: a GPU's minutes are few
        traceback.print_exc()
        ok = {"ok": False, "error": f"{type(e).__name__}: {e}"} | bench.partial
    return ok | {"seconds": time.perf_counter() - began}


def _write(out: Path, report: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "openlora_bench.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "openlora_bench.md").write_text(markdown(report))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m workers.openlora.bench", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on cuda, fp32 on a CPU")
    p.add_argument("--shape", choices=list(SHAPES), help="default: 8b on cuda, tiny on a CPU")
    p.add_argument("--batch", type=int, default=64, help="rows that decode together")
    p.add_argument("--adapters", type=int, default=64, help="distinct adapters on disk")
    p.add_argument("--resident", type=int, default=1000, help="adapters in slots at once")
    p.add_argument("--steps", type=int, default=64, help="measured decode steps per repeat")
    p.add_argument("--warm-steps", type=int, default=16)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--eager", action="store_true", help="decode without recordings")
    p.add_argument("--kernels", choices=["torch"], help="keep Triton's out")
    p.add_argument("--prompt", type=int, default=128, help="prompt tokens of every request")
    p.add_argument("--budget-s", type=float, default=480, help="no section begins after this")
    p.add_argument("--out", type=Path, default=Path("openlora-bench"))
    p.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    options = p.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        p.error(f"{options.device}: torch sees no CUDA device here; --device cpu rehearses the run")
    try:
        torch.device(options.device)
    except RuntimeError:
        p.error(f"{options.device!r} is no device; try cuda, cuda:1 or cpu")
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    options.shape = options.shape or ("8b" if on_gpu else "tiny")
    options.sections = options.sections.split(",")
    if unknown := set(options.sections) - set(SECTIONS):
        p.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.answer_room = options.warm_steps + options.steps + 4
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every section did its work, 1 otherwise; the report is written either way."""
    options = parse(arguments)
    report = run(options)
    print(markdown(report))
    return 0 if all(s["ok"] for s in report["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
