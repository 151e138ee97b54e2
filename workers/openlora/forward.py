"""One call of the model for a slice of the batch rows: tokens in, logits out.

The only place where the key-value pool, the working set and the model meet. Positions and masks
are built on the CPU; what the model needs is moved to its device here.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from workers.openlora.kv import RowCache
from workers.openlora.layers import WorkingSet


class Forward:
    """The model with its rows' keys, values and adapters. Belongs to the engine's step."""

    def __init__(self, model: nn.Module, cache: RowCache, working: WorkingSet) -> None:
        self.model = model
        self.cache = cache
        self.working = working
        weight = next(model.parameters())
        self._dtype = weight.dtype
        self._device = model.get_input_embeddings().weight.device  # type: ignore[operator]

    def __call__(
        self, lo: int, hi: int, ids: Tensor, positions: Tensor, writes: Tensor, keep: Tensor | int
    ) -> Tensor:
        """Logits (hi - lo, kept, vocab) of rows [lo, hi); ids, positions, writes (rows, tokens).

        `keep` are the columns whose logits are wanted, or how many from the end.
        """
        length = int(positions.max()) + 1
        seen = torch.arange(length)[None, None, None] <= positions[:, None, :, None]
        mask = torch.zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, -math.inf)
        self.cache.aim(lo, hi, writes.to(self._device), length)
        self.working.bind(lo, hi, ids.shape[1])
        model: Any = self.model
        try:
            out = model(
                input_ids=ids.to(self._device),
                position_ids=positions.to(self._device),
                attention_mask=mask.to(device=self._device, dtype=self._dtype),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep if isinstance(keep, int) else keep.to(self._device),
            )
        finally:
            self.working.unbind()
        logits: Tensor = out.logits
        return logits
