"""workers/training/config.py: what is refused, and the one JSON form."""

from decimal import Decimal
from typing import Any

import pytest

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.errors import InvalidEvent
from workers.training.config import MAX_EPOCHS, MAX_RANK, TrainingConfig, decimal_text


def test_the_json_form_has_no_floats_and_comes_back() -> None:
    config = TrainingConfig(lr=Decimal("0.00030"), dropout=Decimal("0.10"), seed=7)
    data = config.to_dict()
    assert data["lr"] == "0.0003"
    assert TrainingConfig.from_dict(parse_canonical(canonical_json(data))) == config


def test_missing_settings_take_their_default() -> None:
    assert TrainingConfig.from_dict({}) == TrainingConfig()
    assert TrainingConfig.from_dict({"lr": "0.01"}).lr == Decimal("0.01")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("r", 0),
        ("r", MAX_RANK + 1),
        ("r", True),
        ("r", "8"),
        ("alpha", 0),
        ("epochs", 0),
        ("epochs", MAX_EPOCHS + 1),
        ("batch_size", 0),
        ("max_len", 8),
        ("threads", 0),
        ("warmup_steps", -1),
        ("seed", -1),
        ("seed", 2**53),
        ("snapshot_steps", 0),
        ("lr", 0.001),
        ("lr", "0"),
        ("lr", "1e-3"),
        ("lr", "-1"),
        ("lr", "NaN"),
        ("lr", "0." + "0" * 30 + "1"),
        ("dropout", "0.95"),
        ("weight_decay", None),
        ("max_grad_norm", "0"),
        ("target_modules", []),
        ("target_modules", "q_proj"),
        ("target_modules", ["v_proj", "q_proj"]),
        ("target_modules", ["q_proj", "q_proj"]),
        ("target_modules", [".*"]),
        ("target_modules", [1]),
        ("learning_rate", "0.1"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(InvalidEvent, match=setting):
        TrainingConfig.from_dict({setting: value})


@pytest.mark.parametrize(
    ("value", "text"), [("1E-7", "0.0000001"), ("100", "100"), ("0.50", "0.5"), ("0.0", "0")]
)
def test_decimals_are_written_plain_and_short(value: str, text: str) -> None:
    assert decimal_text(Decimal(value)) == text
