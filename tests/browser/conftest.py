"""One browser for the session; each test has a context, that is a profile, of its own."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext

from tests.browser.chromium import chromium
from tests.browser.verifier_world import Core, Verifier, open_core, open_verifier


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1240, "height": 900})
    context.set_default_timeout(10_000)
    yield context
    context.close()


@pytest.fixture
def verifier(context: BrowserContext) -> Verifier:
    """The committed page, from the disk."""
    return open_verifier(context)


@pytest.fixture(scope="session")
def core(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Core:
    return open_core(browser, tmp_path_factory.mktemp("core"))
