"""The page of a file as it is: what the API says of its objects, in words, page by page, safe with any name."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import h5py
import httpx
import numpy as np
import pytest

from tests.server.test_tree import write_everything
from tests.support.seen import Seen, seen
from tests.support.server_process import ServerProcess
from tests.support.zoo import complete

SHARDS = 3


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("trees")
    write_everything(folder / "all.h5")
    with h5py.File(folder / "nothing.h5", "w") as file:
        file["scalar"] = 1
    for number in range(SHARDS):
        with h5py.File(folder / f"pets-{number}.h5", "w") as file:
            file["x"], file["y"] = np.zeros((10 + number, 3)), np.arange(10 + number) % 2
    with h5py.File(folder / "wide.h5", "w") as file:
        file["x"] = np.zeros((10, 3))
        for number in range(20):
            file[f"group{number:02}/y"] = number
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with httpx.Client(base_url=process.url, timeout=60) as client:
        complete(client, "/")
        yield client
    assert process.stop() == 0


def _opens(page: Seen) -> list[str]:
    """Links that open groups."""
    labels = [one for one in page.all("a") if str(one.get("aria-label")).startswith("Open ")]
    return [str(one["href"]) for one in labels]


def test_it_says_what_the_api_says(http: httpx.Client) -> None:
    """Each object, attribute and link is there, and the page's JSON is the API's."""
    page = seen(http, "/datasets/all/tree")
    whole = http.get("/datasets/all/tree?format=json").json()
    api = http.get("/v1/datasets/all/tree").json()
    assert whole.pop("file_names") == ["all.h5"] and whole == api
    for words in (
        "all there is", "8 × 4 × 4", "unlimited × 4 × 4", "2 × 4 × 4", "deflate (4)", "soft link to /labels",
        "external link to /x in else.h5", "there is no 'nothing'", "0 = RED", "a float32, b.c int16", "one value",
        "counts", "by its path", "table.b.c",
    ):  # fmt: skip
        assert words in page.text or words in seen(http, "/datasets/all/tree?open=%2Fnotes").text, words
    assert "/somewhere" not in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    for child in api["node"]["children"]:
        if child["path"] is not None:
            assert f"/datasets/all/tree?{urlencode({'path': child['path']})}" in page.links(), child["path"]
    images = seen(http, "/datasets/all/tree?path=%2Fimages")
    assert "x" * 4000 in images.text and "128 B" in images.text
    assert "unresolved" in seen(http, "/datasets/all/tree?path=%2Flost").text


def test_groups_open_in_place(http: httpx.Client) -> None:
    """By links, one within the other, and close again; a group that leads back to one above it cannot be opened."""
    page = seen(http, "/datasets/all/tree")
    (notes,) = [link for link in _opens(page) if parse_qs(urlsplit(link).query)["open"] == ["/again"]]
    page = seen(http, notes)
    assert "once" in page.text and "the same as /" in page.text
    (deep,) = [link for link in _opens(page) if "/again/deep" in parse_qs(urlsplit(link).query)["open"]]
    page = seen(http, deep)
    assert "deeper" in page.text
    closes = [str(one["href"]) for one in page.all("a") if one.get("aria-label") == "Close again"]
    assert closes == ["/datasets/all/tree"]
    whole = http.get(f"{deep}&format=json").json()["node"]
    again = next(one for one in whole["children"] if one["path"] == "/again")
    inside = next(one for one in again["children"] if one["path"] == "/again/deep")
    assert [one["path"] for one in inside["children"]] == ["/again/deep/deeper"]
    assert not [link for link in _opens(page) if parse_qs(urlsplit(link).query)["open"][-1].endswith("/up")]
    # What is gone, or was never there, is not asked for.
    assert seen(http, "/datasets/all/tree?open=%2Fnowhere").text


def test_long_groups_have_pages(http: httpx.Client) -> None:
    """All members are on some page; of an open group, the first are shown, and a link leads to all."""
    names: list[str] = []
    path = "/datasets/all/tree?path=%2Fmany"
    while path:
        page = seen(http, path)
        names += [child["name"] for child in http.get(f"{path}&format=json").json()["node"]["children"]]
        path = next((str(one["href"]) for one in page.all("a") if one.get("rel") == "next"), "")
    assert names == [f"g{number:03}" for number in range(250)]
    opened = seen(http, "/datasets/all/tree?open=%2Fmany")
    assert "All 250 members of many" in opened.text and "g099" in opened.text and "g100" not in opened.text
    assert "250 members" in seen(http, "/datasets/all/tree?path=%2Fmany&offset=251", 400).text


def test_only_so_many_groups_are_open(http: httpx.Client) -> None:
    """All at once up to a bound; of more, links lead to their own pages."""
    page = seen(http, "/datasets/wide/tree")
    (everything,) = [link for link in page.links() if link.count("open=") == 16]
    page = seen(http, everything)
    assert _opens(page) == [f"/datasets/wide/tree?path=%2Fgroup{number}" for number in range(16, 20)]
    too_many = "&".join(f"open=%2Fgroup{number:02}" for number in range(17))
    assert "at most 16" in seen(http, f"/datasets/wide/tree?{too_many}", 400).text


def test_the_request_pages_as_the_page_does(http: httpx.Client) -> None:
    """What a program gets are the members that the page shows."""
    page = "/datasets/all/tree?path=%2Fmany&offset=7&limit=3"
    code = html.unescape(http.get(page).text)
    request = re.search(r"curl -f '[^/]*//[^/]*(/v1[^']*)'", code)
    assert request is not None
    asked = http.get(request[1], headers={"accept": "application/json"}).json()["node"]["children"]
    shown = http.get(f"{page}&format=json").json()["node"]["children"]
    assert [one["name"] for one in asked] == [one["name"] for one in shown] == ["g007", "g008", "g009"]


def test_a_file_is_chosen(http: httpx.Client) -> None:
    """Of the files of a dataset; links on the page stay within it."""
    page = seen(http, "/datasets/pets/tree?file=pets-2.h5")
    assert [one["value"] for one in page.all("option")] == [f"pets-{number}.h5" for number in range(SHARDS)]
    assert "12 × 3" in page.text
    assert "/datasets/pets/tree?file=pets-2.h5&path=%2Fx" in page.links()
    assert "did you mean 'pets-2.h5'" in seen(http, "/datasets/pets/tree?file=pets2.h5", 400).text


def test_what_cannot_be_served_has_a_tree(http: httpx.Client) -> None:
    """The catalogue leads to it; a path that is not there is an error page."""
    page = seen(http, "/")
    assert "/datasets/nothing/tree" in page.links()
    assert "one value" in seen(http, "/datasets/nothing/tree").text
    assert "is not a valid path" in seen(http, "/datasets/all/tree?path=%2Fnothing", 404).text
    assert "did you mean 'all'" in seen(http, "/datasets/al/tree", 404).text


def test_the_code_gets_the_same(http: httpx.Client) -> None:
    """Run as it is."""
    page = seen(http, "/datasets/all/tree?path=%2Fimages")
    code = next(text for text in page.text.split("Copy") if "urllib" in text)
    found: dict[str, Any] = {}
    exec(code[code.index("import json") :].partition("Shell")[0], found)
    assert found["tree"] == http.get("/v1/datasets/all/tree", params={"path": "/images"}).json()
