"""Every public vector file is read by some test of this folder: the other tests run once more in a
process that writes down which files they open. A vector that arrives and that no test reads fails
here. (What a test then asserts of it stands beside the test.)"""

import os
import subprocess
import sys
from pathlib import Path

from tests.vectors.shared import VECTORS, needs_vectors

pytestmark = needs_vectors

HERE = Path(__file__)
ROOT = HERE.parents[2]
NOT_A_VECTOR = {"README.md"}
# An audit hook sees every open of this process, whoever asks for it.
WATCHED = """
import os, sys
folder, log = os.path.realpath(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(folder + os.sep):
            os.write(log, (os.path.relpath(path, folder) + "\\n").encode())
sys.addaudithook(watch)
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""


def test_every_vector_file_is_read(tmp_path: Path) -> None:
    log = tmp_path / "opened"
    tests = [
        str(path)
        for path in HERE.parent.glob("test_*.py")
        if path != HERE and "shared import" in path.read_text()
    ]
    assert len(tests) >= 3
    command = [sys.executable, "-c", WATCHED, str(VECTORS), str(log)]
    options = ["-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    opened = set(log.read_text().splitlines())
    there = {str(p.relative_to(VECTORS)) for p in VECTORS.rglob("*") if p.is_file()}
    assert len(there) > 120
    assert there - opened - NOT_A_VECTOR == set()
