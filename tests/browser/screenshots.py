"""The pictures of the verifier in docs/images: `python -m tests.browser.screenshots`.

A small but whole story, signed, logged, cosigned and anchored as any other; and the same file after
somebody gave themselves a larger share of the answer.
"""

import json
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey
from playwright.sync_api import FloatRect

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.rows import DataRow, rows_root
from ledger.verify.encoding import encode_base64
from ledger.verify.note import COSIGNATURE, cosign_text, format_vkey, parse_note, vkey_of
from tests.browser.chromium import chromium
from tests.browser.small_png import small_png
from tests.browser.verifier_world import open_verifier, whole_bundle
from tests.unit.lineage_world import ADAPTER, BASE, CONFIG, INDEX, World, actor, name
from tests.unit.made_chain import l1_section

IMAGES = Path(__file__).parents[2] / "docs" / "images"
ORIGIN = "ledger.example/main"
WITNESSES = ("witness.example/north", "witness.example/south")
SEEN_AT_S = 1_700_000_100
LICENCE = "CC-BY-4.0"
# (who, datanet, title, rows, ppm of the answer)
GIVEN: tuple[tuple[str, str, str, int, int], ...] = (
    ("ada", "handbook", "Pension rules", 18, 412_000),
    ("grace", "handbook", "Parental leave", 12, 236_000),
    ("edsger", "handbook", "Notice periods", 9, 88_000),
    ("barbara", "helpdesk", "Spring tickets", 24, 154_000),
    ("tony", "helpdesk", "Summer tickets", 21, 41_000),
)
MAX_BYTES = 300_000
WIDTH = 1_240


def rows_of(who: str, count: int) -> list[DataRow]:
    return [
        DataRow(
            prompt=f"Question {n} of {who}?",
            completion=f"Answer {n}.",
            salt=sha256(f"{who} {n}".encode()).hexdigest()[:32],
        )
        for n in range(count)
    ]


def digest(what: str) -> str:
    return sha256(what.encode()).hexdigest()


def contribute(world: World) -> dict[str, list[DataRow]]:
    for net, words in (("handbook", "Staff handbook"), ("helpdesk", "Help desk")):
        world.add(
            "owner",
            "datanet.created",
            {
                "datanet": name(net), "name": words, "description": "", "licence": LICENCE,
                "reviewers": [actor("reviewer")],
            },
            label=net,
        )  # fmt: skip
    given = {}
    for who, net, title, count, _ in GIVEN:
        given[who] = rows_of(who, count)
        mine = {"contribution": name(who), "datanet": name(net)}
        commitment = {
            "licence": LICENCE, "rows_root": rows_root(given[who]).hex(), "rows_count": count,
            "rows_sha256": digest(who), "title": title,
        }  # fmt: skip
        world.add(who, "contribution.recorded", {**mine, **commitment}, label=f"recorded {who}")
        world.add("reviewer", "contribution.approved", {**mine, "note": ""}, label=f"ok {who}")
    return given


def train(world: World, given: Mapping[str, list[DataRow]]) -> None:
    listed = [
        {"contribution": name(who), "row": n, "row_hash": row.hash.hex()}
        for who, rows in given.items()
        for n, row in enumerate(rows)
    ]
    manifest = canonical_json(
        {
            "v": 1, "rows": listed, "base_sha256": BASE, "adapter_sha256": ADAPTER,
            "config_sha256": CONFIG, "steps": 96,
        }
    )  # fmt: skip
    world.blobs.put(manifest)
    run = {"run": name("run")}
    world.add(
        "dev",
        "run.requested",
        {
            **run, "name": "HR answers", "datanets": [name("handbook"), name("helpdesk")],
            "base_model": BASE, "base_id": "tributary-base", "config": {"rank": 8, "epochs": 8},
        },
    )  # fmt: skip
    world.add(
        "worker",
        "run.completed",
        {
            **run, "attempt": 1, "manifest_sha256": sha256(manifest).hexdigest(),
            "adapter_sha256": ADAPTER, "adapter_config_sha256": CONFIG, "index_sha256": INDEX,
            "index_root": digest("index"), "rows_count": len(listed),
            "contributions_count": len(given), "steps": 96, "loss": "0.214",
        },
    )  # fmt: skip
    world.add(
        "dev",
        "adapter.published",
        {
            "adapter": name("adapter"), **run, "model": "acme/hr-desk",
            "adapter_sha256": ADAPTER, "base_model": BASE,
            "input_wei_per_token": str(2 * 10**14), "output_wei_per_token": str(5 * 10**14),
        },
    )  # fmt: skip


def answer(world: World) -> None:
    asked = {"inference": name("answer"), "adapter": name("adapter")}
    fee = 61 * 2 * 10**14 + 148 * 5 * 10**14
    protocol, owner, operator = (fee * bps // 10_000 for bps in (500, 2_500, 2_000))
    world.add(
        "operator",
        "inference.recorded",
        {
            **asked, "consumer": actor("consumer"), "prompt_commitment": digest("p"),
            "output_commitment": digest("o"), "transcript_sha256": digest("t"),
            "prompt_tokens": 61, "completion_tokens": 148, "max_tokens": 256, "seed": 7,
            "temperature_ppm": 0, "top_p_ppm": 1_000_000, "finish_reason": "stop",
            "fee_wei": str(fee),
        },
    )  # fmt: skip
    world.add(
        "operator",
        "fee.charged",
        {
            "account": actor("consumer"), **asked, "policy_version": 1, "amount_wei": str(fee),
            "protocol_wei": str(protocol), "owner": actor("dev"), "owner_wei": str(owner),
            "operator_wei": str(operator),
            "contributors_wei": str(fee - protocol - owner - operator),
        },
    )  # fmt: skip
    shares = [{"contributor": actor(who), "ppm": ppm} for who, *_, ppm in GIVEN]
    world.add(
        "worker",
        "attribution.recorded",
        {
            **asked, "run": name("run"), "method": "ekfac-influence/v1", "index_sha256": INDEX,
            "evidence_sha256": digest("evidence"), "shares": shares,
            "unattributed_ppm": 1_000_000 - sum(ppm for *_, ppm in GIVEN),
        },
    )  # fmt: skip


def honest(folder: Path) -> tuple[bytes, str, list[str]]:
    """The bundle, the log's key, and the witnesses' keys."""
    world = World(folder, origin=ORIGIN)
    policy = {
        "version": 1, "protocol_bps": 500, "owner_bps": 2_500, "operator_bps": 2_000,
        "contributors_bps": 5_000,
    }  # fmt: skip
    world.add("operator", "fee_policy.set", policy)
    train(world, contribute(world))
    answer(world)
    value = json.loads(whole_bundle(world, "attribution.recorded"))
    head = world.checkpoint()
    note = head.note.decode()
    value["l1"] = {
        "checkpoint": note, "consistency": [], "section": l1_section(head.size, head.root),
    }  # fmt: skip
    vkeys = []
    for who in WITNESSES:
        key = SigningKey(sha256(who.encode()).digest())
        line = cosign_text(parse_note(head.note).text, who, key, SEEN_AT_S)
        note += f"— {line.name} {encode_base64(line.key_id + line.signature)}\n"
        vkeys.append(format_vkey(vkey_of(who, key, COSIGNATURE)))
    value["checkpoint"] = note
    return canonical_json(value), world.vkey, vkeys


def tampered(data: bytes) -> bytes:
    """Tony writes himself half of the answer, and mends what adds up."""
    import base64

    value = json.loads(data)
    last = value["entries"][-1]
    entry = base64.b64decode(last["entry"])
    event: dict[str, Any] = parse_canonical(entry[16:])
    first, final = event["body"]["shares"][0], event["body"]["shares"][-1]
    final["ppm"], first["ppm"] = final["ppm"] + 300_000, first["ppm"] - 300_000
    last["entry"] = encode_base64(entry[:16] + canonical_json(event))
    return canonical_json(value)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        data, vkey, witnesses = honest(Path(folder))
        for label, state, given in (
            ("good", "verified", data),
            ("tampered", "failed", tampered(data)),
        ):
            context = browser.new_context(viewport={"width": WIDTH, "height": 900})
            verifier = open_verifier(context)
            verifier.trust(vkey=vkey, witnesses="\n".join(witnesses))
            verifier.page.locator("#trust").evaluate("(fold) => { fold.open = false }")
            verifier.give(given, "answer.lineage.json")
            assert verifier.state() == state
            verifier.page.wait_for_timeout(100)
            target = IMAGES / f"verifier-{label}.png"
            picture = verifier.page.locator(".picture").bounding_box()
            assert picture
            height = picture["y"] + picture["height"] + 16  # from the top to the end of the graph
            area: FloatRect = {"x": 0, "y": 0, "width": WIDTH, "height": height}
            png = small_png(browser, verifier.page.screenshot(full_page=True, clip=area))
            target.write_bytes(png)
            size = len(png)
            assert size < MAX_BYTES, f"{target} has {size} bytes"
            print(f"{target.relative_to(IMAGES.parents[1])}  {size} bytes")


if __name__ == "__main__":
    main()
