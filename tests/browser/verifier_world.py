"""The verifier's page driven by hand, and bundles to give it: honest, lying and broken ones."""

import base64
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from playwright.sync_api import Browser, BrowserContext, Page, Request

from ledger.console.pages import VERIFIER
from ledger.domain.canonical import canonical_json
from ledger.errors import VerificationError
from ledger.log.prover import Prover
from ledger.verify import bundle as bundle_module
from ledger.verify.bundle import verify_bundle
from ledger.verify.bundle_format import Bundle, BundledEntry, format_bundle
from tests.unit.lineage_world import World

BUNDLES = Path(__file__).parents[1] / "vectors" / "bundles"
PAGE_URL = VERIFIER.resolve().as_uri()
VERDICT_TIMEOUT_MS = 20_000
OWN_KEY = ("or pass it with --key.", "or enter it under What you already trust.")

_WATCH = """
globalThis.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.effectiveDirective));
"""


@dataclass(kw_only=True)
class Verifier:
    """The page, open. `requests` holds every one that it made, itself included."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    trusted: tuple[str, str, bool] = ("", "", False)

    def give(self, data: bytes, name: str = "test.lineage.json") -> None:
        """Through the file picker."""
        self.page.set_input_files(
            "#file", {"name": name, "mimeType": "application/json", "buffer": data}
        )

    def state(self) -> str:
        """`verified`, `failed` or `problem`, once it is there."""
        root = self.page.locator("html[data-state]")
        root.wait_for(state="attached", timeout=VERDICT_TIMEOUT_MS)
        return str(root.get_attribute("data-state"))

    def verdict(self) -> dict[str, Any]:
        self.state()
        text = self.page.locator("#json pre").text_content(timeout=1_000)
        found: dict[str, Any] = json.loads(text or "")
        return found

    def verify(self, data: bytes, **trust: Any) -> dict[str, Any]:
        """What the page says, as JSON, to a reader who trusts this."""
        self.trust(**trust)
        self.give(data)
        return self.verdict()

    def trust(self, *, vkey: str = "", witnesses: str = "", require_l1: bool = False) -> None:
        if self.trusted == (vkey, witnesses, require_l1):
            return
        self.trusted = (vkey, witnesses, require_l1)
        self.page.locator("#trust").evaluate("(fold) => { fold.open = true }")
        self.page.fill("#vkey", vkey)
        self.page.fill("#witnesses", witnesses)
        self.page.set_checked("#l1", require_l1)
        self.page.locator("#l1").dispatch_event("change")

    @property
    def violations(self) -> list[str]:
        """Directives of the page's policy that something broke."""
        return list(self.page.evaluate("violations"))


def open_verifier(
    context: BrowserContext, url: str = PAGE_URL, script: str | None = None
) -> Verifier:
    page = context.new_page()
    verifier = Verifier(page=page)

    def note(request: Request) -> None:
        verifier.requests.append(request.url)

    page.on("request", note)
    page.on("console", lambda message: verifier.messages.append(message.text))
    page.on("pageerror", lambda error: verifier.messages.append(str(error)))
    page.add_init_script(_WATCH)
    if script:
        page.add_init_script(script)
    page.goto(url)
    return verifier


@dataclass(kw_only=True)
class Core:
    """The core of the committed page without its face, for many bundles in little time."""

    page: Page

    def call(self, expression: str, argument: object = None) -> Any:
        return self.page.evaluate(expression, argument)

    def verify(self, bundles: Sequence[bytes]) -> list[dict[str, Any]]:
        encoded = [base64.b64encode(data).decode() for data in bundles]
        found: list[dict[str, Any]] = self.call(
            """async (all) => {
              const verdicts = [];
              for (const text of all) {
                const data = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                try {
                  verdicts.push((await core.verifyBundle(data)).verdict);
                } catch (error) {
                  verdicts.push({ crashed: String(error.stack) });
                }
              }
              return verdicts;
            }""",
            encoded,
        )
        return found


def open_core(browser: Browser, folder: Path) -> Core:
    """The page's own script, as committed, with its inner functions handed out at the end. The
    policy would refuse the changed script, so this copy goes without."""
    html = VERIFIER.read_text("utf-8")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    names = "verifyBundle, verifyEd25519, verifyByEquation, parsePolicy, FIELDS, REFERENCES, ONCE"
    head, end, tail = html.rpartition("})();\n</script>")
    assert end, "the script does not end as the build writes it"
    copy = folder / "core.html"
    copy.write_text(f"{head}globalThis.core = {{ {names} }};\n{end}{tail}", "utf-8")
    page = browser.new_page()
    page.goto(copy.as_uri())
    return Core(page=page)


def python_says(data: bytes, **trust: Any) -> dict[str, Any]:
    """Python's verdict, in the page's words: `failed_step` is that after the last one taken."""
    taken: list[object] = []
    step, skip = bundle_module._step, bundle_module._skip

    def counted(make: Any) -> Any:
        def call(*arguments: Any) -> Any:
            taken.append(arguments)
            return make(*arguments)

        return call

    with (
        mock.patch.object(bundle_module, "_step", counted(step)),
        mock.patch.object(bundle_module, "_skip", counted(skip)),
    ):
        try:
            verdict = verify_bundle(data, **trust).to_json()
        except VerificationError as error:
            where = {name: error.detail.get(name) for name in ("field", "entry")}
            return {
                "verified": False, "error": error.slug, "detail": where,
                "failed_step": len(taken) + 1,
            }  # fmt: skip
    verdict["trusted"] = [line.replace(*OWN_KEY) for line in verdict["trusted"]]
    return verdict


def comparable(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """What both verifiers must say alike: all of a good verdict, and of a bad one what failed
    where. The sentence about it may differ."""
    if verdict.get("verified"):
        return dict(verdict)
    return {name: verdict.get(name) for name in ("verified", "error", "detail", "failed_step")}


# --- bundles ----------------------------------------------------------------------------------


def whole_bundle(world: World, subject: str) -> bytes:
    """Every entry of a log in one bundle, whatever they say: the assembler is not asked."""
    head = world.checkpoint()
    prover = Prover(world.tiles)
    entries = world.log.entries(0, head.size)
    return format_bundle(
        Bundle(
            log=world.origin,
            vkey=world.vkey,
            subject=world.ids[subject],
            checkpoint=head.note,
            entries=tuple(
                BundledEntry(index=n, entry=entry, proof=tuple(prover.inclusion(n, head.size)))
                for n, entry in enumerate(entries)
            ),
            blobs=dict(world.blobs.blobs),
        )
    )


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The bundle with one thing changed: half of them bytes of the file, half a value in its JSON,
    written canonically again so that what lies behind the parser is reached."""
    chance = random.Random(seed)
    for n in range(count):
        if n % 2:
            altered = bytearray(data)
            altered[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            yield bytes(altered)
            continue
        value = deepcopy(json.loads(data))
        _mutate(value, chance)
        yield canonical_json(value)


def _mutate(value: Any, chance: random.Random) -> None:
    """Change one leaf, or take one member away, or double one item."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        child = value[key]
        deeper = isinstance(child, dict | list) and child and chance.random() < 0.93
        if not deeper:
            break
        value = child
    kind = chance.random()
    if kind < 0.12:
        del value[key]
    elif kind < 0.2 and isinstance(value, list):
        value.insert(key, child)
    else:
        value[key] = _other(child, chance)


def _other(value: Any, chance: random.Random) -> Any:
    if chance.random() < 0.1:
        return chance.choice([None, True, "", [], {}, 0, -1, 2**53 - 1, "\u202e\u0000", "é" * 9])
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return 7
    if isinstance(value, int):
        return value + chance.choice([-1, 1])
    at = chance.randrange(len(value) + 1)
    return value[:at] + chance.choice("0a9fA+/= é") + value[at + chance.randrange(2) :]
