"""Peers are asked the question that we ask ourselves: same gradients, same curvature, same rows."""

import builtins
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model

from workers import base_model
from workers.attribution.gradients import lora_sites
from workers.evaluation import peers
from workers.evaluation.kept import kept
from workers.evaluation.methods import METHODS, index_of
from workers.evaluation.retrain import Query
from workers.evaluation.scene import NotInstalled, Scene, gradients, traces_of
from workers.evaluation.world import rows_from

Floats = NDArray[np.float64]
ROWS = rows_from(
    {
        f"person-{who}": [
            {
                "prompt": f"What does tool{who}.part{n} do?",
                "completion": f"It turns {who * 7 + n} wheels of the {['mill', 'dam', 'cart'][n]}.",
            }
            for n in range(3)
        ]
        for who in range(6)
    }
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = base_model.load()
    torch.manual_seed(3)
    lora = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    with torch.no_grad():  # B begins at zero, and so would half of the gradients
        for site in lora_sites(lora):
            site.layer.weight.normal_(std=0.05)
    yield Scene(
        model=lora.eval(),
        tokenizer=tokenizer,
        rows=ROWS,
        queries=[Query(prompt=r.prompt, answer=r.completion) for r in ROWS[::4]],
        folder=tmp_path_factory.mktemp("scene"),
        max_len=64,
    )
    torch.set_num_threads(threads)


def truth(scene: Scene) -> list[int]:
    return list(range(0, len(ROWS), 4))


def likeness(left: Floats, right: Floats) -> float:
    return float(np.corrcoef(left.ravel(), right.ravel())[0, 1])


@pytest.mark.parametrize("name", ["index", "full-rank", "grad-dot", "grad-cos", "spans", "bm25"])
def test_a_row_is_found_by_its_own_text(scene: Scene, name: str) -> None:
    scores = METHODS[name](scene)
    assert scores.shape == (len(scene.queries), len(ROWS))
    assert np.isfinite(scores).all()
    assert list(scores.argmax(axis=1)) == truth(scene)


def test_compression_keeps_the_scores(scene: Scene) -> None:
    mine = METHODS["index"](scene)
    # The integers' unit is the sketch's step, another one for each answer.
    mine = mine / np.abs(mine).max(axis=1, keepdims=True)
    whole = METHODS["full-rank"](scene)
    assert likeness(mine, whole / np.abs(whole).max(axis=1, keepdims=True)) > 0.9


def test_kronfluence_computes_what_our_curvature_does_without_our_row_norms(scene: Scene) -> None:
    """Two implementations of one formula; labels are sampled by each for itself."""
    pytest.importorskip("kronfluence", reason="kronfluence is not installed: make peers")
    scores = METHODS["kronfluence"](scene)
    whitener = index_of(scene).whitener

    def whitened(examples: list[Any]) -> torch.Tensor:
        found = [None] * len(examples)
        for chosen, traces in traces_of(scene, examples):
            for i, row in zip(chosen, whitener(traces), strict=True):
                found[i] = row
        return torch.stack(found)  # type: ignore[arg-type]

    ours = whitened(scene.query_examples()) @ whitened(scene.row_examples()).T
    assert likeness(scores, ours.double().numpy()) > 0.95
    assert likeness(scores, METHODS["grad-dot"](scene)) < likeness(scores, ours.double().numpy())


def test_datainf_is_the_papers_closed_form(scene: Scene) -> None:
    pytest.importorskip("dattri", reason="dattri is not installed: make peers")
    asked, seen = gradients(scene)
    expected = torch.zeros(len(asked), len(seen), dtype=torch.float64)
    start = 0
    for site in lora_sites(scene.model):
        width = site.rows * site.cols
        v, g = asked[:, start : start + width].double(), seen[:, start : start + width].double()
        start += width
        damping = 0.1 * float(g.square().mean())
        for grad in g:  # (gradᵀgrad + damping)⁻¹ by Sherman and Morrison, averaged over rows
            q = (v - ((v @ grad) / (damping + grad @ grad))[:, None] * grad) / damping
            expected += q @ g.T / len(g)
    assert METHODS["datainf"](scene) == pytest.approx(
        expected.numpy(), rel=1e-3, abs=1e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize(
    ("name", "package"),
    [("kronfluence", "kronfluence"), ("datainf", "dattri"), ("bm25", "bm25s")],
)
def test_a_missing_peer_says_how_to_get_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    real = builtins.__import__

    def absent(wanted: str, *more: Any, **rest: Any) -> Any:
        if wanted.split(".")[0] == package:
            raise ImportError(f"No module named {wanted!r}")
        return real(wanted, *more, **rest)

    for module in ("peer_kronfluence", "peer_dattri"):
        monkeypatch.delitem(sys.modules, f"workers.evaluation.{module}", raising=False)
        monkeypatch.delattr(sys.modules["workers.evaluation"], module, raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(NotInstalled, match=r"make peers"):
        METHODS[name](scene)


def test_a_peers_scores_are_kept_and_ours_are_not(scene: Scene, tmp_path: Path) -> None:
    asked: list[str] = []

    def method(name: str) -> Any:
        def scores(scene: Scene) -> Floats:
            asked.append(name)
            return np.full((len(scene.queries), len(scene.rows)), float(len(asked)))

        return scores

    known = replace(scene, adapter_sha256="ab" * 32)
    first = kept(tmp_path, "bm25", known, method("bm25"))
    assert (kept(tmp_path, "bm25", known, method("bm25")) == first).all()
    assert asked == ["bm25"]
    kept(tmp_path, "bm25", replace(known, adapter_sha256="cd" * 32), method("bm25"))
    kept(tmp_path, "bm25", replace(known, queries=known.queries[:1]), method("bm25"))
    kept(tmp_path, "bm25", scene, method("bm25"))  # an adapter that nobody can name
    kept(tmp_path, "index", known, method("index"))
    kept(tmp_path, "index", known, method("index"))
    assert asked == [*["bm25"] * 4, "index", "index"]
    for file in tmp_path.iterdir():
        file.write_bytes(b"\x93NUMPY damaged")
    kept(tmp_path, "bm25", known, method("bm25"))
    assert len(asked) == 7


def test_words_of_nothing_are_not_nothing() -> None:
    assert peers.words("...") == [""]


def test_a_scene_has_its_own_folder(scene: Scene, tmp_path: Path) -> None:
    assert index_of(scene).path.parent == scene.folder
    assert index_of(scene) is index_of(scene)
