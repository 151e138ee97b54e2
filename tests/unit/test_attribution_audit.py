"""An audit of a real attribution: all of it holds as recorded; each lie fails in its own step."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ledger.cli.context import plain
from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.ids import sha256_hex
from ledger.domain.money import PPM_WHOLE
from ledger.errors import Inconsistent, InvalidEvent, NotFound, Unavailable
from ledger.processes.auditor import Report
from tests.unit.audit_answers import (
    AT_ATTRIBUTION,
    AT_INFERENCE,
    INDEX_CONFIG,
    Answered,
    answered,
    contribution,
    contributor,
)
from workers.attribution import committed
from workers.attribution.audit import (
    STEPS,
    Audit,
    Claim,
    audit_nobody,
    audit_shares,
    difference_ppm,
    read_evidence,
)
from workers.attribution.audit_index import audit_index
from workers.attribution.audit_weights import audit_silence, audit_sketch, load_weights
from workers.attribution.committed import CommittedIndex, open_committed
from workers.attribution.evidence import Evidence, NotAttributed, none_document
from workers.attribution.query import conclude, scores_from_sketch
from workers.attribution.shares import Shares
from workers.attribution.sketch import Sketch
from workers.attribution.terms import NO_TERMS, Terms


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    return answered(tmp_path_factory.mktemp("audited"))


def audited(
    claim: Claim, evidence: Evidence, index: CommittedIndex, terms: Terms | None = None
) -> Audit:
    """Steps 1 to 8, the terms those of the document unless others are given."""
    audit = Audit()
    found = read_evidence(audit, claim, evidence.to_bytes())
    assert found == evidence
    audit_shares(audit, claim, evidence, index, evidence.terms if terms is None else terms)
    return audit


def fails(step: str, match: str, call: Callable[[], object]) -> None:
    with pytest.raises(Inconsistent, match=match) as caught:
        call()
    assert caught.value.detail["step"] == step
    assert caught.value.message.startswith(f"{step}: ")


def test_a_true_attribution_holds_in_every_step(world: Answered) -> None:
    for n in (0, 7, 13):
        audit = audited(*world.attributed(n), world.committed())
        assert [step.name for step in audit.steps] == list(STEPS[:8])
        assert {step.status for step in audit.steps} == {"ok"}
        assert audit.facts["difference_ppm"] == 0
    claim, evidence = world.attributed(7)
    assert claim.shares, "somebody is paid, or nothing was audited"
    assert evidence.against, "and somebody's row spoke against it"


def test_the_auditor_counts_another_way_than_the_engine(world: Answered) -> None:
    _, evidence = world.attributed(3)
    index = world.committed()
    mine = committed.scores_of(index, committed.read_sketch(evidence.sketch))
    theirs = scores_from_sketch(world.index, Sketch.from_bytes(evidence.sketch))
    assert mine.tolist() == theirs.tolist()
    assert world.index.manifest["format"] == committed.FORMAT
    assert index.row_root() == world.index.row_root


def test_terms_are_part_of_it(world: Answered) -> None:
    """Withdrawn, the row's weight is nobody's; split off, the copy speaks for itself."""
    plain, _ = world.attributed(0)
    withdrawn = Terms(withdrawn=frozenset({contribution(0)}))
    claim, evidence = world.attributed(0, withdrawn)
    audited(claim, evidence, world.committed())
    assert contributor(0) in dict(plain.shares)
    assert contributor(0) not in dict(claim.shares)
    assert claim.unattributed_ppm > plain.unattributed_ppm

    copy = (contribution(3), 0)
    claim, evidence = world.attributed(0, Terms(splits=frozenset({copy})))
    audited(claim, evidence, world.committed())
    assert contributor(3) in dict(claim.shares)
    assert contributor(3) not in dict(plain.shares)


def test_a_false_document_is_refused(world: Answered) -> None:
    claim, evidence = world.attributed()
    audit = Audit()
    other = replace(evidence, placebo=evidence.placebo + 1).to_bytes()
    fails("evidence", "hashes to", lambda: read_evidence(audit, claim, other))
    lies: dict[str, Any] = {
        "inference": contribution(0), "method": "better/v9", "index_sha256": "ab" * 32,
    }  # fmt: skip
    for field, value in lies.items():
        named, lie = told(claim, evidence, **{field: value})
        fails("evidence", field, partial(read_evidence, audit, named, lie.to_bytes()))
    junk = replace(claim, evidence_sha256=sha256_hex(b"junk"))
    fails("evidence", "JSON", lambda: read_evidence(audit, junk, b"junk"))
    assert audit.steps == []


CLAIMED: dict[str, tuple[str, dict[str, Any]]] = {
    "another index than the run's": ("index", {"run_index_sha256": "ab" * 32}),
    "another root": ("index", {"index_root": "ab" * 32}),
    "another adapter": ("index", {"adapter_sha256": "ab" * 32}),
    "another base model": ("index", {"base_model": "ab" * 32}),
    "answered after its terms": ("terms", {"inference_index": AT_INFERENCE + 2}),
    "attributed before its terms": ("terms", {"attribution_index": AT_INFERENCE + 1}),
}


@pytest.mark.parametrize("case", CLAIMED)
def test_what_the_log_says_otherwise_is_refused(case: str, world: Answered) -> None:
    step, changes = CLAIMED[case]
    claim, evidence = world.attributed()
    fails(step, step, lambda: audited(replace(claim, **changes), evidence, world.committed()))


@pytest.mark.parametrize(
    ("field", "value"),
    [("contributor", contributor(9)), ("registered_index", 1), ("row_hash", "ab" * 32)],
)
def test_rows_under_false_names_are_refused(field: str, value: Any, world: Answered) -> None:
    """A worker that wrote another name over a row: the log's contribution.recorded says whose."""
    claim, evidence = world.attributed()
    rows = list(claim.rows)
    rows[5] = replace(rows[5], **{field: value})
    fails(
        "rows",
        f"{field} of row 5",
        lambda: audited(replace(claim, rows=rows), evidence, world.committed()),
    )
    short = replace(claim, rows=rows[:-1])
    fails("rows", "number of rows", lambda: audited(short, evidence, world.committed()))


def test_tampered_terms_are_named(world: Answered) -> None:
    """The document forgets a withdrawal that the log knows, or makes one up."""
    claim, evidence = world.attributed()
    index, size = world.committed(), evidence.terms.log_size
    known = Terms(log_size=size, withdrawn=frozenset({contribution(1)}))
    fails("terms", "withdrawn", lambda: audited(claim, evidence, index, known))
    split = Terms(log_size=size, splits=frozenset({(contribution(3), 0)}))
    fails("terms", "splits", lambda: audited(claim, evidence, index, split))
    claim, evidence = world.attributed(terms=known)
    fails("terms", "withdrawn", lambda: audited(claim, evidence, index, Terms(log_size=size)))


def test_a_document_without_terms_cannot_pay_for_what_was_withdrawn(world: Answered) -> None:
    """Version 1 named no terms; a worker that writes one today would forget a withdrawal."""
    claim, evidence = told(*world.attributed(), version=1, terms=NO_TERMS, against=())
    audit = Audit()
    old = read_evidence(audit, claim, evidence.to_bytes())
    assert isinstance(old, Evidence)
    assert old.version == 1
    fails(
        "terms", "could be paid",
        lambda: audit_shares(audit, claim, old, world.committed(), NO_TERMS),
    )  # fmt: skip


def told(claim: Claim, evidence: Evidence, **changes: Any) -> tuple[Claim, Evidence]:
    """Another document, under its true hash."""
    lie = replace(evidence, **changes)
    return replace(claim, evidence_sha256=sha256_hex(lie.to_bytes())), lie


def test_a_row_that_is_silenced_by_a_later_one_is_named(world: Answered) -> None:
    claim, evidence = world.attributed()
    index = world.committed()
    late = max(range(len(index.rows)), key=lambda n: index.rows[n].registered_index)
    early = min(range(len(index.rows)), key=lambda n: index.rows[n].registered_index)
    rows = list(index.rows)
    rows[early] = replace(rows[early], cluster=late)
    fails("rows", "registered later", lambda: audited(claim, evidence, replace(index, rows=rows)))


def test_tampered_scores_placebo_and_named_rows_are_named(world: Answered) -> None:
    true = world.attributed()
    index, evidence = world.committed(), true[1]
    fails("scores", "scores_sha256", lambda: audited(*told(*true, scores_sha256="ab" * 32), index))
    sketch = evidence.sketch[:-1] + bytes([evidence.sketch[-1] ^ 1])
    fails("scores", "scores_sha256", lambda: audited(*told(*true, sketch=sketch), index))
    fails("scores", "entries", lambda: audited(*told(*true, sketch=shorter(evidence)), index))
    fails("scores", "not a sketch", lambda: audited(*told(*true, sketch=b"sketch"), index))
    low = evidence.placebo - 1
    fails("placebo", "recomputed", lambda: audited(*told(*true, placebo=low), index))
    fails(
        "named rows",
        "top_rows",
        lambda: audited(*told(*true, top_rows=evidence.top_rows[1:]), index),
    )
    fails("named rows", "against", lambda: audited(*told(*true, against=()), index))


def shorter(evidence: Evidence) -> bytes:
    sketch = Sketch.from_bytes(evidence.sketch)
    return Sketch(vector=sketch.vector[:-1], norm=sketch.norm).to_bytes()


def test_tampered_shares_are_named_with_what_went_elsewhere(world: Answered) -> None:
    claim, evidence = world.attributed()
    who, ppm = claim.shares[0]
    moved = [(who, ppm - 1), *claim.shares[1:]]
    lies = (
        replace(claim, shares=moved, unattributed_ppm=claim.unattributed_ppm + 1),
        replace(claim, shares=[("ed25519:" + "ee" * 32, ppm), *claim.shares[1:]]),
        replace(claim, shares=[], unattributed_ppm=PPM_WHOLE),
    )
    for lie, said in zip(lies, ("1 ppm", f"{ppm} ppm", "ppm went elsewhere"), strict=True):
        fails("shares", said, partial(audited, lie, evidence, world.committed()))


@pytest.mark.parametrize("name", ["vectors.i8", "scales.u32", "rows.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_index_is_refused_by_hash(
    world: Answered, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(world.index.path, folder)
    data = bytearray((folder / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data[:-1] if damage == "truncate" else data)
    if damage == "remove":
        (folder / name).unlink()
    with pytest.raises((Inconsistent, NotFound), match=name):
        open_committed(folder, manifest_sha256=world.index.manifest_sha256)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 0}, {"dim": -1}, {"dim": 10**9}, {"files": {}}, {"placebo_level": "-1"},
        {"placebo_level": 3}, {"placebo_level": "9" * 41}, {"noise_level": "x"}, {"row_root": "x"},
        {"format": "tributary/attribution-index/v9"},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_another_form_is_refused(
    changes: dict[str, Any], world: Answered, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(world.index.path, folder)
    raw = canonical_json({**world.index.manifest, **changes})
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(Inconsistent):
        open_committed(folder, manifest_sha256=sha256_hex(raw))


@pytest.mark.parametrize(
    "changes",
    [{"cluster": 999}, {"cluster": -1}, {"index": True}, {"contributor": "ann"}, {"text": "words"}],
    ids=str,
)
def test_a_line_of_another_form_is_refused(
    changes: dict[str, Any], world: Answered, tmp_path: Path
) -> None:
    """In an index whose hashes are all in order: whoever made it wrote that line."""
    folder = tmp_path / "index"
    shutil.copytree(world.index.path, folder)
    lines = (folder / "rows.jsonl").read_bytes().splitlines()
    lines[2] = canonical_json({**parse_canonical(lines[2]), **changes})
    data = b"".join(line + b"\n" for line in lines)
    (folder / "rows.jsonl").write_bytes(data)
    stamp = {"bytes": len(data), "sha256": sha256_hex(data)}
    files = {**world.index.manifest["files"], "rows.jsonl": stamp}
    raw = canonical_json({**world.index.manifest, "files": files})
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(Inconsistent, match=r"rows\.jsonl"):
        open_committed(folder, manifest_sha256=sha256_hex(raw))


def test_an_answer_that_nobody_is_paid_for(world: Answered) -> None:
    data = none_document("the answer has no tokens")
    claim, _ = world.attributed()
    claim = replace(
        claim, method="none/v1", shares=[], unattributed_ppm=PPM_WHOLE,
        evidence_sha256=sha256_hex(data),
    )  # fmt: skip
    audit = Audit()
    found = read_evidence(audit, claim, data)
    assert isinstance(found, NotAttributed)
    audit_nobody(audit, claim, found)
    assert [s.name for s in audit.steps if s.status == "ok"] == ["evidence", "shares"]
    paid = replace(claim, shares=[(contributor(0), 1)], unattributed_ppm=PPM_WHOLE - 1)
    fails("shares", "1 ppm", lambda: audit_nobody(Audit(), paid, found))
    # With the weights: was there really nothing to attribute?
    audit_silence(Audit(), found, world.model, world.tokenizer, (world.answer()[0], "  "))
    fails(
        "sketch", "can be attributed",
        lambda: audit_silence(Audit(), found, world.model, world.tokenizer, world.answer()),
    )  # fmt: skip


# --- with the weights -----------------------------------------------------------------------------


def sketched(world: Answered, claim: Claim, evidence: Evidence, answer: Any) -> Audit:
    audit, index = Audit(), world.committed()
    shares = audit_shares(audit, claim, evidence, index, evidence.terms)
    audit_sketch(
        audit, evidence, index, world.index, world.model, world.tokenizer, answer,
        evidence.terms, shares,
    )  # fmt: skip
    return audit


def test_the_sketch_comes_out_of_the_weights(world: Answered) -> None:
    audit = sketched(world, *world.attributed(4), world.answer(4))
    assert [step.name for step in audit.steps[-2:]] == ["sketch", "effect"]
    assert audit.facts["cosine_ppm"] >= 999_999
    assert audit.facts["effect_ppm"] == 0


def test_the_sketch_of_another_answer_is_refused(world: Answered) -> None:
    claim, evidence = world.attributed(4)
    fails("sketch", "cosine", lambda: sketched(world, claim, evidence, world.answer(5)))
    messages, output = world.answer(4)
    fails(
        "sketch", "cosine", lambda: sketched(world, claim, evidence, (messages, output + " Yes."))
    )
    other = [{"role": "user", "content": "What else?"}]
    fails("sketch", "cosine", lambda: sketched(world, claim, evidence, (other, output)))


def test_a_sketch_bent_towards_a_row_is_refused(world: Answered) -> None:
    """A worker in league with a contributor leans the sketch on one row, and everything behind the
    sketch is then consistent: only the weights tell."""
    _, evidence = world.attributed(4)
    sketch = Sketch.from_bytes(evidence.sketch)
    vector = sketch.vector.astype(np.int64) + world.index.vectors[9].astype(np.int64) // 8
    bent = Sketch(vector=vector.clip(-127, 127).astype(np.int8), norm=sketch.norm)
    found = conclude(world.index, bent, terms=evidence.terms)
    lie = replace(
        evidence,
        sketch=found.sketch,
        scores_sha256=found.scores_sha256,
        top_rows=tuple(
            replace(evidence.top_rows[0], row=r, contributor=c, score=s)
            for r, c, s in found.top_rows
        ),
        against=tuple(
            replace(evidence.top_rows[0], row=r, contributor=c, score=s)
            for r, c, s in found.against
        ),
    )
    claim = world.claim(lie, found.shares, found.unattributed_ppm)
    audited(claim, lie, world.committed())
    fails("sketch", "cosine", lambda: sketched(world, claim, lie, world.answer(4)))


def test_wrong_weights_are_refused(world: Answered, tmp_path: Path) -> None:
    from workers import base_model

    claim, _ = world.attributed()
    audit = Audit()
    load_weights(audit, claim, base_model.BUNDLED, world.adapter)
    assert [step.name for step in audit.steps] == ["weights"]
    other = tmp_path / "adapter"
    shutil.copytree(world.adapter, other)
    file = other / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    fails(
        "weights", "the adapter is", lambda: load_weights(audit, claim, base_model.BUNDLED, other)
    )
    based = replace(claim, base_model="ab" * 32)
    fails(
        "weights", "the base model is",
        lambda: load_weights(audit, based, base_model.BUNDLED, world.adapter),
    )  # fmt: skip
    with pytest.raises(NotFound):
        load_weights(audit, claim, base_model.BUNDLED, tmp_path)
    shutil.copytree(world.adapter, tmp_path / "odd")
    (tmp_path / "odd" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 999}')
    fails(
        "weights", "cannot be loaded",
        lambda: load_weights(audit, claim, base_model.BUNDLED, tmp_path / "odd"),
    )  # fmt: skip


# --- the index itself -----------------------------------------------------------------------------


def test_the_index_comes_out_of_weights_and_rows(world: Answered, tmp_path: Path) -> None:
    audit = Audit()
    found = audit_index(
        audit, world.committed(), world.model, world.tokenizer, world.rows, tmp_path, INDEX_CONFIG
    )
    assert found.identical
    assert found.same_environment
    assert "the same bytes" in audit.steps[-1].detail


def test_an_index_of_other_numbers_is_refused(world: Answered, tmp_path: Path) -> None:
    """One row's scale a tenth larger: more pay for its contributor. All hashes are in order."""
    true = world.committed()
    scales = true.scales.copy()
    scales[8] += scales[8] // 10
    lie = replace(true, scales=scales, manifest_sha256="ab" * 32)
    call = lambda: audit_index(  # noqa: E731
        Audit(), lie, world.model, world.tokenizer, world.rows, tmp_path, INDEX_CONFIG
    )
    fails("rebuilt index", "give another index", call)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [replace(rows[0], completion="No lantern."), *rows[1:]], "line 19"),
        (lambda rows: [*rows[:3], replace(rows[3], prompt="Which?"), *rows[4:]], "rows_sha256"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "line 1 of rows.jsonl"),
        (lambda rows: rows[:-1], "line 19 of rows.jsonl"),
    ],
    ids=["a copy's model changed", "another text", "another order", "a row less"],
)  # fmt: skip
def test_an_index_of_other_rows_is_refused(
    change: Any, said: str, world: Answered, tmp_path: Path
) -> None:
    rows = change(world.rows)
    fails(
        "rebuilt index", said,
        lambda: audit_index(
            Audit(), world.committed(), world.model, world.tokenizer, rows, tmp_path, INDEX_CONFIG
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"seed": "3"}}, {"config": {"dim": -1}}, {"config": {"unheard_of": 1}},
        {"config": []}, {"threads": 0}, {"threads": 10**6}, {"unit_exponent": 10**6},
        {"unit_exponent": None}, {"config": {"dim": 10**15, "max_len": 1}},
        {"config": asdict(replace(INDEX_CONFIG, placebo_examples=2**52))},
        {"config": asdict(replace(INDEX_CONFIG, placebo_quantile_ppm=0))},
        {"config": asdict(replace(INDEX_CONFIG, dedup_threshold_ppm=1_000_001))},
        {"config": asdict(replace(INDEX_CONFIG, seed=4))},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_nobody_can_build_with_are_refused(
    changes: dict[str, Any], world: Answered, tmp_path: Path
) -> None:
    true = world.committed()
    lie = replace(true, manifest={**true.manifest, **changes}, manifest_sha256="ab" * 32)
    fails(
        "rebuilt index", "rebuilt index",
        lambda: audit_index(
            Audit(), lie, world.model, world.tokenizer, world.rows, tmp_path, INDEX_CONFIG
        ),
    )  # fmt: skip


def test_another_machine_is_said_to_be_one(world: Answered, tmp_path: Path) -> None:
    """Not the same bytes, and said so; within the tolerances all the same."""
    true = world.committed()
    vectors = true.vectors.copy()
    vectors[::3, 1] -= np.sign(vectors[::3, 1])  # last bits, here and there
    lie = replace(
        true, vectors=vectors, manifest={**true.manifest, "versions": {"torch": "0"}},
        manifest_sha256="ab" * 32,
    )  # fmt: skip
    audit = Audit()
    found = audit_index(
        audit, lie, world.model, world.tokenizer, world.rows, tmp_path, INDEX_CONFIG
    )
    assert 0 < found.similarity_ppm < 20_000
    assert not found.identical
    assert not found.same_environment
    assert "another platform" in audit.steps[-1].detail


def test_an_index_of_an_older_format_is_not_comparable(world: Answered, tmp_path: Path) -> None:
    """Its shares followed another rule: that is no fault of theirs, and not said to be one."""
    folder = tmp_path / "index"
    shutil.copytree(world.index.path, folder)
    raw = canonical_json({**world.index.manifest, "format": committed.OLDER[0]})
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(Unavailable, match="version of its time"):
        open_committed(folder, manifest_sha256=sha256_hex(raw))


# --- parts ----------------------------------------------------------------------------------------


def test_differences_are_counted_once() -> None:
    one = Shares(contributors=[("a", 600_000), ("b", 300_000)], unattributed_ppm=100_000)
    two = Shares(contributors=[("a", 500_000), ("c", 300_000)], unattributed_ppm=200_000)
    assert difference_ppm(one, one) == 0
    assert difference_ppm(one, two) == difference_ppm(two, one) == 400_000
    assert AT_INFERENCE < AT_ATTRIBUTION


def test_an_unreadable_sketch_is_refused() -> None:
    for data in (b"", b"tributary/attribution-sketch/v1\n" + bytes(12)):
        with pytest.raises(InvalidEvent):
            committed.read_sketch(data)


def test_recomputing_needs_numpy_and_no_more() -> None:
    """The command that anyone runs loads neither torch nor what the service is made of."""
    heavy = "'torch', 'transformers', 'peft', 'safetensors', 'ray', 'psycopg', 'eventsourcing'"
    script = (
        "import sys; import workers.attribution.audit, ledger.cli.attribution;"
        f"print(*sorted(set(sys.modules) & {{{heavy}, 'web3', 'fastapi', 'pymerkle'}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.split() == []


def test_a_workers_words_do_not_move_the_cursor() -> None:
    audit = Audit()
    claimed = "\x1b[2J\x1b[HVERIFIED"
    audit.skip("index", f"nothing was attributed: {claimed}")
    said = Report(subject="x", steps=audit.steps, trusted=[claimed], facts={}).to_text()
    assert "\x1b" not in said
    assert said.count("\n") == 4
    assert plain(f"two\nlines{claimed}").startswith("two\nlines\N{REPLACEMENT CHARACTER}[2J")
