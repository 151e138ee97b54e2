"""Before it serves, an engine shows that it computes what the model computes.

Model families differ in what they make of a 4D mask, of positions and of a cache; a list of known
names would be out of date with the next release. So every engine reads two short sequences of
different lengths in chunks, in one padded batch, makes a token for both, and compares the logits
with those of the model alone on each sequence. What short sequences cannot show (sliding windows,
position scaling by length) `models` refuses by configuration.

The same forwards show how each target linear is called. One that is not given (rows, tokens) of
everything in order (an expert that sees some of the tokens, a weight that is used without its
module) cannot get a row's own adapter: it is no target, and adapters for it are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ledger.errors import ConfigError
from workers.openlora.forward import Forward, StaticDecode
from workers.openlora.layers import LoraLinear
from workers.openlora.memory import is_out_of_memory

LENGTHS = (9, 6)
"""Tokens of the two sequences, one less than the engine's window at most; read 5 at a time."""
CHUNK = 5
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
HALF_TOLERANCE = 0.1
"""Largest difference of a logit over the spread of the logits. What is wrong differs by about 1;
half precision by a few hundredths."""


def self_check(
    forward: Forward, decoder: Forward | StaticDecode, max_rows: int, vocab: int
) -> set[str]:
    """The targets that adapters may have. Raises ConfigError when the logits are not the model's,
    or when there is no memory for the key-value pool."""
    most = forward.cache.max_len - 1
    lengths = [min(n, most) for n in LENGTHS[:max_rows]]
    sequences = [[(7 * i + 3 * row + 1) % vocab for i in range(n)] for row, n in enumerate(lengths)]
    try:
        with torch.inference_mode(), watched(forward.model) as calls:
            ours = _read(forward, sequences, calls)
            nexts = [row.argmax().item() for row in ours]
            ours += list(forward.decode([int(t) for t in nexts], lengths))
            calls.rows_tokens = None
            if decoder is not forward:
                ours += [row.clone() for row in decoder.decode([int(t) for t in nexts], lengths)]
            expected = _alone(forward.model, sequences, [int(t) for t in nexts])
    except Exception as e:
        if is_out_of_memory(e):
            raise ConfigError(
                f"no memory for {forward.cache.max_rows} rows of {forward.cache.max_len} tokens; "
                "lower max_rows, max_len or prefix_rows"
            ) from e
        raise ConfigError(
            f"{type(forward.model).__name__} cannot be served: a batch of rows of different "
            f"lengths fails with {type(e).__name__}: {e}"
        ) from e
    expected += expected[len(lengths) :] if decoder is not forward else []
    for mine, reference in zip(ours, expected, strict=True):
        _compare(forward.model, mine, reference)
    return calls.served


def _read(forward: Forward, sequences: list[list[int]], calls: "Calls") -> list[Tensor]:
    """The logits after each whole sequence, read in chunks and in one batch."""
    last: dict[int, Tensor] = {}
    for start in range(0, max(map(len, sequences)), CHUNK):
        counts = [max(0, min(CHUNK, len(s) - start)) for s in sequences]
        width = max(counts)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        writes = torch.full_like(ids, forward.cache.max_len)
        for row, (s, n) in enumerate(zip(sequences, counts, strict=True)):
            ids[row, :n] = torch.tensor(s[start : start + n])
            positions[row] = start + torch.arange(width).clamp(max=max(n - 1, 0))
            writes[row, :n] = positions[row, :n]
        calls.rows_tokens = (len(sequences), width)
        logits = forward(0, len(sequences), ids, positions, writes, width)
        for row, (s, n) in enumerate(zip(sequences, counts, strict=True)):
            if n and start + n == len(s):
                last[row] = logits[row, n - 1].clone()
    calls.rows_tokens = (len(sequences), 1)
    return [last[row] for row in range(len(sequences))]


def _alone(model: Any, sequences: list[list[int]], nexts: list[int]) -> list[Tensor]:
    """The model's own logits: after each sequence, then after its next token too."""
    device = next(model.parameters()).device
    logits = [
        model(input_ids=torch.tensor([[*s, t]], device=device), use_cache=False).logits[0]
        for s, t in zip(sequences, nexts, strict=True)
    ]
    return [row[-2] for row in logits] + [row[-1] for row in logits]


def _compare(model: nn.Module, mine: Tensor, reference: Tensor) -> None:
    a, b = mine.double().cpu(), reference.double().cpu()
    spread = float(b.max() - b.min()) or 1.0
    error = float((a - b).abs().max()) / spread
    allowed = TOLERANCE.get(reference.dtype, HALF_TOLERANCE)
    if not error <= allowed:  # NaN is not
        raise ConfigError(
            f"{type(model).__name__} would be served wrongly: in a batch its logits differ from "
            f"its own by {error:.2g} of their spread, {allowed:g} is allowed"
        )


class Calls:
    """How the target linears are called while `rows_tokens` is the shape of the batch."""

    def __init__(self) -> None:
        self.rows_tokens: tuple[int, int] | None = None
        self.seen: set[str] = set()
        self.wrong: set[str] = set()

    def note(self, name: str, x: Tensor) -> None:
        if self.rows_tokens is None:
            return
        rows, tokens = self.rows_tokens
        self.seen.add(name)
        if tuple(x.shape[:-1]) not in ((rows, tokens), (rows * tokens,)):
            self.wrong.add(name)

    @property
    def served(self) -> set[str]:
        return self.seen - self.wrong


@contextmanager
def watched(model: nn.Module) -> Iterator[Calls]:
    calls = Calls()
    handles = [
        module.register_forward_pre_hook(
            lambda linear, args: calls.note(str(linear.target), args[0])
        )
        for module in model.modules()
        if isinstance(module, LoraLinear)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
