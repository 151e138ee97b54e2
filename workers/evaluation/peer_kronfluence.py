"""kronfluence's EK-FAC (Grosse et al., arXiv:2308.03296) on our LoRA matrices. Imports it at once.

Its best honest configuration: true Fisher (labels sampled from the model, which its task interface
asks for), factors over every training row, padding masked, double-precision eigendecomposition
(its default), full gradients (no low-rank queries), and `damping_factor=None`, its heuristic of 0.1
of the mean eigenvalue. Its other default, 1e-8, is measured beside it: the better one counts.
peft's A and B are plain linear layers, so it tracks them by name; all else is frozen.
"""

import copy
import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.attribution.gradients import lora_sites, loss_sums
from workers.evaluation.scene import Scene
from workers.training.data import IGNORED, Example, collate, pad_id

FACTORS = "ekfac"
BATCH = 16

Batch = dict[str, Tensor]


class AnswerTask(Task):
    """Summed cross entropy over the labelled tokens: the loss that our own index differentiates."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        logits, labels = _logits(batch, model), batch["labels"]
        if sample:
            labels = _sampled(logits, labels)
        return loss_sums(logits, labels).sum()

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        return loss_sums(_logits(batch, model), batch["labels"]).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: Batch) -> Tensor:
        return batch["attention_mask"]


@dataclass
class Fitted:
    """Factors on disk, and the model that kronfluence wrapped (a copy of the scene's)."""

    analyzer: Any
    rows: list[Example]
    seconds: float
    """CPU time of the factors."""

    def scores(
        self, queries: list[Example], *, damping: float | None, query_batch: int = BATCH
    ) -> tuple[NDArray[np.float64], float]:
        """(queries, rows), and the CPU seconds that it took."""
        started = time.process_time()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            self.analyzer.compute_pairwise_scores(
                scores_name="pairwise",
                factors_name=FACTORS,
                query_dataset=queries,
                train_dataset=self.rows,
                per_device_query_batch_size=query_batch,
                per_device_train_batch_size=BATCH,
                score_args=ScoreArguments(damping_factor=damping),
                overwrite_output_dir=True,
            )
        seconds = time.process_time() - started
        found = self.analyzer.load_pairwise_scores("pairwise")["all_modules"]
        return found.double().numpy(), seconds


def fit(scene: Scene) -> Fitted:
    """Fit its factors on all rows of the scene; once for a scene."""
    if "kronfluence" in scene.memo:
        kept: Fitted = scene.memo["kronfluence"]
        return kept
    sites = {id(site.layer) for site in lora_sites(scene.model)}
    names = [name for name, module in scene.model.named_modules() if id(module) in sites]
    task = AnswerTask(names)
    analyzer = Analyzer(
        analysis_name="evaluation",
        model=prepare_model(copy.deepcopy(scene.model), task),
        task=task,
        cpu=True,
        log_level=logging.WARNING,
        disable_tqdm=True,
        output_dir=str(scene.folder / "kronfluence"),
    )
    pad = pad_id(scene.tokenizer)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda part: collate(part, pad)))
    rows = scene.row_examples()
    started = time.process_time()
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(action="ignore", category=FutureWarning),
    ):
        torch.manual_seed(scene.seed)
        analyzer.fit_all_factors(
            factors_name=FACTORS,
            dataset=rows,
            per_device_batch_size=BATCH,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
    fitted = Fitted(analyzer=analyzer, rows=rows, seconds=time.process_time() - started)
    scene.memo["kronfluence"] = fitted
    return fitted


def _logits(batch: Batch, model: nn.Module) -> Tensor:
    out = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    logits: Tensor = out.logits.float()
    return logits


def _sampled(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels drawn from the model wherever a real one stands."""
    wanted = labels[:, 1:] != IGNORED
    with torch.no_grad():
        drawn = torch.multinomial(logits[:, :-1][wanted].softmax(dim=-1), 1).squeeze(1)
    sampled = torch.full_like(labels, IGNORED)
    sampled[:, 1:][wanted] = drawn
    return sampled
