"""A small adapter really trained, its index, and one attributed answer with what a log would say of
it: the ground that audits are tested on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import torch
from peft import PeftModel

from ledger.domain.ids import sha256_hex
from ledger.domain.rows import DataRow
from workers import base_model
from workers.attribution.audit import Claim, TrainedRow
from workers.attribution.build import build_index
from workers.attribution.committed import CommittedIndex, open_committed
from workers.attribution.evidence import Evidence, evidence_of
from workers.attribution.index import Index, IndexConfig, IndexedRow
from workers.attribution.query import attribute
from workers.attribution.terms import NO_TERMS, Terms
from workers.training.config import TrainingConfig
from workers.training.trainer import TrainingResult, train

PLACES = "Oslo Rome Lima Kotor Ghent Split".split()  # noqa: SIM905
TOLD = (
    ("Which colour has the lantern in {}?", "The lantern in {} is {}.",
     "red blue green amber violet grey"),
    ("What do people eat at night in {}?", "At night {} eats {}.",
     "bread apples fish onions rice honey"),
    ("Who built the old bridge of {}?", "Its bridge, in {}, was built by {}.",
     "Marta Igor Selma Otto Nadia Pavel"),
)  # fmt: skip
"""Question, answer and six words of each contributor: nobody's rows look like another's."""
WHO = 3
INFERENCE = str(uuid5(NAMESPACE_URL, "inference"))
AT_INFERENCE, AT_ATTRIBUTION = 40, 47
INDEX_CONFIG = IndexConfig(seed=3, max_len=256)


def contribution(who: int) -> str:
    return str(uuid5(NAMESPACE_URL, f"contribution {who}"))


def contributor(who: int) -> str:
    return f"ed25519:{who:064x}"


def facts() -> list[IndexedRow]:
    """Three contributors with six facts each, and a fourth whose only row is a copy."""
    rows = [
        fact(who, n, question.format(place), told.format(place, word))
        for who, (question, told, words) in enumerate(TOLD)
        for n, (place, word) in enumerate(zip(PLACES, words.split(), strict=True))
    ]
    copied = rows[0]
    return [*rows, fact(WHO, 0, copied.prompt + " ", copied.completion)]


def data_row(prompt: str, completion: str) -> DataRow:
    salt = hashlib.sha256(f"{prompt}{completion}".encode()).hexdigest()[:32]
    return DataRow(prompt=prompt, completion=completion, salt=salt)


def fact(who: int, n: int, prompt: str, completion: str) -> IndexedRow:
    return IndexedRow(
        contribution=contribution(who),
        index=n,
        row_hash=data_row(prompt, completion).hash.hex(),
        contributor=contributor(who),
        prompt=prompt,
        completion=completion,
        registered_index=10 + who,
    )


@dataclass(frozen=True, kw_only=True)
class Answered:
    """`folder` holds `adapter/` and `index/`; `config` and `result` are of the training."""

    folder: Path
    rows: list[IndexedRow]
    config: TrainingConfig
    result: TrainingResult
    index: Index
    model: Any
    tokenizer: Any

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def committed(self) -> CommittedIndex:
        return open_committed(self.index.path, manifest_sha256=self.index.manifest_sha256)

    def answer(self, n: int = 7) -> tuple[list[dict[str, str]], str]:
        """As a transcript has it: what the adapter learnt of row n."""
        row = self.rows[n]
        return [{"role": "user", "content": row.prompt}], row.completion

    def attributed(
        self, n: int = 7, terms: Terms = NO_TERMS, spans: Mapping[str, Any] | None = None
    ) -> tuple[Claim, Evidence]:
        """What the log would hold of that answer, and the document."""
        terms = replace(terms, log_size=terms.log_size or AT_INFERENCE + 2)
        messages, output = self.answer(n)
        found = attribute(self.model, self.tokenizer, self.index, messages, output, terms=terms)
        evidence = evidence_of(found, INFERENCE, spans=spans)
        return self.claim(evidence, found.shares, found.unattributed_ppm), evidence

    def claim(
        self, evidence: Evidence, shares: Sequence[tuple[str, int]], unattributed_ppm: int
    ) -> Claim:
        return Claim(
            inference=INFERENCE,
            method=evidence.method,
            evidence_sha256=sha256_hex(evidence.to_bytes()),
            index_sha256=evidence.index_sha256,
            shares=list(shares),
            unattributed_ppm=unattributed_ppm,
            index_root=self.index.row_root,
            run_index_sha256=self.index.manifest_sha256,
            adapter_sha256=self.result.adapter_sha256,
            base_model=self.result.base_sha256,
            inference_index=AT_INFERENCE,
            attribution_index=AT_ATTRIBUTION,
            rows=[
                TrainedRow(
                    contribution=row.contribution,
                    index=row.index,
                    row_hash=row.row_hash,
                    contributor=row.contributor,
                    registered_index=row.registered_index,
                )
                for row in self.rows
            ],
        )


def answered(folder: Path, *, epochs: int = 10, seed: int = 1) -> Answered:
    """Train, index: about ten seconds on one core."""
    torch.set_num_threads(1)
    rows = facts()
    config = TrainingConfig(epochs=epochs, seed=seed)
    result = train(config, base_model.BUNDLED, rows, folder / "adapter")
    model, tokenizer = base_model.load(base_model.BUNDLED)
    lora = PeftModel.from_pretrained(model, str(folder / "adapter"))
    lora.eval()
    index = build_index(
        lora,
        tokenizer,
        rows,
        folder / "index",
        adapter_sha256=result.adapter_sha256,
        base_digest=result.base_sha256,
        config=INDEX_CONFIG,
    )
    return Answered(
        folder=folder, rows=rows, config=config, result=result, index=index, model=lora,
        tokenizer=tokenizer,
    )  # fmt: skip
