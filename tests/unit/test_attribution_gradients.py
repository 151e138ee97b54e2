"""Hooked per-example gradients and EK-FAC curvature, on a tiny random Llama."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ledger.errors import ComputeError, InvalidEvent
from workers.attribution.curvature import Block, Whitener, estimate
from workers.attribution.gradients import (
    backward,
    forward,
    lora_sites,
    loss_sums,
    merged,
    per_example_gradients,
    recording,
)
from workers.training.data import IGNORED, Example, collate

VOCAB = 50


def tiny(**lora: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | lora
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at birth, which would hide half of the gradient
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    examples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        cut = length // 2
        examples.append(
            Example(row_id=str(number), input_ids=ids, labels=[IGNORED] * cut + ids[cut:])
        )
    return collate(examples, 0)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"use_rslora": True, "lora_dropout": 0.5},
        {"rank_pattern": {"q_proj": 5}},
    ],
)
def test_equals_one_autograd_call_per_example(lora: dict[str, Any]) -> None:
    model = tiny(**lora).train()
    batch = batch_of([12, 5, 9])
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}

    found = per_example_gradients(model, batch)

    assert model.training
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
    model.eval()
    weights = {s.name: s.layer.weight for s in lora_sites(model)}
    assert found.keys() == weights.keys()
    for i, length in enumerate([12, 5, 9]):  # alone and unpadded
        one = {k: v[i : i + 1, :length] for k, v in batch.items()}
        logits = model(input_ids=one["input_ids"]).logits
        grads = torch.autograd.grad(loss_sums(logits, one["labels"]).sum(), list(weights.values()))
        for name, expected in zip(weights, grads, strict=True):
            assert expected.abs().max() > 0
            torch.testing.assert_close(found[name][i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_give_the_same_gradients_and_come_back(tied: bool) -> None:
    lora = {"target_modules": ["q_proj", "down_proj", "lm_head"]} if tied else {}
    model = tiny(**lora)
    if tied:
        model.get_base_model().lm_head.base_layer.weight = (
            model.get_base_model().model.embed_tokens.weight
        )
    batch = batch_of([12, 5, 9])
    sites = lora_sites(model)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    expected = per_example_gradients(model, batch)
    with merged(sites) as does, recording(model, sites) as tape:
        assert does
        found = backward(tape, loss_sums(forward(model, batch, tape), batch["labels"]))
    for site, trace in zip(sites, found, strict=True):
        torch.testing.assert_close(trace.per_example(), expected[site.name], atol=1e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0], "the very same tensors"
        assert torch.equal(parameter, before[name][1])
    assert not any(s.target.merged for s in sites)


def test_a_quantised_base_is_not_merged() -> None:
    model = tiny(target_modules=["q_proj"])
    for site in lora_sites(model):
        base = site.target.get_base_layer()
        base.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    with merged(lora_sites(model)) as does:
        assert not does


def test_gpt2s_transposed_layers_are_differentiated_too() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    batch = batch_of([9, 9])
    sites = lora_sites(model)
    with merged(sites), recording(model, sites) as tape:
        found = backward(tape, loss_sums(forward(model, batch, tape), batch["labels"]))
    loss = loss_sums(model(input_ids=batch["input_ids"]).logits, batch["labels"])[0]
    for site, expected, trace in zip(
        sites, torch.autograd.grad(loss, [s.layer.weight for s in sites]), found, strict=True
    ):
        torch.testing.assert_close(
            trace.per_example()[0], expected, atol=1e-5, rtol=1e-4, msg=site.name
        )


def test_nan_weights_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        lora_sites(model)[0].layer.weight[0, 0] = float("nan")
    with pytest.raises(ComputeError, match="NaN"):
        per_example_gradients(model, batch_of([8]))
    with pytest.raises(ComputeError, match="NaN"):
        estimate(model, lora_sites(model), [batch_of([8])], seed=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny(use_dora=True), "DoRA"),
        (lambda: tiny(target_modules=["embed_tokens"]), "embedding"),
        (lambda: tiny().get_base_model(), None),
        (lambda: tiny().merge_and_unload(), "no active LoRA"),
    ],
)
def test_unsupported_adapters_are_named(make: Callable[[], Any], words: str | None) -> None:
    if words is None:  # the same modules without the wrapper are the same adapter
        assert lora_sites(make())
        return
    with pytest.raises(InvalidEvent, match=words):
        lora_sites(make())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_curvature_is_seeded_and_orthonormal(targets: Any) -> None:
    model = tiny(target_modules=targets)
    sites = lora_sites(model)
    batches = [batch_of([12, 5, 9]), batch_of([7, 7])]
    one, again, other = (estimate(model, sites, batches, seed=s) for s in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        assert torch.equal(a.basis_in, b.basis_in)
    assert any(
        not torch.equal(a.eigenvalues, b.eigenvalues) for a, b in zip(one, other, strict=True)
    )
    for block in one:
        for basis in (block.basis_in, block.basis_out):
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)), atol=1e-5, rtol=0)


def test_whitened_dot_product_is_damped_inverse_fisher() -> None:
    """Against the definition: g1 . Q diag(1 / (eigenvalue + damping)) Qᵀ . g2, per block."""
    model = tiny()
    sites = lora_sites(model)
    batch = batch_of([12, 9])
    blocks = estimate(model, sites, [batch], seed=0)
    gradients = per_example_gradients(model, batch)
    expected = 0.0
    for block in blocks:
        basis = torch.kron(block.basis_out, block.basis_in).double()
        values = block.eigenvalues.flatten().double()
        inverse = basis @ torch.diag(1 / (values + 0.1 * values.mean())) @ basis.T
        one, two = gradients[block.name].flatten(1).double()
        expected += float(one @ inverse @ two)

    with recording(model, sites) as tape:
        traces = backward(tape, loss_sums(forward(model, batch, tape), batch["labels"]))
    one, two = Whitener(blocks, damping_ppm=100_000)(traces).double()
    assert float(one @ two) == pytest.approx(expected, rel=1e-4)


def test_a_block_without_gradient_weighs_nothing() -> None:
    block = Block(
        name="dead", basis_in=torch.eye(2), basis_out=torch.eye(3), eigenvalues=torch.zeros(3, 2)
    )
    assert torch.equal(block.scaling(100_000), torch.zeros(3, 2))


def test_no_examples_and_no_damping_are_errors() -> None:
    model = tiny()
    with pytest.raises(InvalidEvent, match="at least one example"):
        estimate(model, lora_sites(model), [], seed=0)
    with pytest.raises(InvalidEvent, match="positive"):
        Whitener([], damping_ppm=0)
