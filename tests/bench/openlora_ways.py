"""The ways of decoding that `bench_openlora` compares: our engine, transformers, peft.

Each way is a callable: decode that many tokens for all rows, prompts not counted, and return the
seconds by `CLOCK`. CPU seconds of one thread on a machine that does other things as well: a
descheduled thread is not charged, and no barrier waits for it. Shared caches still make noise, so
ways take turns and medians are compared.
"""

import copy
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from workers.openlora.adapter import WEIGHTS_FILE
from workers.openlora.engine import Engine, EngineConfig, GenerationRequest

ROWS = 32
RANK = 8
PROMPT = 32
QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"q,v": QV, "all linears": ALL}

CLOCK: Callable[[], float] = time.process_time
Way = Callable[[int], float]


def reference_llama() -> LlamaForCausalLM:
    """31.6M parameters, random: h512 x 8 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6144,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def save_adapters(base: Any, folder: Path, targets: tuple[str, ...], count: int) -> list[Path]:
    """`count` random adapters as peft saves them."""
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(copy.deepcopy(base), config)
    paths = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        path = folder / f"a{i}"
        model.save_pretrained(str(path))
        paths.append(path)
    return paths


def digest(path: Path) -> str:
    return hashlib.sha256((path / WEIGHTS_FILE).read_bytes()).hexdigest()


def engine_of(base: Any, paths: Sequence[Path], *, check: bool = True, **config: Any) -> Engine:
    """An engine on a copy of `base`; `a<i>` is the adapter in `paths[i]`."""
    engine = Engine(
        copy.deepcopy(base),
        None,
        EngineConfig(**{"max_rows": ROWS, "max_len": 128, "max_rank": RANK} | config),
    )
    for i, path in enumerate(paths):
        engine.load_adapter(f"a{i}", path, digest(path), check=check)
    return engine


def prompts_of(base: Any, seed: int = 1) -> torch.Tensor:
    """(ROWS, PROMPT) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, base.config.vocab_size, (ROWS, PROMPT), generator=generator)


def submit(
    engine: Engine, adapters: Sequence[str | None], prompts: torch.Tensor, tokens: int
) -> None:
    for i, adapter in enumerate(adapters):
        engine.submit(
            GenerationRequest(
                request_id=f"r{i}",
                adapter_id=adapter,
                prompt_ids=tuple(prompts[i].tolist()),
                max_tokens=tokens,
                ignore_eos=True,
            )
        )


def engine_way(engine: Engine, adapters: Sequence[str | None], prompts: torch.Tensor) -> Way:
    def run(tokens: int) -> float:
        submit(engine, adapters, prompts, tokens + 2)
        engine.step()  # reads the prompts and makes two tokens
        start = CLOCK()
        while engine.has_work():
            engine.step()
        return CLOCK() - start

    return run


def engine_tokens(
    engine: Engine, adapters: Sequence[str | None], prompts: torch.Tensor, tokens: int
) -> list[list[int]]:
    submit(engine, adapters, prompts, tokens)
    out: list[list[int]] = [[] for _ in adapters]
    while engine.has_work():
        for delta in engine.step():
            out[int(delta.request_id[1:])] += delta.token_ids
    return out


def generate(
    model: Any, prompts: torch.Tensor, tokens: int, names: list[str] | None
) -> torch.Tensor:
    """New greedy tokens (rows, tokens) of `generate`; `names` asks peft for a mixed batch."""
    extra = {} if names is None else {"adapter_names": names}
    with torch.inference_mode():
        out: torch.Tensor = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
    assert out.shape[1] == prompts.shape[1] + tokens
    return out[:, prompts.shape[1] :]


def generate_way(model: Any, prompts: torch.Tensor, names: list[str] | None = None) -> Way:
    def timed(tokens: int) -> float:
        start = CLOCK()
        generate(model, prompts, tokens, names)
        return CLOCK() - start

    return lambda tokens: timed(tokens + 1) - timed(1)


def loop_way(model: Any, prompts: torch.Tensor, names: list[str] | None = None) -> Way:
    """The peer without `generate` around it: forward, argmax, again, with its own cache."""
    extra = {} if names is None else {"adapter_names": names}

    def run(tokens: int) -> float:
        with torch.inference_mode():
            cache, ids = DynamicCache(), prompts
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, **extra)
            start = CLOCK()
            for _ in range(tokens):
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, **extra)
            return CLOCK() - start

    return run


def load_peft(base: Any, paths: Sequence[Path]) -> Any:
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(paths[0]), adapter_name="a0")
    for i, path in enumerate(paths[1:], start=1):
        model.load_adapter(str(path), adapter_name=f"a{i}")
    return model.eval()


def medians(ways: dict[str, tuple[Way, int]], *, rounds: int) -> dict[str, float]:
    """Tokens a second of each way, which comes with its token count: ways take turns, the median
    over rounds."""
    for way, _ in ways.values():
        way(2)  # caches, kernels that are made at first use
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (way, tokens) in ways.items():
            samples[name].append(ROWS * tokens / way(tokens))
    return {name: statistics.median(rates) for name, rates in samples.items()}


def same_tokens(base: Any, engine: Engine, peft_model: Any, tokens: int) -> dict[str, Any]:
    """Greedy tokens of the engine's mixed batch beside peft's, adapter by adapter.

    Where one differs, `largest_gap` is how far peft's own logits of the two tokens lie apart: a
    rounding tie is around 1e-6, a wrong answer is not.
    """
    prompts, names = prompts_of(base, seed=2), [f"a{i}" for i in range(ROWS)]
    ours = engine_tokens(engine, names, prompts, tokens)
    theirs = generate(peft_model, prompts, tokens, names).tolist()
    gaps = []
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine == other:
            continue
        at = next(i for i in range(tokens) if mine[i] != other[i])
        ids = torch.cat([prompts[row], torch.tensor(other[:at], dtype=torch.long)])[None]
        with torch.inference_mode():
            logits = peft_model(input_ids=ids, adapter_names=[names[row]]).logits[0, -1]
        gaps.append(float((logits[other[at]] - logits[mine[at]]).abs()))
    return {
        "adapters": ROWS,
        "tokens_each": tokens,
        "identical": ROWS - len(gaps),
        "largest_gap": max(gaps, default=0.0),
    }
