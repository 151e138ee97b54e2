"""Attention of a decode step over grouped keys, without repeating them.

Several query heads share one key-value head (GQA). With a mask, transformers repeats the keys and
values for every query head before torch's attention, in versions that know no better way: at eight
to one this is most of a decode step's memory traffic. With a single token per row, the query heads
of a group can stand where the tokens stand, and nothing is repeated.

Registered as an attention of transformers (`AttentionInterface`), used where the engine decodes in
fixed shapes. Prompts take transformers' own path.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "tributary_grouped"
"""Under this name transformers finds it; it holds no slash, which would mean a hub kernel."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (rows, heads, tokens, dim), key and value (rows, kv_heads, length, dim), mask
    (rows, 1, tokens, length) -> (rows, tokens, heads, dim)."""
    rows, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    plain = tokens != 1 or heads == kv_heads or attention_mask is None
    if plain or kwargs.get("position_bias") is not None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    assert attention_mask is not None
    if kwargs.get("softcap") is not None:
        raise ValueError("softcap is not supported by this attention")
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, dim)  # head h -> group h // size
    y = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return y.reshape(rows, 1, heads, value.shape[-1]), None


def use_grouped_attention(model: nn.Module) -> bool:
    """Let `model` decode through `grouped_attention`; False when its attention is not torch's
    scaled dot product behind transformers' interface, and stays as it is."""
    config: Any = model.config
    settable: Any = getattr(model, "_can_set_attn_implementation", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not settable or not settable():
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True
