"""The slow suites, one after the other: `make soak`.

    python -m tests.soak [--fuzz-seconds 60] [PART ...]

    fuzz     every parser under atheris, --fuzz-seconds each (tests/fuzz)
    growth   the cost of an append from 10^4 to 10^7 leaves (tests/soak/growth.py)

Each part is a program of its own and is bounded in time; the first that fails does not stop the
others. Status 1 if one did.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FUZZ_SECONDS = 60
PART_TIMEOUT_S = 4 * 3_600

PARTS: dict[str, list[str]] = {
    "fuzz": ["tests.fuzz", "--seconds", "{fuzz_seconds}"],
    "growth": ["tests.soak.growth"],
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--fuzz-seconds", type=int, default=FUZZ_SECONDS, help="for each parser")
    asked = parser.parse_args(argv)
    unknown = set(asked.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    failed = [name for name in asked.parts or PARTS if not passes(name, asked.fuzz_seconds)]
    print(f"failed: {', '.join(failed)}" if failed else "all parts passed", flush=True)
    return int(bool(failed))


def passes(name: str, fuzz_seconds: int) -> bool:
    module, *arguments = (word.format(fuzz_seconds=fuzz_seconds) for word in PARTS[name])
    if importlib.util.find_spec(module) is None:
        print(f"== {name}: there is no {module}", flush=True)
        return False
    print(f"== {name}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, timeout=PART_TIMEOUT_S
        )
        status = f"status {done.returncode}"
    except subprocess.TimeoutExpired:
        status = f"did not end within {PART_TIMEOUT_S} s"
    print(f"== {name}: {status} after {time.monotonic() - started:.0f} s", flush=True)
    return status == "status 0"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
