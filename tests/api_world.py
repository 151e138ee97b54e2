"""The whole HTTP service in one process, for tests: uvicorn on a free port, a real PostgreSQL,
sequencer and projector on threads, and OpenLoRA's real engine on the bundled base model (no Ray).

`service(url, home)` runs it with an opened, empty ledger; `Service.tell()` tells the story up to a
published adapter, every step signed by its own key and sent over HTTP. `pace_s` slows the pieces of
an answer down, never the engine: a test can then act in the middle of one.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import torch
import uvicorn
from nacl.signing import SigningKey

from ledger import bootstrap
from ledger.aggregates.inferences import chain_event_id
from ledger.api.app import create_app
from ledger.api.one_write import OneWriteProtocol
from ledger.api.services import Services
from ledger.bootstrap import api_services, log_signer, projection_runner, store
from ledger.client import Client
from ledger.config import Settings
from ledger.domain.canonical import canonical_json
from ledger.domain.rows import DataRow, encode_rows, rows_root
from ledger.log.sequencer import Sequencer
from ledger.ports import ChatDelta, ChatRequest, TokenChance
from projections.runner import Runner
from tests.unit.openlora_world import SavedAdapter, save_adapter
from workers import base_model
from workers.openlora.chat import encode_chat
from workers.openlora.driver import AsyncEngine
from workers.openlora.engine import Engine, EngineConfig, GenerationRequest
from workers.openlora.sampling import TokenLogprob
from workers.replicas.backend import encode_prompt

LOG = "ledger.example/api"
PEOPLE = ("operator", "worker", "owner", "ann", "ben", "dev", "eve", "mallory")
POLICY = {"protocol_bps": 500, "owner_bps": 2_500, "operator_bps": 2_000, "contributors_bps": 5_000}
INPUT_WEI, OUTPUT_WEI = 7, 11
MODEL = "dev/facts"
STEPS_S = 10.0


def key_of(name: str) -> SigningKey:
    return SigningKey(name.encode().ljust(32, b"."))


class LocalEngine:
    """`ledger.ports.ServingEngine` on a real engine in this process, under its own finish reasons
    (`deadline` and `cancelled` too), which a serving engine may report."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        model, self.tokenizer = base_model.load()
        self.model = model
        self.pace_s = 0.0
        self.timeout_s: float | None = None
        self.break_after: int | None = None
        """Pieces after which the stream fails with an error that nobody foresaw."""
        self.asked: deque[ChatRequest] = deque(maxlen=100)
        """What was asked last."""
        self.serving = AsyncEngine(Engine(model, self.tokenizer, EngineConfig(max_rows=16)))
        self.serving.start()

    async def count_tokens(
        self, messages: Sequence[Mapping[str, str]], prompt: str | None = None
    ) -> int:
        return len(self._encoded(messages, prompt))

    def _encoded(
        self, messages: Sequence[Mapping[str, str]], prompt: str | None
    ) -> tuple[int, ...]:
        if prompt is not None:
            return encode_prompt(self.tokenizer, prompt)
        return encode_chat(self.tokenizer, messages)

    def _chance(self, found: TokenLogprob) -> TokenChance:
        def told(token_id: int) -> tuple[str, bytes]:
            text = self.tokenizer.decode([token_id])
            return text, text.encode()

        top = tuple((*told(token_id), logprob) for token_id, logprob in found.top)
        text, raw = told(found.token_id)
        return TokenChance(text=text, raw=raw, logprob=found.logprob, top=top)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta]:
        generation = GenerationRequest(
            request_id=request.request_id,
            adapter_id=request.adapter,
            prompt_ids=self._encoded(request.messages, request.prompt),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop=tuple(request.stop),
            logprobs=request.logprobs,
            payer=request.payer,
            timeout_s=self.timeout_s or request.timeout_s,
            ignore_eos=self.pace_s > 0,  # a slow answer is a long one
        )
        self.asked.append(request)
        tokens = pieces = 0
        async with contextlib.aclosing(self.serving.generate(generation)) as deltas:
            async for delta in deltas:
                tokens += len(delta.token_ids)
                pieces += 1
                if pieces == self.break_after:
                    raise RuntimeError("secret of the engine")
                finish = delta.finish
                yield ChatDelta(
                    text=delta.text,
                    finish_reason=finish.reason if finish else None,
                    prompt_tokens=len(generation.prompt_ids),
                    completion_tokens=finish.completion_tokens if finish else tokens,
                    logprobs=tuple(map(self._chance, delta.logprobs)),
                )
                await asyncio.sleep(self.pace_s)

    async def cancel(self, request_id: str) -> None:
        self.serving.cancel(request_id)

    async def stats(self) -> Mapping[str, Any]:
        return self.serving.stats()

    async def aclose(self) -> None:
        """Whoever made the engine stops it."""

    @property
    def busy(self) -> bool:
        return self.serving.engine.has_work()


@dataclass(kw_only=True)
class Service:
    """A running service. `client(name)` is one person of PEOPLE, signed in."""

    url: str
    home: Path
    services: Services
    runner: Runner
    sequencer: Sequencer
    engine: LocalEngine
    made: dict[str, Any] = field(default_factory=dict)
    _clients: dict[str, Client] = field(default_factory=dict)

    def client(self, name: str) -> Client:
        if name not in self._clients:
            self._clients[name] = Client(self.url, key=key_of(name))
            self._clients[name].login("test")
        return self._clients[name]

    def actor(self, name: str) -> str:
        return self.client(name).actor

    def token(self, name: str) -> str:
        return str(self.client(name).token)

    def http(self, name: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.token(name)}"} if name else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    @property
    def size(self) -> int:
        return self.services.entries.size()

    def settle(self) -> int:
        """Everything appended so far is projected and in a checkpoint; the log's size."""
        size = self.size
        assert self.runner.wait_for(size - 1, STEPS_S), "the projector fell behind"
        deadline = time.monotonic() + STEPS_S
        while (newest := self.services.tiles.latest()) is None or newest.size < size:
            assert time.monotonic() < deadline, "the sequencer fell behind"
            time.sleep(0.01)
        return size

    # --- the story -----------------------------------------------------------------------------

    def open(self) -> None:
        operator = self.client("operator")
        operator.append("ledger.opened", {"name": "test"})
        operator.append("role.granted", {"member": self.actor("worker"), "role": "worker"})
        operator.append("fee_policy.set", {"version": 1, **POLICY})
        for name in PEOPLE:
            self.client(name).append("identity.registered", {"name": name})

    def deposit(self, name: str, amount_wei: int) -> None:
        """What the chain's watcher records when it sees a deposit."""
        on_chain = {"chain_id": 1, "tx_hash": f"0x{uuid4().hex * 2}", "log_index": 0}
        body = {
            "account": self.actor(name), "amount_wei": str(amount_wei), "block_number": 1,
            "contract": "0x" + "12" * 20, **on_chain,
        }  # fmt: skip
        chain_id, tx_hash = 1, str(on_chain["tx_hash"])
        id = chain_event_id("deposit", chain_id, tx_hash, 0)
        self.client("operator").append("deposit.recorded", body, id=id)

    def contribute(self, name: str, datanet: str, count: int = 3) -> dict[str, Any]:
        rows = [
            DataRow(prompt=f"{name} {n}?", completion=f"{n}.", salt=uuid4().hex)
            for n in range(count)
        ]
        body = {
            "contribution": str(uuid4()), "datanet": datanet, "licence": "CC0-1.0",
            "rows_root": rows_root(rows).hex(), "rows_count": count, "title": f"rows of {name}",
            "rows_sha256": self.client(name).put_blob(encode_rows(rows)),
        }  # fmt: skip
        self.client(name).append("contribution.recorded", body)
        ids = {"contribution": body["contribution"], "datanet": datanet}
        self.client("owner").append("contribution.approved", {**ids, "note": ""})
        return {**body, "rows": rows}

    def tell(self, folder: Path) -> "Service":
        """Datanet, contributions of ann and ben, a run, an adapter (peft's own files, random
        weights) that the engine serves."""
        datanet = str(uuid4())
        net = {"datanet": datanet, "name": "n", "description": "", "licence": "CC0-1.0"}
        self.client("owner").append("datanet.created", {**net, "reviewers": []})
        told = {name: self.contribute(name, datanet) for name in ("ann", "ben")}
        saved = save_adapter(base_model.load()[0], folder, "facts", targets=("q_proj", "v_proj"))
        run = self._run(datanet, told, saved)
        adapter = self.publish(run, saved, MODEL)
        self.made |= {"datanet": datanet, "run": run, "adapter": adapter, "saved": saved, **told}
        self.settle()
        return self

    def _run(self, datanet: str, told: Mapping[str, Any], saved: SavedAdapter) -> str:
        run, worker = str(uuid4()), self.client("worker")
        base = worker.get("/v1/info")["base_model"]
        asked = {"run": run, "name": "r", "datanets": [datanet], "config": {"seed": 1}}
        self.client("dev").append(
            "run.requested", {**asked, "base_model": base["digest"], "base_id": base["id"]}
        )
        started = {"run": run, "attempt": 1, "submission_id": f"{run}-1"}
        worker.append("run.started", started)
        manifest = {
            "v": 1, "base_sha256": base["digest"], "adapter_sha256": saved.sha256,
            "config_sha256": saved.config_sha256, "steps": 3, "losses": ["1.5"],
            "rows": [
                {"contribution": body["contribution"], "row": n, "row_hash": row.hash.hex()}
                for body in told.values()
                for n, row in enumerate(body["rows"])
            ],
        }  # fmt: skip
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            worker.put_blob((saved.path / file).read_bytes())
        completed = {
            "run": run, "attempt": 1, "manifest_sha256": worker.put_blob(canonical_json(manifest)),
            "adapter_sha256": saved.sha256, "adapter_config_sha256": saved.config_sha256,
            "index_sha256": worker.put_blob(self._index()), "index_root": "ab" * 32,
            "rows_count": 6, "contributions_count": 2, "steps": 3, "loss": "1.5",
        }  # fmt: skip
        self.made["completed"] = completed
        worker.append("run.completed", completed)
        return run

    def _index(self) -> bytes:
        """The manifest of an index of one file; nothing here scores by it."""
        vectors = bytes(range(256)) * 4
        sha256 = self.client("worker").put_blob(vectors)
        stamp = {"bytes": len(vectors), "sha256": sha256}
        return canonical_json({"files": {"vectors.i8": stamp}, "rows": 6})

    def publish(
        self,
        run: str,
        saved: SavedAdapter,
        model: str,
        *,
        prices: tuple[int, int] = (INPUT_WEI, OUTPUT_WEI),
    ) -> str:
        adapter = str(uuid4())
        body = {
            "adapter": adapter, "run": run, "model": model, "adapter_sha256": saved.sha256,
            "base_model": self.client("dev").get("/v1/info")["base_model"]["digest"],
            "input_wei_per_token": str(prices[0]), "output_wei_per_token": str(prices[1]),
        }  # fmt: skip
        self.client("dev").append("adapter.published", body)
        self.engine.serving.engine.load_adapter(
            adapter, saved.path, saved.sha256, config_sha256=saved.config_sha256
        )
        self.settle()
        return adapter

    def attribute(self, inference: str, **evidence: Any) -> int:
        """As the attribution worker records it: six parts ann, three ben, one nobody."""
        worker = self.client("worker")
        told = {"v": 1, "inference": inference, "method": "test/v1", **evidence}
        body = {
            "inference": inference, "adapter": self.made["adapter"], "run": self.made["run"],
            "method": "test/v1", "index_sha256": self.made["completed"]["index_sha256"],
            "evidence_sha256": worker.put_blob(canonical_json(told)),
            "shares": [
                {"contributor": self.actor("ann"), "ppm": 600_000},
                {"contributor": self.actor("ben"), "ppm": 300_000},
            ],
            "unattributed_ppm": 100_000,
        }  # fmt: skip
        index = worker.append("attribution.recorded", body)
        self.settle()
        return index


def settings_for(url: str, home: Path, **changes: Any) -> Settings:
    """Settings whose operator key is that of PEOPLE."""
    settings = Settings(home=home, log_origin=LOG, DATABASE_URL=url, **changes)  # type: ignore[call-arg]
    path = settings.key_file(bootstrap.OPERATOR_KEY)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bytes(key_of("operator")).hex())
    return settings


@contextmanager
def service(
    url: str, home: Path, engine: LocalEngine, *, opened: bool = True, **changes: Any
) -> Iterator[Service]:
    settings = settings_for(url, home, **changes)
    with (
        api_services(settings, serving=engine) as services,
        store(settings, pool_size=4) as projecting,
    ):
        runner = projection_runner(projecting)
        sequencer = Sequencer(
            log=projecting.entries,
            tiles=projecting.tiles,
            signer=log_signer(settings),
            clock=services.clock,
        )
        stop = threading.Event()
        threads = [
            threading.Thread(target=run, args=(stop,)) for run in (runner.run, sequencer.run)
        ]
        for thread in threads:
            thread.start()
        try:
            with serving_http(services) as at:
                running = Service(
                    url=at,
                    home=home,
                    services=services,
                    runner=runner,
                    sequencer=sequencer,
                    engine=engine,
                )
                if opened:
                    running.open()
                    running.settle()
                yield running
        finally:
            stop.set()
            for thread in threads:
                thread.join(STEPS_S)


@contextmanager
def serving_http(services: Services) -> Iterator[str]:
    """The app behind uvicorn, as `ledger.processes` runs it; its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        config = uvicorn.Config(
            create_app(services),
            http=OneWriteProtocol,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "uvicorn did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(STEPS_S)
