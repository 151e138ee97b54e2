"""dattri's methods (Deng et al., arXiv:2410.04555) on our LoRA matrices. Imports it at once.

dattri lets a subclass make the gradients, and works on from there. We hand it the same exact
per-example gradients that every other method here gets, matrix by matrix, so that what differs is
the method alone (and no functorch transform has to trace a transformer).

DataInf (Kwon et al., arXiv:2310.00902) wants one damping per matrix: its paper's rule is a tenth of
the mean squared gradient entry. dattri takes one number for all, so each matrix gets an attributor
of its own, and their scores are summed, which is what DataInf defines.

Not here: dattri's own EK-FAC. In 0.3.0 `estimate_covariance` reads a variable that it only sets for
inputs without a sequence axis, so it raises on a transformer.
"""

from typing import Any

import numpy as np
import torch
from dattri.algorithm import IFAttributorDataInf
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from workers.attribution.gradients import lora_sites
from workers.evaluation.scene import Scene, gradients

Floats = NDArray[np.float64]
DAMPING = 0.1
"""Of a matrix's mean squared gradient entry: the rule of DataInf's paper and code."""


class _Task:
    """What DataInf asks of a task: one checkpoint, one layer of `width` parameters."""

    def __init__(self, width: int) -> None:
        self.width = width

    def get_checkpoints(self) -> list[None]:
        return [None]

    def get_param(self, ckpt_idx: int, *, layer_split: bool = False) -> Any:
        return (torch.zeros(self.width),), [0]


class _DataInf(IFAttributorDataInf):
    """DataInf over gradients that are there already: a "datum" is a gradient."""

    def generate_train_rep(self, ckpt_idx: int, data: tuple[Tensor, ...]) -> Tensor:
        return data[0].squeeze(0)


def datainf(scene: Scene, *, damping: float = DAMPING) -> Floats:
    """(queries, rows): DataInf with empirical Fisher, per matrix, as published."""
    asked, seen = gradients(scene)
    total = torch.zeros(len(asked), len(seen))
    start = 0
    for site in lora_sites(scene.model):
        columns = slice(start, start + site.rows * site.cols)
        start = columns.stop
        rows, queries = seen[:, columns], asked[:, columns]
        scale = float(rows.square().mean())
        if scale > 0:  # a matrix without gradients has no influence
            attributor = _DataInf(_Task(rows.shape[1]), regularization=damping * scale)
            attributor.cache(DataLoader(TensorDataset(rows), batch_size=len(rows)))
            total += attributor.transform_test_rep(0, queries) @ rows.T
    return total.double().numpy()
