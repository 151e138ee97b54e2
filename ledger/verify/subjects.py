"""What an event says, in a few plain words per type. Pure; decides nothing.

A verdict names its subject by them, so that nobody has to read the catalogue (docs/FORMATS.md) to
know what was verified. Values come out of checked bodies, through `printable`.
"""

from collections.abc import Mapping
from typing import Any

from ledger.domain.envelope import Entry
from ledger.domain.money import format_open
from ledger.verify.encoding import printable

MAX_SAID_CHARS = 80

ABOUT: Mapping[str, str] = {
    "ledger.opened": "the opening of the ledger “{name}”",
    "role.granted": "{member} was given the role {role}",
    "role.revoked": "the role {role} was taken from {member}",
    "fee_policy.set": (
        "fee policy {version}: of each fee {contributors_bps} basis points to contributors, "
        "{owner_bps} to the adapter's owner, {operator_bps} to the operator, {protocol_bps} to the "
        "protocol"
    ),
    "identity.registered": "the signer took the name “{name}”",
    "identity.evm_bound": "the signer's payouts go to the EVM address {address}",
    "datanet.created": "the datanet “{name}” was opened under the licence {licence}",
    "datanet.closed": "the datanet {datanet} was closed",
    "datanet.policy_set": (
        "the datanet {datanet} takes at most {max_rows_per_contribution} rows in a contribution, "
        "and in a day {max_contributions_per_day} contributions and {max_rows_per_day} rows of one "
        "contributor; what becomes of adapters when one is withdrawn: {on_withdrawal}"
    ),
    "contribution.recorded": (
        "a contribution of {rows_count} rows, “{title}”, under the licence {licence}"
    ),
    "contribution.approved": "the contribution {contribution} was approved",
    "contribution.rejected": "the contribution {contribution} was rejected",
    "contribution.withdrawn": "the contribution {contribution} was withdrawn",
    "contribution.held": "the contribution {contribution} was held: {reason}",
    "contribution.released": "the hold of the contribution {contribution} was ended",
    "cluster.appealed": (
        "row {row} of the contribution {contribution} is said to be nobody's copy: {reason}"
    ),
    "cluster.split": "row {row} of the contribution {contribution} stands for itself again",
    "cluster.upheld": "row {row} of the contribution {contribution} stays merged with another",
    "run.requested": "the training run {run} was asked for",
    "run.started": "attempt {attempt} of the training run {run} began",
    "run.completed": (
        "the training run {run} ended in an adapter, from {rows_count} rows of "
        "{contributions_count} contributions"
    ),
    "run.failed": "attempt {attempt} of the training run {run} failed",
    "run.cancelled": "the training run {run} was cancelled",
    "adapter.published": "the adapter {model}, made by the training run {run}, was published",
    "adapter.retired": "the adapter {adapter} was retired",
    "adapter.recalled": (
        "the adapter {adapter} was retired because the contribution {contribution} was withdrawn"
    ),
    "inference.recorded": "an answer of {completion_tokens} tokens, for a fee of {fee_wei}",
    "inference.interrupted": (
        "an answer that broke off after {completion_tokens} tokens ({reason}) and cost nothing"
    ),
    "attribution.recorded": ("the method {method} found whose data shaped the answer {inference}"),
    "fee.charged": "a fee of {amount_wei} was charged for the answer {inference}",
    "deposit.recorded": "a deposit of {amount_wei} on chain {chain_id} for {account}",
    "period.cutoff": "the payout period {period} ends here",
    "period.closed": (
        "the payouts of period {period}: {total_wei} in all for {accounts} accounts, under one root"
    ),
    "period.abandoned": "the payout period {period} was given up",
    "payout.proposed": "the payout root of period {period} was put on chain {chain_id}, to wait",
    "payout.activated": "the payout root of period {period} is in force on chain {chain_id}",
    "payout.vetoed": "the payout root of period {period} was vetoed on chain {chain_id}",
    "payout.claimed": (
        "{address} was paid {amount_wei} on chain {chain_id}, which makes {cumulative_wei} in all"
    ),
    "checkpoint.anchored": "chain {chain_id} holds this log's tree of {size} entries",
}


def count(number: int, what: str) -> str:
    """`1 event`, `2 events`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def say_about(entry: Entry) -> str:
    """What an event with a checked body says."""
    return ABOUT[entry.envelope.type].format_map(_Shown(entry.envelope.body))


class _Shown(dict[str, str]):
    """Body fields as text: amounts in OPEN, everything else printable and cut."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__({name: _show(name, value) for name, value in body.items()})


def _show(name: str, value: Any) -> str:
    if name.endswith("_wei"):
        return format_open(int(value))
    return printable(str(value), MAX_SAID_CHARS)
