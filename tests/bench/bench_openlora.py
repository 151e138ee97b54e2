"""Decode throughput of the serving engine beside peft's mixed batch and plain generate.

    python -m tests.bench.bench_openlora [--quick] [--cpu-time] [--json FILE]

A random Llama of 31.6M parameters (h512 x 8 layers), 32 rows, rank 8, fp32, greedy. Every way
runs the same prompts for the same number of tokens on the same machine in the same run; ways take
turns and the median of the rounds counts, because other programs may share the cores. What is
timed is decode alone: the engine's steps after the one that read the prompts, and for generate
a run of N+1 tokens minus a run of one.

On a machine that other programs use, `--cpu-time` runs one thread and counts its CPU seconds: a
descheduled thread is not charged, and no barrier waits for it. Shared caches still make noise.

The absolute numbers name this machine; the ratios are what the tables of docs are about.
"""

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from workers.openlora.adapter import WEIGHTS_FILE
from workers.openlora.engine import Engine, EngineConfig, GenerationRequest

ROWS = 32
RANK = 8
PROMPT = 32
TARGETS = {
    "q,v": ("q_proj", "v_proj"),
    "all linears": (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
}

CLOCK: Callable[[], float] = time.perf_counter

Way = Callable[[int], float]
"""Decodes that many tokens for all rows, prompts not counted; returns seconds."""


def reference_llama() -> LlamaForCausalLM:
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


def save_adapters(base: LlamaForCausalLM, folder: Path, targets: tuple[str, ...]) -> list[Path]:
    """ROWS random adapters as peft saves them."""
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(copy.deepcopy(base), config)
    paths = []
    for i in range(ROWS):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        path = folder / f"a{i}"
        model.save_pretrained(str(path))
        paths.append(path)
    return paths


def engine_way(engine: Engine, adapters: list[str | None], prompts: torch.Tensor) -> Way:
    def run(tokens: int) -> float:
        for i, adapter in enumerate(adapters):
            engine.submit(
                GenerationRequest(
                    request_id=f"r{i}",
                    adapter_id=adapter,
                    prompt_ids=tuple(prompts[i].tolist()),
                    max_tokens=tokens + 2,  # the step that reads the prompts makes two
                    ignore_eos=True,
                )
            )
        engine.step()
        start = CLOCK()
        while engine.has_work():
            engine.step()
        return CLOCK() - start

    return run


def generate_way(model: Any, prompts: torch.Tensor, names: list[str] | None = None) -> Way:
    extra = {} if names is None else {"adapter_names": names}

    def timed(tokens: int) -> float:
        start = CLOCK()
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                **extra,
            )
        assert out.shape[1] == prompts.shape[1] + tokens
        return CLOCK() - start

    return lambda tokens: timed(tokens + 1) - timed(1)


def load_peft(base: LlamaForCausalLM, paths: list[Path]) -> Any:
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(paths[0]), adapter_name="a0")
    for i, path in enumerate(paths[1:], start=1):
        model.load_adapter(str(path), adapter_name=f"a{i}")
    return model.eval()


def measure(ways: dict[str, Way], *, tokens: int, rounds: int) -> dict[str, float]:
    """Decode tokens per second of each way: median over rounds, ways taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(1)  # caches, thread pools
    for _ in range(rounds):
        for name, way in ways.items():
            samples[name].append(ROWS * tokens / way(tokens))
            print(f"    {name}: {samples[name][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    return {name: statistics.median(rates) for name, rates in samples.items()}


def bench_targets(
    base: LlamaForCausalLM, label: str, folder: Path, *, tokens: int, rounds: int, peft_tokens: int
) -> dict[str, Any]:
    paths = save_adapters(base, folder / label.replace(" ", "_").replace(",", ""), TARGETS[label])
    prompts = torch.randint(0, 6144, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    engine = Engine(
        copy.deepcopy(base),
        None,
        EngineConfig(max_rows=ROWS, max_len=PROMPT + tokens + 3, slots=ROWS, max_rank=RANK),
    )
    for i, path in enumerate(paths):
        digest = _sha256(path / WEIGHTS_FILE)
        engine.load_adapter(f"a{i}", path, digest)
    distinct: list[str | None] = [f"a{i}" for i in range(ROWS)]
    half: list[str | None] = [f"a{i}" if i % 2 else None for i in range(ROWS)]
    rates = measure(
        {
            "engine, no LoRA": engine_way(engine, [None] * ROWS, prompts),
            "engine, 32 distinct adapters": engine_way(engine, distinct, prompts),
            "engine, 16 distinct + 16 base rows": engine_way(engine, half, prompts),
            "engine, one shared adapter": engine_way(engine, ["a0"] * ROWS, prompts),
            "transformers generate, no LoRA": generate_way(base, prompts),
        },
        tokens=tokens,
        rounds=rounds,
    )
    del engine
    gc.collect()
    model = load_peft(base, paths)
    names = [f"a{i}" for i in range(ROWS)]
    rates |= measure(
        {"peft mixed batch, 32 distinct": generate_way(model, prompts, names)},
        tokens=peft_tokens,
        rounds=max(1, rounds // 3),
    )
    alone, mixed = rates["engine, no LoRA"], rates["engine, 32 distinct adapters"]
    return {
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratios": {
            "32 distinct / engine without LoRA": round(mixed / alone, 3),
            "one shared / engine without LoRA": round(
                rates["engine, one shared adapter"] / alone, 3
            ),
            "32 distinct / peft mixed batch": round(
                mixed / rates["peft mixed batch, 32 distinct"], 2
            ),
            "engine without LoRA / transformers generate": round(
                alone / rates["transformers generate, no LoRA"], 3
            ),
            "peft mixed batch / transformers generate": round(
                rates["peft mixed batch, 32 distinct"] / rates["transformers generate, no LoRA"], 3
            ),
        },
    }


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds, ~1 minute")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=sorted(TARGETS))
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU seconds")
    args = parser.parse_args()
    if args.cpu_time:
        global CLOCK
        CLOCK, args.threads = time.process_time, 1
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    base = reference_llama()
    tokens, rounds, peft_tokens = (12, 3, 4) if args.quick else (64, 7, 16)
    result: dict[str, Any] = {
        "model": "random Llama h512 x 8 layers, fp32",
        "parameters": sum(p.numel() for p in base.parameters()),
        "rows": ROWS,
        "rank": RANK,
        "prompt_tokens": PROMPT,
        "decode_tokens": tokens,
        "rounds": rounds,
        "threads": args.threads,
        "clock": "CPU seconds" if args.cpu_time else "wall clock",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": os.getloadavg()[0],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "targets": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for label in [args.only] if args.only else list(TARGETS):
            print(f"... {label}", file=sys.stderr, flush=True)
            result["targets"][label] = bench_targets(
                base, label, Path(folder), tokens=tokens, rounds=rounds, peft_tokens=peft_tokens
            )
    result["load_average_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=2))
    for section in ("tokens_per_s", "ratios"):
        print(f"\n{section:45}" + "".join(f"{label:>14}" for label in result["targets"]))
        first = next(iter(result["targets"].values()))
        for row in first[section]:
            cells = "".join(f"{t[section][row]:>14}" for t in result["targets"].values())
            print(f"{row:45}{cells}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
