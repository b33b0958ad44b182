"""Looking at data from Python: contact sheets, tables and plots, in notebooks and in terminals."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadAnswer, BadParameter, FieldNotFound, RowOutOfRange, TooLarge, UnsupportedField
from h5feed.pictures import Picture
from h5feed.row_table import RowTable
from PIL import Image

from tests.support.server_process import ServerProcess

ROWS = 60
COLOURS = np.array([[200, 20, 30], [10, 180, 60], [5, 40, 220]], np.uint8)
NAMES = ["<b>cat", "dog", "fox"]


def _write(folder: Path) -> None:
    with h5py.File(folder / "toys.h5", "w") as file:
        file["images"] = np.broadcast_to(COLOURS[np.arange(ROWS) % 3][:, None, None], (ROWS, 8, 8, 3))
        file["labels"] = np.arange(ROWS) % 3
        file["labels"].attrs["class_names"] = NAMES
    with h5py.File(folder / "table.h5", "w") as file:
        file["x"] = np.arange(ROWS * 3, dtype="f4").reshape(ROWS, 3)
        file["long"] = np.arange(ROWS * 9).reshape(ROWS, 9)
        file["grid"] = np.arange(ROWS * 4).reshape(ROWS, 2, 2)
        file["volume"] = np.zeros((ROWS, 32, 32, 64), "f4")
        file["name"] = [f"<i>row {row}</i>\x1b[31m\n" for row in range(ROWS)]
        lists = file.create_dataset("lists", (ROWS,), h5py.vlen_dtype(np.int16))
        for row in range(ROWS):
            lists[row] = np.arange(row)
        file["label"] = np.arange(ROWS) % 3
        file["label"].attrs["class_names"] = NAMES
    with h5py.File(folder / "numbers.h5", "w") as file:
        file["x"], file["target"] = np.random.default_rng(0).normal(size=(50, 3)), np.arange(50) / 7
    with h5py.File(folder / "none.h5", "w") as file:
        file["x"], file["y"] = np.zeros((0, 3)), np.zeros(0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    _write(folder)
    return serve_module(folder)


@pytest.fixture(scope="module")
def toys(served: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(served.url, deadline=60) as feed:
        yield feed


def _pixels(picture: Picture | RowTable) -> Any:
    assert isinstance(picture, Picture)
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)


def test_a_contact_sheet(served: ServerProcess, toys: h5feed.Feed, tmp_path: Path) -> None:
    """It is the server's picture, says in words what is on it, and can be saved."""
    picture = toys["toys"].show("train", val=0.2, per_class=3, side=16)
    assert isinstance(picture, Picture)
    params = {"split": "train", "val": "0.2", "per_class": "3", "side": "16", "revision": toys["toys"].revision}
    path = f"{served.url}/v1/datasets/toys/preview"
    assert picture.png == picture._repr_png_() == httpx.get(path, params=params, timeout=60).content
    assert picture.text == httpx.get(path, params={**params, "format": "txt"}, timeout=60).text
    assert "9 images, one line per class: <b>cat, dog, fox" in picture.text
    assert (picture.width, picture.height) == Image.open(io.BytesIO(picture.png)).size
    assert repr(picture) == (
        f"<Picture, {picture.width} × {picture.height} pixels: {picture.text.removesuffix('.')}; "
        "save it with .save('NAME.png')>"
    )
    picture.save(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == picture.png
    with pytest.raises(BadParameter, match=r"'sheet.jpg' must end in .png"):
        picture.save(tmp_path / "sheet.jpg")


def test_what_a_notebook_gets(toys: h5feed.Feed) -> None:
    """The picture, and its text for those who do not see it."""
    picture = toys["toys"].show()
    assert isinstance(picture, Picture)
    data, metadata = picture._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == picture.png and data["text/plain"] == repr(picture)
    assert metadata["image/png"] == {"alt": picture.text, "width": picture.width, "height": picture.height}
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, about = formatters.DisplayFormatter().format(picture)
    assert shown["image/png"] == data["image/png"] and about["image/png"]["alt"] == picture.text


def test_rows_that_meet_conditions(toys: h5feed.Feed) -> None:
    """Pictures and tables show no other rows, and say why."""
    picture = toys["toys"].show("train", val=0.2, where="labels = dog", per_class=3, side=16)
    assert isinstance(picture, Picture) and "3 images" in picture.text and "labels = dog" in picture.text
    colours = {tuple(colour) for colour in _pixels(picture).reshape(-1, 3).tolist()}
    assert tuple(COLOURS[1].tolist()) in colours
    assert colours.isdisjoint(tuple(colour) for colour in COLOURS[[0, 2]].tolist())
    table = toys["table"].show("train", val=0.2, where=["label = dog"])
    assert isinstance(table, RowTable) and len(table.rows) == 10 and all(row % 3 == 1 for row in table.rows)
    kept = toys["table"].split_rows("train", val=0.2, where="label = dog")
    assert set(table.rows) <= set(kept.tolist())
    assert f"10 of {len(kept)} rows of 'train' of 'table' where label = dog, drawn at random" in repr(table)
    with pytest.raises(RowOutOfRange, match="no rows to show where label = dog and label = fox"):
        toys["table"].show(where=["label = dog", "label = fox"])
    with pytest.raises(BadParameter, match="did you mean 'dog'"):
        toys["table"].show(where="label = dogg")


def test_rows_that_are_named(toys: h5feed.Feed) -> None:
    """A batch is shown row by row, in its order."""
    dataset = toys["toys"]
    batch = dataset.batch(0, split="train", batch_size=11, shuffle=True, val=0.2)
    picture = dataset.show(rows=batch.rows, side=32)
    assert isinstance(picture, Picture)
    assert f"11 images, rows {', '.join(map(str, batch.rows))}." in picture.text
    pixels = _pixels(picture)
    left = np.flatnonzero((np.abs(pixels - COLOURS[batch["labels"][0]]) <= 1).all(axis=-1).any(axis=0))[0]
    top = np.flatnonzero((np.abs(pixels - COLOURS[batch["labels"][0]]) <= 1).all(axis=-1)[:, left])[0]
    # Eight pictures of 32 pixels in a line, 2 pixels apart.
    for place, label in enumerate(batch["labels"]):
        centre = pixels[top + 34 * (place // 8) + 16, left + 34 * (place % 8) + 16]
        assert np.abs(centre - COLOURS[label]).max() <= 1, place


def test_rows_that_cannot_be_shown(toys: h5feed.Feed) -> None:
    """Each error says which value is wrong, and what would be right."""
    dataset = toys["toys"]
    with pytest.raises(BadParameter, match="leave out split, val"):
        dataset.show("train", rows=[1], val=0.2)
    with pytest.raises(BadParameter, match="leave out per_class"):
        dataset.show(rows=[1], per_class=3)
    with pytest.raises(BadParameter, match="flat list of integers"):
        dataset.show(rows=[0.5])
    with pytest.raises(BadParameter, match="separated by commas"):
        dataset.show(rows=[-1])
    with pytest.raises(RowOutOfRange, match=f"row {ROWS} is out of range"):
        dataset.show(rows=[0, ROWS])
    with pytest.raises(TooLarge, match="limit 1024"):
        dataset.show(rows=[0] * 1025)
    assert _pixels(dataset.show(rows=[0] * 1024)).shape[0] < 4000
    with pytest.raises(BadParameter, match=r"unknown option 'vall': did you mean 'val'\?"):
        dataset.show(vall=0.2)  # type: ignore[call-arg]
    with pytest.raises(FieldNotFound, match="did you mean 'images'"):
        dataset.show(field="image")
    with pytest.raises(UnsupportedField, match="holds no images"):
        dataset.show(field="labels", side=32)
    with pytest.raises(RowOutOfRange, match="no rows to show"):
        toys["none"].show()


def test_a_table(toys: h5feed.Feed) -> None:
    """Without images, a line per row has the value of each field; what is long or large is told in short."""
    dataset = toys["table"]
    table = dataset.show(rows=[7, 5])
    assert isinstance(table, RowTable) and table.rows == [7, 5]
    header, *lines = repr(table).splitlines()
    assert header == "<2 chosen rows of 'table'>"
    assert len(lines) == 3
    assert "[21, 22, 23]" in lines[1] and "[63, 64, 65, 66, …] of 9" in lines[1]
    assert "int64[2, 2], 28 … 31" in lines[1] and "float32[32, 32, 64]" in lines[1] and "list of int16" in lines[1]
    assert "1 dog" in lines[1] and "2 fox" in lines[2]
    # Nothing that a terminal or a browser would obey.
    assert "\x1b" not in repr(table) and r"<i>row 7</i>\x1b[31m\n" in lines[1]
    assert "&lt;i&gt;row 7" in table._repr_html_() and "<i>" not in table._repr_html_()
    lists = dataset.show(field="lists", rows=[0, 2])
    assert "[0, 1]" in repr(lists) and "label" not in repr(lists)


def test_a_table_of_a_split(toys: h5feed.Feed) -> None:
    """Ten rows of it, ascending and always the same ones; an image field as numbers is none of them."""
    dataset = toys["table"]
    table = dataset.show("val", val=0.3)
    assert isinstance(table, RowTable)
    assert table.rows == sorted(table.rows) and len(set(table.rows)) == 10
    assert set(table.rows) <= set(dataset.split_rows("val", val=0.3).tolist())
    assert repr(table).startswith("<10 of 18 rows of 'val' of 'table', drawn at random>")
    assert repr(dataset.show("val", val=0.3)) == repr(table)
    labels = toys["toys"].show(field="labels")
    assert isinstance(labels, RowTable) and "images" not in repr(labels) and "0 <b>cat" in repr(labels)
    assert repr(dataset.show(rows=[3] * 150)).startswith("<The first 100 of 150 chosen rows of 'table'>")


def test_plots(served: ServerProcess, toys: h5feed.Feed) -> None:
    """Statistics are drawn by the server, for the rows that they are of."""
    stats = toys["toys"].stats("train", val=0.2)
    params = {"split": "train", "val": "0.2", "format": "txt"}
    path = f"{served.url}/v1/datasets/toys/stats/plot"
    assert stats.plot().text == httpx.get(path, params=params, timeout=60).text
    assert "Class balance of toys" in stats.plot().text
    assert stats["images"].plot().text.startswith("Histogram of images of toys, split train, 48 rows")
    assert stats.plot("images").png == stats["images"].plot().png
    assert "Mean of the 48 images" in stats.plot(kind="mean_image").text
    assert "Mean of the 48 images" in toys["toys"].stats("train", field="images", val=0.2).plot("mean_image").text
    with pytest.raises(FieldNotFound, match="did you mean 'images'"):
        stats.plot("image")
    with pytest.raises(BadParameter, match="kind=pie"):
        stats.plot(kind="pie")  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(stats)).plot().png == stats.plot().png


def test_a_label_of_numbers_has_a_histogram(toys: h5feed.Feed) -> None:
    """Where there are no classes, the plot is of the first input; classes that are asked for are an error."""
    stats = toys["numbers"].stats()
    assert stats.plot().text.startswith("Histogram of x of numbers")
    with pytest.raises(UnsupportedField, match="holds no classes"):
        stats.plot(kind="classes")


def test_pictures_that_are_none(toys: h5feed.Feed) -> None:
    """What is not a whole PNG file is an answer that is wrong."""
    png = toys["toys"].stats().plot().png
    assert Picture(png).width
    for content in (b"", b"<html>", png[:8], png[:20], png[: len(png) // 2], png[:-12]):
        with pytest.raises(BadAnswer, match="PNG"):
            Picture(content)
