"""Fuzz every parser for some time each, guided by coverage: `python -m tests.fuzz`.

    python -m tests.fuzz [--seconds 60] [--home DIR] [TARGET ...]

atheris (libFuzzer) runs one target per process, over a corpus that starts with the samples and is
kept under --home (.tributary/fuzz), so that the next run goes on where this one ended. Half of its
mutations are ours, which know the formats. Where atheris is not installed, our mutations alone run,
and that is said. An input that raises anything but the designed errors, takes longer than
SLOW_S or more than MEMORY_MB, ends the run with status 1 and lies under --home/found: put it into
tests/fuzz/found/<target>/, and it is tried for ever.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from tests.fuzz.mutate import MAX_BYTES, mutated

ROOT = Path(__file__).parents[2]
SECONDS = 60
SLOW_S = 10
MEMORY_MB = 2_048
START_S = 60
"""Importing and instrumenting, and the corpus read once, before the clock starts."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for each target")
    parser.add_argument("--home", type=Path, default=ROOT / ".tributary" / "fuzz")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.worker:
        return work(asked.targets[0], asked.seconds, asked.home)
    from tests.fuzz.targets import TARGETS

    unknown = set(asked.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    guided = importlib.util.find_spec("atheris") is not None
    how = "atheris, guided by coverage" if guided else "no atheris here: our mutations alone"
    names = asked.targets or list(TARGETS)
    print(f"{len(names)} parsers, {asked.seconds} s each, {how}", flush=True)
    broken = [name for name in names if not survives(name, asked.seconds, asked.home)]
    print(f"broken: {', '.join(broken)}" if broken else "none was broken", flush=True)
    return int(bool(broken))


def survives(name: str, seconds: int, home: Path) -> bool:
    command = [sys.executable, "-m", "tests.fuzz", "--worker", name]
    command += ["--seconds", str(seconds), "--home", str(home)]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + START_S + SLOW_S
        )
        status, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, said = 1, f"did not end in time: {error}"
    took = time.monotonic() - started
    counts = [line for line in said.splitlines() if "number_of_executed_units" in line]
    runs = counts[0].split()[-1] if counts else "?"
    print(
        f"{name:>20} {'ok' if status == 0 else 'BROKEN':>8} {runs:>12} runs {took:6.0f} s",
        flush=True,
    )
    if status:
        print("\n".join(said.splitlines()[-60:]), flush=True)
    return status == 0


def work(name: str, seconds: int, home: Path) -> int:
    """One target in this process. atheris ends it itself, with a status of its own."""
    corpus, found = home / "corpus" / name, home / "found" / name
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("atheris") is None:
        return mutate_alone(name, seconds, found)
    import atheris

    with atheris.instrument_imports(include=["ledger"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    for seed in [*target.seeds(), *target.found()]:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

    def once(data: bytes) -> None:
        target.run(data)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(data, Random(seed))[:max_size]

    options = {
        "max_total_time": seconds, "max_len": MAX_BYTES, "timeout": SLOW_S,
        "rss_limit_mb": MEMORY_MB, "print_final_stats": 1, "artifact_prefix": f"{found}{os.sep}",
    }  # fmt: skip
    arguments = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], once, custom_mutator=change)
    atheris.Fuzz()
    return 0


def mutate_alone(name: str, seconds: int, found: Path) -> int:
    from tests.fuzz.targets import TARGETS

    target, rng, runs = TARGETS[name], Random(os.urandom(8)), 0
    seeds = [*target.seeds(), *target.found()]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        data = mutated(rng.choice(seeds), rng)
        started = time.process_time()
        try:
            target.run(data)
            slow = time.process_time() - started > SLOW_S
        except BaseException:
            _keep(data, found)
            raise
        if slow:
            _keep(data, found)
            print(f"an input of {len(data)} bytes took over {SLOW_S} s")
            return 1
        runs += 1
    print(f"stat::number_of_executed_units: {runs}")
    return 0


def _keep(data: bytes, found: Path) -> None:
    (found / f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
