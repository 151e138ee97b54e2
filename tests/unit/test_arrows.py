"""The import arrows of the design, as a test: each room may import only what stands to its right.

Static: every `import` statement of every module, also those inside functions. And once for real: a
clean interpreter imports `ledger.verify` and must not have loaded anything beyond pynacl.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
STDLIB = sys.stdlib_module_names
OURS = ("ledger", "projections", "workers", "tests", "contracts")

# Room -> what of ours it may import (itself always), and which third-party packages: None is any.
CLIENT = {"httpx"}
ARROWS: dict[str, tuple[set[str], set[str] | None]] = {
    "ledger.errors": (set(), set()),
    "ledger.ports": (set(), set()),
    "ledger.domain": ({"ledger.errors"}, {"nacl"}),
    "ledger.files": (set(), set()),
    "ledger.remote": ({"ledger.errors"}, CLIENT),
    "ledger.client": ({"ledger.errors", "ledger.domain"}, {"nacl"} | CLIENT),
    "ledger.config": ({"ledger.errors"}, {"pydantic", "pydantic_settings"}),
    "ledger.verify": ({"ledger.errors", "ledger.domain"}, {"nacl", "rlp", "eth_hash"}),
    "ledger.aggregates": ({"ledger.errors", "ledger.domain"}, {"eventsourcing"}),
    "ledger.log": (
        {"ledger.errors", "ledger.domain", "ledger.verify", "ledger.ports", "ledger.files"},
        {"nacl", "eventsourcing", "pymerkle"},
    ),
    "ledger.store": ({"ledger.errors", "ledger.domain", "ledger.ports", "ledger.files"}, None),
    "ledger.chain": ({"ledger.errors", "ledger.domain", "ledger.ports"}, None),
    "ledger.console": ({"ledger.errors"}, {"jinja2", "markupsafe"}),
    "ledger.api": (
        {
            "ledger.console",
            "ledger.errors", "ledger.domain", "ledger.ports", "ledger.config", "ledger.aggregates",
            "ledger.log", "projections",
        },
        None,
    ),
    "ledger.cli": (
        {
            "ledger.console",
            "ledger.errors", "ledger.domain", "ledger.ports", "ledger.config", "ledger.client",
            "ledger.remote", "ledger.aggregates", "ledger.log", "ledger.verify", "ledger.bootstrap",
            "ledger.files", "ledger.processes", "ledger.store.migrate", "projections",
        },
        None,
    ),
    "projections": (
        {"ledger.errors", "ledger.domain", "ledger.ports"},
        {"psycopg", "psycopg_pool", "structlog"},
    ),
    "workers": ({"ledger.errors", "ledger.domain", "ledger.client", "ledger.ports"}, None),
}  # fmt: skip
# The composition root wires every room.
ROOT_ROOMS = ("ledger.bootstrap", "ledger.processes")
# Rooms that know neither Ray nor the network, and folds that know no database.
NARROWER = {
    "workers.training": {"ray", "httpx", "requests", "socket", "urllib", "http"},
    "workers.openlora": {"ray", "httpx", "requests", "socket", "urllib", "http"},
    "workers.attribution": {"ray", "httpx", "requests", "socket", "urllib", "http"},
    "workers.replicas": {"ray", "requests", "socket", "urllib", "http"},
    "workers.evaluation": {"ray", "httpx", "requests", "socket", "urllib", "http"},
    "projections": {"psycopg", "psycopg_pool"},
}
IMPURE_PROJECTIONS = {"projections.runner", "projections.queries"}


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("ledger", "projections", "workers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports(path: Path) -> set[str]:
    """Dotted names that the module imports; `from a.b import c` counts as a.b.c."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    rooms = [room for room in ARROWS if module == room or module.startswith(room + ".")]
    return max(rooms, key=len) if rooms else None


def is_in(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def broken_arrows(module: str, path: Path) -> Iterator[str]:
    room = room_of(module)
    if room is None:
        if not any(is_in(module, root) for root in (*ROOT_ROOMS, "ledger")):
            yield f"{module} is in no room of the design"
        return
    ours, third_party = ARROWS[room]
    for name in imports(path):
        top = name.split(".")[0]
        if top in OURS:
            if not any(is_in(name, allowed) for allowed in {*ours, room}):
                yield f"{module} imports {name}; {room} may import {sorted(ours)}"
        elif top not in STDLIB and third_party is not None and top not in third_party:
            yield f"{module} imports {top}; {room} may use {sorted(third_party)}"


def test_every_import_follows_the_arrows() -> None:
    broken = [line for module, path in modules() for line in broken_arrows(module, path)]
    assert broken == []


def test_pure_rooms_stay_pure() -> None:
    for module, path in modules():
        for room, forbidden in NARROWER.items():
            if is_in(module, room) and module not in IMPURE_PROJECTIONS:
                assert not {name.split(".")[0] for name in imports(path)} & forbidden, module


def test_pymerkle_enters_by_one_file() -> None:
    """It is GPLv3+: for the audit's second opinion alone, an extra, and no part of the service."""
    users = [m for m, path in modules() if any(is_in(i, "pymerkle") for i in imports(path))]
    assert users == ["ledger.log.second_opinion"]


def test_the_guard_sees_a_broken_arrow(tmp_path: Path) -> None:
    culprit = tmp_path / "culprit.py"
    culprit.write_text("def f():\n    from ledger.store import postgres\n    import httpx\n")
    assert len(list(broken_arrows("ledger.domain.culprit", culprit))) == 2


def test_ledger_itself_imports_nothing() -> None:
    assert (ROOT / "ledger" / "__init__.py").read_text().strip() == ""


def test_a_clean_interpreter_imports_verify_with_pynacl_alone() -> None:
    script = (
        "import sys; before = set(sys.modules); import ledger.verify.__main__;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {top for top in done.stdout.split() if top not in STDLIB}
    assert loaded <= {"ledger", "nacl", "_sodium", "_cffi_backend", "cffi"}, loaded
