"""The text and the bytes of single tokens, for log probabilities.

A byte-level token may hold half a character: its bytes are exact, its text then is not. The bytes
come from the vocabulary's own spelling, in the two forms that fast tokenizers have: GPT-2's
alphabet (each byte as a printable character), and SentencePiece's (U+2581 for a space, <0xNN> for
a byte). Knows a tokenizer and nothing else.
"""

import json
import re
from typing import Any

SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """`of(id)` is (text, bytes); answers are kept, a vocabulary is small."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _alphabet() if _is_byte_level(tokenizer) else None
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token_id: int) -> tuple[str, bytes]:
        found = self._known.get(token_id)
        if found is None:
            raw = self._bytes(token_id)
            found = self._known[token_id] = (raw.decode("utf-8", "replace"), raw)
        return found

    def _bytes(self, token_id: int) -> bytes:
        spelled = self._tokenizer.convert_ids_to_tokens(token_id)
        if spelled is None:  # beyond the vocabulary: a model's table may be padded
            return b""
        if token_id in self._special:
            return str(spelled).encode()
        if self._alphabet is not None:
            return bytes(self._alphabet[c] for c in spelled if c in self._alphabet)
        byte = _BYTE.fullmatch(spelled)
        if byte:
            return bytes([int(byte[1], 16)])
        return str(spelled).replace(SPACE, " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return False
    decoder = json.loads(core.to_str()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for U+0100 onwards in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {chr(byte): byte for byte in plain}
    return spelled | {chr(0x100 + n): byte for n, byte in enumerate(others)}
