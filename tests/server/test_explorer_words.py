"""Words on the pages: they fit the data, in number and kind, and their code gets what they show."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.api.explorer.web import counted, ordinal, share

from tests.support.seen import Seen, seen
from tests.support.server_process import ServerProcess
from tests.support.zoo import complete

ROWS = 60
ODD = "a,b%c"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("words")
    random = np.random.default_rng(0)
    with h5py.File(folder / "pets.h5", "w") as file:
        file["image"] = random.integers(0, 256, (ROWS, 12, 10, 3), dtype=np.uint8)
        file["volume"] = random.normal(size=(ROWS, 8, 9, 10)).astype("f4")
        file["width"] = random.integers(1, 1000, ROWS).astype(">i2")
        file["title"] = [f"Photo {row}" for row in range(ROWS)]
        file["code"] = np.array([b"ab", b"cde"] * (ROWS // 2))
        file[ODD] = np.arange(ROWS)
        file.create_dataset("input_link", ROWS, h5py.ref_dtype)
        labels = file.create_dataset("label", data=np.where(np.arange(ROWS) == 7, 1, 0))
        labels.attrs["class_names"] = ["cat", "dog", "red fox"]
    with h5py.File(folder / "marked.h5", "w") as file:
        file["x"], file["y"] = random.normal(size=(ROWS, 4)), np.arange(ROWS) % 3 - 1
    with h5py.File(folder / "single.h5", "w") as file:
        file["x"] = np.zeros((1, 4))
    with h5py.File(folder / "nothing.h5", "w") as file:
        file["scalar"] = np.uint8(1)
    (folder / "text.h5").write_bytes(b"no HDF5")
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with httpx.Client(base_url=process.url, timeout=60, headers={"accept": "text/html"}) as client:
        for path in ("/", "/datasets/pets", "/datasets/marked", "/datasets/single"):
            complete(client, path)
        yield client
    assert process.stop() == 0


def _attributes(page: Seen, tag: str, name: str) -> list[str]:
    return [str(one[name]) for one in page.all(tag) if one.get(name)]


def test_numbers_and_shares() -> None:
    """As people write them."""
    assert [counted(1, "row"), counted(1797, "row"), counted(2, "class", "classes")] == [
        *("1 row", "1,797 rows", "2 classes")
    ]  # fmt: skip
    ordinals = ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th", "1,003rd"]
    assert [ordinal(int(one[:-2].replace(",", ""))) for one in ordinals] == ordinals
    assert [share(0), share(0.099), share(0.0004), share(1)] == ["0%", "9.9%", "< 0.1%", "100.0%"]


def test_the_summary_names_what_is_served(http: httpx.Client) -> None:
    """Fields that can be read, and the classes that rows have, as far as they are counted."""
    (listed,) = [one for one in http.get("/?format=json").json()["datasets"] if one["name"] == "pets"]
    assert listed["summary"].endswith("→ label, 3 class names") and "input_link" not in listed["summary"]
    summary = complete(http, "/datasets/pets")["summary"]
    assert summary.endswith("→ label, 2 classes") and "input_link" not in summary


def test_how_fields_are_stored(http: httpx.Client) -> None:
    """In words, and not in numpy's codes."""
    page = seen(http, "/datasets/pets")
    text = " ".join(page.text.replace("Stored as", "Stored as ").split())
    for words in (
        *("Stored as variable-length text Chunks", "Stored as text of 3 bytes, 180 B", "suggests a label"),
        *("Stored as int16, big-endian, 120 B", "Stored as uint8, 21.6 kB"),
    ):  # fmt: skip
        assert words in text, words
    assert "|u1" not in text and "|S" not in text and "<i8" not in text


def test_findings_are_sentences(http: httpx.Client) -> None:
    """They say what there is of each class, and what losses expect."""
    texts = [one["text"] for one in complete(http, "/datasets/pets")["findings"]]
    assert "classes are far from balanced: cat has 59 rows, but dog has only 1" in texts
    texts = [one["text"] for one in complete(http, "/datasets/marked")["findings"]]
    assert "the smallest label is -1, but losses expect labels from 0" in texts
    assert "No problems found" not in seen(http, "/datasets/marked").text
    said = "No problems found: no NaN, no constant fields, no duplicate rows, no single-colour images."
    assert said in seen(http, "/datasets/single").text


def test_one_is_no_plural(http: httpx.Client) -> None:
    """One row, one byte."""
    for path in ("/", "/datasets/single", "/datasets/single/rows/0"):
        text = seen(http, path).text
        assert "1 row" in text and "1 rows" not in text, path
    tree = seen(http, "/datasets/nothing/tree").text
    assert "1 byte" in tree and "1 bytes" not in tree
    assert "1st of 1 row" in seen(http, "/datasets/single/rows/0").text


@pytest.mark.parametrize(
    ("query", "is_said"),
    [
        *(("", False), ("?sort=width", False), ("?where=width+>+0", True), ("?q=photo", True)),
        *(("?split=test&test=0.5", True), ("?where=width+>+0&view=grid", False)),
    ],
)
def test_charts_describe_all_rows(http: httpx.Client, query: str, is_said: bool) -> None:
    """Where they stand above a selection, the page says so."""
    complete(http, f"/datasets/pets/rows{query}")
    said = "The charts describe all 60 rows, not the selection."
    assert (said in seen(http, f"/datasets/pets/rows{query}").text) == is_said


def test_forms_speak_of_the_dataset(http: httpx.Client) -> None:
    """Examples in empty fields are conditions that hold for it; the default of a list is not named twice."""
    page = seen(http, "/datasets/pets/rows")
    (example,) = [one for one in _attributes(page, "input", "placeholder") if one.startswith("Filter")]
    assert example == "Filter: label in cat, dog · width >= 0"
    for condition in example.removeprefix("Filter: ").split(" · "):
        assert complete(http, f"/datasets/pets/rows?where={quote(condition)}")["selected"] == ROWS
    assert "Skip" in page.text and "Number of selected rows to skip" in _attributes(page, "label", "title")
    assert "Filter" in _attributes(seen(http, "/datasets/single/rows"), "input", "placeholder")
    page = seen(http, "/datasets/pets/splits?test=0.5")
    assert "label in cat, dog" in _attributes(page, "input", "placeholder")
    assert "default (the label)none" in page.text and page.text.count("(the label)") == 1
    assert "default (none)" in seen(http, "/datasets/single/splits").text
    assert "No row is in more than one split" in page.text and "max. deviation" in page.text


def test_slices_of_a_volume(http: httpx.Client) -> None:
    """They are counted from 0, as in numpy, and so is the caption."""
    text = seen(http, "/datasets/pets/rows/3").text
    assert "slice 4 (of 0–7), and two perpendicular slices" in text
    assert all(f"{word} slice" in text for word in ("First", "Previous", "Next", "Last"))
    last = seen(http, "/datasets/pets/rows/3?field=volume&at=7").text
    assert "slice 7 (of 0–7)" in last and "Next slice" not in last and "Last slice" not in last


def test_only_hdf5_files_have_contents_to_show(http: httpx.Client) -> None:
    """Of others there is no page to lead to."""
    links = seen(http, "/").links()
    assert "/datasets/nothing/tree" in links and "/datasets/text/tree" not in links
    assert "it is not an HDF5 file (no HDF5 signature)" in seen(http, "/").text


def _code(http: httpx.Client, path: str) -> tuple[Any, list[str]]:
    """The batch that the page's Python fetches, and the URLs of its shell commands."""
    complete(http, path)
    code, *commands = (html.unescape(one) for one in re.findall("<code>([^<]*)</code></pre>", http.get(path).text))
    found: dict[str, Any] = {}
    exec(code, found)
    found["feed"].close()
    return found["batch"], [shlex.split(command)[-1] for command in commands]


SHOWN = {"image", "volume", "width", "title", "code", ODD, "label"}


@pytest.mark.parametrize(
    ("path", "rows", "fields", "urls"),
    [
        ("rows/3", [3], SHOWN, 1),
        ("rows?limit=4&offset=8", [8, 9, 10, 11], SHOWN, 1),
        ("rows?limit=2&offset=4&view=grid", [4, 5], {"image", "label"}, 1),
        (f"rows?where=%22{quote(ODD)}%22+in+5..8&limit=2&offset=2", [7, 8], SHOWN, 1),
        (f"rows?where=%22{quote(ODD)}%22+in+5..8&sort={quote(ODD)}&order=desc", [8, 7, 6, 5], SHOWN, 0),
        ("rows?q=photo+33", [33], SHOWN, 0),
    ],
)
def test_the_code_gets_what_the_page_shows(
    http: httpx.Client, path: str, rows: list[int], fields: set[str], urls: int
) -> None:
    """The rows, and every field that can be read, whatever its name; there is a request where the API has one."""
    batch, requests = _code(http, f"/datasets/pets/{path}")
    assert batch.rows.tolist() == rows
    assert {name.removesuffix(".offsets") for name in batch} == fields
    assert len(requests) == urls
    for url in requests:
        answer = httpx.get(url, timeout=60)
        assert answer.status_code == 200, answer.text
        tensors = answer.json()["tensors"]
        assert (
            tensors.pop("__rows__")["first"] == rows and {name.removesuffix(".offsets") for name in tensors} == fields
        )
