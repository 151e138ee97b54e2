"""What the loader refuses, with its stable code, and that it agrees with peft on what it takes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ledger.errors import Conflict
from tests.unit.openlora_world import (
    SavedAdapter,
    engine_for,
    load,
    request,
    run,
    save_adapter,
    tiny_llama,
)
from workers.openlora.errors import CorruptAdapter, UnsupportedAdapter

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def good(base: LlamaForCausalLM, tmp_path: Path) -> SavedAdapter:
    return save_adapter(base, tmp_path, "good", rank=4, seed=1)


def publish_unhashed_config(base: LlamaForCausalLM, a: SavedAdapter, **config: Any) -> None:
    engine_for(base, **config).load_adapter(a.name, a.path, a.sha256)


def refused(base: LlamaForCausalLM, a: SavedAdapter, **config: Any) -> UnsupportedAdapter:
    with pytest.raises(UnsupportedAdapter) as error:
        publish_unhashed_config(base, a, **config)
    assert error.value.detail["code"] == "unsupported_adapter"
    assert error.value.status == 400
    return error.value


def edit_config(a: SavedAdapter, **changes: object) -> None:
    path = a.path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_is_refused_by_hash(
    base: LlamaForCausalLM, good: SavedAdapter, file: str
) -> None:
    path = good.path / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    engine = engine_for(base)
    with pytest.raises(CorruptAdapter) as error:
        load(engine, good)
    assert error.value.detail["code"] == "corrupt_adapter"
    assert engine.store.ids() == []


def test_a_missing_file_is_a_storage_error(base: LlamaForCausalLM, good: SavedAdapter) -> None:
    (good.path / "adapter_model.safetensors").unlink()
    with pytest.raises(CorruptAdapter):
        load(engine_for(base), good)


def test_dora_as_peft_saves_it_is_refused(base: LlamaForCausalLM, tmp_path: Path) -> None:
    dora = save_adapter(base, tmp_path, "dora", use_dora=True)
    assert "use_dora" in refused(base, dora).message
    edit_config(dora, use_dora=False)  # hiding the option leaves its tensors
    assert "lora_magnitude_vector" in refused(base, dora).message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ],
)
def test_options_that_cannot_be_served_are_named(
    base: LlamaForCausalLM, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    assert named in refused(base, save_adapter(base, tmp_path, "x", **options)).message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"an_option_of_next_year": {"x": 1}}, "an_option_of_next_year"),
        ({"r": 0}, "r="),
        ({"r": True}, "r="),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"base_model_name_or_path": ["a list"]}, "base_model_name_or_path"),
    ],
)
def test_configs_that_mean_something_else_are_refused(
    base: LlamaForCausalLM, good: SavedAdapter, changes: dict[str, Any], named: str
) -> None:
    edit_config(good, **changes)
    assert named in refused(base, good).message


@pytest.fixture
def raised_recursion_limit() -> Iterator[None]:
    """As py_ecc, under eth-account, leaves it: Python's JSON parser then overruns the C stack."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 1_000_000))
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("raised_recursion_limit")
@pytest.mark.parametrize("changes", [{"lora_alpha": 10**400}, None])
def test_a_hostile_config_read_late_ends_its_own_answer_alone(
    base: LlamaForCausalLM, good: SavedAdapter, changes: dict[str, Any] | None
) -> None:
    """Published unread, as after a restart: what is wrong with it is met in the engine's step."""
    if changes is None:
        (good.path / "adapter_config.json").write_text("[" * 100_000)
    else:
        edit_config(good, **changes)
    engine = engine_for(base)
    engine.load_adapter(good.name, good.path, good.sha256, check=False)
    answers = run(
        engine,
        [request("other", None, (1, 2, 3), max_tokens=5), request("bad", "good", (1, 2, 3))],
    )
    assert len(answers["other"].tokens) == 5
    assert answers["other"].finish.error is None
    assert isinstance(answers["bad"].finish.error, UnsupportedAdapter)


def test_another_base_is_refused_by_name_and_by_shape(
    base: LlamaForCausalLM, good: SavedAdapter
) -> None:
    edit_config(good, base_model_name_or_path="someone/else")
    publish_unhashed_config(base, good)  # no names configured: the shapes decide
    assert "someone/else" in refused(base, good, base_names=frozenset({"ours"})).message
    path = good.path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "q_proj.lora_A" in k)
    refused(base, rewrite(good, tensors | {key: torch.zeros(4, 63)}))


def test_targets_that_are_not_served_are_refused(
    base: LlamaForCausalLM, good: SavedAdapter
) -> None:
    assert "is not a linear" in refused(base, good, targets=("q_proj", "v_proj")).message


def test_a_rank_over_the_limit_is_refused(base: LlamaForCausalLM, tmp_path: Path) -> None:
    wide = save_adapter(base, tmp_path, "wide", rank=9)
    assert "from 1 to 8" in refused(base, wide, max_rank=8).message


def test_tensors_that_do_not_pair_or_are_not_finite(
    base: LlamaForCausalLM, good: SavedAdapter
) -> None:
    tensors = load_file(good.path / "adapter_model.safetensors")
    lonely = next(k for k in tensors if "lora_B" in k)
    less = {k: v for k, v in tensors.items() if k != lonely}
    assert "pair" in refused(base, rewrite(good, less)).message
    nan = tensors | {lonely: torch.full_like(tensors[lonely], torch.nan)}
    assert "NaN" in refused(base, rewrite(good, nan)).message


def test_bytes_that_are_no_safetensors(base: LlamaForCausalLM, good: SavedAdapter) -> None:
    for junk in (b"", b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00{}{}{}{}"):
        path = good.path / "adapter_model.safetensors"
        path.write_bytes(junk)
        refused(base, rehash(good))


def test_an_id_means_one_thing(base: LlamaForCausalLM, good: SavedAdapter, tmp_path: Path) -> None:
    engine = engine_for(base)
    load(engine, good)
    load(engine, good)  # again is fine
    other = save_adapter(base, tmp_path / "elsewhere", "good", rank=4, seed=2)
    with pytest.raises(Conflict):
        load(engine, other)


def test_ten_thousand_registered_adapters_cost_no_memory(
    base: LlamaForCausalLM, good: SavedAdapter
) -> None:
    engine = engine_for(base)
    for i in range(10_000):
        engine.load_adapter(f"m{i}", good.path, good.sha256, check=False)
    tiers = engine.stats()["adapters"]
    assert (tiers["registered"], tiers["host_bytes"], tiers["disk_loads"]) == (10_000, 0, 0)


def rehash(a: SavedAdapter) -> SavedAdapter:
    import hashlib

    digest = hashlib.sha256((a.path / "adapter_model.safetensors").read_bytes()).hexdigest()
    return SavedAdapter(name=a.name, path=a.path, sha256=digest, config_sha256=a.config_sha256)


def rewrite(a: SavedAdapter, tensors: dict[str, torch.Tensor]) -> SavedAdapter:
    save_file({k: v.contiguous() for k, v in tensors.items()}, a.path / "adapter_model.safetensors")
    return rehash(a)
