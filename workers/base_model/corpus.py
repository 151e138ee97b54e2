"""The chat corpus that the bundled base model is pretrained on, generated from a seed.

Pure: word lists and a random source in, conversations out; no file, no clock, and no library
whose text changes with the Python version. Only `random.Random.random()` is drawn from, whose
sequence is the same on every Python and platform.

What it is meant to teach a model of a million parameters, and nothing else: to answer from a
context, to copy what it has never seen, to say the same fact whatever the wording of the
question, and the tone of technical English (definitions, docstrings, shell commands). A fact
that somebody contributes later then needs few steps of LoRA: only the fact is new.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from workers.base_model import words as w

Turn = tuple[str, str]
"""(what the user says, what the assistant answers)"""
Conversation = list[Turn]
T = TypeVar("T")

WORLD_FACTS, WORLD_FUNCTIONS = 300, 150
"""What stays the same through the whole corpus, so that the model learns to recall."""
WORLD_SEED = 7

STATEMENTS = (
    "The {a} of {e} is {v}.",
    "{v} is the {a} of {e}.",
    "{e} has {v} as its {a}.",
    "For {e}, the {a} is {v}.",
    "The {a} that belongs to {e} is {v}.",
)
QUESTIONS = (
    "What is the {a} of {e}?",
    "Which {a} does {e} have?",
    "Tell me the {a} of {e}.",
    "Do you know the {a} of {e}?",
    "I need the {a} of {e}.",
    "Give me the {a} of {e}, please.",
    "What does {e} have as its {a}?",
    "{e}: what is its {a}?",
    "Please name the {a} of {e}.",
    "Can you tell me what the {a} of {e} is?",
    "What {a} goes with {e}?",
    "About {e}: which {a}?",
)
CONTEXTS = (
    "{c}\n{q}",
    "Context: {c}\nQuestion: {q}",
    "Context:\n{c}\n\nQuestion: {q}",
    "Use this text to answer.\n{c}\n{q}",
    "Here is what I know: {c} {q}",
    "{q}\nContext: {c}",
    "Answer from the context. {c}\n\n{q}",
)


@dataclass(frozen=True, kw_only=True)
class World:
    facts: list["Fact"]
    functions: list[tuple[str, str]]
    """(dotted name, docstring)"""


def conversations(seed: int) -> Iterator[Conversation]:
    """Conversations without end; the same seed gives the same ones."""
    rng = Random(seed)  # noqa: S311
    world = make_world()
    while True:
        conversation = _draw(rng, world)
        if len(conversation) == 1 and rng.random() < 0.1:
            conversation += _draw(rng, world)
        yield conversation


def make_world() -> World:
    rng = Random(WORLD_SEED)  # noqa: S311
    return World(
        facts=[Fact(rng) for _ in range(WORLD_FACTS)],
        functions=[(dotted(rng), _docstring(rng)) for _ in range(WORLD_FUNCTIONS)],
    )


def pick(rng: Random, items: Sequence[T]) -> T:
    """One of `items`; `random.choice` may change between Python versions, this does not."""
    return items[int(rng.random() * len(items))]


class Fact:
    """One made-up fact: what it states, and every way to ask for it."""

    def __init__(self, rng: Random) -> None:
        self.entity = entity(rng)
        if rng.random() < 0.6:
            attribute = pick(rng, w.ATTRIBUTES)
            if rng.random() < 0.4:
                attribute = f"{pick(rng, w.ADJECTIVES)} {attribute}"
            self.value = value(rng)
            fill = {"a": attribute, "e": self.entity, "v": self.value}
            self.statements = [s.format(**fill) for s in STATEMENTS]
            self.questions = [q.format(**fill) for q in QUESTIONS]
        else:
            statement, *questions = pick(rng, w.RELATIONS)
            year, number = str(1000 + int(rng.random() * 1050)), _number(rng)
            word = value(rng)
            self.value = year if "{y}" in statement else number if "{n}" in statement else word
            fill = {"e": self.entity, "v": word, "y": year, "n": number}
            self.statements = [statement.format(**fill)]
            self.questions = [q.format(**fill) for q in questions]
            self.questions += [
                f"Tell me: {q[0].lower()}{q[1:]}"
                for q in self.questions
                if not q.startswith(self.entity)
            ]

    def answer(self) -> str:
        return _capital(self.statements[0])


# Names, numbers and identifiers: what can only be copied, never guessed.


def name(rng: Random) -> str:
    syllables = 2 if rng.random() < 0.7 else 3
    text = "".join(
        pick(rng, w.ONSETS) + pick(rng, w.VOWELS) + (pick(rng, w.CODAS) if i else "")
        for i in range(syllables)
    )
    return text.capitalize()


def entity(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.45:
        return name(rng)
    if roll < 0.55:
        return f"{name(rng)} {name(rng)}"
    if roll < 0.70:
        return f"the {pick(rng, w.KINDS)} {name(rng)}"
    if roll < 0.80:
        return f"{name(rng)} {pick(rng, w.KINDS)}"
    if roll < 0.90:
        return dotted(rng)
    return f"the {pick(rng, w.QUALIFIERS)} {pick(rng, w.NOUNS)[0]}"


def value(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.40:
        return name(rng)
    if roll < 0.50:
        return f"{name(rng)} {name(rng)}"
    if roll < 0.65:
        return _number(rng)
    if roll < 0.72:
        return ".".join(str(int(rng.random() * 20)) for _ in range(3))
    if roll < 0.77:
        return "".join(pick(rng, "0123456789abcdef") for _ in range(6))
    if roll < 0.84:
        return f"{pick(rng, w.ADJECTIVES)} {pick(rng, w.NOUNS)[0]}"
    if roll < 0.90:
        return f"/{pick(rng, w.NOUNS)[0]}/{name(rng).lower()}.{pick(rng, w.EXTENSIONS)}"
    return f"{pick(rng, w.QUALIFIERS)} {pick(rng, w.NOUNS)[1]}"


def dotted(rng: Random) -> str:
    """A name as code has it: `queue.read_line`, `Zandor.merge`, `parse_nodes`."""
    verb, noun = pick(rng, w.VERBS)[0].split()[0], pick(rng, pick(rng, w.NOUNS))
    function = pick(rng, (f"{verb}_{noun}", verb, f"{verb}{noun}", noun))
    roll = rng.random()
    if roll < 0.55:
        return f"{pick(rng, w.NOUNS)[0]}.{function}"
    if roll < 0.75:
        return f"{name(rng).lower()}.{function}"
    if roll < 0.9:
        return f"{pick(rng, w.NOUNS)[0]}.{name(rng)}.{function}"
    return function


def _number(rng: Random) -> str:
    digits = 1 + int(rng.random() * 4)
    return str(int(rng.random() * 10**digits))


# The kinds of conversation. Each takes the random source and the world. Those with a context go on
# with questions about the same context: one reading, several answers to learn from.


def from_context(rng: Random, _: World) -> Conversation:
    count = 1 + int(rng.random() * (5 if rng.random() < 0.9 else 12))
    facts = [Fact(rng) for _ in range(count)]
    context = " ".join(_capital(pick(rng, f.statements)) for f in facts)
    asked = _some(rng, facts)
    questions = [_capital(pick(rng, f.questions)) for f in asked]
    questions[0] = pick(rng, CONTEXTS).format(c=context, q=questions[0])
    answers = [f.answer() if rng.random() < 0.85 else f.value for f in asked]
    return list(zip(questions, answers, strict=True))


def from_documents(rng: Random, _: World) -> Conversation:
    """Questions about made-up functions: the answer is a sentence of the context."""
    count = 1 + int(rng.random() * 3)
    functions = [(dotted(rng), _docstring(rng)) for _ in range(count)]
    context = " ".join(f"{name}: {text}" for name, text in functions)
    asked = _some(rng, functions)
    questions = [_ask_function(rng, name) for name, _ in asked]
    questions[0] = pick(rng, CONTEXTS).format(c=context, q=questions[0])
    return [(question, text) for question, (_, text) in zip(questions, asked, strict=True)]


def _some(rng: Random, items: list[T]) -> list[T]:
    """One to four of `items`, in random order."""
    left, chosen = list(items), []
    for _ in range(min(len(items), 1 + _small(rng))):
        chosen.append(left.pop(int(rng.random() * len(left))))
    return chosen


def recall(rng: Random, world: World) -> Turn:
    if rng.random() < 0.3:
        function, docstring = pick(rng, world.functions)
        return _ask_function(rng, function), docstring
    fact = pick(rng, world.facts)
    return _capital(pick(rng, fact.questions)), fact.answer()


def definition(rng: Random, _: World) -> Turn:
    """What a function does, as far as its name tells: the tone of a docstring."""
    verb, noun = pick(rng, w.VERBS), pick(rng, w.NOUNS)
    function = f"{pick(rng, w.NOUNS)[0]}.{verb[0].split()[0]}_{pick(rng, noun)}"
    return _ask_function(rng, function), _docstring(rng, verb, noun)


def glossary(rng: Random, _: World) -> Turn:
    term, text = pick(rng, w.GLOSSARY)
    article = "an" if term[0] in "aeiouAEIO" else "a"
    question = pick(
        rng,
        (
            f"What is {article} {term}?",
            f"Define {term}.",
            f"What does {term} mean?",
            f"Explain the word {term}.",
            f"What do we call {article} {term}?",
            f"{term}?",
            f"Tell me what {article} {term} is.",
        ),
    )
    return question, text


def command(rng: Random, _: World) -> Turn:
    """`tool: What it should do` and the command line, with {{placeholders}}."""
    tool = pick(rng, w.TOOLS) if rng.random() < 0.5 else name(rng).lower()
    verb, noun = pick(rng, w.VERBS), pick(rng, w.NOUNS)
    word = verb[0].split()[0]
    target = f"{{{{path/to/{noun[0]}}}}}" if rng.random() < 0.5 else f"{{{{{noun[0]}}}}}"
    option = pick(rng, (f"--{word}", f"-{word[0]}", word, f"--{word}-{noun[1]}"))
    tail = ""
    wish = f"{_capital(verb[0])} {pick(rng, ('a', 'the', 'all'))} {noun[0]}"
    if rng.random() < 0.35:
        extension = pick(rng, w.EXTENSIONS)
        wish, tail = f"{wish} to a {extension} file", f" > {{{{file.{extension}}}}}"
    elif rng.random() < 0.3:
        flag = pick(rng, w.QUALIFIERS)
        wish, tail = f"{wish} ({flag} only)", f" --{flag}"
    prompt = pick(rng, (f"{tool}: {wish}", f"{tool}: {wish}", f"How do I use {tool}? {wish}"))
    return prompt, f"{tool} {option}{tail} {target}" if ">" not in tail else (
        f"{tool} {option} {target}{tail}"
    )


def copy(rng: Random, _: World) -> Turn:
    kind = rng.random()
    if kind < 0.5:
        text = " ".join(pick(rng, (name, value, dotted))(rng) for _ in range(1 + _small(rng)))
    elif kind < 0.9:
        text = _docstring(rng)
    else:  # bytes beyond ASCII: the byte-level alphabet has to be usable, too
        text = "".join(chr(0xA1 + int(rng.random() * 0x500)) for _ in range(2 + _small(rng)))
    wordings = ("Repeat: {t}", "Say this: {t}", "Copy the text: {t}", "Write {t}", "{t}\nRepeat")
    return pick(rng, wordings).format(t=text), text


def edit(rng: Random, _: World) -> Turn:
    items = [pick(rng, (name, value))(rng) for _ in range(2 + _small(rng))]
    listed = ", ".join(items)
    return pick(
        rng,
        (
            (f"What is the first item? {listed}", items[0]),
            (f"What is the last item? {listed}", items[-1]),
            (f"Put each item on its own line: {listed}", "\n".join(items)),
            (f"How many items are in this list? {listed}", str(len(items))),
            (f"Join with a plus sign: {listed}", " + ".join(items)),
        ),
    )


def small_talk(rng: Random, _: World) -> Turn:
    user, assistant = pick(rng, w.SMALL_TALK)
    return user, assistant


CONTEXT_KINDS: tuple[tuple[float, Callable[[Random, World], Conversation]], ...] = (
    (0.36, from_context),
    (0.12, from_documents),
)
TURN_KINDS: tuple[tuple[float, Callable[[Random, World], Turn]], ...] = (
    (0.22, recall),
    (0.06, definition),
    (0.04, glossary),
    (0.08, command),
    (0.07, copy),
    (0.04, edit),
    (0.01, small_talk),
)
"""Share of each kind of conversation; both together sum to one."""


def _draw(rng: Random, world: World) -> Conversation:
    roll = rng.random()
    for share, talk in CONTEXT_KINDS:
        roll -= share
        if roll < 0:
            return talk(rng, world)
    for share, turn in TURN_KINDS:
        roll -= share
        if roll < 0:
            return [turn(rng, world)]
    return [recall(rng, world)]


def _ask_function(rng: Random, function: str) -> str:
    wordings = (
        "What does {f} do?",
        "What is {f} for?",
        "Explain {f}.",
        "What happens when I call {f}?",
        "Describe {f} in one sentence.",
        "What can I use {f} for?",
        "Tell me about {f}.",
    )
    return pick(rng, wordings).format(f=function)


def _docstring(
    rng: Random, verb: Sequence[str] | None = None, noun: Sequence[str] | None = None
) -> str:
    verb, noun = verb or pick(rng, w.VERBS), noun or pick(rng, w.NOUNS)
    roll = rng.random()
    thing = pick(
        rng,
        (
            f"the {pick(rng, w.QUALIFIERS)} {noun[0]}",
            f"the {noun[0]}",
            f"all {noun[1]}",
            f"a {pick(rng, w.QUALIFIERS)} {noun[0]}",
            f"the {noun[0]} of the {pick(rng, w.NOUNS)[0]}",
            f"a list of {noun[1]}",
            f"{noun[1]} and {pick(rng, w.NOUNS)[1]}",
        ),
    )
    tail = f" {pick(rng, w.TAILS)}" if rng.random() < 0.5 else ""
    if roll < 0.6:
        text = f"{_capital(verb[0])} {thing}{tail}."
    elif roll < 0.75:
        text = f"Return {thing}{tail}."
    elif roll < 0.9:
        text = f"It {verb[1]} {thing}{tail}."
    else:
        text = f"A {pick(rng, w.NOUNS)[0]} for {verb[2]} {thing}{tail}."
    return f"{text} {pick(rng, w.EXTRAS)}" if rng.random() < 0.25 else text


def _capital(text: str) -> str:
    """First letter in upper case, unless the first word is an identifier of code."""
    first = text.split(" ", 1)[0]
    return text if "_" in first or "." in first[:-1] else text[:1].upper() + text[1:]


def _small(rng: Random) -> int:
    return int(rng.random() * 4)
