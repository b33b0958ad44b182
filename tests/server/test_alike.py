"""Names that are alike: one odd file among samples, numbers beside splits' words, words of splits that mean none."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import FieldNotFound, Unreadable, UnsupportedField

from tests.support.inspected import inspected, readable_fields, stored_splits
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

random = np.random.default_rng(0)


def _write(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name.replace("__", "/")] = values


def _sample() -> dict[str, Any]:
    return {
        "image": random.random((16, 16, 4)).astype("f4"),
        "mask": random.integers(0, 3, (16, 16, 3), dtype="u1"),
    }


def _rows(count: int, value: int = 0) -> dict[str, Any]:
    return {"x": np.full((count, 2), value, "f4"), "y": np.arange(count) % 2}


def _samples(folder: Path) -> None:
    """Five files of one sample each, of which the third is odd."""
    odd: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "extra": lambda sample: sample | {"odd": np.zeros(16)},
        "without": lambda sample: {"image": sample["image"]},
        "wide": lambda sample: sample | {"image": sample["image"].astype("f8")},
        "big": lambda sample: sample | {"image": sample["image"].astype(">f4"), "age": np.int32(7)},
        "label": lambda sample: {"image": sample["image"], "label": np.int32(1)},
    }
    for kind, change in odd.items():
        for number in range(5):
            sample = _sample()
            if kind in ("big", "label"):
                sample |= {"age": np.int64(7), "label": np.int64(1)}
            _write(folder / kind / f"vol_{number}.h5", **(change(sample) if number == 2 else sample))
    for split, count in (("train", 5), ("val", 4)):
        for number in range(count):
            extra = {"odd": np.zeros(16)} if (split, number) == ("train", 2) else {}
            _write(folder / "folders" / split / f"vol_{number}.h5", **_sample(), **extra)
    for kind, name in (("glued", "train{}"), ("apart", "train_{}")):
        for number in range(3):
            _write(folder / kind / f"{name.format(number)}.h5", **_sample())
        _write(folder / kind / f"{name.format(0).replace('train', 'val')}.h5", **_sample())
    for number in range(5):
        extra = {"odd": np.zeros(6)} if number == 2 else {}
        pictures = {name: np.zeros((6, 16, 16), np.uint8) for name in ("image", "mask")}
        _write(folder / "series" / f"case_{number}.h5", **pictures, **extra)
    for who in ("anna", "bob", "carol"):
        _write(folder / "people" / f"{who}.h5", **_sample())


def _groups(folder: Path) -> None:
    """Twelve groups of one sample each, of which the fifth is odd."""
    for kind in ("note", "no_depth"):
        arrays: dict[str, Any] = {}
        for number in range(12):
            arrays[f"s_{number}__image"] = np.full((16, 16, 3), number, "u1")
            arrays[f"s_{number}__depth"] = np.zeros((16, 16))
        if kind == "note":
            arrays["s_4__note"] = np.zeros(16)
        else:
            del arrays["s_4__depth"]
        _write(folder / f"groups_{kind}.h5", **arrays)
    arrays = {}
    for split, count in (("train", 5), ("val", 2)):
        for number in range(count):
            arrays[f"{split}__s_{number}__image"] = np.full((16, 16, 3), number, "u1")
            arrays[f"{split}__s_{number}__depth"] = np.zeros((16, 16))
    _write(folder / "groups_split.h5", **arrays)
    counted = {f"{name}__{key}": value for name in _COUNTED["apart_by_line"] for key, value in _rows(3).items()}
    _write(folder / "groups_counted.h5", **counted)


_COUNTED = {
    "apart_by_line": ("train_0", "train_1", "train_2", "val_0"),
    "dash": ("train-000", "train-001", "train-002", "val-000"),
    "part": ("train_part0", "train_part1", "train_part2", "val_part0"),
    "prefix": ("img_train_0", "img_train_1", "img_train_2", "img_val_0"),
    "before": ("0_train", "1_train", "2_train", "0_val"),
    "batch": ("train_batch_0", "train_batch_1", "train_batch_2", "val_batch_0"),
    "mixed": ("train", "train_2", "train_10", "val"),
    "glued_on": ("train0", "train1", "train2", "val0"),
}


def _numbers(folder: Path) -> None:
    for kind, names in _COUNTED.items():
        for number, name in enumerate(names):
            _write(folder / "counted" / kind / f"{name}.h5", **_rows(3, number))
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for number in range(count):
            _write(folder / "counted/three" / f"{split}_{number}.h5", **_rows(3))
    for split in ("train", "val"):
        for number in range(2):
            _write(folder / "counted/even" / f"{split}_{number}.h5", **_rows(3))
            _write(folder / "folds" / f"{split}_fold{number}.h5", **_rows(3))
        for size in (28, 64):
            _write(folder / "sizes" / f"{split}_{size}.h5", image=np.zeros((5, size, size)), label=np.arange(5) % 2)
            _write(folder / "cifar" / f"cifar{size}_{split}.h5", **_rows(3))
    for name in ("train_0", "train_1", "train_2", "val_0"):
        _write(folder / "counted/odd" / f"{name}.h5", **_rows(3), **({"odd": np.zeros(3)} if name == "train_1" else {}))
    for name in ("train", "val", "train_0", "train_1", "val_0"):
        _write(folder / "whole" / f"{name}.h5", **_rows(3))


def _words(folder: Path) -> None:
    data = {"x": random.random((30, 4)), "y": np.arange(30) % 3}
    at = np.arange(30)
    masks = {"train_mask": at < 20, "val_mask": (at >= 20) & (at < 25), "test_mask": at >= 25}
    _write(folder / "graph.h5", **data, **masks)
    _write(folder / "unlabelled.h5", x=data["x"], train_mask=at < 20)
    _write(folder / "is_train.h5", images=np.zeros((30, 8, 8), "u1"), labels=data["y"], is_train=at < 20)
    _write(folder / "idx.h5", **data, train_idx=at[:20], test_idx=at[20:])
    _write(folder / "time.h5", **data, train_time=at * 1.0)
    _write(folder / "about.h5", **data, train_meta__id=at)
    _write(
        folder / "real.h5",
        x_train=data["x"][:20],
        y_train=data["y"][:20],
        x_test=data["x"][20:],
        y_test=data["y"][20:],
        idx_train=at[:20],
        idx_test=at[20:],
    )


def _names(folder: Path) -> None:
    with h5py.File(folder / "dotted.h5", "w") as file:
        file["x"], file["g/a.b"], file["g.a/b"] = np.zeros((5, 2)), np.arange(5), np.arange(5) + 10
    with h5py.File(folder / "reserved.h5", "w") as file:
        file["x"], file["__rows__"], file["__weight__"] = np.zeros((5, 2)), np.arange(5), np.zeros(5)
        lists = file.create_dataset("v", (5,), h5py.vlen_dtype("i4"))
        for row in range(5):
            lists[row] = np.arange(row)
        file["v.offsets"] = np.arange(5)
    with h5py.File(folder / "said.h5", "w") as file:
        file["x"], file["a"] = np.zeros((6, 3)), np.ones(6)
        file["a"].attrs["role"] = np.array([b"weight"])
        kind = h5py.enum_dtype({"A": 0, "B": 1, "C": 5}, "i4")
        file.create_dataset("y", data=np.array([0, 1, 5, 0, 1, 5]), dtype=kind)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alike")
    for write in (_samples, _groups, _numbers, _words, _names):
        write(folder)
    return folder


@pytest.fixture(scope="module")
def feed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Feed]:
    with inspected(data, tmp_path_factory.mktemp("cache")) as connected:
        yield connected


def _listed(feed: h5feed.Feed, begin: str) -> list[str]:
    return sorted(entry["name"] for entry in feed.datasets() if entry["name"].startswith(begin))


def _lines(feed: h5feed.Feed, name: str) -> tuple[str, list[str]]:
    """The reason, and the lines of TOML that decide."""
    with pytest.raises(Unreadable) as raised:
        feed[name]
    reason, lines = str(raised.value).split("to h5feed.toml: ")
    found = [line.split(" (")[0] for line in lines.split(" or ")]
    assert [tomllib.loads(line)["datasets"][name]["stack"] for line in found] == [True, False]
    return reason, found


def test_what_one_sample_has_besides_is_left_out(feed: h5feed.Feed, data: Path) -> None:
    """An array that a single file has: files are rows all the same, and the field is listed with the reason."""
    dataset = feed["extra.vol"]
    assert dataset.rows == 5 and readable_fields(dataset) == {"image", "mask", "file"}
    with h5py.File(data / "extra/vol_2.h5") as file:
        np.testing.assert_array_equal(dataset.take([2])["image"][0], file["image"][()])
    assert "only in vol_2" in str(dataset.fields["odd"].reason)
    assert _listed(feed, "extra") == ["extra.vol", "extra.vol.odd"]


def test_folders_of_samples_of_which_one_is_odd(feed: h5feed.Feed) -> None:
    """The same in ``train/`` and ``val/``: the clean split is not torn apart either."""
    assert stored_splits(feed["folders.vol"]) == {"train": 5, "val": 4}
    assert _listed(feed, "folders") == ["folders.vol", "folders.vol.odd"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("without.vol", "no 'mask' in vol_2"),
        ("wide.vol", "their types differ: image float32, image float64"),
        ("label.vol", "their types differ: label int32, label int64"),
        ("series.case", "arrays of 4 files have the same shapes"),
        ("people", "their names are not alike"),
    ],
)
def test_samples_that_do_not_fit_are_refused(feed: h5feed.Feed, name: str, why: str) -> None:
    """What most of the files hold, and one does not, is said; no image is served line by line."""
    assert why in _lines(feed, name)[0]
    assert _listed(feed, name.split(".")[0]) == [name]


def test_types_that_differ_in_nothing_that_is_served(feed: h5feed.Feed, data: Path) -> None:
    """Big-endian numbers are numbers; a single value of another type is listed with that reason."""
    dataset = feed["big.vol"]
    assert dataset.rows == 5 and readable_fields(dataset) == {"image", "mask", "label", "file"}
    for row in (1, 2):
        with h5py.File(data / f"big/vol_{row}.h5") as file:
            np.testing.assert_array_equal(dataset.take([row])["image"][0], file["image"][()])
    assert "pieces differ: int32[], int64[]" in str(dataset.fields["age"].reason)


def test_groups_of_samples_of_which_one_is_odd(
    feed: h5feed.Feed, data: Path, serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """Groups of a file are rows, or refused, as files are; each of the two lines decides."""
    dataset = feed["groups_note"]
    assert dataset.rows == 12 and dataset.take([7])["image"].shape == (1, 16, 16, 3)
    assert "only in s_4" in str(dataset.fields["note"].reason)
    reason, lines = _lines(feed, "groups_no_depth")
    assert "no 'depth' in s_4" in reason
    (tmp_path / "groups_no_depth.h5").write_bytes((data / "groups_no_depth.h5").read_bytes())
    (tmp_path / "h5feed.toml").write_text(lines[0])
    with h5feed.connect(serve(tmp_path).url, deadline=60) as served:
        # What else a file holds is listed when it has been looked at.
        wait_until(lambda: len(_listed(served, "groups")) == 2)
        names = _listed(served, "groups")
        assert sorted(served[name].rows for name in names) == [11, 12]
        (tmp_path / "h5feed.toml").write_text(lines[1])
        wait_until(lambda: sorted(entry["rows"] or 0 for entry in served.datasets()) == [176, 192])


def test_few_groups_of_a_split_are_samples_as_those_of_the_others_are(feed: h5feed.Feed) -> None:
    """Two in ``val/``, five in ``train/``."""
    assert stored_splits(feed["groups_split"]) == {"train": 5, "val": 2}


@pytest.mark.parametrize("name", ["glued", "apart"])
def test_a_number_behind_a_split_may_count_samples(feed: h5feed.Feed, name: str) -> None:
    """``train0`` and ``train_0``, each an image and a mask: a file is a row."""
    assert stored_splits(feed[name]) == {"train": 3, "val": 1}


@pytest.mark.parametrize("kind", _COUNTED)
def test_splits_win_over_numbers(feed: h5feed.Feed, kind: str) -> None:
    """``train_0``, ``train_1``, ``train_2``, ``val_0``: one dataset, its files in order, however they are numbered."""
    name = f"counted.{kind}.img" if kind == "prefix" else f"counted.{kind}"
    assert _listed(feed, f"counted.{kind}") == [name]
    dataset = feed[name]
    assert stored_splits(dataset) == {"train": 9, "val": 3}
    assert dataset.take(range(12))["x"][:, 0].tolist() == np.repeat(range(4), 3).tolist()


def test_numbers_of_three_splits(feed: h5feed.Feed) -> None:
    """Other counts of files in each split; where they are the same, they might be folds, and that is said."""
    assert stored_splits(feed["counted.three"]) == {"train": 9, "val": 6, "test": 6}
    assert stored_splits(feed["counted.even"]) == {"train": 6, "val": 6}
    assert "if each number is a fold" in str(feed["counted.even"].info["notes"])
    assert feed["counted.three"].info["notes"] == []


def test_an_odd_part_does_not_undo_splits(feed: h5feed.Feed) -> None:
    """What one part has besides is listed."""
    assert stored_splits(feed["counted.odd"]) == {"train": 9, "val": 3}
    assert "does not exist for all rows" in str(feed["counted.odd"].fields["odd"].reason)


def test_numbers_that_belong_to_the_name(feed: h5feed.Feed) -> None:
    """Sizes of images, folds, data sets that are called by a number: a dataset each, with its splits."""
    names = ("sizes.28", "sizes.64", "folds.fold0", "folds.fold1", "cifar.cifar28", "cifar.cifar64")
    for begin in ("sizes", "folds", "cifar"):
        assert _listed(feed, begin) == [name for name in names if name.startswith(begin)]
    for name in names:
        assert set(stored_splits(feed[name])) == {"train", "val"}


def test_the_whole_beside_its_parts(feed: h5feed.Feed) -> None:
    """``train`` and ``train_0``, ``train_1``: two datasets, no row twice in one."""
    assert stored_splits(feed["whole"]) == {"train": 3, "val": 3}
    assert stored_splits(feed["whole.parts"]) == {"train": 6, "val": 3}


def test_numbered_groups_of_splits(feed: h5feed.Feed) -> None:
    """Groups ``train_0`` … ``val_0`` of one file are parts of their splits; the field ``episode`` names them."""
    dataset = feed["groups_counted"]
    assert stored_splits(dataset) == {"train": 9, "val": 3}
    assert dataset.take([0, 3, 9], fields=["episode"]).text("episode") == ["train_0", "train_1", "val_0"]


def test_masks_of_splits_are_fields(feed: h5feed.Feed, data: Path) -> None:
    """PyTorch Geometric: ``train_mask`` … have as many rows as ``x``; they are no splits of an array ``mask``."""
    dataset = feed["graph"]
    assert dataset.rows == 30 and stored_splits(dataset) == {}
    with h5py.File(data / "graph.h5") as file:
        for name in ("train_mask", "val_mask", "test_mask"):
            assert dataset.fields[name].role == "other"
            np.testing.assert_array_equal(dataset.take(range(30), fields=[name])[name], file[name][()])
    assert "no split" in str([field["note"] for field in dataset.info["fields"] if field["name"] == "val_mask"])
    assert _listed(feed, "graph") == ["graph"]


@pytest.mark.parametrize(
    ("name", "field"),
    [("is_train", "is_train"), ("time", "train_time"), ("unlabelled", "train_mask"), ("about", "train_meta.id")],
)
def test_one_array_of_a_split_beside_the_rows(feed: h5feed.Feed, name: str, field: str) -> None:
    """It is a field of these rows, and never the label."""
    dataset = feed[name]
    assert dataset.rows == 30 and stored_splits(dataset) == {}
    assert dataset.fields[field].role == "other"
    assert _listed(feed, name) == [name]


def test_numbers_of_rows_are_no_splits(feed: h5feed.Feed) -> None:
    """``train_idx``, ``test_idx`` are datasets of their own; the data stay whole. Beside splits they are of these."""
    dataset = feed["idx"]
    assert dataset.rows == 30 and readable_fields(dataset) == {"x", "y"} and stored_splits(dataset) == {}
    assert "it has 20 rows" in str(dataset.fields["train_idx"].reason)
    assert feed["idx.train_idx"].rows == 20 and feed["idx.test_idx"].rows == 10
    assert stored_splits(feed["real"]) == {"train": 20, "test": 10}
    assert readable_fields(feed["real"]) == {"x", "y", "idx"}


def test_two_arrays_of_one_name(feed: h5feed.Feed) -> None:
    """``g/a.b`` and ``g.a/b``: the first is served; the second is listed with what it may be called instead."""
    dataset = feed["dotted"]
    assert dataset.take(range(5), fields=["g.a.b"])["g.a.b"].tolist() == list(range(5))
    (other,) = (field for field in dataset.fields.values() if not field.readable)
    assert other.name == "g.a.b (g.a/b)" and "'g/a.b' also has the name 'g.a.b'" in str(other.reason)
    with pytest.raises((FieldNotFound, UnsupportedField)):
        dataset.take([0], fields=[other.name])


@pytest.mark.parametrize("name", ["__rows__", "__weight__", "v.offsets"])
def test_names_that_batches_need(feed: h5feed.Feed, name: str) -> None:
    """They are listed with the reason; the fields beside them are served."""
    dataset = feed["reserved"]
    assert not dataset.fields[name].readable and "batches use this name" in str(dataset.fields[name].reason)
    assert dataset.take([4], fields=["x", "v"]).lists("v")[0].tolist() == [0, 1, 2, 3]


def test_what_attributes_and_enums_say(feed: h5feed.Feed) -> None:
    """A role may be an array of one; an enum with gaps names no classes, and that is noted."""
    dataset = feed["said"]
    assert dataset.fields["a"].role == "weight"
    assert dataset.class_names is None
    assert "skips numbers" in str([field["note"] for field in dataset.info["fields"] if field["name"] == "y"])
