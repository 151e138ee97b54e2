"""What the GPU bench measures: a random Llama of a known shape, and random adapters on disk.

Weights are drawn on the device itself. Adapters are folders as peft writes them, made with
safetensors alone, so that they enter the engine by the way that real ones do.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

QV = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama by its sizes. `spread` is the standard deviation of its random weights."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    spread: float = 0.02


SHAPES = {
    "tiny": ModelShape(vocab=320, hidden=64, inner=112, layers=2, heads=4, kv_heads=2, spread=0.2),
    "31m": ModelShape(vocab=4096, hidden=512, inner=1408, layers=8, heads=8, kv_heads=8),
    "1b": ModelShape(vocab=128256, hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8),
    "8b": ModelShape(vocab=128256, hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8),
}
"""1b and 8b have the sizes of Llama 3.2 1B and Llama 3.1 8B (but nothing is tied)."""


def random_llama(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, window: int
) -> LlamaForCausalLM:
    """Allocated and drawn on `device`; nothing of its size passes through host memory."""
    attention: Any = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=window,
        initializer_range=shape.spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **attention,
    )
    torch.manual_seed(7)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: LlamaForCausalLM = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    model.eval()
    return model


@dataclass(frozen=True, kw_only=True)
class DiskAdapter:
    """An adapter's folder, what its weights hash to, and how many bytes A and B have."""

    name: str
    path: Path
    sha256: str
    nbytes: int


def linears(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears of an unwrapped model by module path, whose last path segment is a target."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets
    }


class AdapterMaker:
    """Random adapters of one rank and target set. Each differs from the next in every matrix: one
    set of random numbers, scaled anew, since drawing gigabytes would take most of the run."""

    def __init__(self, model: nn.Module, targets: Sequence[str], rank: int, spread: float) -> None:
        self.rank = rank
        self.targets = tuple(targets)
        make = torch.Generator().manual_seed(rank * 1000 + len(targets))
        self._tensors: dict[str, Tensor] = {}
        for path, linear in linears(model, targets).items():
            for half, size in (
                ("A", (rank, linear.in_features)),
                ("B", (linear.out_features, rank)),
            ):
                drawn = torch.randn(size, generator=make, dtype=torch.float32) * spread
                self._tensors[f"base_model.model.{path}.lora_{half}.weight"] = drawn.to(
                    next(model.parameters()).dtype
                )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors.values())

    def save(self, folder: Path, number: int) -> DiskAdapter:
        """The `number`-th adapter, as a folder of its own."""
        name = f"r{self.rank}x{len(self.targets)}-{number}"
        path = folder / name
        path.mkdir(parents=True)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": list(self.targets),
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        sign = -1 if number % 2 else 1
        scaled = {k: t * (sign * (1 + number / 64)) for k, t in self._tensors.items()}
        weights = path / "adapter_model.safetensors"
        save_file(scaled, str(weights))
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        return DiskAdapter(name=name, path=path, sha256=digest, nbytes=self.nbytes)


def merged(model: LlamaForCausalLM, adapter: DiskAdapter) -> LlamaForCausalLM:
    """A copy of the unwrapped `model` whose weights are W + B A: no LoRA arithmetic is left."""
    from safetensors.torch import load_file

    copied: Any = copy.deepcopy(model)
    tensors = load_file(str(adapter.path / "adapter_model.safetensors"))
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            weight = copied.get_submodule(path).weight
            weight += (b.to(weight.device).float() @ a.to(weight.device).float()).to(weight.dtype)
    plain: LlamaForCausalLM = copied
    return plain


def plain_greedy(model: nn.Module, prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy tokens by the whole forward at every step: no cache, no batch, no mask."""
    device = next(model.parameters()).device
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]
