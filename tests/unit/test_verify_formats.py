"""docs/FORMATS.md is tested: a type, limit or format without its place there fails here."""

import re
from pathlib import Path

from ledger.domain.envelope import MAX_ENTRY_BYTES, MAX_ENVELOPE_BYTES
from ledger.domain.events import CATALOGUE
from ledger.log.signer import STATE_FORMAT
from ledger.verify import bundle_format, disclosure, manifest, payouts
from ledger.verify.lineage import MAX_RUNS, ONCE

PAGE = (Path(__file__).parents[2] / "docs" / "FORMATS.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^### `([a-z_.]+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
ON_CHAIN = {"chain_id", "contract", "tx_hash", "block_number"}


def test_every_event_type_has_its_heading_and_no_other() -> None:
    assert SECTIONS.keys() == CATALOGUE.keys()


def test_every_field_is_named() -> None:
    for name, kind in CATALOGUE.items():
        text = SECTIONS[name]
        fields = kind.fields.keys() - (ON_CHAIN if "on_chain" in text else set())
        named = set(re.findall(r"`([a-z0-9_]+)`", text))
        assert fields <= named, (name, fields - named)


def test_every_reference_and_rule_of_once_is_named() -> None:
    for name, kind in CATALOGUE.items():
        for field, target in kind.references.items():
            assert re.search(rf"`{field}` → {target}", SECTIONS[name]), (name, field)
        assert ("*once" in SECTIONS[name]) == (name in ONCE), name


def test_limits_and_names() -> None:
    for number in (MAX_ENTRY_BYTES, MAX_ENVELOPE_BYTES, bundle_format.MAX_ENTRIES):
        assert f"{number:,}" in PAGE
    assert f"{manifest.MAX_MANIFEST_ROWS:,}" in PAGE
    assert f"{bundle_format.MAX_BUNDLE_BYTES // 2**20} MiB" in PAGE
    assert f"at most {bundle_format.MAX_BLOBS} of" in PAGE
    assert f"at most {MAX_RUNS} `run.completed`" in PAGE
    for name in (bundle_format.FORMAT, bundle_format.FORMAT_V2, STATE_FORMAT):
        assert name in PAGE
    assert disclosure.MAX_DISCLOSED == payouts.MAX_PAYOUTS == 100
    assert PAGE.count("at most 100 of") >= 2
    for field in bundle_format._V2_FIELDS:
        assert f"| `{field}` |" in PAGE
