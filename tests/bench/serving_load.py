"""The load of the serving test, in a process of its own: clients that stream chat completions over
raw sockets, and keep what they heard.

    python -m tests.bench.serving_load < plan.json > heard.json

A plan is `{"host", "port", "seconds", "max_tokens", "prompt", "retry", "requests", "jobs"}`, a job
`{"model", "token"}`: one client each, with a connection of its own, asking one answer after another
until the time is over (or `requests` of them). What it writes names every answer with its receipt,
and times in seconds.

A library for HTTP would take more of the core than the API does; this reads chunks and server-sent
events in some lines, and parses the first, the last, and what is no token.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

CONNECT_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 300.0
MAX_ERRORS = 200
MAX_RETRY_S = 5.0


@dataclass(kw_only=True)
class Answer:
    """One request: what came of it. `gaps_s` lie between pieces with text."""

    client: int
    status: int = 0
    inference: str = ""
    receipt: dict[str, Any] | None = None
    finish: str | None = None
    done: bool = False
    """`[DONE]` came."""
    pieces: int = 0
    tokens: int = 0
    started_s: float = 0.0
    ttft_s: float | None = None
    total_s: float = 0.0
    longest_gap_s: float = 0.0
    retry_after_s: str | None = None
    error: str | None = None


@dataclass(kw_only=True)
class Heard:
    answers: list[Answer] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    refused: int = 0
    pieces_at: Counter[int] = field(default_factory=Counter)
    """By whole seconds since the start."""
    began: float = field(default_factory=time.monotonic)


class Client:
    """One connection, kept open between answers."""

    def __init__(self, number: int, plan: dict[str, Any], job: dict[str, str]) -> None:
        self._number, self._plan, self._job = number, plan, job
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, heard: Heard, question: int) -> Answer:
        answer = Answer(client=self._number, started_s=time.monotonic())
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._connect()
                await self._send(question)
                await self._read(answer, heard)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            answer.error = answer.error or f"{type(error).__name__}: {error}"
            self.close()
        answer.total_s = time.monotonic() - answer.started_s
        return answer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _connect(self) -> None:
        if self._writer is None:
            host, port = self._plan["host"], self._plan["port"]
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                self._reader, self._writer = await asyncio.open_connection(host, port)

    async def _send(self, question: int) -> None:
        assert self._writer is not None
        content = self._plan["prompt"].format(client=self._number, question=question)
        body = json.dumps(
            {
                "model": self._job["model"],
                "messages": [{"role": "user", "content": content}],
                "max_tokens": self._plan["max_tokens"],
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._plan['host']}\r\n"
            f"authorization: Bearer {self._job['token']}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def _read(self, answer: Answer, heard: Heard) -> None:
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.split("\r\n")
        answer.status = int(lines[0].split(" ")[1])
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        answer.inference = headers.get("x-receipt-id") or headers.get("x-inference-id", "")
        if "chunked" not in headers.get("transfer-encoding", ""):
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
            answer.retry_after_s = headers.get("retry-after")
            answer.error = body.decode(errors="replace")[:300]
            return
        last = 0.0
        async for event in self._events():
            if event == b"[DONE]":
                answer.done = True
                continue
            now = time.monotonic()
            if _is_piece(event):
                answer.pieces += 1
                heard.pieces_at[int(now - heard.began)] += 1
                if answer.ttft_s is None:
                    answer.ttft_s = now - answer.started_s
                else:
                    heard.gaps_s.append(now - last)
                    answer.longest_gap_s = max(answer.longest_gap_s, now - last)
                last = now
            else:
                _take(answer, json.loads(event))

    async def _events(self) -> AsyncIterator[bytes]:
        """Data of server-sent events, out of the body's chunks."""
        assert self._reader is not None
        rest = b""
        while True:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            data = (await self._reader.readexactly(size + 2))[:-2]
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[6:]
            if not size:
                return


def _is_piece(event: bytes) -> bool:
    """A chunk that carries text and nothing else of interest; however its JSON is spaced."""
    return (
        b'"content":' in event
        and (b'"finish_reason":null' in event or b'"finish_reason": null' in event)
        and b'"role"' not in event
        and b'"tributary"' not in event
    )


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    answer.receipt = chunk.get("tributary", answer.receipt)
    if chunk.get("usage"):
        answer.tokens = int(chunk["usage"]["completion_tokens"])
    if "error" in chunk:
        answer.error = json.dumps(chunk["error"])[:300]
    for choice in chunk.get("choices", []):
        answer.finish = choice.get("finish_reason") or answer.finish


async def _client(number: int, plan: dict[str, Any], heard: Heard, ends: float) -> None:
    client = Client(number, plan, plan["jobs"][number])
    asked = errors = 0
    try:
        while time.monotonic() < ends and asked < plan.get("requests", 10**9):
            answer = await client.ask(heard, asked)
            if answer.status == 429 and plan.get("retry"):
                heard.refused += 1
                wait_s = min(MAX_RETRY_S, float(answer.retry_after_s or 1))
                await asyncio.sleep(wait_s)
                continue
            heard.answers.append(answer)
            asked += 1
            if answer.error is not None:
                errors += 1
                if errors > MAX_ERRORS:
                    return
                await asyncio.sleep(0.2)
    finally:
        client.close()


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    heard = Heard()
    ends = heard.began + float(plan["seconds"])
    await asyncio.gather(*(_client(n, plan, heard, ends) for n in range(len(plan["jobs"]))))
    return {
        "wall_s": time.monotonic() - heard.began,
        "cpu_s": time.process_time(),
        "pieces_at": [heard.pieces_at[second] for second in range(max(heard.pieces_at, default=0))],
        "refused": heard.refused,
        "gaps_s": heard.gaps_s,
        "answers": [asdict(answer) for answer in heard.answers],
    }


if __name__ == "__main__":
    import uvloop

    json.dump(uvloop.run(run(json.load(sys.stdin))), sys.stdout)
