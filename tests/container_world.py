"""A container of nothing but Python and pynacl: a folder with a Python, its shared libraries,
pynacl and this package's `ledger`, entered by chroot, without a network. Linux and root only.

`python -m tests.container_world BUNDLE...` verifies bundles in one and prints a transcript:
docs/VERIFYING.md holds one.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("pynacl", "cffi", "pycparser")
"""pynacl, and what it is built upon."""
LEFT_OUT = shutil.ignore_patterns(
    "site-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3",
    "__pycache__", "config-*", "_tkinter*", "*.a",
)  # fmt: skip
PYTHON = "/python/bin/python3"
ENVIRONMENT = {"PYTHONHOME": "/python", "PYTHONPATH": "/packages", "PATH": "/python/bin"}
NAMESPACES = ["--net", "--mount", "--pid", "--fork", "--ipc", "--uts"]


def missing() -> str | None:
    """Why no container can be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a container by chroot needs Linux and root"
    for tool in ("unshare", "chroot", "ldd"):
        if shutil.which(tool) is None:
            return f"a container by chroot needs `{tool}`"
    allowed = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return None if allowed.returncode == 0 else f"no new namespaces here: {allowed.stderr.strip()}"


class Container:
    """A root folder. `files` lies at /files in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = root / "files"
        self.files.mkdir(parents=True)
        base = Path(sys.base_prefix)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copytree(base / "lib" / version, root / "python/lib" / version, ignore=LEFT_OUT)
        executable = root / "python/bin/python3"
        executable.parent.mkdir()
        shutil.copy(Path(sys.executable).resolve(), executable)
        packages = root / "packages"
        for name in NEEDED:
            _copy_distribution(name, packages)
        # All of it, as `pip install tributary-ledger` would: only pynacl comes with it.
        ours = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "ledger", packages / "ledger", ignore=ours, symlinks=True)
        objects = [Path(sys.executable).resolve(), *root.rglob("*.so")]
        for library in set(_libraries(objects)):
            place = root / str(library).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """`python3 ...` inside: no network, no other process, nothing outside the folder."""
        unshare, chroot = shutil.which("unshare"), shutil.which("chroot")
        assert unshare
        assert chroot
        return subprocess.run(
            [unshare, *NAMESPACES, chroot, str(self.root), PYTHON, *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
        )


def _copy_distribution(name: str, to: Path) -> None:
    for file in distribution(name).files or ():
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        place = to / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.locate(), place)  # type: ignore[arg-type]


def _libraries(objects: Iterable[Path]) -> Iterator[Path]:
    """Paths of shared libraries that `ldd` names."""
    said = subprocess.run(["ldd", *map(str, objects)], capture_output=True, text=True).stdout
    for line in said.splitlines():
        for word in line.split():
            if word.startswith("/") and not word.endswith(":"):
                yield Path(word)


@contextmanager
def container() -> Iterator[Container]:
    with tempfile.TemporaryDirectory(prefix="tributary-container-") as folder:
        yield Container(Path(folder))


WHAT_IS_HERE = (
    "import importlib.metadata as m\n"
    'for name in sorted(f"{d.name} {d.version}" for d in m.distributions()): print(name)'
)
NO_NETWORK = (
    "import socket\n"
    'try: socket.create_connection(("192.0.2.1", 80), 2)\n'
    "except OSError as error: print(error)"
)


def shown(arguments: Sequence[str], done: "subprocess.CompletedProcess[str]") -> str:
    """A command and what it said, as a transcript has them."""
    said = done.stdout + done.stderr
    return f"$ python3 {shlex.join(arguments)}\n{said}[exit {done.returncode}]\n"


def main(names: list[str]) -> int:
    why = missing()
    if why:
        print(why, file=sys.stderr)
        return 7
    with container() as box:
        for name in names:
            shutil.copy(name, box.files)
        files = [f"/files/{Path(name).name}" for name in names]
        commands = [
            ("-VV",),
            ("-c", WHAT_IS_HERE),
            ("-c", NO_NETWORK),
            *(("-m", "ledger.verify", file) for file in files),
        ]
        print(*(shown(command, box.run(*command)) for command in commands), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
