"""Keys and values of every batch row, preallocated, as a cache that any transformers model takes.

The model's forward writes through `update` and reads back a view of rows [lo, hi) up to the
longest of them. Which row and position each token goes to is decided by the engine before the
call (`aim`); the model needs to know nothing but its 4D mask. One extra position, `max_len`, is
where padding is written: it is never read. One extra row is room to swap two others: once the
pool is there, nothing here needs memory.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowLayer(CacheLayerMixin):
    """One decoder layer: keys and values (max_rows + 1, kv_heads, max_len + 1, head_dim)."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, max_rows: int, max_len: int) -> None:
        super().__init__()
        self.max_rows = max_rows
        self.max_len = max_len
        self.rows = slice(0, 0)
        self.length = 0
        self.index: tuple[Any, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Zeros and not empty memory: a masked position weighs 0, and 0 * NaN is NaN."""
        shape = (self.max_rows + 1, key_states.shape[1], self.max_len + 1)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """States (rows, kv_heads, tokens, head_dim) in; all keys and values of these rows out."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        # (rows, 1), :, (rows, tokens) -> (rows, tokens, kv_heads, head_dim)
        self.keys[self.index] = key_states.transpose(1, 2)
        self.values[self.index] = value_states.transpose(1, 2)
        return self.keys[self.rows, :, : self.length], self.values[self.rows, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self) -> int:
        return self.max_len


class RowCache(Cache):
    """The key-value pool of all batch rows."""

    def __init__(self, layers: int, max_rows: int, max_len: int) -> None:
        self.row_layers = [RowLayer(max_rows, max_len) for _ in range(layers)]
        super().__init__(layers=list(self.row_layers))
        self.max_rows = max_rows
        self.max_len = max_len

    def aim(self, lo: int, hi: int, positions: Tensor, length: int) -> None:
        """The next forward is for rows [lo, hi); `positions` (rows, tokens) says where they write.

        `length` is how far attention reads: one more than the highest real position.
        """
        row_index = torch.arange(lo, hi, device=positions.device)[:, None]
        for layer in self.row_layers:
            layer.rows, layer.length = slice(lo, hi), length
            layer.index = (row_index, slice(None), positions)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        for layer in self.row_layers:
            for store in (layer.keys, layer.values):
                if store is not None:
                    store[target, :, :length] = store[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        for layer in self.row_layers:
            for store in (layer.keys, layer.values):
                if store is not None:
                    store[self.max_rows, :, :length] = store[one, :, :length]
                    store[one, :, :length] = store[other, :, :length]
                    store[other, :, :length] = store[self.max_rows, :, :length]
