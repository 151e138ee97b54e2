"""What a transcript says; attribution reads a completion on the tokens that were served."""

import pytest

from ledger.domain.transcript import PLAIN, words_of
from workers import base_model
from workers.attribution.query import encode_answer
from workers.replicas.backend import encode_prompt
from workers.training.data import IGNORED

MESSAGES = [{"role": "user", "content": "hello there"}]


def test_a_chat_and_a_completion_are_told_apart() -> None:
    kept = {"v": 1, "output": "o", "prompt_salt": "", "output_salt": ""}
    assert words_of({**kept, "messages": MESSAGES}) == (MESSAGES, "o")
    assert words_of({**kept, "prompt": "p"}) == ([{"role": PLAIN, "content": "p"}], "o")
    for broken in ({**kept}, {**kept, "messages": [{"role": "user"}]}, {"messages": MESSAGES}):
        with pytest.raises(KeyError):
            words_of(broken)


def test_a_completion_is_attributed_on_the_tokens_that_the_engine_read() -> None:
    _, tokenizer = base_model.load()
    for prompt in ("once upon a time", "<|end|> is broken up"):
        messages, answer = words_of({"prompt": prompt, "output": "there was"})
        example = encode_answer(tokenizer, messages, answer, max_len=64)
        served = list(encode_prompt(tokenizer, prompt))
        assert example.input_ids[: len(served)] == served
        assert example.labels[: len(served) + 1] == [IGNORED] * len(served) + [
            example.input_ids[len(served)]
        ]
    chat = encode_answer(tokenizer, MESSAGES, "x", max_len=64)
    plain = encode_answer(tokenizer, [{"role": PLAIN, "content": "hello there"}], "x", max_len=64)
    assert len(chat.input_ids) > len(plain.input_ids)
