"""`tributary doctor`: each check says ok, warning or problem, and what to do. Changes nothing."""

import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from ledger import bootstrap
from ledger.config import Settings
from ledger.errors import LedgerError, Unavailable
from ledger.remote import HttpSource
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import pending

if TYPE_CHECKING:
    from ledger.chain.client import ChainClient
    from ledger.chain.deploy import Deployments

MIN_FREE_BYTES = 2 * 2**30
MAX_CLOCK_LAG_S = 5.0
MIN_CHAIN_WEI = 10**16
# What anyone can bring about and nobody loses by: an address bound to a second identity.
HARMLESS = {"address_taken"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    check: str
    state: str
    detail: str
    do: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Every finding, in the order in which one would mend them."""
    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _home, _keys, _disk, _database, _signer, _witnesses, _chain, _ray, _serving, _api,
    )  # fmt: skip
    found: list[Finding] = []
    for check in checks:
        try:
            found += check(settings)
        except LedgerError as error:
            name = check.__name__.strip("_")
            found.append(Finding(check=name, state="problem", detail=error.message))
    return found


def _home(settings: Settings) -> Iterator[Finding]:
    if settings.root.is_dir():
        yield Finding(check="home", state="ok", detail=str(settings.root))
    else:
        yield Finding(
            check="home",
            state="problem",
            detail=f"{settings.root} does not exist",
            do="run `tributary up` once, or set TRIBUTARY_HOME",
        )


def _keys(settings: Settings) -> Iterator[Finding]:
    keys = settings.root / "keys"
    loose = [p.name for p in keys.glob("*.key") if stat.S_IMODE(p.stat().st_mode) & 0o077]
    missing = [n for n in ("operator", "log") if not settings.key_file(n).exists()]
    if loose:
        yield Finding(
            check="keys",
            state="problem",
            detail=f"readable by others: {', '.join(sorted(loose))}",
            do=f"chmod 600 {keys}/*.key",
        )
    elif missing:
        yield Finding(
            check="keys",
            state="warning",
            detail=f"not made yet: {', '.join(missing)}",
            do="`tributary up` makes them; back them up afterwards",
        )
    else:
        yield Finding(check="keys", state="ok", detail=f"{keys}, mode 0600")


def _disk(settings: Settings) -> Iterator[Finding]:
    where = next(p for p in (settings.root, *settings.root.parents) if p.exists())
    free = shutil.disk_usage(where).free
    state = "ok" if free > MIN_FREE_BYTES else "problem"
    do = "" if state == "ok" else "free some space: PostgreSQL stops when the disk is full"
    yield Finding(check="disk", state=state, detail=f"{free / 2**30:.1f} GiB free", do=do)


def _database(settings: Settings) -> Iterator[Finding]:
    url = bootstrap.database_url(settings)
    if settings.database_url is None and EmbeddedPostgres(settings.root).pid is None:
        yield Finding(
            check="database",
            state="problem",
            detail="the embedded PostgreSQL does not run",
            do="start it with `tributary up`, or set DATABASE_URL",
        )
        return
    waiting = pending(url)
    if waiting:
        yield Finding(
            check="migrations",
            state="problem",
            detail=f"pending: {', '.join(waiting)}",
            do="run `tributary migrate`",
        )
        return
    with bootstrap.store(settings, pool_size=2, name="doctor") as box:
        start = time.time()
        row = box.pool.getconn()
        try:
            cursor = row.execute("SELECT extract(epoch FROM clock_timestamp())::float8")
            answer = cursor.fetchone()
        finally:
            box.pool.putconn(row)
        lag = abs(float(answer[0]) - start) if answer else 0.0
        yield Finding(check="database", state="ok", detail=f"{box.entries.size()} events")
        yield Finding(
            check="clock",
            state="ok" if lag < MAX_CLOCK_LAG_S else "problem",
            detail=f"{lag:.1f} s apart from the database's",
            do="" if lag < MAX_CLOCK_LAG_S else "set both clocks by NTP",
        )
        position = bootstrap.projection_runner(box).position()
        behind = box.entries.size() - position
        yield Finding(
            check="projections",
            state="ok" if behind < 1_000 else "warning",
            detail=f"{behind} events behind",
            do="" if behind < 1_000 else "is the projector running? see logs/projector.log",
        )
        odd = len([a for a in box.queries.anomalies() if a["code"] not in HARMLESS])
        unpaid = len(box.queries.unexplained_claims())
        yield Finding(
            check="money",
            state="ok" if not odd and not unpaid else "problem",
            detail=f"{odd} anomalies, {unpaid} claims that no period explains",
            do="" if not odd and not unpaid else "read the `anomalies` rows: each names its event",
        )


def _signer(settings: Settings) -> Iterator[Finding]:
    """Whether the log's key could sign what the database holds (`ledger/log/signer.py`)."""
    if settings.database_url is None and bootstrap.database_stopped(settings):
        return  # said already
    if bootstrap.log_key(settings) is None:
        return
    memory = bootstrap.log_signer(settings).remembered()
    with bootstrap.store(settings, pool_size=2, name="doctor") as box:
        newest, size = box.tiles.latest(), box.entries.size()
        same = box.tiles.checkpoint(memory.size) if memory else None
    signed = newest.size if newest else 0
    if memory is None:
        yield Finding(
            check="signer",
            state="warning" if signed else "ok",
            detail=f"no memory of what was signed; the database has a checkpoint of {signed}",
            do="restore log/signed.json if there is a copy" if signed else "",
        )
        return
    older = memory.size > size or (same is not None and same.root != memory.root)
    yield Finding(
        check="signer",
        state="problem" if older else "ok",
        detail=f"remembers size {memory.size}; the database has {size} events, {signed} signed for",
        do="the database is older than, or another than, what was signed: bring back the newer one"
        if older
        else "",
    )


def _witnesses(settings: Settings) -> Iterator[Finding]:
    """Whether each witness of the policy answers; what it cosigned is said by /readyz."""
    with bootstrap.log_cosigners(settings) as cosigners:
        if cosigners is None:
            return
        for witness in cosigners.policy.witnesses:
            if not witness.url:
                continue
            where = f"{witness.name}, {witness.url}"
            try:
                with HttpSource(witness.url, timeout_s=settings.witness_timeout_s) as source:
                    source.send("GET", "")
            except Unavailable as error:
                yield Finding(
                    check="witness",
                    state="warning",
                    detail=f"{where}: {error.message}",
                    do="tell who runs it; with TRIBUTARY_WITNESS_REQUIRED its absence may withhold "
                    "checkpoints",
                )
            else:
                yield Finding(check="witness", state="ok", detail=where)


def _chain(settings: Settings) -> Iterator[Finding]:
    known = bootstrap.deployed(settings)
    if settings.chain_rpc_url is None:
        if known is None or _api_info(settings) is None:
            yield Finding(
                check="chain",
                state="warning",
                detail="no CHAIN_RPC_URL, and no service that runs a development chain",
                do="start it with `tributary up`, or set CHAIN_RPC_URL",
            )
            return
        settings = bootstrap.chain_of(settings, {"chain": known})  # that of the running service
    from ledger.chain.deploy import load_deployments
    from ledger.processes.chain import chain_client

    client = chain_client(settings, bootstrap.chain_key_file(settings))
    yield Finding(check="chain", state="ok", detail=f"id {client.chain_id}, block {client.head()}")
    balance = client.balance(client.address)
    yield Finding(
        check="gas",
        state="ok" if balance > MIN_CHAIN_WEI else "problem",
        detail=f"{client.address} has {balance} wei",
        do="" if balance > MIN_CHAIN_WEI else "send the chain account some native coin",
    )
    found = load_deployments(client, settings.root / "chain", origin=settings.log_origin)
    yield Finding(
        check="contracts",
        state="ok" if found and known else "problem",
        detail="deployed, code verified" if found else "not deployed",
        do="" if found and known else "`tributary up` deploys them",
    )
    if found:
        yield _chain_agrees(settings, client, found)


def _chain_agrees(settings: Settings, client: "ChainClient", found: "Deployments") -> Finding:
    """What the ledger says was paid and anchored, beside what the chain holds."""
    from ledger.chain.payouts import Payouts

    claimed = Payouts(client, found).total_claimed()
    anchored = int(client.call(client.contract("CheckpointAnchor", found.anchor).functions.size()))
    with bootstrap.store(settings, pool_size=2, name="doctor") as box:
        paid = box.queries.totals().get("paid", 0)
        recorded = max([int(a["size"]) for a in box.queries.anchors(limit=1)], default=0)
    agrees = (paid, recorded) == (claimed, anchored)
    return Finding(
        check="paid",
        state="ok" if agrees else "warning",
        detail=f"ledger: {paid} wei paid, {recorded} entries anchored; "
        f"chain: {claimed} wei, {anchored} entries",
        do="" if agrees else "look again in some seconds; if it stays, see logs/chain.log",
    )


def _ray(settings: Settings) -> Iterator[Finding]:
    from workers.ray_cluster import find

    info = find(bootstrap.workers_home(settings))
    answers = info is not None and _answers(info.address)
    known = f"no Ray answers at {info.address}" if info else "no Ray cluster is known"
    yield Finding(
        check="ray",
        state="ok" if answers else "warning",
        detail=info.address if info and answers else known,
        do="" if answers else "`tributary up` starts one, or set RAY_ADDRESS; see logs/workers.log",
    )


def _serving(settings: Settings) -> Iterator[Finding]:
    """Each registered replica: whether its port takes connections, and whose base it serves."""
    from workers.replicas.protocol import READY
    from workers.replicas.registry import registered

    found = registered(bootstrap.workers_home(settings))
    if not found:
        yield Finding(
            check="serving",
            state="warning",
            detail="no replica is registered: completions answer 503",
            do="`tributary up` starts them; a model that is loading, or why not: logs/workers.log",
        )
        return
    wanted = bootstrap.base_model(settings)["digest"]
    for replica in found.values():
        where = f"{replica.name}, {replica.address}, {replica.state}"
        if not _answers(replica.address):
            state, what = "warning", "nobody answers there"
            do = "Ray starts it again within seconds; if it stays, see logs/workers.log"
        elif replica.base_model != wanted:
            state, what = "problem", f"serves base model {replica.base_model}, not {wanted}"
            do = "the API and the workers need one TRIBUTARY_BASE_MODEL; start the workers again"
        elif replica.state != READY:
            state, what = "warning", "takes nothing new"
            do = "it is being stopped or replaced; if it stays, start the workers again"
        else:
            state, what, do = "ok", "answers", ""
        yield Finding(check="serving", state=state, detail=f"{where}: {what}", do=do)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _api(settings: Settings) -> Iterator[Finding]:
    info = _api_info(settings)
    if info is None:
        yield Finding(
            check="api",
            state="problem",
            detail=f"{settings.url} does not answer",
            do="start it with `tributary up`; see logs/api.log",
        )
        return
    answer = httpx.get(f"{settings.url}/readyz", timeout=5)
    ready = answer.status_code == 200
    why = "" if ready else f"; {answer.json().get('detail', 'not ready')}"
    yield Finding(
        check="api",
        state="ok" if ready else "problem",
        detail=f"{settings.url}, log {info['log']}, {info['size']} entries{why}",
        do="" if ready else f"see {settings.url}/readyz",
    )


def _api_info(settings: Settings) -> dict[str, object] | None:
    try:
        found: dict[str, object] = httpx.get(f"{settings.url}/v1/info", timeout=5).json()
        return found
    except (httpx.HTTPError, ValueError):
        return None
