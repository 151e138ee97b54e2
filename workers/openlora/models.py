"""Which base models this engine serves as they are meant, and the refusal of the others."""

import inspect
from typing import Any

from torch import nn

from ledger.errors import ConfigError


def checked_window(model: nn.Module, max_len: int) -> int:
    """The usable window in tokens, or ConfigError for models that this engine would serve wrongly.

    One 4D mask goes to all layers. A sliding window that is shorter than ours, or a layer that
    keeps a recurrent state, would need more than that. The rest is for `selfcheck` to see.
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
    window = min(max_len, int(getattr(c, "max_position_embeddings", None) or max_len))
    kinds = set(getattr(c, "layer_types", None) or ["full_attention"])
    sliding = getattr(c, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layers of kind {sorted(kinds)} are not supported; attention only")
    if sliding and int(sliding) < window and getattr(c, "use_sliding_window", True):
        raise ConfigError(
            f"the model's sliding window is {sliding} tokens, below max_len {window}; lower max_len"
        )
    if "local" in (getattr(c, "attention_layers", None) or ()) and c.window_size < window:
        raise ConfigError(
            f"the model's local attention sees {c.window_size} tokens, below max_len {window}; "
            "lower max_len"
        )
    scaled = _scaled_from(c)
    if scaled is not None and scaled < window:
        raise ConfigError(
            f"the model turns its positions otherwise in sequences of more than {scaled} tokens, "
            f"for all rows of a batch; lower max_len from {window} to {scaled}"
        )
    return window


def _scaled_from(c: Any) -> int | None:
    """The length from which rotary positions depend on the longest row, if there is one."""
    rope = getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {}
    kinds = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    if not any(k.get("rope_type", k.get("type")) in ("longrope", "dynamic") for k in kinds):
        return None
    own = [k.get("original_max_position_embeddings") for k in kinds]
    own.append(getattr(c, "original_max_position_embeddings", None))
    return min((int(n) for n in own if n), default=int(c.max_position_embeddings))


def eos_ids(model: nn.Module, tokenizer: Any | None) -> frozenset[int]:
    """Token ids that end an answer: the generation config's and the tokenizer's."""
    generation: Any = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids = set(eos) if isinstance(eos, list | tuple) else {eos}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(int(i) for i in ids if i is not None)
