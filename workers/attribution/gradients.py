"""Exact per-example LoRA gradients from one hooked forward and backward pass.

The first layer of the attribution room: it knows torch and PEFT's module layout, and no text, no
files, no contributors. The whole room knows neither Ray nor the network.

A LoRA target holds two bias-free linear layers, A `(rank, in)` and B `(out, rank)`. For a linear
layer y = W x the gradient of one example's loss is the sum over its positions of g xᵀ, where g is
the gradient at y. Attention never crosses examples, so one backward pass of the *summed* loss
leaves in g, position by position, what each example would have had alone: no loop over examples
and no `vmap`. Nothing but the LoRA layers' outputs is differentiated; the base stays frozen, and
no parameter's `.grad` is touched.

Source: Goodfellow, "Efficient per-example gradient computations" (arXiv:1510.01799); the same
capture as kronfluence and LoGra. `tests/unit/test_attribution_gradients.py` holds it against one
autograd call per example.

Not covered, and refused by name: DoRA, LoRA on embeddings or convolutions, LoRA biases, LoRA on
raw parameters, several active adapters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ledger.errors import ComputeError, InvalidEvent
from workers.training.data import IGNORED


@dataclass(frozen=True, kw_only=True)
class Site:
    """One LoRA matrix: `name` is its module path without PEFT's prefix, weight `(rows, cols)`."""

    name: str
    layer: nn.Linear

    @property
    def rows(self) -> int:
        """Output features of the layer."""
        return int(self.layer.weight.shape[0])

    @property
    def cols(self) -> int:
        """Input features of the layer."""
        return int(self.layer.weight.shape[1])


@dataclass
class Tape:
    """What the hooks of one forward pass saw, per site; a layer that runs twice has two entries."""

    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One site after backward: `x` (batch, seq, cols) inputs, `g` (batch, seq, rows) gradients.

    A layer that ran several times has its calls joined along `seq`: the gradient is their sum.
    """

    x: Tensor
    g: Tensor

    def per_example(self) -> Tensor:
        """(batch, rows, cols): the gradient of each example's own loss for this site."""
        return torch.einsum("bto,bti->boi", self.g, self.x)


def lora_sites(model: nn.Module) -> list[Site]:
    """Every LoRA matrix of the model's active adapter, ordered by name.

    Raises InvalidEvent when the model carries no LoRA layer, more than one active adapter, or a
    kind of adapter that this room does not differentiate.
    """
    sites: list[Site] = []
    for name, module in model.named_modules():
        pair_a, pair_b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if getattr(module, "lora_embedding_A", None) and _is_active(module, "lora_embedding_A"):
            raise InvalidEvent(f"{name}: LoRA on an embedding is not attributed; use linear layers")
        if not isinstance(pair_a, nn.ModuleDict) or not isinstance(pair_b, nn.ModuleDict):
            continue
        active = [a for a in _active(module) if a in pair_a]
        if not active:
            continue
        if len(active) > 1:
            raise InvalidEvent(f"{name}: {len(active)} adapters are active; expected one")
        if active[0] in getattr(module, "lora_magnitude_vector", {}):
            raise InvalidEvent(f"{name}: DoRA is not attributed; expected a plain LoRA adapter")
        if getattr(module, "merged", False):
            raise InvalidEvent(f"{name}: the adapter is merged into its base; unmerge it first")
        for label, layers in (("lora_A", pair_a), ("lora_B", pair_b)):
            layer = layers[active[0]]
            if not isinstance(layer, nn.Linear) or layer.bias is not None:
                raise InvalidEvent(f"{name}.{label}: expected a linear layer without bias")
            sites.append(Site(name=f"{_plain(name)}.{label}", layer=layer))
    if not sites:
        raise InvalidEvent("the model has no active LoRA layer: load a PEFT LoRA adapter first")
    return sorted(sites, key=lambda s: s.name)


@contextmanager
def recording(model: nn.Module, sites: Sequence[Site]) -> Iterator[Tape]:
    """Hooks on, parameters frozen, dropout off; all of it undone on the way out.

    The model must not be used by another thread meanwhile.
    """
    tape = Tape(inputs=[[] for _ in sites], outputs=[[] for _ in sites])
    trained = [p for p in model.parameters() if p.requires_grad]
    # Only what must change is touched: an answer's gradient is a few ms, a walk over it another.
    training = [m for m in model.modules() if m.training]

    def hook(index: int) -> Any:
        def record(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # With every parameter frozen the first LoRA output is a leaf: the graph starts here.
            if not output.requires_grad:
                output.requires_grad_(True)
            tape.inputs[index].append(args[0].detach())
            tape.outputs[index].append(output)

        return record

    handles = [s.layer.register_forward_hook(hook(i)) for i, s in enumerate(sites)]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        with torch.enable_grad():
            yield tape
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def forward(model: nn.Module, batch: dict[str, Tensor], tape: Tape) -> Tensor:
    """Logits (batch, seq, vocab) in float32; the tape is emptied first."""
    for calls in (*tape.inputs, *tape.outputs):
        calls.clear()
    out = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    return out.logits.float()  # type: ignore[no-any-return]


def loss_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch,): cross entropy summed over each example's labelled positions.

    Summed, not averaged: an example's pull on the weights grows with what it taught, and the sum
    is minus the log-likelihood of the text, for which Fisher curvature is defined.
    """
    flat = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
    )
    return flat.view(labels.shape[0], -1).sum(dim=1)


def backward(tape: Tape, losses: Tensor, *, keep_graph: bool = False) -> list[Trace]:
    """Gradients of `losses.sum()` at every recorded output: one Trace per site, in site order.

    Raises ComputeError for a gradient that is not finite: such an adapter has no influence to
    measure, and one NaN would otherwise spread over every score.
    """
    flat = [output for calls in tape.outputs for output in calls]
    grads = list(
        torch.autograd.grad(losses.sum(), flat, retain_graph=keep_graph, allow_unused=True)
    )
    traces: list[Trace] = []
    for inputs, outputs in zip(tape.inputs, tape.outputs, strict=True):
        mine, grads = grads[: len(outputs)], grads[len(outputs) :]
        # A layer without a path to the loss (a dead branch) has gradient zero, not None.
        parts = [
            torch.zeros_like(o) if g is None else g for o, g in zip(outputs, mine, strict=True)
        ]
        traces.append(Trace(x=_joined(inputs), g=_joined(parts)))
    # A sum is finite when its terms are (and far cheaper to look at); a layer input that is not
    # makes the loss NaN, since every output leads there.
    sums = torch.stack([losses.detach().sum(), *(trace.g.sum() for trace in traces)])
    if not bool(torch.isfinite(sums).all()):
        raise ComputeError(
            "the gradients hold NaN or infinity: the adapter or its base is damaged, or training "
            "diverged; check the adapter's weights and retrain with a smaller learning rate"
        )
    return traces


def per_example_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Site name -> (batch, rows, cols), exact gradients of each example's summed loss."""
    sites = lora_sites(model)
    with recording(model, sites) as tape:
        losses = loss_sums(forward(model, batch, tape), batch["labels"])
        traces = backward(tape, losses)
    return {s.name: t.per_example() for s, t in zip(sites, traces, strict=True)}


def _joined(calls: list[Tensor]) -> Tensor:
    if not calls:
        raise ComputeError("a LoRA layer did not run in the forward pass; is the model whole?")
    flat = [c.float().reshape(c.shape[0], -1, c.shape[-1]) for c in calls]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def _active(module: nn.Module) -> list[str]:
    names = getattr(module, "active_adapters", [])
    return [names] if isinstance(names, str) else list(names)


def _is_active(module: nn.Module, attribute: str) -> bool:
    return any(a in getattr(module, attribute) for a in _active(module))


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")
