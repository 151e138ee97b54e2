"""workers/base_model: the corpus and the script are deterministic, the shipped folder is whole."""

import hashlib
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from ledger.errors import ConfigError
from workers import base_model
from workers.base_model import corpus, make

CORPUS_SHA256 = "59e429419379ec7d9b5fbbdfa91d4bdd504e840fa761d5fce9cb75c4e593cfc0"
MAX_BYTES = 8 * 2**20
"""What the repository grants the bundled model."""


def test_the_corpus_is_the_same_for_the_same_seed() -> None:
    first = list(islice(corpus.conversations(3), 500))
    assert first == list(islice(corpus.conversations(3), 500))
    assert first != list(islice(corpus.conversations(4), 500))


def test_the_corpus_is_the_one_that_the_model_was_made_from() -> None:
    """A changed word list gives another model: whoever changes it makes the model again."""
    text = repr(list(islice(corpus.conversations(make.SEED), 5_000)))
    assert hashlib.sha256(text.encode()).hexdigest() == CORPUS_SHA256


def test_every_context_question_can_be_answered_from_its_context() -> None:
    from random import Random

    rng, world = Random(5), corpus.make_world()
    for _ in range(500):
        conversation = corpus.from_documents(rng, world)
        assert all(answer in conversation[0][0] for _, answer in conversation)


def test_the_shares_of_the_mix_sum_to_one() -> None:
    assert sum(share for share, _ in corpus.CONTEXT_KINDS + corpus.TURN_KINDS) == pytest.approx(1)


def test_the_bundled_model_loads_like_any_other() -> None:
    model, tokenizer = base_model.load()
    parameters = list(model.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not model.training
    assert 1_000_000 <= sum(p.numel() for p in parameters) <= 2_000_000
    assert model.config.vocab_size == len(tokenizer) == make.VOCAB_SIZE
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_bundled_folder_is_small() -> None:
    files = list(base_model.BUNDLED.iterdir())
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    assert "README.md" in {f.name for f in files}


def test_a_base_model_that_nobody_names_is_the_bundled_one(tmp_path: Path) -> None:
    assert base_model.folder(None) == base_model.folder("") == base_model.BUNDLED
    assert base_model.folder(tmp_path) == base_model.folder(str(tmp_path)) == tmp_path


def test_it_answers_from_a_context_that_it_never_saw() -> None:
    from workers.base_model.evaluate import answer

    model, tokenizer = base_model.load()
    prompt = "Context: Vrostia has Kelmun as its owner. Tarvel listens on port 4417.\nQuestion: "
    assert "4417" in answer(model, tokenizer, prompt + "Which port does Tarvel listen on?")
    assert "Kelmun" in answer(model, tokenizer, prompt + "Who is the owner of Vrostia?")


def test_the_script_gives_the_same_bytes_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "TOKENIZER_CONVERSATIONS", 500)
    monkeypatch.setattr(make, "SORTED_POOL", 64)
    threads = torch.get_num_threads()
    for folder in ("a", "b"):
        make.make(tmp_path / folder, steps=2, quiet=True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    assert base_model.digest(tmp_path / "a") == base_model.digest(tmp_path / "b")
    assert base_model.digest(tmp_path / "a") != base_model.digest()


def test_the_digest_is_what_sha256sum_prints(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    lines = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}\n"
        for name, data in (("config.json", b"{}"), ("model.safetensors", b"weights"))
    )
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert base_model.digest(tmp_path) == expected
    (tmp_path / "README.md").write_text("not part of the model")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never loaded")
    assert base_model.digest(tmp_path) == expected


def test_the_digest_changes_with_any_file_of_the_model(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base_model.BUNDLED, copy)
    assert base_model.digest(copy) == base_model.digest()
    for file in copy.iterdir():
        if file.suffix not in base_model.MODEL_SUFFIXES:
            continue
        data = file.read_bytes()
        file.write_bytes(data + b" ")
        assert base_model.digest(copy) != base_model.digest(), file.name
        file.write_bytes(data)


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        base_model.digest(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        base_model.digest(tmp_path)
    with pytest.raises(ConfigError, match="no base model at"):
        base_model.load(tmp_path)
