"""What an answer costs and how the fee is split. Pure integer arithmetic.

fee = prompt_tokens * input price + completion_tokens * output price, in wei. The policy in force at
the inference's index splits it by largest remainder over protocol, model owner, operator (and, once
there is staking, stakers) and contributors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.money import split_exactly


@dataclass(frozen=True, kw_only=True)
class FeePolicy:
    version: int
    protocol_bps: int
    owner_bps: int
    operator_bps: int
    contributors_bps: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "FeePolicy":
        return cls(**{name: body[name] for name in cls.__dataclass_fields__})

    def split(self, amount_wei: int) -> dict[str, int]:
        """Amounts under 'protocol', 'owner', 'operator', 'contributors'; they sum to the fee."""
        return split_exactly(
            amount_wei,
            {
                "protocol": self.protocol_bps,
                "owner": self.owner_bps,
                "operator": self.operator_bps,
                "contributors": self.contributors_bps,
            },
        )


def fee_wei(
    prompt_tokens: int,
    completion_tokens: int,
    *,
    input_wei_per_token: int,
    output_wei_per_token: int,
) -> int:
    return prompt_tokens * input_wei_per_token + completion_tokens * output_wei_per_token
