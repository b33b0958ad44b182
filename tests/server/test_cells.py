"""MATLAB's cells and structs, as ``save -v7.3`` writes them: entries are rows if they are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

COUNT = 12
random = np.random.default_rng(0)
IMAGES = [random.integers(0, 256, (8, 6)).astype("u1") for _ in range(COUNT)]
SIGNALS = [random.normal(size=(1, 3 + number % 4)) for number in range(COUNT)]
SIGNALS[4] = np.zeros((0, 0))
POINTS = [random.normal(size=(3, 1)) for _ in range(COUNT)]
LABELS = [("cat", "dog", "Käfer")[number % 3] for number in range(COUNT)]
AGES = [np.array([[20.0 + number]]) for number in range(COUNT)]
LONG = [random.normal(size=(1, 5000)).astype("f4") for _ in range(3)]


class _Matlab:
    """Writes variables as MATLAB does: axes in reverse, entries of cells in ``#refs#``."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._file = h5py.File(path, "w", userblock_size=512)
        self._refs = self._file.create_group("#refs#")
        # MATLAB's own empty value, which is always there.
        self._array(self._refs, "a", np.zeros((0, 0)), "canonical empty")

    def _array(self, group: h5py.Group, name: str, value: Any, kind: str | None = None) -> h5py.Dataset:
        text = isinstance(value, str)
        stored = np.frombuffer(value.encode("utf-16-le"), "<u2").reshape(1, -1) if text else value
        is_empty = stored.size == 0
        chunks = stored.T.shape if stored.nbytes > 4096 else None
        data = np.array(stored.shape, "u8") if is_empty else stored.T
        made = group.create_dataset(name, data=data, chunks=chunks, compression=chunks and "gzip")
        kinds = {"f8": "double", "f4": "single", "u1": "uint8", "u2": "char"}
        made.attrs["MATLAB_class"] = np.bytes_(kind or ("char" if text else kinds[stored.dtype.str[1:]]))
        if text:
            made.attrs["MATLAB_int_decode"] = np.int32(2)
        if is_empty:
            made.attrs["MATLAB_empty"] = np.uint8(1)
        return made

    def references(self, path: str, values: Sequence[Any], *, shape: tuple[int, int] | None = None) -> h5py.Dataset:
        made = []
        for value in values:
            self._count += 1
            name = f"b{self._count}"
            if isinstance(value, list):
                made.append(self.references(f"#refs#/{name}", value).ref)
                self._file[f"#refs#/{name}"].attrs["MATLAB_class"] = np.bytes_("cell")
            else:
                made.append(self._array(self._refs, name, value).ref)
        # A cell of N × 1 is stored as 1 × N.
        return self._file.create_dataset(path, data=np.array(made, h5py.ref_dtype).reshape(shape or (1, -1)))

    def cell(self, name: str, values: Sequence[Any], shape: tuple[int, int] | None = None) -> None:
        self.references(name, values, shape=shape).attrs["MATLAB_class"] = np.bytes_("cell")

    def array(self, name: str, value: Any) -> None:
        self._array(self._file, name, value)

    def struct(self, name: str) -> None:
        self._file.create_group(name).attrs["MATLAB_class"] = np.bytes_("struct")

    def entry(self, path: str, number: int) -> h5py.Dataset:
        return self._file[self._file[path][()].reshape(-1)[number]]

    def repeat(self, path: str, other: str, count: int) -> None:
        """Another array of cells: the last entry of `other` many times, then its first."""
        first, *_, last = self._file[other][()].reshape(-1)
        self._file.create_dataset(path, data=np.array([[last] * count + [first]], h5py.ref_dtype))

    def scalar(self, path: str) -> None:
        self._file.create_dataset(path, data=self._refs["a"].ref, dtype=h5py.ref_dtype)

    def link(self, path: str, file: str, target: str) -> None:
        self._file[path] = h5py.ExternalLink(file, target)

    def close(self) -> None:
        self._file.close()
        with self._path.open("r+b") as raw:
            raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def _write_odd(folder: Path) -> None:
    """What MATLAB itself hardly writes."""
    file = _Matlab(folder / "odd.mat")
    file.array("score", np.arange(COUNT, dtype="f8").reshape(-1, 1))
    file.cell("short", ["" if number % 4 == 0 else "😀ä" * number for number in range(COUNT)])
    file.cell("padded", ["a\0"] + ["b"] * (COUNT - 1))
    file.cell("half", ["c"] * (COUNT - 1) + [np.array([[0x61], [0xD83D]], "u2")])
    file.cell("full", [np.array([[number, 1.0]]) for number in range(COUNT)])
    for number in range(COUNT):
        file.entry("full", number).attrs["MATLAB_empty"] = np.uint8(0)
    file.cell("long", ["x" * 400_000] + ["y"] * (COUNT - 1))
    file.repeat("many", "long", 10_000)
    file.scalar("alone")
    file.close()
    # The names of entries are the same in both files.
    for name, base in (("linked", 0), ("linking", 100)):
        file = _Matlab(folder / f"{name}.mat")
        file.cell("x", [np.full((2, 2), float(base + number)) for number in range(COUNT)])
        file.cell("names", LABELS)
        if base:
            file.link("other", "linked.mat", "x")
            file.link("others", "linked.mat", "names")
        file.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("cells") / "data"
    folder.mkdir()
    file = _Matlab(folder / "cells.mat")
    file.cell("images", IMAGES)
    file.cell("signals", SIGNALS, (COUNT, 1))
    file.cell("points", POINTS)
    file.cell("label", LABELS)
    file.array("score", np.arange(COUNT, dtype="f8").reshape(-1, 1))
    file.cell("mixed", [np.zeros((2, 2)), *IMAGES[1:]])
    file.cell("uneven", [random.normal(size=(2, 2 + number)) for number in range(COUNT)])
    file.cell("nested", [[np.ones((1, 1))]] * COUNT)
    file.cell("several", IMAGES, (3, 4))
    file.close()
    file = _Matlab(folder / "people.mat")
    file.struct("people")
    for name, values in (("age", AGES), ("name", LABELS), ("photo", IMAGES)):
        file.references(f"people/{name}", values, shape=(COUNT, 1))
    file.close()
    file = _Matlab(folder / "one.mat")
    file.struct("data")
    file.array("data/x", random.normal(size=(40, 6)))
    file.array("data/y", (np.arange(40.0) % 3).reshape(-1, 1))
    file.close()
    file = _Matlab(folder / "long.mat")
    file.cell("x", LONG)
    file.close()
    _write_odd(folder)
    return serve_module(folder)


def test_alike_entries_are_rows(feed: h5feed.Feed) -> None:
    """Entries in any order: matrices with their axes in reverse, as h5py has them; vectors and texts as such."""
    dataset, rows = feed["cells"], np.random.default_rng(1).permutation(COUNT)
    assert dataset.rows == COUNT
    fields = {field["name"]: field for field in dataset.info["fields"]}
    found = dataset.take(rows, fields=["images", "points"])
    np.testing.assert_array_equal(found["images"], np.array([IMAGES[row].T for row in rows]))
    np.testing.assert_array_equal(found["points"], np.array([POINTS[row][:, 0] for row in rows]))
    assert found["images"].dtype == np.uint8 and fields["images"]["note"].endswith("their axes are reversed")
    lists = dataset.take(rows, fields=["signals"]).lists("signals")
    for row, one in zip(rows, lists, strict=True):
        np.testing.assert_array_equal(one, SIGNALS[row].reshape(-1))
    np.testing.assert_array_equal(dataset.take(rows, fields=["score"])["score"].reshape(-1), rows)
    assert dataset.take(rows, fields=["label"]).text("label") == [LABELS[row] for row in rows]
    assert fields["label"]["role"] == "label" and fields["images"]["role"] == "input"
    long = feed["long"].take([2, 0], fields=["x"])["x"]
    np.testing.assert_array_equal(long, np.array([LONG[2][0], LONG[0][0]]))
    for x, y in dataset.loader(x="images", y="label", batch_size=5, shuffle=True, seed=4):
        assert x.shape[1:] == (6, 8) and len(x) == len(y)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixed", "different classes: double, uint8"),
        ("uneven", "different shapes: \\[2, 2\\], \\[3, 2\\], \\[4, 2\\]"),
        ("nested", "entry 0 is neither an array of numbers nor a text"),
        ("several", "a matrix of 4 × 3 cells"),
    ],
)
def test_what_is_refused(feed: h5feed.Feed, name: str, reason: str) -> None:
    with pytest.raises(h5feed.UnsupportedField, match=reason):
        feed["cells"].take([0], fields=[name])


def test_structs(feed: h5feed.Feed) -> None:
    """An array of structs has one row for each, and the members of a single struct are fields."""
    people = feed["people"]
    assert people.rows == COUNT
    found = people.take(range(COUNT), fields=["age", "photo", "name"])
    np.testing.assert_array_equal(found["age"], 20.0 + np.arange(COUNT))
    np.testing.assert_array_equal(found["photo"], np.array([photo.T for photo in IMAGES]))
    assert found.text("name") == LABELS
    one = feed["one"]
    assert one.rows == 40 and one.take([0], fields=["x"])["x"].shape == (1, 6)


def test_texts(feed: h5feed.Feed) -> None:
    """Some may be empty. Those that text of one width cannot hold are refused, and those that take much memory."""
    dataset = feed["odd"]
    expected = ["" if number % 4 == 0 else "😀ä" * number for number in range(COUNT)]
    assert dataset.take(range(COUNT), fields=["short"]).text("short") == expected
    assert dataset.take([COUNT - 1, 0], fields=["long"]).text("long") == ["y", "x" * 400_000]
    reasons = {"padded": "or ending in NUL", "half": "not UTF-16", "many": "10001 texts, .* have 4000400000 bytes"}
    for name, reason in reasons.items():
        with pytest.raises(h5feed.UnsupportedField, match=reason):
            dataset.take([0], fields=[name])


def test_entries_that_say_that_they_are_not_empty(feed: h5feed.Feed) -> None:
    found = feed["odd"].take([5, 3], fields=["full"])["full"]
    np.testing.assert_array_equal(found, [[5, 1], [3, 1]])


def test_a_single_reference_is_refused(feed: h5feed.Feed) -> None:
    with pytest.raises(h5feed.UnsupportedField, match="reference"):
        feed["odd"].take([0], fields=["alone"])


def test_references_are_not_followed_through_links(feed: h5feed.Feed) -> None:
    """They name entries of the other file, where this one has others. Texts are read there."""
    dataset = feed["linking"]
    np.testing.assert_array_equal(dataset.take([1], fields=["x"])["x"], np.full((1, 2, 2), 101.0))
    with pytest.raises(h5feed.UnsupportedField, match=r"a link into the file 'linked\.mat', where it has references"):
        dataset.take([0], fields=["other"])
    assert dataset.take([1, 2], fields=["others"]).text("others") == LABELS[1:3]


def test_many_entries(tmp_path: Path) -> None:
    """Finding them takes time in proportion to their number; one by one, each would take a search of the file."""
    (tmp_path / "data").mkdir()
    file = _Matlab(tmp_path / "data" / "many.mat")
    file.cell("x", [np.full((1, 1), float(number)) for number in range(6000)])
    file.close()
    process = ServerProcess(tmp_path / "data", tmp_path / "cache", H5FEED_INSPECT_TIMEOUT="60")
    with h5feed.connect(process.url, deadline=120) as feed:
        np.testing.assert_array_equal(feed["many"].take([5999, 17], fields=["x"])["x"], [5999, 17])
    assert process.stop() == 0


def test_entries_of_all_arrays_are_bounded(tmp_path: Path) -> None:
    """Each is an object in memory, also if arrays share them."""
    (tmp_path / "data").mkdir()
    file = _Matlab(tmp_path / "data" / "shared.mat")
    file.cell("x", [np.zeros((1, 1)), np.ones((1, 1))])
    for name in ("y", "z"):
        file.repeat(name, "x", 10_000)
    file.close()
    process = ServerProcess(tmp_path / "data", tmp_path / "cache")
    with h5feed.connect(process.url, deadline=60) as feed:
        dataset = feed["shared"]
        np.testing.assert_array_equal(dataset.take([0, 10_000], fields=["y"])["y"], [1, 0])
        with pytest.raises(h5feed.UnsupportedField, match="more than 20000 entries"):
            dataset.take([0], fields=["z"])
    assert process.stop() == 0


def test_two_entries_of_the_same_name(tmp_path: Path) -> None:
    """A damaged group may have them. A reference to one must not lead to the other."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "damaged.mat"
    file = _Matlab(path)
    file.array("score", np.arange(4.0).reshape(-1, 1))
    file.cell("x", [np.full((1, 1), float(number)) for number in range(4)])
    file.close()
    # b2 is now another b1.
    raw = path.read_bytes()
    assert raw.count(b"b2\0\0\0") == 1
    path.write_bytes(raw.replace(b"b2\0\0\0", b"b1\0\0\0"))
    process = ServerProcess(tmp_path / "data", tmp_path / "cache")
    with h5feed.connect(process.url, deadline=60) as feed, pytest.raises(h5feed.UnsupportedField, match="reference"):
        feed["damaged"].take([1], fields=["x"])
    assert process.stop() == 0
