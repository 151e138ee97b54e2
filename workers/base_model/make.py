"""Make the bundled base model: corpus, tokenizer, pretraining, one Hugging Face folder.

    python -m workers.base_model.make --out DIR [--steps N] [--evaluate]

Everything follows from the constants below and SEED: the same machine type, library versions and
thread count give the same bytes (tests/unit/test_training_base_model.py holds two short runs
against each other). Other machines give a model of the same quality but other bytes, which is why
events carry the digest of the files (`workers.base_model.digest`) and not a name.

The recipe is nanochat's in miniature: byte-level BPE, a pre-norm Llama with tied embeddings,
Muon for the matrices and AdamW for the rest, one pass over data that never repeats. What is not
covered: it knows no facts about the world, no arithmetic, and no language but simple English.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from workers.base_model.corpus import Conversation, conversations

SEED = 20251121
THREADS = 1
VOCAB_SIZE = 1024
CONTEXT = 512
SPECIALS = ("<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, USER, ASSISTANT, END = range(5)

TOKENIZER_CONVERSATIONS = 30_000
STEPS = 2_400
BATCH_TOKENS = 2_048
SORTED_POOL = 2_048
"""Conversations sorted by length together: batches of one length waste little on padding."""
PROMPT_WEIGHT = 0.15
"""Weight of a prompt token's loss; an answer token's is 1. Names in prompts cannot be guessed,
but their second mention can, and learning that is what makes the model copy."""
MUON_LR, ADAMW_LR = 0.02, 0.005
WARMUP, COOLDOWN = 60, 0.75
"""Steps of warm-up; share of all steps over which the rate falls to zero."""

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% set ns = namespace(system='') %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n' %}"
    "{% elif m['role'] == 'user' %}"
    "{{ '<|user|>' + ns.system + m['content'] }}{% set ns.system = '' %}"
    "{% else %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A system message goes before the user's text: the corpus has no third speaker."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of the model; the defaults are the bundled one's. Benchmarks make others."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 5
    heads: int = 4
    seed: int = SEED


BUNDLED_SHAPE = Shape()


def make(
    out: Path, *, steps: int = STEPS, shape: Shape = BUNDLED_SHAPE, quiet: bool = False
) -> dict[str, Any]:
    """Write the model folder to `out`; returns what the model card states (sizes, loss, time)."""
    torch.use_deterministic_algorithms(True)
    switch: Any = torch.utils.deterministic
    switch.fill_uninitialized_memory = False  # a debugging aid that costs 7%
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    tokenizer = train_tokenizer()
    model, loss, tokens = pretrain(tokenizer, steps, shape=shape, quiet=quiet)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": tokens,
        "loss": f"{loss:.4f}",
        "seconds": round(time.monotonic() - started),
    }
    save(out, model, tokenizer)
    return facts


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any UTF-8 text is representable, digits stand alone (copied one by one)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    turns = (turn for c in islice(conversations(SEED), TOKENIZER_CONVERSATIONS) for turn in c)
    bpe.train_from_iterator((text for turn in turns for text in turn), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",  # noqa: S106
        bos_token="<|bos|>",  # noqa: S106
        eos_token="<|end|>",  # noqa: S106
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build(shape: Shape = BUNDLED_SHAPE) -> LlamaForCausalLM:
    torch.manual_seed(shape.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            initializer_range=0.04,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=END,
        )
    )


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    *,
    shape: Shape = BUNDLED_SHAPE,
    quiet: bool = False,
) -> tuple[LlamaForCausalLM, float, int]:
    """Returns the model, the mean answer loss of the last 50 steps (nats) and the tokens seen."""
    model = build(shape).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, steps)) for o in optimizers
    ]
    recent: list[float] = []
    seen = 0
    started = time.monotonic()
    for step, (ids, weights) in enumerate(islice(batches(tokenizer), steps), start=1):
        loss, answer_loss = step_loss(model, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], answer_loss]
        seen += ids.numel()
        if not quiet and (step % 100 == 0 or step == steps):
            spent = time.monotonic() - started
            mean = sum(recent) / len(recent)
            print(f"step {step}/{steps}  answer loss {mean:.3f}  {spent:.0f} s", flush=True)
    return model.eval(), sum(recent) / len(recent), seen


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: warm-up, plateau, linear fall to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return min(1.0, (steps - step) / max(1, math.ceil(steps * COOLDOWN)))


def step_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Weighted next-token loss of a batch `(batch, seq)`, and the plain loss on the answers.

    Padding stands right and weighs nothing, and attention is causal: no mask is needed.
    """
    logits = model(input_ids=ids).logits[:, :-1]  # (batch, seq - 1, vocab)
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    answers = (flat == 1.0).float()
    answer_loss = float((losses * answers).sum().detach() / answers.sum())
    return (losses * flat).sum() / flat.sum(), answer_loss


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: ids and loss weights, each (batch, seq), about BATCH_TOKENS in all."""
    source = conversations(SEED + 1)
    generator = torch.Generator().manual_seed(SEED)
    while True:
        pool = encode(tokenizer, list(islice(source, SORTED_POOL)))
        pool.sort(key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(pair[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(pair)
        for i in torch.randperm(len(groups), generator=generator).tolist():
            yield pad_batch(groups[i])


def encode(
    tokenizer: PreTrainedTokenizerFast, pool: list[Conversation]
) -> list[tuple[list[int], list[float]]]:
    """Each conversation as ids and loss weights, at most CONTEXT long: the chat template by ids."""
    texts = [text for conversation in pool for turn in conversation for text in turn]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    result = []
    for conversation in pool:
        ids, weights = [BOS], [0.0]
        for _ in conversation:
            user, assistant = next(encoded), next(encoded)
            ids += [USER, *user, ASSISTANT, *assistant, END]
            weights += [0.0] + [PROMPT_WEIGHT] * len(user) + [0.0] + [1.0] * (len(assistant) + 1)
        result.append((ids[:CONTEXT], weights[:CONTEXT]))
    return result


def pad_batch(group: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    seq = max(len(ids) for ids, _ in group)
    ids = torch.full((len(group), seq), PAD)
    weights = torch.zeros(len(group), seq)
    for i, (row, row_weights) in enumerate(group):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, : len(row)] = torch.tensor(row_weights)
    return ids, weights


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The folder that `from_pretrained` reads. Weights are stored as float16 (half the size, and
    eleven bits of mantissa where bfloat16 has eight); `load` computes in float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD, do_sample=False, max_new_tokens=128
    )
    model.half().save_pretrained(out)
    model.float()
    tokenizer.save_pretrained(out)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tributary-base

The base model that Tributary bundles, so that training, serving and attribution run for real on
any machine. A Llama of {parameters:,} parameters (context {context}, byte-level BPE of {vocab}
tokens, float16 on disk, computed in float32), pretrained from nothing by
`workers/base_model/make.py` on {tokens:,} tokens of a generated chat corpus
(`workers/base_model/corpus.py`): {steps:,} steps, {seconds} s on {threads} CPU thread(s), final
answer loss {loss} nats. No text of anybody else went in.

## What it can do
Answer a short question from a context, copy what it never saw, and learn contributed facts with a
few seconds of LoRA. Measured by `python -m workers.base_model.make --out DIR --only-evaluate`, on
made-up facts that are in no corpus:

| | of {questions} |
|---|---|
| answered from a context of three facts | {answered_from_context} |
| recalled without context, before training | {recalled_before} |
| recalled in a new wording after {lora_seconds} s of LoRA on one row each | {recalled_after_lora} |

## What it cannot do
It knows nothing about the world, reasons about nothing, and has seen only simple English. It says
wrong things fluently. It is a test piece and a demonstration, not an assistant.

## Chat template
`<|bos|><|user|>question<|assistant|>answer<|end|>`; a system message goes before the user's text.
"""


def card(facts: dict[str, Any], measured: dict[str, Any]) -> str:
    return CARD.format(**facts, **measured, context=CONTEXT, vocab=VOCAB_SIZE, threads=THREADS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS, help="pretraining steps")
    parser.add_argument("--evaluate", action="store_true", help="measure it, write its README")
    parser.add_argument("--only-evaluate", action="store_true", help="measure an existing model")
    args = parser.parse_args()
    facts = None if args.only_evaluate else make(args.out, steps=args.steps)
    if facts:
        print(json.dumps(facts, indent=1))
    if args.evaluate or args.only_evaluate:
        from workers.base_model.evaluate import evaluate

        measured = evaluate(args.out)
        print(json.dumps(measured, indent=1))
        if facts:
            (args.out / "README.md").write_text(card(facts, measured))


if __name__ == "__main__":
    main()
