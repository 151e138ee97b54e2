"""Answers of the ledger through the attribution room: what the Ray actor runs, without Ray.

Fetches what an attribution needs (run, index, adapter, transcript, terms), hash-checked and kept,
and takes answers several at a time: one backward pass and one scan of the index for a batch. One
answer that cannot be attributed never holds up the others.

An answer that cannot be attributed at all (blank, or a run without an index) gets method NONE
with everything unattributed, and the evidence says why.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from ledger.client import Client
from ledger.domain.canonical import parse_canonical
from ledger.domain.ids import sha256_hex
from ledger.domain.money import PPM_WHOLE
from ledger.domain.transcript import words_of
from ledger.errors import ConfigError, Inconsistent, InvalidEvent, LedgerError
from workers import base_model
from workers.artefacts import ADAPTER_CONFIG, ADAPTER_FILE, ArtefactCache
from workers.attribute import Attributed
from workers.attribution.evidence import NONE_METHOD, evidence_of, none_document
from workers.attribution.index import Index, load_index
from workers.attribution.query import (
    conclude_from_scores,
    context_of,
    encode_answer,
    scores_from_sketches,
    sketch_examples,
)
from workers.attribution.terms import Terms
from workers.evidence_lane import EvidenceLane
from workers.link import plain_uuid
from workers.training.data import Example, pad_id

log = structlog.get_logger(__name__)

MAX_MODELS = 16
MAX_INDEXES = 16


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """An answer that can be attributed: its place in the batch, its text, and its tokens."""

    place: int
    inference: str
    answer: str
    example: Example


class Influence:
    """One base model, and the adapters and indexes in use on top. For one thread."""

    def __init__(self, client: Client, home: Path, base_path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._client = client
        self._cache = ArtefactCache(client, home / "cache")
        self._lane = EvidenceLane(client, home / "cache")
        self._digest = base_model.digest(base_path)
        self._base, self._tokenizer = base_model.load(base_path)
        self._model: Any = None
        self._models: OrderedDict[str, None] = OrderedDict()
        self._indexes: OrderedDict[str, Index] = OrderedDict()

    def attribute(self, inferences: Sequence[Mapping[str, Any]]) -> list[Attributed | LedgerError]:
        """Attribute answers of *one* adapter, as the ledger lists them; a result for each.

        Raises NotFound, Unavailable, Inconsistent when something that all need cannot be had now,
        ConfigError for an adapter of another base model; what only one of them lacks is that one's
        result.
        """
        adapter = self._client.get(f"/v1/adapters/{plain_uuid(inferences[0]['adapter'])}")
        run = self._client.get(f"/v1/runs/{adapter['run']}")
        if not run.get("index_sha256"):
            nobody = _nobody(run, "the run recorded no attribution index")
            return [nobody] * len(inferences)
        if run["base_model"] != self._digest:
            raise ConfigError(
                f"run {run['run']} is on base model {run['base_model']}, these workers have "
                f"{self._digest}: its answers wait for workers started with that one"
            )
        index = self._index_of(run["index_sha256"])
        model = self._model_of(run)
        terms = Terms.from_dict(self._client.get(f"/v1/runs/{run['run']}/terms"))
        results: dict[int, Attributed | LedgerError] = {}
        asked: list[_Asked] = []
        for place, inference in enumerate(inferences):
            try:
                asked.append(self._read(place, inference))
            except InvalidEvent as error:
                results[place] = _nobody(run, error.message)
            except LedgerError as error:
                results[place] = error
        if asked:
            self._conclude(asked, run, index, model, terms, results)
        return [results[place] for place in range(len(inferences))]

    def _conclude(
        self,
        asked: list[_Asked],
        run: Mapping[str, Any],
        index: Index,
        model: Any,
        terms: Terms,
        results: dict[int, Attributed | LedgerError],
    ) -> None:
        examples = [one.example for one in asked]
        sketches = sketch_examples(model, index, examples, pad_id(self._tokenizer))
        scores = scores_from_sketches(index, sketches)
        for one, sketch, row_scores in zip(asked, sketches, scores, strict=True):
            found = conclude_from_scores(index, sketch, row_scores, terms=terms)
            spans = self._lane.document(
                run, index.manifest_sha256, one.answer, withdrawn=terms.withdrawn
            )
            results[one.place] = Attributed(
                run=str(run["run"]),
                method=found.method,
                index_sha256=found.index_sha256,
                shares=found.shares,
                unattributed_ppm=found.unattributed_ppm,
                evidence=evidence_of(found, one.inference, spans=spans).to_bytes(),
            )

    def _read(self, place: int, inference: Mapping[str, Any]) -> _Asked:
        """InvalidEvent for an answer without tokens, or longer than the model reads."""
        messages, answer = self._transcript(str(inference["transcript_sha256"]))
        example = encode_answer(self._tokenizer, messages, answer, max_len=context_of(self._base))
        return _Asked(
            place=place, inference=str(inference["inference"]), answer=answer, example=example
        )

    def _transcript(self, sha256: str) -> tuple[list[dict[str, str]], str]:
        """Messages and output. Inconsistent, so tried again, for bytes that are not what the event
        names: a damaged blob must not make an answer nobody's for good."""
        data = self._client.get_blob(sha256)
        try:
            if sha256_hex(data) != sha256:
                raise Inconsistent(f"the ledger's blob {sha256} hashes to something else")
            return words_of(parse_canonical(data))
        except (InvalidEvent, KeyError, TypeError) as error:
            raise Inconsistent(f"the transcript {sha256} is of another form") from error

    def _index_of(self, sha256: str) -> Index:
        if sha256 not in self._indexes:
            folder = self._cache.index(sha256)
            try:
                self._indexes[sha256] = load_index(folder, manifest_sha256=sha256)
            except LedgerError:
                self._cache.drop(folder)
                raise
            while len(self._indexes) > MAX_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(sha256)
        return self._indexes[sha256]

    def _model_of(self, run: Mapping[str, Any]) -> Any:
        """The base with the run's adapter active, out of at most MAX_MODELS that stay loaded."""
        name = str(run["adapter_sha256"])
        if name not in self._models:
            folder = str(self._adapter_of(run))
            if self._model is None:
                self._model = base_model.with_adapter(self._base, folder, name=name)
            else:
                self._model.load_adapter(folder, adapter_name=name)
            self._models[name] = None
        self._models.move_to_end(name)
        self._model.set_adapter(name)
        while len(self._models) > MAX_MODELS:
            oldest, _ = self._models.popitem(last=False)
            self._model.delete_adapter(oldest)
        self._model.eval()
        return self._model

    def _adapter_of(self, run: Mapping[str, Any]) -> Path:
        """Raises Inconsistent, and forgets the copy, when its bytes are not the recorded ones."""
        wanted = {
            ADAPTER_FILE: run["adapter_sha256"],
            ADAPTER_CONFIG: run["adapter_config_sha256"],
        }
        folder = self._cache.adapter(wanted[ADAPTER_FILE], wanted[ADAPTER_CONFIG])
        try:
            damaged = [n for n, s in wanted.items() if sha256_hex((folder / n).read_bytes()) != s]
        except OSError:
            damaged = list(wanted)
        if damaged:
            self._cache.drop(folder)
            raise Inconsistent(f"{folder}: {', '.join(damaged)} is damaged; it is fetched again")
        return folder


def _nobody(run: Mapping[str, Any], reason: str) -> Attributed:
    return Attributed(
        run=str(run["run"]),
        method=NONE_METHOD,
        index_sha256=str(run.get("index_sha256") or "00" * 32),
        shares=[],
        unattributed_ppm=PPM_WHOLE,
        evidence=none_document(reason),
    )
