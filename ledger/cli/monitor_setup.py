"""What `tributary monitor` watches, out of its options: log, key, policy and anchor."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

from ledger.cli.context import err
from ledger.errors import ConfigError, MalformedProof, NotFound, Unavailable
from ledger.log.monitor_others import AnchorReader
from ledger.log.monitor_state import followed
from ledger.log.sources import FolderSource
from ledger.ports import LogSource
from ledger.remote import HttpSource
from ledger.verify.note import VerifierKey, format_vkey, parse_vkey
from ledger.verify.policy import MAX_POLICY_BYTES, Policy, parse_policy

MAX_VKEY_BYTES = 1_000


def log_source(url: str, stack: ExitStack) -> LogSource:
    """The log's files: at that URL, below `/log` of it as a ledger serves them, or in a folder."""
    if "://" not in url:
        return FolderSource(Path(url))
    found = stack.enter_context(HttpSource(url))
    try:
        found.read("checkpoint")
    except NotFound:
        below = stack.enter_context(HttpSource(f"{found.url}/log"))
        try:
            below.read("checkpoint")
        except NotFound as error:
            raise Unavailable(
                f"neither {found.url} nor {below.url} has a checkpoint: is this a log's base URL?"
            ) from error
        return below
    return found


def read_policy(path: Path | None) -> tuple[Policy, bytes] | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            text = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        return parse_policy(text), text
    except MalformedProof as error:
        raise ConfigError(f"{path}: {error.message}") from error


def witness_sources(
    rules: tuple[Policy, bytes] | None, stack: ExitStack
) -> dict[VerifierKey, LogSource]:
    """The witnesses of a policy that say where they answer."""
    known = rules[0].witnesses if rules else ()
    return {w.key: stack.enter_context(HttpSource(w.url)) for w in known if w.url}


def log_key(
    text: str | None, rules: tuple[Policy, bytes] | None, folder: Path, source: LogSource
) -> VerifierKey:
    """Given; else the one log of the policy; else what this folder follows; else the log's own."""
    logs = rules[0].logs if rules else ()
    if text is not None:
        try:
            return parse_vkey(text.strip())
        except MalformedProof as error:
            raise ConfigError(f"--key: {error.message}") from error
    if len(logs) == 1:
        return logs[0].key
    known = followed(folder.expanduser())
    if known is not None:
        return known
    return _first_use(source)


def _first_use(source: LogSource) -> VerifierKey:
    try:
        data = source.read("vkey")
        key = parse_vkey(data[:MAX_VKEY_BYTES].decode("utf-8", "replace").strip())
    except (NotFound, MalformedProof) as error:
        raise ConfigError(f"this log names no key of its own: give --key ({error})") from error
    err.print(
        "[bold yellow]The key comes from the log itself[/bold yellow] and is kept from now ", end=""
    )
    err.print("on. Compare it with its operator over another channel, or give --key:")
    err.print(f"  {format_vkey(key)}", markup=False)
    return key


def l1_anchor(
    rpc: str | None, contract: str | None, url: str, stack: ExitStack
) -> AnchorReader | None:
    if rpc is None:
        if contract is not None:
            raise ConfigError("--contract needs --rpc, a node of the chain that it is on")
        return None
    try:
        from ledger.processes.anchors import anchor_reader
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is missing: --rpc needs `pip install 'tributary-ledger[server]'`"
        ) from error
    return anchor_reader(rpc, contract or _named_contract(url, stack))


def _named_contract(url: str, stack: ExitStack) -> str:
    """The contract that the ledger itself names in /v1/info."""
    base = re.sub(r"/log/?$", "", url)
    try:
        if "://" not in url:
            raise NotFound("a folder names no contract")
        answer = stack.enter_context(HttpSource(base)).read("v1/info")
        named = _address(answer)
    except (NotFound, ValueError) as error:
        raise ConfigError(f"give --contract: {base} names none ({error})") from error
    err.print(f"[yellow]the contract's address comes from the log itself:[/yellow] {named}")
    return named


def _address(info: bytes) -> str:
    found = json.loads(info)
    chain = found.get("chain") if isinstance(found, dict) else None
    named = chain.get("anchor") if isinstance(chain, dict) else None
    if not isinstance(named, str) or not re.fullmatch(r"0x[0-9a-fA-F]{40}", named):
        raise ValueError("no chain section")
    return named


def slug(url: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", re.sub(r"^\w+://", "", url)).strip("-.") or "log"
