"""What a load test of serving needs, made through the ledger: a base model in a folder, adapters
that are published, consumers who paid.

Everything is an event of whoever has to sign it, sent over HTTP, and a blob under its hash; the
deposits are on the chain. Only the training is spared: each run's adapter is random numbers, and
one small index stands for all of theirs, so the answers of this world stay unattributed.
"""

import copy
import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from nacl.signing import SigningKey
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ledger import bootstrap
from ledger.client import Client, load_key
from ledger.config import Settings
from ledger.domain.canonical import canonical_json
from ledger.domain.ids import sha256_hex
from ledger.domain.money import WEI_PER_OPEN
from ledger.domain.rows import DataRow, encode_rows, rows_root
from ledger.processes.supervisor import running
from tests.bench.openlora_ways import reference_llama
from workers import base_model

ROOT = Path(__file__).parents[2]
RANK = 8
TARGETS = ("q_proj", "v_proj")
INPUT_WEI, OUTPUT_WEI = 10**12, 2 * 10**12
DEPOSIT_WEI = 20 * WEI_PER_OPEN
WALLET_WEI = 2_000 * WEI_PER_OPEN
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Saved:
    """An adapter's files, as peft writes them."""

    path: Path
    sha256: str
    config_sha256: str


@dataclass(frozen=True, kw_only=True)
class Consumer:
    actor: str
    token: str
    deposit_wei: int


@dataclass(frozen=True, kw_only=True)
class World:
    """`models` are names as clients ask for them, `adapters` ids and files in the same order."""

    base: Path
    models: list[str]
    adapters: list[tuple[str, Saved]]
    consumers: list[Consumer]


# --- models ------------------------------------------------------------------------------------


def reference_base(folder: Path) -> Path:
    """The random Llama of 31.6M parameters as a model folder, with a tokenizer of its vocabulary
    learned from this project's own pages, and the bundled model's chat template."""
    model = reference_llama()
    size = int(model.config.vocab_size)
    bundled = base_model.load()[1]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [*ROOT.glob("docs/*.md"), *ROOT.glob("ledger/**/*.py"), *ROOT.glob("workers/**/*.py")]
    core.train([str(path) for path in sorted(texts)], trainer)
    assert core.get_vocab_size() == size, "too little text for this vocabulary"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[4],
        additional_special_tokens=specials[2:4],
        chat_template=bundled.chat_template,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_adapters(base: Path, folder: Path, count: int) -> list[Saved]:
    """As peft saves them, for this base by its hash."""
    model: Any = get_peft_model(
        copy.deepcopy(base_model.load(base)[0]),
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )
    digest = base_model.digest(base)
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        path = folder / f"a{number}"
        model.save_pretrained(str(path))
        config = json.loads((path / CONFIG).read_text())
        config["base_model_name_or_path"] = f"sha256:{digest}"
        (path / CONFIG).write_text(json.dumps(config))
        hashes = [sha256_hex((path / name).read_bytes()) for name in (WEIGHTS, CONFIG)]
        made.append(Saved(path=path, sha256=hashes[0], config_sha256=hashes[1]))
    return made


# --- the ledger --------------------------------------------------------------------------------


def make_world(settings: Settings, base: Path, *, adapters: int, consumers: int) -> World:
    """On a fresh home. The service runs without its workers meanwhile: they would train."""
    saved = random_adapters(base, settings.root.parent / f"{settings.root.name}-adapters", adapters)
    with running(settings, roles=("api", "projector", "chain")) as service:
        service.wait_ready()
        found = service.settings
        developer = Client(found.url, key=SigningKey.generate())
        developer.append("identity.registered", {"name": "developer"})
        worker = Client(found.url, key=load_key(found.key_file(bootstrap.WORKER_KEY)))
        worker.login("load test")
        common = _common(developer, worker)
        published = [
            _publish(developer, worker, f"load/a{number}", one, common)
            for number, one in enumerate(saved)
        ]
        paid = _consumers(found, consumers)
        size = int(developer.get("/v1/info")["size"])
        developer.wait_until("/v1/info", lambda info: int(info["projected"]) >= size - 1)
        developer.close()
        worker.close()
    names = [f"load/a{number}" for number in range(adapters)]
    pairs = list(zip(published, saved, strict=True))
    return World(base=base, models=names, adapters=pairs, consumers=paid)


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What all runs share: datanet, rows, base, index."""

    datanet: str
    base: dict[str, str]
    rows: list[dict[str, Any]]
    index_sha256: str


def _common(developer: Client, worker: Client) -> _Common:
    datanet, contribution = str(uuid4()), str(uuid4())
    net = {"datanet": datanet, "name": "load", "description": "", "licence": "CC0-1.0"}
    developer.append("datanet.created", {**net, "reviewers": []})
    rows = [
        DataRow(prompt=f"{n}?", completion=f"{n}.", salt=secrets.token_hex(16)) for n in range(3)
    ]
    ids = {"contribution": contribution, "datanet": datanet}
    body = {
        **ids, "licence": "CC0-1.0", "rows_root": rows_root(rows).hex(), "rows_count": len(rows),
        "rows_sha256": worker.put_blob(encode_rows(rows)), "title": "rows",
    }  # fmt: skip
    worker.append("contribution.recorded", body)
    developer.append("contribution.approved", {**ids, "note": ""})
    vectors = bytes(1_024)
    stamp = {"bytes": len(vectors), "sha256": worker.put_blob(vectors)}
    index = canonical_json({"files": {"vectors.i8": stamp}, "rows": len(rows)})
    return _Common(
        datanet=datanet,
        base=dict(worker.get("/v1/info")["base_model"]),
        rows=[
            {"contribution": contribution, "row": n, "row_hash": row.hash.hex()}
            for n, row in enumerate(rows)
        ],
        index_sha256=worker.put_blob(index),
    )


def _publish(developer: Client, worker: Client, model: str, saved: Saved, common: _Common) -> str:
    """A run from request to completion, and its adapter; the adapter's id."""
    run, adapter = str(uuid4()), str(uuid4())
    asked = {"run": run, "name": model, "datanets": [common.datanet], "config": {"seed": 1}}
    base = {"base_model": common.base["digest"], "base_id": common.base["id"]}
    developer.append("run.requested", {**asked, **base})
    worker.append("run.started", {"run": run, "attempt": 1, "submission_id": f"{run}-1"})
    for name in (WEIGHTS, CONFIG):
        worker.put_blob((saved.path / name).read_bytes())
    manifest = {
        "v": 1, "base_sha256": common.base["digest"], "adapter_sha256": saved.sha256,
        "config_sha256": saved.config_sha256, "steps": 1, "losses": ["1.5"], "rows": common.rows,
    }  # fmt: skip
    completed = {
        "run": run, "attempt": 1, "manifest_sha256": worker.put_blob(canonical_json(manifest)),
        "adapter_sha256": saved.sha256, "adapter_config_sha256": saved.config_sha256,
        "index_sha256": common.index_sha256, "index_root": "ab" * 32,
        "rows_count": len(common.rows), "contributions_count": 1, "steps": 1, "loss": "1.5",
    }  # fmt: skip
    worker.append("run.completed", completed)
    terms = {"input_wei_per_token": str(INPUT_WEI), "output_wei_per_token": str(OUTPUT_WEI)}
    published = {"adapter": adapter, "run": run, "model": model, "adapter_sha256": saved.sha256}
    base_model_of = {"base_model": common.base["digest"]}
    developer.append("adapter.published", {**published, **base_model_of, **terms})
    return adapter


def _consumers(settings: Settings, count: int) -> list[Consumer]:
    """Each prepays on chain, from one wallet; the watcher records it."""
    wallet = settings.key_file("load-evm")
    bootstrap.wallet_of(wallet)
    bootstrap.fund(settings, wallet, WALLET_WEI)
    found = []
    clients = [Client(settings.url, key=SigningKey.generate()) for _ in range(count)]
    payouts = bootstrap.payouts(settings, wallet, clients[0].get("/v1/info"))
    for client in clients:
        client.append("identity.registered", {"name": "consumer"})
        client.login("load test")
        payouts.deposit(client.actor, DEPOSIT_WEI)
    for client in clients:
        client.wait_until(
            f"/v1/accounts/{client.actor}/balances",
            lambda balances: int(balances["prepaid"]) == DEPOSIT_WEI,
            timeout_s=PATIENCE_S,
        )
        found.append(Consumer(actor=client.actor, token=str(client.token), deposit_wei=DEPOSIT_WEI))
        client.close()
    return found


def erase(home: Path, folders: Sequence[Path]) -> None:
    for folder in (home, home.parent / f"{home.name}-adapters", *folders):
        shutil.rmtree(folder, ignore_errors=True)
