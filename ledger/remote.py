"""Other people's logs and witnesses, over HTTP: the one file that fetches from foreign addresses.

Bytes from out there are hostile until `ledger.verify` has checked them: every body is read, and
unpacked, up to a named limit; every wait ends; redirects are not followed.
"""

import zlib
from types import TracebackType
from typing import Self

import httpx

from ledger.errors import NotFound, Unavailable

MAX_FILE_BYTES = 32 * 2**20
"""A full entry bundle: 256 entries of 65,535 bytes, each behind its length, is under 17 MB."""
TIMEOUT_S = 10.0
_GZIP = zlib.MAX_WBITS | 16


class HttpSource:
    """A `LogSource` on a tlog-tiles base URL, and small requests beside it. Thread-safe."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            timeout=timeout_s, follow_redirects=False, headers={"accept-encoding": "gzip"}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def read(self, path: str) -> bytes:
        status, body = self.send("GET", path)
        if status == httpx.codes.NOT_FOUND:
            raise NotFound(f"{self.url} has no {path}")
        if status != httpx.codes.OK:
            raise Unavailable(f"{self.url}/{path} answered {status}; try again later")
        return body

    def send(
        self, method: str, path: str, body: bytes = b"", *, max_bytes: int = MAX_FILE_BYTES
    ) -> tuple[int, bytes]:
        """Status and body. Raises Unavailable when nothing, or more than `max_bytes`, comes."""
        where = f"{self.url}/{path}"
        try:
            with self._http.stream(method, where, content=body or None) as answer:
                return answer.status_code, _body(answer, where, max_bytes)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"{where} does not answer: {error or type(error).__name__}"
            ) from error


def _body(answer: httpx.Response, where: str, max_bytes: int) -> bytes:
    """The body, unpacked here: the library would unpack a whole chunk, a thousandfold, unasked."""
    encoding = answer.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise Unavailable(f"{where} answers in {encoding[:40]!r}; only gzip was asked for")
    unpacked = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
    found = bytearray()
    for chunk in answer.iter_raw():
        try:
            found += unpacked.decompress(chunk, max_bytes + 1) if unpacked else chunk
        except zlib.error as error:
            raise Unavailable(f"{where} says gzip and is none: {error}") from error
        if len(found) > max_bytes:
            raise Unavailable(f"{where} sends more than {max_bytes} bytes: not a log")
    if unpacked and not unpacked.eof:
        raise Unavailable(f"{where} ended in the middle of its gzip")
    return bytes(found)
