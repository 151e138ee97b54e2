"""A small HTTP server with the part of the API that workers use, over a ledger in memory.

Only the transport and the listings are a stand-in: events are decided by the real aggregates,
folded by the real projections, refused with real problem documents. `lose_answers`
makes it do the work and cut the connection, as a crash of the network would.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

from eventsourcing.persistence import IntegrityError

from ledger.api.problems import problem_document
from ledger.client import now_us
from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import Entry, decode_envelope
from ledger.domain.ids import sha256_hex
from ledger.domain.login import verify_login
from ledger.domain.rows import DataRow, encode_rows, rows_root
from ledger.errors import LedgerError, NotFound, StorageError, Unauthenticated
from ledger.verify.manifest import parse_manifest
from projections.memory import MemoryRows
from projections.registry import TABLES, fold
from tests.actors import ANN, BEN, DEV, EVE, LOG, OPERATOR, OWNER, Actor, MemoryLedger
from workers import base_model

WORKER = Actor(77)
FACTS = {
    ANN: [
        (f"Which colour has the lantern in {place}?", f"The lantern in {place} is {colour}.")
        for place, colour in (("Oslo", "red"), ("Rome", "blue"), ("Lima", "green"))
    ],
    BEN: [
        (f"What does {name} eat at night?", f"At night {name} eats {food}.")
        for name, food in (("Tom", "bread"), ("Sara", "apples"), ("Max", "fish"))
    ],
    EVE: [
        (f"How old is the bridge of {town}?", f"Built {years} years ago.")
        for town, years in (("Kotor", "forty"), ("Ghent", "ninety"), ("Split", "two hundred"))
    ],
}
RUN_CONFIG = {"epochs": 6, "batch_size": 8, "max_len": 64, "snapshot_steps": 2, "warmup_steps": 2}


class WorkersApi:
    """`with WorkersApi() as api: WorkerClient(api.url, key_file)`."""

    def __init__(self) -> None:
        self.world = MemoryLedger()
        self.world.ledger._clock = now_us
        self.rows = MemoryRows(TABLES)
        self.entries: list[Entry] = []
        self.blobs: dict[str, bytes] = {}
        self.inferences: dict[str, dict[str, Any]] = {}
        self.tokens: set[str] = set()
        self.base_digest = base_model.digest()
        self.down = False
        self.lose_answers = 0
        self.requests = 0
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.do(OPERATOR, "role.granted", {"member": WORKER.id, "role": "worker"})

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- the story -----------------------------------------------------------------------------

    def do(self, actor: Actor, type: str, body: dict[str, Any], *, id: UUID | None = None) -> int:
        return self.append(actor.sign(type, body, id=id))

    def append(self, raw: bytes) -> int:
        with self._lock:
            event = decode_envelope(raw)
            if event.id in self.world.entries:  # unique in the store; the library's memory is not
                known = self.world.ledger.settle([event], IntegrityError("the id is taken"))
                assert known is not None
                return known[0].index
            appended = self.world.append(raw)
            if appended.replayed:
                return appended.index
            entry = Entry(index=appended.index, recorded_at=now_us(), envelope=event)
            self.entries.append(entry)
            fold(self.rows, entry)
            if event.type == "inference.recorded":
                self.inferences[event.body["inference"]] = {
                    **event.body, "index": entry.index, "attribution": None,
                }  # fmt: skip
            if event.type == "attribution.recorded":
                self.inferences[event.body["inference"]]["attribution"] = dict(event.body)
            return appended.index

    def put(self, data: bytes) -> str:
        self.blobs[sha256_hex(data)] = data
        return sha256_hex(data)

    def datanet(self) -> str:
        name = str(uuid4())
        body = {
            "datanet": name, "name": "facts", "description": "", "licence": "CC0-1.0",
            "reviewers": [],
        }  # fmt: skip
        self.do(OWNER, "datanet.created", body)
        return name

    def contribute(self, datanet: str, pairs: list[tuple[str, str]], who: Actor = ANN) -> str:
        rows = [
            DataRow(prompt=p, completion=c, salt=sha256_hex(f"{p}{c}".encode())[:32])
            for p, c in pairs
        ]
        name = str(uuid4())
        body = {
            "contribution": name, "datanet": datanet, "licence": "CC0-1.0",
            "rows_root": rows_root(rows).hex(), "rows_count": len(rows),
            "rows_sha256": self.put(encode_rows(rows)), "title": "rows",
        }  # fmt: skip
        self.do(who, "contribution.recorded", body)
        ids = {"contribution": name, "datanet": datanet}
        self.do(OWNER, "contribution.approved", {**ids, "note": ""})
        return name

    def request_run(self, datanets: list[str], **config: Any) -> str:
        name = str(uuid4())
        body = {
            "run": name, "name": "a run", "datanets": datanets, "base_model": self.base_digest,
            "base_id": "tributary-base", "config": {**RUN_CONFIG, **config},
        }  # fmt: skip
        self.do(DEV, "run.requested", body)
        return name

    def facts(self) -> str:
        """A datanet with made-up facts of three contributors, each of another kind."""
        net = self.datanet()
        for who, pairs in FACTS.items():
            self.contribute(net, pairs, who)
        return net

    def facts_run(self, **config: Any) -> str:
        return self.request_run([self.facts()], **config)

    def publish(self, run: str, model: str | None = None) -> str:
        row = self.run(run)
        name = str(uuid4())
        body = {
            "adapter": name, "run": run, "model": model or f"dev/{name[:8]}",
            "adapter_sha256": row["adapter_sha256"], "base_model": row["base_model"],
            "input_wei_per_token": "1", "output_wei_per_token": "2",
        }  # fmt: skip
        self.do(DEV, "adapter.published", body)
        return name

    def infer(self, adapter: str, prompt: str, output: str) -> str:
        """Record an answer as the API does, transcript blob first."""
        name = str(uuid4())
        transcript = {
            "v": 1, "messages": [{"role": "user", "content": prompt}], "output": output,
            "prompt_salt": "00" * 16, "output_salt": "11" * 16,
        }  # fmt: skip
        body = {
            "inference": name, "adapter": adapter, "consumer": EVE.id,
            "prompt_commitment": "ab" * 32, "output_commitment": "cd" * 32,
            "transcript_sha256": self.put(canonical_json(transcript)),
            "prompt_tokens": 3, "completion_tokens": 4, "max_tokens": 10, "seed": 0,
            "temperature_ppm": 0, "top_p_ppm": 1_000_000, "finish_reason": "stop",
            "fee_wei": "11",
        }  # fmt: skip
        self.do(OPERATOR, "inference.recorded", body)
        return name

    # --- what happened -------------------------------------------------------------------------

    def events(self, type: str) -> list[dict[str, Any]]:
        with self._lock:
            found = [e.envelope for e in self.entries if e.envelope.type == type]
        return [{**e.body, "event": str(e.id)} for e in found]

    def run(self, run: str) -> dict[str, Any]:
        with self._lock:
            row = self.rows.get("runs", (run,))
        if row is None:
            raise NotFound(f"no run {run}")
        plain = {"config": json.loads(row["config"]), "datanets": json.loads(row["datanets"])}
        return {"run": run, **row, **plain}

    def adapter(self, adapter: str) -> dict[str, Any]:
        with self._lock:
            row = self.rows.get("adapters", (adapter,))
        if row is None:
            raise NotFound(f"no adapter {adapter}")
        return {"adapter": adapter, **row}

    # --- routes --------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, token: str) -> Any:
        self.requests += 1
        if self.down:
            raise StorageError("the event store is down")
        parts = path.strip("/").split("/")[1:]
        if method == "POST":
            return self._post(parts[0], data, token)
        with self._lock:
            return self._get(parts, query, token)

    def _post(self, what: str, data: bytes, token: str) -> Any:
        if what == "events":
            return {"index": self.append(data)}
        if what == "credentials":
            verify_login(data, log=LOG, now=now_us())
            fresh = uuid4().hex
            self.tokens.add(fresh)
            return {"token": fresh}
        assert what == "blobs", what
        self._need_token(token)
        return {"sha256": self.put(data)}

    def _get(self, parts: list[str], query: dict[str, str], token: str) -> Any:
        match parts:
            case ["info"]:
                base = {"id": "tributary-base", "digest": self.base_digest}
                return {"log": LOG, "operator": OPERATOR.id, "base_model": base}
            case ["blobs", sha256]:
                self._need_token(token)
                if sha256 not in self.blobs:
                    raise NotFound(f"no blob {sha256}")
                return self.blobs[sha256]
            case ["runs"]:
                wanted = query["status"].split(",")
                return self._page([r for r in self._all("runs") if r["status"] in wanted])
            case ["runs", run]:
                return self.run(run)
            case ["runs", run, "contributions"]:
                self._need_token(token)
                return self._contributions(self.run(run)["datanets"], query)
            case ["runs", run, "terms"]:
                return self._terms(self.run(run)["datanets"])
            case ["adapters"] if "recall" in query:
                return self._page(self._recalls_due())
            case ["adapters"]:
                wanted = query["status"].split(",")
                return self._page([a for a in self._all("adapters") if a["status"] in wanted])
            case ["adapters", adapter]:
                return self.adapter(adapter)
            case ["inferences"]:
                assert query["attribution"] == "pending"
                found = self.inferences.values()
                return self._page([dict(i) for i in found if i["attribution"] is None])
        raise NotFound("/".join(parts))

    def _recalls_due(self) -> list[dict[str, Any]]:
        """As the API answers: by the manifest of each published adapter's run."""
        found = []
        for adapter in self._all("adapters"):
            manifest = self.blobs.get(str(self.run(adapter["run"])["manifest_sha256"]))
            for id in parse_manifest(manifest).rows if manifest else ():
                row = self.rows.get("contributions", (id,))
                policy = self.rows.get("datanet_policies", (row["datanet"],)) if row else None
                if row is None or policy is None or adapter["status"] != "published":
                    continue
                if (row["status"], policy["on_withdrawal"]) == ("withdrawn", "retire"):
                    named = {"contribution": id, "datanet": row["datanet"]}
                    found.append({**adapter, **named, "withdrawal": row["note"]})
        return found

    def _held(self, contribution: str) -> bool:
        hold = self.rows.get("holds", (contribution,))
        return hold is not None and bool(hold["active"])

    def _all(self, table: str) -> list[dict[str, Any]]:
        read = self.run if table == "runs" else self.adapter
        return [read(key[0]) for key, _ in self.rows.scan(table)]

    def _contributions(self, datanets: list[str], query: dict[str, str]) -> dict[str, Any]:
        """Two to a page, so that a client that forgets the cursor fails."""
        after = int(query.get("after", -1))
        rows = [
            {"contribution": key[0], **row}
            for key, row in self.rows.scan("contributions")
            if row["datanet"] in datanets
            and row["status"] == "approved"
            and row["index"] > after
            and not self._held(key[0])
        ]
        rows.sort(key=lambda row: row["index"])
        cursor = rows[1]["index"] if len(rows) > 2 else None
        return {"items": rows[:2], "next": cursor}

    def _terms(self, datanets: list[str]) -> dict[str, Any]:
        inputs = {
            key[0]: row["status"]
            for key, row in self.rows.scan("contributions")
            if row["datanet"] in datanets
        }
        return {
            "log_size": self.entries[-1].index + 1,
            "withdrawn": sorted(name for name, status in inputs.items() if status == "withdrawn"),
            "held": sorted(filter(self._held, inputs)),
            "splits": [],
        }

    def _page(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {"items": items, "next": None}

    def _need_token(self, token: str) -> None:
        if token not in self.tokens:
            raise Unauthenticated("sign in")


def write_key(folder: Path, actor: Actor = WORKER) -> Path:
    path = folder / "worker.key"
    path.touch(mode=0o600)
    path.write_text(bytes(actor.key).hex())
    return path


def _handler(api: WorkersApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def _serve(self, method: str) -> None:
            url = urlsplit(self.path)
            query = {k: v[0] for k, v in parse_qs(url.query).items()}
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            try:
                status, value = 200, api.answer(method, url.path, query, data, token)
            except LedgerError as error:
                status, value = error.status, problem_document(error)
            if api.lose_answers and method == "POST":
                api.lose_answers -= 1
                self.close_connection = True
                return
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
