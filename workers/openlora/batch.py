"""The model's work of one step: a chunk of prompts, then a token for every running row.

Computes first and changes the rows afterwards, so that work that ran out of memory can be tried
again in smaller parts (`memory`). Knows tokens and rows; what an answer is, and when it ends, is
the engine's. Belongs to the engine's step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ledger.errors import ComputeError, LedgerError
from workers.openlora.forward import Forward, StaticDecode
from workers.openlora.memory import Allowance, is_out_of_memory, no_memory_for, with_memory
from workers.openlora.prefixes import PrefixReuse
from workers.openlora.requests import EngineConfig
from workers.openlora.rows import Row, Rows
from workers.openlora.sampling import LOST, Draw, TokenLogprob, choose, logprobs


@dataclass(frozen=True, kw_only=True)
class Made:
    """A row's next token, or why there is none."""

    row: Row
    token: int = LOST
    logprob: TokenLogprob | None = None
    failure: LedgerError | None = None


class Batch:
    """Rows, the model, and the memory that they need. `shed` gives back what can be spared."""

    def __init__(
        self,
        forward: Forward,
        decoder: Forward | StaticDecode,
        rows: Rows,
        prefixes: PrefixReuse,
        config: EngineConfig,
        shed: Callable[[], int],
    ) -> None:
        self.rows = rows
        self.forward = forward
        self._decoder = decoder
        self._prefixes = prefixes
        self._chunk = config.prefill_chunk
        self._shed = shed
        self.prefill_tokens = Allowance(config.prefill_tokens)
        self.decode_rows = Allowance(config.max_rows)

    # --- prompts ---

    def read(self) -> tuple[list[int], list[Made]]:
        """One chunk of prompt for the rows that are first in line: tokens read per row, and the
        first tokens of the rows whose prompts are read now. Those have joined the decoding part."""
        lo = self.rows.decoding
        ready = self._prefixes.ready(self.rows.all, lo)
        tried = False
        while True:
            counts = self._share(lo, ready)
            try:
                made = self._read(lo, counts)
                break
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
            if not tried:
                self._shed()
                tried = True
            elif not self.prefill_tokens.halve():
                failure = no_memory_for("the prompt of this request")
                return [], [Made(row=self.rows.all[lo], failure=failure)]
        self.prefill_tokens.worked()
        for r, n in zip(self.rows.all[lo:], counts, strict=False):
            r.cached += n
        return counts, self._promote(lo, made)

    def _share(self, lo: int, ready: int) -> list[int]:
        """Prompt tokens of rows [lo, ...) for this step."""
        allowed = self.prefill_tokens.now
        width = max(r.prefill_left for r in self.rows.all[lo:ready])
        width = min(width, self._chunk, allowed)
        hi = min(ready, lo + max(1, allowed // width))
        return [min(r.prefill_left, width) for r in self.rows.all[lo:hi]]

    def _read(self, lo: int, counts: Sequence[int]) -> list[Made]:
        rows = self.rows.all[lo : lo + len(counts)]
        width = max(counts)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (r, n) in enumerate(zip(rows, counts, strict=True)):
            ids[i, :n] = torch.tensor(r.prefill[r.cached : r.cached + n])
        column = torch.arange(width)[None]
        count = torch.tensor(counts)[:, None]
        start = torch.tensor([r.cached for r in rows])[:, None]
        # Padding repeats the row's last position for the model and writes where nobody reads.
        positions = start + torch.minimum(column, count - 1)
        writes = torch.where(column < count, positions, self.rows.cache.max_len)
        ends = [i for i, (r, n) in enumerate(zip(rows, counts, strict=True)) if r.prefill_left == n]
        wanted = sorted({counts[i] - 1 for i in ends}) or [0]
        hi = lo + len(rows)
        logits = self.forward(lo, hi, ids, positions, writes, torch.tensor(wanted))
        if not ends:
            return []
        where = [wanted.index(counts[i] - 1) for i in ends]
        return make_tokens(logits[ends, where], [rows[i] for i in ends])

    def _promote(self, lo: int, made: list[Made]) -> list[Made]:
        """Rows in ascending order: each goes to the end of the decoding part, never past itself."""
        out: list[Made] = []
        at = {id(r): i for i, r in enumerate(self.rows.all[lo:], start=lo)}
        for m in made:
            promote = partial(self.rows.promote, at[id(m.row)])
            try:
                with_memory(promote, self._shed, "the row of this request")
                out.append(m)
            except ComputeError as e:
                out.append(Made(row=m.row, failure=e))
        return out

    # --- answers ---

    def write(self) -> list[Made]:
        """The next token of every row whose prompt is in the cache."""
        rows = self.rows.all[: self.rows.decoding]
        made: list[Made] = []
        tried = False
        while len(made) < len(rows):
            lo = len(made)
            hi = min(len(rows), lo + self.decode_rows.now)
            try:
                made += self._write(lo, hi)
                continue
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
            if not tried:
                self._shed()
                tried = True
            elif not self.decode_rows.halve():
                made.append(Made(row=rows[lo], failure=no_memory_for("this request")))
        self.decode_rows.worked()
        for m in made:
            m.row.cached += m.failure is None
        return made

    def _write(self, lo: int, hi: int) -> list[Made]:
        rows = self.rows.all[lo:hi]
        ids, positions = [r.output[-1] for r in rows], [r.cached for r in rows]
        if hi - lo == self.rows.decoding:
            return make_tokens(self._decoder.decode(ids, positions), rows)
        return make_tokens(self.forward.decode(ids, positions, lo=lo), rows)


def make_tokens(logits: Tensor, rows: Sequence[Row]) -> list[Made]:
    """One token per row from its `logits` (rows, vocab), with its chances where they are wanted."""
    tokens = choose(logits, [draw_of(r) for r in rows])
    asked = [i for i, r in enumerate(rows) if r.request.logprobs is not None and tokens[i] != LOST]
    chances: dict[int, TokenLogprob] = {}
    if asked:
        tops = [rows[i].request.logprobs or 0 for i in asked]
        found = logprobs(logits[asked], [tokens[i] for i in asked], tops)
        chances = dict(zip(asked, found, strict=True))
    return [
        Made(row=r, token=token, logprob=chances.get(i))
        if token != LOST
        else Made(row=r, failure=_not_a_number(r))
        for i, (r, token) in enumerate(zip(rows, tokens, strict=True))
    ]


def draw_of(r: Row) -> Draw:
    return Draw(
        temperature=r.request.temperature,
        top_p=r.request.top_p,
        top_k=r.request.top_k,
        seed=r.seed,
        step=len(r.output),
    )


def _not_a_number(r: Row) -> ComputeError:
    whose = f"adapter {r.request.adapter_id!r}" if r.entry else "the base model"
    return ComputeError(
        f"{whose} gives no finite numbers for this prompt; no token can be drawn from them",
        code="not_finite",
    )
