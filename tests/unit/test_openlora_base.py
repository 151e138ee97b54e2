"""The serving room on the bundled base model: its tokenizer, its template, its end token."""

import asyncio
from pathlib import Path

import pytest
import torch

from tests.unit.openlora_world import load, oracle, request, save_adapter
from workers import base_model
from workers.openlora.chat import encode_chat, openai_finish_reason, usage
from workers.openlora.driver import AsyncEngine
from workers.openlora.engine import Engine, EngineConfig

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(
    not (base_model.BUNDLED / "model.safetensors").exists(),
    reason="the bundled base model is not made yet: make base-model",
)
QUESTIONS = ["Who are you?", "What is 2 plus 3?", "Write a word with é in it."]


def test_chat_streams_are_peft_s_answers(tmp_path: Path) -> None:
    reference, tokenizer = base_model.load()
    saved = [save_adapter(reference, tmp_path, f"a{i}", rank=4 + 4 * i, seed=i) for i in range(2)]
    model, _ = base_model.load()
    engine = Engine(model, tokenizer, EngineConfig(max_rows=6, max_len=256))
    load(engine, *saved)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]

    async def main() -> None:
        async with AsyncEngine(engine) as serving:

            async def ask(i: int, adapter: str | None) -> None:
                r = request(f"{i}/{adapter}", adapter, prompts[i], max_tokens=24)
                deltas = [d async for d in serving.generate(r)]
                tokens = [t for d in deltas for t in d.token_ids]
                source = next((a for a in saved if a.name == adapter), None)
                assert tokens == oracle(reference, source, prompts[i], 24)
                finish = deltas[-1].finish
                assert finish is not None
                ended = tokens[-1] == tokenizer.eos_token_id
                assert openai_finish_reason(finish.reason) == ("stop" if ended else "length")
                assert usage(finish).total_tokens == len(prompts[i]) + len(tokens)
                whole = tokenizer.decode(tokens, skip_special_tokens=True)
                assert "".join(d.text for d in deltas) in (whole, whole.rstrip("�"))

            pairs = [(i, a) for i in range(len(prompts)) for a in (None, "a0", "a1")]
            await asyncio.gather(*(ask(i, a) for i, a in pairs))

    asyncio.run(main())
