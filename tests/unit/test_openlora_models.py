"""Other architectures than Llama go through the same engine, or are refused when it is made."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

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
    tiny_llama,
)
from workers.openlora.engine import Engine, EngineConfig
from workers.openlora.errors import UnsupportedAdapter

torch.set_num_threads(1)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
DECODER = COMMON | SIZES | {"intermediate_size": 80, "num_key_value_heads": 2}
N_SIZES: dict[str, Any] = COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 96}
HEADS = {"head_dim": 12, "sliding_window": 96, "query_pre_attn_scalar": 12}
UNTIED = {"tie_word_embeddings": False}

FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": DECODER,  # biases on q, k, v; tied output head
    "Qwen3": DECODER | UNTIED | {"head_dim": 12},  # norms of q and k
    "Mistral": DECODER | {"sliding_window": None},
    "Gemma": DECODER | {"head_dim": 12},
    "Gemma2": DECODER | HEADS | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0},
    "Gemma3": DECODER | HEADS,
    "GPT2": N_SIZES,  # learned positions; Conv1D, whose weights are stored (in, out)
    "GPTNeoX": COMMON | SIZES | UNTIED | {"intermediate_size": 80},
    "GPTJ": N_SIZES | {"rotary_dim": 4},
    "Phi": DECODER | UNTIED,
    "Phi3": DECODER | UNTIED,  # q, k, v in one linear; gate and up in one
    # All tokens of all rows in one line through its feed-forward layers.
    "OPT": COMMON
    | SIZES
    | {"ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.2, "pad_token_id": 1},
    "Falcon": COMMON | SIZES | {"alibi": False},  # one key-value head for all
    "Mpt": COMMON | {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 96},  # ALiBi
    "GptOss": DECODER | UNTIED | {"head_dim": 12, "num_local_experts": 4, "sliding_window": 96},
    "Mixtral": DECODER | UNTIED | {"num_local_experts": 4, "sliding_window": None},
}
TARGETS: dict[str, Any] = {"Mixtral": ("q_proj", "k_proj", "o_proj")}
"""All linears, but where experts are no linears."""


def build(family: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    names = [n for n in dir(transformers) if n in (f"{family}Config", f"{family}TextConfig")]
    config = getattr(transformers, max(names, key=len))(**settings)
    heads = (f"{family}ForCausalLM", f"{family}LMHeadModel")
    [head] = [n for n in heads if hasattr(transformers, n)]
    return getattr(transformers, head)(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_peft_s(family: str, tmp_path: Path) -> None:
    """Mixed ranks, rows of the base model between them, prompts in chunks."""
    base = build(family, FAMILIES[family])
    targets = TARGETS.get(family, "all-linear")
    saved = [
        save_adapter(base, tmp_path, f"a{i}", rank=2 + 3 * i, targets=targets, seed=i)
        for i in range(2)
    ]
    engine = engine_for(base, max_rows=3, prefill_chunk=5)
    load(engine, *saved)
    requests = [
        request(f"{a}{n}", a, prompt_of(n), max_tokens=6)
        for n, a in [(4, "a0"), (11, None), (7, "a1"), (26, "a0")]
    ]
    answers = run(engine, requests)
    for r in requests:
        source = next((a for a in saved if a.name == r.adapter_id), None)
        assert answers[r.request_id].tokens == oracle(base, source, r.prompt_ids, 6)
    assert len({tuple(a.tokens) for a in answers.values()}) > 1


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("Mamba", COMMON | {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "."),
        # ALiBi that is made from a mask of two dimensions.
        ("Bloom", COMMON | {"hidden_size": 48, "n_layer": 2, "n_head": 4}, "different lengths"),
        ("Falcon", COMMON | SIZES | {"alibi": True}, "different lengths"),
        (
            "GPTNeo",
            COMMON
            | {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 96}
            | {"attention_types": [[["global", "local"], 1]], "window_size": 8},
            "local attention sees 8",
        ),
        ("Mistral", DECODER | {"sliding_window": 16}, "sliding window is 16"),
        (
            "Phi3",
            DECODER
            | {"original_max_position_embeddings": 48}
            | {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 6,
                    "long_factor": [2.0] * 6,
                }
            },
            "lower max_len from 96 to 48",
        ),
    ],
)
def test_what_would_be_served_wrongly_is_refused(
    family: str, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        Engine(build(family, settings), None, EngineConfig(max_len=96))


def test_a_family_that_nobody_has_heard_of_shows_itself() -> None:
    """A model that makes up its own positions runs without an error: its logits betray it."""
    model: Any = tiny_llama()
    forward = model.forward

    class Willful(type(model)):  # type: ignore[misc]
        def forward(
            self, input_ids: Any, position_ids: Any = None, logits_to_keep: Any = 0, **kw: Any
        ) -> Any:
            return forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kw)

    model.__class__ = Willful
    with pytest.raises(ConfigError, match="served wrongly"):
        Engine(model, None, EngineConfig(max_len=64))


def test_a_linear_that_does_not_see_every_row_is_no_target(tmp_path: Path) -> None:
    base = tiny_llama()
    saved = save_adapter(base, tmp_path, "all", rank=2)
    spared = save_adapter(base, tmp_path, "some", rank=2, targets=("q_proj", "up_proj"))

    class Some(nn.Module):
        """Passes half of the tokens through its linear, as an expert does."""

        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.v_proj = linear

        def forward(self, x: torch.Tensor) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            y = flat @ self.v_proj.weight.T
            y[::2] = self.v_proj(flat[::2])
            return y.view(*x.shape[:-1], -1)

    for layer in base.model.layers:
        layer.self_attn.v_proj = Some(layer.self_attn.v_proj)
    engine = engine_for(base)
    with pytest.raises(UnsupportedAdapter):
        load(engine, saved)
    load(engine, spared)
    assert run(engine, [request("r", "some", prompt_of(5))])["r"].finish.reason != "error"


def test_a_pool_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="no memory for"):
        Engine(tiny_llama(window=1 << 40), None, EngineConfig(max_len=1 << 40))
