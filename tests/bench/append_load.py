"""The load generator of bench_append: a process of its own, as frugal as Python allows.

    python -m tests.bench.append_load PLAN RESULT

PLAN is a pickle (our own, of this run): `{"port": n, "lanes": [[(request bytes,
events), ...], ...]}`. Every lane is one keep-alive connection that sends its requests one
after the other; all lanes start together. Requests are finished bytes, and answers are only cut
out of the stream: JSON is read after the clock has stopped. One more connection reads
/log/checkpoint every POLL_S, which is how the time until inclusion is measured.

RESULT is JSON: per request `[sent, answered, status, first index, events]`, the checkpoints
`[seen, size]`, the generator's own CPU seconds. Times are CLOCK_MONOTONIC seconds.
"""

import asyncio
import json
import pickle
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

POLL_S = 0.02
COVER_TIMEOUT_S = 60.0

Request = tuple[bytes, int]
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Lane(asyncio.Protocol):
    """One connection: sends its requests in turn and keeps when what was answered."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answers: list[tuple[float, float, bytes]] = []
        self._buffer = b""
        self._sent_at = 0.0
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # uvloop's is no subclass of asyncio.Transport

    def start(self) -> None:
        if not self.requests:
            self.done.set_result(None)
            return
        self._send()

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        self._transport.write(self.requests[len(self.answers)][0])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        length = _LENGTH.search(self._buffer, 0, head)
        assert length, self._buffer[:head]
        end = head + 4 + int(length[1])
        if len(self._buffer) < end:
            return
        self.answers.append((self._sent_at, time.monotonic(), self._buffer[:end]))
        self._buffer = self._buffer[end:]
        if len(self.answers) < len(self.requests):
            self._send()
        else:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"cut after {len(self.answers)}: {error}"))


async def watch(port: int, until: "asyncio.Future[int]") -> list[tuple[float, int]]:
    """Sizes of the checkpoints seen, until one covers the size that `until` tells."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seen: list[tuple[float, int]] = []
    while True:
        writer.write(b"GET /log/checkpoint HTTP/1.1\r\nhost: bench\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        assert length, head
        note = await reader.readexactly(int(length[1]))
        if b" 200 " in head:
            size = int(note.split(b"\n")[1])
            if not seen or size != seen[-1][1]:
                seen.append((time.monotonic(), size))
        if until.done() and seen and seen[-1][1] >= until.result():
            writer.close()
            return seen
        await asyncio.sleep(POLL_S)


async def run(port: int, lanes: Sequence[Sequence[Request]]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    made = []
    for requests in lanes:
        _, lane = await loop.create_connection(partial(Lane, requests), "127.0.0.1", port)
        made.append(lane)
    target: asyncio.Future[int] = loop.create_future()
    watching = loop.create_task(watch(port, target))
    await asyncio.sleep(0.2)
    cpu = time.process_time()
    for lane in made:
        lane.start()
    await asyncio.gather(*(lane.done for lane in made))
    answered_cpu_s = time.process_time() - cpu
    told = [
        _told(answer, events)
        for lane in made
        for answer, (_, events) in zip(lane.answers, lane.requests, strict=True)
    ]
    target.set_result(max(index + events for _, _, _, index, events in told))
    return {
        "requests": told,
        "checkpoints": await asyncio.wait_for(watching, COVER_TIMEOUT_S),
        "cpu_s": answered_cpu_s,
    }


def _told(answer: tuple[float, float, bytes], events: int) -> list[Any]:
    sent, answered, response = answer
    status = int(response[9:12])
    value = json.loads(response[response.find(b"\r\n\r\n") + 4 :])
    if status != 201:
        raise SystemExit(f"refused with {status}: {value}")
    return [sent, answered, status, value["index"] if events == 1 else value["indexes"][0], events]


def main() -> None:
    # A pickle that the benchmark itself wrote a moment ago.
    plan = pickle.loads(Path(sys.argv[1]).read_bytes())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(run(plan["port"], plan["lanes"]))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
