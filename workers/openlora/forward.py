"""One call of the model for a slice of the batch rows: tokens in, logits out.

The only place where the key-value pool, the adapters and the model meet. `Forward` takes any rows
and any number of tokens; its positions and masks are built on the CPU, and what the model needs is
moved to its device here. `StaticDecode` is a decode step in one of a few fixed shapes, whose every
input lies on the device already, so that it can be recorded (`graphs`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from workers.openlora.attention import use_grouped_attention
from workers.openlora.forms import LoraForm, Plan, recorder_for
from workers.openlora.gather import SlotGather
from workers.openlora.graphs import DecodeInputs, DecodeRunner, Recorder, Shape
from workers.openlora.kv import RowCache


class Forward:
    """The model with its rows' keys, values and adapters. Belongs to the engine's step."""

    def __init__(self, model: nn.Module, cache: RowCache, working: LoraForm) -> None:
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
        self.working.context.rows = hi - lo
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

    def decode(self, ids: Sequence[int], positions: Sequence[int], lo: int = 0) -> Tensor:
        """Logits (rows, vocab) of rows [lo, lo + len(ids)), a token each at its position."""
        at = torch.tensor(positions)[:, None]
        return self(lo, lo + len(ids), torch.tensor(ids)[:, None], at, at, 1)[:, -1]

    def stats(self) -> dict[str, Any]:
        return {}

    def shed(self) -> None:
        """Nothing is kept between calls."""


class StaticDecode:
    """The same decode step in fixed shapes: padded rows, attention up to a bucket of positions."""

    def __init__(
        self,
        model: nn.Module,
        cache: RowCache,
        form: SlotGather,
        recorder: Recorder,
        *,
        max_rows: int,
    ) -> None:
        self.model = model
        self.cache = cache
        self.form = form
        weight = next(model.parameters())
        self._dtype, self._device = weight.dtype, weight.device
        self._inputs = DecodeInputs(max_rows, cache.max_len, weight.device)
        self.runner = DecodeRunner(self._step, recorder, max_rows=max_rows, max_len=cache.max_len)

    def decode(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `Forward.decode`; the logits are valid until the next call."""
        slots = self.form.slots_of(len(ids))
        shape = self.runner.shape(
            rows=len(ids), length=max(positions) + 1, lora=any(slot >= 0 for slot in slots)
        )
        self._inputs.load(ids, positions, slots, shape.rows)
        keys = self.cache.row_layers[0].keys
        memory = (self.form.generation, None if keys is None else keys.data_ptr())
        return self.runner.run(shape, memory)[: len(ids)]

    def shed(self) -> None:
        """Give back the memory of what was recorded; it is recorded again when it is needed."""
        self.runner.clear()

    def stats(self) -> dict[str, Any]:
        """Which kernels add the adapters, and how often steps were recorded and replayed."""
        return {"kernels": self.form.kernels.name, **asdict(self.runner.stats)}

    def _step(self, shape: Shape) -> Tensor:
        """Logits (shape.rows, vocab) of what the inputs hold. Nothing here reads a number back."""
        ids, positions, writes, slots = self._inputs.view(shape.rows)
        seen = torch.arange(shape.length, device=self._device) <= positions[:, None]
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(~seen, -math.inf)
        self.cache.aim(0, shape.rows, writes[:, None], shape.length)
        self.form.bind_index(slots, lora=shape.lora)
        self.form.context.rows = shape.rows
        model: Any = self.model
        try:
            out = model(
                input_ids=ids[:, None],
                position_ids=positions[:, None],
                attention_mask=mask[:, None, None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            self.form.unbind()
        logits: Tensor = out.logits
        return logits[:, -1]


def decoder(forward: Forward, plan: Plan, max_rows: int) -> Forward | StaticDecode:
    """What runs the decode steps of this engine."""
    if not plan.static_decode:
        return forward
    assert isinstance(forward.working, SlotGather), "see forms.plan"
    use_grouped_attention(forward.model)
    device = next(forward.model.parameters()).device
    return StaticDecode(
        forward.model, forward.cache, forward.working, recorder_for(device), max_rows=max_rows
    )
