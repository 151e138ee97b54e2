"""Exact money: integer base units (1 OPEN = 10^18 wei), decimal strings in JSON. Pure.

Splits use the largest remainder method (Hare quota): every part is rounded down, then the units
left over go to the largest remainders, ties by key in byte order. Parts always sum to the whole.
"""

import re
from collections.abc import Mapping

from ledger.errors import InvalidEvent

WEI_PER_OPEN = 10**18
OPEN_DECIMALS = 18
MAX_AMOUNT_WEI = 10**60
BPS_WHOLE = 10_000
PPM_WHOLE = 1_000_000

_AMOUNT = re.compile(r"0|[1-9][0-9]{0,59}")


def parse_amount(text: object, field: str = "amount") -> int:
    """Base units from a decimal string: no sign, no leading zero, below MAX_AMOUNT_WEI."""
    if not isinstance(text, str) or not _AMOUNT.fullmatch(text):
        raise InvalidEvent(
            f"{field} must be base units as a decimal string of at most 60 digits, like "
            f'"1500000000000000000" for 1.5 OPEN',
            field=field,
        )
    return int(text)


def format_open(amount_wei: int) -> str:
    """For people: `1.5 OPEN`. Exact, never rounded."""
    sign = "-" if amount_wei < 0 else ""
    whole, rest = divmod(abs(amount_wei), WEI_PER_OPEN)
    fraction = f"{rest:018d}".rstrip("0")
    return f"{sign}{whole}{'.' + fraction if fraction else ''} OPEN"


def parse_open(text: str) -> int:
    """Base units from a person's decimal OPEN, such as `0.25`; InvalidEvent beyond 18 decimals."""
    match = re.fullmatch(r"([0-9]{1,40})(?:\.([0-9]{1,18}))?", text.strip())
    if not match:
        raise InvalidEvent(f"{text[:60]!r} is no OPEN amount: digits, at most 18 decimals")
    return int(match[1]) * WEI_PER_OPEN + int((match[2] or "").ljust(18, "0") or 0)


def split_exactly(amount: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Split `amount` in proportion to non-negative integer weights; the parts sum to `amount`.

    Keys with weight 0 get 0. Raises InvalidEvent when every weight is 0 and the amount is not.
    """
    if amount < 0 or any(w < 0 for w in weights.values()):
        raise InvalidEvent("a split takes a non-negative amount and non-negative weights")
    total = sum(weights.values())
    if total == 0:
        if amount:
            raise InvalidEvent("nothing to split by: every weight is 0")
        return dict.fromkeys(weights, 0)
    parts = {key: amount * weight // total for key, weight in weights.items()}
    left = amount - sum(parts.values())
    by_remainder = sorted(weights, key=lambda k: (-(amount * weights[k] % total), k.encode()))
    for key in by_remainder[:left]:
        parts[key] += 1
    return parts
