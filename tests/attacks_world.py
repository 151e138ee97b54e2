"""An honest world of real rows and those who would live off it. Seeded.

`World` is a handful of contributors with ten rows each. `Thief` makes, from the rows of some of
them, what an attacker would give to be paid for the same answers; `flood` makes rows that copy
nobody and want to be credited for everything. `tests.bench.bench_attacks` trains on them.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ledger.cli.demo_data import standard_library
from tests.gates_world import LETTERS, SHARED, Attacks, contribution
from workers import base_model
from workers.attribution.index import IndexedRow
from workers.training.config import TrainingConfig
from workers.training.data import pad_id, prompt_ids
from workers.training.trainer import train

Pair = tuple[str, str]
EACH = 10
CHANGED = 0.05
CYRILLIC = str.maketrans("aceiopsxyABCEHKMOPTX", "асеіорѕхуАВСЕНКМОРТХ")
ZERO_WIDTH = "\u200b"
SYNONYMS = {
    "display": "show", "print": "write out", "list": "enumerate", "create": "make",
    "show": "display", "remove": "delete", "delete": "remove", "start": "launch", "run": "execute",
    "file": "document", "directory": "folder", "specific": "particular", "all": "every",
    "path/to/file": "my/document", "name": "title", "command": "instruction", "return": "give back",
    "the": "that", "a": "one", "of": "from", "using": "with", "with": "using", "value": "number",
    "object": "thing", "string": "text", "if": "when", "is": "be", "new": "fresh", "search": "find",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class World:
    """`honest`: contributor -> rows, in order of registration; `spare`: rows of people outside."""

    source: str
    honest: dict[str, list[Pair]]
    spare: list[Pair]

    @property
    def pairs(self) -> list[Pair]:
        return [pair for pairs in self.honest.values() for pair in pairs]


def honest_world(contributors: int, *, seed: int = 3, data: Path = SHARED) -> World:
    """tldr by real contributors where it lies beside the checkout, else the standard library."""
    file = data / "tldr.jsonl"
    groups: dict[str, list[Pair]] = defaultdict(list)
    if file.exists():
        for line in map(json.loads, filter(None, file.read_text().split("\n"))):
            groups[line["contributor"]].append((line["prompt"], line["completion"]))
    else:
        for name, rows in standard_library().items():
            groups[name] = [(row["prompt"], row["completion"]) for row in rows]
    draw = random.Random(seed)
    names = draw.sample(sorted(n for n in groups if len(groups[n]) >= EACH), contributors)
    spare = [pair for name in sorted(groups.keys() - set(names)) for pair in groups[name][:EACH]]
    draw.shuffle(spare)
    return World(
        source=file.name if file.exists() else "the standard library's documentation",
        honest={name: groups[name][:EACH] for name in names},
        spare=spare,
    )


class Thief:
    """What to give when you want what `victims` (rows of others) earn. One row for each."""

    def __init__(self, victims: Sequence[Pair], world: World, seed: int = 11) -> None:
        self.victims = victims
        self.world = world
        self.random = random.Random(seed)
        self.attacks = Attacks(contribution("victim", 0, victims), seed=seed)

    def copies(self) -> dict[str, Callable[[], list[Pair]]]:
        """Name -> maker of rows that say what the victims' rows say."""
        both = self._both
        return {
            "exact copies": lambda: list(self.victims),
            "near copies: 5 % of characters replaced": both(self.substituted),
            "near copies: 5 % replaced, dropped or doubled": both(self.edited),
            "other case, other punctuation": both(self.repunctuated),
            "look-alike letters (Cyrillic)": both(lambda t: t.translate(CYRILLIC)),
            "zero-width characters between letters": both(ZERO_WIDTH.join),
            "white space between letters": both(" ".join),
            "accents on every vowel": both(self.accented),
            "words in another order": both(self.shuffled),
            "synonyms": both(self.synonyms),
            "padded: as much other text before or after": lambda: [
                self.padded(*v) for v in self.victims
            ],
            "another question, copied answer": lambda: [
                (self.reworded(p), c) for p, c in self.victims
            ],
            "another question, near copy of the answer": lambda: [
                (self.reworded(p), self.substituted(c)) for p, c in self.victims
            ],
            "copied question, answer of another row": lambda: [
                (p, self.random.choice(self.world.spare)[1]) for p, _ in self.victims
            ],
        }

    def floods(self) -> dict[str, Callable[[], list[Pair]]]:
        """Name -> maker of rows that copy nobody in particular."""
        return {
            "honest newcomer (rows of others outside)": lambda: self.world.spare[: self.size],
            "junk: random words": lambda: self._each(
                lambda p, c: (self.attacks.own(8), self.noise())
            ),
            "one popular snippet under every question": self.popular,
            "one form for everything": lambda: self._each(
                lambda p, c: (f"{p.split(':')[0]}: Explain", f"{p.split(':')[0]} is a useful tool.")
            ),
            "rows stitched of pieces": lambda: self._each(
                lambda p, c: (self.attacks.piece(4, 6), " ".join(self.pieces(3)))
            ),
            "outlandish rows of high loss": lambda: self._each(lambda p, c: (p, self.outlandish())),
            "questions that list many entities": self.baited,
        }

    @property
    def size(self) -> int:
        return len(self.victims)

    def substituted(self, text: str) -> str:
        """CHANGED of the characters, at least one, are other letters."""
        letters = list(text)
        count = max(1, round(CHANGED * len(letters)))
        for at in self.random.sample(range(len(letters)), min(count, len(letters))):
            letters[at] = self.random.choice(LETTERS)
        return "".join(letters)

    def edited(self, text: str) -> str:
        letters = list(text)
        for at in self.random.sample(range(len(letters)), max(1, round(CHANGED * len(letters)))):
            letters[at] = self.random.choice(
                ("", letters[at] * 2, self.random.choice(LETTERS), letters[at] + "_")
            )
        return "".join(letters)

    def repunctuated(self, text: str) -> str:
        marks = str.maketrans("{}[]()\"'/-_.,:|", "<><><>''\\_-;:;/")
        return text.translate(marks).swapcase()

    def accented(self, text: str) -> str:
        return "".join(c + "\u0301" if c in "aeiouAEIOU" else c for c in text)

    def shuffled(self, text: str) -> str:
        words = text.split()
        self.random.shuffle(words)
        return " ".join(words)

    def synonyms(self, text: str) -> str:
        for word, other in SYNONYMS.items():
            text = " ".join(other if w.lower() == word else w for w in text.split(" "))
        return text.replace("path/to/", "my/own/").replace("name}}", "title}}")

    def padded(self, prompt: str, completion: str) -> Pair:
        other = self.random.choice(self.world.spare)[1]
        while len(other) < len(completion):
            other += " " + self.random.choice(self.world.spare)[1]
        first = self.random.random() < 0.5
        return prompt, f"{other} {completion}" if first else f"{completion} {other}"

    def reworded(self, prompt: str) -> str:
        """The same request in words of one's own, around the thing's name."""
        name = prompt.split(":")[0].split("What does ")[-1].split(" do?")[0]
        words = self.shuffled(self.synonyms(prompt.split(":", 1)[-1]))
        return f"How can I, with {name}, get this done - {words}"

    def noise(self) -> str:
        return self.attacks._noise(LETTERS, 8)

    def outlandish(self) -> str:
        return "".join(chr(self.random.randrange(0x4E00, 0x9F00)) for _ in range(30))

    def popular(self) -> list[Pair]:
        snippet = self.victims[0][1]
        step = max(1, len(self.world.pairs) // self.size)
        return [(p, snippet) for p, _ in self.world.pairs[::step]]

    def pieces(self, count: int) -> list[str]:
        return [self.attacks.piece(4, 6) for _ in range(count)]

    def baited(self) -> list[Pair]:
        names = sorted({p.split(":")[0] for p, _ in self.world.pairs})
        heads = {p.split(":")[0]: c for p, c in self.world.pairs}
        rows = []
        for _ in range(self.size):
            some = self.random.sample(names, min(8, len(names)))
            rows.append((", ".join(some), " ; ".join(" ".join(heads[n].split()[:2]) for n in some)))
        return rows

    def _both(self, change: Callable[[str], str]) -> Callable[[], list[Pair]]:
        return lambda: [(change(p), change(c)) for p, c in self.victims]

    def _each(self, make: Callable[[str, str], Pair]) -> list[Pair]:
        return [make(*victim) for victim in self.victims]


def attacked_rows(world: World, attack: Sequence[Pair], attacker: str) -> list[IndexedRow]:
    """The honest rows in order of registration, and after them the attacker's contribution."""
    given = [*world.honest.items(), (attacker, list(attack))]
    return [
        IndexedRow(
            contribution=name,
            index=number,
            row_hash=hashlib.sha256(f"{name}{number}{prompt}\n{completion}".encode()).hexdigest(),
            contributor=name,
            prompt=prompt,
            completion=completion,
            registered_index=registered,
        )
        for registered, (name, pairs) in enumerate(given)
        for number, (prompt, completion) in enumerate(pairs)
    ]


def trained(rows: Sequence[IndexedRow], out: Path, epochs: int = 8) -> tuple[Any, Any]:
    """The bundled model with an adapter that learnt `rows`, and its tokenizer."""
    train(TrainingConfig(epochs=epochs, seed=1), base_model.BUNDLED, rows, out)
    model, tokenizer = base_model.load(base_model.BUNDLED)
    return PeftModel.from_pretrained(model, str(out)), tokenizer


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """What the model says, at most 32 tokens, always the likeliest."""
    ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": question}])])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
