"""Which arrays are fields of one dataset, in which order rows follow: published layouts, small, and what is alike."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import Unreadable

from tests.support.inspected import inspected, readable_fields, stored_splits
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

random = np.random.default_rng(11)

Arrays = dict[str, npt.NDArray[Any]]


def _images(rows: int, *shape: int) -> npt.NDArray[np.uint8]:
    return random.integers(0, 256, (rows, *shape), dtype=np.uint8)


def _write(path: Path, arrays: dict[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            kept = options if np.ndim(values) else {}
            file.create_dataset(name, data=values, **kept)


def _slices(folder: Path) -> None:
    for volume in (1, 2):
        for number in range(12):
            arrays = {"image": random.random((24, 20, 4)), "mask": random.integers(0, 2, (24, 20, 3), dtype="u1")}
            _write(folder / f"brats/volume_{volume}_slice_{number}.h5", arrays)
    for patient, shape in ((1, (32, 24)), (2, (24, 32))):
        for number in range(3):
            arrays = {"image": random.random(shape), "label": random.integers(0, 4, shape, dtype="u1")}
            _write(folder / f"acdc/patient{patient:03d}_slice_{number}.h5", arrays, compression="gzip")
    for split, scene in (("train", "bathroom_0001"), ("train", "kitchen_0003"), ("val", "official")):
        for number in range(1, 5):
            arrays = {"rgb": _images(3, 24, 32), "depth": random.random((24, 32)).astype("f4")}
            _write(folder / f"nyudepthv2/{split}/{scene}/{number:05d}.h5", arrays)
    for number in range(5):
        arrays = {"points": random.random((64, 3)), "label": np.int64(number % 2), "name": f"object {number * 7}"}
        _write(folder / f"clouds/cloud_{number}.h5", arrays, chunks=(10, 2), compression="gzip")
    for number in range(4):
        arrays = {"image": _images(6, 16, 16), "mask": _images(6, 16, 16)}
        _write(folder / f"volumes/case_{number}.h5", arrays)


def _parts(folder: Path) -> None:
    for split, count in (("train", 11), ("test", 2)):
        for part in range(count):
            rows = 5 if part < count - 1 else 3
            arrays = {
                "data": np.full((rows, 16, 3), part, "f4"),
                "faceId": random.integers(0, 99, (rows, 16), dtype="i4"),
                "label": np.full((rows, 1), part, "u1"),
                "normal": random.random((rows, 16, 3)).astype("f4"),
            }
            _write(folder / f"modelnet40/ply_data_{split}{part}.h5", arrays)
    for part in (0, 1, 2, 4):
        arrays = {"exam_id": np.arange(7) + 100 * part, "tracings": random.random((7, 32, 12)).astype("f4")}
        _write(folder / f"code15/exams_part{part}.hdf5", arrays)
    for split, rows in (("train", 9), ("val", 4)):
        arrays = {"image_features": random.random((rows, 36, 8)), "spatial_features": random.random((rows, 36, 6))}
        _write(folder / f"vqa/{split}36.hdf5", arrays)
    for number, kind in enumerate("gqtwz"):
        arrays = {
            "particle_features": random.random((4 + number, 30, 4)),
            "jet_features": random.random((4 + number, 4)),
        }
        _write(folder / f"jetnet/{kind}.hdf5", arrays)
    for number, width in enumerate((12, 14, 12), 1000001):
        _write(
            folder / f"fastmri/singlecoil_train/file{number}.h5", {"kspace": random.random((5 + number % 2, 16, width))}
        )


def _groups(folder: Path) -> None:
    people = ("alice", "bob", "carol")
    for name, lengths in (("agree", (6, 6, 6)), ("differ", (4, 7, 5))):
        arrays: dict[str, Any] = {}
        for number, (who, rows) in enumerate(zip(people, lengths, strict=True)):
            arrays |= {f"{who}/eeg": np.full((rows, 16, 4), number, "f4"), f"{who}/y": np.arange(rows) % 2}
        _write(folder / f"{name}.h5", arrays)
    for split, extra in (("train", 3), ("test", 1)):
        arrays = {}
        for client in range(120):
            rows = extra + client % 3
            arrays[f"examples/f{client:04d}_{14 + client % 40}/label"] = np.full(rows, client % 10, "i4")
            arrays[f"examples/f{client:04d}_{14 + client % 40}/pixels"] = random.random((rows, 8, 8)).astype("f4")
        _write(folder / f"fed_emnist_{split}.h5", arrays)
    _write(folder / "runs.h5", {"run1/images": _images(6, 8, 8, 3), "run2/masks": _images(6, 8, 8)})
    sessions = {f"s{subject}/day{day}/x": np.full((3, 2), 10 * subject + day) for subject in (1, 2) for day in (2, 10)}
    _write(folder / "sessions.h5", sessions)
    samples: dict[str, np.ndarray[Any, Any]] = {}
    for number in range(5):
        samples |= {f"{number:05d}/rgb": _images(3, 12, 16), f"{number:05d}/depth": random.random((12, 16))}
    _write(folder / "scenes.h5", samples)
    clips: dict[str, np.ndarray[Any, Any]] = {}
    for video in range(1, 4):
        rows = 10 + video
        clips |= {f"video_{video}/features": random.random((rows, 8)), f"video_{video}/gtscore": random.random(rows)}
        clips |= {f"video_{video}/user_summary": random.random((5, rows * 15))}
        clips |= {f"video_{video}/n_frames": np.array(rows * 15)}
    _write(folder / "tvsum.h5", clips)


def _arrays(folder: Path) -> None:
    counts = {"owl": 3, "cat": 5, "dog": 4}
    _write(folder / "pets.h5", {name: _images(rows, 8, 8, 3) for name, rows in counts.items()})
    _write(folder / "even.h5", {name: _images(4, 8, 8, 3) for name in counts})
    both = {
        f"{split}/{name}": _images(rows + (split == "train"), 8, 8)
        for split in ("train", "test")
        for name, rows in counts.items()
    }
    _write(folder / "split_pets.h5", both)
    arrays = {"train": random.random((50, 25)).astype("f4"), "test": random.random((6, 25)).astype("f4")}
    arrays |= {
        "neighbors": random.integers(0, 50, (6, 10), dtype="i4"),
        "distances": random.random((6, 10)).astype("f4"),
    }
    _write(folder / "glove-25-angular.hdf5", arrays)
    _write(folder / "sevir_lght.h5", {f"S{700000 + number}": random.random((3 + number % 4, 5)) for number in range(6)})
    with h5py.File(folder / "mnist.hdf5", "w") as file:
        file["features"], file["targets"] = _images(14, 1, 8, 8), (np.arange(14) % 10).astype("u1")[:, None]
        dtype = [("split", "S5"), ("source", "S8"), ("start", "i8"), ("stop", "i8")]
        dtype += [("indices", h5py.ref_dtype), ("available", "?"), ("comment", "S1")]
        entries = np.zeros(4, dtype)
        for place, (split, source, start, stop) in enumerate(
            (s, f, *r) for s, r in (("train", (0, 12)), ("test", (12, 14))) for f in ("features", "targets")
        ):
            entries[place] = (split, source, start, stop, h5py.Reference(), True, b"")
        file.attrs["split"] = entries
        file.copy("features", file, "unused")
        del file["unused"]
    with h5py.File(folder / "by_reference.hdf5", "w") as file:
        file["features"], file["targets"] = _images(8, 2, 2), np.arange(8)
        rows = file.create_dataset("metadata/rows", data=np.arange(8))
        entries = np.zeros(2, dtype)
        for place, source in enumerate(("features", "targets")):
            entries[place] = ("train", source, 0, 0, rows.ref, True, b"")
        file.attrs["split"] = entries


def _weights(folder: Path) -> None:
    with h5py.File(folder / "m.h5", "w") as file:
        file.attrs["keras_version"], file.attrs["model_config"], file.attrs["backend"] = "3.0.0", "{}", "jax"
        file["model_weights/dense/dense/kernel"] = random.random((4, 3))
        file["model_weights/dense/dense/bias"] = random.random(3)
    _write(
        folder / "new.weights.h5",
        {"layers/dense/vars/0": random.random((4, 3)), "layers/dense/vars/1": random.random(3)},
    )
    with h5py.File(folder / "old_weights.h5", "w") as file:
        file.attrs["keras_version"], file.attrs["layer_names"] = "2.15.0", np.array([b"dense"])
        file["dense/dense/kernel:0"] = random.random((4, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grouping")
    for write in (_slices, _parts, _groups, _arrays, _weights):
        write(folder)
    return folder


@pytest.fixture(scope="module")
def feed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Feed]:
    with inspected(data, tmp_path_factory.mktemp("cache")) as connected:
        yield connected


def _read(path: Path, name: str) -> npt.NDArray[Any]:
    with h5py.File(path) as file:
        return np.asarray(file[name][()])


def _reason(feed: h5feed.Feed, name: str) -> str:
    with pytest.raises(Unreadable) as raised:
        feed[name]
    assert str(raised.value)[-1] == ")" or "not data" in str(raised.value), raised.value
    return str(raised.value)


def test_everything_is_listed(feed: h5feed.Feed, data: Path) -> None:
    """Every file is in a line of the listing, and no name is there twice."""
    listed = feed.datasets()
    names = [entry["name"] for entry in listed]
    assert len(names) == len(set(names))
    files = {file for entry in listed for file in entry["files"]}
    assert files == {path.relative_to(data).as_posix() for path in data.rglob("*.h*5")}


def test_one_sample_a_file(feed: h5feed.Feed, data: Path) -> None:
    """BraTS: ``image (H,W,4)`` and ``mask (H,W,3)`` in a file are one row, in the order of the numbers in its name."""
    dataset = feed["brats.volume_slice"]
    assert dataset.rows == 24
    rows = [13, 0, 10, 23, 0]
    batch = dataset.take(rows, fields=["image", "mask", "file"])
    assert batch.text("file")[:3] == ["volume_2_slice_1", "volume_1_slice_0", "volume_1_slice_10"]
    for place, name in enumerate(batch.text("file")):
        for field in ("image", "mask"):
            np.testing.assert_array_equal(batch[field][place], _read(data / "brats" / f"{name}.h5", field))
    seen = [row for batch in dataset.batches(batch_size=7, shuffle=True) for row in batch.rows.tolist()]
    assert sorted(seen) == list(range(24))


def test_folders_of_samples_are_splits(feed: h5feed.Feed, data: Path) -> None:
    """fast-depth: ``train/SCENE/00001.h5``, ``val/official/00001.h5``: native splits, named rows, (3,H,W) and (H,W)."""
    dataset = feed["nyudepthv2"]
    assert stored_splits(dataset) == {"train": 8, "val": 4}
    batch = dataset.take([11, 4], fields=["rgb", "depth", "file"])
    assert batch.text("file") == ["official/00004", "kitchen_0003/00001"]
    for field in ("rgb", "depth"):
        np.testing.assert_array_equal(batch[field][0], _read(data / "nyudepthv2/val/official/00004.h5", field))
        np.testing.assert_array_equal(batch[field][1], _read(data / "nyudepthv2/train/kitchen_0003/00001.h5", field))


def test_scalars_of_samples_are_values(feed: h5feed.Feed, data: Path) -> None:
    """A label and a text in each file are one value a row; chunks that hang over the edge are put together."""
    dataset = feed["clouds.cloud"]
    batch = dataset.take([4, 0, 3], fields=["points", "label", "name", "file"])
    assert batch["label"].tolist() == [0, 0, 1]
    assert batch.text("name") == ["object 28", "object 0", "object 21"]
    assert batch.text("file") == ["cloud_4", "cloud_0", "cloud_3"]
    np.testing.assert_array_equal(batch["points"][0], _read(data / "clouds/cloud_4.h5", "points"))
    assert dataset.fields["label"].role == "label"


def test_samples_of_several_shapes_are_refused(feed: h5feed.Feed) -> None:
    """ACDC: slices of two shapes are not served as image lines, and the listing says which shapes."""
    reason = _reason(feed, "acdc.patient_slice")
    assert "image [24, 32], image [32, 24]" in reason
    assert "stack = true" in reason and "stack = false" in reason


def test_in_doubt_toml_decides(
    feed: h5feed.Feed, data: Path, serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """``image`` and ``mask`` of (6,16,16) may be slices or volumes: the lines of the listing are TOML that decides."""
    reason = _reason(feed, "volumes.case")
    lines = [line.split(" (")[0] for line in reason.split("to h5feed.toml: ")[1].split(" or ")]
    for number in range(4):
        (tmp_path / "volumes").mkdir(exist_ok=True)
        (tmp_path / f"volumes/case_{number}.h5").write_bytes((data / f"volumes/case_{number}.h5").read_bytes())
    shapes = {}
    with h5feed.connect(serve(tmp_path).url, deadline=60) as served:
        for line in lines:
            assert tomllib.loads(line)
            (tmp_path / "h5feed.toml").write_text(line)
            wait_until(lambda: [entry.get("rows") for entry in served.datasets()] in ([4], [24]))
            wait_until(lambda: served["volumes.case"].rows not in shapes)
            dataset = served["volumes.case"]
            shapes[dataset.rows] = dataset.take([dataset.rows - 1])["image"].shape
    assert shapes == {4: (1, 6, 16, 16), 24: (1, 16, 16)}


def test_several_files_of_one_dataset(feed: h5feed.Feed) -> None:
    """ModelNet40: ``ply_data_train0`` … ``10``, ``ply_data_test0,1``: splits by word, parts by number."""
    dataset = feed["modelnet40.ply_data"]
    assert stored_splits(dataset) == {"train": 53, "test": 8}
    assert dataset.take(range(61))["label"][:, 0].tolist() == [
        *np.repeat(range(11), [5] * 10 + [3]).tolist(),
        *[0] * 5,
        *[1] * 3,
    ]


def test_numbered_parts(feed: h5feed.Feed) -> None:
    """CODE-15: parts follow each other by number; one that is missing between others is said to be."""
    dataset = feed["code15.exams"]
    ids = dataset.take(range(28), fields=["exam_id"])["exam_id"]
    np.testing.assert_array_equal(ids, np.concatenate([np.arange(7) + 100 * part for part in (0, 1, 2, 4)]))
    assert "number 3 is missing" in str(dataset.info["notes"])


def test_a_number_behind_the_split(feed: h5feed.Feed) -> None:
    """VQA: ``train36.hdf5`` and ``val36.hdf5`` are the splits of one dataset."""
    assert stored_splits(feed["vqa"]) == {"train": 9, "val": 4}


def test_a_file_for_each_class(feed: h5feed.Feed, data: Path) -> None:
    """JetNet: files of the same arrays, without labels, called by words: the file is the class."""
    dataset = feed["jetnet"]
    assert dataset.class_names == ["g", "q", "t", "w", "z"]
    batch = dataset.take(range(30))
    assert batch["label"].tolist() == np.repeat(range(5), [4, 5, 6, 7, 8]).tolist()
    np.testing.assert_array_equal(batch["jet_features"][9:15], _read(data / "jetnet/t.hdf5", "jet_features"))
    assert dataset.splits(test=5)["stratify"] == "label"


def test_files_of_other_row_shapes_stay_apart(feed: h5feed.Feed) -> None:
    """fastMRI: k-spaces of other widths, numbered names: a dataset each."""
    names = {entry["name"] for entry in feed.datasets() if entry["name"].startswith("fastmri")}
    assert names == {f"fastmri.singlecoil_train.file{number}" for number in (1000001, 1000002, 1000003)}


@pytest.mark.parametrize(("name", "lengths"), [("agree", (6, 6, 6)), ("differ", (4, 7, 5))])
def test_groups_of_the_same_members_are_episodes(feed: h5feed.Feed, name: str, lengths: tuple[int, ...]) -> None:
    """alice, bob and carol follow each other, whether their lengths agree or not; a field names them."""
    dataset = feed[name]
    batch = dataset.take(range(sum(lengths)), fields=["eeg", "y", "episode"])
    np.testing.assert_array_equal(batch["eeg"][:, 0, 0], np.repeat([0, 1, 2], lengths))
    assert batch.text("episode") == np.repeat(["alice", "bob", "carol"], lengths).tolist()
    assert dataset.fields["episode"].role == "other"
    assert dataset.fields["y"].role == "label"


def test_clients_in_two_files(feed: h5feed.Feed, data: Path) -> None:
    """FedEMNIST: 120 clients, a file for each split: two native splits, each client's rows in its order."""
    dataset = feed["fed_emnist"]
    assert stored_splits(dataset) == {"train": 480, "test": 240}
    batch = dataset.take([479, 0, 719], fields=["label", "pixels", "episode"])
    assert batch.text("episode")[:2] == ["f0119_53", "f0000_14"]
    np.testing.assert_array_equal(
        batch["pixels"][2], _read(data / "fed_emnist_test.h5", "examples/f0119_53/pixels")[-1]
    )
    groups = dataset.split_rows("test", test=0.2, folds=5, fold=0, group="episode")
    assert len(groups)


def test_groups_of_other_members_are_no_episodes(feed: h5feed.Feed, data: Path) -> None:
    """``run1/images`` and ``run2/masks`` of as many rows: a dataset each, and both are served."""
    np.testing.assert_array_equal(feed["runs.run1"].take([5])["images"][0], _read(data / "runs.h5", "run1/images")[5])
    assert feed["runs.run2"].rows == 6


def test_episodes_in_episodes(feed: h5feed.Feed) -> None:
    """Subjects and their days: one dataset, by number; the field says both names."""
    dataset = feed["sessions"]
    batch = dataset.take(range(12), fields=["x", "episode"])
    assert batch["x"][:, 0].tolist() == np.repeat([12, 20, 22, 30], 3).tolist()
    assert batch.text("episode")[::3] == ["s1/day2", "s1/day10", "s2/day2", "s2/day10"]


def test_groups_of_one_sample_each(feed: h5feed.Feed, data: Path) -> None:
    """``00001/rgb (3,H,W)``, ``00001/depth (H,W)`` in one file: a group is a row."""
    dataset = feed["scenes"]
    assert dataset.rows == 5
    np.testing.assert_array_equal(dataset.take([3])["rgb"][0], _read(data / "scenes.h5", "00003/rgb"))


def test_what_differs_between_episodes_is_listed(feed: h5feed.Feed) -> None:
    """TVSum: features and scores are served; summaries of other widths are listed with the reason."""
    dataset = feed["tvsum"]
    assert dataset.rows == 36
    assert {"features", "gtscore", "episode"} == readable_fields(dataset)
    assert "pieces differ" in str(dataset.fields["user_summary"].reason)


def test_an_array_for_each_class(feed: h5feed.Feed, data: Path) -> None:
    """``cat``, ``dog``, ``owl`` of other lengths: one dataset, their names are the classes."""
    dataset = feed["pets"]
    assert dataset.class_names == ["cat", "dog", "owl"]
    batch = dataset.take(range(12))
    assert batch["label"].tolist() == [0] * 5 + [1] * 4 + [2] * 3
    np.testing.assert_array_equal(batch["data"][5:9], _read(data / "pets.h5", "dog"))
    split = feed["split_pets"]
    assert stored_splits(split) == {"train": 15, "test": 12}
    assert split.take(range(15))["label"].tolist() == [0] * 6 + [1] * 5 + [2] * 4


def test_classes_of_as_many_rows_are_in_doubt(
    feed: h5feed.Feed, data: Path, serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """They may be fields as well: each of the two lines that the listing gives decides."""
    reason = _reason(feed, "even")
    classes, fields = (line.split(" (")[0] for line in reason.split("to h5feed.toml: ")[1].split(" or "))
    (tmp_path / "even.h5").write_bytes((data / "even.h5").read_bytes())
    (tmp_path / "h5feed.toml").write_text(classes)
    with h5feed.connect(serve(tmp_path).url, deadline=60) as served:
        assert served["even"].class_names == ["cat", "dog", "owl"]
        assert served["even"].rows == 12
        (tmp_path / "h5feed.toml").write_text(fields)
        wait_until(lambda: [entry.get("rows") for entry in served.datasets()] == [4])
        assert readable_fields(served["even"]) == {"cat", "dog", "owl"}


def test_nothing_is_dropped_for_being_smaller(feed: h5feed.Feed, data: Path) -> None:
    """ann-benchmarks: train and test are splits of one field; neighbors and distances a dataset of their own."""
    path = data / "glove-25-angular.hdf5"
    dataset = feed["glove-25-angular"]
    assert stored_splits(dataset) == {"train": 50, "test": 6}
    np.testing.assert_array_equal(dataset.take([50, 49])["data"][0], _read(path, "test")[0])
    beside = feed["glove-25-angular.distances"]
    assert readable_fields(beside) == {"neighbors", "distances"}
    np.testing.assert_array_equal(beside.take([5])["neighbors"][0], _read(path, "neighbors")[5])
    assert "a dataset of its own" in str(dataset.fields["neighbors"].reason)


def test_arrays_that_nobody_claims(feed: h5feed.Feed, data: Path) -> None:
    """SEVIR: numbered arrays of other lengths are a dataset each, also where two lengths agree by chance."""
    for number in range(6):
        name = f"S{700000 + number}"
        truth = _read(data / "sevir_lght.h5", name)
        got = feed[f"sevir_lght.{name}"].take(range(len(truth)), fields=[name])[name]
        np.testing.assert_array_equal(got, truth)


def test_fuel_names_its_splits_in_an_attribute(feed: h5feed.Feed) -> None:
    """Fuel's MNIST: rows from … to of each split; lists of rows by reference are not followed, and that is said."""
    assert stored_splits(feed["mnist"]) == {"train": 12, "test": 2}
    assert stored_splits(feed["by_reference"]) == {}
    assert "lists of rows" in str(feed["by_reference"].info["notes"])


@pytest.mark.parametrize("name", ["m", "new.weights", "old_weights"])
def test_weights_are_no_data(feed: h5feed.Feed, name: str) -> None:
    """What Keras 2 and 3 save is listed with that reason."""
    assert "weights of a Keras model" in _reason(feed, name)
    assert [entry["status"] for entry in feed.datasets() if entry["name"] == name] == ["unreadable"]
    assert not any(entry["name"].startswith(f"{name}.") for entry in feed.datasets())


def test_a_damaged_part_is_named(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Parts without one that cannot be read are not the dataset; files that are apart do not suffer from it."""
    for part in range(3):
        _write(tmp_path / f"part{part}.h5", {"x": np.zeros((4, 2)), "y": np.arange(4)})
        _write(tmp_path / "other" / f"set{part}.h5", {f"x{part}": np.zeros((4, 2)), "y": np.arange(4)})
    (tmp_path / "part1.h5").write_bytes(b"no HDF5")
    (tmp_path / "other" / "set1.h5").write_bytes(b"no HDF5")
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        wait_until(lambda: all(entry["status"] != "preparing" for entry in feed.datasets()))
        status = {entry["name"]: entry["status"] for entry in feed.datasets()}
        assert status == {"data": "unreadable", "other.set0": "ok", "other.set1": "unreadable", "other.set2": "ok"}
        with pytest.raises(Unreadable, match=r"part1.h5, one of its 3 files"):
            feed["data"]
        with pytest.raises(Unreadable, match="not an HDF5 file"):
            feed["other.set1"]


def test_a_renamed_sample_changes_the_revision(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """The name of a file is served as its row's, so that it belongs to the revision."""
    for number in range(3):
        _write(tmp_path / f"s/slice_{number}.h5", {"image": np.zeros((16, 16)), "mask": np.ones((16, 16), "u1")})
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        before = feed["s.slice"].revision
        (tmp_path / "s/slice_2.h5").rename(tmp_path / "s/slice_9.h5")
        wait_until(lambda: feed["s.slice"].revision != before)
        assert feed["s.slice"].take([2], fields=["file"]).text("file") == ["slice_9"]


def test_the_episodes_of_a_declared_dataset_may_be_fields(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """``episodes = false``: groups of the same members and as many rows lie side by side."""
    _write(tmp_path / "rig.h5", {"north/v": np.zeros((5, 2)), "south/v": np.ones((5, 2))})
    (tmp_path / "h5feed.toml").write_text('datasets.rig = { files = ["rig.h5"], episodes = false }')
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        assert readable_fields(feed["rig"]) == {"north.v", "south.v"}
        assert feed["rig"].rows == 5
