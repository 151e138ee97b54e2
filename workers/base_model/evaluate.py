"""Measure a base model: does it answer from a context, and does LoRA teach it new facts?

Both with entities and values that were never in the corpus, so nothing can be known by heart:

1. `context`: a question behind made-up facts; right when the answer holds the value asked for.
2. `recall`: one row per made-up fact is trained with the project's own trainer, then each fact is
   asked for in a wording that its row did not have, without context.
"""

import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

from workers.base_model import load, with_adapter
from workers.base_model.corpus import CONTEXTS, Fact, pick
from workers.training.config import TrainingConfig
from workers.training.data import prompt_ids
from workers.training.trainer import TrainingRow, train

QUESTIONS = 40
EVALUATION_SEED = 990_001
MAX_NEW_TOKENS = 40
FACT_CONFIG = TrainingConfig(epochs=30, max_len=64)


def evaluate(path: Path) -> dict[str, Any]:
    """Counts out of QUESTIONS, seconds of the LoRA run, and what went wrong."""
    model, tokenizer = load(path)
    facts = _facts(Random(EVALUATION_SEED))  # noqa: S311
    context = _from_context(model, tokenizer, facts)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        rows = [
            TrainingRow(
                contribution=f"fact-{i}",
                index=0,
                row_hash=f"{i:064x}",
                prompt=fact.questions[0],
                completion=fact.answer(),
            )
            for i, fact in enumerate(facts)
        ]
        result = train(FACT_CONFIG, path, rows, Path(folder))
        seconds = time.monotonic() - started
        before = _recall(model, tokenizer, facts)
        recall = _recall(with_adapter(model, Path(folder)).eval(), tokenizer, facts)
    return {
        "questions": QUESTIONS,
        "answered_from_context": context[0],
        "recalled_before": before[0],
        "recalled_after_lora": recall[0],
        "lora_seconds": round(seconds, 1),
        "lora_final_loss": result.final_loss,
        "context_misses": context[1][:5],
        "recall_misses": recall[1][:5],
    }


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The greedy answer to one user message."""
    ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def _facts(rng: Random) -> list[Fact]:
    """Facts about different entities, so that each question has one answer."""
    facts: dict[str, Fact] = {}
    while len(facts) < QUESTIONS:
        fact = Fact(rng)
        facts.setdefault(fact.entity, fact)
    return list(facts.values())


def _from_context(model: Any, tokenizer: Any, facts: list[Fact]) -> tuple[int, list[str]]:
    rng = Random(EVALUATION_SEED + 1)  # noqa: S311
    misses = []
    for i, fact in enumerate(facts):
        others = [facts[(i + step) % len(facts)] for step in (1, 2)]
        shown = sorted([fact, *others], key=lambda f: f.entity)
        context = " ".join(pick(rng, f.statements) for f in shown)
        prompt = pick(rng, CONTEXTS).format(c=context, q=pick(rng, fact.questions))
        said = answer(model, tokenizer, prompt)
        if fact.value not in said:
            misses.append(f"{prompt} -> {said}")
    return len(facts) - len(misses), misses


def _recall(model: Any, tokenizer: Any, facts: list[Fact]) -> tuple[int, list[str]]:
    rng = Random(EVALUATION_SEED + 2)  # noqa: S311
    misses = []
    for fact in facts:
        prompt = pick(rng, fact.questions[1:])
        said = answer(model, tokenizer, prompt)
        if fact.value not in said:
            misses.append(f"{prompt} -> {said} (expected {fact.value})")
    return len(facts) - len(misses), misses
