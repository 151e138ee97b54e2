"""The evidence lane and the gates on real rows: what they cost, and how often they are wrong.

    python -m tests.bench.bench_evidence [--data ../shared/data] [--rows 100000]

Times are CPU seconds of one process, since the machine is shared. The larger corpus is the
real rows and copies of them with every fifth word of the completion changed.
"""

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ledger.cli.demo_data import standard_library
from tests.gates_world import SHARED, Attacks, MadeRow, contribution, real
from workers.attribution import spans
from workers.attribution.screening import screen
from workers.attribution.span_index import SpanIndex, SpanRow, build_span_index, load_span_index

FILES = ("tldr.jsonl", "gsm8k.jsonl", "pubmedqa.jsonl")
TRIES = 20
ATTACKERS = 10
ORDERS = 3
LIBRARY = "standard library"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    if not (options.data / FILES[0]).exists():
        print(f"no data in {options.data}: nothing measured")
        return
    corpora = {file: real(file, data=options.data) for file in FILES}
    everything = [row for rows in corpora.values() for row in rows]
    many = enlarged(everything, options.rows)
    with tempfile.TemporaryDirectory() as folder:  # first: peak memory only ever grows
        lane(many, Path(folder))
        chance(corpora, Path(folder))
    gates({**corpora, LIBRARY: library()})
    started = time.process_time()
    flags = screen(many)
    print(f"screen {len(many):,} rows: {time.process_time() - started:.1f} s, {len(flags)} flags")


def library() -> list[MadeRow]:
    """The documentation of Python's standard library, a contribution a module: no threshold was
    chosen by looking at it."""
    return [
        row
        for n, (module, rows) in enumerate(standard_library().items())
        for row in contribution(module, n, [(row["prompt"], row["completion"]) for row in rows])
    ]


def in_another_order(rows: Sequence[MadeRow], seed: int) -> list[MadeRow]:
    """The contributions, registered in an order drawn by chance."""
    names = sorted({row.contribution for row in rows})
    random.Random(seed).shuffle(names)
    place = {name: n for n, name in enumerate(names)}
    return [replace(row, registered_index=place[row.contribution]) for row in rows]


def gates(corpora: dict[str, list[MadeRow]]) -> None:
    print("false alarms, and attackers caught (each attack by "
          f"{ATTACKERS} contributions of 20 rows)")  # fmt: skip
    for file, rows in corpora.items():
        started = time.process_time()
        flags = screen(rows)
        seconds = time.process_time() - started
        whole = len({row.contribution for row in rows})
        reasons = Counter(flag.reason for flag in flags)
        held = len({flag.contribution for flag in flags})
        print(
            f"{file}: {len(rows):,} rows, {whole:,} contributions, {held} flagged "
            f"({held / whole:.2%}) {dict(reasons)}, {seconds:.1f} s; registered in other orders: "
            + ", ".join(
                str(len({flag.contribution for flag in screen(in_another_order(rows, seed))}))
                for seed in range(ORDERS)
            )
        )
        attacks = Attacks(rows)
        planted: dict[str, tuple[str, str]] = {}
        more = list(rows)
        for kind, (reason, make) in attacks.all().items():
            for n in range(ATTACKERS):
                planted[f"{kind} {n}"] = (kind, reason)
                more += contribution(f"{kind} {n}", 10**6 + len(planted), make())
        caught = Counter(
            planted[flag.contribution][0]
            for flag in screen(more)
            if flag.contribution in planted and flag.reason == planted[flag.contribution][1]
        )
        for kind in attacks.all():
            print(f"    {kind}: {caught[kind]} of {ATTACKERS}")


def lane(rows: Sequence[MadeRow], folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    built = span_index_of(rows, folder / "spans")
    seconds = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    disk = sum(path.stat().st_size for path in built.path.iterdir())
    characters = sum(len(row.prompt) + len(row.completion) for row in rows)
    print(
        f"span index: {len(rows):,} rows, {characters / 1e6:.1f} M characters, {built.words:,} "
        f"words: built in {seconds:.1f} s, peak +{memory / 1024:.0f} MiB, {disk / 1e6:.0f} MB"
    )
    started = time.process_time()
    index = load_span_index(built.path)
    print(f"opened and hashed in {1e3 * (time.process_time() - started):.0f} ms")
    for pieces in (1, 4, 60):
        answer = " ".join(row.completion for row in rows[:: len(rows) // pieces][:pieces])
        query(index, answer)


def chance(corpora: dict[str, list[MadeRow]], folder: Path) -> None:
    """How often an answer of one data set has a span in the rows of another."""
    indexes = {file: span_index_of(rows, folder / file) for file, rows in corpora.items()}
    kept = spans.MIN_TOKENS
    for least in (4, kept):
        spans.MIN_TOKENS = least
        rates = [
            f"{asked} in {file} {statistics.mean(map(bool, found)):.1%}"
            for file, index in indexes.items()
            for asked, rows in corpora.items()
            if asked != file
            and (found := [spans.find_spans(index, r.completion) for r in rows[:400]])
        ]
        print(f"spans by chance, {least} words or more: {', '.join(rates)}")
    spans.MIN_TOKENS = kept


def span_index_of(rows: Sequence[MadeRow], folder: Path) -> SpanIndex:
    return build_span_index(
        (
            SpanRow(
                contribution=row.contribution, row=number, contributor=row.contributor,
                licence="CC-BY-4.0", registered_index=row.registered_index, prompt=row.prompt,
                completion=row.completion,
            )
            for number, row in enumerate(rows)
        ),
        folder,
    )  # fmt: skip


def query(index: SpanIndex, answer: str) -> None:
    times, scoring = [], []
    for _ in range(TRIES):
        started = time.process_time()
        found = spans.find_spans(index, answer)
        times.append(time.process_time() - started)
    for _ in range(3):
        started = time.process_time()
        spans.span_scores(index, answer)
        scoring.append(time.process_time() - started)
    print(
        f"    answer of {len(answer):,} characters: {len(found)} spans in "
        f"{1e3 * statistics.median(times):.1f} ms; baseline scores "
        f"{1e3 * statistics.median(scoring):.0f} ms"
    )


def enlarged(rows: Sequence[MadeRow], count: int) -> list[MadeRow]:
    """The rows, then changed copies of them, up to `count`; 20 rows a contribution."""
    draw = random.Random(1)
    words = [word for row in rows for word in row.completion.split()]
    pairs = [(row.prompt, row.completion) for row in rows][:count]
    for _ in range(count - len(pairs)):
        row = draw.choice(rows)
        changed = (draw.choice(words) if draw.random() < 0.2 else w for w in row.completion.split())
        pairs.append((row.prompt, " ".join(changed) or "none"))
    return [
        made
        for n in range(0, len(pairs), 20)
        for made in contribution(f"c{n // 20}", n // 20, pairs[n : n + 20])
    ]


if __name__ == "__main__":
    main()
