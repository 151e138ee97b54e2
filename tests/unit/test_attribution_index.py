"""The index end to end: real training on facts that exist nowhere else, then who is named.

One adapter is trained once for the whole module (about 20 s): 15 contributors, five invented facts
each. Contributed facts are the ground truth that attribution is held against.
"""

import hashlib
import random
import resource
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.envelope import leaf_hash
from ledger.domain.money import PPM_WHOLE
from ledger.domain.rows import tree_root
from ledger.errors import (
    ComputeError,
    Conflict,
    Inconsistent,
    InvalidEvent,
    NotFound,
    StorageError,
)
from workers import base_model
from workers.attribution import build, workshop
from workers.attribution.build import build_index
from workers.attribution.gradients import lora_sites
from workers.attribution.index import (
    LENS,
    MANIFEST,
    ROWS,
    SCALES,
    VECTORS,
    Index,
    IndexConfig,
    IndexedRow,
    load_index,
)
from workers.attribution.query import (
    attribute,
    conclude,
    encode_answer,
    scores_from_sketch,
    scores_from_sketches,
    shares_from_index,
    sketch_examples,
)
from workers.attribution.scan import EXACT_WIDTH, dots, float_product
from workers.attribution.shares import shares_from_scores
from workers.attribution.sketch import Sketch, fit_projection, quantise, select
from workers.training.config import TrainingConfig
from workers.training.data import pad_id, prompt_ids
from workers.training.trainer import train

CONTRIBUTORS, EACH = 15, 5
KINDS = "harbour crop festival river drink".split()  # noqa: SIM905
SYLLABLES = "ba ke lo mi nu ra se ti vo zu dra fen gol hir jas kel mor nev pol qua".split()  # noqa: SIM905
CONFIG = IndexConfig(seed=3, max_len=256)
ADAPTER, BASE = "ad" * 32, "ba" * 32


@dataclass(frozen=True, kw_only=True)
class World:
    model: Any
    tokenizer: Any
    rows: list[IndexedRow]
    asked: list[str]
    index: Index


def invented_rows() -> tuple[list[IndexedRow], list[str]]:
    """Rows, and for each a question in other words."""
    rng = random.Random(5)
    seen: set[str] = set()

    def name(syllables: int) -> str:
        while (word := "".join(rng.choices(SYLLABLES, k=syllables)).capitalize()) in seen:
            pass
        seen.add(word)
        return word

    rows, asked = [], []
    for who in range(CONTRIBUTORS):
        for number, kind in enumerate(KINDS):
            place, value = name(3), name(2)
            prompt, completion = (
                f"What is the {kind} of {place}?",
                f"The {kind} of {place} is {value}.",
            )
            rows.append(row(who, number, prompt, completion))
            asked.append(f"Tell me the {kind} of {place}.")
    return rows, asked


def row(who: int, number: int, prompt: str, completion: str) -> IndexedRow:
    return IndexedRow(
        contribution=f"contribution-{who}",
        index=number,
        row_hash=hashlib.sha256(f"{prompt}\n{completion}".encode()).hexdigest(),
        contributor=f"ed25519:{who:064x}",
        prompt=prompt,
        completion=completion,
        registered_index=100 + who,
    )


def trained(rows: list[IndexedRow], out: Path, epochs: int) -> tuple[Any, Any]:
    train(TrainingConfig(epochs=epochs, seed=1), base_model.BUNDLED, rows, out)
    model, tokenizer = base_model.load(base_model.BUNDLED)
    return PeftModel.from_pretrained(model, str(out)), tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("attribution")
    rows, asked = invented_rows()
    model, tokenizer = trained(rows, folder / "adapter", epochs=24)
    index = build_index(
        model,
        tokenizer,
        rows,
        folder / "index",
        adapter_sha256=ADAPTER,
        base_digest=BASE,
        config=CONFIG,
    )
    return World(model=model, tokenizer=tokenizer, rows=rows, asked=asked, index=index)


def answer(world: World, question: str) -> str:
    ids = torch.tensor([prompt_ids(world.tokenizer, [{"role": "user", "content": question}])])
    out = world.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=pad_id(world.tokenizer),
    )
    return str(world.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def rebuilt(
    world: World,
    rows: list[IndexedRow],
    out: Path,
    *,
    progress: Any = None,
    config: IndexConfig = CONFIG,
) -> Index:
    return build_index(
        world.model,
        world.tokenizer,
        rows,
        out,
        adapter_sha256=ADAPTER,
        base_digest=BASE,
        config=config,
        progress=progress,
    )


def test_canaries_are_found_and_their_contributors_paid_most(world: World) -> None:
    told, first, paid, unattributed = 0, 0, 0, []
    for number, (fact, question) in enumerate(zip(world.rows, world.asked, strict=True)):
        if number % 2:  # every other question: half the time, the same proof
            continue
        said = answer(world, question)
        if fact.completion.split(" is ")[1] not in said:
            continue  # the model does not know it: nobody can say whose it is
        told += 1
        result = attribute(world.model, world.tokenizer, world.index, question, said)
        assert sum(ppm for _, ppm in result.shares) + result.unattributed_ppm == PPM_WHOLE
        first += result.top_rows[0][0] == fact.row_id
        best = max(result.shares, key=lambda share: share[1], default=("nobody", 0))
        paid += best[0] == fact.contributor
        unattributed.append(result.unattributed_ppm)
    print(f"\ncanaries told {told}, recall@1 {first / told:.2f}, paid most {paid / told:.2f}")
    assert told >= 20, "the adapter did not learn its facts; nothing to attribute"
    assert first / told >= 0.9
    assert paid / told >= 0.9
    assert sorted(unattributed)[len(unattributed) // 2] < PPM_WHOLE // 2


def test_what_no_row_taught_is_unattributed(world: World) -> None:
    """Against the true answers: most of what the base knows anyway is nobody's."""
    strangers = [
        ("How do I list files?", "ls -la"),
        ("Say hello.", "Hello, how are you today?"),
        ("What is two plus two?", "Four."),
        ("Tell me about Python.", "Python is a programming language."),
    ]
    parts = [
        attribute(world.model, world.tokenizer, world.index, *pair).unattributed_ppm
        for pair in strangers
    ]
    assert sorted(parts)[1] > 600_000


def test_same_sketch_same_scores_and_shares_to_the_bit(world: World) -> None:
    fact = world.rows[0]
    result = attribute(world.model, world.tokenizer, world.index, fact.prompt, fact.completion)
    again = attribute(world.model, world.tokenizer, world.index, fact.prompt, fact.completion)
    assert again == result
    assert result.top_rows[0][0] == fact.row_id

    audited = load_index(world.index.path, manifest_sha256=result.index_sha256)
    sketch = Sketch.from_bytes(result.sketch)
    assert conclude(audited, sketch) == result
    # Written out slowly, in plain integers:
    vector = [int(v) for v in sketch.vector]
    slow = [
        sum(int(a) * b for a, b in zip(entries, vector, strict=True)) * int(scale)
        for entries, scale in zip(audited.vectors, audited.scales, strict=True)
    ]
    assert scores_from_sketch(audited, sketch).tolist() == slow
    names, groups = [r.contributor for r in audited.rows], [r.cluster for r in audited.rows]
    noise = audited.noise(sketch)
    shares = shares_from_scores(slow, names, groups, result.placebo, noise=noise)
    assert (shares.contributors, shares.unattributed_ppm) == (
        result.shares,
        result.unattributed_ppm,
    )


def test_messages_and_plain_text_ask_the_same(world: World) -> None:
    fact = world.rows[3]
    messages = [{"role": "user", "content": fact.prompt}]
    plain = attribute(world.model, world.tokenizer, world.index, fact.prompt, fact.completion)
    assert plain == attribute(world.model, world.tokenizer, world.index, messages, fact.completion)
    longer = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        *messages,
    ]
    other = attribute(world.model, world.tokenizer, world.index, longer, fact.completion)
    assert other.sketch != plain.sketch


def test_a_copier_gains_nothing(world: World, tmp_path: Path) -> None:
    thief = "ed25519:" + "ee" * 32
    copies = [
        replace(r, contribution="copies", index=n, contributor=thief, registered_index=999)
        for n, r in enumerate(world.rows[:20])
    ]
    near = [
        replace(
            r, contribution="near", prompt=r.prompt.lower() + " ", completion=f"{r.completion}."
        )
        for r in copies
    ]
    index = rebuilt(world, [*copies, *world.rows, *near], tmp_path / "index")
    for fact in world.rows[:8]:
        result = attribute(world.model, world.tokenizer, index, fact.prompt, fact.completion)
        assert thief not in dict(result.shares)
        assert max(result.shares, key=lambda s: s[1])[0] == fact.contributor


def test_ten_names_earn_what_one_name_earns(world: World) -> None:
    rows = world.index.rows
    for fact in world.rows[:3]:
        result = attribute(world.model, world.tokenizer, world.index, fact.prompt, fact.completion)
        sketch = Sketch.from_bytes(result.sketch)
        scores = scores_from_sketch(world.index, sketch)
        split = [
            f"{r.contributor}-{n}" if r.contributor == fact.contributor else r.contributor
            for n, r in enumerate(rows)
        ]
        shares = shares_from_scores(
            scores.tolist(),
            split,
            [r.cluster for r in rows],
            result.placebo,
            noise=world.index.noise(sketch),
        )
        whole = dict(result.shares).get(fact.contributor, 0)
        parts = sum(ppm for name, ppm in shares.contributors if name.startswith(fact.contributor))
        assert abs(parts - whole) <= EACH


def test_row_root_binds_vector_scale_and_contributor(world: World) -> None:
    index = world.index
    lines = (index.path / ROWS).read_bytes().splitlines()
    leaves = [
        leaf_hash(index.vectors[i].tobytes() + int(index.scales[i]).to_bytes(4, "big") + line)
        for i, line in enumerate(lines)
    ]
    assert tree_root(leaves).hex() == index.row_root
    assert index.rows[7].contributor.encode() in lines[7]


def test_building_again_gives_the_same_index(world: World, tmp_path: Path) -> None:
    again = rebuilt(world, world.rows, tmp_path / "index")
    assert again.manifest_sha256 == world.index.manifest_sha256
    with pytest.raises(Conflict, match="written once"):
        rebuilt(world, world.rows, tmp_path / "index")


def test_a_crashed_build_leaves_nothing_that_counts(world: World, tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def die(phase: str, done: int, total: int) -> None:
        if phase == "placebo":
            raise Crash

    with pytest.raises(Crash):
        build_index(
            world.model,
            world.tokenizer,
            world.rows[:6],
            tmp_path / "index",
            adapter_sha256=ADAPTER,
            base_digest=BASE,
            progress=die,
        )
    with pytest.raises(NotFound):
        load_index(tmp_path / "index")
    assert rebuilt(world, world.rows[:6], tmp_path / "index").manifest["rows"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("killed_at", ["fit", "rows", "placebo"])
def test_a_killed_build_goes_on_to_the_same_bytes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """75 rows: 30 for the lens, the others in batches of 16, a mark after each."""
    monkeypatch.setattr(workshop, "MARK_BATCHES", 1)
    sketched: list[int] = []
    whitened = build._Camera.whitened
    few = replace(CONFIG, pilot_rows=10, fit_rows=30)

    def counted(self: Any, examples: Any) -> Any:
        sketched.append(len(examples))
        if killed_at == "fit" and sum(sketched) > 20:
            raise KeyboardInterrupt
        return whitened(self, examples)

    def die(phase: str, done: int, total: int) -> None:
        if phase == killed_at and (phase == "placebo" or done > 50):
            raise KeyboardInterrupt

    whole = rebuilt(world, world.rows, tmp_path / "whole", config=few)
    monkeypatch.setattr(build._Camera, "whitened", counted)
    with pytest.raises(KeyboardInterrupt):
        rebuilt(world, world.rows, tmp_path / "index", progress=die, config=few)
    before, killed_at = sum(sketched), ""
    sketched.clear()
    index = rebuilt(world, world.rows, tmp_path / "index", config=few)
    assert index.manifest_sha256 == whole.manifest_sha256
    assert sum(sketched) <= len(world.rows) + few.placebo_examples
    assert before < 30 or sum(sketched) <= 75 - before + 16 + few.placebo_examples, "the rest"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index", "whole"]


def test_what_a_build_of_other_rows_left_is_not_taken(world: World, tmp_path: Path) -> None:
    def die(phase: str, done: int, total: int) -> None:
        if phase == "placebo":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebuilt(world, world.rows[:9], tmp_path / "index", progress=die)
    one = rebuilt(world, world.rows[1:10], tmp_path / "index")
    two = rebuilt(world, world.rows[1:10], tmp_path / "again")
    assert one.manifest_sha256 == two.manifest_sha256


@pytest.mark.parametrize("damage", ["rows lost", "rows cut", "lens cut"])
def test_what_was_lost_of_a_killed_build_is_made_again(
    world: World, tmp_path: Path, damage: str
) -> None:
    """Rows that are marked as done and not there would be zeros, and earn nothing."""

    def die(phase: str, done: int, total: int) -> None:
        if phase == "placebo":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebuilt(world, world.rows[:9], tmp_path / "index", progress=die)
    folder = tmp_path / ".building-index"
    if damage == "rows lost":
        (folder / VECTORS).unlink()
    else:
        cut = folder / (LENS if damage == "lens cut" else VECTORS)
        cut.write_bytes(cut.read_bytes()[:-9])
    if damage == "rows cut":
        with pytest.raises(StorageError, match="built afresh"):
            rebuilt(world, world.rows[:9], tmp_path / "index")
    index = rebuilt(world, world.rows[:9], tmp_path / "index")
    whole = rebuilt(world, world.rows[:9], tmp_path / "whole")
    assert index.manifest_sha256 == whole.manifest_sha256


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    """A mapped file without blocks would meet the full disk as SIGBUS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(StorageError, match="make room"):
            workshop.RowFiles(tmp_path, 100, 2**10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files = workshop.RowFiles(tmp_path, 100, 2**10)
    assert (tmp_path / VECTORS).stat().st_blocks * 512 >= 100 * 2**10
    assert not files.vectors.any()
    assert not files.has([0])


def test_answers_in_a_batch_are_as_alone(world: World) -> None:
    """Within the float noise of other padding: nobody's share moves by a thousandth."""
    facts = world.rows[:5]
    examples = [
        encode_answer(world.tokenizer, f.prompt, f.completion * (1 + n), max_len=256)
        for n, f in enumerate(facts)
    ]
    pad = pad_id(world.tokenizer)
    together = sketch_examples(world.model, world.index, examples, pad)
    scores = scores_from_sketches(world.index, together)
    for example, sketch, batched in zip(examples, together, scores, strict=True):
        alone = sketch_examples(world.model, world.index, [example], pad)[0]
        assert np.abs(alone.vector.astype(int) - sketch.vector.astype(int)).max() <= 1
        assert batched.tolist() == scores_from_sketch(world.index, sketch).tolist()
        one, other = conclude(world.index, alone), conclude(world.index, sketch)
        moved = dict(one.shares).keys() | dict(other.shares).keys()
        assert all(
            abs(dict(one.shares).get(who, 0) - dict(other.shares).get(who, 0)) < 1_000
            for who in moved
        )


@pytest.mark.parametrize("name", [VECTORS, SCALES, ROWS, LENS, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_index_is_refused(world: World, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "index"
    shutil.copytree(world.index.path, folder)
    data = bytearray((folder / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data[:-1] if damage == "truncate" else data)
    if damage == "remove":
        (folder / name).unlink()
    with pytest.raises((Inconsistent, NotFound), match=r"index|manifest"):
        load_index(folder, manifest_sha256=world.index.manifest_sha256)


def test_a_manifest_that_lies_about_shapes_is_refused(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.copytree(world.index.path, folder)
    manifest = parse_canonical((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(canonical_json(manifest | {"rows": manifest["rows"] + 1}))
    with pytest.raises(Inconsistent, match="contradict"):
        load_index(folder)
    for name in ("files", "config", "rows", "sites"):
        lie = {key: value for key, value in manifest.items() if key != name}
        lies: list[dict[str, Any]] = [{}, {name: 0}, {name: {VECTORS: {}}}]
        for value in lies:
            (folder / MANIFEST).write_bytes(canonical_json(lie | value))
            with pytest.raises(Inconsistent, match=r"index|contradict"):
                load_index(folder)


def test_one_row_alone(world: World, tmp_path: Path) -> None:
    index = rebuilt(world, world.rows[:1], tmp_path / "index")
    fact = world.rows[0]
    result = attribute(world.model, world.tokenizer, index, fact.prompt, fact.completion)
    assert [name for name, _ in result.shares] == [fact.contributor]
    assert result.unattributed_ppm < PPM_WHOLE // 2


def test_bad_answers_and_rows_are_named(world: World, tmp_path: Path) -> None:
    for empty in ("", "  \n"):
        with pytest.raises(InvalidEvent, match="no tokens"):
            attribute(world.model, world.tokenizer, world.index, "A question?", empty)
    with pytest.raises(InvalidEvent, match="context"):
        attribute(world.model, world.tokenizer, world.index, "A question?", "word " * 5_000)
    long_prompt = attribute(world.model, world.tokenizer, world.index, "word " * 5_000, "Yes.")
    assert long_prompt.sketch_sha256
    with pytest.raises(InvalidEvent, match="at least one row"):
        rebuilt(world, [], tmp_path / "none")
    with pytest.raises(InvalidEvent, match="completion is empty"):
        rebuilt(world, [replace(world.rows[0], completion=" ")], tmp_path / "empty")
    with pytest.raises(InvalidEvent, match="each row once"):
        rebuilt(world, world.rows[:1] * 2, tmp_path / "twice")
    assert not list(tmp_path.iterdir())


def test_another_adapter_or_a_damaged_one_is_refused(world: World) -> None:
    base, _ = base_model.load(base_model.BUNDLED)
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(Inconsistent, match="load the adapter"):
        attribute(other, world.tokenizer, world.index, "A question?", "An answer.")

    weight = lora_sites(world.model)[0].layer.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(ComputeError, match="NaN"):
            attribute(world.model, world.tokenizer, world.index, "A question?", "An answer.")
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_sketch_of_another_index_or_of_noise_is_refused(world: World) -> None:
    short = Sketch(vector=np.ones(3, dtype=np.int8), norm=5)
    with pytest.raises(InvalidEvent, match="another index"):
        scores_from_sketch(world.index, short)
    raw = short.to_bytes()
    assert Sketch.from_bytes(raw).to_bytes() == raw
    for bad in (b"", raw[:-1], raw + b"\0", b"x" + raw[1:], raw[:-1] + b"\x80"):
        with pytest.raises(InvalidEvent, match="sketch"):
            Sketch.from_bytes(bad)


def test_a_zero_sketch_attributes_nothing(world: World) -> None:
    nothing = Sketch(vector=np.zeros(world.index.vectors.shape[1], dtype=np.int8), norm=0)
    shares = shares_from_index(world.index, nothing, scores_from_sketch(world.index, nothing))
    assert shares.unattributed_ppm == PPM_WHOLE


@pytest.mark.parametrize("dim", [1, 7, 64, 192, EXACT_WIDTH, EXACT_WIDTH + 1, 4096])
def test_dot_products_are_exact_at_the_extremes(dim: int) -> None:
    rng = np.random.default_rng(dim)
    vectors = rng.integers(-127, 128, (40, dim)).astype(np.int8)
    vectors[0], vectors[1] = 127, -127
    query = np.full(dim, 127, dtype=np.int8)
    queries = np.stack([query, -query, vectors[2]])
    expected = queries.astype(np.int64) @ vectors.T.astype(np.int64)
    assert dots(vectors, queries).tolist() == expected.tolist()
    assert float_product(vectors, queries).tolist() == expected.tolist()
    for one in (queries[0][None], queries[:1], queries[0].reshape(1, -1)):  # strides of all kinds
        assert dots(vectors, one).tolist() == expected[:1].tolist()
        assert dots(vectors[:1], one).tolist() == expected[:1, :1].tolist()


def test_selection_takes_the_coordinates_of_most_energy() -> None:
    assert select(torch.tensor([1.0, 5.0, 0.0, 5.0, 2.0]), 3).tolist() == [1, 3, 4]
    assert select(torch.ones(4), 2).tolist() == [0, 1], "ties by number"
    assert select(torch.ones(3), 9).tolist() == [0, 1, 2]


def test_the_ridge_is_traks_inverse_in_the_rows_own_basis() -> None:
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(30, 200) + 2.0)
    matrix = fit_projection(rows, dim=30, ridge_ppm=1_000_000).matrix()
    query = torch.randn(5, 200)
    gram = (rows @ rows.T).double()
    ridge = torch.trace(gram) / 30
    expected = (query @ rows.T).double() @ torch.linalg.inv(gram + ridge * torch.eye(30)) * ridge
    torch.testing.assert_close(
        ((query @ matrix) @ (rows @ matrix).T).double(), expected, atol=0.03, rtol=0.02
    )


def test_projection_keeps_what_the_rows_span() -> None:
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(30, 500))
    rows[29] = rows[0]  # rank 29
    projection = fit_projection(rows, dim=64)
    assert projection.dim == 29
    query = torch.randn(5, 500)
    matrix = projection.matrix()
    torch.testing.assert_close(
        (query @ matrix) @ (rows @ matrix).T, query @ rows.T, atol=0.03, rtol=0.02
    )
    assert fit_projection(torch.zeros(3, 10), dim=4).matrix().abs().max() == 0


def test_quantising_refuses_nan_and_keeps_zero() -> None:
    entries, steps = quantise(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert entries.tolist() == [[0, 0], [64, -127]]
    assert steps.tolist() == pytest.approx([0.0, 2 / 127])
    with pytest.raises(ComputeError, match="NaN"):
        quantise(torch.tensor([[float("nan")]]))
