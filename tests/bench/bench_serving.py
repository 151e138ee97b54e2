"""Serving through HTTP beside the engine alone: a real ledger service under load.

    python -m tests.bench.bench_serving [--quick] [--report FILE] [--base reference|bundled|both]

`tributary up` (PostgreSQL, chain, Ray, the API, the OpenLoRA actor) on a fresh home, with 64
published adapters and consumers who prepaid on chain; 64 clients stream answers over HTTP from a
process of their own. Beside it the same engine alone, in its own process, with the same adapters,
batch, threads and prompts; the two take turns on the same machine and the ratio of neighbours
counts. Then 1,000 requests at once, and kill -9 of the engine's process in the middle of it. After
each, the ledger is downloaded and held against what the clients heard.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from ledger.config import load_settings
from tests.bench import serving_report
from tests.bench.serving_audit import audit
from tests.bench.serving_world import World, erase, make_world, reference_base
from tests.browser.chromium import chromium
from tests.browser.small_png import small_png
from tests.pg import temporary_home
from tests.service_world import Up, free_port
from workers import base_model

CLIENTS = 64
ADAPTERS = 64
CONSUMERS = 16
THREADS = 1
"""Of the engine, here and in the service: its default."""
WARM_S = 6.0
MAX_TOKENS = 128
QUEUED = 1_000
QUEUED_TOKENS = 16
KILL_AFTER_S = 8.0
PICTURE_AFTER_S = 20.0
WIDTH, HEIGHT = 1_240, 900
READY_S = 180.0
PROMPT = "Client {client} asks for the {question}th time: which datanet paid whom, and why?"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    load_s: float = 60.0
    alone_s: float = 20.0
    rounds: int = 2
    kill_s: float = 40.0


QUICK = Sizes(load_s=20.0, alone_s=8.0, rounds=1, kill_s=25.0)


class Alone:
    """The process of `serving_alone`."""

    def __init__(self, world: World, folder: Path) -> None:
        plan = {
            "base": str(world.base), "threads": THREADS, "clients": CLIENTS, "warm_s": WARM_S,
            "max_tokens": MAX_TOKENS, "prompt": PROMPT,
            "adapters": [[str(saved.path), saved.sha256] for _, saved in world.adapters],
        }  # fmt: skip
        path = folder / "alone.json"
        path.write_text(json.dumps(plan))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.serving_alone", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def work(self, seconds: float) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._line())
        say(f"engine alone: {found['tokens'] / found['wall_s']:.0f} tokens/s")
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the engine's own process ended"
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass(kw_only=True)
class Trial:
    """One service under test, and all that its clients heard."""

    world: World
    up: Up
    heard: list[dict[str, Any]] = field(default_factory=list)

    def load(
        self,
        seconds: float,
        *,
        clients: int = CLIENTS,
        max_tokens: int = MAX_TOKENS,
        during: Callable[[], None] = lambda: None,
        **plan: Any,
    ) -> dict[str, Any]:
        """Clients in a process of their own; what they heard, with the CPU seconds of each part."""
        models, consumers = self.world.models, self.world.consumers
        jobs = [
            {"model": models[n % len(models)], "token": consumers[n % len(consumers)].token}
            for n in range(clients)
        ]
        given = {
            "host": "127.0.0.1", "port": self.up.port, "seconds": seconds, "prompt": PROMPT,
            "max_tokens": max_tokens, "jobs": jobs, **plan,
        }  # fmt: skip
        before = cpu_seconds(self.up)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.serving_load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(given).encode())
        process.stdin.close()
        process.stdin = None
        during()
        try:
            raw, _ = process.communicate(timeout=seconds + 400)
        finally:
            process.kill()
        found: dict[str, Any] = json.loads(raw)
        after = cpu_seconds(self.up)
        found["cpu"] = {part: after[part] - before[part] for part in after}
        found["cpu"]["clients"] = found["cpu_s"]
        self.heard += found["answers"]
        return found

    def audit(self) -> dict[str, int]:
        return audit(self.up.url, self.heard, self.world.consumers)


# --- the parts of the test ---------------------------------------------------------------------


def measure(trial: Trial, alone: Alone, sizes: Sizes) -> dict[str, Any]:
    """Turns of the engine alone and of the service; the ratio of a turn to its two neighbours."""
    own, loads = [alone.work(sizes.alone_s)], []
    for _ in range(sizes.rounds):
        loads.append(trial.load(sizes.load_s, retry=True))
        say(f"through HTTP: {rate_of(loads[-1], sizes.load_s):.0f} tokens/s")
        own.append(alone.work(sizes.alone_s))
    rates = [rate_of(load, sizes.load_s) for load in loads]
    own_rates = [turn["tokens"] / turn["wall_s"] for turn in own]
    ratios = [rate / statistics.mean(own_rates[turn : turn + 2]) for turn, rate in enumerate(rates)]
    answers = [answer for load in loads for answer in load["answers"]]
    gaps = [gap for load in loads for gap in load["gaps_s"]]
    return {
        "alone_tokens_per_s": [round(rate, 1) for rate in own_rates],
        "tokens_per_s": [round(rate, 1) for rate in rates],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "answers": len(answers),
        "errors": dict(Counter(a["error"] for a in answers if a["error"])),
        "unfinished": sum(not answer["done"] for answer in answers),
        "refused": sum(load["refused"] for load in loads),
        "tokens": sum(answer["tokens"] for answer in answers),
        "tokens_per_piece": round(tokens_per_piece(answers), 3),
        "ttft_s": percentiles([a["ttft_s"] for a in answers if a["ttft_s"] is not None]),
        "gap_s": percentiles(gaps),
        "total_s": percentiles([a["total_s"] for a in answers if a["done"]]),
        "cores": cores(loads),
    }


def crowd(trial: Trial) -> dict[str, Any]:
    """A thousand requests at one moment, each once."""
    found = trial.load(1.0, clients=QUEUED, max_tokens=QUEUED_TOKENS, requests=1)
    answers = found["answers"]
    refused = [answer for answer in answers if answer["status"] == 429]
    accepted = [answer for answer in answers if answer["status"] == 200]
    return {
        "statuses": dict(Counter(str(answer["status"]) for answer in answers)),
        "retry_after_s": dict(Counter(str(answer["retry_after_s"]) for answer in refused)),
        "accepted": len(accepted),
        "answered": sum(answer["done"] for answer in accepted),
        "wall_s": round(found["wall_s"], 1),
        "ttft_s": percentiles([a["ttft_s"] for a in accepted if a["ttft_s"] is not None]),
        "refused_after_s": percentiles([answer["total_s"] for answer in refused]),
        "errors": dict(
            Counter(a["error"][:80] for a in answers if a["error"] and a not in refused)
        ),
    }


def killed(trial: Trial, sizes: Sizes) -> dict[str, Any]:
    """The engine's process dies in the middle of the load."""
    pid = 0

    def kill() -> None:
        nonlocal pid
        time.sleep(KILL_AFTER_S)
        pid = engine_pid(trial.up)
        os.kill(pid, signal.SIGKILL)
        say("killed the engine's process")

    found = trial.load(sizes.kill_s, retry=True, during=kill)
    answers = found["answers"]
    hit = [answer for answer in answers if answer["longest_gap_s"] > 1.0]
    return {
        "answers": len(answers),
        "whole": sum(answer["done"] for answer in answers),
        "resumed": sum(answer["done"] for answer in hit),
        "pause_s": percentiles([answer["longest_gap_s"] for answer in hit]),
        "silently_cut": sum(
            answer["status"] == 200 and not answer["done"] and not answer["error"]
            for answer in answers
        ),
        "errors": dict(Counter(a["error"][:100] for a in answers if a["error"])),
        "back_after_s": round(outage_s(found["pieces_at"]), 1),
    }


def picture(trial: Trial, path: Path) -> None:
    """The live page while the clients ask."""

    def take() -> None:
        time.sleep(PICTURE_AFTER_S)
        with suppress(pytest.skip.Exception), chromium() as browser:  # no browser, no picture
            page = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}).new_page()
            page.goto(f"{trial.up.url}/serving")
            expect(page.locator("#status")).to_have_text("Live")
            path.write_bytes(small_png(browser, page.screenshot(full_page=True)))
        say(f"wrote {path}")

    trial.load(2 * PICTURE_AFTER_S, retry=True, during=take)


def outage_s(pieces_at: Sequence[int]) -> float:
    """The longest run of seconds in which no client got a piece, after the kill."""
    longest = run = 0
    for pieces in pieces_at[int(KILL_AFTER_S) :]:
        run = 0 if pieces else run + 1
        longest = max(longest, run)
    return float(longest)


# --- measuring ---------------------------------------------------------------------------------


def rate_of(load: Mapping[str, Any], seconds: float) -> float:
    """Tokens per second that clients received, after the warm-up and while all of them asked."""
    window = load["pieces_at"][int(WARM_S) : int(seconds)]
    return float(sum(window)) / len(window) * tokens_per_piece(load["answers"])


def tokens_per_piece(answers: Sequence[Mapping[str, Any]]) -> float:
    """Above 1 where tokens travelled together, or showed no text."""
    whole = [answer for answer in answers if answer["done"]]
    pieces = sum(int(a["pieces"]) for a in whole)
    return sum(int(a["tokens"]) for a in whole) / max(1, pieces)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        f"p{percent}": round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 4)
        for percent in (50, 95, 99)
    }


def cores(loads: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CPU seconds a second, by part of the service."""
    wall = sum(load["wall_s"] for load in loads)
    parts = {part for load in loads for part in load["cpu"]}
    used = {part: sum(load["cpu"].get(part, 0.0) for load in loads) / wall for part in parts}
    return {part: round(cores, 2) for part, cores in sorted(used.items(), key=lambda p: -p[1])}


PARTS = (
    ("engine", "ray::OpenLoRA"),
    ("attribution", "ray::Attribution"),
    ("api", "ledger.processes api"),
    ("projector", "ledger.processes projector"),
    ("chain", "ledger.processes chain"),
    ("workers", "ledger.processes workers"),
    ("anvil", "anvil"),
    ("postgres", "postgres"),
)


def cpu_seconds(up: Up) -> dict[str, float]:
    """So far, by part; what is none of PARTS is Ray's."""
    found = {part: 0.0 for part, _ in PARTS} | {"ray": 0.0}
    tick = os.sysconf("SC_CLK_TCK")
    for pid, line in up.processes().items():
        part = next((name for name, mark in PARTS if mark in line), "ray")
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[part] += (int(stat[11]) + int(stat[12])) / tick
    return found


def engine_pid(up: Up) -> int:
    mark = dict(PARTS)["engine"]
    return next(pid for pid, line in up.processes().items() if mark in line)


# --- the whole ---------------------------------------------------------------------------------


@contextmanager
def serving(home: Path, base: Path) -> Iterator[tuple[World, Callable[[], Up]]]:
    """A world on a fresh home, and what starts its service."""
    settings = load_settings(home=home, port=free_port(), base_model=str(base))
    say("making the world: adapters, runs, consumers")
    world = make_world(settings, base, adapters=ADAPTERS, consumers=CONSUMERS)
    up = Up(home, TRIBUTARY_BASE_MODEL=str(base))

    def start() -> Up:
        say("starting the service")
        up.start()
        return up

    try:
        yield world, start
    finally:
        up.destroy()
        erase(home, [])


def ready(trial: Trial) -> None:
    """Every client had an answer: all adapters are loaded."""
    deadline = time.monotonic() + READY_S
    while True:
        with suppress(httpx.HTTPError, KeyError):
            found = httpx.get(f"{trial.up.url}/v1/serving", timeout=10).json()
            if any(replica["state"] == "ready" for replica in found["replicas"]):
                break
        assert time.monotonic() < deadline, f"serving does not start: {trial.up.said()}"
        time.sleep(0.5)
    say("serving; first answers")
    first = trial.load(1.0, requests=1, retry=True)
    assert all(answer["done"] for answer in first["answers"]), first["answers"]


def scenario(base: Path, sizes: Sizes, *, faults: bool, shot: Path | None = None) -> dict[str, Any]:
    with temporary_home() as folder:
        home = folder / "home"
        home.mkdir(mode=0o755)
        with serving(home, base) as (world, start):
            alone = Alone(world, folder)
            try:
                trial = Trial(world=world, up=start())
                ready(trial)
                found: dict[str, Any] = {"load": measure(trial, alone, sizes)}
            finally:
                alone.close()
            found["load"]["audit"] = said("audit", trial.audit())
            if shot is not None:
                picture(trial, shot)
            if faults:
                found["crowd"] = said("a thousand at once", crowd(trial))
                found["killed"] = said("killed", killed(trial, sizes))
                found["faults_audit"] = said("audit", trial.audit())
            return found


def said(what: str, found: dict[str, Any]) -> dict[str, Any]:
    say(f"{what}: {json.dumps(found)}")
    return found


def say(text: str) -> None:
    print(f"... {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one short turn of each")
    parser.add_argument("--report", type=Path, help="write the report there too")
    parser.add_argument("--shot", type=Path, help="write a picture of the live page there too")
    parser.add_argument("--base", choices=("reference", "bundled", "both"), default="both")
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    result: dict[str, Any] = {
        "clients": CLIENTS, "adapters": ADAPTERS, "consumers": CONSUMERS, "threads": THREADS,
        "max_tokens": MAX_TOKENS, "load_average_before": os.getloadavg()[0], "sizes": vars(sizes),
        "bases": {},
    }  # fmt: skip
    if args.base != "bundled":
        with temporary_home() as folder:
            base = reference_base(folder / "random-llama-31m")
            result["bases"]["reference"] = scenario(base, sizes, faults=True, shot=args.shot)
    if args.base != "reference":
        result["bases"]["bundled"] = scenario(base_model.BUNDLED, sizes, faults=False)
    result["load_average_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=2))
    print(serving_report.table(result))
    if args.report:
        args.report.write_text(serving_report.page(result))
    return serving_report.verdict(result)


if __name__ == "__main__":
    sys.exit(main())
