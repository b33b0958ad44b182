"""The explorer as people use it: look, filter, divide, and train on exactly the rows that a page shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest
from playwright.sync_api import Page, expect

from tests.support.server_process import ServerProcess
from tests.support.zoo import HOSTILE, complete, write_hostile, write_zoo
from tests.system.visits import serious_findings

Visitor = Callable[..., Page]

NUMBERED = 300
ROOT = Path(__file__).parents[2]
CODE_SECONDS = 300

KINDS_OF_PAGES = (
    "/",
    "/?q=nothing+of+this+name",
    "/datasets/zoo",
    "/datasets/zoo/rows",
    "/datasets/zoo/rows?view=grid",
    "/datasets/zoo/rows?where=price+>+1&sort=price&order=desc",
    "/datasets/zoo/rows/3",
    "/datasets/zoo/splits",
    "/datasets/zoo/splits?test=0.2&val=0.1",
    "/datasets/zoo/splits?test=7.5",
    "/datasets/zoo/tree",
    "/datasets/zoo/tree?path=%2Flabels",
    "/datasets/deep/tree?open=%2Fentry&open=%2Fentry%2Finstrument",
    "/feed",
    "/datasets/nothing",
    "/datasets/hostile",
    "/datasets/hostile/rows",
    "/datasets/hostile/rows/3",
    "/datasets/hostile/tree",
)


def _write_numbered(path: Path) -> None:
    """Rows whose input is their own id, so that it can be told which ones a model was trained on."""
    with h5py.File(path, "w") as file:
        file["x"] = np.stack([np.arange(NUMBERED), np.zeros(NUMBERED)], 1).astype("f4")
        labels = file.create_dataset("y", data=np.arange(NUMBERED) % 3)
        labels.attrs["class_names"] = ["ant", "bee", "crab"]
        file["width"] = np.random.default_rng(0).normal(200, 40, NUMBERED).round(2)


def _write_deep(path: Path) -> None:
    """Groups in groups, and much that is no field."""
    with h5py.File(path, "w") as file:
        file["entry/data"], file["entry/instrument/detector/gain"] = np.zeros((20, 3)), 2.5
        file["entry/instrument/name"], file["same"] = "camera", file["entry"]
        file["soft"], file["lost"] = h5py.SoftLink("/entry/data"), h5py.SoftLink("/nowhere")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explored")
    write_zoo(folder / "zoo.h5")
    write_hostile(folder / "hostile.h5")
    _write_numbered(folder / "numbered.h5")
    _write_deep(folder / "deep.h5")
    (folder / "broken.h5").write_bytes(b"no HDF5")
    return folder


@pytest.fixture(scope="module")
def url(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has computed everything that pages show."""
    server = ServerProcess(data, tmp_path_factory.mktemp("cache"))
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for path in ("/", "/datasets/zoo", "/datasets/hostile", "/datasets/numbered"):
            complete(http, path)
    yield server.url
    assert server.stop() == 0


def _row_ids(page: Page) -> list[int]:
    return [int(text.replace(",", "")) for text in page.locator("th.id a").all_inner_texts()]


def _copied(page: Page) -> str:
    """The first snippet of the page, from the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("section.code button.copy").first.click()
    expect(page.locator("section.code button.copy").first).to_have_text("Copied")
    return str(page.evaluate("navigator.clipboard.readText()"))


def _run(code: str, *more: str) -> Any:
    """Run a snippet as it is, in a Python of its own; returns the JSON that the lines after it print."""
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([code, "import json", *more])],
        env=environment, capture_output=True, text=True, timeout=CODE_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _selected(url: str, query: str) -> list[int]:
    """Ids of all rows that pages of rows show."""
    with httpx.Client(base_url=url, timeout=60) as http:
        rows: list[int] = []
        while True:
            page = complete(http, f"/datasets/numbered/rows?{query}&limit=200&offset={len(rows)}")
            rows += [one["row"] for one in page["items"]]
            if len(rows) >= page["selected"]:
                return rows


def test_from_the_catalogue_to_code(visit: Visitor, url: str, data: Path) -> None:
    """Search, open, click a bar, page, sort, open a row: the pages show the file's rows, and so does their code."""
    page = visit(url)
    page.get_by_placeholder("Search").fill("zo")
    page.get_by_role("button", name="Search").click()
    expect(page.locator(".cards h2")).to_have_text(["zoo"])
    page.get_by_role("link", name="zoo", exact=True).click()
    expect(page.get_by_role("heading", name="A zoo")).to_be_visible()
    page.get_by_role("link", name="Rows", exact=True).click()
    bar = page.get_by_role("group", name="Histogram of price").get_by_role("link").nth(3)
    counted = re.search(r": ([\d,]+) \(", bar.get_attribute("aria-label") or "")
    bar.click()
    expect(page.locator(".filters .chip")).to_have_count(2)
    conditions = [text.removesuffix(" ×") for text in page.locator(".filters .chip").all_inner_texts()]
    bounds = {condition.split()[1]: float(condition.split()[2]) for condition in conditions}
    with h5py.File(data / "zoo.h5") as file:
        price = file["price"][:]
    wanted = np.flatnonzero((price >= bounds[">="]) & (price < bounds["<"])).tolist()
    assert counted is not None and int(counted[1]) == len(wanted)
    assert _row_ids(page) == wanted
    assert _run(_copied(page), "print(json.dumps(batch.rows.tolist()))") == wanted
    page.get_by_role("link", name="Sort by price, descending").click()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("price")
    ordered = sorted(wanted, key=lambda row: -price[row])
    assert _row_ids(page) == ordered
    assert _run(_copied(page), "print(json.dumps(batch.rows.tolist()))") == ordered
    page.locator("th.id a").nth(1).click()
    expect(page.locator("h1")).to_have_text(f"Row {ordered[1]}")
    expect(page.locator("main")).to_contain_text(f"2nd of {len(ordered)} rows")
    page.keyboard.press("ArrowRight")
    expect(page.locator("h1")).to_have_text(f"Row {ordered[2]}")
    assert _run(_copied(page), "print(json.dumps(batch.rows.tolist()))") == [ordered[2]]
    page.get_by_role("link", name="Back to the rows").click()
    assert _row_ids(page) == ordered


def test_pages_of_a_split_and_code(visit: Visitor, url: str) -> None:
    """The second page of a filtered split: its code takes these rows from the split."""
    page = visit(f"{url}/datasets/numbered/rows?split=train&test=0.2&limit=50")
    page.get_by_label("Condition").fill("y in ant, bee")
    page.get_by_role("button", name="Show", exact=True).click()
    page.get_by_role("link", name="Next").click()
    expect(page.locator(".pager .place")).to_have_text("51–100 of 160")
    code = _copied(page)
    assert "ds.split_rows('train'" in code and "where=['y in ant, bee']" in code
    shown = _row_ids(page)
    assert len(shown) == 50 and all(row % 3 < 2 for row in shown)
    assert _run(code, "print(json.dumps(batch.rows.tolist()))") == shown


def test_a_split_is_built_and_trained_on(visit: Visitor, url: str) -> None:
    """Counts change while one types; the copied code trains on exactly the rows that the split's page shows."""
    page = visit(f"{url}/datasets/numbered/splits")
    page.get_by_label("Test").fill("60")
    expect(page.get_by_role("row", name="test 60")).to_be_visible()
    page.get_by_label("Filter").first.fill("width >= 200")
    expect(page.locator("#result")).to_contain_text("No row is in more than one split")
    expect(page.locator("section.code code").first).to_contain_text("width >= 200")
    code = _copied(page)
    assert "test=60" in code
    page.get_by_role("row", name=re.compile("^train ")).get_by_role("link").click()
    expect(page.locator(".filters")).to_contain_text("width >= 200")
    shown = _selected(url, page.url.partition("?")[2])
    assert set(_row_ids(page)) <= set(shown) and 80 < len(shown) < 240
    trained = _run(
        code,
        "from tests.support.recording_model import witnessed",
        "model, rows = witnessed()",
        "model.fit(train, epochs=1, verbose=0)",
        "print(json.dumps(rows))",
    )
    assert sorted(trained) == shown and trained != shown
    held_out = _run(code, "print(json.dumps(test.row_ids.tolist()))")
    assert not set(held_out) & set(shown)


def test_the_tree(visit: Visitor, url: str) -> None:
    """Groups open in place; what is no field is there; the code gets what the page shows."""
    page = visit(f"{url}/datasets/deep/tree")
    page.get_by_role("link", name="Open entry").click()
    page.get_by_role("link", name="Open instrument").click()
    expect(page.get_by_role("link", name="detector", exact=True)).to_be_visible()
    expect(page.locator(".tree")).to_contain_text("soft link to /nowhere")
    page.get_by_role("link", name="data", exact=True).click()
    expect(page.locator("main")).to_contain_text("20 × 3")
    shape = _run(_copied(page), "print(json.dumps(tree['node']['array']['shape']))")
    assert shape == [20, 3]
    page.get_by_label("Path").get_by_role("link", name="entry").click()
    expect(page.get_by_role("link", name="Open instrument")).to_be_visible()


def test_without_scripts(visit: Visitor, url: str) -> None:
    """Links and forms do everything."""
    page = visit(url, javascript=False)
    page.get_by_placeholder("Search").fill("zo")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name="zoo", exact=True).click()
    page.get_by_role("link", name="Rows", exact=True).click()
    page.get_by_placeholder("Search text").fill("blue")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator(".pager .place")).to_have_text("1–50 of 80")
    page.get_by_role("link", name="Next").click()
    expect(page.locator(".pager .place")).to_have_text("51–80 of 80")
    page.get_by_role("link", name="Sort by price, descending").click()
    page.get_by_role("group", name="classes of labels").get_by_role("link").first.click()
    expect(page.locator(".filters")).to_contain_text("labels = cat")
    page.locator("th.id a").first.click()
    expect(page.locator("main")).to_contain_text("1st of 80 rows")
    page.get_by_role("link", name="Splits").click()
    page.get_by_label("Test").fill("0.25")
    page.get_by_role("button", name="Split", exact=True).click()
    expect(page.locator("main")).to_contain_text("No row is in more than one split")
    page.get_by_role("link", name="Tree").click()
    page.get_by_role("link", name="labels", exact=True).click()
    expect(page.locator("main")).to_contain_text("class_names")


def test_the_theme_is_kept(visit: Visitor, url: str) -> None:
    """On the next page, too."""
    page = visit(f"{url}/datasets/zoo")
    toggle = page.get_by_role("button", name="Theme")
    toggle.click()
    toggle.click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("link", name="Tree").click()
    expect(page.get_by_role("heading", name="Members")).to_be_visible()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_every_kind_of_page(visit: Visitor, url: str, width: int, dark: bool) -> None:
    """It fits the screen, its pictures load, nothing of a file is run, and axe-core finds nothing serious."""
    page = visit(url, width=width, dark=dark, may_fail=("400", "404"))
    assert HOSTILE[0] == "<script>alert(1)</script>"
    found: list[str] = []
    for path in KINDS_OF_PAGES:
        page.goto(f"{url}{path}")
        page.wait_for_load_state("networkidle")
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            found.append(f"{path}: {wide} pixels wide")
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        found += [f"{path}: no picture at {one}" for one in broken]
        found += [f"{path}: {one}" for one in serious_findings(page)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_signing_in(visit: Visitor, serve: Callable[..., ServerProcess], folder: Path, dark: bool) -> None:
    """The form can be read by everybody, and leads to the page that was asked for."""
    server = serve(folder, H5FEED_TOKENS="a-token-of-some-length")
    page = visit(f"{server.url}/datasets/mixed/rows", width=390, dark=dark, may_fail=("401",))
    page.get_by_label("Token").fill("another one")
    page.get_by_role("button", name="Sign in").click()
    assert serious_findings(page) == []
    page.get_by_label("Token").fill("a-token-of-some-length")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("region", name="Table of rows")).to_be_visible()
    assert page.url == f"{server.url}/datasets/mixed/rows"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
