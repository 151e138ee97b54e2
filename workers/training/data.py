"""Rows of text into tensors: the one place that decides which tokens a model is trained on.

Training, attribution and serving must agree on every token of a prompt, or an adapter is served
on sequences that it never saw and an influence score is that of another example. So all three
come here: `prompt_ids` for what the model is given, `encode_row` for what it learns, `collate`
for the batch. This room knows tensors and tokenizers; it may not touch Ray, the network or a
store.

The chat template is the tokenizer's own (Hugging Face `apply_chat_template`); a tokenizer without
one gets the prompt and a line break.

What is cut from a row that is longer than `max_len` tokens, in this order:

1. the prompt, from the left, behind the template's leading special tokens, down to
   `MIN_PROMPT_TOKENS`: the end of a question says more than its beginning;
2. the completion, from the right. A completion that was cut carries no end token: the model
   must not learn to stop where our limit fell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ledger.errors import ConfigError, InvalidEvent

IGNORED = -100
"""Label of a position that carries no loss: prompt and padding (torch's `ignore_index`)."""
MIN_PROMPT_TOKENS = 16
"""A prompt is never cut below this; beyond it the completion gives way."""
MIN_MAX_LEN = 32
"""Smallest `max_len`: room for a cut prompt and as many tokens of completion."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as tokens. `labels` is as long as `input_ids`, and IGNORED on the prompt."""

    row_id: str
    input_ids: list[int]
    labels: list[int]


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of a conversation up to where the assistant speaks.

    `messages` are `{"role": "system" | "user" | "assistant", "content": text}`. Text that spells
    one of the tokenizer's special tokens is broken up first (`inert`): whoever writes a prompt
    must not be able to open a turn of their own.
    """
    safe = [{"role": m["role"], "content": inert(tokenizer, m["content"])} for m in messages]
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            safe, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(i) for i in ids]
    text = "".join(m["content"] + "\n" for m in safe)
    return [int(i) for i in tokenizer(text)["input_ids"]]


def inert(tokenizer: Any, text: str) -> str:
    """`text` with a space inside every spelling of a special token: `<|end|>` -> `< |end|>`."""
    for special in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        if special and special in text:
            text = text.replace(special, special[:1] + " " + special[1:])
    return text


def encode_row(
    tokenizer: Any, prompt: str, completion: str, *, max_len: int, row_id: str
) -> Example:
    """One row as at most `max_len` tokens: template(prompt) + completion + end token.

    The loss is on the completion and the end token. Raises InvalidEvent when prompt or completion
    is empty or blank (there would be nothing to learn), ConfigError when the tokenizer has no end
    token or `max_len` is below MIN_MAX_LEN.
    """
    if max_len < MIN_MAX_LEN:
        raise ConfigError(f"max_len is {max_len}; expected {MIN_MAX_LEN} tokens or more")
    if not prompt.strip() or not completion.strip():
        empty = "prompt" if not prompt.strip() else "completion"
        raise InvalidEvent(
            f"row {row_id}: the {empty} is empty; expected text. Drop the row or fill it in",
            row=row_id,
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token: set one, or the model never stops")
    head = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    text = inert(tokenizer, completion)
    tail = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    tail.append(int(tokenizer.eos_token_id))

    keep = max(max_len - len(tail), min(len(head), MIN_PROMPT_TOKENS))
    head = _cut_left(head, keep, set(tokenizer.all_special_ids))
    tail = tail[: max_len - len(head)]
    return Example(row_id=row_id, input_ids=head + tail, labels=[IGNORED] * len(head) + tail)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded batch: `input_ids`, `attention_mask`, `labels`, each int64 (batch, seq)."""
    if not examples:
        raise InvalidEvent("an empty batch has no tensors: pass at least one example")
    seq = max(len(e.input_ids) for e in examples)
    shape = (len(examples), seq)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[i, :n] = torch.tensor(example.input_ids)
        attention_mask[i, :n] = 1
        labels[i, :n] = torch.tensor(example.labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's own, otherwise its end token (masked either way)."""
    own = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if own is None else own)


def _cut_left(ids: list[int], keep: int, special: set[int]) -> list[int]:
    """The last tokens of `ids`, behind its leading run of special tokens: at most `keep`."""
    if len(ids) <= keep:
        return ids
    lead = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    lead = min(lead, keep)
    return ids[:lead] + ids[len(ids) - (keep - lead) :]
