"""Every benchmark beside its peer, one after the other: `make bench`.

    python -m tests.bench [NAME ...]

Each one is a program of its own (`python -m tests.bench.bench_<name>`), bounded in time, and prints
its table. This runner keeps what they print, with the machine and the commit, in
docs/benchmarks.json and docs/BENCHMARKS.md. Numbers of one run on a shared machine are noisy; the
ratios beside a peer are what they are for.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900

BENCHMARKS: dict[str, tuple[str, list[str]]] = {
    "store": ("Durable appends beside the stock `eventsourcing` recorder", ["5"]),
    "append": ("Signed appends over HTTP, the whole path, beside the stock recorder", []),
    "growth": ("What an append costs from 10^4 to 10^6 entries", []),
    "log": ("The log: tree, cold proofs, files, offline verification", []),
    "audit": ("The full audit, with and without signatures, beside pymerkle's rebuild", []),
    "projections": ("The projector: 500 events a transaction beside one at a time", ["5000"]),
    "openlora": (
        "OpenLoRA beside peft's mixed batch and plain `generate`",
        ["--quick", "--plot", "docs/images/openlora-throughput.png"],
    ),
    "serving": (
        "Serving through HTTP beside the engine alone: 64 clients, a crowd, a kill",
        ["--report", "docs/LOADTEST.md", "--shot", "docs/images/serving.png"],
    ),
    "attribution": ("What an attribution index costs, and an answer", []),
    "attribution_audit": ("Audits: what another machine does to sketches, and what they cost", []),
    "evidence": ("Verbatim spans, and gates against junk and copies, on real rows", []),
    "attacks": ("What attackers earn: copies, ten names, junk, on real rows", []),
    "fidelity": (
        "Attribution beside kronfluence, DataInf, spans and BM25, by retrained models",
        ["--jobs", "2"],
    ),
}
LONGER_S = {"fidelity": 5_400, "attacks": 3_600, "serving": 1_800}
"""Bounds of those that take longer. Those that retrain: half an hour on two free cores (attacks:
ten minutes), and more on a busy machine."""


def main(names: list[str]) -> int:
    unknown = set(names) - BENCHMARKS.keys()
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
        return 2
    path = ROOT / "docs" / "benchmarks.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    failed = False
    for name in names or BENCHMARKS:
        result = run(name)
        failed |= result["exit_code"] != 0
        results = json.loads(path.read_text()) if path.exists() else {}  # another may have ended
        results[name] = result
        path.write_text(json.dumps(results, indent=2) + "\n")
    (ROOT / "docs" / "BENCHMARKS.md").write_text(page(results))
    return int(failed)


def run(name: str) -> dict[str, Any]:
    title, arguments = BENCHMARKS[name]
    command = ["python", "-m", f"tests.bench.bench_{name}", *arguments]
    print(f"== {title}: {' '.join(command)}", flush=True)
    load, started = os.getloadavg()[0], time.monotonic()
    done = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGER_S.get(name, TIMEOUT_S),
    )
    print(done.stdout + (done.stderr if done.returncode else ""), flush=True)
    return {
        "title": title,
        "command": " ".join(command),
        "machine": machine(),
        "load_before": round(load, 1),
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "seconds": round(time.monotonic() - started, 1),
        "exit_code": done.returncode,
        "output": done.stdout.splitlines(),
    }


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, no GPU used"


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "not a checkout"


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench` (`python -m tests.bench`); the same as data: "
        "[benchmarks.json](benchmarks.json).",
        "One run on a small machine that other programs share: read the ratios, not the rates.",
    ]
    for result in results.values():
        lines += [
            "",
            f"## {result['title']}",
            "",
            f"`{result['command']}` took {result['seconds']} s on {result['machine']}, load "
            f"{result['load_before']} before it, commit {result['commit']}, {result['at']}.",
            "",
            "```",
            *_without_json(result["output"]),
            "```",
        ]
    return "\n".join(lines) + "\n"


def _without_json(lines: list[str]) -> list[str]:
    """The tables alone: what a program printed as an object stands in benchmarks.json."""
    kept, inside = [], False
    for line in lines:
        inside = inside or line == "{"
        if not inside:
            kept.append(line)
        inside = inside and line != "}"
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
