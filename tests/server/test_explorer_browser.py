"""The explorer in a real browser: what scripts add, no errors, no requests to other hosts, pages that fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_explorer import HOSTILE, complete, write_hostile, write_zoo
from tests.support.server_process import ServerProcess

sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

PAGES = (
    "/",
    "/datasets/zoo",
    "/datasets/zoo/rows",
    "/datasets/zoo/rows?view=grid",
    "/datasets/zoo/rows/3",
    "/datasets/zoo/splits?test=0.2&val=0.1",
    "/feed",
    "/datasets/hostile",
    "/datasets/hostile/rows",
    "/datasets/hostile/rows/3",
    "/datasets/nothing",
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("data")
    write_zoo(folder / "zoo.h5")
    write_hostile(folder / "hostile.h5")
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    import httpx

    with httpx.Client(base_url=server.url, timeout=60) as http:
        for path in ("/datasets/zoo", "/datasets/hostile"):
            complete(http, path)
    yield server.url
    assert server.stop() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A page that fails the test where anything is wrong: an error in the console, or a request to another host."""
    context = browser.new_context(base_url=url)
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))

    def refuse(dialog: Any) -> None:
        wrong.append(dialog.message)
        dialog.dismiss()

    opened.on("dialog", refuse)
    opened.on("request", lambda one: wrong.append(one.url) if not one.url.startswith((url, "data:")) else None)
    yield opened
    context.close()
    assert not [one for one in wrong if "404" not in one], wrong


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit(page: Any, width: int) -> None:
    """No page is wider than the screen, on a phone either: what is wide scrolls by itself."""
    page.set_viewport_size({"width": width, "height": 900})
    for path in PAGES:
        page.goto(path)
        page.wait_for_load_state("networkidle")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, (path, wide)
        broken = page.evaluate("[...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src)")
        assert not broken, path


def test_scripts_make_it_pleasant(page: Any) -> None:
    """The theme is kept, snippets are copied, and splits are counted while they are typed."""
    page.goto("/datasets/zoo/splits")
    page.get_by_label("Test").fill("60")
    page.get_by_role("row", name="test 60").wait_for()
    assert "test=60" in page.url
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert "test=60" in page.evaluate("navigator.clipboard.readText()")
    toggle = page.get_by_role("button", name="Theme")
    toggle.click()
    toggle.click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.goto("/datasets/zoo/rows/3")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/rows/4")


def test_a_snippet_that_was_copied_runs(page: Any, url: str) -> None:
    """And gives the rows that the page shows."""
    page.goto("/datasets/zoo/rows?split=test&test=0.2&offset=10&limit=5")
    shown = [int(one) for one in page.locator("th.id a").all_inner_texts()]
    code = page.locator("section.code code").first.inner_text()
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["batch"].rows.tolist() == shown and len(shown) == 5
    found["feed"].close()


def test_without_scripts(browser: Any, url: str) -> None:
    """Links and forms do everything."""
    context = browser.new_context(base_url=url, java_script_enabled=False)
    page = context.new_page()
    page.goto("/")
    page.get_by_placeholder("Search").fill("zo")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name="zoo").click()
    page.get_by_role("link", name="Rows", exact=True).click()
    page.get_by_placeholder("Search text").fill("blue")
    page.get_by_role("button", name="Show", exact=True).click()
    assert "1–50 of 80" in page.inner_text("main")
    page.get_by_role("link", name="Next").click()
    assert "51–80 of 80" in page.inner_text("main")
    page.get_by_role("link", name="Sort by price, descending").click()
    page.locator("th.id a").first.click()
    assert "1 of 80" in page.inner_text("main")
    page.get_by_role("link", name="Splits").click()
    page.get_by_label("Test").fill("0.25")
    page.get_by_role("button", name="Divide").click()
    assert "no row lies in two splits" in page.inner_text("main")
    context.close()


def test_nothing_of_a_file_is_run(page: Any) -> None:
    """The `page` fixture fails where a script of a name opens a dialog."""
    assert HOSTILE[0] == "<script>alert(1)</script>"
    for path in ("/", "/datasets/hostile", "/datasets/hostile/rows", "/datasets/hostile/rows/3"):
        page.goto(path)
        page.wait_for_load_state("networkidle")
