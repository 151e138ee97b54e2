"""Other people's logs and witnesses, over HTTP: the one file that fetches from foreign addresses.

Bytes from out there are hostile until `ledger.verify` has checked them: every body is read up to a
named limit, every wait ends, redirects are not followed.
"""

from types import TracebackType
from typing import Self

import httpx

from ledger.errors import NotFound, Unavailable

MAX_FILE_BYTES = 32 * 2**20
"""A full entry bundle: 256 entries of 65,535 bytes, each behind its length, is under 17 MB."""
TIMEOUT_S = 10.0


class HttpSource:
    """A `LogSource` on a tlog-tiles base URL, and small requests beside it. Thread-safe."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(timeout=timeout_s, follow_redirects=False)

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
                found = bytearray()
                for chunk in answer.iter_bytes():
                    found += chunk
                    if len(found) > max_bytes:
                        raise Unavailable(f"{where} sends more than {max_bytes} bytes: not a log")
                return answer.status_code, bytes(found)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"{where} does not answer: {error or type(error).__name__}"
            ) from error
