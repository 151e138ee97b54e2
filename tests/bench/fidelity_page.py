"""docs/fidelity.json, its picture, and the tables of it in docs/ATTRIBUTION.md.

The page is written by people but for what stands between two marks, which the benchmark rewrites
from the JSON: so that no number on it is older than its measurement.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.attribution.sketch import DIM
from workers.evaluation import plot, report
from workers.evaluation.methods import LABELS

DOCS = Path(__file__).parents[2] / "docs"
JSON, PICTURE, PAGE = (
    DOCS / "fidelity.json",
    DOCS / "images" / "fidelity.png",
    DOCS / "ATTRIBUTION.md",
)
BEGIN, END = "<!-- bench_fidelity: begin -->\n", "<!-- bench_fidelity: end -->\n"
COMMAND = "python -m tests.bench.bench_fidelity"


def update(new: Mapping[str, Any]) -> None:
    """Merge what was measured into the JSON, part by part, and show it."""
    known: dict[str, Any] = json.loads(JSON.read_text()) if JSON.exists() else {}
    for part, found in new.items():
        both = isinstance(found, dict) and isinstance(known.get(part), dict) and part != "pooled"
        known[part] = {**known[part], **found} if both else found
    JSON.write_text(json.dumps(known, indent=1) + "\n")
    text = PAGE.read_text("utf-8")
    if BEGIN in text:
        head, rest = text.split(BEGIN, 1)
        PAGE.write_text(head + BEGIN + "\n" + tables(known) + "\n" + END + rest.split(END, 1)[1])
    picture = {
        "fidelity": known.get("pooled") or next(iter(known.get("lds", {}).values()), None),
        "payout": next(iter(known.get("payout", {}).values()), None),
    }
    if plot.panels(picture):
        plot.draw(picture, PICTURE)


def tables(known: Mapping[str, Any]) -> str:
    """Markdown of everything in the JSON."""
    parts = []
    if pooled := known.get("pooled"):
        shown = report.lds_table(pooled)
        parts += [f"**LDS, all worlds and models together** (`{COMMAND} --only lds`)", _md(shown)]
    if worlds := known.get("lds"):
        parts += [f"**LDS, world by world** (`{COMMAND} --only lds`)", _md(_by_world(worlds))]
    for name, part in known.get("payout", {}).items():
        title = f"**Payout error, {name}** (`{COMMAND} --only payout`)"
        says = (
            f"{part['players']} contributors, {part['rows']} rows, {part['coalitions']} "
            f"coalitions, {part['ours']['answers']} answers; {part['unattributed']:.0%} "
            "unattributed."
        )
        parts += [f"{title}: {says}", _md(report.payout_table(part))]
    for name, part in known.get("canaries", {}).items():
        title = f"**Planted facts, {name}** (`{COMMAND} --only canaries`)"
        says = f"{part['planted']} planted, {part['told']} told when asked in other words."
        parts += [f"{title}: {says}", _md(report.canary_table(part))]
    if part := known.get("costs"):
        parts += [
            f"**CPU time of a query** (`{COMMAND} --only costs`)",
            _md(report.cost_table(part)),
        ]
    if part := known.get("large"):
        scores = part["lds"]
        kept = scores["index"]["mean"] / scores["full-rank"]["mean"]
        parts += [
            f"**Rank against storage** (`{COMMAND} --large {part['rows']}`): {kept:.0%} of "
            f"full-rank LDS is kept by {DIM + 4} bytes a row.",
            _md(report.lds_table(part)),
        ]
    return "\n\n".join(parts) + "\n"


def _by_world(worlds: Mapping[str, Any]) -> report.Table:
    methods = list(next(iter(worlds.values()))["lds"])
    head = ["world", "rows", *(LABELS.get(m, m) for m in methods), "ceiling"]
    return [
        head,
        *(
            [
                name,
                str(part["rows"]),
                *(f"{part['lds'][m]['mean']:.3f}" if m in part["lds"] else "" for m in methods),
                f"{part['ceiling']:.3f}" if part["ceiling"] else "",
            ]
            for name, part in worlds.items()
        ),
    ]


def _md(table: report.Table) -> str:
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])
