"""Other architectures than Llama go through the same engine, or are refused when it is made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ledger.errors import ConfigError
from tests.unit.openlora_world import (
    EOS,
    VOCAB,
    engine_for,
    load,
    oracle,
    prompt_of,
    request,
    run,
    save_adapter,
)
from workers.openlora.engine import Engine

torch.set_num_threads(1)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
DECODER: dict[str, Any] = COMMON | {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


def qwen2() -> tuple[Any, tuple[str, ...]]:
    """Biases on q, k, v; tied output head."""
    config = Qwen2Config(**DECODER, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config), ("q_proj", "v_proj", "up_proj", "down_proj")


def phi3() -> tuple[Any, tuple[str, ...]]:
    """q, k, v in one linear; gate and up in one."""
    config = Phi3Config(**DECODER, tie_word_embeddings=False)
    return Phi3ForCausalLM(config), ("qkv_proj", "o_proj", "gate_up_proj")


def gpt2() -> tuple[Any, tuple[str, ...]]:
    """Learned positions; Conv1D, whose weights are stored (in, out)."""
    config = GPT2Config(**COMMON, n_embd=48, n_layer=2, n_head=4, n_positions=96)
    return GPT2LMHeadModel(config), ("c_attn", "c_fc", "c_proj")


@pytest.mark.parametrize("make", [qwen2, phi3, gpt2])
def test_greedy_tokens_are_peft_s(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    base, targets = make()
    base = base.eval()
    saved = [
        save_adapter(base, tmp_path, f"a{i}", rank=2 + 3 * i, targets=targets, seed=i)
        for i in range(3)
    ]
    engine = engine_for(base, max_rows=3, prefill_chunk=5)
    load(engine, *saved)
    requests = [
        request(f"{a}{n}", a, prompt_of(n), max_tokens=8)
        for n, a in [(4, "a0"), (11, None), (7, "a1"), (3, "a2"), (9, "a0"), (2, None)]
    ]
    answers = run(engine, requests)
    for r in requests:
        source = next((a for a in saved if a.name == r.adapter_id), None)
        assert answers[r.request_id].tokens == oracle(base, source, r.prompt_ids, 8)


def test_a_model_with_a_recurrent_state_is_refused() -> None:
    config = MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ConfigError):
        Engine(MambaForCausalLM(config))
