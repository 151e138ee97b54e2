"""OpenLoRA beside what a Python user reaches for first: peft's mixed batch, and plain `generate`.

    python -m tests.bench.bench_openlora [--quick] [--json FILE] [--plot FILE]

Decode speed of 32 rows, prompts excluded, greedy, in one run for all ways: ways take turns, the
median of rounds is kept, the clock is CPU seconds of one thread (`openlora_ways`). On a random
31.6M-parameter Llama, then on the bundled base. Then the tiers (`openlora_tiers`): how many are
registered, twice the slots, cold starts, resident memory. Tokens are compared with peft's before
anything is timed.

peft's mixed batch is measured in both ways that its users have, `generate` and a bare loop with a
cache; ratios are against the faster. The absolute numbers name this machine; read the ratios. No
other multi-adapter engine is measured: the package index has no lorax; vllm, sglang and punica have
wheels there, which were not installed or run here.
"""

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.bench import openlora_tiers as tiers
from tests.bench import openlora_ways as ways
from tests.bench.openlora_ways import RANK, ROWS, TARGETS
from workers import base_model

DISTINCT = (1, 2, 4, 8, 16, 32)
GOALS: dict[str, dict[str, tuple[str, float]]] = {
    "32 distinct / engine without LoRA": {"q,v": (">=", 0.93), "all linears": (">=", 0.80)},
    "32 distinct / peft mixed batch": {"q,v": (">=", 2.5), "all linears": (">=", 6.0)},
    "engine without LoRA / transformers generate": {
        "q,v": (">=", 1.0),
        "all linears": (">=", 1.0),
    },
}


def decode(base: Any, label: str, folder: Path, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Every way of decoding with adapters on `label`, after their tokens were compared."""
    paths = ways.save_adapters(base, folder, TARGETS[label], ROWS)
    engine = ways.engine_of(base, paths)
    peft_model = ways.load_peft(base, paths)
    checked = ways.same_tokens(base, engine, peft_model, tokens=16)
    prompts, names = ways.prompts_of(base), [f"a{i}" for i in range(ROWS)]
    few = max(4, tokens // 3)
    runs: dict[str, tuple[ways.Way, int]] = {
        "engine, no LoRA": (ways.engine_way(engine, [None] * ROWS, prompts), tokens),
        **{
            f"engine, {n} distinct": (
                ways.engine_way(engine, [f"a{i % n}" for i in range(ROWS)], prompts),
                tokens,
            )
            for n in DISTINCT
        },
        "engine, 16 distinct + 16 base rows": (
            ways.engine_way(engine, [f"a{i}" if i % 2 else None for i in range(ROWS)], prompts),
            tokens,
        ),
        "transformers generate, no LoRA": (ways.generate_way(base, prompts), tokens),
        "transformers loop, no LoRA": (ways.loop_way(base, prompts), tokens),
        "peft generate, 32 distinct": (ways.generate_way(peft_model, prompts, names), few),
        "peft loop, 32 distinct": (ways.loop_way(peft_model, prompts, names), few),
    }
    rates = ways.medians(runs, rounds=rounds)
    del engine, peft_model
    gc.collect()
    return {"tokens_per_s": rates, "ratios": ratios(rates), "greedy_beside_peft": checked}


def ratios(rates: dict[str, float]) -> dict[str, float]:
    alone, mixed = rates["engine, no LoRA"], rates["engine, 32 distinct"]
    plain = rates["transformers generate, no LoRA"]
    peft_best = max(rates["peft generate, 32 distinct"], rates["peft loop, 32 distinct"])
    return {
        "32 distinct / engine without LoRA": mixed / alone,
        "one shared / engine without LoRA": rates["engine, 1 distinct"] / alone,
        "32 distinct / peft mixed batch": mixed / peft_best,
        "engine without LoRA / transformers generate": alone / plain,
        "engine without LoRA / transformers loop": alone / rates["transformers loop, no LoRA"],
        "peft mixed batch / transformers generate": peft_best / plain,
    }


def of_tiers(base: Any, label: str, folder: Path, *, quick: bool) -> dict[str, Any]:
    paths = ways.save_adapters(base, folder / "saved", TARGETS[label], 2 * ROWS)
    tokens, rounds = (16, 3) if quick else (32, 5)
    result: dict[str, Any] = {
        "registered": tiers.registered(base, paths[:ROWS], folder, tokens=tokens, rounds=rounds),
        "beyond_the_slots": tiers.beyond_the_slots(base, paths, tokens=tokens, rounds=rounds),
        "cold_start": tiers.cold_start(base, paths),
    }
    count = 1_000 if label == "q,v" else 200
    result["resident"] = tiers.resident(paths[:ROWS], folder / "resident", count)
    gc.collect()
    return result


def plot(result: dict[str, Any], out: Path) -> None:
    """Throughput against registered adapters (left) and distinct ones in the batch (right)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for label, color in zip(TARGETS, ("tab:blue", "tab:orange"), strict=True):
        of = result["tiers"][label]["registered"]
        for use, style in (("one in use", "--"), ("32 in use", "-")):
            points = of[use]
            left.plot(
                [int(n) for n in points],
                list(points.values()),
                style,
                marker="o",
                color=color,
                label=f"{label}, {use}",
            )
        rates = result["decode"]["random Llama, 31.6M"][label]["tokens_per_s"]
        right.plot(
            DISTINCT,
            [rates[f"engine, {n} distinct"] for n in DISTINCT],
            marker="o",
            color=color,
            label=f"OpenLoRA, {label}",
        )
        peft_best = max(rates[f"peft {way}, 32 distinct"] for way in ("generate", "loop"))
        right.plot([32], [peft_best], "x", color=color, label=f"peft mixed batch, {label}")
        # Each beside the base of its own turn: the machine is not as fast in every one.
        for way, style in (("engine, no LoRA", "-"), ("transformers generate, no LoRA", ":")):
            right.axhline(rates[way], color=color, lw=1, ls=style, alpha=0.5)
    right.plot([], [], "-", color="gray", lw=1, label="OpenLoRA without LoRA")
    right.plot([], [], ":", color="gray", lw=1, label="generate without LoRA")
    left.set(xscale="log", xlabel="adapters registered", ylabel="tokens a CPU second, 32 rows")
    right.set(xscale="log", xlabel="distinct adapters among 32 rows")
    right.set_xticks(DISTINCT, [str(n) for n in DISTINCT])
    right.minorticks_off()
    for axes in (left, right):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)


def show(result: dict[str, Any]) -> None:
    """The tables that docs/BENCHMARKS.md keeps."""
    for model, of in result["decode"].items():
        print(f"\n{model + ', tokens a CPU second':46}" + "".join(f"{t:>13}" for t in of))
        for section, digits in (("tokens_per_s", 0), ("ratios", 3)):
            for name in next(iter(of.values()))[section]:
                cells = "".join(f"{t[section][name]:>13.{digits}f}" for t in of.values())
                print(f"{name:46}{cells}{_goal(name) if model.startswith('random') else ''}")
        same = "".join(f"{t['greedy_beside_peft']['identical']:>10}/{ROWS}" for t in of.values())
        print(f"{'adapters whose greedy tokens are peft_s':46}{same}")
    of = result["tiers"]
    print(f"\n{'tiers, random Llama':46}" + "".join(f"{t:>13}" for t in of))
    for name, row in tier_rows(of).items():
        print(f"{name:46}" + "".join(f"{cell:>13}" for cell in row))
    print(f"\nCPU time of one thread; {result['machine']}; {result['versions']}")


def tier_rows(of: dict[str, Any]) -> dict[str, list[str]]:
    many, least = tiers.REGISTERED[-1], ROWS
    rows: dict[str, list[str]] = {}
    for t in of.values():
        one, some = t["registered"]["one in use"], t["registered"]["32 in use"]
        for name, cell in {
            f"{many:,} registered / 1, one in use  (0.95..)": one[many] / one[1],
            f"{many:,} registered / 1,000, {least} in use  (0.95..)": some[many] / some[1_000],
            "to register one, us": t["registered"]["us_to_register_each"],
            "twice the slots / warm  (>= 0.9)": t["beyond_the_slots"]["of_warm"][
                "twice the slots, from host memory"
            ],
            "the same with no host memory at all": t["beyond_the_slots"]["of_warm"][
                "twice the slots, from disk"
            ],
            "first token, cold - warm, CPU ms  (<= 2 | 5)": t["cold_start"][
                "cold_minus_warm_cpu_ms"
            ],
            "first token, cold - warm, wall ms": t["cold_start"]["cold_minus_warm_wall_ms"],
            "first token, warm, CPU ms": t["cold_start"]["warm_cpu_ms"],
            "resident / own bytes  (<= 1.1)": t["resident"]["ratio"],
        }.items():
            rows.setdefault(name, []).append(f"{cell:.3f}")
        rows.setdefault("adapters in slots for that", []).append(f"{t['resident']['adapters']:,}")
        rows.setdefault("bytes of one adapter", []).append(f"{t['resident']['bytes_each']:,}")
    return rows


def _goal(row: str) -> str:
    goals = GOALS.get(row)
    if goals is None:
        return ""
    return "   aim " + " | ".join(f"{sign} {value:g}" for sign, value in goals.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--plot", type=Path, help="write the plot there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall clock in place of CPU seconds")
    parser.add_argument("--only", choices=sorted(TARGETS))
    args = parser.parse_args()
    if args.wall:
        ways.CLOCK = time.perf_counter
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    started, labels = time.monotonic(), [args.only] if args.only else list(TARGETS)
    models = {"random Llama, 31.6M": ways.reference_llama(), "bundled base": base_model.load()[0]}
    for base in models.values():
        base.generation_config.eos_token_id = None  # every way makes as many tokens as it is asked
    tokens, rounds = (16, 3) if args.quick else (32, 7)
    result: dict[str, Any] = {
        "rows": ROWS,
        "rank": RANK,
        "prompt_tokens": ways.PROMPT,
        "decode_tokens": tokens,
        "rounds": rounds,
        "threads": args.threads,
        "clock": "wall" if args.wall else "CPU seconds",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": os.getloadavg()[0],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}",
        "decode": {},
        "tiers": {},
    }
    with tempfile.TemporaryDirectory() as name, base_model.quiet_peft():
        folder = Path(name)
        for model, base in models.items():
            for i, label in enumerate(labels):
                print(f"... {model}, {label}", file=sys.stderr, flush=True)
                at = folder / f"{base.config.hidden_size}-{i}"
                measured = decode(base, label, at, tokens=tokens, rounds=rounds)
                result["decode"].setdefault(model, {})[label] = measured
        for i, label in enumerate(labels):
            print(f"... tiers, {label}", file=sys.stderr, flush=True)
            at = folder / f"tiers-{i}"
            at.mkdir()
            result["tiers"][label] = of_tiers(
                models["random Llama, 31.6M"], label, at, quick=args.quick
            )
    result |= {
        "load_average_after": os.getloadavg()[0],
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(result, indent=2))
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
