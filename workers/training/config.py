"""What a training run was asked to do: every number that its result depends on.

Pure: stdlib and the canonical-JSON rules. The configuration is part of the run's event and of the
manifest, so it has one JSON form without floats (`to_dict`): rates are decimal strings, kept as
`Decimal` here and turned into a float only where torch takes one.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Any

from ledger.errors import InvalidEvent

MAX_RANK = 64
MAX_EPOCHS = 1_000
MAX_BATCH_SIZE = 1_024
MIN_LENGTH, MAX_LENGTH = 32, 8_192
MAX_THREADS = 256
MAX_WARMUP_STEPS = 100_000
MAX_SNAPSHOT_STEPS = 100_000
MAX_SEED = 2**53 - 1
MAX_TARGETS = 16
MAX_DECIMAL_DIGITS = 24
"""Longest decimal string: enough for 1e-18 and far from a denial of service."""

LLAMA_LINEARS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
_TARGET = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DECIMAL = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one LoRA training run. Invalid ones raise InvalidEvent on construction.

    The defaults suit the bundled model and some hundred short rows: small batches and a high rate
    (600 docstrings, 8 epochs: last epoch's loss 1.45, against 1.75 with batches of 8; an earlier
    base model at twice this alpha was unstable, 2.48). `alpha / r` scales the adapter; `lr`
    decays linearly to zero after `warmup_steps`; `threads` is a setting because another count
    gives other bytes, and 1 because two threads on a busy machine were seen to be ten times
    slower than one; `snapshot_steps` only says how much
    work a killed worker loses, never what comes out.
    """

    r: int = 8
    alpha: int = 16
    dropout: Decimal = Decimal("0")
    target_modules: tuple[str, ...] = LLAMA_LINEARS
    lr: Decimal = Decimal("0.005")
    weight_decay: Decimal = Decimal("0")
    max_grad_norm: Decimal = Decimal("1")
    warmup_steps: int = 10
    epochs: int = 8
    batch_size: int = 4
    max_len: int = 256
    seed: int = 0
    threads: int = 1
    snapshot_steps: int = 50

    def __post_init__(self) -> None:
        _integer("r", self.r, 1, MAX_RANK)
        _integer("alpha", self.alpha, 1, 16 * MAX_RANK)
        _decimal("dropout", self.dropout, Decimal(0), Decimal("0.9"))
        _decimal("lr", self.lr, Decimal("0.000000001"), Decimal(1))
        _decimal("weight_decay", self.weight_decay, Decimal(0), Decimal(1))
        _decimal("max_grad_norm", self.max_grad_norm, Decimal("0.000001"), Decimal(1_000_000))
        _integer("warmup_steps", self.warmup_steps, 0, MAX_WARMUP_STEPS)
        _integer("epochs", self.epochs, 1, MAX_EPOCHS)
        _integer("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        _integer("max_len", self.max_len, MIN_LENGTH, MAX_LENGTH)
        _integer("seed", self.seed, 0, MAX_SEED)
        _integer("threads", self.threads, 1, MAX_THREADS)
        _integer("snapshot_steps", self.snapshot_steps, 1, MAX_SNAPSHOT_STEPS)
        targets = self.target_modules
        if not isinstance(targets, tuple) or not 0 < len(targets) <= MAX_TARGETS:
            raise InvalidEvent(
                f"target_modules must be 1 to {MAX_TARGETS} names of linear layers, such as "
                f"{', '.join(LLAMA_LINEARS)}; got {targets!r}"
            )
        for target in targets:
            if not isinstance(target, str) or not _TARGET.fullmatch(target):
                raise InvalidEvent(
                    f"target_modules: {target!r} is no module name; patterns are not accepted"
                )
        if list(targets) != sorted(set(targets)):
            raise InvalidEvent(
                f"target_modules must be sorted and without repeats, got {', '.join(targets)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The canonical JSON form: integers, strings and one list; no floats."""
        out: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, Decimal):
                out[name] = decimal_text(value)
            else:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrainingConfig":
        """The inverse of `to_dict`. Missing keys take their default; unknown ones are refused,
        so that a misspelt setting is an error and not a silent default."""
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise InvalidEvent(
                f"unknown training setting {', '.join(map(repr, unknown))}; "
                f"known are {', '.join(sorted(known))}"
            )
        values: dict[str, Any] = {}
        for name, value in data.items():
            if isinstance(known[name].default, Decimal):
                values[name] = _parse_decimal(name, value)
            elif isinstance(known[name].default, tuple):
                if not isinstance(value, list | tuple):
                    raise InvalidEvent(f"{name} must be a list of strings, got {value!r}")
                values[name] = tuple(value)
            else:
                values[name] = value
        return cls(**values)


def decimal_text(value: Decimal) -> str:
    """The shortest plain decimal string: no exponent, no trailing zeros, `0` for zero."""
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text or "0"


def _parse_decimal(name: str, value: object) -> Decimal:
    ok = isinstance(value, str) and len(value) <= MAX_DECIMAL_DIGITS and _DECIMAL.fullmatch(value)
    if not ok:
        raise InvalidEvent(
            f'{name} must be a plain decimal string such as "0.005", got {value!r}: '
            "canonical JSON has no floats"
        )
    return Decimal(str(value))


def _integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InvalidEvent(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _decimal(name: str, value: object, low: Decimal, high: Decimal) -> None:
    try:
        ok = isinstance(value, Decimal) and value.is_finite() and low <= value <= high
    except InvalidOperation:
        ok = False
    if not ok:
        raise InvalidEvent(
            f"{name} must be a Decimal from {decimal_text(low)} to {decimal_text(high)}, "
            f"got {value!r}"
        )
