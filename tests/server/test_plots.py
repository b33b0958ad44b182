"""Pictures show what is in the file, and say it to those who do not see them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import h5py
import httpx
import imagecodecs
import numpy as np
import pytest
from h5feed_server.stats.pictures import arranged, fit, to_pixels
from PIL import Image

from tests.support.server_process import ServerProcess

NAMES = ["<script>alert(1)</script>", "a $5 bill", "Größe & 猫"]
COLOURS = np.array([[200, 20, 30], [10, 180, 60], [5, 40, 220]], np.uint8)
ROWS = 300


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose images have the colour of their class, in both orders of colours, and one of numbers only."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, ROWS)
    images = np.broadcast_to(COLOURS[labels][:, None, None], (ROWS, 12, 10, 3))
    with h5py.File(folder / "toys.h5", "w") as file:
        file["images"] = images
        file["bgr"] = images[..., ::-1]
        file["bgr"].attrs["channels"] = "bgr"
        file["labels"] = labels
        file["labels"].attrs["class_names"] = NAMES
        file["depth"] = random.normal(size=(ROWS, 9, 9)).astype("f4")
        file["features"] = random.normal(size=(ROWS, 20)).astype("f4")
        file["captions"] = ["text"] * ROWS
    with h5py.File(folder / "numbers.h5", "w") as file:
        file["x"], file["t"] = random.normal(size=(50, 3)), random.normal(size=50)
    return folder


@pytest.fixture(scope="module")
def http(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    server = ServerProcess(pictures, tmp_path_factory.mktemp("cache"))
    with httpx.Client(base_url=f"{server.url}/v1/datasets", timeout=60) as client:
        yield client
    assert server.stop() == 0


def test_no_plotting_library_before_the_first_plot(pictures: Path, serve: Callable[..., ServerProcess]) -> None:
    """Samples and statistics load none; the first plot does."""
    server = serve(pictures)
    maps = Path(f"/proc/{server.worker_pids()[0]}/maps")
    with httpx.Client(base_url=f"{server.url}/v1/datasets", timeout=60) as http:
        assert http.get("/toys/rows/0/image").status_code == 200
        assert http.get("/toys/stats").status_code == 200
        assert http.get("/toys/stats/plot", params={"format": "txt"}).status_code == 200
        assert "matplotlib" not in maps.read_text()
        assert http.get("/toys/stats/plot").status_code == 200
        assert "matplotlib" in maps.read_text()


@pytest.mark.parametrize("field", ["images", "bgr"])
def test_a_sample(http: httpx.Client, field: str) -> None:
    """A row is shown pixel by pixel, red as red whatever the order of the channels."""
    answer = http.get("/toys/rows/7/image", params={"field": field})
    assert answer.headers["content-type"] == "image/png"
    pixels = imagecodecs.png_decode(answer.content)
    label = http.get("/toys/rows/7/image", params={"format": "txt"}).text
    assert label == "Row 7 of bgr of toys, 10 × 12 pixels."
    assert pixels.shape == (12, 10, 3) and any((pixels == colour).all() for colour in COLOURS)
    again = http.get("/toys/rows/7/image", params={"field": field}, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304
    small = imagecodecs.png_decode(http.get("/toys/rows/7/image", params={"field": field, "side": 6}).content)
    assert small.shape == (6, 5, 3) and (small == pixels[0, 0]).all()


KINDS = [
    ("/toys/stats/plot", {"val": "0.2", "test": "0.2"}, "Class balance of toys"),
    ("/toys/stats/plot", {"kind": "histogram", "field": "images"}, "R: mean"),
    ("/toys/stats/plot", {"kind": "histogram", "field": "features"}, "and 8 more"),
    ("/toys/stats/plot", {"kind": "histogram", "field": "depth", "split": "train", "test": "10"}, "split train, 290"),
    ("/toys/stats/plot", {"kind": "mean_image", "field": "images"}, "Mean of the 300 images of toys"),
    ("/toys/preview", {"per_class": "4"}, "Contact sheet"),
    ("/toys/preview", {"rows": "7,3,7"}, "Contact sheet of bgr of toys, 3 images, rows 7, 3, 7."),
    ("/toys/rows/3/image", {}, "Row 3"),
    ("/numbers/stats/plot", {}, "Histogram of x of numbers"),
]


@pytest.mark.parametrize(("path", "params", "says"), KINDS)
def test_pictures_and_their_texts(http: httpx.Client, path: str, params: dict[str, str], says: str) -> None:
    """Each picture comes as PNG and as SVG, which hold the text that comes alone too; names are but names."""
    text = http.get(path, params={**params, "format": "txt"})
    assert text.headers["content-type"].startswith("text/plain") and says in text.text
    png = http.get(path, params=params)
    assert png.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(png.content))
    assert min(picture.size) >= 9
    if "rows" not in path:
        assert picture.info["Description"] == text.text
    svg = http.get(path, params={**params, "format": "svg"})
    assert svg.headers["content-type"] == "image/svg+xml" and "default-src 'none'" in svg.headers["content-security-policy"]  # fmt: skip  # noqa: E501
    root = ElementTree.fromstring(svg.content)
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == text.text
    assert root[0].tag.endswith("title") and root[0].text == text.text
    assert not root.findall(".//{*}script")
    assert http.get(path, params=params).content == png.content


def test_class_balance_names_every_split(http: httpx.Client) -> None:
    """The text has each split with its rows and the share of each class."""
    text = http.get("/toys/stats/plot", params={"val": "0.2", "test": "0.2", "format": "txt"}).text
    assert all(name in text for name in NAMES)
    assert "train, 180 rows" in text and "val, 60 rows" in text and "test, 60 rows" in text


def test_contact_sheet(http: httpx.Client) -> None:
    """A line for each class, with its colour."""
    picture = Image.open(io.BytesIO(http.get("/toys/preview", params={"per_class": "5"}).content)).convert("RGB")
    pixels = np.asarray(picture)
    tops = []
    for colour in COLOURS:
        there = (np.abs(pixels.astype(int) - colour) <= 1).all(axis=-1)
        # 5 images of 90 × 108 pixels, or what of them is a class that has as many.
        assert there.sum() > 5 * 80 * 90
        tops.append(int(np.flatnonzero(there.any(axis=1))[0]))
    assert tops == sorted(tops)


@pytest.mark.parametrize(
    ("path", "params", "code"),
    [
        ("/toys/rows/300/image", {}, "row_out_of_range"),
        ("/toys/rows/0/image", {"field": "features"}, "unsupported_field"),
        ("/numbers/rows/0/image", {}, "unsupported_field"),
        ("/numbers/preview", {}, "unsupported_field"),
        ("/numbers/stats/plot", {"kind": "classes"}, "unsupported_field"),
        ("/toys/stats/plot", {"kind": "histogram", "field": "captions"}, "unsupported_field"),
        ("/toys/stats/plot", {"kind": "mean_image", "field": "features"}, "unsupported_field"),
        ("/toys/stats/plot", {"kind": "pie"}, "bad_parameter"),
        ("/toys/stats/plot", {"split": "test"}, "split_not_found"),
        ("/toys/preview", {"split": "nix"}, "split_not_found"),
        ("/toys/preview", {"revision": "old"}, "revision_changed"),
        ("/toys/preview", {"rows": "0,300"}, "row_out_of_range"),
        ("/toys/preview", {"rows": "0,x"}, "bad_parameter"),
        ("/toys/preview", {"rows": ""}, "bad_parameter"),
        ("/toys/preview", {"rows": "1", "split": "train"}, "bad_parameter"),
        ("/toys/preview", {"rows": ",".join(["0"] * 1025)}, "too_large"),
        ("/nix/preview", {}, "dataset_not_found"),
    ],
)
def test_errors(http: httpx.Client, path: str, params: dict[str, str], code: str) -> None:
    """What cannot be shown is a problem that says why."""
    answer = http.get(path, params=params)
    assert answer.json()["code"] == code and re.search(r"\w", answer.json()["detail"])


def test_brightness() -> None:
    """uint8 is shown as it is; floats up to 1 and bools are scaled; others stretched; NaN is black."""
    byte = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(to_pixels(byte, byte.dtype), byte)
    unit = np.array([0.0, 0.5, 1.0])
    assert to_pixels(unit, np.dtype("f4")).tolist() == [0, 128, 255]
    assert to_pixels(np.array([0, 1]), np.dtype("?")).tolist() == [0, 255]
    assert to_pixels(np.array([1000, 3000, 2000]), np.dtype("u2")).tolist() == [0, 255, 128]
    assert to_pixels(np.array([-1.0, np.nan, 1.0]), np.dtype("f4")).tolist() == [0, 0, 255]
    assert arranged(np.zeros((2, 3, 5, 6)), "rgb").shape == (2, 5, 6, 3)
    assert arranged(np.arange(3.0).reshape(1, 1, 1, 3), "bgr").ravel().tolist() == [2, 1, 0]
    assert fit(np.ones((1, 300, 100, 3)), 96).shape == (1, 75, 25, 3)
    assert fit(np.ones((1, 28, 28, 1)), 96).shape == (1, 84, 84, 1)
