"""The evaluation as one picture, through matplotlib's file backend (no display, no state)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.evaluation.methods import LABELS
from workers.evaluation.scene import NotInstalled

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise NotInstalled("matplotlib is not installed, so there is no plot: make peers") from error

OURS, PEER, LEXICAL, PLAIN = "#0f6b66", "#c06a2b", "#8a8f98", "#b9bec7"
COLOURS = {"index": OURS, "full-rank": OURS, "spans": LEXICAL, "bm25": LEXICAL}
PEERS = ("kronfluence", "kronfluence-1e-8", "datainf")
DPI = 110


def panels(results: Mapping[str, Any]) -> list[str]:
    """The parts of the results that can be drawn."""
    return [name for name in ("fidelity", "payout") if results.get(name)]


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Bars of LDS with their intervals, payout error beside them; a PNG of some tens of KB."""
    shown = panels(results)
    figure = Figure(figsize=(5.4 * len(shown), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), number)
        (_lds if name == "fidelity" else _payout)(axes, results[name])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _lds(axes: Any, part: Mapping[str, Any]) -> None:
    found = sorted(part["lds"].items(), key=lambda item: item[1]["mean"])
    means = [estimate["mean"] for _, estimate in found]
    errors = [
        [m - e["low"] for m, (_, e) in zip(means, found, strict=True)],
        [e["high"] - m for m, (_, e) in zip(means, found, strict=True)],
    ]
    colours = [COLOURS.get(n, PEER if n in PEERS else PLAIN) for n, _ in found]
    names = [LABELS.get(n, n) for n, _ in found]
    axes.barh(names, means, xerr=errors, color=colours, ecolor="#333333", capsize=2)
    axes.axvline(0, color="#333333", linewidth=0.8)
    title = "Linear datamodeling score"
    if part["ceiling"]:
        axes.axvline(part["ceiling"], color="#333333", linewidth=0.8, linestyle=":")
        title += " (dotted: noise ceiling)"
    axes.set_title(title, fontsize=10)


def _payout(axes: Any, part: Mapping[str, Any]) -> None:
    ours = part["ours"]
    bars = [("everybody alike", ours["uniform"], PLAIN)]
    for name, error in sorted(part["methods"].items(), key=lambda item: -item[1]["attributed"]):
        colour = COLOURS.get(name, PEER if name in PEERS else PLAIN)
        bars.append((LABELS.get(name, name), error["attributed"], colour))
    bars += [("what we pay", ours["attributed"], OURS), ("noise", ours["noise"], "#dddddd")]
    names, values, colours = zip(*bars, strict=True)
    axes.barh(names, values, color=colours)
    axes.set_title("Payout error per answer (total variation)", fontsize=10)
