"""`tributary attribution evaluate`: is the credit true? Retrain without some rows, and see.

On a file of rows it needs no ledger; on a run it takes the run's rows, recipe and base model.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from ledger.cli.context import As, Json, client, err, out, print_json
from ledger.cli.contributions import json_lines, read_rows
from ledger.cli.runs import settings_from
from ledger.config import load_settings
from ledger.errors import InvalidEvent

DEALT_CONTRIBUTORS = 24
"""Rows that name nobody are dealt to as many made-up contributors."""


def evaluate(
    run: Annotated[str | None, typer.Option(help="A training run of the ledger.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with prompt, completion and contributor; no ledger needed."),
    ] = None,
    base_model: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Results, and what was retrained: kept for the next time.")
    ] = Path("evaluation"),
    subsets: Annotated[int, typer.Option(help="Half subsets of rows to retrain on.")] = 32,
    seeds: Annotated[int, typer.Option(help="Trainings of each; 2 tell signal from noise.")] = 2,
    rows: Annotated[int, typer.Option(help="Rows to train on, drawn by contributor.")] = 320,
    queries: Annotated[int, typer.Option(help="Rows held out to ask about.")] = 24,
    answers: Annotated[
        Path | None, typer.Option(help="Ask about these instead: JSON Lines, prompt and answer.")
    ] = None,
    coalitions: Annotated[int, typer.Option(help="Coalitions of contributors to retrain.")] = 64,
    players: Annotated[int, typer.Option(help="Contributors in the payout game.")] = 10,
    canaries: Annotated[int, typer.Option(help="Made-up facts to plant.")] = 40,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be repeated.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only fidelity, payout, canaries or costs; may be repeated."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Training setting.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Retrainings at a time.")] = None,
    who: As = "me",
    as_json: Json = False,
) -> None:
    """Measure attribution against retrained models: LDS, payout error, planted facts, cost.

    Started again after a kill, it goes on where it stood. Writes results.json, results.md and
    plot.png.
    """
    if (run is None) == (data is None):
        raise InvalidEvent("give either --run, a run of the ledger, or --data, a file of rows")
    from ledger import bootstrap

    amounts: dict[str, Any] = {
        "subsets": subsets, "seeds": seeds, "rows": rows, "queries": queries, "seed": seed,
        "coalitions": coalitions, "players": players, "canaries": canaries,
        **({"methods": tuple(method)} if method else {}),
    }  # fmt: skip
    found = bootstrap.evaluation(
        load_settings(),
        texts=None if data is None else by_contributor(read_rows(data)),
        run=None if run is None else (client(who, login=True), run),
        answers=[] if answers is None else read_answers(answers),
        base=base_model,
        recipe=settings_from(option or []),
        amounts=amounts,
        parts=part or [],
        out=folder,
        cpus=cpus,
        tell=Teller(),
    )
    if as_json:
        print_json(found.results)
        return
    out.print(found.text, markup=False, end="")
    err.print("written: " + ", ".join(map(str, found.files)), markup=False)


def by_contributor(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Rows by who sent them."""
    named: dict[str, list[dict[str, str]]] = {}
    for n, row in enumerate(rows):
        who = row.get("contributor") or f"contributor-{n % DEALT_CONTRIBUTORS + 1:02d}"
        texts = {"prompt": row["prompt"], "completion": row["completion"]}
        named.setdefault(str(who), []).append(texts)
    return named


def read_answers(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each line; `completion` is taken for an answer too."""
    import json

    found = []
    for number, line in json_lines(path):
        try:
            row = json.loads(line)
            pair = str(row["prompt"]), str(row.get("answer") or row["completion"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidEvent(f"{path.name} line {number} needs prompt and answer") from error
        found.append(pair)
    if not found:
        raise InvalidEvent(f"{path.name} holds no answer to ask about")
    return found


class Teller:
    """Progress on stderr: a line when a phase begins, and at each tenth of it."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def __call__(self, phase: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 10
        if (phase, tenth) != self._last:
            self._last = (phase, tenth)
            err.print(f"{phase}: {done} of {total}", markup=False)
