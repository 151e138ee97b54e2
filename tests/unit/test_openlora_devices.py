"""Every tensor of a step lies where the model does: the whole engine on a device that is not there.

The model lies on torch's `meta` device, whose tensors have shapes and no numbers, and stands for a
GPU. `OneDevice` looks at each call that Python makes: tensors of two devices in one of them are an
error, as they would be on the machine, but for what a GPU allows (copies, single numbers, indices
on the host). Numbers that the host asks for are zeros. Results mean nothing here; places do.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.unit.openlora_world import SavedAdapter, request, save_adapter, tiny_llama
from workers.openlora.engine import Engine, EngineConfig
from workers.openlora.forms import SLOT_GATHER, WORKING_SET
from workers.openlora.placing import placed

AWAY = torch.device("meta")
COPIES = {Tensor.to, Tensor.copy_}
READS = {Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__bool__}


class OneDevice(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls_away = 0
        self.copies = 0
        self.reads = 0
        """Numbers that the host asked the device for: each waits for all that was launched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        away = bool(args) and isinstance(args[0], Tensor) and args[0].device == AWAY
        if away and func in READS:
            self.reads += 1
            return _zeros(args[0].shape) if func is Tensor.tolist else func(torch.zeros(()))
        if away and func is Tensor.nonzero:  # how many there are is a number, too
            self.reads += 1
            return torch.empty(0, args[0].dim(), dtype=torch.long, device=AWAY)
        if away and func is Tensor.cpu:
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        places = {t.device for t in _together(func, args, kwargs)}
        if func in COPIES:
            self.copies += len(places) > 1 or AWAY in [*args[1:], *kwargs.values()]
        elif len(places) > 1:
            raise RuntimeError(f"{getattr(func, '__name__', func)} over {sorted(map(str, places))}")
        self.calls_away += AWAY in places
        return func(*args, **kwargs)


def _together(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that have to share a device."""
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        plain = not any(isinstance(i, Tensor | list) for i in index)
        args = args[:1] if plain else (args[0], *args[2:])  # a plain slice is set by a copy
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            yield leaf


def _zeros(shape: Any) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if len(shape) else 0


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[SavedAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny_llama()
    return [save_adapter(base, folder, f"a{i}", rank=2 + i, seed=i) for i in range(3)]


def test_the_check_sees_a_tensor_in_the_wrong_place() -> None:
    """Or the test below would prove nothing."""
    there, here = torch.ones(3, 3, device=AWAY), torch.ones(3, 3)
    with OneDevice() as mode:
        for wrong in (
            lambda: torch.bmm(there[None], here[None]),
            lambda: torch.nn.functional.linear(there, here),
            lambda: there.index_put((torch.tensor([0], device=AWAY),), here[:1]),
            lambda: there.__setitem__(torch.tensor([0]), here[:1]),
            lambda: torch.where(there > 0, here, there),
        ):
            with pytest.raises(RuntimeError, match=r"over .*'cpu', 'meta'"):
                wrong()
        there.copy_(here)
        there[0] = here[0]
        assert (there + here.to(AWAY)).device == AWAY
        assert mode.copies == 2
        assert (there.tolist(), mode.reads) == ([[0] * 3] * 3, 1)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_form": SLOT_GATHER, "static_decode": True},
        {"lora_form": SLOT_GATHER, "static_decode": False},
        {"lora_form": WORKING_SET},
    ],
    ids=["static", "gather", "working_set"],
)
def test_a_whole_engine_mixes_no_devices(
    config: dict[str, Any], adapters: list[SavedAdapter]
) -> None:
    """Prompts in chunks, decode, greedy and sampled rows, log probabilities, eviction, moves."""
    model: Any = tiny_llama()
    model.to(AWAY)
    with OneDevice() as mode:
        engine = Engine(model, None, EngineConfig(max_rows=4, slots=2, prefill_chunk=4, **config))
        mode.reads = 0
        for a in adapters:
            engine.load_adapter(a.name, a.path, a.sha256)
        for i, name in enumerate(["a0", None, "a1", "a2", "a0"]):
            engine.submit(
                request(
                    f"r{i}",
                    name,
                    tuple(range(1, 4 + 3 * i)),
                    max_tokens=3 + i,
                    temperature=0.7 * (i % 2),
                    top_p=0.9,
                    top_k=5,
                    seed=i,
                    logprobs=2 if i == 3 else None,
                )
            )
        deltas = [d for _ in range(60) if engine.has_work() for d in engine.step()]
    ends = [d.finish for d in deltas if d.finish is not None]
    assert [(e.reason, e.error) for e in ends] == [("length", None)] * 5
    stats = engine.stats()
    assert stats["adapters"]["slot_evictions"] > 0
    assert mode.calls_away > 1000
    assert mode.reads <= 8 * stats["steps"], (
        "a step waits for the device a few times: twice it draws"
    )
    kept = engine._cache.row_layers[0].keys
    assert kept is not None
    assert kept.device == AWAY


def test_a_model_in_bfloat16_keeps_its_rotary_frequencies() -> None:
    """As transformers does when it loads one; `Module.to` rounds them."""
    model: Any = tiny_llama()
    rotary = model.model.rotary_emb
    exact = rotary.inv_freq.clone()
    assert placed(model, torch.device("cpu"), torch.bfloat16) is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(rotary.inv_freq, exact)
    assert rotary.inv_freq.dtype == torch.float32
    tokens = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert tokens.dtype == torch.bfloat16
    assert placed(model, AWAY, torch.bfloat16).model.rotary_emb.inv_freq.device == AWAY
    model.to(dtype=torch.bfloat16)
    assert rotary.inv_freq.dtype == torch.bfloat16, "or placed() would not be needed any more"
