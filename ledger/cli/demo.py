"""`tributary demo`: one answer's whole life on this machine, then everything is switched off and
the proof still holds.

Each step asks the ledger what is there already, so a demo that was killed goes on where it stopped,
and a second run adds new questions, a new period and a new claim to the same ledger. Names of what
was made are in home/demo.json; the ledger has the truth.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import typer
from nacl.signing import SigningKey

from ledger.cli.contributions import contribution_body, salted
from ledger.cli.progress import Bar, Show
from ledger.client import Client, load_key
from ledger.config import Settings
from ledger.domain.ids import derived_id, sender_id, sha256_hex
from ledger.domain.money import WEI_PER_OPEN, format_open
from ledger.domain.rows import encode_rows
from ledger.errors import Conflict, LedgerError, NotFound, Unavailable

QUESTIONS = 32
PARALLEL = 8
MAX_ANSWER_TOKENS = 48
CONSUMERS = 2
DEPOSIT_WEI = 5 * WEI_PER_OPEN
WALLET_WEI = 100 * WEI_PER_OPEN
INPUT_WEI_PER_TOKEN = 10**14
OUTPUT_WEI_PER_TOKEN = 2 * 10**14
TRAINING = {"epochs": 6, "max_len": 128, "seed": 7}
REJECTED_REASON = "too short to teach anything; please add rows"
SHOWN_SHARES = 4
# The demo's own people; contributors' names do not begin so (demo_data.from_file).
REVIEWER, DEVELOPER = "@reviewer", "@developer"
STEP_TRIES = 4
STEP_PATIENCE_S = 60.0
FINISHED = ("completed", "failed", "cancelled")


def register(root: typer.Typer) -> None:
    root.command()(demo)


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with prompt, completion and optional contributor."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the demo's state first.")] = False,
) -> None:
    """One answer's whole life, for real: data, training, answers, money, proofs."""
    from ledger.cli.demo_data import from_file, standard_library
    from ledger.config import load_settings
    from ledger.processes.supervisor import erase, running

    # SIGTERM must stop what was started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = load_settings(port=_free_port(), anchor_interval_s=6.0)
    show = Show()
    if fresh:
        erase(settings.root)
    rows = from_file(data) if data else standard_library()
    started = time.monotonic()
    show.title(settings.root, rows)
    with running(settings, show.detail) as service:
        with show.step("Starting PostgreSQL, a chain, Ray and the service") as bar:
            service.wait_ready()
            bar.done("ready, " + service.settings.url)
        story = Story(service.settings, rows, show)
        with _watched(service, show):
            for step in story.steps():
                carry_on(step, service.wait_ready, show)
            facts = story.facts()
    _nothing_answers(service.settings)
    show.line("everything is stopped: the API, the database and the chain answer no more")
    _verify(show, facts)
    show.summary(facts, time.monotonic() - started)


@contextmanager
def _watched(service: Any, show: "Show") -> Iterator[None]:
    """What dies meanwhile is started again."""
    stop = threading.Event()
    watcher = threading.Thread(target=service.watch, args=(stop, show.detail), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def carry_on(step: Callable[[], None], wait_ready: Callable[[], Any], show: "Show") -> None:
    """Do a step of the story; again once the service is back, should a part of it die under us."""
    began = time.monotonic()
    for tries in range(1, STEP_TRIES + 1):
        try:
            step()
            break
        except Unavailable as error:
            # A step that took long has waited in vain: doing so again would not help.
            if tries == STEP_TRIES or time.monotonic() - began > STEP_PATIENCE_S:
                raise
            show.detail("again", error.message)
            time.sleep(tries)  # the API may be ready while the chain is not
            wait_ready()


class Story:
    """The steps. Each leaves what the next needs in `self.made`, and on disk."""

    def __init__(self, settings: Any, rows: dict[str, list[dict[str, str]]], show: Show) -> None:
        self.settings, self.rows, self.show = settings, rows, show
        self.digest = sha256_hex(json.dumps(rows, sort_keys=True).encode())[:12]
        self.path = settings.root / f"demo-{self.digest}.json"
        self.made: dict[str, Any] = self._load()
        self.round = self.made["round"] = self.made.get("round", 0) + 1
        self.clients: dict[str, Client] = {}
        self.inferences: list[dict[str, Any]] = []
        self.cut: int | None = None

    def steps(self) -> tuple[Callable[[], None], ...]:
        return (
            self.people, self.datanets, self.contributions, self.review, self.training,
            self.adapters, self.deposits, self.questions, self.attribution, self.payout,
            self.claim, self.anchor, self.bundle, self.audit,
        )  # fmt: skip

    # --- people and data ----------------------------------------------------------------------

    def people(self) -> None:
        """Register an identity for everyone and bind their EVM addresses."""
        from ledger import bootstrap

        names = [REVIEWER, DEVELOPER, *self._consumers(), *self.rows]
        with self.show.step("Registering people, binding EVM addresses", len(names)) as bar:
            for name in names:
                client = self._client(name)
                self._once(
                    client, "identity.registered", {"name": name.lstrip("@")}, "identity", name
                )
                wallet = bootstrap.wallet_of(self._key_path(name, "-evm"))
                signature = bootstrap.sign_binding(wallet, actor=client.actor, log=client.log)
                body = {"address": wallet.address, "signature": signature}
                self._once(client, "identity.evm_bound", body, "binding", name)
                bar.advance()
            bar.done(f"{len(names)} identities, each with its own keys")

    def datanets(self) -> None:
        """Two datanets, owned by the reviewer."""
        with self.show.step("Creating two datanets under an open licence") as bar:
            owner = self._client(REVIEWER)
            nets = {
                name: str(derived_id("demo", owner.log, self.digest, name))
                for name in self._net_names()
            }
            for name, datanet in nets.items():
                body = {
                    "datanet": datanet,
                    "name": name,
                    "description": "made by tributary demo",
                    "licence": "CC-BY-4.0",
                    "reviewers": [],
                }
                self._once(owner, "datanet.created", body, "datanet", datanet)
            self._keep("datanets", nets)
            bar.done(", ".join(nets))

    def contributions(self) -> None:
        """Everyone signs their rows; the server sees hashes and a blob."""
        made: dict[str, str] = dict(self.made.get("contributions", {}))
        with self.show.step("Contributing rows", len(self.rows)) as bar:
            for name, rows in self.rows.items():
                if name not in made:
                    made[name] = self._contribute(name, rows)
                bar.advance()
            if "rejected" not in made:
                made["rejected"] = self._contribute("rejected", self._first_rows(2), author=0)
            self._keep("contributions", made)
            count = sum(map(len, self.rows.values()))
            bar.done(f"{count} rows from {len(self.rows)} people")

    def _contribute(self, name: str, rows: list[dict[str, str]], author: int | None = None) -> str:
        who = name if author is None else list(self.rows)[author]
        client = self._client(who, login=True)
        contribution = str(derived_id("demo-contribution", client.log, self.digest, name))
        packed = salted(rows)
        body = contribution_body(
            packed,
            contribution=contribution,
            datanet=self._net_of(who),
            licence="CC-BY-4.0",
            title=name,
            sha256=client.put_blob(encode_rows(packed)),
        )
        with suppress(Conflict):  # an earlier run was killed after this append
            client.append("contribution.recorded", body)
        return contribution

    def review(self) -> None:
        """Approve everything but one."""
        made = self.made["contributions"]
        reviewer = self._client(REVIEWER)
        with self.show.step("Reviewing", len(made)) as bar:
            for name, contribution in made.items():
                rejected = name == "rejected"
                verdict = "rejected" if rejected else "approved"
                who = next(iter(self.rows)) if rejected else name
                more = {"reason": REJECTED_REASON} if rejected else {"note": ""}
                ids = {"contribution": contribution, "datanet": self._net_of(who)}
                body = {**ids, **more}
                self._once(reviewer, f"contribution.{verdict}", body, "review", contribution)
                bar.advance()
            bar.done(f"{len(made) - 1} approved, 1 rejected")
        last = self._client(REVIEWER).get("/v1/info")["size"]
        self._projected(last - 1)

    # --- models -------------------------------------------------------------------------------

    def training(self) -> None:
        """A LoRA training run on each datanet, as Ray jobs."""
        developer = self._client(DEVELOPER)
        base = developer.get("/v1/info")["base_model"]
        # Another base model means other runs and adapters: theirs fit no other.
        digest = base["digest"]
        runs = {
            name: str(derived_id("demo-run", developer.log, self.digest, name, digest))
            for name in self.made["datanets"]
        }
        with self.show.step("Training a LoRA adapter on each datanet (Ray jobs)") as bar:
            for name, run in runs.items():
                body = {
                    "run": run,
                    "name": f"{name} LoRA",
                    "datanets": [self.made["datanets"][name]],
                    "base_model": base["digest"],
                    "base_id": base["id"],
                    "config": TRAINING,
                }
                self._once(developer, "run.requested", body, "run", run)
            done = [self._trained(name, run, bar) for name, run in runs.items()]
            self._keep("runs", runs)
            rows = sum(int(r["rows_count"]) for r in done)
            losses = ", ".join(f"{float(r['loss']):.2f}" for r in done)
            bar.done(f"{rows} rows, final loss {losses}")

    def _trained(self, name: str, run: str, bar: Bar) -> dict[str, Any]:
        def finished(found: dict[str, Any]) -> bool:
            bar.note(f"{name}: {found['status']}, attempt {found['attempt']}")
            return found["status"] in FINISHED

        found: dict[str, Any] = self._client(DEVELOPER).wait_until(
            f"/v1/runs/{run}", finished, timeout_s=900
        )
        if found["status"] != "completed":
            raise LedgerError(f"the run on {name} {found['status']}: {found['reason']}")
        return found

    def adapters(self) -> None:
        """Publish both, with prices."""
        developer = self._client(DEVELOPER)
        made = {}
        with self.show.step("Publishing two adapters on one base model") as bar:
            for name, run in self.made["runs"].items():
                adapter = str(derived_id("demo-adapter", developer.log, run))
                found = developer.get(f"/v1/runs/{run}")
                body = {
                    "adapter": adapter,
                    "run": run,
                    "model": f"demo/{name}",
                    "adapter_sha256": found["adapter_sha256"],
                    "base_model": found["base_model"],
                    "input_wei_per_token": str(INPUT_WEI_PER_TOKEN),
                    "output_wei_per_token": str(OUTPUT_WEI_PER_TOKEN),
                }
                self._once(developer, "adapter.published", body, "adapter", adapter)
                made[f"demo/{name}"] = adapter
            self._keep("adapters", made)
            for model in made:
                developer.wait_until(f"/v1/models/{model}", lambda found: found["id"])
            bar.done(", ".join(made))

    # --- answers and money --------------------------------------------------------------------

    def deposits(self) -> None:
        """Consumers send OPEN to the escrow; the watcher credits them."""
        from ledger import bootstrap

        with self.show.step("Prepaying on chain") as bar:
            for name in self._consumers():
                client = self._client(name, login=True)
                before = self._balance(name, "prepaid")
                if before < DEPOSIT_WEI // 2:
                    self._fund(name)
                    key_file = self._key_path(name, "-evm")
                    payouts = bootstrap.payouts(self.settings, key_file, client.get("/v1/info"))
                    payouts.deposit(client.actor, DEPOSIT_WEI)
                    self._grown(name, before)
            held = sum(self._balance(name, "prepaid") for name in self._consumers())
            bar.done(f"{len(self._consumers())} consumers, {format_open(held)} prepaid")

    def questions(self) -> None:
        """Ask both models at once, streaming, through the OpenAI-compatible endpoint."""
        rng = random.Random(self.round)  # noqa: S311  which questions, not a secret
        asked = []
        for name, rows in self.rows.items():
            model = f"demo/{self._net_name(name)}"
            asked += [(model, row["prompt"]) for row in rng.sample(rows, min(3, len(rows)))]
        rng.shuffle(asked)
        asked = asked[:QUESTIONS]
        tokens = {name: self._client(name, login=True).token for name in self._consumers()}
        with self.show.step(
            "Asking, streamed, both adapters in the same batches", len(asked)
        ) as bar:
            names = self._consumers()

            def ask(job: tuple[int, tuple[str, str]]) -> dict[str, Any]:
                number, (model, prompt) = job
                consumer = names[number % len(names)]
                answer = self._ask(model, prompt, str(tokens[consumer])) | {"consumer": consumer}
                bar.advance()
                bar.note(answer["text"][:60].replace("\n", " "))
                return answer

            with ThreadPoolExecutor(PARALLEL) as pool:
                self.inferences = list(pool.map(ask, enumerate(asked)))
            fees = sum(int(a["fee_wei"]) for a in self.inferences)
            words = sum(a["tokens"] for a in self.inferences)
            replicas = self._client(DEVELOPER).get("/v1/serving")["replicas"]
            mixed_steps, all_steps = (
                sum(r["stats"].get(name, 0) for r in replicas)
                for name in ("mixed_steps", "decode_steps")
            )
            mixed = f"{mixed_steps} of {all_steps} batches mixed both adapters"
            bar.done(f"{len(asked)} answers, {words} tokens, {format_open(fees)} in fees; {mixed}")

    def _ask(self, model: str, prompt: str, token: str) -> dict[str, Any]:
        """One streamed answer: its text and receipt. Serving may still be loading: then wait."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_ANSWER_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"authorization": f"Bearer {token}"}
        url = f"{self.settings.url}/v1/chat/completions"
        deadline = time.monotonic() + 120
        while True:
            answer: dict[str, Any] = {"text": "", "model": model, "prompt": prompt, "tokens": 0}
            # A stream that broke off has cost nothing, or is an answer of its own: ask again.
            with (
                suppress(httpx.HTTPError),
                httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response,
            ):
                if response.status_code == 200:
                    for line in event_lines(response.iter_bytes()):
                        _take(answer, line)
                    if "inference" in answer:
                        return answer
                elif response.status_code not in (404, 429, 503):
                    response.read()
                    raise Unavailable(f"asking failed: {response.text[:300]}")
            if time.monotonic() > deadline:
                raise Unavailable("no answer within 120 s; see logs/workers.log")
            time.sleep(1.0)

    def attribution(self) -> None:
        """Wait until every answer has been attributed."""
        reader = self._client(DEVELOPER)
        with self.show.step("Attributing every answer to rows", len(self.inferences)) as bar:
            for answer in self.inferences:
                found = reader.wait_until(
                    f"/v1/inferences/{answer['inference']}",
                    lambda i: i["attribution"] is not None,
                    timeout_s=300,
                )
                answer["attribution"] = found["attribution"]
                bar.advance()
            paid = {s["contributor"] for a in self.inferences for s in a["attribution"]["shares"]}
            lost = [a["attribution"]["unattributed_ppm"] for a in self.inferences]
            share = sum(lost) / len(lost) / 10_000
            bar.done(f"{len(paid)} contributors earned; {share:.0f}% unattributed on average")

    def payout(self) -> None:
        """Close the period; its payout root goes on chain and through its challenge window."""
        with self.show.step("Closing the period, publishing its payout root on chain") as bar:
            operator = self._operator()
            period = self._cut_off(operator)

            def activated(found: dict[str, Any]) -> bool:
                bar.note(str(found["status"]))
                return str(found["status"]) == "activated"

            found = operator.wait_until(f"/v1/periods/{period}", activated, timeout_s=180)
            self.made["period"] = found
            bar.done(
                f"period {period}: {format_open(int(found['total_wei']))} to "
                f"{found['accounts']} accounts"
            )

    def _cut_off(self, operator: Client) -> int:
        """Number of the period to wait for: one that a killed demo left under way, or a new one."""
        # Here, so that the other commands need no event store: see `[client]` in pyproject.toml.
        from ledger.aggregates.periods import SETTLED

        self._projected(operator.get("/v1/info")["size"] - 1)
        newest = next(iter(operator.get("/v1/periods")["items"]), None)
        number = int(newest["period"]) if newest else 0
        if self.cut is None:
            settled = newest is None or newest["status"] in SETTLED
            self.cut = number + 1 if settled else number
        if number < self.cut:
            operator.post("/v1/periods")
        return self.cut

    def claim(self) -> None:
        """The top contributor claims, and the ledger's `paid` equals the chain."""
        from ledger import bootstrap

        with self.show.step("Claiming as the top contributor") as bar:
            top = self._top()
            name = top["name"]
            self._fund(name)
            client = self._client(name)
            address = client.get(f"/v1/identities/{client.actor}")["evm_address"]
            line = client.get(f"/v1/periods/{self.made['period']['period']}/claims/{address}")
            key_file = self._key_path(name, "-evm")
            payouts = bootstrap.payouts(self.settings, key_file, client.get("/v1/info"))
            proof = [bytes.fromhex(node[2:]) for node in line["proof"]]
            receipt = payouts.claim(address, int(line["cumulative_wei"]), proof)
            on_chain = payouts.claimed(address)
            self._until(lambda: bool(self._balance(name, "paid") == on_chain))
            self.made["claim"] = {
                "name": name,
                "address": address,
                "paid_wei": on_chain,
                "tx": "0x" + receipt.tx_hash.hex() if receipt else "paid before",
            }
            bar.done(f"{name} was paid {format_open(on_chain)}; ledger and chain agree")

    # --- proofs -------------------------------------------------------------------------------

    def anchor(self) -> None:
        """Wait until a checkpoint that covers the answers is on chain."""
        with self.show.step("Anchoring the log on chain") as bar:
            reader = self._client(DEVELOPER)
            wanted = max(
                int(reader.get(f"/v1/inferences/{a['inference']}")["attribution_index"])
                for a in self.inferences
            )

            def covers(found: dict[str, Any]) -> bool:
                items = found["items"]
                return len(items) > 0 and int(items[0]["size"]) > wanted

            found = reader.wait_until("/v1/anchors", covers, timeout_s=120)["items"][0]
            self.made["anchor"] = found
            bar.done(f"{found['size']} entries, block {found['block_number']}")

    def bundle(self) -> None:
        """Download the proof of one answer."""
        with self.show.step("Downloading one answer's lineage bundle") as bar:
            best = min(self.inferences, key=lambda a: a["attribution"]["unattributed_ppm"])
            data = self._client(DEVELOPER).get_bytes(f"/v1/bundles/{best['inference']}")
            path = self.settings.root / "answer.lineage.json"
            path.write_bytes(data)
            self.made["bundle"] = {"path": str(path), "inference": best["inference"]}
            self.made["sample"] = {
                "prompt": best["prompt"],
                "text": best["text"],
                "shares": self._named_shares(best["attribution"]),
            }
            bar.done(f"{len(data) / 1024:.0f} KiB, {len(json.loads(data)['entries'])} log entries")

    def audit(self) -> None:
        """Recompute the same answer's attribution, as its consumer may: from the committed sketch
        and index to the last ppm, and the sketch once more from the weights."""
        from ledger.processes import auditor
        from ledger.processes.audit_files import AuditFiles
        from ledger.remote import HttpSource

        inference = self.made["bundle"]["inference"]
        answer = next(a for a in self.inferences if a["inference"] == inference)
        client = self._client(answer["consumer"], login=True)
        with self.show.step("Auditing that answer's shares, from the weights up") as bar:
            files = AuditFiles(
                client, self.settings.root / "audit", vkey=client.get("/v1/info")["vkey"]
            )
            with HttpSource(f"{self.settings.url}/log") as log:
                report = auditor.verify(files, log, inference, weights=True)
            why = client.get(f"/v1/inferences/{inference}/attribution")["evidence"]
            spans = why.get("spans")
            words = [f'"{s["text"]}"' for s in spans["spans"][:SHOWN_SHARES]] if spans else []
            self.made["audit"] = {
                "steps": [f"{s.detail}" for s in report.steps if s.name in ("shares", "effect")],
                "verbatim": ", ".join(words) or "no verbatim match in the rows",
            }
            bar.done(f"{len(report.steps)} steps hold; every share to the last ppm")

    def _named_shares(self, attribution: dict[str, Any]) -> str:
        """The largest shares, for people: names and percentages."""
        names = {self._client(name).actor: name for name in self.rows}
        parts = [
            f"{names.get(s['contributor'], s['contributor'][:20])} {s['ppm'] / 10_000:.1f}%"
            for s in attribution["shares"][:SHOWN_SHARES]
        ]
        return ", ".join([*parts, f"unattributed {attribution['unattributed_ppm'] / 10_000:.1f}%"])

    def facts(self) -> dict[str, Any]:
        """What the summary shows, read before the service stops."""
        reader = self._client(DEVELOPER)
        claim, period, anchor = self.made["claim"], self.made["period"], self.made["anchor"]
        checkpoint = reader.get_bytes("/log/checkpoint").decode().splitlines()
        lines = reader.get(f"/v1/accounts/{self._client(claim['name']).actor}/statement")["items"]
        self._save()
        found = {
            "top": claim["name"],
            "vkey": reader.get("/v1/info")["vkey"],
            "bundle": self.made["bundle"]["path"],
            "table": {
                "log": f"{checkpoint[0]}, {checkpoint[1]} entries, root {checkpoint[2]}",
                "a question": self.made["sample"]["prompt"],
                "its answer": self.made["sample"]["text"].strip(),
                "shaped by": self.made["sample"]["shares"],
                "word for word": self.made["audit"]["verbatim"],
                "audited": "; ".join(self.made["audit"]["steps"]),
                "inference": self.made["bundle"]["inference"],
                "anchored": f"size {anchor['size']}, transaction {anchor['tx_hash']}",
                "payout root": f"{period['root']} (leaf {period['closed_index']})",
                "claimed": f"{format_open(claim['paid_wei'])} in transaction {claim['tx']}",
            },
            "statement": [_statement_line(line) for line in lines[-12:]],
            "commands": [
                f"tributary verify {self.made['bundle']['path']}",
                f"tributary attribution verify {self.made['bundle']['inference']}",
                "tributary up",
                f"tributary account statement {self._client(claim['name']).actor}",
                "tributary period show 1",
                "tributary log list --after 100",
            ],
        }
        for client in self.clients.values():
            client.close()
        return found

    # --- how it is done -----------------------------------------------------------------------

    def _consumers(self) -> list[str]:
        return [f"@consumer-{n + 1}" for n in range(CONSUMERS)]

    def _net_names(self) -> list[str]:
        return ["docs-one", "docs-two"]

    def _net_name(self, contributor: str) -> str:
        """Contributors alternate between the datanets, so that both have like sizes."""
        return self._net_names()[list(self.rows).index(contributor) % 2]

    def _net_of(self, contributor: str) -> str:
        return str(self.made["datanets"][self._net_name(contributor)])

    def _first_rows(self, count: int) -> list[dict[str, str]]:
        return next(iter(self.rows.values()))[:count]

    def _key_path(self, name: str, suffix: str = "") -> Path:
        # The digest keeps names apart that differ in what a file name cannot show.
        safe = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:40]
        digest = sha256_hex(name.encode())[:8]
        return Path(self.settings.key_file(f"demo-{safe}-{digest}{suffix}"))

    def _client(self, name: str, *, login: bool = False) -> Client:
        from ledger import bootstrap

        if name not in self.clients:
            key: SigningKey = bootstrap.ensure_key(self._key_path(name))
            self.clients[name] = Client(self.settings.url, key=key)
        if login and self.clients[name].token is None:
            self.clients[name].login("demo")
        return self.clients[name]

    def _operator(self) -> Client:
        if "operator" not in self.clients:
            key = load_key(self.settings.key_file("operator"))
            self.clients["operator"] = Client(self.settings.url, key=key)
            self.clients["operator"].login("demo")
        return self.clients["operator"]

    def _once(self, client: Client, type: str, body: dict[str, Any], what: str, name: str) -> int:
        """Append unless an earlier run of the demo has: the event id is a function of the step."""
        event_id: UUID = sender_id("demo-event", client.log, client.actor, what, name)
        return client.append(type, body, id=event_id)

    def _top(self) -> dict[str, Any]:
        names = {self._client(name).actor: name for name in self.rows}
        for row in self._client(DEVELOPER).get("/v1/contributors", limit=100)["items"]:
            if row["owner"] in names:
                return {**row, "name": names[row["owner"]]}
        raise NotFound("no contributor of this demo has earned anything; ask more questions")

    def _balance(self, name: str, bucket: str) -> int:
        client = self._client(name)
        return int(client.get(f"/v1/accounts/{client.actor}/balances")[bucket])

    def _grown(self, name: str, before: int) -> None:
        self._until(lambda: self._balance(name, "prepaid") > before)

    def _fund(self, name: str) -> None:
        """Gas and coins from the development chain's faucet."""
        from ledger import bootstrap

        bootstrap.fund(self.settings, self._key_path(name, "-evm"), WALLET_WEI)

    def _projected(self, index: int) -> None:
        reader = self._client(DEVELOPER)
        self._until(lambda: int(reader.get("/v1/info")["projected"]) > index)

    def _until(self, condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise Unavailable(f"not within {timeout_s:.0f} s; see {self.settings.root}/logs")
            time.sleep(0.2)

    def _keep(self, name: str, value: Any) -> None:
        self.made[name] = value
        self._save()

    def _load(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return {}

    def _save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.made, indent=1, default=str))
        temporary.replace(self.path)


def event_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The whole lines of a stream of server-sent events, which end at a newline. httpx's own
    `iter_lines` cuts at U+2028, too, which a model may say."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in lines)


def _take(answer: dict[str, Any], line: str) -> None:
    """One line of a server-sent event stream."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    chunk = json.loads(line[6:])
    for choice in chunk.get("choices", []):
        answer["text"] += choice["delta"].get("content") or ""
    if "tributary" in chunk:
        answer |= chunk["tributary"]
    if chunk.get("usage"):
        answer["tokens"] = chunk["usage"]["total_tokens"]


def _statement_line(line: dict[str, Any]) -> tuple[str, str, str, str, str]:
    share = f"{line['ppm'] / 10_000:.2f}%" if line.get("ppm") else ""
    pool = format_open(int(line["pool_wei"])) if line.get("pool_wei") else ""
    amount = f"{format_open(int(line['amount_wei']))} {line['bucket']}"
    return str(line["index"]), line["type"], amount, share, pool


def _nothing_answers(settings: Settings) -> None:
    """What we are about to prove is worth more when it is true that nothing runs."""
    from ledger import bootstrap

    for url in (settings.url, str(settings.chain_rpc_url)):
        parts = urlsplit(url)
        with suppress(OSError):
            socket.create_connection((str(parts.hostname), parts.port or 80), 1).close()
            raise Unavailable(f"{parts.hostname}:{parts.port} still answers; it should be stopped")
    if not bootstrap.database_stopped(settings):
        raise Unavailable("the embedded PostgreSQL still runs; it should be stopped")


def _verify(show: Show, facts: dict[str, Any]) -> None:
    """In a new process, with nothing of ours running: the verdict on the bundle."""
    command = [sys.executable, "-m", "ledger.verify", facts["bundle"], "--key", facts["vkey"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    show.console.print(done.stdout, markup=False, style="dim", soft_wrap=True)
    if done.returncode:
        raise LedgerError(f"the bundle does not verify: {done.stderr.strip()}")


def _free_port() -> int:
    """The configured port, or a free one when somebody listens there."""
    wanted = int(os.environ.get("TRIBUTARY_PORT", "8420"))
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Unavailable("no free port on 127.0.0.1")
