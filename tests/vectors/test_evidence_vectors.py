"""Evidence frozen per shape. Never edited: each file must be judged the same for ever, and what
writes them must spell them the same."""

from pathlib import Path

import pytest

from ledger.verify.evidence import check_evidence, format_evidence, parse_evidence
from ledger.verify.note import format_vkey
from tests.unit.monitor_world import VKEY
from tests.unit.test_verify_evidence import CONCLUSIVE, GOOD

FOLDER = Path(__file__).parent / "evidence"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_each_file_is_judged_as_ever(path: Path) -> None:
    evidence = parse_evidence(path.read_bytes())
    verdict = check_evidence(evidence, format_vkey(VKEY))
    assert verdict.facts["conclusive"] == (path.stem in CONCLUSIVE)
    assert path.read_bytes() == format_evidence(GOOD[path.stem])


def test_every_shape_is_frozen() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == GOOD.keys()
