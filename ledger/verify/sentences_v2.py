"""What version 2 of a bundle adds to the verdict, in plain words: rows shown, payouts added up.
Pure; decides nothing.

`say_*` is proven, `doubt_*` is left to trust. Text written by strangers goes through `printable`,
cut short: a row may be long, and may hold what moves a terminal's cursor.
"""

from collections.abc import Sequence
from typing import Any

from ledger.domain.money import format_open
from ledger.verify.disclosure import DisclosedRow
from ledger.verify.encoding import printable
from ledger.verify.lineage import Lineage
from ledger.verify.statement import Statement
from ledger.verify.subjects import count

MAX_ROW_CHARS = 160


def say_disclosed(rows: Sequence[DisclosedRow], lineage: Lineage) -> list[str]:
    said = []
    for shown in rows:
        id = str(shown.contribution)
        contributor = lineage.recorded[id].envelope.actor
        used = "".join(
            f" It was part of the training manifest of {_adapter(run, lineage)}."
            for run in trained_on(shown, lineage)
        )
        said.append(
            f"Row {shown.row} of the contribution {id}, which {contributor} signed for, is: prompt "
            f"“{_cut(shown.value.prompt)}”, completion “{_cut(shown.value.completion)}”.{used}"
        )
    return said


def doubt_disclosed(rows: Sequence[DisclosedRow], lineage: Lineage) -> list[str]:
    if not rows:
        return []
    if not lineage.manifests:
        return [
            "Whether an adapter was trained on the rows shown: this bundle carries no training "
            "manifest. Ask for the bundle of the adapter."
        ]
    return ["That whoever gave the rows shown had the right to, and what they did to the adapter."]


def say_payouts(statements: Sequence[Statement]) -> list[str]:
    said = []
    for statement in statements:
        line = statement.line
        said.append(
            f"By the root that period {line.period} was closed with, {line.account} is owed "
            f"{format_open(line.cumulative_wei)} in all."
        )
        if statement.cut_off and statement.missing_wei == 0:
            said.append(f"{_x_of_y(statement)}, to the last wei{_owners(statement)}.")
    return said


def doubt_payouts(statements: Sequence[Statement], *, checked: bool) -> list[str]:
    """`checked` is False where no keccak library was there to check the lines themselves."""
    said = []
    if statements and not checked:
        said.append(
            f"{count(len(statements), 'payout line')} as such: without a keccak library nothing "
            "shows what the roots of the periods hold."
        )
    for statement in statements:
        line = statement.line
        where = f"of {line.account} in period {line.period}"
        if not statement.cut_off:
            said.append(
                f"All of the payout {where}: without the period's cut-off the bundle cannot be "
                "added up."
            )
        elif statement.missing_wei > 0:
            said.append(
                f"{_x_of_y(statement)} {where}{_owners(statement)}; the remaining "
                f"{format_open(statement.missing_wei)} are not accounted for here. A bundle with "
                "the account's earnings, or a replay of the whole log, shows them."
            )
        elif statement.missing_wei < 0:
            said.append(
                f"Why the payout {where} is less than the {format_open(statement.accounted_wei)} "
                "that the events of this bundle add up to: ask the log for what is not shown here."
            )
        elif not checked:
            said.append(f"{_x_of_y(statement)}{_owners(statement)}.")
    if any(statement.owners for statement in statements):
        said.append(
            "That those addresses agreed to be bound to these owners: the log checked the "
            "addresses' own signatures, this verifier does not."
        )
    return said


def facts_disclosed(rows: Sequence[DisclosedRow], lineage: Lineage) -> list[dict[str, Any]]:
    return [
        {
            "contribution": str(shown.contribution),
            "row": shown.row,
            "runs": trained_on(shown, lineage),
            "adapters": [
                lineage.published[run].envelope.body["adapter"]
                for run in trained_on(shown, lineage)
                if run in lineage.published
            ],
        }
        for shown in rows
    ]


def facts_payouts(statements: Sequence[Statement], *, checked: bool) -> list[dict[str, Any]]:
    return [
        {
            "period": statement.line.period,
            "account": statement.line.account,
            "cumulative_wei": str(statement.line.cumulative_wei),
            "accounted_wei": str(statement.accounted_wei),
            "events": statement.events,
            "owners": list(statement.owners),
            "checked": checked,
        }
        for statement in statements
    ]


def trained_on(shown: DisclosedRow, lineage: Lineage) -> list[str]:
    """The runs of the bundle whose manifest lists exactly this row."""
    id = str(shown.contribution)
    return [
        run
        for run, manifest in lineage.manifests.items()
        if manifest.rows.get(id, {}).get(shown.row) == shown.value.hash
    ]


def _adapter(run: str, lineage: Lineage) -> str:
    published = lineage.published.get(run)
    if published is None:
        return f"the training run {run}"
    body = published.envelope.body
    return f"the adapter {body['adapter']} ({printable(body['model'])})"


def _x_of_y(statement: Statement) -> str:
    return (
        f"{format_open(statement.accounted_wei)} of {format_open(statement.line.cumulative_wei)} "
        f"of this payout are accounted for by {count(statement.events, 'event')} in this bundle"
    )


def _owners(statement: Statement) -> str:
    return f", earned by {', '.join(statement.owners)}" if statement.owners else ""


def _cut(text: str) -> str:
    return printable(text, MAX_ROW_CHARS)
