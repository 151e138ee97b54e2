"""A PEFT folder becomes tensors, or is refused with the reason.

Reads `adapter_config.json` and `adapter_model.safetensors` as peft 0.21 writes them, once, into
memory: the bytes that were hashed are the bytes that are parsed. What this engine cannot serve
*faithfully* is refused (`unsupported_adapter`), never approximated: an answer is recorded as that
adapter's answer. Options that this file does not know are refused when they are set.

Knows no slot, no row and no network.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from workers.openlora.errors import CorruptAdapter, UnsupportedAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_BRACKETS = 500
MAX_WEIGHTS_BYTES = 4 << 30
PEFT_PREFIX = "base_model.model."

_NO_EFFECT_ON_WEIGHTS = frozenset(
    # How the adapter was made, or what `target_modules` already led to: the tensors say it all.
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
        "eva_config",
        "bias",
        "init_lora_weights",
    }
)
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights as they are. PiSSA, OLoRA, CorDA and LoftQ do not."""


@dataclass(frozen=True, kw_only=True)
class TargetShape:
    """A linear of the base model: `in_features` -> `out_features`."""

    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """Where an adapter lies and what it must hash to (lower-case hex SHA-256)."""

    path: Path
    weights_sha256: str
    config_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """One adapter in host memory, ready to be copied.

    `a[name]` is (rank, in), `b[name]` is (rank, out) with the scale alpha/r already multiplied in,
    so that the delta of a row x is `(x @ a.T) @ b`. Both map the same names in the same order: the
    order of the base model's targets. `flat` (elements,), where it is given, is the one tensor
    that all of them are views of: a, b of the first target, a, b of the second, and so on.
    """

    rank: int
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    flat: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for m in (self.a, self.b) for t in m.values())

    def to(self, device: torch.device) -> "AdapterWeights":
        """These weights there, in one copy; these themselves where they are there already."""
        if all(t.device == device for t in self.a.values()):
            return self
        halves = [half[name] for name in self.a for half in (self.a, self.b)]
        flat = self.flat if self.flat is not None else torch.cat([t.flatten() for t in halves])
        return _viewed(flat.to(device), self.rank, list(self.a), [t.shape[1] for t in halves])


@dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """What the engine can hold: its linears by module path, its rank, its base model's names."""

    targets: Mapping[str, TargetShape]
    max_rank: int
    dtype: torch.dtype
    base_names: frozenset[str] = frozenset()

    @cached_property
    def order(self) -> dict[str, int]:
        """Each target's place: adapters are laid out in the order of the base model's linears."""
        return {name: i for i, name in enumerate(self.targets)}


def read_adapter(files: AdapterFiles, limits: AdapterLimits) -> AdapterWeights:
    """Read, hash, check and lay out one adapter.

    Raises CorruptAdapter when a file is missing, too large or hashes to something else, and
    UnsupportedAdapter when it is intact but cannot be served on this base.
    """
    config_bytes = _read(files.path / CONFIG_FILE, MAX_CONFIG_BYTES, files.config_sha256)
    weights_bytes = _read(files.path / WEIGHTS_FILE, MAX_WEIGHTS_BYTES, files.weights_sha256)
    config = _config_of(config_bytes)
    if not isinstance(config, dict):
        raise UnsupportedAdapter(f"{CONFIG_FILE} is not a JSON object")
    rank, scale = _check_config(config, limits)
    return _layout(_parse(weights_bytes), rank, scale, limits)


def _config_of(data: bytes) -> Any:
    """The parser of the standard library goes as deep as the interpreter's recursion limit lets it.
    Some libraries raise that, and then nested brackets end the process: so they are counted first.
    """
    if data.count(b"[") + data.count(b"{") > MAX_CONFIG_BRACKETS:
        raise UnsupportedAdapter(
            f"{CONFIG_FILE} has more than {MAX_CONFIG_BRACKETS} brackets (MAX_CONFIG_BRACKETS)"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UnsupportedAdapter(f"{CONFIG_FILE} is not JSON: {e}") from e


def _read(path: Path, limit: int, expected: str | None) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise CorruptAdapter(f"{path.name} has {size} bytes; the limit is {limit}")
        data = path.read_bytes()
    except OSError as e:
        raise CorruptAdapter(f"cannot read {path.name}: {e.strerror}; fetch it again") from e
    if expected is not None:
        actual = hashlib.sha256(data).hexdigest()
        if actual != expected.lower():
            raise CorruptAdapter(
                f"{path.name} hashes to {actual}, but {expected.lower()} was published; "
                "fetch it again",
                file=path.name,
                actual=actual,
                expected=expected.lower(),
            )
    return data


def _check_config(config: Mapping[str, Any], limits: AdapterLimits) -> tuple[int, float]:
    """(rank, scale) of a plain LoRA config; everything else raises UnsupportedAdapter."""

    def refuse(key: str, why: str) -> None:
        raise UnsupportedAdapter(f"{key}={config.get(key)!r} is not supported: {why}", option=key)

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "this engine serves LORA adapters")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        refuse("task_type", "this engine serves causal language models")
    if config.get("use_dora"):
        refuse("use_dora", "DoRA rescales the base weights; train plain LoRA")
    if config.get("modules_to_save"):
        refuse("modules_to_save", "whole modules cannot be swapped per row; train LoRA alone")
    if config.get("bias", "none") != "none":
        refuse("bias", "biases of the base cannot be swapped per row; train with bias='none'")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        refuse("init_lora_weights", "it changes the base weights; convert it to plain LoRA first")
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        refuse("base_model_name_or_path", "expected a name")
    if limits.base_names and base and base not in limits.base_names:
        refuse("base_model_name_or_path", f"this engine serves {sorted(limits.base_names)}")
    for key, value in config.items():
        if key not in _NO_EFFECT_ON_WEIGHTS and value:
            refuse(key, "expected it to be unset; it changes what the tensors mean")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limits.max_rank:
        refuse("r", f"expected a rank from 1 to {limits.max_rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not _is_finite(alpha):
        refuse("lora_alpha", "expected a finite number")
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_finite(number: float) -> bool:
    """JSON has integers that no float can hold."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _parse(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UnsupportedAdapter."""
    try:
        views = safetensors.deserialize(data)
        tensors = {}
        for key, view in views:
            if (dtype := _TYPES.get(view["dtype"])) is None:
                raise UnsupportedAdapter(
                    f"tensor {key!r} is {view['dtype']}; expected one of {', '.join(_TYPES)}",
                    tensor=key,
                )
            flat = torch.frombuffer(view["data"], dtype=dtype) if view["data"] else torch.empty(0)
            tensors[key] = flat.view(view["shape"])
        return tensors
    except UnsupportedAdapter:
        raise
    except Exception as e:  # safetensors raises its own type and plain ones, all for bad bytes
        raise UnsupportedAdapter(f"{WEIGHTS_FILE} is not a safetensors file: {e}") from e


def _layout(
    tensors: Mapping[str, Tensor], rank: int, scale: float, limits: AdapterLimits
) -> AdapterWeights:
    """Every matrix checked, then copied into one flat tensor in the order of the base's targets."""
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        name, half = _target_of(key)
        shape = limits.targets.get(name)
        if shape is None:
            raise UnsupportedAdapter(
                f"tensor {key!r} targets {name!r}, which is not a linear of this base model that "
                "the engine serves",
                tensor=key,
            )
        expected = (rank, shape.in_features) if half == "A" else (shape.out_features, rank)
        if tuple(tensor.shape) != expected:
            raise UnsupportedAdapter(
                f"tensor {key!r} has shape {tuple(tensor.shape)}; this base model needs {expected}",
                tensor=key,
            )
        halves[half][name] = tensor
    a, b = halves["A"], halves["B"]
    if not a or a.keys() != b.keys():
        lonely = sorted(a.keys() ^ b.keys())
        raise UnsupportedAdapter(f"lora_A and lora_B do not pair up: {lonely or 'no tensors'}")
    names = sorted(a, key=limits.order.__getitem__)
    laid = empty_weights(names, rank, limits)
    _fill(laid, a, b, scale)
    assert laid.flat is not None
    low, high = torch.aminmax(laid.flat)
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN is neither least nor greatest
        bad = next(
            n for n in names if not (laid.a[n].isfinite().all() and laid.b[n].isfinite().all())
        )
        raise UnsupportedAdapter(f"the adapter of {bad!r} holds NaN or infinity", tensor=bad)
    return laid


def empty_weights(names: Sequence[str], rank: int, limits: AdapterLimits) -> AdapterWeights:
    """Uninitialised weights of that rank on `names`: one flat tensor and its views."""
    widths = [
        width
        for name in names
        for width in (limits.targets[name].in_features, limits.targets[name].out_features)
    ]
    flat = torch.empty(rank * sum(widths), dtype=limits.dtype)
    return _viewed(flat, rank, names, widths)


def _viewed(flat: Tensor, rank: int, names: Sequence[str], widths: Sequence[int]) -> AdapterWeights:
    """`widths` are in and out of the first name, in and out of the second, and so on."""
    parts = flat.split([rank * width for width in widths])
    views = [part.view(rank, width) for part, width in zip(parts, widths, strict=True)]
    return AdapterWeights(
        rank=rank,
        a=dict(zip(names, views[::2], strict=True)),
        b=dict(zip(names, views[1::2], strict=True)),
        flat=flat,
    )


def _fill(
    laid: AdapterWeights, a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float
) -> None:
    """Copy a (rank, in) and b (out, rank) in, b transposed and scaled, rounded once."""
    exact = [b[name].float() for name in laid.b]  # no copy where it is float32 already
    torch._foreach_copy_(list(laid.a.values()), [a[name] for name in laid.a])
    if laid.rank and all(t.dtype == torch.float32 for t in laid.b.values()):
        into = list(laid.b.values())
        torch._foreach_copy_(into, [t.t() for t in exact])
        if scale != 1:
            torch._foreach_mul_(into, scale)
        return
    for into_one, t in zip(laid.b.values(), exact, strict=True):
        into_one.copy_((t * scale).t())


def _target_of(key: str) -> tuple[str, str]:
    """`base_model.model.<module>.lora_A.weight` -> (`<module>`, `A`)."""
    for half in ("A", "B"):
        suffix = f".lora_{half}.weight"
        if key.startswith(PEFT_PREFIX) and key.endswith(suffix):
            return key[len(PEFT_PREFIX) : -len(suffix)], half
    raise UnsupportedAdapter(
        f"tensor {key!r} is not a plain LoRA matrix; expected "
        f"'{PEFT_PREFIX}<module>.lora_A.weight' or '.lora_B.weight'",
        tensor=key,
    )
