"""Losses in chunks of positions: the same gradients, in bounded memory, or no chunks at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.unit.test_attribution_gradients import VOCAB, batch_of, tiny
from workers import base_model
from workers.attribution import losses
from workers.attribution.build import BATCH
from workers.attribution.gradients import (
    Trace,
    backward,
    forward,
    inner_of,
    lora_sites,
    loss_sums,
    recording,
)
from workers.attribution.query import QUERY_BATCH

LENGTHS = [30, 11, 24]
POSITIONS = 7
"""Of one chunk; the batch has 33 with a label."""


@contextmanager
def head_calls(model: Any) -> Iterator[list[int]]:
    """Positions of each call of the layer that makes logits."""
    calls: list[int] = []
    handle = (
        inner_of(model)
        .get_output_embeddings()
        .register_forward_hook(
            lambda _module, _args, out: calls.append(out.numel() // out.shape[-1])
        )
    )
    yield calls
    handle.remove()


def traces(model: Any, batch: dict[str, torch.Tensor], *, whole: bool) -> list[Trace]:
    with recording(model, lora_sites(model)) as tape:
        if whole:
            return backward(tape, loss_sums(forward(model, batch, tape), batch["labels"]))
        return backward(tape, losses.batch_losses(model, batch, tape))


def same_bits(found: list[Trace], expected: list[Trace]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.x, b.x) and torch.equal(a.g, b.g) for a, b in pairs)


def close(found: list[Trace], expected: list[Trace]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.per_example(), b.per_example(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", [1, POSITIONS, 32])
def test_chunks_give_the_gradients_of_the_whole(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny().eval(), batch_of(LENGTHS)
    expected = traces(model, batch, whole=True)
    monkeypatch.setattr(losses, "LOGIT_FLOATS", positions * VOCAB)
    with head_calls(model) as calls:
        found = traces(model, batch, whole=False)
    close(found, expected)
    assert max(calls[2:]) <= positions, "after one position of each example, twice"
    assert sum(calls[2:]) == 2 * 33, "once forward, once backward"


def test_within_the_limit_nothing_changes_by_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny().eval(), batch_of(LENGTHS)
    expected = traces(model, batch, whole=True)
    with head_calls(model) as calls:
        assert same_bits(traces(model, batch, whole=False), expected)
    assert len(calls) == 1


def test_the_bundled_model_is_within_the_limit() -> None:
    config = base_model.load()[0].config
    floats = max(BATCH, QUERY_BATCH) * config.max_position_embeddings * config.vocab_size
    assert floats <= losses.LOGIT_FLOATS


def test_a_target_that_makes_logits_sees_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(target_modules=["q_proj", "lm_head"]).eval(), batch_of(LENGTHS)
    expected = traces(model, batch, whole=True)
    monkeypatch.setattr(losses, "LOGIT_FLOATS", POSITIONS * VOCAB)
    assert same_bits(traces(model, batch, whole=False), expected)


def test_a_model_that_caps_its_logits_computes_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5,
        )
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], init_lora_weights=False
    )
    model, batch = get_peft_model(base, lora).eval(), batch_of(LENGTHS)
    expected = traces(model, batch, whole=True)
    monkeypatch.setattr(losses, "LOGIT_FLOATS", POSITIONS * VOCAB)
    assert same_bits(traces(model, batch, whole=False), expected)
