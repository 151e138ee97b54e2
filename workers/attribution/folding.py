"""Text as a reader sees it: what looks the same is the same. Pure, standard library.

For comparing rows, never for showing or training them. Compatibility forms, case, accents of the
European scripts, characters that nobody sees, and letters of one script drawn like those of another
(a small part of the confusables of Unicode TS 39) are folded away; words of letters and digits are
left.
"""

import unicodedata

MAX_CHARS = 20_000
"""Folded characters read of one field; more would let one row set the price of the pass."""

_LOOK_ALIKES = {
    "cyrillic": ("авеԁһіјкӏмпорԛѕтуѵԝхг", "abedhijklmnopqstyvwxr"),
    "greek": ("αβεζηικνορτυχωγ", "abezniknoptuxwy"),
    "other": ("ɑɡıɩʟɴոօսցհ", "agiilnnough"),
}
_FOLD = {
    ord(a): ord(b)
    for theirs, ours in _LOOK_ALIKES.values()
    for a, b in zip(theirs, ours, strict=True)
}
_FOLD[ord("с")] = ord("c")
_INVISIBLE = frozenset(
    [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), 0x115F, 0x1160, 0x17B4, 0x17B5]
)
"""Variation selectors and fillers, which Unicode calls marks and letters."""
_ACCENTS = range(0x300, 0x370)
"""Combining marks of Latin, Greek and Cyrillic; those of other scripts are their vowels."""


def folded_words(text: str) -> list[str]:
    """The words of `text` as they look; one of marks alone is one word, as it stands."""
    kept, count = [], 0
    for character in unicodedata.normalize("NFKD", text[: 4 * MAX_CHARS]):
        shown = _shown(character)
        count += len(shown) and shown != " "
        if count > MAX_CHARS:
            break
        kept.append(shown)
    words = "".join(kept).casefold().translate(_FOLD).split()
    return words or ["".join(text[:MAX_CHARS].split())]


def folded(text: str) -> str:
    """The same without what stands between words: splitting or joining them makes no other text."""
    return "".join(folded_words(text))


def _shown(character: str) -> str:
    """The character, a space for what parts words, or nothing for what is not seen."""
    if "a" <= character <= "z":
        return character
    code = ord(character)
    if code in _ACCENTS or code in _INVISIBLE:
        return ""
    if character.isalnum():
        return character
    category = unicodedata.category(character)
    if category in {"Cf", "Me"} or (category == "Cc" and not character.isspace()):
        return ""
    return character if category[0] == "M" else " "
