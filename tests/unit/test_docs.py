"""The pages of docs and the README are tested, so that they stay true (datasette's way): what the
program has and the pages lack fails here, and so does what the pages name and the program lacks.

Examples: each `python` and `bash` block of the README is run, in order, in one folder, against a
service of ours: the API with its sequencer, and the projector, on a real PostgreSQL. A block that
needs what a test cannot have (the set-up, a chain, Ray) is written as `console`.
FORMATS.md is held against the verifier in test_verify_formats.py.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from ledger import errors
from ledger.api.routes import (
    attribution,
    blobs,
    catalogue,
    consent,
    events,
    health,
    lineage,
    log,
    money,
    openai,
    serving,
    verifier,
)
from ledger.cli.app import app
from ledger.config import Settings, load_settings
from ledger.domain.events import CATALOGUE
from ledger.processes.roles import run_api, run_projector
from ledger.processes.supervisor import open_ledger

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md")))
README, ARCHITECTURE, DECISIONS, FORMATS, OPERATIONS = (
    path.read_text("utf-8")
    for path in (
        ROOT / "README.md",
        *(DOCS / f"{name}.md" for name in ("ARCHITECTURE", "DECISIONS", "FORMATS", "OPERATIONS")),
    )
)
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
READY_TIMEOUT_S = 30.0
ROUTES = (
    health, events, blobs, catalogue, consent, attribution, money, lineage, openai, log, verifier,
    serving,
)  # fmt: skip
BLOCK_TIMEOUT_S = 60.0


def section(page: str, title: str) -> str:
    found = re.search(rf"^##? {re.escape(title)}\n(.*?)(?=^##? |\Z)", page, re.M | re.S)
    assert found, f"no section {title}"
    return found[1]


def table(text: str) -> list[list[str]]:
    """Cells of every table row but heads and rules, backticks left in."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        is_rule = re.fullmatch(r"[|\- ]+", line)
        is_head = number + 1 < len(lines) and re.fullmatch(r"\|[|\- ]+\|", lines[number + 1])
        if line.startswith("|") and not is_rule and not is_head:
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def code(cell: str) -> str:
    return cell.strip("`")


# --- what there is ----------------------------------------------------------------------------


def test_every_event_says_who_signs_it_and_whose_stream_it_is() -> None:
    for name, kind in CATALOGUE.items():
        text = FORMATS.split(f"### `{name}`\n")[1].split("\n\n")[0].replace("\n", " ")
        key = {"": "one per ledger", "actor": "by signer"}.get(kind.key, f"by `{kind.key}`")
        assert re.fullmatch(
            rf"Signed by: .+\. Aggregate `{kind.aggregate}`, {re.escape(key)}\.", text
        ), (name, text)


def test_every_setting_and_no_other() -> None:
    documented = {code(row[0]): row[1] for row in table(section(OPERATIONS, "Settings"))}
    expected = {}
    for name, spec in Settings.model_fields.items():
        default = "max(2, cores)" if name == "ray_cpus" else spec.default
        shown = "none" if default is None else f"`{default}`"
        expected[str(spec.validation_alias or f"TRIBUTARY_{name.upper()}")] = shown
    assert documented == expected


def test_every_command_and_no_other() -> None:
    there = set(_commands(typer.main.get_command(app)))
    text = OPERATIONS + README
    assert [
        c for c in there if f"`tributary {c}`" not in text and f"`tributary {c} " not in text
    ] == []
    for page in PAGES:
        for words in re.findall(r"`tributary\s([^`]+)`", page.read_text("utf-8")):
            noun, *rest = words.split()
            command = noun if noun in there else f"{noun} {rest[0] if rest else ''}"
            assert command in there, f"{page.name}: tributary {words}"


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, found in getattr(command, "commands", {}).items():
        yield from _commands(found, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path)


def test_every_route_and_no_other() -> None:
    documented = [code(row[0]) for row in table(section(FORMATS, "HTTP API"))]
    there = [
        f"{method} {route.path.replace(':path', '')}"  # type: ignore[attr-defined]
        for module in ROUTES
        for route in module.router.routes
        for method in route.methods  # type: ignore[attr-defined]
    ]
    assert sorted(documented) == sorted(there)


def test_every_error_with_its_status_and_exit_code() -> None:
    documented = {code(r[0]): (int(r[1]), int(r[2])) for r in table(section(OPERATIONS, "Errors"))}
    there = {
        name: (thing.status, thing.exit_code)
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, errors.LedgerError)
    }
    assert documented == there


def test_every_limit_that_is_named_has_its_value() -> None:
    rows = table(section(OPERATIONS, "Limits"))
    assert rows
    for name, value in rows:
        module, _, constant = code(name).rpartition(".")
        # Read, not imported: some of these modules load torch.
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text("utf-8")
        found = re.search(rf"^{constant} = ([\d_ *]+)$", source, re.MULTILINE)
        assert found, f"{name} is no constant"
        assert f"{eval(found[1]):,}" == value, name


def test_every_make_target_and_no_other() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", OPERATIONS)) == targets
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text("utf-8"))) <= targets, page.name


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        asked += extra
    names = {re.split(r"[\[<>=~!; ]", line)[0] for line in asked} - {project["project"]["name"]}
    for folder in ("contracts", "ledger/console/verifier"):
        npm = json.loads((ROOT / folder / "package.json").read_text("utf-8"))
        kinds = ("dependencies", "devDependencies", "optionalDependencies")
        names |= {name for kind in kinds for name in npm.get(kind, {})}
    reasons = section(DECISIONS, "Dependencies")
    assert {name for name in names if f"**{name}**" not in reasons} == set()
    given = set(re.findall(r"\*\*([a-z0-9@/-]+)\*\*", reasons))
    assert given == names


def test_every_room_is_on_the_map() -> None:
    for package in ("ledger", "workers"):
        for folder in (ROOT / package).iterdir():
            if (folder / "__init__.py").exists() and folder.name != "base_model":
                assert f"`{package}/{folder.name}`" in ARCHITECTURE, folder


# --- what the pages say -----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert path.resolve().is_relative_to(ROOT), f"{page.name}: {target} leaves the repository"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_and_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(
        r"`((?:ledger|projections|workers|contracts|tests|migrations)/[^`\s]*)`", text
    ):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    for module in re.findall(r"python -m ((?:ledger|tests|workers)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_readme_has_examples_of_both_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}


# --- the examples, run ------------------------------------------------------------------------


@contextmanager
def service(home: Path, database_url: str) -> Iterator[str]:
    """The API and the projector as `tributary up` runs them; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = load_settings(home=home, database_url=database_url, port=port)
    open_ledger(settings)
    stop = threading.Event()
    threads = [
        threading.Thread(target=run, args=(settings, stop)) for run in (run_api, run_projector)
    ]
    for thread in threads:
        thread.start()
    try:
        _wait_ready(settings.url)
        yield settings.url
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


def _wait_ready(url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError("the service did not get ready")


def test_the_examples_of_the_readme_run(
    pg_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(tmp_path / "home", pg_url) as url:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TRIBUTARY_API": url,
            "TRIBUTARY_HOME": str(tmp_path / ".tributary"),
        }
        (tmp_path / "tests").symlink_to(ROOT / "tests")
        monkeypatch.chdir(tmp_path)
        for kind, block in BLOCKS:
            text = block.replace("http://127.0.0.1:8420", url)
            if kind == "python":
                exec(compile(text, "README.md", "exec"), {})
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                env=environment, capture_output=True, text=True, timeout=BLOCK_TIMEOUT_S,
            )  # fmt: skip
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            assert ("VERIFIED" in done.stdout) == ("verify" in text)
        assert (tmp_path / "notes.lineage.json").exists()
        assert (tmp_path / "compilers.lineage.json").exists()
