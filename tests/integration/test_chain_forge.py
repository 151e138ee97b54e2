"""The contracts' own tests, run by forge."""

import subprocess
import sys
from pathlib import Path

import pytest

CONTRACTS_DIR = Path(__file__).parents[2] / "contracts"


def test_forge_tests_pass() -> None:
    if not (CONTRACTS_DIR / "node_modules" / "solc").is_dir():
        pytest.skip("contracts/node_modules is missing: python contracts/build.py install")
    done = subprocess.run(
        [sys.executable, str(CONTRACTS_DIR / "build.py"), "forge", "test"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    if "forge is neither on PATH" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 failed" in done.stdout
