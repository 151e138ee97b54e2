"""What was found, as JSON, as a table and as a picture.

`results` is one dict of plain values (others measure, this module only shows): written as
results.json, shown as text and Markdown by the same table, plotted by matplotlib where it is.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workers.evaluation import lds
from workers.evaluation.costs import Cost
from workers.evaluation.fidelity import Fidelity
from workers.evaluation.methods import LABELS
from workers.evaluation.payout import Payout
from workers.evaluation.planted import Recalls
from workers.evaluation.scene import NotInstalled
from workers.evaluation.shapley import PayoutError

RESULTS_VERSION = 1
OURS = "index"
"""The method that pays: differences are shown against it."""

Table = list[list[str]]
"""Rows of cells, the head first."""


def fidelity_json(found: Fidelity) -> dict[str, Any]:
    """LDS as plain values."""
    scores = found.comparison.scores
    ours = {m: found.comparison.against[OURS, m] for m in scores if m != OURS and OURS in scores}
    return {
        "rows": found.rows,
        "contributors": found.contributors,
        "queries": found.queries,
        "training_seeds": found.seeds,
        "agreement": asdict(found.agreement) if found.agreement else None,
        "ceiling": lds.ceiling(found.agreement.mean, found.seeds) if found.agreement else None,
        "lds": {
            name: {**asdict(estimate), "kinds": found.kinds[name]}
            for name, estimate in scores.items()
        },
        "ours_minus": {name: asdict(estimate) for name, estimate in ours.items()},
    }


def payout_json(found: Payout) -> dict[str, Any]:
    """Payout error as plain values; what each answer gave is left out."""
    return {
        "players": found.players,
        "rows": found.rows,
        "coalitions": found.coalitions,
        "unattributed": found.unattributed,
        "value_error": found.value_error,
        "ours": _error(found.ours),
        "methods": {name: _error(error) for name, error in found.methods.items()},
    }


def _error(error: PayoutError) -> dict[str, Any]:
    return {k: v for k, v in asdict(error).items() if not k.startswith("each")}


def recalls_json(found: Recalls) -> dict[str, Any]:
    """Canaries as plain values."""
    return asdict(found)


def cost_json(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """Costs as plain values, with the ratio to the peer's."""
    return [{**asdict(cost), "ratio": cost.ratio} for cost in costs]


# --- tables -----------------------------------------------------------------------------------


def lds_table(part: Mapping[str, Any]) -> Table:
    """A method a row: LDS, its interval, ours less its own, and by kind of answer."""
    kinds = list(part["queries"])
    level = f"{lds.LEVEL:.0%}"
    head = ["method", "LDS", f"{level} interval", "ours less it", f"{level} interval", *kinds]
    table = [head]
    for name, found in sorted(part["lds"].items(), key=lambda item: -item[1]["mean"]):
        less = part["ours_minus"].get(name)
        table.append(
            [
                LABELS.get(name, name),
                f"{found['mean']:.3f}",
                _interval(found),
                f"{less['mean']:+.3f}" if less else "",
                _interval(less, sign="+") if less else "",
                *(f"{found['kinds'][kind]:.3f}" for kind in kinds),
            ]
        )
    return table


def payout_table(part: Mapping[str, Any]) -> Table:
    """Total variation to the Shapley shares: per answer, and of a period's sum."""
    head = ["division", "per answer", "whole period", "with the unattributed"]
    ours, rows = part["ours"], []
    for name, error in part["methods"].items():
        label = f"{LABELS.get(name, name)}, scores clipped"
        rows.append([label, f"{error['attributed']:.3f}", f"{error['period']:.3f}", ""])
    rows.sort(key=lambda row: row[1])
    mine = [f"{ours[key]:.3f}" for key in ("attributed", "period", "paid")]
    even = [f"{ours['uniform']:.3f}", f"{ours['period_uniform']:.3f}", ""]
    return [
        head,
        ["what we pay", *mine],
        *rows,
        ["everybody alike", *even],
        ["Shapley, drawn again (noise)", f"{ours['noise']:.3f}", "", ""],
    ]


def canary_table(part: Mapping[str, Any]) -> Table:
    """Recall of planted rows."""
    columns = list(next(iter(part["methods"].values()), {}))
    return [
        ["method", *columns],
        *(
            [LABELS.get(name, name), *(f"{found[c]:.3f}" for c in columns)]
            for name, found in sorted(
                part["methods"].items(), key=lambda item: tuple(-item[1][c] for c in columns)
            )
        ),
    ]


def cost_table(part: Sequence[Mapping[str, Any]]) -> Table:
    """CPU milliseconds a query."""
    head = ["rows", "ours", "kronfluence, one answer", "in a batch", "times cheaper", "index built"]
    return [
        head,
        *(
            [
                f"{c['rows']:,}",
                f"{c['index'] * 1e3:.1f} ms",
                f"{c['peer'] * 1e3:.0f} ms" if c["peer"] else "not installed",
                f"{c['peer_batched'] * 1e3:.0f} ms" if c["peer_batched"] else "",
                f"{c['ratio']:.0f}" if c["ratio"] else "",
                f"{c['build']:.1f} s",
            ]
            for c in part
        ),
    ]


def sections(results: Mapping[str, Any]) -> list[tuple[str, str, Table]]:
    """(title, one line beneath it, table) of everything that was measured."""
    out: list[tuple[str, str, Table]] = []
    if part := results.get("fidelity"):
        asked = ", ".join(f"{count} {kind}" for kind, count in part["queries"].items())
        says = f"{part['rows']} rows of {part['contributors']} contributors; {asked} answers."
        if agreement := part["agreement"]:
            says += (
                f" Two trainings of one subset agree by {agreement['mean']:.3f} "
                f"{_interval(agreement)}: no forecast can expect more than {part['ceiling']:.3f}."
            )
        out.append(("Linear datamodeling score", says, lds_table(part)))
    if part := results.get("payout"):
        ours = part["ours"]
        says = (
            f"{part['players']} contributors with {part['rows']} rows, {part['coalitions']} "
            f"coalitions retrained, {ours['answers']} answers ({ours['skipped']} more that nobody "
            f"made likelier); {part['unattributed']:.0%} left unattributed."
        )
        out.append(("Payout error against Shapley shares", says, payout_table(part)))
    if part := results.get("canaries"):
        says = f"{part['planted']} facts planted; {part['told']} told when asked in other words."
        out.append(("Planted facts", says, canary_table(part)))
    if part := results.get("costs"):
        says = "CPU time of one thread, median; the index keeps rows, kronfluence factors."
        out.append(("Cost of a query", says, cost_table(part)))
    return out


def text(results: Mapping[str, Any]) -> str:
    """For a terminal: columns aligned with spaces."""
    parts = []
    for title, says, table in sections(results):
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        parts.append("\n".join([title, says, "", *(line.rstrip() for line in lines)]))
    parts += [f"{name}: {why}" for name, why in results.get("missing", {}).items()]
    return "\n\n".join(parts) + "\n"


def markdown(results: Mapping[str, Any]) -> str:
    """The same as a page."""
    parts = [f"# Attribution, measured\n\n{results['title']}"]
    for title, says, table in sections(results):
        head, *rows = [f"| {' | '.join(row)} |" for row in table]
        rule = "|" + "---|" * len(table[0])
        parts.append("\n".join([f"## {title}", "", says, "", head, rule, *rows]))
    if missing := results.get("missing"):
        lines = [f"- {name}: {why}" for name, why in missing.items()]
        parts.append("\n".join(["## Not measured", "", *lines]))
    return "\n\n".join(parts) + "\n"


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """results.json, results.md and, with matplotlib, plot.png in `out`; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written = [
        _write(out / "results.json", (json.dumps(results, indent=2) + "\n").encode()),
        _write(out / "results.md", markdown(results).encode()),
    ]
    try:
        from workers.evaluation.plot import draw, panels
    except NotInstalled:
        return written
    return [*written, draw(results, out / "plot.png")] if panels(results) else written


def _interval(estimate: Mapping[str, Any], *, sign: str = "") -> str:
    return f"[{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def _write(path: Path, data: bytes) -> Path:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
    return path
