"""Which form the LoRA arithmetic takes on which device, decided once per engine.

`working_set` copies each row's adapter next to its batch row (`layers`); on a CPU that is fastest.
`slot_gather` reads the slots where they lie (`gather`), which is what a GPU wants and what steps of
fixed shape (`graphs`) need. Both run on either device, so tests on a CPU drive the GPU's path
through the whole engine: torch's kernels in place of Triton's, a call in place of a replay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ledger.errors import ConfigError
from workers.openlora import kernels
from workers.openlora.adapter import AdapterWeights, TargetShape
from workers.openlora.gather import GroupedSlots, SlotGather
from workers.openlora.graphs import CudaRecorder, DirectRecorder, Recorder
from workers.openlora.layers import LoraContext, WorkingSet
from workers.openlora.slots import AdapterEntry, SlotTensors

WORKING_SET, SLOT_GATHER = "working_set", "slot_gather"


class LoraForm(Protocol):
    """Which adapter each batch row has, and how the wrapped linears come to know it."""

    context: LoraContext
    fills: int
    last_form: str

    def fill(self, row: int, key: AdapterEntry | None, weights: AdapterWeights | None) -> None:
        """Give `row` a placed adapter; None makes it a row of the base model."""
        ...

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        ...

    def swap(self, one: int, other: int) -> None: ...

    def bind(self, lo: int, hi: int, tokens: int) -> None:
        """The next forward is for rows [lo, hi), each with `tokens` positions."""
        ...

    def unbind(self) -> None:
        """The base model alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`lora_form` and `static_decode` of `EngineConfig`, with what was left open decided."""

    form: str
    static_decode: bool


def plan(lora_form: str | None, static_decode: bool | None, device: torch.device) -> Plan:
    """By device where None. Raises ConfigError for an unknown form, or a fixed shape without slots
    that stay where they are."""
    form = lora_form or (SLOT_GATHER if device.type == "cuda" else WORKING_SET)
    if form not in (WORKING_SET, SLOT_GATHER):
        raise ConfigError(f"lora_form is {WORKING_SET!r} or {SLOT_GATHER!r}, not {form!r}")
    if static_decode and form != SLOT_GATHER:
        raise ConfigError(f"static_decode needs lora_form {SLOT_GATHER!r}")
    if static_decode is None:
        static_decode = form == SLOT_GATHER and device.type == "cuda"
    return Plan(form=form, static_decode=static_decode)


def build(
    form: str,
    shapes: Mapping[str, TargetShape],
    context: LoraContext,
    *,
    max_rows: int,
    slots: int,
    max_rank: int,
    like: Tensor,
    lora_kernels: str | None = None,
) -> tuple[LoraForm, SlotTensors]:
    """The form, and the slots that it reads. `lora_kernels`: see `kernels.for_device`."""
    if form == WORKING_SET:
        tensors = SlotTensors(shapes, count=slots, max_rank=max_rank, like=like)
        return WorkingSet(shapes, max_rows, context, like=like), tensors
    grouped = GroupedSlots(shapes, count=slots, max_rank=max_rank, like=like)
    chosen = kernels.for_device(like.device, like.dtype, lora_kernels)
    return SlotGather(grouped, max_rows, context, chosen), grouped


def recorder_for(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else DirectRecorder()
