"""The load test's numbers as a table and as docs/LOADTEST.md. Nothing here is not measured."""

import datetime
from typing import Any

from tests.bench.__main__ import commit, machine

TARGET = 0.85
NAMES = {"reference": "random Llama, 31.6M parameters", "bundled": "the bundled base model"}
WRONG = ("lost", "doubled", "wrong_money")


def verdict(result: dict[str, Any]) -> int:
    """1 when an event was lost or doubled, money was wrong, or a stream was cut in silence."""
    wrong = 0
    for found in result["bases"].values():
        for audit in (found["load"]["audit"], found.get("faults_audit", {})):
            wrong += sum(audit.get(what, 0) for what in WRONG)
        wrong += found.get("killed", {}).get("silently_cut", 0)
        if "crowd" in found:
            wrong += found["crowd"]["accepted"] - found["crowd"]["answered"]
    return int(wrong > 0)


def table(result: dict[str, Any]) -> str:
    bases = result["bases"]
    lines = [_row("", *(NAMES[name] for name in bases)), "|" + "---|" * (len(bases) + 1)]
    for title, read in _LOAD:
        lines.append(_row(title, *(read(found["load"]) for found in bases.values())))
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = [
        "# Load test of serving",
        "",
        "Made by `python -m tests.bench serving`; nothing on this page was written by hand but its "
        "sentences.",
        "",
        f"{machine()}; commit {commit()}, {at}; load average {result['load_average_before']:.1f} "
        f"before, {result['load_average_after']:.1f} after.",
        "",
        "What runs is what `tributary up` starts: PostgreSQL, a development chain, the API, the "
        "projector, the chain process, the worker service with Ray and one OpenLoRA engine of "
        f"{result['threads']} thread. Through the ledger were made: {result['adapters']} runs and "
        f"published adapters (rank 8 on q and v, random numbers), {result['consumers']} consumers "
        f"who prepaid on chain. {result['clients']} clients in a process of their own stream chat "
        f"completions of up to {result['max_tokens']} tokens over HTTP, each over its own adapter, "
        "one after another. Beside it the same engine alone, in its own process, under the same "
        "load: the two take turns, and a turn is held against the two beside it. All of it shares "
        "the cores of this machine, the clients too.",
        "",
        "## Throughput and waiting",
        "",
        table(result),
        "",
        "A *piece* is a server-sent event with text. Waits are as clients see them, the queue "
        "included: the batch has 32 rows, so half of the clients wait for a row at any time.",
        "",
        "## Where the time goes",
        "",
        *_cores(result),
    ]
    if "crowd" in result["bases"].get("reference", {}):
        lines += _faults(result["bases"]["reference"])
    lines += [
        "",
        "## Not shown here",
        "",
        "Attribution: these runs have a stand-in for an index, so that their answers wait to be "
        "attributed. Several replicas, other machines, networks, TLS, GPUs.",
    ]
    return "\n".join(lines) + "\n"


def _cores(result: dict[str, Any]) -> list[str]:
    bases = result["bases"]
    parts = {part for found in bases.values() for part in found["load"]["cores"]}
    first = next(iter(bases.values()))["load"]["cores"]
    lines = [
        "Cores in use during the load (CPU seconds a second, processes that lived through it).",
        "",
        _row("part", *(NAMES[name] for name in bases)),
        "|" + "---|" * (len(bases) + 1),
    ]
    for part in sorted(parts, key=lambda part: -first.get(part, 0.0)):
        cells = (f"{found['load']['cores'].get(part, 0.0):.2f}" for found in bases.values())
        lines.append(_row(part, *cells))
    return lines


def _faults(found: dict[str, Any]) -> list[str]:
    crowd, killed, audit = found["crowd"], found["killed"], found["faults_audit"]
    return [
        "",
        "## A thousand requests at once",
        "",
        f"Answers by status: {_counts(crowd['statuses'])}. Of {crowd['accepted']} accepted, "
        f"{crowd['answered']} were answered whole, within {crowd['wall_s']} s; first tokens after "
        f"{_waits(crowd['ttft_s'])}. Retry-After of the refused, in seconds: "
        f"{_counts(crowd['retry_after_s'])}. Other errors: {_counts(crowd['errors'])}.",
        "",
        "## kill -9 of the engine's process under load",
        "",
        f"{killed['answers']} answers were asked for; {killed['whole']} came whole, of them "
        f"{killed['resumed']} with a pause above a second in the middle, which was "
        f"{_waits(killed['pause_s'])} long: the router continued them on the restarted engine. "
        f"Nothing came for {killed['back_after_s']} s. Streams that ended without a word: "
        f"{killed['silently_cut']}. Errors that clients were told: {_counts(killed['errors'])}.",
        "",
        "## The ledger after all that",
        "",
        f"{audit['events']} events; {audit['answers_heard']} answers heard whole, "
        f"{audit['inferences']} recorded, {audit['fees']} fees. Lost {audit['lost']}, doubled "
        f"{audit['doubled']}, amounts that differ {audit['wrong_money']}. Recorded though no "
        f"client heard the end: {audit['unheard']}; interrupted, and free: {audit['interrupted']}. "
        "Every receipt's index holds its event; fees and their parts add up; every balance is "
        "its deposit less its answers.",
    ]


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)


def _waits(found: dict[str, float] | None) -> str:
    if found is None:
        return "none"
    return " / ".join(
        f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms" for value in found.values()
    )


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(found.items())) or "none"


def _audit(load: dict[str, Any]) -> str:
    audit = load["audit"]
    return f"{audit['lost']} / {audit['doubled']} / {audit['wrong_money']}"


_LOAD: tuple[tuple[str, Any], ...] = (
    ("engine alone, tokens/s, by turn", lambda load: _list(load["alone_tokens_per_s"])),
    ("through HTTP, tokens/s, by turn", lambda load: _list(load["tokens_per_s"])),
    (
        f"through HTTP / engine alone (target {TARGET})",
        lambda load: f"{load['ratio']:.3f} (turns: {', '.join(map(str, load['ratios']))})",
    ),
    ("answers", lambda load: f"{load['answers']:,}"),
    ("tokens", lambda load: f"{load['tokens']:,}"),
    ("time to first token, p50 / p95 / p99", lambda load: _waits(load["ttft_s"])),
    ("between pieces, p50 / p95 / p99", lambda load: _waits(load["gap_s"])),
    ("tokens a piece", lambda load: load["tokens_per_piece"]),
    ("whole answer, p50 / p95 / p99", lambda load: _waits(load["total_s"])),
    ("errors; unfinished", lambda load: f"{_counts(load['errors'])}; {load['unfinished']}"),
    ("events lost / doubled / wrong amounts", _audit),
)
