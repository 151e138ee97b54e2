"""Which base models this engine serves as they are meant, and the refusal of the others."""

import inspect
from typing import Any

from torch import nn

from ledger.errors import ConfigError


def checked_window(model: nn.Module, max_len: int) -> int:
    """The usable window in tokens, or ConfigError for models that this engine would serve wrongly.

    One 4D mask goes to all layers. A sliding window that is shorter than ours, or a layer that
    keeps a recurrent state, would need more than that.
    """
    c: Any = model.config
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{type(model).__name__} is not a causal language model of transformers 5"
        )
    if getattr(c, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
        raise ConfigError(
            f"attention {c._attn_implementation!r} takes no 4D mask; load the model with 'sdpa'"
        )
    window = min(max_len, int(getattr(c, "max_position_embeddings", max_len)))
    kinds = set(getattr(c, "layer_types", None) or ["full_attention"])
    sliding = getattr(c, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layers of kind {sorted(kinds)} are not supported; attention only")
    if sliding and int(sliding) < window and getattr(c, "use_sliding_window", True):
        raise ConfigError(
            f"the model's sliding window is {sliding} tokens, below max_len {window}; lower max_len"
        )
    return window


def eos_ids(model: nn.Module, tokenizer: Any | None) -> frozenset[int]:
    """Token ids that end an answer: the generation config's and the tokenizer's."""
    generation: Any = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids = set(eos) if isinstance(eos, list | tuple) else {eos}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(int(i) for i in ids if i is not None)
