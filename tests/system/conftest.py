"""Fixtures for tests in a real Chromium. If something is not installed, tests fail: run `make setup-system`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from tests.system.visits import TIMEOUT_MS, Visit

expect.set_options(timeout=TIMEOUT_MS)

_FLAGS = (
    "--no-sandbox",  # tests run as root in containers
    "--use-angle=swiftshader",  # WebGL without a graphics card
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # Requests to other hosts fail, even those that no test sees.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost, EXCLUDE *.localhost",
)


def launched(playwright: Playwright) -> Browser:
    """Start Debian's Chromium."""
    path = shutil.which("chromium")
    assert path is not None, "Chromium is not installed: run `make setup-system`"
    return playwright.chromium.launch(executable_path=path, args=list(_FLAGS))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser, started once per session."""
    with sync_playwright() as playwright:
        browser = launched(playwright)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages: ``visit(url, width=390, dark=True, javascript=False, headers={…}, may_fail=("404",))``.

    Each page has its own browser context. At the end of the test, the fixture checks that no page has sent a request to
    another host, or reported an error that contains none of `may_fail`.
    """
    visits: list[Visit] = []

    def begin(url: str, **options: object) -> Page:
        visits.append(Visit(chromium, url, **options))  # type: ignore[arg-type]
        return visits[-1].page

    yield begin
    for one in visits:
        one.page.context.close()
    for one in visits:
        one.check()
