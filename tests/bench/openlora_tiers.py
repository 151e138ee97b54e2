"""`bench_openlora` on tiers: many registered, more than the slots, cold starts, memory."""

import ctypes
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench import openlora_ways as ways
from tests.bench.openlora_ways import ROWS, digest, engine_of, engine_way, prompts_of, submit
from workers.openlora.engine import Engine

REGISTERED = (1, 1_000, 10_000)
PAGE = os.sysconf("SC_PAGE_SIZE")


def published(engine: Engine, paths: list[Path], count: int, folder: Path) -> float:
    """Register `count` adapters: as many folders, whose files are hard links to the few in
    `paths`. Returns the seconds that registering took, with the files there."""
    hashes = [digest(path) for path in paths]
    folder.mkdir()
    for i in range(count):
        (folder / f"m{i}").mkdir()
        for file in paths[i % len(paths)].iterdir():
            if file.suffix in (".json", ".safetensors"):
                os.link(file, folder / f"m{i}" / file.name)
    start = time.process_time()
    for i in range(count):
        engine.load_adapter(f"m{i}", folder / f"m{i}", hashes[i % len(paths)], check=False)
    return time.process_time() - start


def registered(base: Any, paths: list[Path], folder: Path, *, tokens: int, rounds: int) -> Any:
    """Tokens a second beside how many adapters are registered: with one in use, with 32."""
    prompts, chosen = prompts_of(base), random.Random(0)
    runs: dict[str, tuple[ways.Way, int]] = {}
    seconds = {}
    for count in REGISTERED:
        engine = engine_of(base, [])
        seconds[count] = published(engine, paths, count, folder / f"of{count}")
        runs[f"one/{count}"] = (engine_way(engine, ["m0"] * ROWS, prompts), tokens)
        if count >= ROWS:
            names = [f"m{i}" for i in chosen.sample(range(count), ROWS)]
            runs[f"32/{count}"] = (engine_way(engine, names, prompts), tokens)
    rates = ways.medians(runs, rounds=rounds)
    return {
        "one in use": {n: rates[f"one/{n}"] for n in REGISTERED},
        "32 in use": {n: rates[f"32/{n}"] for n in REGISTERED if n >= ROWS},
        "us_to_register_each": 1e6 * seconds[REGISTERED[-1]] / REGISTERED[-1],
    }


def beyond_the_slots(base: Any, paths: list[Path], *, tokens: int, rounds: int) -> Any:
    """64 adapters take turns in 32 slots, 32 at a time, so that each request finds its adapter
    gone; beside the same requests with 64 slots. Answers of `tokens`, all costs counted."""
    assert len(paths) == 2 * ROWS
    prompts = prompts_of(base)
    turn = [[f"a{i + half * ROWS}" for i in range(ROWS)] for half in (0, 1)]

    def way(engine: Engine) -> Callable[[int], float]:
        halves = itertools.cycle(turn)

        def run(count: int) -> float:
            start = ways.CLOCK()
            for _ in turn:
                submit(engine, next(halves), prompts, count)
                while engine.has_work():
                    engine.step()
            return (ways.CLOCK() - start) / len(turn)

        return run

    rates = ways.medians(
        {
            "all in slots": (way(engine_of(base, paths, slots=2 * ROWS)), tokens),
            "twice the slots, from host memory": (way(engine_of(base, paths, slots=ROWS)), tokens),
            "twice the slots, from disk": (
                way(engine_of(base, paths, slots=ROWS, host_bytes=1)),
                tokens,
            ),
        },
        rounds=rounds,
    )
    warm = rates["all in slots"]
    return {"tokens_per_s": rates, "of_warm": {name: rate / warm for name, rate in rates.items()}}


def cold_start(base: Any, paths: list[Path]) -> Any:
    """Milliseconds to the first token: an adapter never read, and the same one again. Another
    prompt each time. File pages are in the kernel's cache; the hash is checked."""
    engine = engine_of(base, paths, check=False, max_rows=1)
    cpu: dict[str, list[float]] = {"cold": [], "warm": []}
    wall: dict[str, list[float]] = {"cold": [], "warm": []}
    for i in range(-2, len(paths)):
        for kind in ("cold", "warm"):
            prompts = prompts_of(base, seed=1000 + 2 * i + (kind == "warm"))
            start, began = time.process_time(), time.perf_counter()
            submit(engine, [None if i < 0 else f"a{i}"], prompts, 1)
            while engine.has_work():
                engine.step()
            if i >= 0:
                cpu[kind].append(1e3 * (time.process_time() - start))
                wall[kind].append(1e3 * (time.perf_counter() - began))
    mid = {f"{kind}_cpu_ms": statistics.median(cpu[kind]) for kind in cpu}
    mid |= {f"{kind}_wall_ms": statistics.median(wall[kind]) for kind in wall}
    for clock in ("cpu", "wall"):
        mid[f"cold_minus_warm_{clock}_ms"] = mid[f"cold_{clock}_ms"] - mid[f"warm_{clock}_ms"]
    return mid


def resident(paths: list[Path], folder: Path, count: int) -> Any:
    """Resident memory for each adapter in a slot, over its bytes: in a process of its own, whose
    memory nobody used before."""
    folder.mkdir()
    listing = folder / "paths.json"
    listing.write_text(json.dumps([[str(p) for p in paths], str(folder / "of"), count]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.openlora_tiers", str(listing)],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    return json.loads(done.stdout)


def _resident(listing: Path) -> Any:
    sources, folder, count = json.loads(listing.read_text())
    torch.set_num_threads(1)
    paths = [Path(p) for p in sources]
    engine = engine_of(ways.reference_llama(), [], slots=count + 1, max_rank=64, host_bytes=1 << 30)
    published(engine, paths, count + 1, Path(folder))
    store = engine.store

    def place(name: str) -> None:
        entry = store.acquire(name)
        assert store.place(entry) is not None
        store.unpin(entry)
        store.release(entry)

    place(f"m{count}")  # what the first one brings along is not the others'
    before, bytes_before = _rss(), store.snapshot()["resident_bytes"]
    for i in range(count):
        place(f"m{i}")
    now = store.snapshot()
    assert now["in_slots"] == count + 1
    held = now["resident_bytes"] - bytes_before
    grown = _rss() - before
    return {
        "adapters": count,
        "bytes_each": held // count,
        "resident_each": grown // count,
        "ratio": grown / held,
    }


def _rss() -> int:
    """Bytes, after what was freed has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


if __name__ == "__main__":
    print(json.dumps(_resident(Path(sys.argv[1]))))
