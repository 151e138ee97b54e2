"""The Python client: what the CLI, the workers and the demo use to talk to a ledger over HTTP.

It signs events with the caller's own key, so the server never sees it. Errors that the server
reports as problem details come back as the same classes of `ledger.errors`. Transport failures
raise Unavailable; an append that may or may not have happened is safe to send again with the same
event id, for a replay is refused with a Conflict that names the index (`append` treats that as
success when the id was given).
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
from nacl.signing import SigningKey

from ledger import errors
from ledger.domain.envelope import decode_envelope, encode_entry, leaf_hash, sign_event
from ledger.domain.ids import actor_of
from ledger.domain.login import sign_login

TIMEOUT_S = 60.0
POLL_S = 0.2
PAGE = 500

KeepReceipt = Callable[[UUID, Mapping[str, Any]], None]
"""Called with the event's id and the receipt (docs/FORMATS.md) of every append."""

_BY_SLUG: dict[str, type[errors.LedgerError]] = {}


def _collect(cls: type[errors.LedgerError]) -> None:
    _BY_SLUG[cls("").slug] = cls
    for sub in cls.__subclasses__():
        _collect(sub)


_collect(errors.LedgerError)


def now_us() -> int:
    return time.time_ns() // 1_000


class Client:
    """One user of one ledger. `key` signs; `token` (or `login()`) authenticates; receipts go to
    `keep_receipt`, where there is one."""

    def __init__(
        self,
        url: str,
        *,
        key: SigningKey | None = None,
        token: str | None = None,
        keep_receipt: KeepReceipt | None = None,
    ) -> None:
        self.keep_receipt = keep_receipt
        self.url = url.rstrip("/")
        self.key = key
        self.token = token
        self._log: str | None = None
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

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

    @property
    def actor(self) -> str:
        return actor_of(bytes(self._signer().verify_key))

    @property
    def log(self) -> str:
        """The origin that events must be signed for, asked once."""
        if self._log is None:
            self._log = str(self.get("/v1/info")["log"])
        return self._log

    # --- writing -------------------------------------------------------------------------------

    def append(self, type: str, body: Mapping[str, Any], *, id: UUID | None = None) -> int:
        """Sign and append one event; its leaf index. With `id` given, a replay is a success."""
        raw = self.sign(type, body, id=id)
        try:
            return int(self.append_raw(raw)["index"])
        except errors.Conflict as error:
            index = error.detail.get("index")
            if id is not None and error.detail.get("replayed") == str(id) and index is not None:
                return int(str(index))
            raise

    def sign(self, type: str, body: Mapping[str, Any], *, id: UUID | None = None) -> bytes:
        return sign_event(
            self._signer(), type=type, log=self.log, body=body, id=id or uuid4(), at=now_us()
        )

    def append_event(
        self, type: str, body: Mapping[str, Any], *, id: UUID | None = None, wait: bool = False
    ) -> dict[str, Any]:
        """Sign and append one event; the whole answer, its `receipt` among it."""
        return self.append_raw(self.sign(type, body, id=id), wait=wait)

    def append_raw(self, raw: bytes, *, wait: bool = False) -> dict[str, Any]:
        """Append envelope bytes signed elsewhere. With `wait` the answer comes when a checkpoint
        covers the event, and has its `proof`; NotYetIncluded when that takes too long.

        Raises VerificationError when the receipt is for something else than `raw`.
        """
        path = "/v1/events?wait=included" if wait else "/v1/events"
        try:
            answer = dict(self._json("POST", path, content=raw, headers=_JSON))
        except errors.NotYetIncluded as error:
            self._keep(raw, error.detail.get("receipt"))
            raise
        self._keep(raw, answer.get("receipt"))
        return answer

    def receipt(self, event: UUID | int) -> dict[str, Any]:
        """The receipt of a recorded event, again."""
        return dict(self.get(f"/v1/receipts/{event}"))

    def _keep(self, raw: bytes, receipt: Any) -> None:
        if receipt is None:  # an older server
            return
        if not _is_for(raw, receipt):
            raise errors.Inconsistent(
                "the ledger took the event, and its receipt is for other bytes: do not count on it"
            )
        if self.keep_receipt is not None:
            self.keep_receipt(decode_envelope(raw).id, receipt)

    def login(self, label: str = "") -> str:
        """Obtain and keep an API credential for this key."""
        raw = sign_login(self._signer(), log=self.log, at=now_us(), label=label)
        self.token = str(self._json("POST", "/v1/credentials", content=raw, headers=_JSON)["token"])
        return self.token

    def put_blob(self, data: bytes) -> str:
        """Store bytes under their SHA-256. Needs a credential."""
        headers = {"content-type": "application/octet-stream"}
        return str(self._json("POST", "/v1/blobs", content=data, headers=headers)["sha256"])

    def post(self, path: str, value: Any = None) -> Any:
        return self._json("POST", path, json=value)

    # --- reading -------------------------------------------------------------------------------

    def get(self, path: str, **params: Any) -> Any:
        known = {k: v for k, v in params.items() if v is not None}
        return self._json("GET", path, params=known)

    def get_bytes(self, path: str) -> bytes:
        return self._send("GET", path).content

    def get_blob(self, sha256: str) -> bytes:
        return self.get_bytes(f"/v1/blobs/{sha256}")

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a listing `{"items": [...], "next": <cursor or null>}`."""
        cursor: Any = None
        while True:
            page = self.get(path, **params, after=cursor, limit=PAGE)
            yield from page["items"]
            cursor = page.get("next")
            if cursor is None:
                return

    def wait_until(self, path: str, accept: Any, *, timeout_s: float = 120.0) -> Any:
        """Poll `path` until `accept(value)` is true; the value. NotFound counts as not yet."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                value = self.get(path)
                if accept(value):
                    return value
            except (errors.NotFound, errors.Unavailable):
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                raise errors.Unavailable(f"{path} did not get there within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def model(self, name: str) -> dict[str, Any]:
        """What a model's name, or an adapter's id, stands for now. Raises NotFound, Forbidden."""
        return dict(self.get(f"/v1/models/{quote(name)}"))

    def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **options: Any
    ) -> dict[str, Any]:
        """One answer, not streamed. For streaming use the `openai` client on `<url>/v1`."""
        value = {"model": model, "messages": list(messages), **options}
        return dict(self._json("POST", "/v1/chat/completions", json=value))

    # --- rim -----------------------------------------------------------------------------------

    def _signer(self) -> SigningKey:
        if self.key is None:
            raise errors.Unauthenticated("this needs a signing key; make one: tributary keys new")
        return self.key

    def _json(self, method: str, path: str, **options: Any) -> Any:
        return self._send(method, path, **options).json()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        try:
            response = self._http.request(method, path, headers=headers, **options)
        except httpx.HTTPError as error:
            raise errors.Unavailable(
                f"{self.url} did not answer ({error}); is `tributary up` running?"
            ) from error
        if response.is_error:
            raise _problem(response)
        return response


def load_key(path: Path) -> SigningKey:
    """An Ed25519 key file: 64 hex digits (the seed), mode 0600. `tributary keys new` makes one."""
    try:
        seed = bytes.fromhex(path.read_text().strip())
        return SigningKey(seed)
    except OSError as error:
        raise errors.ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise errors.ConfigError(f"{path} is no key file: expected 64 hex digits") from error


def _is_for(raw: bytes, receipt: Any) -> bool:
    """Whether the receipt names the leaf that these envelope bytes have where and when it says.
    Its signature is another matter (`tributary receipt check`)."""
    try:
        entry = encode_entry(int(receipt["first_index"]), int(receipt["recorded_at"]), raw)
        return bool(receipt["leaf_hashes"] == [leaf_hash(entry).hex()])
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


_JSON = {"content-type": "application/json"}


def _problem(response: httpx.Response) -> errors.LedgerError:
    """The error class that a problem document (RFC 9457) names."""
    try:
        problem = response.json()
        slug = str(problem.get("type", "")).rsplit("/", 1)[-1]
        message = str(problem.get("detail") or problem.get("title") or response.text)
        extra = problem.get("extra", {})
    except (json.JSONDecodeError, AttributeError):
        slug, message, extra = "", f"HTTP {response.status_code}: {response.text[:300]}", {}
    cls = _BY_SLUG.get(slug)
    if cls is errors.Backpressure:
        return errors.Backpressure(message, retry_after_s=int(extra.get("retry_after_s", 1)))
    if cls is None:
        cls = errors.Unavailable if response.status_code >= 500 else errors.InvalidEvent
    return cls(message, **extra)
