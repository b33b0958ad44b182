"""Pages behind the nginx of docs/how-to/deploy.md, below a prefix, as people use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import h5py
import numpy as np
import pytest
from playwright.sync_api import Page, expect

from tests.support.server_process import ServerProcess
from tests.support.zoo import write_zoo
from tests.system.programs import below_h5feed, free_port, running
from tests.system.visits import crawled

Visitor = Callable[..., Page]

TOKEN = "a-token-of-a-test"
PREFIX = "/h5feed/"


@pytest.fixture(scope="module", params=["open", "guarded"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of nginx before a server without a token, and before one with one."""
    data: Path = tmp_path_factory.mktemp("data")
    write_zoo(data / "zoo.h5")
    with h5py.File(data / "deep.h5", "w") as file:
        file["entry/data"], file["entry/labels"] = np.zeros((20, 3)), np.arange(20) % 2
    (data / "broken.h5").write_bytes(b"no HDF5")
    more = {"H5FEED_TOKENS": TOKEN} if request.param == "guarded" else {}
    server = ServerProcess(data, tmp_path_factory.mktemp("cache"), H5FEED_TRUSTED_PROXIES="127.0.0.1", **more)
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    with running(below_h5feed(folder, server.port, port), folder, port):
        yield f"http://127.0.0.1:{port}/h5feed"
    assert server.stop() == 0


def _signed_in(visit: Visitor, url: str, asked: list[str]) -> tuple[Page, bool]:
    """The first page, after the form for a token if there is one; and whether there was. Requests are noted."""
    # The browser asks for an icon of the host where what it shows is no page, such as the OpenAPI description.
    page = visit(f"{url}/", may_fail=("/favicon.ico",))
    page.context.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/")
    is_guarded = "/sign-in" in page.url
    if is_guarded:
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="zoo")).to_be_visible()
    assert page.url == f"{url}/"
    return page, is_guarded


def _are_below(asked: list[str]) -> None:
    assert asked
    outside = [one for one in asked if urlsplit(one).scheme not in ("data", "blob")]
    assert all(urlsplit(one).path.startswith(PREFIX) for one in outside), outside


def test_every_page(visit: Visitor, url: str) -> None:
    """All that links lead to is below the prefix, and so is what the pages load; pictures are there."""
    asked: list[str] = []
    page, is_guarded = _signed_in(visit, url, asked)
    found = crawled(page, url, 45)
    kinds = ("", "feed", "docs", "datasets/zoo", "datasets/zoo/rows", "datasets/zoo/splits", "datasets/zoo/tree")
    assert {f"{PREFIX}{path}" for path in kinds} <= found
    assert any(path.startswith(f"{PREFIX}datasets/zoo/rows/") for path in found)
    if is_guarded:
        page.goto(f"{url}/datasets/deep")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
        # Redoc keeps one of its own.
        assert not [cookie for cookie in page.context.cookies() if cookie.get("name", "").startswith("h5feed_")]
        page.goto(f"{url}/datasets/deep")
        assert urlsplit(page.url).path == f"{PREFIX}sign-in"
    _are_below(asked)


def test_forms_and_scripts(visit: Visitor, url: str) -> None:
    """Search, filters, splits and the theme: what forms send and scripts fetch is below the prefix."""
    asked: list[str] = []
    page, _ = _signed_in(visit, url, asked)
    page.get_by_placeholder("Search").fill("zo")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name="zoo", exact=True).click()
    page.get_by_role("link", name="Rows", exact=True).click()
    page.get_by_label("Condition").fill("labels = cat")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator(".pager .place")).to_have_text("1–50 of 80")
    page.locator("th.id a").first.click()
    page.keyboard.press("ArrowRight")
    expect(page.locator("main")).to_contain_text("2nd of 80 rows")
    page.get_by_role("link", name="Splits").click()
    page.get_by_label("Test").fill("60")
    expect(page.get_by_role("row", name="test 60")).to_be_visible()
    expect(page.locator("section.code code").first).to_contain_text(url)
    _are_below(asked)


def test_the_page_of_the_api(visit: Visitor, url: str) -> None:
    """An endpoint is tried, by the address of nginx; with tokens, after the token was given."""
    asked: list[str] = []
    page, is_guarded = _signed_in(visit, url, asked)
    page.get_by_role("link", name="API", exact=True).click()
    expect(page.get_by_text(f"pip install {url}/simple/h5feed/").first).to_be_visible()
    page.goto(f"{url}/docs#/datasets/get_dataset")
    # Otherwise only the end of the address has changed.
    page.reload()
    if is_guarded:
        page.locator(".auth-wrapper button.authorize").first.click()
        page.locator(".auth-container input").fill(TOKEN)
        page.locator(".auth-btn-wrapper button.authorize").click()
        page.locator(".auth-btn-wrapper button.btn-done").click()
    block = page.locator("[id^=operations-][id$=-get_dataset]")
    block.locator("select[aria-label=name]").select_option("zoo")
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table")
    expect(answer.locator("tbody .response-col_status").first).to_have_text("200")
    expect(answer).to_contain_text('"class_names"')
    expect(block.locator(".request-url")).to_contain_text(f"{url}/v1/datasets/zoo")
    page.goto(f"{url}/redoc")
    expect(page.get_by_text("/v1/datasets/{name}", exact=True).first).to_be_attached()
    _are_below(asked)
