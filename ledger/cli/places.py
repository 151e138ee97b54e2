"""Where a whole log lies: a web server, a folder or a database; and by which key it is checked.

Files need the extra `client` alone; the composition root is imported where a database is meant.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ledger.cli.context import err
from ledger.config import Settings
from ledger.errors import ConfigError, MalformedProof, NotFound
from ledger.log.audit_files import FilesOpener
from ledger.log.audit_read import OpenReader
from ledger.log.audit_rows import RowsOpener
from ledger.log.sources import CHECKPOINT, VKEY, FolderSource
from ledger.ports import LogSource
from ledger.remote import HttpSource
from ledger.verify.note import VerifierKey, format_vkey, parse_vkey

WEB = ("http://", "https://")
DATABASE = ("postgres://", "postgresql://")
MAX_VKEY_BYTES = 1_000


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What an audit opens, by which key, and whether the key came from the log itself."""

    open_reader: OpenReader
    key: VerifierKey
    own_word: bool


@contextmanager
def to_audit(place: str | None, key: str | None, settings: Settings) -> Iterator[Audited]:
    """A URL, a folder or a database; None is this home's own database."""
    if place is not None and not is_database(place):
        source, opener = _files(place)
        found = given_key(key) or _own_key(source)
        yield Audited(open_reader=FilesOpener(open_source=opener), key=found, own_word=key is None)
        return
    from ledger import bootstrap

    with _database(place, settings) as url, bootstrap.pictured(url) as opener_of_rows:
        found = given_key(key) or _home_key(settings)
        yield Audited(
            open_reader=RowsOpener(open_archive=opener_of_rows), key=found, own_word=False
        )


@contextmanager
def to_copy(
    place: str | None, key: str | None, settings: Settings
) -> Iterator[tuple[LogSource, VerifierKey]]:
    """The same as C2SP files, for an export."""
    if place is not None and not is_database(place):
        source, _ = _files(place)
        found = given_key(key)
        if found is None:
            found = _own_key(source)
            warn_own_word(found)
        yield source, found
        return
    from ledger import bootstrap

    with _database(place, settings) as url:
        found = given_key(key) or _home_key(settings)
        with bootstrap.whole_log(settings, url, format_vkey(found)) as whole:
            yield whole, found


def to_read(place: str) -> LogSource:
    """The C2SP files at a URL (a log's, or its ledger's) or in a folder."""
    return _files(place)[0]


def is_database(place: str) -> bool:
    """A PostgreSQL URL, or a libpq string such as `host=... dbname=...`."""
    return place.startswith(DATABASE) or ("=" in place and not Path(place).exists())


def folder_key(source: LogSource, key: str | None) -> VerifierKey:
    """The key given, else the one that the folder names, with a warning."""
    found = given_key(key)
    if found is None:
        found = _own_key(source)
        warn_own_word(found)
    return found


def warn_own_word(key: VerifierKey) -> None:
    err.print(
        "[bold yellow]The key comes from the log itself[/bold yellow], so nobody vouches ", end=""
    )
    err.print("for whose log this is. Compare it with its operator, or give --key:")
    err.print(f"  {format_vkey(key)}", markup=False)


@contextmanager
def _database(place: str | None, settings: Settings) -> Iterator[str]:
    if place is not None:
        yield place
    else:
        from ledger import bootstrap

        with bootstrap.reachable_database(settings) as url:
            yield url


def _files(place: str) -> tuple[LogSource, Callable[[], LogSource]]:
    if not place.startswith(WEB):
        if not Path(place).is_dir():
            raise NotFound(f"{place} is no folder, no http(s) URL and no PostgreSQL URL")
        return FolderSource(Path(place)), partial(FolderSource, Path(place))
    for url in (place, f"{place.rstrip('/')}/log"):
        source = HttpSource(url)
        try:
            source.read(CHECKPOINT)
        except NotFound:
            source.close()
            continue
        return source, partial(HttpSource, url)
    raise NotFound(f"neither {place} nor its /log has a checkpoint: is it a log's address?")


def given_key(key: str | None) -> VerifierKey | None:
    """What `--key` says, None without it. Raises ConfigError."""
    try:
        return None if key is None else parse_vkey(key.strip())
    except MalformedProof as error:
        raise ConfigError(f"--key: {error.message}") from error


def _own_key(source: LogSource) -> VerifierKey:
    try:
        data = source.read(VKEY)[:MAX_VKEY_BYTES]
        return parse_vkey(data.decode("utf-8", "replace").strip())
    except (NotFound, MalformedProof) as error:
        raise ConfigError(f"this log names no key of its own: give --key ({error})") from error


def _home_key(settings: Settings) -> VerifierKey:
    from ledger import bootstrap

    found = bootstrap.log_key(settings)
    if found is None:
        raise ConfigError(
            f"a database does not hold the log's key, and {settings.root} has none: give --key "
            "(the ledger shows it at /log/vkey)"
        )
    return found
