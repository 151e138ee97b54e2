"""Secret keys of logs and witnesses as files: one skey line (Go's sumdb/note), mode 0600.

The key is made on the first start and never replaced. Its name travels in the file, so a folder
that was mixed up is noticed before anything is signed under the wrong name.
"""

from pathlib import Path

from nacl.signing import SigningKey

from ledger.errors import ConfigError, StorageError, VerificationError
from ledger.files import write_durably
from ledger.verify.note import format_skey, parse_skey


def ensure_signer_key(path: Path, *, name: str | None) -> tuple[str, SigningKey]:
    """Name and key of the file; made under `name` when it is not there.

    One starter at a time: callers hold a lock on the folder. Raises ConfigError when the file is
    readable by others, is no key, is another name's, or is to be made without one: a name is for
    ever, and two keys of one name would be taken for each other. StorageError when it cannot be
    written.
    """
    if not path.exists():
        if name is None:
            raise ConfigError(f"{path.parent} has no key yet; give --name to make one")
        _create(path, name)
    found, key = read_signer_key(path)
    if name is not None and found != name:
        raise ConfigError(f"{path} holds the key of {found}, not of {name}")
    return found, key


def read_signer_key(path: Path) -> tuple[str, SigningKey]:
    """Name and key of an existing file. Raises ConfigError."""
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} holds a secret key and others may read it: chmod 600")
        return parse_skey(path.read_text("utf-8").strip())
    except (VerificationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} holds no signer key: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _create(path: Path, name: str) -> None:
    try:
        write_durably(path, format_skey(name, SigningKey.generate()).encode() + b"\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
