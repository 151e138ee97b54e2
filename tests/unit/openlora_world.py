"""A small random Llama, random adapters made by peft itself, and a byte-level tokenizer.

Shared by the tests of the serving room; nothing is downloaded.
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workers.openlora.engine import Delta, Engine, EngineConfig, GenerationRequest

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EOS = 256
VOCAB = 320
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_llama(*, window: int = 128, seed: int = 7) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, weights large enough that adapters change words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def byte_tokenizer() -> Any:
    """One token per byte (ids 0..255), <eos> = 256: every character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    name: str
    path: Path
    sha256: str
    config_sha256: str


def save_adapter(
    base: LlamaForCausalLM,
    folder: Path,
    name: str,
    *,
    rank: int = 4,
    targets: tuple[str, ...] | str = ALL_LINEAR,
    seed: int = 0,
    **options: Any,
) -> SavedAdapter:
    """An adapter with random A and B, saved by peft."""
    config = LoraConfig(
        r=rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        **{"lora_alpha": 8} | options,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    path = folder / name
    model.save_pretrained(str(path))
    return SavedAdapter(
        name=name,
        path=path,
        sha256=_sha256(path / "adapter_model.safetensors"),
        config_sha256=_sha256(path / "adapter_config.json"),
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def oracle(
    base: LlamaForCausalLM, adapter: SavedAdapter | None, prompt: tuple[int, ...], tokens: int
) -> list[int]:
    """Greedy tokens of Hugging Face generate, alone in its batch, through peft's own loader."""
    model: Any = copy.deepcopy(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter.path)).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    tokens_out: list[int] = out[0, len(prompt) :].tolist()
    return tokens_out


def request(name: str, adapter: str | None, prompt: tuple[int, ...], **kw: Any) -> Any:
    return GenerationRequest(
        request_id=name, adapter_id=adapter, prompt_ids=prompt, **{"max_tokens": 12} | kw
    )


@dataclass
class Answer:
    tokens: list[int]
    text: str
    deltas: list[Delta]

    @property
    def finish(self) -> Any:
        return self.deltas[-1].finish


def gather(deltas: list[Delta]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for d in deltas:
        answer = answers.setdefault(d.request_id, Answer([], "", []))
        assert not answer.deltas or answer.deltas[-1].finish is None, "a delta after the last"
        answer.tokens += d.token_ids
        answer.text += d.text
        answer.deltas.append(d)
    return answers


def run(engine: Engine, requests: list[Any] = (), *, max_steps: int = 500) -> dict[str, Answer]:  # type: ignore[assignment]
    """Submit all, step until nothing is left."""
    for r in requests:
        engine.submit(r)
    deltas: list[Delta] = []
    for _ in range(max_steps):
        if not engine.has_work():
            break
        deltas += engine.step()
    assert not engine.has_work(), "the engine did not come to an end"
    return gather(deltas)


def engine_for(base: LlamaForCausalLM, **config: Any) -> Engine:
    """An engine on a copy of `base`, which stays as it is."""
    return Engine(copy.deepcopy(base), byte_tokenizer(), EngineConfig(**{"max_rows": 8} | config))


def load(engine: Engine, *adapters: SavedAdapter) -> None:
    for a in adapters:
        engine.load_adapter(a.name, a.path, a.sha256, config_sha256=a.config_sha256)


def prompt_of(n: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 1000 + n)
    return tuple(torch.randint(0, 256, (n,), generator=generator).tolist())
