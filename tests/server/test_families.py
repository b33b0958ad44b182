"""Files as people publish them: small replicas with the names, dtypes and axes of the originals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.inspected import inspected, stored_splits
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

random = np.random.default_rng(3)


def _images(rows: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return random.integers(0, 256, (rows, *shape), dtype=np.uint8)


def _patch_camelyon(folder: Path) -> None:
    for split, rows in (("train", 40), ("valid", 12), ("test", 14)):
        stem = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=_images(rows, 96, 96, 3), chunks=(8, 96, 96, 3), compression="gzip")
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file["y"] = random.integers(0, 2, (rows, 1, 1, 1), dtype=np.uint8)


def _radio_ml(folder: Path) -> None:
    with h5py.File(folder / "GOLD_XYZ_OSC.0001_1024.hdf5", "w") as file:
        file["X"] = random.standard_normal((60, 1024, 2)).astype("<f4")
        file["Y"] = np.eye(24, dtype=np.int64)[np.arange(60) % 24]
        file["Z"] = random.integers(-20, 30, (60, 1))


def _galaxy10(folder: Path) -> None:
    with h5py.File(folder / "Galaxy10.h5", "w") as file:
        file["images"] = _images(50, 69, 69, 3)
        file["ans"] = (np.arange(50) % 10).astype(np.uint8)


def _usps(folder: Path) -> None:
    with h5py.File(folder / "usps.h5", "w") as file:
        for split, rows in (("train", 73), ("test", 20)):
            group = file.create_group(split)
            group["data"] = random.random((rows, 256)).astype("<f4")
            group["target"] = random.integers(0, 10, rows)


def _catvnoncat(folder: Path) -> None:
    for split, rows in (("train", 21), ("test", 5)):
        with h5py.File(folder / f"{split}_catvnoncat.h5", "w") as file:
            file["list_classes"] = np.array([b"non-cat", b"cat"])
            file[f"{split}_set_x"] = _images(rows, 64, 64, 3)
            file[f"{split}_set_y"] = random.integers(0, 2, rows)


def _d4rl(folder: Path) -> None:
    with h5py.File(folder / "hopper_medium.hdf5", "w") as file:
        for name, shape in (("observations", (11,)), ("actions", (3,)), ("next_observations", (11,)), ("rewards", ())):
            file.create_dataset(name, data=random.standard_normal((100, *shape)).astype("<f4"), compression="gzip")
        file["terminals"], file["timeouts"] = np.zeros(100, bool), np.zeros(100, bool)
        file["infos/qpos"], file["infos/qvel"] = random.random((100, 6)), random.random((100, 6))
        file["metadata/algorithm"] = np.bytes_("SAC")
        file["metadata/policy/fc0/weight"] = random.random((16, 11)).astype("<f4")


def _robomimic(folder: Path) -> None:
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = 60
        for number, rows in enumerate((12, 9, 14, 8, 17, 5, 6, 7, 10, 11, 13)):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = rows
            demo["actions"] = np.full((rows, 7), number, np.float64)
            demo["dones"], demo["rewards"] = np.zeros(rows, np.int64), random.random(rows)
            for name in ("object", "robot0_eef_pos"):
                demo[f"obs/{name}"], demo[f"next_obs/{name}"] = random.random((2, rows, 10))
        file["mask/train"] = np.array([f"demo_{number}".encode() for number in range(11) if number % 5])
        file["mask/valid"] = np.array([b"demo_0", b"demo_5", b"demo_10"])


def _matlab(folder: Path) -> None:
    with h5py.File(folder / "digits_mat.h5", "w", userblock_size=512) as file:
        for name, data, kind in (
            ("X", random.random((20, 30)), b"double"),
            ("y", (np.arange(30) % 3).astype(float)[None], b"double"),
        ):
            file[name] = data
            file[name].attrs["MATLAB_class"] = np.bytes_(kind)
        file["#refs#/a"] = np.zeros(2, np.uint64)
    with open(folder / "digits_mat.h5", "r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(128))


def _pandas(folder: Path) -> None:
    kind = np.dtype([("index", "<i8"), ("values_block_0", "<f8", (3,)), ("values_block_1", "<i8", (1,))])
    rows = np.zeros(25, kind)
    rows["index"], rows["values_block_0"] = np.arange(25), random.random((25, 3))
    rows["values_block_1"] = random.integers(0, 5, (25, 1))
    with h5py.File(folder / "frame.h5", "w") as file:
        group = file.create_group("df")
        group.attrs["pandas_type"] = np.bytes_("frame_table")
        table = group.create_dataset(
            "table", data=rows, chunks=(10,), maxshape=(None,), shuffle=True, compression="gzip"
        )
        table.attrs["values_block_0_kind"] = np.bytes_(b"(lp0\nVa\np1\naVb\np2\naVc\np3\na.")
        table.attrs["values_block_1_kind"] = np.bytes_(b"(lp0\nVkind\np1\na.")
        file["df/_i_table/index/sorted"] = np.arange(7)


def _dogs_vs_cats(folder: Path) -> None:
    (folder / "dogs_vs_cats").mkdir()
    for split, rows in (("train", 30), ("val", 6), ("test", 6)):
        with h5py.File(folder / "dogs_vs_cats" / f"{split}.hdf5", "w") as file:
            file["images"] = random.random((rows, 32, 32, 3)).astype("<f4")
            file["labels"] = random.integers(0, 2, rows)


def _shards(folder: Path) -> None:
    for shard in range(3):
        with h5py.File(folder / f"sharded-{shard:05d}-of-00003.h5", "w") as file:
            file["image"] = _images(7 + shard, 8, 8, 3)
            file["label"] = np.full(7 + shard, shard)
    with h5py.File(folder / "gap-00000-of-00002.h5", "w") as file:
        file["x"] = np.zeros((3, 2))
    with h5py.File(folder / "gap-00001-of-00003.h5", "w") as file:
        file["x"] = np.zeros((3, 2))


def _odd(folder: Path) -> None:
    with h5py.File(folder / "tables.h5", "w") as file:
        file["people/age"], file["people/height"] = np.arange(11), np.arange(11.0)
        file["cities/size"], file["cities/area"] = np.arange(4), np.arange(4.0)
    with h5py.File(folder / "declared_raw.h5", "w") as file:
        file["deep/a"], file["deep/b"], file["c"] = np.arange(12.0).reshape(6, 2), np.arange(6) % 2, np.arange(9)
    compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    compact.set_layout(h5py.h5d.COMPACT)
    with h5py.File(folder / "compact.h5", "w", track_order=True) as file:
        values = np.arange(20, dtype=">i2").reshape(10, 2)
        space = h5py.h5s.create_simple(values.shape)
        kind = h5py.h5t.py_create(values.dtype)
        h5py.h5d.create(file.id, b"x", kind, space, compact).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
        file["kinds"] = np.array([b"a", b"b"] * 5)
        file["linked"] = h5py.SoftLink("/x")
        file["nowhere"] = h5py.SoftLink("/not/there")
        file["loop"] = file["/"]
        file["outside"] = h5py.ExternalLink("/etc/passwd", "/x")
    (folder / "h5feed.toml").write_text(
        "[datasets.declared]\n"
        'files = ["declared_*.h5"]\n'
        'fields = { point = "deep/a", kind = "deep/b" }\n'
        'roles = { kind = "label" }\n'
        'class_names = ["left", "right"]\n'
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for write in (
        _patch_camelyon,
        _radio_ml,
        _galaxy10,
        _usps,
        _catvnoncat,
        _d4rl,
        _robomimic,
        _matlab,
        _pandas,
        _dogs_vs_cats,
        _shards,
        _odd,
    ):
        write(folder)
    return folder


@pytest.fixture(scope="module")
def families(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Feed]:
    with inspected(data, tmp_path_factory.mktemp("cache")) as connected:
        yield connected


def _roles(dataset: h5feed.Dataset) -> dict[str, str]:
    return {field.name: field.role for field in dataset.fields.values() if field.readable}


def test_everything_is_listed_once(families: h5feed.Feed) -> None:
    """Files that belong together are one dataset; several tables in a file are several."""
    names = {entry["name"] for entry in families.datasets()}
    assert names == {
        "GOLD_XYZ_OSC.0001_1024",
        "Galaxy10",
        "camelyonpatch_level_2_split",
        "catvnoncat",
        "compact",
        "declared",
        "digits_mat",
        "dogs_vs_cats",
        "frame",
        "gap",
        "hopper_medium",
        "low_dim",
        "sharded",
        "tables.cities",
        "tables.people",
        "usps",
    }


def test_inputs_and_labels_in_two_files(families: h5feed.Feed, data: Path) -> None:
    """PatchCamelyon: six files, three native splits, gzip chunks of several images, labels with axes of one."""
    dataset = families["camelyonpatch_level_2_split"]
    assert stored_splits(dataset) == {"train": 40, "val": 12, "test": 14}
    assert _roles(dataset) == {"x": "input", "y": "label"}
    with h5py.File(data / "camelyonpatch_level_2_split_valid_x.h5") as file:
        expected = file["x"][:]
    with h5py.File(data / "camelyonpatch_level_2_split_valid_y.h5") as file:
        labels = file["y"][:]
    batches = list(dataset.batches("validation", batch_size=5))
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), expected)
    np.testing.assert_array_equal(np.concatenate([batch["y"] for batch in batches]), labels)
    mixed = dataset.take([65, 0, 39, 40, 0])
    with h5py.File(data / "camelyonpatch_level_2_split_train_x.h5") as file:
        np.testing.assert_array_equal(mixed["x"][[1, 2]], file["x"][[0, 39]])
    np.testing.assert_array_equal(mixed["x"][3], expected[0])


def test_one_hot_labels_are_stratified_by(families: h5feed.Feed) -> None:
    """RadioML: X, one-hot Y, Z."""
    dataset = families["GOLD_XYZ_OSC.0001_1024"]
    assert _roles(dataset) == {"X": "input", "Y": "label", "Z": "other"}
    splits = dataset.splits(test=24)
    assert splits["stratify"] == "Y"
    assert {entry["rows"] for entry in splits["splits"]["test"]["classes"]} == {1}


def test_the_only_integers_are_the_label(families: h5feed.Feed) -> None:
    """Galaxy10: the labels are called ``ans``."""
    dataset = families["Galaxy10"]
    assert _roles(dataset) == {"images": "input", "ans": "label"}
    assert "only" in next(field["role_reason"] for field in dataset.info["fields"] if field["name"] == "ans")


def test_groups_are_native_splits(families: h5feed.Feed, data: Path) -> None:
    """USPS: groups train and test; a validation split is carved out of train, test stays as it is."""
    dataset = families["usps"]
    assert stored_splits(dataset) == {"train": 73, "test": 20}
    assert _roles(dataset) == {"data": "input", "target": "label"}
    with h5py.File(data / "usps.h5") as file:
        np.testing.assert_array_equal(dataset.batch(0, split="test", batch_size=20)["data"], file["test/data"][:])
    rows = {split: dataset.split_rows(split, val=0.2) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 58, "val": 15, "test": 20}
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(93))
    np.testing.assert_array_equal(rows["test"], np.arange(73, 93))


def test_prefixes_and_class_names(families: h5feed.Feed) -> None:
    """catvnoncat: ``train_set_x`` in one file, ``test_set_x`` in the other, names of classes in a list beside."""
    dataset = families["catvnoncat"]
    assert stored_splits(dataset) == {"train": 21, "test": 5}
    assert _roles(dataset) == {"x": "input", "y": "label"}
    assert dataset.class_names == ["non-cat", "cat"]


def test_nested_groups_of_the_same_rows(families: h5feed.Feed) -> None:
    """D4RL: ``infos/qpos`` belongs to the rows of the root; weights of a policy do not."""
    dataset = families["hopper_medium"]
    assert dataset.rows == 100
    assert {"observations", "actions", "rewards", "terminals", "infos.qpos", "infos.qvel"} <= set(_roles(dataset))
    assert not any("weight" in name for name in _roles(dataset))


def test_one_group_for_each_episode(families: h5feed.Feed, data: Path) -> None:
    """robomimic: episodes follow each other by number, masks name those of each split."""
    dataset = families["low_dim"]
    assert dataset.rows == 112
    assert set(_roles(dataset)) >= {"actions", "dones", "rewards", "obs.object", "next_obs.robot0_eef_pos"}
    actions = np.concatenate([b["actions"] for b in dataset.batches(batch_size=50, fields=["actions"])])
    lengths = (12, 9, 14, 8, 17, 5, 6, 7, 10, 11, 13)
    np.testing.assert_array_equal(actions[:, 0], np.repeat(np.arange(11), lengths))
    assert stored_splits(dataset) == {"train": 82, "val": 30}
    held = np.concatenate([b["actions"] for b in dataset.batches("val", batch_size=50, fields=["actions"])])
    assert set(held[:, 0]) == {0, 5, 10}


def test_matlab_matrices(families: h5feed.Feed, data: Path) -> None:
    """MATLAB v7.3: a matrix of 30 rows is stored with its axes in reverse, and said to be."""
    dataset = families["digits_mat"]
    assert dataset.rows == 30
    with h5py.File(data / "digits_mat.h5") as file:
        batch = dataset.take([29, 0, 7])
        np.testing.assert_array_equal(batch["X"], file["X"][:].T[[29, 0, 7]])
        np.testing.assert_array_equal(batch["y"][:, 0], file["y"][0][[29, 0, 7]])
    notes = {field["name"]: field["note"] for field in dataset.info["fields"]}
    assert "MATLAB" in notes["X"]
    assert dataset.splits(test=6)["stratify"] == "y"


def test_tables_of_records(families: h5feed.Feed, data: Path) -> None:
    """pandas' table: each column of the frame is a field, whatever block of the records it lies in."""
    dataset = families["frame"]
    with h5py.File(data / "frame.h5") as file:
        table = file["df/table"][:]
    rows = [24, 3, 3]
    batch = dataset.take(rows, fields=["a", "b", "c", "kind", "index"])
    np.testing.assert_array_equal(np.stack([batch[name] for name in "abc"], 1), table["values_block_0"][rows])
    np.testing.assert_array_equal(batch["kind"], table["values_block_1"][rows, 0])
    np.testing.assert_array_equal(batch["index"], table["index"][rows])


def test_a_file_for_each_split(families: h5feed.Feed, data: Path) -> None:
    """dogs-vs-cats: train.hdf5, val.hdf5 and test.hdf5 in one folder."""
    dataset = families["dogs_vs_cats"]
    assert stored_splits(dataset) == {"train": 30, "val": 6, "test": 6}
    assert dataset.info["files"] == [f"dogs_vs_cats/{split}.hdf5" for split in ("train", "val", "test")]
    with h5py.File(data / "dogs_vs_cats" / "val.hdf5") as file:
        np.testing.assert_array_equal(dataset.batch(0, split="val", batch_size=6)["images"], file["images"][:])


def test_shards(families: h5feed.Feed) -> None:
    """Shards follow each other by number; one that is missing is said to be."""
    dataset = families["sharded"]
    assert dataset.rows == 24
    np.testing.assert_array_equal(dataset.take(range(24))["label"], np.repeat([0, 1, 2], [7, 8, 9]))
    with pytest.raises(h5feed.errors.Unreadable, match="shard 00002 of 00003 is missing"):
        families["gap"]


def test_compact_linked_and_looping(families: h5feed.Feed) -> None:
    """Compact arrays and soft links are read; links out of the file, into nowhere and in circles are not followed."""
    dataset = families["compact"]
    expected = np.arange(20).reshape(10, 2)[[9, 0, 9]]
    batch = dataset.take([9, 0, 9], fields=["x", "linked"])
    np.testing.assert_array_equal(batch["x"], expected)
    np.testing.assert_array_equal(batch["linked"], expected)
    reasons = {field.name: field.reason for field in dataset.fields.values() if not field.readable}
    assert "outside the data folder" in str(reasons["outside"])
    assert "broken link" in str(reasons["nowhere"])
    assert not any(name.startswith("loop") for name in dataset.fields)
    assert dataset.splits(test=2, stratify="kinds")["stratify"] == "kinds"


def test_declared_files_follow_each_other(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Files of one declared dataset, in the order declared; a key that does not exist is said to."""
    (tmp_path / "raw").mkdir()
    for number, name in enumerate(("b", "a", "c")):
        with h5py.File(tmp_path / "raw" / f"pets_{name}.h5", "w") as file:
            file["x"], file["y"] = np.full((3, 2), number), np.arange(3)
    declaration = tmp_path / "h5feed.toml"
    declaration.write_text('[datasets.pets]\nfiles = ["raw/pets_b.h5", "raw/pets_*.h5"]\n')
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        assert feed["pets"].take(range(9))["x"][:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        declaration.write_text('[datasets.pets]\nfile = ["x.h5"]\n')
        wait_until(lambda: "did you mean 'files'?" in str([entry["reason"] for entry in feed.datasets()]))


def test_declared(families: h5feed.Feed) -> None:
    """h5feed.toml names the fields, their roles and the classes."""
    dataset = families["declared"]
    assert _roles(dataset) == {"point": "input", "kind": "label"}
    assert dataset.class_names == ["left", "right"]
    np.testing.assert_array_equal(dataset.take([5])["point"], [[10.0, 11.0]])
