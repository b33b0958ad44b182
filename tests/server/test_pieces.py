"""Pieces of one dataset that differ in what h5py or the program that wrote them makes of their bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import Unreadable

from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow

Serve = Callable[..., ServerProcess]


def compact(group: h5py.Group, name: str, values: Any, kind: h5py.h5t.TypeID) -> None:
    """An array that lies in its object header, of exactly this type on disk."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(values.shape)
    made = h5py.h5d.create(group.id, name.encode(), kind, space, properties)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, values, mtype=kind)


def text(width: int, padding: int) -> h5py.h5t.TypeID:
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(width)
    kind.set_strpad(padding)
    return kind


def test_compact_text_of_other_widths(serve: Serve, tmp_path: Path) -> None:
    """Text of four bytes and of one, each in its object header: each row is its own, or the field is refused."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for split, values in (("train", np.array([b"a", b"bb", b"cccc"])), ("test", np.array([b"d", b"e", b"f"]))):
            group = file.create_group(split)
            group["x"] = np.arange(6.0).reshape(3, 2)
            compact(group, "kind", values, text(values.itemsize, h5py.h5t.STR_NULLPAD))
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        assert feed["a"].take(range(6), fields=["kind"]).text("kind") == ["a", "bb", "cccc", "d", "e", "f"]


def test_text_of_other_widths(serve: Serve, tmp_path: Path) -> None:
    """Text of train is shorter than that of test, and padded otherwise: each row is what h5py gives."""
    words = {"train": [b"cat", b"dog", b"ox"] * 8, "test": [b"horse", b"dog"] * 4, "val": [b"a b", b"cat"] * 3}
    for split, said in words.items():
        with h5py.File(tmp_path / f"{split}.h5", "w") as file:
            file["x"], values = np.zeros((len(said), 2)), np.array(said)
            if split == "val":
                kind = text(9, h5py.h5t.STR_SPACEPAD)
                compact(file, "y", np.char.ljust(values, 9), kind)
                assert file["y"][0] == b"a b"
            else:
                file.create_dataset("y", data=values, chunks=(5,) if split == "train" else None)
    expected = [word.decode() for split in ("train", "val", "test") for word in words[split]]
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        (name,) = _names(feed)
        dataset = feed[name]
        rows = np.random.default_rng(1).permutation(len(expected))
        assert dataset.take(rows, fields=["y"]).text("y") == [expected[row] for row in rows]
        classes = dataset.splits()["splits"]["all"]["classes"]
        assert {entry["value"] for entry in classes} == set(expected)
        found = [word for batch in dataset.batches("test", batch_size=3, fields=["y"]) for word in batch.text("y")]
        assert found == [word.decode() for word in words["test"]]


def test_one_string_a_row_along_two_axes(serve: Serve, tmp_path: Path) -> None:
    """(rows, 1) is one string a row, of fixed length or not, stored in any way; (rows, 2) is refused."""
    words = [[b"cat"], [b"dog"]] * 12
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["fixed"], file["two"] = np.zeros((24, 3)), np.array(words), np.array(words).repeat(2, 1)
        file.create_dataset("deep", data=np.array(words)[..., None], chunks=(5, 1, 1), compression="gzip")
        file.create_dataset("any", data=np.array(words, object), dtype=h5py.string_dtype())
        compact(file, "padded", np.char.ljust(np.array(words), 5), text(5, h5py.h5t.STR_SPACEPAD))
        kind = np.dtype([("n", "i4"), ("label", "S3", (1,))])
        file["table"] = np.array([(row, word) for row, word in enumerate(words)], kind)
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        dataset = feed["a"]
        for name in ("fixed", "deep", "any", "padded", "table.label"):
            assert dataset.fields[name].shape == ()
            assert dataset.take([3, 0, 3], fields=[name]).text(name) == ["dog", "cat", "dog"], name
        assert "more than one string per row" in str(dataset.fields["two"].reason)


def test_text_of_a_fixed_length_beside_text_of_any(serve: Serve, tmp_path: Path) -> None:
    """They are read in two ways: refused with that reason, also where the fixed length is 1."""
    for number, width in enumerate((1, 3)):
        for split, rows in (("train", 12), ("test", 6)):
            with h5py.File(tmp_path / f"{'ab'[number]}_{split}.h5", "w") as file:
                file["x"], said = np.zeros((rows, 2)), ["c" * width, "d" * width] * (rows // 2)
                file.create_dataset("y", data=said, dtype=f"S{width}" if split == "train" else h5py.string_dtype())
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        for name in "ab":
            field = feed[name].fields["y"]
            assert not field.readable and "text of a fixed length, others of variable" in str(field.reason)


@pytest.mark.parametrize("kind", ["groups", "names", "files", "text", "nested"])
def test_splits_without_a_label(serve: Serve, tmp_path: Path, kind: str) -> None:
    """train has x and y, test has x alone: those of train are a dataset, those of test another, and both say so."""
    for split, rows in (("train", 24), ("test", 8)):
        with h5py.File(tmp_path / (f"a_{split}.h5" if kind == "files" else "a.h5"), "a") as file:
            place = {"files": "{}", "names": f"{{}}_{split}", "nested": f"{split}/in/{{}}"}.get(kind, f"{split}/{{}}")
            file[place.format("x")] = np.full((rows, 3), rows)
            label = np.array([b"cat", b"dog"] * 12) if kind == "text" else np.arange(24) % 3
            if split == "train":
                file[f"{split}/y" if kind == "nested" else place.format("y")] = label
            else:
                file[place.format("id")] = np.arange(rows)
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        train, own = feed["a"], "a.test.in" if kind == "nested" else "a.test"
        test = feed[own]
        assert sorted(_names(feed)) == ["a", own]
        assert train.rows == 24 and {field.role for field in train.fields.values()} == {"input", "label"}
        assert test.rows == 8 and all(field.readable for field in test.fields.values())
        x = next(name for name in test.fields if name.endswith("x"))
        assert test.take([0], fields=[x])[x].tolist() == [[8, 8, 8]]
        assert "'test' have no label" in train.info["notes"][0] and "no label" in test.info["notes"][0]
        assert {split["name"] for split in train.info["native_splits"]} == {"train"}


@pytest.mark.parametrize(
    ("padding", "stored"),
    [(h5py.h5t.STR_NULLTERM, b"ab\0zzA"), (h5py.h5t.STR_SPACEPAD, b"ab    ")],
    ids=["nullterm", "spacepad"],
)
def test_text_of_samples_is_padded_as_their_files_say(
    serve: Serve, tmp_path: Path, padding: int, stored: bytes
) -> None:
    """A scalar of fixed text in each file is what h5py gives, when files are rows."""
    for number in range(4):
        with h5py.File(tmp_path / f"v_{number}.h5", "w") as file:
            file["image"], file["mask"] = np.full((8, 8, 3), number, np.uint8), np.zeros((8, 8), np.uint8)
            kind = text(6, padding)
            made = h5py.h5d.create(file.id, b"who", kind, h5py.h5s.create(h5py.h5s.SCALAR))
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array(stored, "S6"), mtype=kind)
            assert file["who"][()] == b"ab"
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        batch = feed["v"].take([3, 0], fields=["who", "image"])
        assert batch.text("who") == ["ab", "ab"]
        assert batch["image"][:, 0, 0, 0].tolist() == [3, 0]


def test_complex_scalars_of_samples(serve: Serve, tmp_path: Path) -> None:
    """A complex number in each file is a value a row, when files are rows."""
    for number in range(4):
        with h5py.File(tmp_path / f"v_{number}.h5", "w") as file:
            file["image"], file["mask"] = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
            file["gain"], file["pair"] = np.complex64(number - 2j), np.array((1, 2), [("a", "i4"), ("b", "i4")])
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        np.testing.assert_array_equal(feed["v"].take([3, 0], fields=["gain"])["gain"], [[3, -2], [0, -2]])
        assert "no rows" in (feed["v"].fields["pair"].reason or "")


def test_pieces_whose_channels_differ(serve: Serve, tmp_path: Path) -> None:
    """Red is not first in all of them: refused."""
    for part, order in (("part_1", "rgb"), ("part_2", "bgr")):
        with h5py.File(tmp_path / f"{part}.h5", "w") as file:
            file["image"] = np.zeros((20, 8, 8, 3), np.uint8)
            file["image"].attrs["channels"], file["label"] = order, np.arange(20) % 2
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        (name,) = _names(feed)
        field = feed[name].fields["image"]
        assert not field.readable and "channels of its pieces are in different orders" in (field.reason or "")


def test_pieces_whose_numbers_mean_other_classes(serve: Serve, tmp_path: Path) -> None:
    """The same number under other names, by an enum, an attribute or a list beside it, is no label."""
    names = {"part_1": ["cat", "dog"], "part_2": ["dog", "cat"]}
    for folder in ("attribute", "list", "enum"):
        (tmp_path / folder).mkdir()
        for part, classes in names.items():
            with h5py.File(tmp_path / folder / f"{part}.h5", "w") as file:
                rows = 20 if part == "part_1" else 21
                file["x"] = np.zeros((rows, 3))
                kind = h5py.enum_dtype({name: i for i, name in enumerate(classes)}, "i4") if folder == "enum" else "i4"
                file.create_dataset("y", data=np.zeros(rows, "i4"), dtype=kind)
                if folder == "attribute":
                    file["y"].attrs["class_names"] = classes
                elif folder == "list":
                    file["list_classes"] = np.array(classes, "S")
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        for folder in ("attribute", "list", "enum"):
            field = feed[f"{folder}.part" if f"{folder}.part" in _names(feed) else folder].fields["y"]
            assert not field.readable and "different classes" in (field.reason or ""), folder


def _names(feed: h5feed.Feed) -> list[str]:
    return [entry["name"] for entry in feed.datasets()]


def test_a_matrix_is_turned_as_those_it_shares_rows_with(serve: Serve, tmp_path: Path) -> None:
    """MATLAB's 4 × 4 matrix beside a column of 4 labels: its rows are MATLAB's, not HDF5's."""
    x = np.arange(16.0).reshape(4, 4)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["X"], file["y"] = x.T, np.array([[0.0, 1, 0, 1]])
        for name in ("X", "y"):
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    with h5py.File(tmp_path / "n.h5", "w") as file:
        file["X"], file["y"] = np.arange(50.0).reshape(10, 5), np.array([[0.0, 1, 0, 1, 1]])
        file["mu"], file["sigma"] = np.zeros((1, 10)), np.ones((1, 10))
        for name in file:
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        np.testing.assert_array_equal(feed["m"].take([1, 3], fields=["X"])["X"], x[[1, 3]])
        assert feed["n"].rows == 5
        np.testing.assert_array_equal(feed["n"].take([2], fields=["X"])["X"][0], np.arange(50.0).reshape(10, 5)[:, 2])


def test_masks_that_files_do_not_agree_in(serve: Serve, tmp_path: Path) -> None:
    """Lists of episodes that differ from file to file are not followed, and the dataset says so."""
    for run, train in (("run_1", ["demo_0", "demo_1"]), ("run_2", ["demo_1", "demo_2"])):
        with h5py.File(tmp_path / f"{run}.h5", "w") as file:
            for demo in range(3):
                file[f"data/demo_{demo}/actions"] = np.zeros((len(run) + demo + (run == "run_2"), 2))
            file["mask/train"] = np.array(train, "S")
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        dataset = feed["run"]
        assert dataset.info["native_splits"] == []
        assert any("mask/train" in note for note in dataset.info["notes"])


def test_names_of_classes_that_are_declared_in_another_order(serve: Serve, tmp_path: Path) -> None:
    """Arrays cat, dog and owl are 0, 1 and 2: the same names in another order would be wrong ones."""
    with h5py.File(tmp_path / "pets.h5", "w") as file:
        for number, name in enumerate(("cat", "dog", "owl")):
            file[name] = np.full((5 + number, 4, 4), number, np.uint8)
    (tmp_path / "h5feed.toml").write_text(
        '[datasets.a]\nfiles = ["pets.h5"]\nclasses = true\nclass_names = ["owl", "dog", "cat"]\n'
    )
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        with pytest.raises(Unreadable, match='"cat", "dog", "owl"'):
            feed["a"]
        (tmp_path / "h5feed.toml").write_text(
            '[datasets.a]\nfiles = ["pets.h5"]\nclasses = true\nclass_names = ["Katze", "Hund", "Eule"]\n'
        )
        assert feed["a"].class_names == ["Katze", "Hund", "Eule"]


def test_declared_files_follow_each_other_by_number(serve: Serve, tmp_path: Path) -> None:
    """v_2 comes before v_10; and a file that is called like a half is none where no other half is there."""
    for number in (1, 2, 10):
        with h5py.File(tmp_path / f"v_{number}.h5", "w") as file:
            file["image"] = np.full((3, 4, 4), number, np.uint8)
    for name in ("dogs", "cats_data"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["image"] = np.zeros((3, 4, 4), np.uint8)
    (tmp_path / "h5feed.toml").write_text(
        '[datasets.v]\nfiles = ["v_*.h5"]\nstack = false\n[datasets.pets]\nfiles = ["dogs.h5", "cats_data.h5"]\n'
    )
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        assert feed["v"].take(range(9))["image"][:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 10, 10, 10]
        assert feed["pets"].rows == 6


def test_names_that_order_alike_are_ordered_all_the_same(serve: Serve, tmp_path: Path) -> None:
    """s_1, s_01 and s_001 are one number: every process puts them in one order."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number, name in enumerate(("s_1", "s_01", "s_001")):
            file[f"{name}/x"] = np.full((2, 3), number)
    orders = []
    for seed in ("1", "2", "3"):
        with h5feed.connect(serve(tmp_path, PYTHONHASHSEED=seed).url, deadline=60) as feed:
            orders.append(feed["a"].take(range(6), fields=["x"])["x"][:, 0].tolist())
    assert orders[0] == orders[1] == orders[2]
