"""Decode steps of a few fixed shapes, recorded once and replayed.

A decode step launches a thousand small kernels; on a GPU the launching can take longer than the
work. A CUDA graph launches them at once, but only as they were: the same shapes, the same
addresses. So the batch is padded to the next *bucket* of rows and attention to the next bucket of
positions, what varies is copied into buffers that stay where they are (`DecodeInputs`), and a step
whose shape has a recording replays it (`DecodeRunner`). Which adapters the rows have is one of
those buffers: a change of adapters needs no new recording.

`CudaRecorder` is all that is specific to CUDA. `DirectRecorder` calls the function instead of
recording it: with it the same buffers, padding, buckets and invalidation run on a CPU, in tests.

Source: "CUDA Graphs" in PyTorch's notes (warm-up on a side stream, one memory pool, whole-network
capture). Recording and replay both happen in the engine's inference mode.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.openlora.logs import get_logger

log = get_logger(__name__)

MIN_LENGTH = 64
"""Smallest bucket of positions."""
MAX_RECORDINGS = 96
"""Shapes kept; the least recently replayed one gives way."""
PAUSE_STEPS = 256
"""Unrecorded steps after memory ran out in recording one, before it is tried again."""
WARM_UPS = 2
"""Runs before a capture: libraries choose algorithms and allocate workspaces in the first."""


def bucket(n: int, limit: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is `n` or more, at most `limit`.

    So padding adds half at most, a third once n > 2 in the worst case just above a power of two.
    """
    assert 1 <= n <= limit, (n, limit)
    power = 1 << (n - 1).bit_length()
    middle = power * 3 // 4
    return min(limit, middle if power >= 4 and n <= middle else power)


def length_bucket(length: int, limit: int) -> int:
    """As `bucket`, from `MIN_LENGTH` on."""
    return bucket(max(length, min(MIN_LENGTH, limit)), limit)


class Recorder(Protocol):
    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What repeats `function` on whatever its input buffers hold then; its result may be
        overwritten by the next repeat. `function` may run any number of times here."""
        ...

    def reset(self) -> None:
        """Nothing recorded before is repeated again: its memory may be given back."""
        ...


class DirectRecorder:
    """No recording: the function itself. For devices without graphs."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return function

    def reset(self) -> None:
        """Nothing is kept."""


class CudaRecorder:
    """CUDA graphs that share one memory pool. Not reached without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.reset()

    def reset(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads (a client's, the driver's) may call CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeInputs:
    """What a decode step reads, at fixed addresses: one int64 tensor, one copy per step.

    Rows beyond the real ones are padding: token 0 at position 0 without an adapter, whose keys and
    values go to `trash`, the position that nobody reads.
    """

    def __init__(self, max_rows: int, trash: int, device: torch.device) -> None:
        self._trash = trash
        self._host = torch.zeros(4, max_rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(4, max_rows, dtype=torch.int64, device=device)

    def load(
        self, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], rows: int
    ) -> None:
        """One number per real row in each; `rows` is the padded count."""
        n = len(ids)
        for line, values, padding in (
            (0, ids, 0),
            (1, positions, 0),
            (2, positions, self._trash),
            (3, slots, -1),
        ):
            self._host[line, :n] = torch.tensor(values)
            self._host[line, n:rows] = padding
        # Blocking on purpose: the next step may not write over numbers that are still to be read.
        self._device[:, :rows].copy_(self._host[:, :rows])

    def view(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, positions, writes and slots, each (rows,); always the same memory."""
        ids, positions, writes, slots = self._device[:, :rows]
        return ids, positions, writes, slots


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one recording is for. `lora`: does any row have an adapter?"""

    rows: int
    length: int
    lora: bool


@dataclass(kw_only=True)
class RunnerStats:
    """Counts since start."""

    recorded: int = 0
    replayed: int = 0
    eager: int = 0
    """Steps that ran without a recording, which had failed."""
    invalidated: int = 0
    """Times that all recordings were void because memory they read had moved."""


class DecodeRunner:
    """Runs `step(shape)` -> logits (shape.rows, vocab), replaying it where it was recorded."""

    def __init__(
        self, step: Callable[[Shape], Tensor], recorder: Recorder, *, max_rows: int, max_len: int
    ) -> None:
        self.stats = RunnerStats()
        self._step = step
        self._recorder: Recorder | None = recorder
        self._max_rows = max_rows
        self._max_len = max_len
        self._recordings: OrderedDict[Shape, Callable[[], Tensor]] = OrderedDict()
        self._memory: Hashable = None
        self._pause = 0

    def shape(self, *, rows: int, length: int, lora: bool) -> Shape:
        """The padded shape of a step of `rows` rows whose longest has `length` positions."""
        return Shape(
            rows=bucket(rows, self._max_rows),
            length=length_bucket(length, self._max_len),
            lora=lora,
        )

    def run(self, shape: Shape, memory: Hashable) -> Tensor:
        """Logits (shape.rows, vocab), valid until the next run.

        `memory` names the tensors that `step` reads beside its inputs (slots, keys and values).
        When it is not what it was, every recording is void.
        """
        if memory != self._memory:
            if self._recordings:
                self.stats.invalidated += 1
                self.clear()
            self._memory = memory
        repeat = self._recordings.get(shape)
        if repeat is None:
            repeat = self._record(shape)
        else:
            self._recordings.move_to_end(shape)
        if repeat is None:
            self.stats.eager += 1
            return self._step(shape)
        self.stats.replayed += 1
        return repeat()

    def clear(self) -> None:
        self._recordings.clear()
        if self._recorder is not None:
            self._recorder.reset()

    def _record(self, shape: Shape) -> Callable[[], Tensor] | None:
        """None when this machine or model cannot: then, and from then on, steps run unrecorded.
        None for a while when there is no memory for it.

        The step is repeatable: it writes keys and values that depend on its inputs alone.
        """
        if self._recorder is None:
            return None
        if self._pause:
            self._pause -= 1
            return None
        try:
            repeat = self._recorder.record(lambda: self._step(shape))
        except torch.OutOfMemoryError:
            log.warning("openlora has no memory to record a decode step", shape=shape)
            self.clear()
            self._pause = PAUSE_STEPS
            return None
        except Exception as e:  # capture fails in as many ways as there are kernels
            log.warning("openlora decodes without graphs", reason=f"{type(e).__name__}: {e}")
            self.clear()
            self._recorder = None
            return None
        if len(self._recordings) >= MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        self._recordings[shape] = repeat
        self.stats.recorded += 1
        return repeat
