"""What a datanet asks of those who contribute to it, and how long a hold lasts. Pure.

A datanet without `datanet.policy_set` has the defaults here. The newest policy applies to what is
appended after it; nothing that stands in the log is judged again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.events import MAX_ROWS_PER_CONTRIBUTION

DAY_US = 24 * 3_600 * 1_000_000
MAX_HOLD_US = 30 * DAY_US
"""Until then a hold is the reviewers' to end; from then on the contributor may end it, too."""
DEFAULT_CONTRIBUTIONS_PER_DAY = 1_000
DEFAULT_ROWS_PER_DAY = 1_000_000
KEEP, RETIRE = "keep", "retire"


@dataclass(frozen=True, kw_only=True)
class DatanetPolicy:
    """Limits for one contribution, and for one contributor in any DAY_US; and what becomes of the
    adapters that used a contribution which is withdrawn: RETIRE lets them be recalled."""

    max_rows_per_contribution: int = MAX_ROWS_PER_CONTRIBUTION
    max_contributions_per_day: int = DEFAULT_CONTRIBUTIONS_PER_DAY
    max_rows_per_day: int = DEFAULT_ROWS_PER_DAY
    on_withdrawal: str = KEEP

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "DatanetPolicy":
        """From a body of `datanet.policy_set`, or a row with its fields."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})
