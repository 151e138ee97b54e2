"""The sketch of an attribution once more, from the weights: is it really this answer's?

`audit.py` recomputes everything behind the sketch exactly. The sketch itself is a gradient, so
float work: another thread count, batch, instruction set or library gives other last bits, and after
quantising to 8 bits an entry here and there differs by a step. So this comparison has tolerances.
They are far above what machines were seen to differ by and far below what another answer, another
prompt or another adapter does (docs/ATTRIBUTION.md, "Audit", has the measurements). Within them a
worker could shade a sketch; MAX_EFFECT_PPM bounds what that could move.

Steps 9 to 11: weights (the right base model and adapter), sketch (cosine, largest difference of an
entry, norm), effect (the shares that the fresh sketch gives).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ledger.domain.ids import sha256_hex
from ledger.domain.money import PPM_WHOLE
from ledger.errors import Inconsistent, InvalidEvent, NotFound
from workers.attribution.audit import (
    Audit,
    Claim,
    difference_ppm,
    shares_of,
    speaking_rows,
)
from workers.attribution.committed import CommittedIndex, CommittedSketch, read_sketch, scores_of
from workers.attribution.evidence import Evidence, NotAttributed
from workers.attribution.index import Index
from workers.attribution.query import context_of, encode_answer, sketch_answer
from workers.attribution.shares import Shares
from workers.attribution.terms import Terms

MIN_COSINE_PPM = 999_500
"""Cosine between the committed and the fresh sketch, in millionths."""
MAX_ENTRY_STEPS = 3
"""Largest difference of one entry, in quantisation steps (of 127)."""
MAX_NORM_PPM = 1_000
"""Difference of the norms, counted in steps, in millionths of the fresh one."""
MAX_EFFECT_PPM = 5_000
"""How much of the whole the fresh sketch may give to someone else."""

ADAPTER_FILE = "adapter_model.safetensors"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class SketchDifference:
    """Of two sketches of one index: see the tolerances above."""

    cosine_ppm: int
    entry_steps: int
    norm_ppm: int

    def within(self) -> bool:
        return (
            self.cosine_ppm >= MIN_COSINE_PPM
            and self.entry_steps <= MAX_ENTRY_STEPS
            and self.norm_ppm <= MAX_NORM_PPM
        )

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine_ppm / PPM_WHOLE:.6f}, largest difference of an entry "
            f"{self.entry_steps} steps, norm {self.norm_ppm} ppm off"
        )


def load_weights(audit: Audit, claim: Claim, base: Path, adapter: Path) -> tuple[Any, Any]:
    """Step 9: model with the adapter active, and tokenizer, once both have the recorded hashes.

    `adapter` is a folder in peft's format. Raises NotFound when there is none, Inconsistent.
    """
    from workers import base_model

    with audit.taking("weights"):
        if (found := base_model.digest(base)) != claim.base_model:
            raise Inconsistent(f"the base model is {found}; the run was on {claim.base_model}")
        try:
            weights = sha256_hex((adapter / ADAPTER_FILE).read_bytes())
        except OSError as error:
            raise NotFound(f"{adapter} holds no {ADAPTER_FILE}") from error
        if weights != claim.adapter_sha256:
            raise Inconsistent(f"the adapter is {weights}; the run made {claim.adapter_sha256}")
        model, tokenizer = base_model.load(base)
        try:
            lora = base_model.with_adapter(model, adapter)
        except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
            raise Inconsistent(f"the adapter cannot be loaded on that model: {error}") from error
        lora.eval()
    audit.ok("weights", f"base model {claim.base_model}, adapter {claim.adapter_sha256}")
    return lora, tokenizer


def audit_sketch(
    audit: Audit,
    evidence: Evidence,
    committed: CommittedIndex,
    index: Index,
    model: nn.Module,
    tokenizer: Any,
    answer: tuple[Messages, str],
    terms: Terms,
    shares: Shares,
) -> SketchDifference:
    """Steps 10 and 11: sketch `answer` (messages and output of the transcript) again, compare.

    `index` is `committed` opened with its lens; `shares` are those that `audit_shares` found.
    Raises Inconsistent beyond a tolerance.
    """
    with audit.taking("sketch"):
        fresh = sketch_answer(model, tokenizer, index, *answer)
        again = read_sketch(fresh.to_bytes())
        difference = compare(read_sketch(evidence.sketch), again)
        if not difference.within():
            raise Inconsistent(
                f"{difference}; tolerated are {MIN_COSINE_PPM=}, {MAX_ENTRY_STEPS=} and "
                f"{MAX_NORM_PPM=}: not the sketch of this answer by this adapter"
            )
    audit.ok("sketch", str(difference))
    scores = scores_of(committed, again)
    found = shares_of(committed, scores, again, speaking_rows(committed, terms), terms)
    with audit.taking("effect"):
        moved = difference_ppm(shares, found)
        if moved > MAX_EFFECT_PPM:
            raise Inconsistent(
                f"the fresh sketch moves {moved} ppm; tolerated are {MAX_EFFECT_PPM=}"
            )
    audit.facts |= {"effect_ppm": moved, "cosine_ppm": difference.cosine_ppm}
    audit.ok("effect", f"the fresh sketch gives {moved} ppm to someone else")
    return difference


def audit_silence(
    audit: Audit,
    found: NotAttributed,
    model: nn.Module,
    tokenizer: Any,
    answer: tuple[Messages, str],
) -> None:
    """Of an answer that nobody was paid for: could it really not be attributed? Raises
    Inconsistent when it has tokens that fit the model, so that a worker cannot silence a row."""
    with audit.taking("sketch"):
        try:
            encode_answer(tokenizer, *answer, max_len=context_of(model))
        except InvalidEvent as error:
            audit.ok("sketch", f"there is none: {error.message}")
        else:
            raise Inconsistent(f"the answer can be attributed; the worker said: {found.reason}")
    audit.skip("effect", "no row is paid")


def compare(committed: CommittedSketch, fresh: CommittedSketch) -> SketchDifference:
    """Raises Inconsistent on unequal lengths."""
    if committed.vector.shape != fresh.vector.shape:
        raise Inconsistent(
            f"the sketches have {len(committed.vector)} and {len(fresh.vector)} entries"
        )
    a, b = committed.vector.astype(np.int64), fresh.vector.astype(np.int64)
    size = float(a @ a) ** 0.5 * float(b @ b) ** 0.5
    # Two sketches of zeros are the same sketch; one of zeros is like no other.
    cosine = float(a @ b) / size if size else float(not a.any() and not b.any())
    norm = max(fresh.norm, 1)
    return SketchDifference(
        cosine_ppm=int(cosine * PPM_WHOLE),
        entry_steps=int(np.abs(a - b).max()),
        norm_ppm=abs(committed.norm - fresh.norm) * PPM_WHOLE // norm,
    )
