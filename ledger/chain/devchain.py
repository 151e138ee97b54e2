"""A development chain: one anvil that we start, feed and end. Not for money that is worth any.

Its folder holds `state.json` (anvil's own, written every second and on exit), `saved.json` (ours,
see `save`), `anvil.pid`, `anvil.log` and `lock`. Whoever holds the lock owns the chain; the kernel
drops it with the owner. anvil runs behind a guard (_guard.py) that ends it when the owner is gone,
SIGKILL included; should the guard be killed too, the next start finds anvil by its pid file, makes
sure from its command line that it is ours, and ends it.

anvil alone can lose the last second when it is killed, and a kill while it writes leaves half a
file. So `save` fetches the state over RPC and replaces `saved.json` atomically; `start` loads
whichever file parses and is further on. After `save` returns, no kill can take the chain back.
"""

import contextlib
import fcntl
import gzip
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import requests

from ledger.errors import ChainError

CHAIN_ID = 26_092
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 12.0
STATE_INTERVAL_S = 1
PORT_ATTEMPTS = 3
POLL_S = 0.03
RPC_TIMEOUT_S = 20.0
LOG_TAIL_BYTES = 2_000
# Pinned, so that header fields do not change with anvil's version.
HARDFORK = "prague"

_GUARD = Path(__file__).with_name("_guard.py")
_CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"


def find_anvil() -> Path:
    """anvil from PATH, else from the npm package in contracts/node_modules."""
    found = shutil.which("anvil")
    if found:
        return Path(found)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    package = f"anvil-{platform.system().lower()}-{machine}"
    binary = _CONTRACTS / "node_modules" / "@foundry-rs" / package / "bin" / "anvil"
    if binary.is_file():
        return binary
    raise ChainError(
        f"anvil is neither on PATH nor in {binary.parent}: run `python contracts/build.py "
        "install`, install Foundry, or set CHAIN_RPC_URL to a chain that runs"
    )


class DevChain:
    """One anvil in `folder`. `start` and `stop` may be called again; also a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        chain_id: int = CHAIN_ID,
        anvil: Path | None = None,
        block_time_s: int | None = None,
    ) -> None:
        """`port` 0 takes a free one. Blocks are mined per transaction, or every `block_time_s`."""
        self.folder = folder.absolute()
        self.chain_id = chain_id
        self._wanted_port = port
        self._anvil = anvil
        self._block_time_s = block_time_s
        self._lock: IO[str] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def rpc_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def state_path(self) -> Path:
        return self.folder / "state.json"

    @property
    def saved_path(self) -> Path:
        return self.folder / "saved.json"

    @property
    def log_path(self) -> Path:
        return self.folder / "anvil.log"

    @property
    def pid_path(self) -> Path:
        return self.folder / "anvil.pid"

    @property
    def pid(self) -> int | None:
        """anvil's process id, or None."""
        try:
            return int(self.pid_path.read_text())
        except (OSError, ValueError):
            return None

    @property
    def alive(self) -> bool:
        """Whether the anvil that we started still runs."""
        # The guard may not have noticed yet that anvil is gone, so anvil itself is asked after.
        pid = self.pid
        return self._guard is not None and pid is not None and self._is_ours(pid)

    def start(self) -> "DevChain":
        """Own the folder, end what a killed owner left, load the newest state, wait for answers."""
        if self._guard is not None:
            if self.alive:
                return self
            self._end_guard()  # anvil was killed under us: the same folder, the same port again
            self._disown()
        binary = self._anvil or find_anvil()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own()
        try:
            self._end_stale()
            self._choose_state()
            for attempt in range(PORT_ATTEMPTS):
                again = self.port if attempt == 0 else 0
                self.port = self._wanted_port or again or _free_port()
                self._launch(binary)
                if self._wait_ready():
                    return self
                # A free port may be taken between our look and anvil's: then another one.
                if self._wanted_port or attempt == PORT_ATTEMPTS - 1:
                    raise ChainError(
                        f"anvil did not start on 127.0.0.1:{self.port}; the end of "
                        f"{self.log_path}: {self._log_tail()}"
                    )
                self._end_guard()
        except BaseException:
            self._end_guard()
            self._disown()
            raise
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End anvil; its state is on disk afterwards."""
        if self._guard is None:
            return
        with contextlib.suppress(ChainError):  # it may be dead already; then saved.json stands
            self.save()
        self._end_guard()
        self._disown()

    def save(self) -> None:
        """Make everything mined so far survive any kill from now on. Any process may call it."""
        with (self.folder / "save.lock").open("a") as lock:
            # One at a time: an older dump must not replace a newer one, nor mix with it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._save()

    def _save(self) -> None:
        packed = bytes.fromhex(self._rpc("anvil_dumpState")[2:])
        state = gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
        temporary = self.saved_path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(state)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.saved_path)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def fund(self, address: str, amount_wei: int) -> None:
        """Set the native balance of `address` to at least `amount_wei`."""
        if int(self._rpc("eth_getBalance", address, "latest"), 16) < amount_wei:
            self._rpc("anvil_setBalance", address, hex(amount_wei))

    def mine(self, blocks: int = 1) -> None:
        """Add empty blocks."""
        self._rpc("anvil_mine", hex(blocks))

    def advance(self, seconds: int) -> None:
        """Move the chain's clock and mine one block."""
        self._rpc("evm_increaseTime", seconds)
        self.mine()

    def __enter__(self) -> "DevChain":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _own(self) -> None:
        lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ChainError(
                f"another process runs the development chain in {self.folder}: stop it, or set "
                "CHAIN_RPC_URL to its address"
            ) from error
        self._lock = lock

    def _disown(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _end_stale(self) -> None:
        """A guard notices its owner's death within moments; wait for that, then end anvil."""
        pid = self.pid
        if pid is None:
            return
        for number, patience_s in (
            (None, 2.0),
            (signal.SIGINT, STOP_TIMEOUT_S),
            (signal.SIGKILL, 5.0),
        ):
            if not self._is_ours(pid):
                break
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            _until(lambda: not self._is_ours(pid), patience_s)
        if self._is_ours(pid):
            raise ChainError(f"anvil, process {pid}, of {self.folder} cannot be ended")
        self.pid_path.unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        """Process ids are reused: ours is the one whose command line names our state file."""
        return str(self.state_path) in _command_line(pid)

    def _choose_state(self) -> None:
        written, saved = _best_block(self.state_path), _best_block(self.saved_path)
        if saved is not None and (written is None or written < saved):
            temporary = self.state_path.with_suffix(".tmp")
            shutil.copyfile(self.saved_path, temporary)
            temporary.replace(self.state_path)
        elif written is None and self.state_path.exists():
            broken = self.state_path.with_suffix(".broken")
            self.state_path.replace(broken)
            raise ChainError(
                f"the development chain's state does not parse and no saved copy exists; it is "
                f"kept as {broken}. Start again for a new, empty chain"
            )
        if self.state_path.exists():
            _keep_first_genesis(self.state_path)

    def _launch(self, binary: Path) -> None:
        command = [
            *(str(binary), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--chain-id", str(self.chain_id), "--hardfork", HARDFORK),
            *("--state", str(self.state_path), "--state-interval", str(STATE_INTERVAL_S)),
            *("--accounts", "1", "--threads", "1", "--no-cors", "--quiet"),
        ]
        if self._block_time_s:
            command += ["--block-time", str(self._block_time_s)]
        self.pid_path.unlink(missing_ok=True)
        self._guard = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(_GUARD)),
                *(str(self.pid_path), str(self.log_path), *command),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_ready(self) -> bool:
        guard = self._guard
        assert guard is not None
        return _until(lambda: guard.poll() is not None or self._answers(), START_TIMEOUT_S) and (
            guard.poll() is None
        )

    def _answers(self) -> bool:
        # Our chain id alone could be another anvil on that port; our guard's anvil must live too.
        try:
            return self.pid is not None and int(self._rpc("eth_chainId"), 16) == self.chain_id
        except ChainError:
            return False

    def _end_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        guard.stdin.close()  # what our death would do
        try:
            guard.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
            self._end_stale()

    def _rpc(self, method: str, *params: Any) -> Any:
        body: Any = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
        try:
            answer = requests.post(self.rpc_url, json=body, timeout=RPC_TIMEOUT_S).json()
        except (requests.RequestException, ValueError) as error:
            raise ChainError(
                f"the development chain at {self.rpc_url} does not answer ({method})"
            ) from error
        if "error" in answer:
            raise ChainError(f"the development chain refused {method}: {answer['error']}")
        return answer["result"]

    def _log_tail(self) -> str:
        try:
            return self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            return "(no log)"


def _command_line(pid: int) -> str:
    """Empty when there is no such process, or only its zombie."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            return ""
    return subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True
    ).stdout


def _best_block(path: Path) -> int | None:
    """The newest block's number in a state file; None if it is absent or half written."""
    try:
        number = json.loads(path.read_bytes())["best_block_number"]
        return int(number, 16) if isinstance(number, str) else int(number)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep_first_genesis(path: Path) -> None:
    """anvil makes a new genesis block at each start and dumps it beside the loaded one; which of
    them answers as block 0 later is chance. The earliest is the one that the chain grew from."""
    state = json.loads(path.read_bytes())
    blocks = state.get("blocks") or []
    geneses = [b for b in blocks if int(b["header"]["number"], 16) == 0]
    if len(geneses) < 2:
        return
    first = min(geneses, key=lambda block: int(block["header"]["timestamp"], 16))
    state["blocks"] = [b for b in blocks if b is first or int(b["header"]["number"], 16) > 0]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state))
    temporary.replace(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(condition: Any, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
