"""The live page of serving in a real Chromium, beside a real engine that answers real requests: its
numbers move, it runs nothing that its policy does not name, and without a script it is whole."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from openai import OpenAI
from playwright.sync_api import Browser, BrowserContext, Page, expect
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.api_world import MODEL, LocalEngine, Service, service

ANSWER_TOKENS = 60
ASK_S = 30.0


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("serving")
    with service(pg_url_module, home, LocalEngine()) as running:
        running.tell(home / "adapters")
        running.deposit("eve", 10**15)
        yield running


def number(page: Page, name: str) -> float:
    text = page.locator(f'[data-text="{name}"]').first.text_content() or ""
    return float(text.replace(",", ""))


def opened(context: BrowserContext, url: str) -> tuple[Page, list[str]]:
    page, wrong = context.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(f"{url}/serving")
    return page, wrong


@contextmanager
def asking(api: Service, clients: int = 3) -> Iterator[list[str]]:
    """Clients that ask one answer after another; what they heard."""
    answers: list[str] = []
    stop = threading.Event()
    token = api.token("eve")

    def ask() -> None:
        client = OpenAI(base_url=f"{api.url}/v1", api_key=token, timeout=ASK_S)
        while not stop.is_set():
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hello there"}],
                max_tokens=ANSWER_TOKENS,
            )
            answers.append(answer.choices[0].message.content or "")

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(ASK_S)


def test_numbers_move_while_an_engine_answers(api: Service, context: BrowserContext) -> None:
    page, wrong = opened(context, api.url)
    expect(page.locator("#status")).to_have_text("Live")
    assert number(page, "tokens") == 0
    expect(page.locator(".adapters .empty")).to_be_visible()
    with asking(api) as answers:
        expect(page.locator(".adapters tbody")).to_contain_text(MODEL)
        page.wait_for_function(
            "seen => Number(document.querySelector('[data-text=tokens]')"
            ".textContent.replaceAll(',', '')) > seen",
            arg=3 * ANSWER_TOKENS,
        )
        page.wait_for_function(
            "() => Number(document.querySelector('[data-text=rate]').textContent) > 0"
        )
        page.wait_for_function(
            "() => Number(document.querySelector('[data-text=running]').textContent) > 0"
        )
        assert answers
    expect(page.locator(".adapters .empty")).to_be_hidden()
    expect(page.locator('[data-text="ttft_p50"]')).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    expect(page.locator(".replicas tbody tr:not(.empty)")).to_have_count(1)
    expect(page.locator(".replicas")).to_contain_text("ready")
    points = page.locator('polyline[data-points="rate"]').get_attribute("points") or ""
    assert len(points.split()) > 2
    heights = {point.split(",")[1] for point in points.split()}
    assert len(heights) > 1, "the line goes up and down"
    stats = api.client("eve").get("/v1/serving")
    expect(page.locator('[data-text="tokens"]').first).to_have_text(
        f"{stats['metrics']['tokens']:,}"
    )
    assert wrong == []


def test_a_page_nobody_sees_leaves_its_place(api: Service, context: BrowserContext) -> None:
    page, _ = opened(context, api.url)
    expect(page.locator("#status")).to_have_text("Live")
    assert viewers(api) >= 1
    page.close()
    deadline = time.monotonic() + 10
    while viewers(api) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert viewers(api) == 0


def viewers(api: Service) -> float:
    return scraped(api)["tributary_serving_viewers"][0].value


def scraped(api: Service) -> dict[str, list[Sample]]:
    with api.http() as http:
        answer = http.get("/metrics")
    assert answer.status_code == 200
    return {f.name: f.samples for f in text_string_to_metric_families(answer.text)}


def test_without_a_script_it_is_a_snapshot(api: Service, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False, color_scheme="dark")
    page, wrong = opened(context, api.url)
    expect(page.locator("#status")).to_have_text("Snapshot")
    expect(page.locator(".note")).to_be_visible()
    assert number(page, "max_rows") == 16
    assert number(page, "store_registered") == 1
    expect(page.locator(".replicas tbody tr:not(.empty)")).to_have_count(1)
    dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(14, 21, 20)"
    context.close()
    assert wrong == []


def test_prometheus_reads_the_same(api: Service) -> None:
    with api.http() as http:
        page = http.get("/serving")
    found = scraped(api)
    [up] = found["tributary_serving_up"]
    assert (up.labels, up.value) == ({"replica": "local"}, 1.0)
    stats = api.client("eve").get("/v1/serving")
    [tokens] = found["tributary_serving_generation_tokens"]
    assert tokens.value == stats["metrics"]["tokens"]
    waits = found["tributary_serving_time_to_first_token_seconds"]
    firsts = sum(stats["metrics"]["histograms"]["ttft_s"]["counts"])
    assert {s.value for s in waits if s.labels.get("le") == "+Inf"} == {firsts}
    policy = page.headers["content-security-policy"]
    assert "script-src 'sha256-" in policy
    assert page.headers["cache-control"] == "no-store"
