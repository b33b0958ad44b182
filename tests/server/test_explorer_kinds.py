"""Pages of datasets that are not like the usual ones: without labels, with odd names, with numbers of few bits."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import h5py
import httpx
import ml_dtypes
import numpy as np
import pytest

from tests.support.seen import seen
from tests.support.server_process import ServerProcess
from tests.support.zoo import complete

ROWS = 400
CLASSES = ["cat", "inf", "Infinity", "nan", "a..b", "5", "true", "in", "not in", "x, y", 'say "x"', "", "é", "1e3", "-"]
FLOATS = [65504.0, -65504.0, np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-7]
PREFIX = "/data/projects/a_very_long_name_of_a_project/experiment_2024_01/raw/images/cam0/"
CITIES = ("Oslo", "New York", "Łódź, PL")
DATASETS = (
    *("unlabelled", "stored", "regression", "classes", "texts", "floats", "many", "masks", "none"),
    *("people", "columns", "listed"),
)
HALF_AN_EDGE = 2.0**-13
"""What float16 rounds away next to 1."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
    with h5py.File(folder / "unlabelled.h5", "w") as file:
        file["images"] = pixels
    with h5py.File(folder / "stored.h5", "w") as file:
        file["train/images"], file["test/images"] = pixels[:300], pixels[300:]
    with h5py.File(folder / "regression.h5", "w") as file:
        file["x"], file["y"] = random.normal(size=(ROWS, 5)), random.normal(size=ROWS)
    with h5py.File(folder / "classes.h5", "w") as file:
        file["images"] = pixels
        labels = file.create_dataset("label", data=np.arange(ROWS) % len(CLASSES))
        labels.attrs["class_names"] = CLASSES
        file["a..b"], file["not in"] = random.normal(size=ROWS), random.integers(0, 9, ROWS).astype(bool)
    with h5py.File(folder / "texts.h5", "w") as file:
        file["images"] = pixels
        file["label"] = [CLASSES[row % len(CLASSES)] for row in range(ROWS)]
        file["path"] = [f"{PREFIX}{row:05}.png" for row in random.permutation(ROWS)]
    with h5py.File(folder / "floats.h5", "w") as file:
        file["x"] = pixels
        for name in ("<f2", ">f2", "<f4", "<f8"):
            values = random.normal(size=ROWS)
            values[: len(FLOATS)] = FLOATS
            file[f"all_{name[1:]}{name[0] == '<'}"] = values.astype(name)
            # Steps of float16 between which bounds of bars lie.
            file[f"near_{name[1:]}{name[0] == '<'}"] = (1 + HALF_AN_EDGE * random.integers(0, 99, ROWS)).astype(name)
        stored = h5py.h5t.IEEE_F16LE.copy()
        stored.set_fields(15, 7, 8, 0, 7)
        stored.set_ebias(127)
        for name, values in (
            ("brain", random.normal(size=ROWS) * 100),
            ("near", 1 + random.integers(0, 9, ROWS) / 128),
        ):
            space = h5py.h5s.create_simple((ROWS,))
            made = h5py.Dataset(h5py.h5d.create(file.id, name.encode(), stored, space))
            made[...] = values.astype(ml_dtypes.bfloat16).astype("f4")
    with h5py.File(folder / "many.h5", "w") as file:
        file["x"], file["label"] = np.zeros((40_000, 4), np.uint8), np.arange(40_000) % 12_000
    with h5py.File(folder / "masks.h5", "w") as file:
        file["images"], file["masks"] = pixels, pixels[..., 0] % 3
    with h5py.File(folder / "people.h5", "w") as file:
        table = np.zeros(ROWS, [("age", "u1"), ("income", "f4"), ("city", "S10"), ("target", "i8")])
        table["age"], table["income"] = np.arange(ROWS) % 90, np.exp(random.normal(size=ROWS) * 2 + 9)
        table["income"][7] = np.nan
        table["city"], table["target"] = np.resize([city.encode() for city in CITIES], ROWS), np.arange(ROWS) % 2
        file["table"] = table
    with h5py.File(folder / "columns.h5", "w") as file:
        file["age"], file["height"], file["id"] = np.arange(ROWS) % 90, np.arange(ROWS) * 0.5, np.arange(ROWS)
    with h5py.File(folder / "listed.h5", "w") as file:
        file["images"], file["labels"] = pixels, np.arange(ROWS) % 3
        file["class_names"] = [b"rose", b"tulip", b"daisy"]
    with h5py.File(folder / "none.h5", "w") as file:
        file["x"], file["y"] = np.zeros((0, 3)), np.zeros(0, np.int64)
    return folder


@pytest.fixture(scope="module")
def http(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    process = ServerProcess(data, tmp_path_factory.mktemp("cache"))
    with httpx.Client(base_url=process.url, timeout=60, headers={"accept": "text/html"}) as client:
        yield client
    assert process.stop() == 0


@pytest.mark.parametrize("name", DATASETS)
def test_every_page_is_there(http: httpx.Client, name: str) -> None:
    """With the links of the page of splits, which divide any dataset."""
    here = f"/datasets/{name}"
    complete(http, here)
    for path in ("", "/rows", "/rows?view=grid", "/tree", "/splits"):
        seen(http, here + path)
    if name == "none":
        seen(http, f"{here}/rows/0", 404)
        return
    seen(http, f"{here}/rows/0")
    presets = [link for link in seen(http, f"{here}/splits").links() if "test=" in link or "folds=" in link]
    assert len(presets) == 3
    for path in presets:
        whole = complete(http, path)
        page = seen(http, path)
        if whole["splits"] is not None:
            assert sum(whole["splits"][split]["rows"] for split in whole["splits"] if split != "all") > 0
            assert not page.all("th") or "train" in page.text


@pytest.mark.parametrize("name", ["regression", "classes", "texts", "floats", "people"])
def test_bars_select_what_they_count(http: httpx.Client, name: str) -> None:
    """Whatever classes and fields are called, and whichever numbers are between the bounds of bars."""
    complete(http, f"/datasets/{name}")
    followed = 0
    for page in (f"/datasets/{name}", f"/datasets/{name}/rows"):
        for link in seen(http, page).all("a"):
            count = re.search(r": ([\d,]+) \([\d.<% ]+\)$", str(link.get("aria-label")))
            if count and "where=" in str(link["href"]):
                whole = complete(http, str(link["href"]))
                assert whole["selected"] == int(count[1].replace(",", "")), (page, link)
                followed += 1
    assert followed > 10


@pytest.mark.parametrize("name", ["classes", "texts"])
def test_classes_of_the_overview_select_their_rows(http: httpx.Client, name: str) -> None:
    """A link for each class, of any name."""
    complete(http, f"/datasets/{name}")
    links = {link for link in seen(http, f"/datasets/{name}").links() if "where=label" in link}
    assert len(links) == len(CLASSES)
    assert sum(complete(http, link)["selected"] for link in links) == ROWS


def test_tables_and_rows_have_the_same_numbers(http: httpx.Client, data: Path) -> None:
    """Those of the file, of each type; the server runs with ml_dtypes installed."""
    items = complete(http, "/datasets/floats/rows?limit=50")["items"]
    with h5py.File(data / "floats.h5") as file:
        for item in items:
            fields = complete(http, f"/datasets/floats/rows/{item['row']}")["values"]
            for name, said in item["values"].items():
                if name != "x":
                    expected = float(file[name][item["row"]])
                    np.testing.assert_equal([float(said), float(fields[name])], [expected] * 2, err_msg=name)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "none"])
def test_the_code_of_pages_runs(http: httpx.Client, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the overview, of the splits as they are stored, and of a preset."""
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "jax"))
    here = f"/datasets/{name}"
    complete(http, here)
    presets = [link for link in seen(http, f"{here}/splits").links() if "test=" in link]
    for path in (here, f"{here}/splits", *presets[:1]):
        code = re.search(r"<code>(# pip install.*?)</code>", http.get(path).text, re.DOTALL)
        assert code is not None, path
        names: dict[str, Any] = {}
        exec(html.unescape(code[1]).replace(": ...", ": break"), names)
        with names["feed"]:
            trained = names.get("train")
            assert trained is None or trained[0], path


def test_rows_are_not_called_duplicates_for_nothing(http: httpx.Client) -> None:
    """Without inputs, all values are compared: the rows of a table that differ in one column are different."""
    for name in ("people", "columns"):
        whole = complete(http, f"/datasets/{name}")
        assert whole["checks"]["repeated"] == 0 and len(whole["checks"]["fields"]) > 2
        assert complete(http, f"/datasets/{name}/splits?test=0.2")["repeated_across"] == 0
        assert "has the same values as" in seen(http, f"/datasets/{name}/splits?test=0.2").text


def test_names_of_classes_are_no_column(http: httpx.Client) -> None:
    """They are used for the labels; the overview says what the list is."""
    whole = complete(http, "/datasets/listed/rows?limit=3")
    assert whole["fields"] == ["images", "labels"] and whole["more_fields"] == 1
    assert "tulip" in seen(http, "/datasets/listed/rows").text
    page = seen(http, "/datasets/listed")
    assert "not served" in page.text and "class names, for instance" in page.text
    assert "select this one" not in page.text


def test_the_size_is_that_of_the_file(http: httpx.Client, data: Path) -> None:
    """Columns of a table are stored together; both pages say the same."""
    by_name = {one["name"]: one for one in complete(http, "/")["datasets"]}
    for name in ("people", "columns", "unlabelled"):
        nbytes = by_name[name]["bytes"]
        assert nbytes == complete(http, f"/datasets/{name}")["bytes"]
        assert 0.5 < nbytes / (data / f"{name}.h5").stat().st_size <= 1


def test_what_is_wrong_can_be_put_right(http: httpx.Client) -> None:
    """The page of rows stays, with the conditions that are right, and the one that is not to be edited."""
    here = "/datasets/classes/rows"
    good = quote("label in cat, é")
    page = seen(http, f"{here}?where={good}&where={quote('label = dgo')}", 400)
    assert "has no class 'dgo'" in page.text and "label in cat, é" in page.text
    assert {one.get("value") for one in page.all("input") if one.get("name") == "where"} == {
        "label in cat, é",
        "label = dgo",
    }
    for query, status in (
        (f"where={good}&offset=9999", 404),
        ("split=nowhere", 404),
        ("sort=images", 422),
        ("x=1", 400),
    ):
        page = seen(http, f"{here}?{query}", status)
        assert page.all("form") and page.all("p")[-1].get("role") != "", query
        assert http.get(f"{here}?{query}&format=json").json()["status"] == status


def test_presets_keep_what_else_is_chosen(http: httpx.Client) -> None:
    """They choose the sizes."""
    page = seen(http, f"/datasets/classes/splits?test=0.5&where={quote('label = cat')}&split_seed=7&stratify=none")
    presets = [parse_qs(urlsplit(link).query) for link in page.links() if "val=0.1" in link or "folds=5" in link]
    presets = [one for one in presets if one.get("test") != ["0.5"]]
    assert len(presets) == 3
    for one in presets:
        assert one["where"] == ["label = cat"] and one["split_seed"] == ["7"] and one["stratify"] == ["none"]


def test_plots_of_skewed_numbers_and_of_text(http: httpx.Client) -> None:
    """Counts on a logarithmic axis are numbers; of text there is no histogram."""
    path = "/v1/datasets/people/stats/plot"
    query = {"kind": "histogram", "field": "table.income", "format": "svg"}
    answer = http.get(path, params=query, headers={"accept": "*/*", "prefer": "wait=30"})
    assert answer.status_code == 200 and "mathdefault" not in answer.text and ">100<" in answer.text
    answer = http.get(path, params={**query, "field": "table.city"}, headers={"accept": "*/*", "prefer": "wait=30"})
    assert answer.status_code == 422 and "holds text" in answer.json()["detail"]


def test_the_mean_of_no_images(http: httpx.Client) -> None:
    """It is an error, and no array of NaN; as a histogram of none is."""
    query = {"where": "label = 1000", "kind": "mean_image", "field": "images"}
    for path in ("stats/plot", "stats/mean-image"):
        wanted = query if path == "stats/plot" else {"where": query["where"], "field": "images"}
        answer = http.get(f"/v1/datasets/classes/{path}", params=wanted, headers={"accept": "*/*", "prefer": "wait=30"})
        assert (answer.status_code, answer.json()["code"]) == (404, "row_out_of_range"), path
        assert "split 'all' of 'classes' has no rows where label = 1000" in answer.json()["detail"]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_long_texts_are_sorted(http: httpx.Client, data: Path, order: str) -> None:
    """By all of their bytes; equal ones by position."""
    with h5py.File(data / "texts.h5") as file:
        for field in ("path", "label"):
            texts = file[field][:]
            expected = sorted(range(ROWS), key=lambda row: texts[row], reverse=order == "desc")
            found: list[int] = []
            while len(found) < ROWS:
                path = f"/datasets/texts/rows?sort={quote(field)}&order={order}&limit=200&offset={len(found)}"
                found += [item["row"] for item in complete(http, path)["items"]]
            assert found == expected, field


def test_conditions_of_the_greatest_length(http: httpx.Client) -> None:
    """They are longer when they are written as the server writes them, and are read again in many places."""
    blank = f"label in {','.join(map(str, range(800)))}".ljust(4096)
    long = f"label in {','.join(str(10_000 + value) for value in range(681))}"
    assert len(blank) == 4096 and len(long) == 4094
    for where in (blank, long):
        expected = int(np.isin(np.arange(40_000) % 12_000, np.array(re.findall(r"\d+", where), int)).sum())
        query = {"where": where}
        answer = http.get("/v1/datasets/many/splits/all/rows", params={**query, "format": "json"})
        assert answer.status_code == 200, answer.text
        for path in ("/v1/datasets/many/plan", "/v1/datasets/many/stats", "/v1/datasets/many/batches/0"):
            answer = http.get(path, params=query, headers={"accept": "*/*", "prefer": "wait=30"})
            assert answer.status_code == 200, (path, answer.text)
        assert http.get("/v1/datasets/many/plan", params=query).json()["rows"] == expected
        assert http.get("/v1/datasets/many/splits", params={**query, "test": "0.2"}).status_code == 200
        whole = http.get("/datasets/many/rows", params={**query, "format": "json"})
        assert whole.status_code == 200 and whole.json()["selected"] == expected
    answer = http.get("/v1/datasets/many/plan", params={"where": long + ",11"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter")
    assert "4096 of one condition" in answer.json()["detail"]
