"""A real Chromium, as a person uses it. Nothing is skipped: `make setup-system` brings what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.system.visits import Visit

_FLAGS = (
    "--no-sandbox",  # tests run as root in containers
    "--use-angle=swiftshader",  # WebGL without a graphics card
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # Whatever would leave the machine fails, even if nothing asserts that it did not try.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost, EXCLUDE *.localhost",
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser, started once."""
    path = shutil.which("chromium")
    assert path is not None, "there is no Chromium: run `make setup-system`"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages: ``visit(url, width=390, dark=True, javascript=False, headers={…}, may_fail=("404",))``.

    Each has a context of its own. When the test ends, no page may have sent a request to another host than its own,
    or have reported an error, unless the error's text contains one of `may_fail`.
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
