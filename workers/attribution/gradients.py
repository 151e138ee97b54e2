"""Exact per-example LoRA gradients from one hooked forward and backward pass.

The first layer of the attribution room: it knows torch and PEFT's module layout, and no text, no
files, no contributors. The whole room knows neither Ray nor the network.

A LoRA target adds s B A x to its frozen layer's W x, with A `(rank, in)` and B `(out, rank)`. One
hook on the target sees its input x and, after backward, the gradient g at its output; both LoRA
gradients of one example follow, as sums over its positions:

    dA = (s Bᵀ g) xᵀ        dB = g (s A x)ᵀ

Attention never crosses examples, so one backward pass of the *summed* loss leaves in g, position
by position, what each example would have had alone: no loop over examples and no `vmap`. The base
stays frozen, and no parameter's `.grad` is touched. Since neither formula needs the LoRA path
itself, a long walk may run on weights W + s B A (`merged`), which spares a third of the time.

Source: Goodfellow, "Efficient per-example gradient computations" (arXiv:1510.01799); the same
capture as kronfluence and LoGra. `tests/unit/test_attribution_gradients.py` holds it against one
autograd call per example.

Not covered, and refused by name: DoRA, LoRA on embeddings, convolutions or fused attention, LoRA
biases, LoRA on raw parameters, several active adapters.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ledger.domain.money import PPM_WHOLE
from ledger.errors import ComputeError, InvalidEvent
from workers.training.data import IGNORED


@dataclass(frozen=True, kw_only=True)
class Site:
    """One LoRA matrix: `name` is its module path without PEFT's prefix, weight `(rows, cols)`.

    `target` is PEFT's module around the frozen layer, `adapter` the name of the active adapter.
    """

    name: str
    layer: nn.Linear
    target: Any = field(repr=False)
    adapter: str

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
    """What the hooks of one forward pass saw, per target; one that runs twice has two entries.

    Targets stand in the order of their sites, which come in pairs: A, then B.
    """

    targets: list[Any] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(s A, s B) of each target, float32."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One site after backward: `x` (batch, seq, cols) inputs, `g` (batch, seq, rows) gradients.

    A layer that ran several times has its calls joined along `seq`: the gradient is their sum.
    """

    x: Tensor
    g: Tensor

    def per_example(self) -> Tensor:
        """(batch, rows, cols): the gradient of each example's own loss for this site."""
        return torch.bmm(self.g.transpose(1, 2), self.x)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Logits where an example has a label: `logits` (n, vocab) float32 predict the token behind
    `position` (n,) of `example` (n,); `batch` examples in all."""

    logits: Tensor
    example: Tensor
    position: Tensor
    batch: int


def lora_sites(model: nn.Module) -> list[Site]:
    """Every LoRA matrix of the model's active adapter, ordered by name: A and B of each target.

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
        if isinstance(module.get_base_layer(), nn.MultiheadAttention):
            raise InvalidEvent(f"{name}: LoRA on fused attention is not attributed")
        for label, layers in (("lora_A", pair_a), ("lora_B", pair_b)):
            layer = layers[active[0]]
            if not isinstance(layer, nn.Linear) or layer.bias is not None:
                raise InvalidEvent(f"{name}.{label}: expected a linear layer without bias")
            sites.append(
                Site(name=f"{_plain(name)}.{label}", layer=layer, target=module, adapter=active[0])
            )
    if not sites:
        raise InvalidEvent("the model has no active LoRA layer: load a PEFT LoRA adapter first")
    return sorted(sites, key=lambda s: s.name.rsplit(".", 1))


@contextmanager
def recording(model: nn.Module, sites: Sequence[Site]) -> Iterator[Tape]:
    """Hooks on, parameters frozen, dropout off; all of it undone on the way out.

    The model must not be used by another thread meanwhile.
    """
    tape = Tape()
    for a, b in zip(sites[::2], sites[1::2], strict=True):
        scale = float(a.target.scaling[a.adapter])
        factors = tuple(site.layer.weight.detach().float() * scale for site in (a, b))
        tape.targets.append(a.target)
        tape.factors.append((factors[0], factors[1]))
        tape.inputs.append([])
        tape.outputs.append([])
    trained = [p for p in model.parameters() if p.requires_grad]
    # Only what must change is touched: an answer's gradient is a few ms, a walk over it another.
    training = [m for m in model.modules() if m.training]

    def hook(index: int) -> Any:
        def record(_target: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # With every parameter frozen the first target's output is a leaf: the graph starts
            # here.
            if not output.requires_grad:
                output.requires_grad_(True)
            tape.inputs[index].append(args[0])
            tape.outputs[index].append(output)

        return record

    handles = [t.register_forward_hook(hook(i)) for i, t in enumerate(tape.targets)]
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


@contextmanager
def at_strength(sites: Sequence[Site], strength_ppm: int) -> Iterator[None]:
    """The adapter at a part of its strength: the model runs on W + strength s B A.

    Why one would: an adapter at full strength has learnt its rows, and what is learnt has next to
    no gradient left. Halfway back to the base the rows still pull, each in its own direction.
    """
    kept = [(site.target, site.adapter, site.target.scaling[site.adapter]) for site in sites[::2]]
    try:
        for target, adapter, scale in kept:
            target.scaling[adapter] = scale * strength_ppm / PPM_WHOLE
        yield
    finally:
        for target, adapter, scale in kept:
            target.scaling[adapter] = scale


@contextmanager
def merged(sites: Sequence[Site]) -> Iterator[bool]:
    """The model runs on W + s B A, for walks over many batches; the very same weights come back.

    Yields whether it does: a base of another kind than plain float layers (a quantised one) stays
    as it is, and the LoRA path runs. Costs a copy of the targets' weights meanwhile. A weight that
    another module shares (a tied embedding) is changed for its target alone.
    """
    targets = [(site.target, site.adapter) for site in sites[::2]]
    layers = [target.get_base_layer() for target, _ in targets]
    if not all(
        type(layer) in (nn.Linear, Conv1D) and layer.weight.is_floating_point() for layer in layers
    ):
        yield False
        return
    kept = [layer.weight for layer in layers]
    try:
        for (target, adapter), layer in zip(targets, layers, strict=True):
            with torch.no_grad():
                whole = layer.weight + target.get_delta_weight(adapter).to(layer.weight.dtype)
            layer.weight = nn.Parameter(whole, requires_grad=False)
            target.merged_adapters = [adapter]
        yield True
    finally:
        for (target, _), layer, weight in zip(targets, layers, kept, strict=True):
            layer.weight = weight
            target.merged_adapters = []


def forward(model: nn.Module, batch: dict[str, Tensor], tape: Tape) -> Predictions:
    """One forward pass; the tape is emptied first. Logits only where some example has a label."""
    for calls in (*tape.inputs, *tape.outputs):
        calls.clear()
    wanted = batch["labels"][:, 1:] != IGNORED
    kept = wanted.any(dim=0).nonzero().squeeze(1)
    whole = not keeps_positions(model) or not len(kept) or head_is_target(model, tape)
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        **({} if whole else {"logits_to_keep": kept}),
    )
    example, position = wanted.nonzero(as_tuple=True)
    column = position if whole else torch.searchsorted(kept, position)
    return Predictions(
        logits=out.logits[example, column].float(),
        example=example,
        position=position,
        batch=len(wanted),
    )


def loss_sums(predictions: Predictions | Tensor, labels: Tensor) -> Tensor:
    """(batch,): cross entropy summed over each example's labelled positions.

    `predictions` are `forward`'s, or a model's whole logits (batch, seq, vocab). `labels`
    (batch, seq) may be others than the batch's own, at the same places. Summed, not averaged: an
    example's pull on the weights grows with what it taught, and the sum is minus the
    log-likelihood of the text, for which Fisher curvature is defined.
    """
    if isinstance(predictions, Tensor):
        example, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        logits = predictions[example, position].float()
        predictions = Predictions(
            logits=logits, example=example, position=position, batch=len(labels)
        )
    targets = labels[predictions.example, predictions.position + 1]
    losses = nn.functional.cross_entropy(
        predictions.logits, targets, ignore_index=IGNORED, reduction="none"
    )
    return losses.new_zeros(predictions.batch).index_add(0, predictions.example, losses)


@torch.no_grad()
def backward(tape: Tape, losses: Tensor, *, keep_graph: bool = False) -> list[Trace]:
    """Gradients of `losses.sum()` for every site: one Trace per site, in site order.

    Raises ComputeError for a gradient that is not finite: such an adapter has no influence to
    measure, and one NaN would otherwise spread over every score.
    """
    flat = [output for calls in tape.outputs for output in calls]
    with torch.enable_grad():
        total = losses.sum()
    grads = list(torch.autograd.grad(total, flat, retain_graph=keep_graph, allow_unused=True))
    traces: list[Trace] = []
    seen: dict[int, Tensor] = {}
    for inputs, outputs, (a, b) in zip(tape.inputs, tape.outputs, tape.factors, strict=True):
        mine, grads = grads[: len(outputs)], grads[len(outputs) :]
        # A layer without a path to the loss (a dead branch) has gradient zero, not None.
        g = _joined(
            [torch.zeros_like(o) if d is None else d for o, d in zip(outputs, mine, strict=True)]
        )
        # Query, key and value layers have one input: one tensor here too.
        key = id(inputs[0]) if len(inputs) == 1 else 0
        x = seen.get(key)
        if x is None:
            x = _joined([tensor.detach() for tensor in inputs])
            if key:
                seen[key] = x
        traces.append(Trace(x=x, g=g @ b))
        traces.append(Trace(x=x @ a.T, g=g))
    # A sum is finite when its terms are (and far cheaper to look at); a layer input that is not
    # makes the loss NaN, since every output leads there.
    sums = torch.stack([total.detach(), *(trace.g.sum() for trace in traces)])
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


def inner_of(model: Any) -> Any:
    """The model inside of PEFT's, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keeps_positions(model: Any) -> bool:
    """Whether the model computes logits at chosen positions only, as most of transformers' do."""
    return "logits_to_keep" in inspect.signature(inner_of(model).forward).parameters


def head_is_target(model: Any, tape: Tape) -> bool:
    """Whether the layer that makes logits is a target: it must see every position, as others do."""
    head = inner_of(model).get_output_embeddings()
    return any(head is target for target in tape.targets)


def _active(module: nn.Module) -> list[str]:
    names = getattr(module, "active_adapters", [])
    return [names] if isinstance(names, str) else list(names)


def _is_active(module: nn.Module, attribute: str) -> bool:
    return any(a in getattr(module, attribute) for a in _active(module))


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")
