"""`HttpSource`: what a server may send us, and what it may not make us do."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ledger.errors import NotFound, Unavailable
from ledger.remote import HttpSource

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(answer: Answer) -> Iterator[HttpSource]:
    status, headers, body = answer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with HttpSource(f"http://127.0.0.1:{server.server_port}/log/", timeout_s=5) as source:
            yield source
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_comes_as_it_is_or_gzipped() -> None:
    with serving((200, {}, b"tile")) as source:
        assert source.read("tile/0/000") == b"tile"
    with serving((200, {"content-encoding": "gzip"}, gzip.compress(b"tile" * 999))) as source:
        assert source.read("tile/0/000") == b"tile" * 999


def test_what_is_not_there_and_what_fails() -> None:
    with serving((404, {}, b"")) as source, pytest.raises(NotFound, match="has no checkpoint"):
        source.read("checkpoint")
    with serving((500, {}, b"")) as source, pytest.raises(Unavailable, match="answered 500"):
        source.read("checkpoint")
    gone = HttpSource("http://127.0.0.1:9", timeout_s=1)
    with gone, pytest.raises(Unavailable, match="does not answer"):
        gone.read("checkpoint")


def test_redirects_are_not_followed() -> None:
    moved = {"location": "http://127.0.0.1:9/"}
    with serving((302, moved, b"")) as source, pytest.raises(Unavailable, match="answered 302"):
        source.read("checkpoint")


@pytest.mark.parametrize("packed", [False, True])
def test_a_body_is_read_to_its_limit(packed: bool) -> None:
    body = bytes(5_000_000)
    headers = {"content-encoding": "gzip"} if packed else {}
    answer = (200, headers, gzip.compress(body) if packed else body)
    with serving(answer) as source:
        assert source.send("GET", "x", max_bytes=len(body)) == (200, body)
        with pytest.raises(Unavailable, match="more than 4999999 bytes"):
            source.send("GET", "x", max_bytes=len(body) - 1)


@pytest.mark.parametrize(
    ("encoding", "body", "why"),
    [
        ("br", b"x", "only gzip"),
        ("gzip, gzip", b"x", "only gzip"),
        ("gzip", b"not gzip", "is none"),
        ("gzip", gzip.compress(b"x" * 9_999)[:-9], "in the middle"),
    ],
)
def test_other_encodings_are_refused(encoding: str, body: bytes, why: str) -> None:
    answer = (200, {"content-encoding": encoding}, body)
    with serving(answer) as source, pytest.raises(Unavailable, match=why):
        source.read("checkpoint")
