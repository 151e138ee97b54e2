"""`python -m ledger.verify` in a container that holds Python and pynacl and nothing else."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import container_world as world

BUNDLES = Path(__file__).parents[1] / "vectors" / "bundles"
V1 = BUNDLES / "v1"
PAGE = Path(__file__).parents[2] / "docs" / "VERIFYING.md"


@pytest.fixture(scope="module")
def box() -> Iterator[world.Container]:
    why = world.missing()
    if why:
        pytest.skip(why)
    with world.container() as made:
        yield made


def put(box: world.Container, path: Path) -> str:
    (box.files / path.name).write_bytes(path.read_bytes())
    return f"/files/{path.name}"


def test_it_holds_python_and_pynacl_and_no_network(box: world.Container) -> None:
    found = {line.split()[0] for line in box.run("-c", world.WHAT_IS_HERE).stdout.splitlines()}
    assert {name.lower() for name in found} == {"pynacl", "cffi", "pycparser"}
    assert "unreachable" in box.run("-c", world.NO_NETWORK).stdout


def test_a_good_bundle_verifies(box: world.Container) -> None:
    done = box.run("-m", "ledger.verify", "--json", put(box, V1 / "answer.lineage.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True


def test_a_tampered_bundle_does_not(box: world.Container) -> None:
    done = box.run("-m", "ledger.verify", put(box, V1 / "bad-entry-altered.lineage.json"))
    assert done.returncode == 1
    assert "NOT VERIFIED" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_needs_a_library_is_skipped_and_said(box: world.Container) -> None:
    done = box.run("-m", "ledger.verify", "--json", put(box, V1 / "anchored-earlier.lineage.json"))
    assert done.returncode == 0
    steps = {step["name"]: step["status"] for step in json.loads(done.stdout)["steps"]}
    assert steps["L1 anchor"] == "skipped"


def test_the_transcript_in_the_docs_is_what_happens(box: world.Container) -> None:
    page = PAGE.read_text("utf-8")
    commands = re.findall(r"^\$ python3 (-m ledger\.verify .*)$", page, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        arguments = shlex.split(command)
        put(box, next(BUNDLES.rglob(Path(arguments[-1]).name)))
        assert world.shown(arguments, box.run(*arguments)) in page
