"""How replicas and their clients find each other: files under `<home>/ray`.

    replicas/<name>.json   written by a replica that is ready (and again when it drains); 0600
    data-plane.secret      64 hex digits, mode 0600, made once by whoever needs it first

A file is replaced whole. It says where a replica *was*: a process that was killed leaves it, and
its successor of the same name replaces it. So readers connect and compare `instance`, which is new
with every start. The service removes what is left when it stops; a file
that somebody erased is written again by its replica. Knows files and nothing else.
"""

import contextlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from ledger.errors import ComputeError

MAX_FILE_BYTES = 4_096
MAX_REPLICAS = 64
SECRET_HEX = 64


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One replica: `address` is host:port, `base_model` the digest of what it serves."""

    name: str
    address: str
    pid: int
    instance: str
    base_model: str
    state: str


def write(home: Path, registration: Registration) -> None:
    folder = _folder(home)
    part = folder / f".{registration.name}.{os.getpid()}.{secrets.token_hex(4)}"
    _write_private(part, json.dumps(asdict(registration)))
    part.replace(folder / f"{registration.name}.json")


def remove(home: Path, name: str, instance: str | None = None) -> None:
    """Forget a replica; with `instance` only when the file is still that one's."""
    path = _folder(home) / f"{name}.json"
    found = _read(path)
    if instance is None or (found is not None and found.instance == instance):
        path.unlink(missing_ok=True)


def registered(home: Path) -> dict[str, Registration]:
    """By name; what cannot be read is left out, it is about to be replaced."""
    try:
        paths = sorted((Path(home) / "ray" / "replicas").glob("*.json"))[:MAX_REPLICAS]
    except OSError:
        return {}
    found = [_read(path) for path in paths if not path.name.startswith(".")]
    return {r.name: r for r in found if r is not None}


def secret(home: Path) -> str:
    """The secret that every call of this home's data plane carries. Raises ComputeError when it
    can be neither read nor made."""
    path = Path(home).absolute() / "ray" / "data-plane.secret"
    try:
        text = _secret_text(path)
    except (OSError, ValueError) as error:
        raise ComputeError(
            f"{path} cannot be read ({error}): API and replicas run as one user, on a disk that "
            "takes files"
        ) from error
    if len(text) != SECRET_HEX:
        raise ComputeError(f"{path} holds no secret of {SECRET_HEX} hex digits: remove it")
    return text


def _secret_text(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        _write_private(part, secrets.token_hex(SECRET_HEX // 2))
        # A link fails where the name is taken: of two processes that make it, one wins.
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
        part.unlink()
    return path.read_text().strip()


def _folder(home: Path) -> Path:
    folder = Path(home).absolute() / "ray" / "replicas"
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def _write_private(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)


def _read(path: Path) -> Registration | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        found = Registration(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    texts = (found.name, found.address, found.instance, found.base_model, found.state)
    whole = all(isinstance(text, str) for text in texts) and isinstance(found.pid, int)
    return found if whole and found.name == path.stem else None
