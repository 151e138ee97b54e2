"""The composition root: the only place that knows which engine stands behind which port.

Each function builds one thing and starts nothing in the background; `ledger.processes` runs what is
built here. The chain and worker rooms are imported inside the functions that need them, so that
`tributary migrate` does not load web3, nor `tributary verify` a database driver.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nacl.signing import SigningKey

from ledger.aggregates.application import Gate, Ledger
from ledger.client import Client, load_key
from ledger.config import Settings
from ledger.domain.envelope import Envelope
from ledger.domain.ids import actor_of
from ledger.domain.rows import decode_rows, rows_root
from ledger.errors import (
    Backpressure,
    ConfigError,
    Conflict,
    InvalidEvent,
    LedgerError,
    MalformedProof,
    NotFound,
)
from ledger.files import sync_folder
from ledger.log.add_checkpoint import MAX_REQUEST_BYTES
from ledger.log.appender import GroupCommit
from ledger.log.bundle import Anchored, Bundler
from ledger.log.cosign import Cosigners
from ledger.log.prover import Prover
from ledger.log.receipts import Promises, ReceiptIssuer
from ledger.log.serving import LogFiles
from ledger.log.signer import LogSigner
from ledger.log.sources import StoreSource
from ledger.log.trained import TrainedOn
from ledger.ports import BlobStore, Credentials, RestoreSession, ServingEngine, TileStore
from ledger.remote import HttpSource
from ledger.store.archive import ArchiveOpener, PostgresArchive, restoring
from ledger.store.blobs import FsspecBlobStore
from ledger.store.credentials import PostgresCredentials
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.postgres import Pool, PostgresEntryLog, connect
from ledger.store.recorder import GapFreeFactory, system_clock
from ledger.store.rows import PgRowStore
from ledger.store.tiles import PostgresTileStore
from ledger.verify.note import VerifierKey
from ledger.verify.policy import Policy, parse_policy
from ledger.verify.receipt import EvmSignature, Promise, Receipt
from projections.lineage_index import LineageIndex
from projections.queries import Queries
from projections.registry import TABLES
from projections.runner import Runner

if TYPE_CHECKING:
    from ledger.api.services import Services
    from ledger.processes.chain import ChainService

API_POOL = 24
PROJECTOR_POOL = 4
BUNDLES_AT_ONCE = 4
BUNDLE_WAIT_S = 5.0
OPERATOR_KEY, LOG_KEY, WORKER_KEY, CHAIN_KEY = "operator", "log", "worker", "chain"


# --- keys -------------------------------------------------------------------------------------


def ensure_key(path: Path) -> SigningKey:
    """The Ed25519 key in `path`; made on first use, mode 0600."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = SigningKey.generate()
        # O_EXCL: of two starters one writes, the other reads what the first wrote.
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return load_key(path)
        with os.fdopen(fd, "w") as file:
            file.write(bytes(key).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        # What it signs outlives a power cut, so must its name.
        for folder in path.parents[:2]:
            sync_folder(folder)
    return load_key(path)


def operator_key(settings: Settings) -> SigningKey:
    return ensure_key(settings.key_file(OPERATOR_KEY))


# --- the store --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Store:
    """PostgreSQL and blobs, behind their ports. Close it by leaving `store(...)`."""

    settings: Settings
    url: str
    pool: Pool
    entries: PostgresEntryLog
    tiles: TileStore
    blobs: BlobStore
    queries: Queries


def database_url(settings: Settings) -> str:
    """DATABASE_URL, or where the embedded server of this home is (running or not)."""
    return settings.database_url or EmbeddedPostgres(settings.root).url


@contextmanager
def store(settings: Settings, *, pool_size: int = 8, name: str = "ledger") -> Iterator[Store]:
    url = database_url(settings)
    pool = connect(url, max_size=pool_size, name=name)
    entries = PostgresEntryLog(pool)
    try:
        yield Store(
            settings=settings,
            url=url,
            pool=pool,
            entries=entries,
            tiles=PostgresTileStore(pool),
            blobs=FsspecBlobStore(settings.blobs_at),
            queries=Queries(pool),
        )
    finally:
        entries.close()
        pool.close()


@contextmanager
def reachable_database(settings: Settings) -> Iterator[str]:
    """A database URL that answers: the embedded server is started when nobody runs it."""
    if settings.database_url:
        yield settings.database_url
    else:
        with EmbeddedPostgres(settings.root) as server:
            yield server.url


def log_key(settings: Settings) -> VerifierKey | None:
    """The public key of the log that this home signs, if it has one; makes none."""
    has_key = settings.key_file(LOG_KEY).exists()
    return log_signer(settings).vkey if has_key else None


@contextmanager
def whole_log(settings: Settings, url: str, vkey: str) -> Iterator[StoreSource]:
    """A database's log as files, all signed checkpoints included."""
    with store(settings.model_copy(update={"database_url": url}), name="export") as box:
        yield StoreSource(LogFiles(log=box.entries, tiles=box.tiles), vkey=vkey)


@contextmanager
def pictured(url: str) -> Iterator[ArchiveOpener]:
    """One moment of a database, to be opened by any number of processes."""
    archive = PostgresArchive(url)
    try:
        yield archive.opener()
    finally:
        archive.close()


def empty_store(url: str) -> AbstractContextManager[RestoreSession]:
    """Where an import goes: committed when the block is left without an error."""
    return restoring(url)


def database_stopped(settings: Settings) -> bool:
    """Whether the embedded server of this home does not run (True where it is not ours)."""
    return EmbeddedPostgres(settings.root).pid is None


def projection_runner(store: Store) -> Runner:
    return Runner(store.entries, PgRowStore(store.pool, TABLES))


@contextmanager
def application(store: Store, gates: Mapping[str, Gate] | None = None) -> Iterator[Ledger]:
    """The ledger application on the gap-free recorder, with group commit."""
    factory = GapFreeFactory.on(store.url, decorate=GroupCommit)
    ledger = Ledger(
        log=store.settings.log_origin,
        operator=actor_of(bytes(operator_key(store.settings).verify_key)),
        clock=system_clock,
        entries_of=store.entries.entries_of,
        gates=gates,
        factory=factory,
    )
    try:
        yield ledger
    finally:
        ledger.close()


def log_signer(settings: Settings) -> LogSigner:
    return LogSigner.open(
        origin=settings.log_origin,
        key_path=settings.key_file(LOG_KEY),
        state_path=settings.root / "log" / "signed.json",
    )


@contextmanager
def log_cosigners(settings: Settings) -> Iterator[Cosigners | None]:
    """The witnesses that TRIBUTARY_WITNESS_POLICY names, or None. Raises ConfigError."""
    if settings.witness_policy is None:
        if settings.witness_required:
            raise ConfigError("TRIBUTARY_WITNESS_REQUIRED needs TRIBUTARY_WITNESS_POLICY")
        yield None
        return
    policy = _witness_policy(settings.witness_policy)
    with ExitStack() as stack:
        sources = {
            url: stack.enter_context(HttpSource(url, timeout_s=settings.witness_timeout_s))
            for url in {witness.url for witness in policy.witnesses if witness.url}
        }

        def send(url: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
            return sources[url].send(method, path, body, max_bytes=MAX_REQUEST_BYTES)

        yield Cosigners(
            policy=policy,
            vkey=log_signer(settings).vkey,
            send=send,
            evidence=settings.root / "log" / "evidence",
            clock=system_clock,
            timeout_s=settings.witness_timeout_s,
            required=settings.witness_required,
        )


def _witness_policy(path: Path) -> Policy:
    try:
        return parse_policy(path.expanduser().read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the witness policy {path}: {error.strerror}") from error
    except MalformedProof as error:
        raise ConfigError(f"{path}: {error.message}") from error


# --- receipts ---------------------------------------------------------------------------------


def receipt_issuer(settings: Settings, signer: LogSigner, tiles: TileStore) -> ReceiptIssuer:
    """Promises under the log's key and, where contracts are deployed, under the chain key."""
    return ReceiptIssuer(
        origin=settings.log_origin,
        sign=signer.sign_receipt,
        promises=Promises.open(
            settings.root / "log" / "promises.json", settings.inclusion_promise_s, system_clock()
        ),
        evm=_evm_receipts(settings),
        signed_size=signer.floor(tiles.latest()),
    )


def _evm_receipts(settings: Settings) -> Callable[[Promise], EvmSignature] | None:
    chain, key_file = deployed(settings), chain_key_file(settings)
    if chain is None or not key_file.exists():
        return None
    from ledger.chain.receipts import ReceiptDomain, ReceiptSigner

    domain = ReceiptDomain(chain_id=int(chain["chain_id"]), contract=str(chain["anchor"]))
    signer = ReceiptSigner(bytes(wallet_of(key_file).key), domain)

    def sign(promise: Promise) -> EvmSignature:
        return EvmSignature(
            chain_id=domain.chain_id,
            contract=domain.contract,
            signer=signer.address,
            sig=signer.sign(promise),
        )

    return sign


def check_evm_receipt(receipt: Receipt) -> None:
    """Raises VerificationError unless the receipt's `evm` was signed by the address it names."""
    from ledger.chain.receipts import verify_evm_signature

    evm = receipt.evm
    assert evm is not None
    verify_evm_signature(
        receipt.promise,
        chain_id=evm.chain_id,
        contract=evm.contract,
        signer=evm.signer,
        sig=evm.sig,
    )


# --- gates: facts outside the ledger that an event claims --------------------------------------


def gates(
    blobs: BlobStore,
    base_digest: str,
    credentials: Credentials,
    queries: Queries,
    trained: TrainedOn,
) -> dict[str, Gate]:
    from ledger.api.quota import Quota

    quota = Quota(queries, system_clock)

    def contributed(events: Sequence[Envelope]) -> None:
        rows_match(events)
        quota.check(events)  # last: it counts what it lets pass

    def need_uploads(events: Sequence[Envelope], field: str) -> None:
        claims = {(e.body[field], e.actor) for e in events if e.body[field] is not None}
        # Hashes are public, and who names a blob in these events may read it. Were naming one
        # enough, anyone could claim another's private rows, or an answer's transcript.
        strange = claims - credentials.uploads_among(claims) if claims else None
        if strange:
            raise NotFound(
                f"you have not uploaded blob {min(strange)[0]}: POST /v1/blobs first",
                field=f"body.{field}",
            )

    def rows_match(events: Sequence[Envelope]) -> None:
        need_uploads(events, "rows_sha256")
        for event in events:
            the_blob_has_them(event)

    def the_blob_has_them(event: Envelope) -> None:
        body = event.body
        rows = decode_rows(blobs.get(body["rows_sha256"]))
        if len(rows) != body["rows_count"] or rows_root(rows).hex() != body["rows_root"]:
            raise InvalidEvent(
                f"the blob has {len(rows)} rows with root {rows_root(rows).hex()}; the event says "
                f"{body['rows_count']} and {body['rows_root']}",
                field="body.rows_root",
            )

    def address_signed(event: Envelope) -> None:
        from ledger.chain.evm_binding import verify_binding

        verify_binding(
            event.body["signature"],
            actor=event.actor,
            log=event.log,
            address=event.body["address"],
        )

    def base_is_ours(event: Envelope) -> None:
        if event.body["base_model"] != base_digest:
            raise Conflict(
                f"this ledger trains on base model {base_digest}; GET /v1/info names it",
                field="body.base_model",
            )

    def blobs_there(*fields: str) -> Callable[[Envelope], None]:
        def check(event: Envelope) -> None:
            for field in fields:
                _need_blob(blobs, event.body[field], field)

        return check

    def shares_are_of_the_run(event: Envelope) -> None:
        blobs_there("evidence_sha256")(event)
        entitled = queries.inputs_of(event.body["run"]).contributors
        strangers = {share["contributor"] for share in event.body["shares"]} - entitled
        if strangers:
            raise Conflict(
                f"{min(strangers)} contributed nothing to run {event.body['run']}",
                field="body.shares",
            )

    def the_run_used_it(event: Envelope) -> None:
        adapter = queries.adapter(event.body["adapter"])
        run = queries.run(adapter["run"]) if adapter else None
        if run is None:
            raise NotFound(f"adapter {event.body['adapter']} is not projected yet; retry shortly")
        if event.body["contribution"] not in trained.rows(run["manifest_sha256"]):
            raise Conflict(
                f"the adapter was trained without contribution {event.body['contribution']}: the "
                f"manifest {run['manifest_sha256']} of its run does not name it",
                field="body.contribution",
            )

    def held(events: Sequence[Envelope]) -> None:
        need_uploads(events, "evidence_sha256")

    return {
        "contribution.recorded": contributed,
        "contribution.held": held,
        "adapter.recalled": _each(the_run_used_it),
        "identity.evm_bound": _each(address_signed),
        "run.requested": _each(base_is_ours),
        "run.completed": _each(
            blobs_there(
                "manifest_sha256", "adapter_sha256", "adapter_config_sha256", "index_sha256"
            )
        ),
        "attribution.recorded": _each(shares_are_of_the_run),
    }


def _each(check: Callable[[Envelope], None]) -> Gate:
    def gate(events: Sequence[Envelope]) -> None:
        for event in events:
            check(event)

    return gate


def _need_blob(blobs: BlobStore, sha256: str, field: str) -> None:
    if not blobs.has(sha256):
        raise NotFound(f"blob {sha256} is not here: POST /v1/blobs first", field=f"body.{field}")


# --- the API ----------------------------------------------------------------------------------


@contextmanager
def api_services(
    settings: Settings, *, serving: ServingEngine | None = None
) -> Iterator["Services"]:
    """Everything the HTTP service works with. Without `serving` it is OpenLoRA's replicas, which
    are attached when they are reachable."""
    from ledger.api.answers.desk import Desk
    from ledger.api.answers.journal import Journal
    from ledger.api.auth import RateLimit
    from ledger.api.inclusion import Inclusion
    from ledger.api.services import Services

    base = base_model(settings)
    with (
        store(settings, pool_size=API_POOL, name="api") as box,
        _gated(box, base["digest"], trained := TrainedOn(box.blobs)) as ledger,
        log_cosigners(settings) as cosigners,
        closing(Journal(settings.root / "serving" / "journal")) as journal,
    ):
        signer = log_signer(settings)
        prover = Prover(box.tiles)
        bundler = Bundler(
            log=box.entries,
            tiles=box.tiles,
            blobs=box.blobs,
            index=LineageIndex(box.pool),
            vkey=signer.vkey,
            prove_payout=payout_claim,
        )
        yield Services(
            settings=settings,
            ledger=ledger,
            entries=box.entries,
            tiles=box.tiles,
            blobs=box.blobs,
            credentials=PostgresCredentials(box.pool),
            queries=box.queries,
            log_files=LogFiles(log=box.entries, tiles=box.tiles),
            prover=prover,
            receipts=receipt_issuer(settings, signer, box.tiles),
            inclusion=Inclusion(box.tiles, prover),
            bundle=_bundles(box, bundler),
            payout_claim=payout_claim,
            vkey=signer.vkey_text,
            operator_key=operator_key(settings),
            clock=system_clock,
            rate_limit=RateLimit(settings.requests_per_minute),
            info=_info(settings, signer.vkey_text, base),
            health=lambda: health(box, cosigners),
            projected=projection_runner(box).position,
            trained=trained,
            answers=Desk(journal),
            serving=serving or serving_engine(settings),
            cosigners=cosigners,
        )


def _gated(box: Store, base_digest: str, trained: TrainedOn) -> AbstractContextManager[Ledger]:
    credentials = PostgresCredentials(box.pool)
    return application(box, gates(box.blobs, base_digest, credentials, box.queries, trained))


def _bundles(box: Store, bundler: Bundler) -> Callable[..., bytes]:
    """A bundle by leaf index, on the newest anchored checkpoint where there is one. A few at once:
    the largest take some seconds and a few hundred MiB."""
    free = threading.BoundedSemaphore(BUNDLES_AT_ONCE)

    def build(index: int, *, account: str | None = None, earnings: bool = True) -> bytes:
        if not free.acquire(timeout=BUNDLE_WAIT_S):
            raise Backpressure("as many bundles as may be are being assembled", retry_after_s=2)
        try:
            anchored = _newest_anchor(box)
            return bundler.bundle(index, anchored=anchored, account=account, earnings=earnings)
        finally:
            free.release()

    return build


def _newest_anchor(box: Store) -> Anchored | None:
    for anchor in box.queries.anchors(limit=1):
        checkpoint = box.tiles.checkpoint(int(anchor["size"]))
        if checkpoint is not None:
            section = json.loads(box.blobs.get(anchor["l1_sha256"]))
            return Anchored(checkpoint=checkpoint, section=section)
    return None


def base_model(settings: Settings) -> dict[str, str]:
    """`{"id", "path", "digest"}` of the model that adapters are trained for."""
    from workers import base_model as models

    path = models.folder(settings.base_model)
    return {"id": path.name, "path": str(path), "digest": models.digest(path)}


def workers_home(settings: Settings) -> Path:
    """Where the workers keep Ray's address, snapshots, caches and their outbox."""
    return settings.root / "workers"


def serving_engine(settings: Settings) -> ServingEngine:
    """OpenLoRA: the router over its replicas. Connects on first use; joins no Ray."""
    from workers.serving import ServingRouter

    engine: ServingEngine = ServingRouter(workers_home(settings))
    return engine


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation of attribution found, for people and for programs."""

    results: dict[str, Any]
    text: str
    files: list[Path]


def evaluation(
    settings: Settings,
    *,
    texts: Mapping[str, Sequence[Mapping[str, str]]] | None,
    run: tuple[Client, str] | None,
    answers: Sequence[tuple[str, str]],
    base: Path | None,
    recipe: Mapping[str, Any],
    amounts: Mapping[str, Any],
    parts: Sequence[str],
    out: Path,
    cpus: int | None,
    tell: Callable[[str, int, int], None],
) -> Evaluated:
    """Evaluate attribution on a run's rows or on plain texts (exactly one of them is given).

    `recipe` overrides settings of the run's recipe, or of the default one; `amounts` is what
    `harness.Options` takes. Retrains on the worker
    service's Ray when it runs, otherwise on one that lives as long as this call.
    """
    from workers import base_model as models
    from workers import evaluate
    from workers.evaluation import report
    from workers.evaluation.harness import Options
    from workers.evaluation.retrain import Query
    from workers.evaluation.world import rows_from
    from workers.training.config import TrainingConfig

    options = Options(**amounts)  # first of all: a slip must not cost a fetched run
    path = models.folder(base or settings.base_model)
    if run is not None:
        client, name = run
        rows, row = evaluate.run_rows(client, name)
        recipe = {**row["config"], **recipe}
        if row["base_model"] != (digest := models.digest(path)):
            raise InvalidEvent(
                f"run {name} was trained on base model {row['base_model']}; the one at {path} is "
                f"{digest}. Pass the run's own with --base-model"
            )
        title = f"Run {name} ({row['name']})"
    else:
        assert texts is not None
        rows, title = rows_from(texts), f"{sum(map(len, texts.values()))} rows of plain text"
    request = evaluate.Request(
        rows=rows,
        base_path=path,
        config=TrainingConfig.from_dict(recipe),
        options=options,
        title=f"{title}, base model {path.name}.",
        out=out.absolute(),
        queries=[Query(prompt=prompt, answer=answer) for prompt, answer in answers],
        parts=tuple(parts) or evaluate.PARTS,
    )
    with (
        evaluate.alone(request.out),
        evaluate.on_ray(workers_home(settings), request.out, cpus=cpus) as deal,
    ):
        results = evaluate.evaluate(request, deal, tell)
    names = ("results.json", "results.md", "plot.png")
    files = [request.out / name for name in names if (request.out / name).exists()]
    return Evaluated(results=results, text=report.text(results), files=files)


def _info(settings: Settings, vkey: str, base: Mapping[str, str]) -> dict[str, Any]:
    return {
        "log": settings.log_origin,
        "name": settings.name,
        "version": package_version(),
        "vkey": vkey,
        "operator": actor_of(bytes(operator_key(settings).verify_key)),
        "base_model": {"id": base["id"], "digest": base["digest"]},
        "chain": deployed(settings),
        "max_tokens_per_answer": settings.max_tokens_per_answer,
    }


def deployed(settings: Settings) -> dict[str, Any] | None:
    """Contract addresses, as the chain room wrote them; None before deployment."""
    path = settings.root / "chain" / "addresses.json"
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def health(box: Store, cosigners: Cosigners | None = None) -> list[tuple[str, bool, str]]:
    """(name, ok, detail) for /readyz: the database answers, checkpoints and projections keep up,
    and no checkpoint is withheld for want of witnesses."""
    try:
        size = box.entries.size()
        newest = box.tiles.latest()
        signed = newest.size if newest else 0
        projected = projection_runner(box).position()
    except LedgerError as error:
        return [("database", False, error.message)]
    return [
        ("database", True, f"{size} events"),
        ("checkpoint", newest is not None, f"signed to {signed} of {size}"),
        ("projections", True, f"at {projected} of {size}"),
        *([("witnesses", *cosigners.health())] if cosigners else []),
    ]


def package_version() -> str:
    try:
        return version("tributary-ledger")
    except PackageNotFoundError:
        return "0"


# --- the chain --------------------------------------------------------------------------------


def chain_key_file(settings: Settings) -> Path:
    return settings.chain_key_file or settings.key_file(CHAIN_KEY)


def wallet_of(path: Path) -> Any:
    """The EVM account of a key file (mode 0600), made on first use."""
    from ledger.chain.client import create_key
    from ledger.chain.client import load_key as load_evm_key

    if not path.exists():
        create_key(path)
    return load_evm_key(path)


def sign_binding(wallet: Any, *, actor: str, log: str) -> str:
    from ledger.chain.evm_binding import sign_binding as sign

    return sign(wallet, actor=actor, log=log)


def payout_claim(dump: dict[str, Any], address: str) -> dict[str, Any]:
    """What `PayoutDistributor.claim` takes for an address, from a period's tree blob."""
    from ledger.chain.payouts import load_payout_tree

    tree = load_payout_tree(dump)
    return {
        "address": address,
        "cumulative_wei": str(tree.amount(address)),
        "proof": ["0x" + node.hex() for node in tree.proof(address)],
    }


def chain_of(settings: Settings, info: Mapping[str, Any]) -> Settings:
    """Settings for the chain that a ledger names in /v1/info."""
    chain = info.get("chain")
    if chain is None:
        raise NotFound("this ledger has not deployed its contracts yet")
    return settings.model_copy(
        update={
            "chain_rpc_url": settings.chain_rpc_url or chain.get("rpc_url"),
            "dev_chain": bool(chain["development"]),
        }
    )


def fund(settings: Settings, key_file: Path, amount_wei: int) -> None:
    """Coins for a wallet on our own development chain; on any other chain nothing happens."""
    if settings.dev_chain:
        from ledger.processes.chain import running_dev_chain

        running_dev_chain(settings).fund(wallet_of(key_file).address, amount_wei)


def payouts(settings: Settings, key_file: Path, info: Mapping[str, Any]) -> Any:
    """Escrow and distributor for the wallet in `key_file`, on the chain that the ledger names."""
    from ledger.chain.deploy import Deployments
    from ledger.chain.payouts import Payouts
    from ledger.processes.chain import chain_client

    client = chain_client(chain_of(settings, info), key_file)
    chain = info["chain"]
    known = {name: chain[name] for name in Deployments.__dataclass_fields__ if name in chain}
    return Payouts(client, Deployments(**known))


@contextmanager
def chain_service(settings: Settings) -> Iterator["ChainService"]:
    """Anchorer, watcher and settlement over one database and one chain."""
    from ledger.processes.chain import build

    with store(settings, pool_size=4, name="chain") as box, application(box) as ledger:
        yield build(settings, box, ledger, operator_key(settings), chain_key_file(settings))
