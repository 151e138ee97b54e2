"""The workers' link to the ledger: a client that signs in by itself, and the folders they share.

Knows the client and files; no Ray and no engines. Everything a worker learns comes through here,
by HTTP, so that a worker may run where the ledger does not.
"""

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ledger.client import Client, load_key
from ledger.errors import ConfigError, InvalidEvent, Unauthenticated

_OPEN_PATHS = ("/v1/info", "/v1/credentials", "/v1/events")
"""Answered without a credential: signing in must not wait for itself."""
_UUID = re.compile(r"[0-9a-f-]{36}")


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What any worker process needs to know; it travels to actors, so it holds paths, no secrets.

    `base_model` is a model folder; None means the bundled one. `keep` are models or ids of
    adapters that no engine evicts where they are at home.
    """

    api: str
    key_file: Path
    home: Path
    base_model: Path | None = None
    keep: frozenset[str] = frozenset()

    def client(self) -> "WorkerClient":
        return WorkerClient(self.api, self.key_file)

    def run_folder(self, run: str) -> Path:
        """Everything that a run keeps on disk. Raises InvalidEvent when `run` is no UUID."""
        return self.home / "runs" / plain_uuid(run)

    def base_path(self) -> Path:
        """Folder of the base model; raises ConfigError where there is none."""
        from workers import base_model

        path = base_model.folder(self.base_model)
        if not path.is_dir():
            raise ConfigError(
                f"no base model at {path}; give a folder with config.json and model.safetensors "
                "(download a hub model first), or make the bundled one: make base-model"
            )
        return path


class WorkerClient(Client):
    """A Client that signs in when it must, and again when its credential is gone. Thread-safe."""

    def __init__(self, url: str, key_file: Path) -> None:
        super().__init__(url, key=load_key(key_file))
        self._signing_in = threading.Lock()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        if path in _OPEN_PATHS:
            return super()._send(method, path, **options)
        used = self._credential(None)
        try:
            return super()._send(method, path, **options)
        except Unauthenticated:
            self._credential(used)
            return super()._send(method, path, **options)

    def _credential(self, stale: str | None) -> str:
        """A credential other than `stale`; threads that lost the same one sign in once."""
        with self._signing_in:
            if self.token is None or self.token == stale:
                self.token = None
                self.login("worker")
            assert self.token is not None
            return self.token


def plain_uuid(text: str) -> str:
    """`text` if it may stand in a path or URL as an id; InvalidEvent otherwise."""
    if not _UUID.fullmatch(text):
        raise InvalidEvent(f"{text[:60]!r} is no id: expected a lower-case UUID")
    return text
