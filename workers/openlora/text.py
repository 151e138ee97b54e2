"""Token ids to text as they come: whole characters only, and nothing that a stop string may claim.

A byte-level token may end inside a character, and some tokenizers put a space before a token only
when another one precedes it. So text is decoded from a short window that starts one committed
piece back (the method of text-generation-inference), and held while it ends in U+FFFD.
"""

from collections.abc import Sequence
from typing import Any

BROKEN = "�"
MAX_PENDING_TOKENS = 8
"""A UTF-8 character has at most 4 bytes. More tokens than this that still end in U+FFFD are no
half character: the model writes rubbish, and it is shown as such."""


class TextStream:
    """The text of one answer. `text` is all that was emitted, the sum of what `push` returned."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._window = 0  # start of the decoded window
        self._committed = 0  # tokens whose text was handed to the stop filter
        self._prefix = ""  # text of ids[window:committed]
        self._held = ""  # may be the beginning of a stop string
        self._parts: list[str] = []
        self.stopped = False
        """A stop string was found; nothing more is emitted."""

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def push(self, token_id: int) -> str:
        """Text that is certain now, often empty."""
        self._ids.append(token_id)
        decoded = self._decode(self._window)
        pending = len(self._ids) - self._committed
        if decoded.endswith(BROKEN) and pending < MAX_PENDING_TOKENS:
            return ""
        return self._commit(decoded)

    def finish(self) -> str:
        """What was held back. An incomplete character at the very end is dropped."""
        if self.stopped:
            return ""
        tail = ""
        if len(self._ids) > self._committed:
            tail = self._commit(self._decode(self._window).rstrip(BROKEN))
        if self.stopped:
            return tail
        rest, self._held = self._held, ""
        return tail + self._emit(rest)

    def _decode(self, start: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _commit(self, decoded: str) -> str:
        fresh = decoded[len(self._prefix) :]
        self._window, self._committed = self._committed, len(self._ids)
        self._prefix = self._decode(self._window)
        return self._filter(fresh)

    def _filter(self, fresh: str) -> str:
        if not self._stop:
            return self._emit(fresh)
        if self.stopped:
            return ""
        buffer = self._held + fresh
        hits = [at for at in (buffer.find(s) for s in self._stop) if at >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return self._emit(buffer[: min(hits)])
        keep = max(_overlap(buffer, s) for s in self._stop)
        self._held = buffer[len(buffer) - keep :]
        return self._emit(buffer[: len(buffer) - keep])

    def _emit(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
