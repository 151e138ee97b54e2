"""An answer's words as its transcript keeps them (docs/FORMATS.md, Transcript and commitments).
Pure.

A chat has `messages`. A completion has one `prompt`, which the model read as it is, without any
template; readers who only know conversations see it as one message of the role PLAIN, which no
request can have.
"""

from collections.abc import Mapping
from typing import Any

PLAIN = "plain"


def words_of(transcript: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
    """Messages and output. Raises KeyError or TypeError for a transcript of another form."""
    if "prompt" in transcript:
        messages = [{"role": PLAIN, "content": str(transcript["prompt"])}]
    else:
        messages = [
            {"role": str(m["role"]), "content": str(m["content"])} for m in transcript["messages"]
        ]
    return messages, str(transcript["output"])
