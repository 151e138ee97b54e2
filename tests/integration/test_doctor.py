"""`tributary doctor` on signer and witnesses, with a real database and real sockets."""

from contextlib import closing
from pathlib import Path
from socket import create_server

import pytest

from ledger import bootstrap
from ledger.config import Settings, load_settings
from ledger.log.signer import SignedTree
from ledger.processes.doctor import Finding, examine
from ledger.verify.note import COSIGNATURE, format_vkey, vkey_of
from tests.fakes import MemoryTileStore
from tests.unit.lineage_world import key
from workers.replicas import registry
from workers.replicas.registry import Registration


@pytest.fixture
def settings(pg_url: str, tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path, database_url=pg_url, port=9)


def said(settings: Settings, check: str) -> list[Finding]:
    return [found for found in examine(settings) if found.check == check]


def test_a_database_older_than_what_was_signed(settings: Settings) -> None:
    assert said(settings, "signer") == [], "no key yet: nothing was signed"
    signer = bootstrap.log_signer(settings)
    assert [f.state for f in said(settings, "signer")] == ["ok"]
    tree = SignedTree(size=5, root=bytes(32))
    signer.sign(tree, published=MemoryTileStore().latest(), prove_from=lambda size: [])
    (found,) = said(settings, "signer")
    assert found.state == "problem"
    assert "remembers size 5; the database has 0 events" in found.detail
    assert "older" in found.do
    (settings.root / "log/signed.json").write_text("junk")
    (found,) = said(settings, "signer")
    assert found.state == "problem"
    assert "signed.json is not the signer's memory" in found.detail


def test_each_witness_of_the_policy_is_asked(settings: Settings, tmp_path: Path) -> None:
    vkey = format_vkey(vkey_of("w.example", key("w"), COSIGNATURE))
    policy = tmp_path / "policy"
    with closing(create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        policy.write_text(f"witness w {vkey} http://127.0.0.1:{port}\nquorum w\n")
        asked = settings.model_copy(update={"witness_policy": policy, "witness_timeout_s": 0.2})
        (found,) = said(asked, "witness")
        assert found.state == "warning", "it accepts, and never answers"
    (found,) = said(asked, "witness")
    assert found.state == "warning"
    assert f"w, http://127.0.0.1:{port}" in found.detail
    policy.write_text("witness w\n")
    (found,) = said(asked, "witnesses")
    assert found.state == "problem"
    assert str(policy) in found.detail


def test_each_replica_is_looked_at(settings: Settings) -> None:
    (found,) = said(settings, "serving")
    assert (found.state, "no replica is registered" in found.detail) == ("warning", True)
    home = bootstrap.workers_home(settings)
    ours = bootstrap.base_model(settings)["digest"]

    def look(address: str, base_model: str, state: str) -> Finding:
        one = Registration(
            name="openlora-0", address=address, pid=1, instance="i", base_model=base_model,
            state=state,
        )  # fmt: skip
        registry.write(home, one)
        (finding,) = said(settings, "serving")
        assert "openlora-0" in finding.detail
        assert bool(finding.do) == (finding.state != "ok")
        return finding

    with closing(create_server(("127.0.0.1", 0))) as port:
        there = f"127.0.0.1:{port.getsockname()[1]}"
        assert look(there, ours, "ready").state == "ok"
        assert look(there, ours, "draining").state == "warning"
        other = look(there, "0" * 64, "ready")
        assert other.state == "problem"
        assert "TRIBUTARY_BASE_MODEL" in other.do
    gone = look(there, ours, "ready")
    assert (gone.state, "nobody answers" in gone.detail) == ("warning", True)
