"""Find and start Chromium: Debian's, Google's, or the one Playwright installed.

`python -m tests.browser.chromium` says which one; status 1 where there is none.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright
from playwright.sync_api import Error as BrowserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What a browser does on its own account stays off: the tests count every request.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-lcd-text",
)


def installed() -> str | None:
    """CHROMIUM, or a browser on PATH; None leaves it to Playwright."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser, ended with us, on a profile of its own; skips the test where there is none."""
    with sync_playwright() as playwright:
        given, found = os.environ.get("CHROMIUM"), installed()
        try:
            browser = playwright.chromium.launch(
                executable_path=found, headless=True, args=list(ARGUMENTS)
            )
        except BrowserError as error:
            if given:
                raise
            pytest.skip(
                "no Chromium: set CHROMIUM, install one (apt-get install chromium), or run "
                f"`playwright install chromium` ({str(error).splitlines()[0]})"
            )
        try:
            yield browser
        finally:
            browser.close()


def main() -> int:
    found = installed()
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    print(found or (own if os.path.exists(own) else "no Chromium"))
    return 0 if found or os.path.exists(own) else 1


if __name__ == "__main__":
    sys.exit(main())
