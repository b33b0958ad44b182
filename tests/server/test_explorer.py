"""The pages people look at datasets with: readable without JavaScript, safe with any content, and true to the API."""

from __future__ import annotations

import html
import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

import h5feed
import h5py
import httpx
import imagecodecs
import numpy as np
import pytest

from tests.support.seen import Seen, seen
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until
from tests.support.zoo import HOSTILE, ROWS, complete, write_hostile, write_zoo

KINDS = {
    "image": "image",
    "mask": "mask",
    "clip_frames": "frames",
    "volume": "volume",
    "spectrogram": "map",
    "ecg": "signal",
    "cloud_points": "points",
    "caption": "text",
    "labels": "class",
    "price": "number",
    "embedding": "vector",
    "tokens": "list",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explored")
    write_zoo(folder / "zoo.h5")
    for name in HOSTILE[:6]:
        write_hostile(folder / f"{name.replace('/', '')}.h5")
    with h5py.File(folder / "split.h5", "w") as file:
        for split, rows in (("train", 40), ("test", 20)):
            file[f"{split}/x"] = np.random.default_rng(rows).normal(size=(rows, 4))
            file[f"{split}/y"] = np.arange(rows) % (4 if split == "train" else 2)
    (folder / "<b>broken.h5").write_bytes(b"no HDF5")
    return folder


@pytest.fixture(scope="module")
def server(data: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(data)


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers={"accept": "text/html"}) as client:
        yield client


def test_the_catalogue(http: httpx.Client, data: Path) -> None:
    """Everything in the folder is listed, with pictures of what has some; it can be searched and sorted."""
    whole = complete(http, "/")
    by_name = {one["name"]: one for one in whole["datasets"]}
    assert by_name["zoo"]["rows"] == ROWS and by_name["split"]["splits"] == {"train": 40, "test": 20}
    assert by_name["<b>broken"]["status"] == "unreadable" and "HDF5" in by_name["<b>broken"]["reason"]
    page = seen(http, "/")
    assert "/datasets/zoo" in page.links() and "batches/s" in page.text and str(data) not in page.text
    found = html.unescape(http.get("/?q=oo").text)
    assert "feed.datasets('oo')" in found and "/v1/datasets?q=oo" in found
    strip = next(str(one["src"]) for one in page.all("img") if "/zoo/strip" in str(one["src"]))
    assert imagecodecs.png_decode(http.get(strip).content).shape[0] == 48
    assert [one["name"] for one in http.get("/?q=ZO&format=json").json()["datasets"]] == ["zoo"]
    assert http.get("/?sort=rows&format=json").json()["datasets"][0]["name"] == "zoo"
    page = seen(http, "/?limit=2&offset=2")
    assert {"/?offset=4", "/"} <= set(page.links())
    assert "No dataset's name contains" in seen(http, "/?q=nothing").text


def test_a_dataset(http: httpx.Client) -> None:
    """Fields, classes, and what would spoil a training, each as it is in the file."""
    whole = complete(http, "/datasets/zoo")
    said = {(one["field"], one["level"]): one["text"] for one in whole["findings"]}
    assert "1 value is NaN" in said["price", "problem"]
    assert said["image", "note"] == "1 image has a single colour"
    assert whole["card"] == {"title": "A zoo", "licence": "CC0"}
    page = seen(http, "/datasets/zoo")
    for word in ("A zoo", "CC0", "cat", "33.3%", "float32", "price", "mean"):
        assert word in page.text, word
    assert seen(http, "/datasets/split").text.count("split test lacks 2 of 4 classes") == 1


def test_repeated_rows(http: httpx.Client, server: ServerProcess) -> None:
    """Rows whose inputs an earlier row has are counted, whichever fields are inputs."""
    checks = complete(http, "/datasets/zoo")["checks"]
    assert "image" in checks["fields"]
    # All inputs of a row are compared: the others of these rows differ.
    assert checks["repeated"] == 0 or checks["examples"]
    assert checks["uniform"]["image"] == {"rows": 1, "examples": [7]}


def test_rows_are_those_of_the_file(http: httpx.Client, data: Path) -> None:
    """Values in the table are the file's; pages follow each other."""
    whole = complete(http, "/datasets/zoo/rows")
    assert [one["row"] for one in whole["items"]] == list(range(50)) and whole["selected"] == ROWS
    with h5py.File(data / "zoo.h5") as file:
        for item in whole["items"]:
            row, values = item["row"], item["values"]
            assert values["caption"] == file["caption"][row].decode()
            assert values["labels"] == file["labels"][row] and values["tokens"] == file["tokens"][row].tolist()
            np.testing.assert_equal(float(values["price"]), file["price"][row])
            np.testing.assert_allclose(values["embedding"], file["embedding"][row])
            assert values["image"]["picture"].startswith(f"/datasets/zoo/rows/{row}/view")
    page = seen(http, "/datasets/zoo/rows?offset=200")
    assert "201–240 of 240" in page.text and "/datasets/zoo/rows?offset=150" in page.links()
    assert (
        seen(http, "/datasets/zoo/rows?offset=240", 404).text.count(
            "offset=240 is out of range: 240 rows are selected (valid: 0 to 239)"
        )
        == 1
    )


def test_rows_are_sorted_and_searched(http: httpx.Client, data: Path) -> None:
    """As numpy sorts, NaN last either way; a text is found in either case."""
    with h5py.File(data / "zoo.h5") as file:
        price, captions = file["price"][:], [text.decode() for text in file["caption"][:]]
    up = np.argsort(price, kind="stable")
    ids = [one["row"] for one in complete(http, "/datasets/zoo/rows?sort=price&limit=200&offset=40")["items"]]
    assert ids == up[40:].tolist() and ids[-1] == 5
    down = complete(http, "/datasets/zoo/rows?sort=price&order=desc&limit=10")["items"]
    assert [one["row"] for one in down] == np.argsort(-price, kind="stable")[:10].tolist()
    found = complete(http, "/datasets/zoo/rows?q=red+THING&limit=200")
    assert [one["row"] for one in found["items"]] == [row for row, text in enumerate(captions) if "Red" in text]
    both = complete(http, "/datasets/zoo/rows?q=blue&sort=price&order=desc&split=test&test=0.5&limit=200")
    ids = [one["row"] for one in both["items"]]
    assert ids and all("blue" in captions[row] for row in ids) and both["selected"] == len(ids)
    assert (np.diff([price[row] for row in ids if row != 5]) <= 0).all()
    assert (
        "can be sorted only by a field with one value per row" in seen(http, "/datasets/zoo/rows?sort=image", 422).text
    )
    assert "did you mean 'sort'" in html.unescape(http.get("/datasets/zoo/rows?sorted=price").text)


def test_bars_and_classes_filter(http: httpx.Client, data: Path) -> None:
    """A bar leads to the rows that it counts, and a class to its own; each filter can be taken away."""
    with h5py.File(data / "zoo.h5") as file:
        price, labels = file["price"][:], file["labels"][:]
    complete(http, "/datasets/zoo")
    page = seen(http, "/datasets/zoo/rows?split=test&test=0.5")
    bars = [link for link in page.links() if "where=price" in link]
    split = {one["row"] for one in complete(http, "/datasets/zoo/rows?split=test&test=0.5&limit=200")["items"]}
    assert len(bars) > 4
    rows: list[int] = []
    for link in bars:
        rows += [one["row"] for one in complete(http, f"{link}&limit=200")["items"]]
    # Every row but the one without a price lies in one bar.
    assert sorted(rows) == sorted(split - {5}) and np.isnan(price[5])
    (dogs,) = [link for link in page.links() if "where=labels+%3D+dog" in link]
    found = complete(http, f"{dogs}&limit=200")
    assert {one["row"] for one in found["items"]} == split & set(np.flatnonzero(labels == 1).tolist())
    filtered = seen(http, dogs)
    assert "labels = dog" in filtered.text and "/datasets/zoo/rows?test=0.5&split=test" in filtered.links()
    code = html.unescape(http.get(dogs).text)
    assert "where=['labels = dog']" in code
    both = complete(http, "/datasets/zoo/rows?where=labels+%3D+dog&where=price+>+0&q=red&sort=price&limit=200")["items"]
    wanted = [row for row in np.argsort(price) if labels[row] == 1 and price[row] > 0 and row % 3]
    assert [one["row"] for one in both] == wanted
    assert "did you mean 'labels'" in seen(http, "/datasets/zoo/rows?where=lables+%3D+dog", 400).text
    for view in ("table", "grid"):
        assert "No rows match." in seen(http, f"/datasets/zoo/rows?where=price+>+1000&view={view}").text


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_rows_of_a_split_are_the_apis(http: httpx.Client, split: str) -> None:
    """What a page shows of a split is what the API says are its rows."""
    query = "test=0.2&val=0.1&split_seed=3"
    path = f"/v1/datasets/zoo/splits/{split}/rows?{query}&format=npz"
    answer = http.get(path)
    rows = np.load(io.BytesIO(answer.content))["__rows__"].tolist()
    shown = complete(http, f"/datasets/zoo/rows?split={split}&{query}&limit=200")
    assert [one["row"] for one in shown["items"]] == rows[:200] and shown["selected"] == len(rows)


@pytest.mark.parametrize("name", KINDS)
def test_views(http: httpx.Client, name: str) -> None:
    """Each kind of field has a view that suits it, small and large."""
    page = seen(http, "/datasets/zoo/rows/3")
    assert name in page.text
    drawn = KINDS[name] in ("image", "mask", "frames", "volume", "map", "signal", "points")
    for side in (64, 448):
        answer = http.get(f"/datasets/zoo/rows/3/view?field={name}&side={side}")
        if not drawn:
            assert answer.status_code == 422
            continue
        assert answer.status_code == 200, answer.text
        if KINDS[name] in ("signal", "points"):
            assert answer.text.startswith("<svg") and answer.headers["content-type"] == "image/svg+xml"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        else:
            height, width = imagecodecs.png_decode(answer.content).shape[:2]
            assert 4 <= height <= side and width >= 4


def test_a_signal_can_be_looked_at_closely(http: httpx.Client) -> None:
    """Links zoom in and out, and to both sides."""
    page = seen(http, "/datasets/zoo/rows/3")
    (closer,) = [link for link in page.links() if "field=ecg" in link and "begin=125" in link]
    page = seen(http, closer)
    pictures = [str(one["src"]) for one in page.all("img") if "field=ecg" in str(one["src"])]
    assert any("begin=125" in one and "end=375" in one for one in pictures)
    assert all(word in page.text for word in ("Zoom in", "Zoom out", "Left", "Right"))


def test_pictures_are_kept_by_browsers(http: httpx.Client) -> None:
    """With the revision in its URL, a picture need not be asked for again."""
    page = seen(http, "/datasets/zoo/rows/3")
    url = next(str(one["src"]) for one in page.all("img") if "field=image" in str(one["src"]))
    answer = http.get(url)
    assert "immutable" in answer.headers["cache-control"]
    assert http.get(url, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    stale = re.sub(r"revision=\w+", "revision=other", url)
    assert http.get(stale).status_code == 409


def test_splits(http: httpx.Client) -> None:
    """The counts are the API's; what cannot be is said above the form, which stays."""
    query = "test=0.2&val=0.1&stratify=labels"
    whole = complete(http, f"/datasets/zoo/splits?{query}")
    assert whole["splits"] == http.get(f"/v1/datasets/zoo/splits?{query}").json()["splits"]
    assert whole["overlap"] == {"in_several": 0, "in_none": 0}
    page = seen(http, f"/datasets/zoo/splits?{query}&folds=&fold=&group=&split_seed=&split_shuffle=")
    assert "options = dict(test=0.2, val=0.1, stratify='labels')" in page.text
    assert "ds.sequence('train', batch_size=32, shuffle=True, seed=1, **options)" in page.text
    page = seen(http, "/datasets/zoo/splits?test=2.5", 400)
    assert "a fraction must be" in page.text and page.all("form")
    assert "leave val out" in seen(http, "/datasets/zoo/splits?folds=5&val=0.1", 400).text
    assert complete(http, "/datasets/split/splits")["overlap"] == {"in_several": 0, "in_none": 0}


def test_the_feed(http: httpx.Client) -> None:
    """Batches that are fetched are counted, and whoever fetches them."""
    before = http.get("/feed?format=json").json()["totals"]
    for index in range(5):
        url = f"/v1/datasets/zoo/batches/{index}?batch_size=8&fields=image"
        assert http.get(url, headers={"accept": "*/*"}).status_code == 200
    answer = http.get("/v1/datasets/zoo/batches?batch_size=8&fields=image&start=0&stop=4", headers={"accept": "*/*"})
    assert answer.status_code == 200
    after = http.get("/feed?format=json").json()
    assert after["totals"]["batches"] == before["batches"] + 9
    assert after["totals"]["bytes"] - before["bytes"] > 9 * 8 * 12 * 10 * 3
    assert after["callers"][0]["name"] == "127.0.0.1" and after["slowest"]
    assert "127.0.0.1" in seen(http, "/feed").text


@pytest.fixture
def waiting_page(
    data: Path, serve: Callable[..., ServerProcess]
) -> Iterator[tuple[httpx.Client, Callable[[], float | None]]]:
    """A server of its own, and what its page says of how long its only client waits."""
    with httpx.Client(base_url=serve(data).url, timeout=60) as http:

        def waited() -> float | None:
            (caller,) = http.get("/feed?format=json").json()["callers"]
            share: float | None = caller["waited"]
            return share

        yield http, waited


def test_the_feed_shows_what_loops_wait(waiting_page: tuple[httpx.Client, Callable[[], float | None]]) -> None:
    """As they report it; what is no report is ignored."""
    http, waited = waiting_page

    def tell(*reports: str) -> None:
        for report in reports:
            answer = http.get("/v1/datasets/zoo/batches/0?fields=image", headers={"h5feed-wait": report})
            assert answer.status_code == 200

    tell("", "waited=1, of=2", "waited=-1.000, of=2.000", "waited=nan, of=2.000", "waited=1.000", "9" * 999)
    assert waited() is None
    tell("waited=25.000, of=100.000", "waited=75.000, of=300.000")
    assert waited() == pytest.approx(0.25)
    assert re.search(r"25(\.0)?%", Seen(http.get("/feed", headers={"accept": "text/html"}).text).text)
    # Nobody waits longer than the time there was.
    tell("waited=900000.000, of=300000.000")
    assert waited() == pytest.approx(1.0)


def test_a_loop_tells_what_it_waits(waiting_page: tuple[httpx.Client, Callable[[], float | None]]) -> None:
    """A loader that takes its time, until it has told."""
    http, waited = waiting_page
    with h5feed.connect(str(http.base_url)) as feed:
        loader = feed["zoo"].loader(batch_size=8, x="image", y="labels")
        for _ in range(1000):
            for _ in loader:
                time.sleep(0.02)
            if (told := waited()) is not None:
                break
        assert told is not None and 0 <= told < 1


def test_hostile_names_on_every_page(http: httpx.Client, data: Path) -> None:
    """Nothing of a file becomes an element, an attribute or a link of its own, and no page fails."""
    names = [one["name"] for one in complete(http, "/")["datasets"] if one["status"] == "ok"]
    hostile = [name for name in names if name not in ("zoo", "split")]
    assert len(hostile) == 6
    seen(http, "/")
    for name in hostile:
        here = f"/datasets/{quote(name, safe='')}"
        complete(http, here)
        for path in (
            here,
            f"{here}/rows",
            f"{here}/rows?view=grid",
            f"{here}/rows?q={quote(HOSTILE[0])}",
            f"{here}/rows/3",
            f"{here}/tree",
            f"{here}/tree?path=%2Flabels",
            f"{here}/splits?test=0.2",
            f"{here}/splits?test=5&stratify=none&group=labels",
        ):
            page = seen(http, path)
            assert not any("alert" in str(one) for one in page.all("script")) and str(data) not in page.text
            assert "\u202e" not in http.get(path).text
            for link in page.links():
                assert link.startswith(("/", "?", "#")), link
        for path in (f"{here}/rows?sort={quote(HOSTILE[1])}", f"{here}/rows?split={quote(HOSTILE[0])}"):
            assert http.get(path).status_code in (200, 404)
    for path in (f"/datasets/{quote(HOSTILE[0], safe='')}", f"/?q={quote(HOSTILE[1])}", "/?sort=%3Cb%3E"):
        answer = http.get(path)
        is_page = answer.headers["content-type"].startswith("text/html")
        assert not is_page or ("<img src=x" not in answer.text and "<script>alert" not in answer.text)


def test_every_link_leads_somewhere(http: httpx.Client) -> None:
    """Each page that another one leads to is there."""
    complete(http, "/datasets/zoo")
    known: set[str] = set()
    waiting = ["/", *(f"/datasets/zoo{page}" for page in ("", "/rows", "/rows/3", "/splits?test=0.2", "/tree"))]
    while waiting and len(known) < 120:
        path = waiting.pop()
        known.add(path)
        answer = http.get(path)
        assert answer.status_code in (200, 202), (path, answer.text[:500])
        if "format=json" in path or path == "/docs" or not answer.headers["content-type"].startswith("text/html"):
            continue
        page = Seen(answer.text)
        links = [urljoin(path, link).partition("#")[0] for link in page.links()]
        links += [str(one["href"]) for one in page.all("link")] + [str(one["src"]) for one in page.all("script")]
        waiting += [
            link for link in dict.fromkeys(links) if link not in known and link not in waiting and "/rows" not in link
        ]


def test_errors_are_pages_for_people_and_problems_for_programs(http: httpx.Client) -> None:
    """An unknown dataset, row or parameter says what would be right."""
    page = seen(http, "/datasets/zooo", 404)
    assert "did you mean 'zoo'" in page.text and "Not found" in page.text
    answer = http.get("/datasets/zooo?format=json")
    assert (answer.status_code, answer.json()["code"]) == (404, "dataset_not_found")
    assert "row 999 is out of range" in seen(http, "/datasets/zoo/rows/999", 404).text
    page = seen(http, "/datasets/zoo?x=1", 400)
    assert "there is no parameter" in page.text and "This page cannot be shown" in page.text


def test_pages_of_a_server_that_is_asked_by_another_name(http: httpx.Client) -> None:
    """As for the API: a page of somebody else's cannot read what its own name leads to."""
    assert http.get("/", headers={"host": "evil.example"}).status_code == 421


def test_a_picture_reads_one_row(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """A page of rows, and each picture on it, read no more rows than they show."""
    with h5py.File(tmp_path / "big.h5", "w") as file:
        images = file.create_dataset("image", (5000, 16, 16, 3), "u1", chunks=(1, 16, 16, 3), compression="gzip")
        images[...] = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
        file["labels"] = np.arange(5000) % 10
    server = serve(tmp_path, H5FEED_CHUNK_CACHE_BYTES="0", H5FEED_CACHE_BYTES="0")
    with httpx.Client(base_url=server.url, timeout=60) as http:
        complete(http, "/datasets/big")

        def decoded() -> int:
            decoded: int = http.get("/feed?format=json").json()["totals"]["decoded"]
            return decoded

        before = decoded()
        page = Seen(http.get("/datasets/big/rows?offset=2500&limit=20").text)
        assert decoded() == before
        pictures = [str(one["src"]) for one in page.all("img")]
        assert len(pictures) == 20
        for picture in pictures:
            assert http.get(picture).status_code == 200
        assert decoded() - before <= 20 * 16 * 16 * 3


def test_the_card_is_no_part_of_the_revision(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """What h5feed.toml says to people comes before what the file says, and can be edited while somebody trains."""
    with h5py.File(tmp_path / "toys.h5", "w") as file:
        file["x"], file.attrs["license"], file.attrs["Title"] = np.zeros((5, 3)), "CC0", "of the file"
    declared = '[datasets.toys]\nfiles = ["toys.h5"]\n[datasets.toys.card]\ntitle = "{}"\n'
    (tmp_path / "h5feed.toml").write_text(declared.format("first"))
    server = serve(tmp_path)
    with httpx.Client(base_url=server.url, timeout=60) as http:

        def whole() -> dict[str, Any]:
            answer = http.get("/v1/datasets/toys")
            return answer.json() if answer.status_code == 200 else {}

        wait_until(lambda: bool(whole()))
        before = whole()
        assert before["card"] == {"title": "first", "licence": "CC0"}
        (tmp_path / "h5feed.toml").write_text(declared.format("second"))
        wait_until(lambda: whole().get("card", {}).get("title") == "second")
        assert whole()["revision"] == before["revision"]
        assert "second" in http.get("/datasets/toys").text
