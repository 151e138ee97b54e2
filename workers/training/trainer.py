"""Train one LoRA adapter on given rows: deterministic, resumable, in peft's format.

Knows torch, transformers and peft; neither Ray nor the network nor a store. Same rows, config,
base model, library versions, CPU type and thread count give the same bytes, killed or not.

How a killed worker comes out at the same bytes: nothing random is carried from step to step. The
order of an epoch and the dropout of a step are drawn from generators seeded by (seed, purpose,
number), so the state of a run is its step, the adapter, the optimizer's moments and the losses:
one safetensors file, written beside its final name and renamed over it.

What lies in `out_dir`, and what a crash leaves:

1. `snapshot.safetensors` while training: the next `train` with the same inputs goes on there.
2. `adapter_model.safetensors`, then `adapter_config.json`: a crash here leaves the last snapshot,
   and the next `train` writes the same bytes again.
3. `manifest.json`: written last, so it is there only when the rest is. The next `train` checks
   the hashes, and returns its result without training.

The snapshot goes last; a crash before that leaves it behind, and the next `train` removes it.
"""

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.errors import ComputeError, Conflict, InvalidEvent, TooLarge
from workers import base_model
from workers.training.config import TrainingConfig
from workers.training.data import Example, collate, encode_row, pad_id

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MANIFEST_FILE = "manifest.json"
SNAPSHOT_FILE = "snapshot.safetensors"

MANIFEST_VERSION = 1
MAX_ROWS = 200_000
MAX_ROW_CHARS = 100_000
LOSS_DIGITS = 6
WINDOW_BATCHES = 8
"""Rows are sorted by length within windows of this many batches. Changing it changes bytes."""

_fill_switch: Any = torch.utils.deterministic
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")
Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, mean token loss of the batch in nats).
What it raises ends the run; the last snapshot stays."""


class Row(Protocol):
    """What training reads of a row: a TrainingRow has it, and so has the attribution index's
    IndexedRow, which needs no turning into another."""

    @property
    def contribution(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def row_hash(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One row of a contribution. `row_hash` is its salted leaf hash, lower-case hex."""

    contribution: str
    index: int
    row_hash: str
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run's terminal event records. Hashes are lower-case hex, the loss a decimal string."""

    adapter_sha256: str
    config_sha256: str
    manifest_sha256: str
    base_sha256: str
    steps: int
    tokens: int
    final_loss: str


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that determines the result, fixed before the first step."""

    config: TrainingConfig
    base_sha256: str
    examples: list[Example]
    pad: int
    steps: int
    inputs: dict[str, Any]
    """The manifest's part that is known beforehand."""

    @property
    def fingerprint(self) -> str:
        """Names the run: a snapshot goes on only under the same inputs. `snapshot_steps` cannot
        change a result, yet it is in: it is part of the manifest."""
        return hashlib.sha256(canonical_json(self.inputs)).hexdigest()


def train(
    config: TrainingConfig,
    base_path: str | Path,
    rows: Sequence[Row],
    out_dir: Path,
    *,
    on_progress: Progress | None = None,
    resume: bool = True,
) -> TrainingResult:
    """Train an adapter for the base model at `base_path` on `rows`, in this order, into `out_dir`.

    Raises InvalidEvent for no rows, repeated or empty ones, or target modules that the model
    lacks; TooLarge beyond MAX_ROWS or MAX_ROW_CHARS; Conflict when `out_dir` holds another run
    and `resume` is on (off starts over and overwrites); ComputeError when the loss is not finite.
    """
    _check_rows(rows)
    base_sha256 = base_model.digest(base_path)
    with _deterministic(config.threads):
        model, tokenizer = base_model.load(base_path)
        plan = _plan(config, base_sha256, rows, tokenizer)
        out_dir.mkdir(parents=True, exist_ok=True)
        result = _finished(plan, out_dir) if resume else None
        if result is None:
            lora = _add_lora(model, config)
            losses = _fit(plan, lora, out_dir, on_progress, resume)
            result = _publish(plan, lora, losses, out_dir)
    (out_dir / SNAPSHOT_FILE).unlink(missing_ok=True)
    return result


def epoch_batches(
    seed: int, epoch: int, lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Which rows, by position, each batch of one epoch holds. Auditors recompute it from the
    manifest, which has the seed and every row's length in tokens.

    Rows are shuffled, sorted by length within windows of WINDOW_BATCHES batches, cut into batches,
    and the batches shuffled: random enough to learn from, and half as much padding to compute.
    """
    generator = torch.Generator().manual_seed(_derive(seed, "order", epoch))
    order = [int(i) for i in torch.randperm(len(lengths), generator=generator)]
    window = WINDOW_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), window):
        group = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator)
    return [batches[int(i)] for i in shuffled]


def environment() -> dict[str, dict[str, str]]:
    """Versions and platform that a result depends on, as the manifest has them."""
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "platform": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }


def steps_in_all(config: TrainingConfig, rows: int) -> int:
    return config.epochs * math.ceil(rows / config.batch_size)


def _plan(config: TrainingConfig, base_sha256: str, rows: Sequence[Row], tokenizer: Any) -> _Plan:
    examples = [
        encode_row(
            tokenizer,
            row.prompt,
            row.completion,
            max_len=config.max_len,
            row_id=f"{row.contribution}#{row.index}",
        )
        for row in rows
    ]
    texts = b"".join(
        hashlib.sha256(repr((e.input_ids, e.labels)).encode()).digest() for e in examples
    )
    inputs = {
        "v": MANIFEST_VERSION,
        "base_sha256": base_sha256,
        "config": config.to_dict(),
        "rows": [
            {
                "contribution": row.contribution,
                "row": row.index,
                "row_hash": row.row_hash,
                "tokens": len(example.input_ids),
            }
            for row, example in zip(rows, examples, strict=True)
        ],
        "examples_sha256": hashlib.sha256(texts).hexdigest(),
        "order_seed": config.seed,
        "threads": config.threads,
        **environment(),
    }
    return _Plan(
        config=config,
        base_sha256=base_sha256,
        examples=examples,
        pad=pad_id(tokenizer),
        steps=steps_in_all(config, len(rows)),
        inputs=inputs,
    )


def _add_lora(model: Any, config: TrainingConfig) -> Any:
    """The base with fresh adapter weights, drawn from the config's seed; only they will train."""
    torch.manual_seed(_derive(config.seed, "init", 0))
    try:
        with base_model.quiet_peft():
            return get_peft_model(
                model,
                LoraConfig(
                    r=config.r,
                    lora_alpha=config.alpha,
                    lora_dropout=float(config.dropout),
                    target_modules=list(config.target_modules),
                    bias="none",
                    task_type="CAUSAL_LM",
                ),
            )
    except ValueError as error:
        raise InvalidEvent(
            f"the base model has no such target modules: {error}. Name linear layers of this model"
        ) from error


def _fit(
    plan: _Plan, model: Any, out_dir: Path, on_progress: Progress | None, resume: bool
) -> list[str]:
    """Run the steps that are left. Returns the loss of every step, as decimal strings."""
    config = plan.config
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=float(config.lr),
        weight_decay=float(config.weight_decay),
        foreach=False,
        fused=False,
    )
    path = out_dir / SNAPSHOT_FILE
    losses = _restore(plan, path, weights, optimizer) if resume else []
    lengths = [len(e.input_ids) for e in plan.examples]
    per_epoch = plan.steps // config.epochs
    batches: list[list[int]] = []
    model.train()
    for step in range(len(losses), plan.steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or not batches:
            batches = epoch_batches(config.seed, epoch, lengths, config.batch_size)
        batch = collate([plan.examples[i] for i in batches[position]], plan.pad)

        torch.manual_seed(_derive(config.seed, "dropout", step))
        loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise ComputeError(
                f"the loss is {loss.item()} at step {step + 1} of {plan.steps}: training "
                f"diverged. Lower lr (it is {config.lr}) or max_grad_norm and start over"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            list(weights.values()), float(config.max_grad_norm), foreach=False
        )
        for group in optimizer.param_groups:
            group["lr"] = float(config.lr) * _rate(step, plan)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        value = loss.item()
        losses.append(f"{value:.{LOSS_DIGITS}f}")
        if (step + 1) % config.snapshot_steps == 0 and step + 1 < plan.steps:
            _snapshot(plan, path, weights, optimizer, losses)
        if on_progress is not None:
            on_progress(step + 1, plan.steps, value)
    return losses


def _rate(step: int, plan: _Plan) -> float:
    """Share of the full learning rate: linear warm-up, then linear to zero at the end."""
    if step < plan.config.warmup_steps:
        return (step + 1) / plan.config.warmup_steps
    return (plan.steps - step) / max(1, plan.steps - plan.config.warmup_steps)


# Snapshots


def _snapshot(
    plan: _Plan,
    path: Path,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[str],
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        state = optimizer.state[weight]
        tensors[f"weight.{name}"] = weight.detach()
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    state_json = canonical_json({"fingerprint": plan.fingerprint, "losses": losses}).decode()
    _write_tensors(path, tensors, {"state": state_json})


def _restore(
    plan: _Plan, path: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[str]:
    """Losses of the steps already done (none without a snapshot); fills weights and moments."""
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            state = parse_canonical((file.metadata() or {})["state"].encode())
            _same_run(plan, state["fingerprint"], path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, InvalidEvent, KeyError, OSError) as error:
        raise ComputeError(
            f"{path.name} cannot be read ({error}): the disk lost it. Remove it to start over"
        ) from error
    losses = [str(loss) for loss in state["losses"]]
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            optimizer.state[weight] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    return losses


def _same_run(plan: _Plan, fingerprint: object, path: Path) -> None:
    if fingerprint != plan.fingerprint:
        raise Conflict(
            f"{path.name} belongs to another run (other rows, config, base model or versions). "
            "Use an empty folder, or resume=False to overwrite it"
        )


# Output


def _publish(plan: _Plan, model: Any, losses: list[str], out_dir: Path) -> TrainingResult:
    state = get_peft_model_state_dict(model)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    adapter = _write_tensors(out_dir / ADAPTER_FILE, tensors, {"format": "pt"})
    config = _write(out_dir / CONFIG_FILE, _adapter_config(model, plan.base_sha256))
    tokens = plan.config.epochs * sum(len(e.input_ids) for e in plan.examples)
    manifest = {
        **plan.inputs,
        "steps": plan.steps,
        "tokens": tokens,
        "losses": losses,
        "final_loss": _final_loss(plan, losses),
        "adapter_sha256": adapter,
        "config_sha256": config,
    }
    written = _write(out_dir / MANIFEST_FILE, canonical_json(manifest))
    return _result(manifest, written)


def _finished(plan: _Plan, out_dir: Path) -> TrainingResult | None:
    """The result of an earlier, complete `train` with the same inputs; None when there is none."""
    path = out_dir / MANIFEST_FILE
    if not path.exists():
        return None
    data = path.read_bytes()
    manifest = parse_canonical(data)
    inputs = {key: manifest.get(key) for key in plan.inputs}
    _same_run(plan, hashlib.sha256(canonical_json(inputs)).hexdigest(), path)
    for name, key in ((ADAPTER_FILE, "adapter_sha256"), (CONFIG_FILE, "config_sha256")):
        file = out_dir / name
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != manifest[key]:
            return None  # altered behind our back: train again, the same bytes will come
    return _result(manifest, hashlib.sha256(data).hexdigest())


def _result(manifest: dict[str, Any], manifest_sha256: str) -> TrainingResult:
    return TrainingResult(
        adapter_sha256=manifest["adapter_sha256"],
        config_sha256=manifest["config_sha256"],
        manifest_sha256=manifest_sha256,
        base_sha256=manifest["base_sha256"],
        steps=manifest["steps"],
        tokens=manifest["tokens"],
        final_loss=manifest["final_loss"],
    )


def _final_loss(plan: _Plan, losses: list[str]) -> str:
    """Mean of the last epoch's losses: one batch alone says little."""
    last = losses[-(plan.steps // plan.config.epochs) :]
    return f"{sum(map(float, last)) / len(last):.{LOSS_DIGITS}f}"


def _adapter_config(model: Any, base_sha256: str) -> bytes:
    """peft's adapter_config.json in one order, with the base named by hash and not by a path."""
    config = dict(model.peft_config["default"].to_dict())
    config["base_model_name_or_path"] = f"sha256:{base_sha256}"
    config["inference_mode"] = True
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    # One metadata key at most: safetensors writes several in the order of a randomised hash map.
    assert len(metadata) == 1
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    return _settle(part, path)


def _write(path: Path, data: bytes) -> str:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    return _settle(part, path)


def _settle(part: Path, path: Path) -> str:
    """Move a finished file to its name; it is whole there or not there. Returns its SHA-256."""
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return digest


# Inputs and the machine


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise InvalidEvent(
            "a training run needs at least one row: the datanet has no approved contribution yet"
        )
    if len(rows) > MAX_ROWS:
        raise TooLarge(f"{len(rows)} rows; a run takes at most {MAX_ROWS} (MAX_ROWS)")
    seen: set[tuple[str, int]] = set()
    for row in rows:
        name = f"row {row.contribution}#{row.index}"
        if len(row.prompt) + len(row.completion) > MAX_ROW_CHARS:
            raise TooLarge(f"{name} is longer than {MAX_ROW_CHARS} characters (MAX_ROW_CHARS)")
        if not _SHA256_HEX.fullmatch(row.row_hash):
            raise InvalidEvent(f"{name}: row_hash must be 64 lower-case hex digits")
        if (row.contribution, row.index) in seen:
            raise InvalidEvent(f"{name} is given twice; a row trains once per epoch")
        seen.add((row.contribution, row.index))


def _derive(seed: int, purpose: str, number: int) -> int:
    """An independent 63-bit seed for one purpose and step."""
    data = hashlib.sha256(f"tributary/training/v1\n{seed}\n{purpose}\n{number}".encode()).digest()
    return int.from_bytes(data[:8], "big") >> 1


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    """torch's process-wide switches for one run, and back: a worker process may do other work."""
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        _fill_switch.fill_uninitialized_memory,
    )
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory with NaN finds reads of uninitialised memory; it costs 7% here.
        _fill_switch.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])
            _fill_switch.fill_uninitialized_memory = before[2]
