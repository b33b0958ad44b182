"""What fields are for, told by their names: as the owners of published data sets, and Keras' users, mean them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.inspected import inspected
from tests.support.served_rows import described
from tests.support.server_process import ServerProcess

ROWS = 40

random = np.random.default_rng(2)

# One value a row.
CLASS: tuple[tuple[int, ...], str] = ((), "classes")
NUMBER: tuple[tuple[int, ...], str] = ((), "number")
COUNT: tuple[tuple[int, ...], str] = ((), "running")
TEXT: tuple[tuple[int, ...], str] = ((), "text")

IMAGE = ((12, 12, 3), "u1")
MAP = ((12, 12), "u1")
PLANE = ((1, 41, 41), "f4")

Field = tuple[tuple[int, ...], str]

CASES: dict[str, tuple[dict[str, Field], list[str], list[str]]] = {
    # name: fields, inputs, labels
    "super_resolution": ({"data": PLANE, "label": PLANE}, ["data"], ["label"]),
    "lr_hr": ({"lr": ((6, 6, 3), "u1"), "hr": IMAGE}, ["lr"], ["hr"]),
    "denoising": ({"noisy": IMAGE, "clean": IMAGE}, ["noisy"], ["clean"]),
    "segmentation": ({"image": IMAGE, "mask": MAP}, ["image"], ["mask"]),
    "masks_by_another_name": ({"images": IMAGE, "segmentation": MAP}, ["images"], ["segmentation"]),
    "labels_of_pictures": ({"images": IMAGE, "labels": MAP}, ["images"], ["labels"]),
    "depth": ({"rgb": IMAGE, "depth": ((12, 12), "f4")}, ["rgb"], ["depth"]),
    "ground_truth": ({"x": IMAGE, "ground_truth": MAP}, ["x"], ["ground_truth"]),
    "gt": ({"features": ((64,), "f4"), "gtscore": NUMBER, "picks": COUNT}, ["features"], ["gtscore"]),
    "dense_y": ({"x": ((9,), "f4"), "y": ((9,), "f4")}, ["x"], ["y"]),
    "basenji": ({"in": ((99, 4), "bool"), "out": ((9, 3), "f2")}, ["in"], ["out"]),
    # A field that says label wins over one that says what it is a picture of.
    "busi": ({"image": IMAGE, "mask": MAP, "label": CLASS}, ["image"], ["label"]),
    "nyu": (
        {"images": IMAGE, "depths": MAP, "rawDepths": MAP, "labels": MAP, "instances": MAP},
        ["images"],
        ["labels"],
    ),
    "detection": ({"images": IMAGE, "boxes": ((5, 4), "f4"), "labels": ((5,), "i4")}, ["images"], ["labels"]),
    "two_tasks": (
        {"image": IMAGE, "fine_labels": CLASS, "coarse_labels": CLASS},
        ["image"],
        ["fine_labels", "coarse_labels"],
    ),
    "label_and_its_text": ({"image": IMAGE, "label": CLASS, "label_name": TEXT}, ["image"], ["label"]),
    "only_text": ({"image": IMAGE, "label": TEXT}, ["image"], ["label"]),
    "dsprites": (
        {"imgs": MAP, "latents/classes": ((6,), "i8"), "latents/values": ((6,), "f8")},
        ["imgs"],
        ["latents.classes"],
    ),
    "radioml": ({"X": ((128, 2), "f4"), "Y": ((24,), "one-hot"), "Z": ((1,), "i8")}, ["X"], ["Y"]),
    "galaxy": ({"images": IMAGE, "ans": CLASS, "ra": NUMBER, "redshift": NUMBER}, ["images"], ["ans"]),
    "modelnet": ({"data": ((64, 3), "f4"), "faceId": ((64,), "i4"), "label": ((1,), "u1")}, ["data"], ["label"]),
    # What is said of a label is none.
    "confidence": ({"x": ((9,), "f4"), "label": CLASS, "label_confidence": NUMBER}, ["x"], ["label"]),
    "how_many": ({"x": ((9,), "f4"), "labels": CLASS, "num_labels": CLASS}, ["x"], ["labels"]),
    "size": ({"x": ((9,), "f4"), "target": NUMBER, "target_size": CLASS}, ["x"], ["target"]),
    "predicted": ({"x": ((9,), "f4"), "y_true": CLASS, "y_pred": NUMBER}, ["x"], ["y_true"]),
    "class_id": (
        {"x": ((9,), "f4"), "class_id": CLASS, "class_name": TEXT, "class_score": NUMBER},
        ["x"],
        ["class_id"],
    ),
    "class_name": ({"x": ((9,), "f4"), "class_name": TEXT, "class_prob": NUMBER}, ["x"], ["class_name"]),
    "id_of_a_label": ({"x": ((9,), "f4"), "label": CLASS, "label_id": CLASS}, ["x"], ["label"]),
    "only_a_score": ({"x": ((9,), "f4"), "target_score": NUMBER}, ["x"], ["target_score"]),
    "spans": (
        {"x": ((9,), "f4"), "answer_start": CLASS, "answer_end": CLASS},
        ["x"],
        ["answer_start", "answer_end"],
    ),
    # Masks that are no pictures, and depth that a robot sees.
    "bert": (
        {"input_ids": ((32,), "i4"), "input_mask": ((32,), "i4"), "next_sentence_labels": CLASS},
        ["input_ids", "input_mask"],
        ["next_sentence_labels"],
    ),
    "robot": ({"obs/depth": MAP, "obs/rgb": IMAGE, "actions": ((7,), "f4")}, ["actions", "obs.depth", "obs.rgb"], []),
    # Running numbers, places and times are never labels.
    "ids": ({"tracings": ((99, 12), "f4"), "exam_id": COUNT}, ["tracings"], []),
    "image_ids": ({"images": IMAGE, "image_id": COUNT}, ["images"], []),
    "picks": ({"features": ((9,), "f4"), "picks": COUNT}, ["features"], []),
    "axis": ({"values": ((9,), "f4"), "axis1": COUNT}, ["values"], []),
    "fold": ({"images": IMAGE, "fold": CLASS}, ["images"], []),
    "unnamed_count": ({"images": IMAGE, "shot": COUNT}, ["images"], []),
    "unnamed_files": ({"images": IMAGE, "scan": TEXT}, ["images"], []),
    "accelerometer": ({"acc_x": NUMBER, "acc_y": NUMBER, "acc_z": NUMBER, "features": ((9,), "f4")}, ["features"], []),
    "coordinates": ({"x": NUMBER, "y": NUMBER, "z": NUMBER, "labels": CLASS}, [], ["labels"]),
    "weights": ({"x": ((9,), "f4"), "y": CLASS, "sample_weight": NUMBER}, ["x"], ["y"]),
    # A mask alone is what is looked at.
    "only_masks": ({"masks": MAP}, ["masks"], []),
}


def _values(shape: tuple[int, ...], kind: str) -> Any:
    if kind == "classes":
        return np.arange(ROWS) % 3
    if kind == "number":
        return random.random(ROWS)
    if kind == "running":
        return np.arange(ROWS) * 15 + 1000
    if kind == "text":
        return np.array([f"s{row}".encode() for row in range(ROWS)])
    if kind == "one-hot":
        return np.eye(shape[0], dtype=np.int64)[np.arange(ROWS) % shape[0]]
    return random.integers(0, 2, (ROWS, *shape)).astype(kind)


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Feed]:
    folder = tmp_path_factory.mktemp("roles")
    for name, (fields, _, _) in CASES.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for field, (shape, kind) in fields.items():
                file[field] = _values(shape, kind)
    with h5py.File(folder / "names.h5", "w") as file:
        file["images"], file["labels"] = _values(*IMAGE), _values(*CLASS)
        # Not of the labels: each row has one, or they lie in a group of something else.
        file["names"] = _values(*TEXT)
        file["batches/class_names"] = np.array([b"a", b"b", b"c"])
    with h5py.File(folder / "around.h5", "w") as file:
        file["class_names"] = np.array([b"a", b"b", b"c"])
        for split in ("train", "test"):
            file[f"{split}/images"], file[f"{split}/labels"] = _values(*IMAGE), _values(*CLASS)
    with h5py.File(folder / "dense_bits.h5", "w") as file:
        file["signal"] = random.random((ROWS, 64, 2))
        # A single one in each row: the peak, and no class.
        file["mask"] = np.eye(64, dtype=np.uint8)[np.arange(ROWS)]
    with inspected(folder, tmp_path_factory.mktemp("cache")) as connected:
        yield connected


@pytest.mark.parametrize("name", CASES)
def test_roles_by_names(feed: h5feed.Feed, name: str) -> None:
    """Inputs and labels are those that the owner means; the reason is said for each."""
    _, inputs, labels = CASES[name]
    fields = feed[name].fields.values()
    assert sorted(field.name for field in fields if field.role == "input") == sorted(inputs)
    assert sorted(field.name for field in fields if field.role == "label") == sorted(labels)
    assert all(field["role_reason"] for field in feed[name].info["fields"])


def test_targets_beside_a_label_say_how_to_get_them(feed: h5feed.Feed) -> None:
    """What could be learnt too is named with y=."""
    reasons = {field["name"]: field["role_reason"] for field in feed["busi"].info["fields"]}
    assert "'label' is the label" in reasons["mask"] and "y=" in reasons["mask"]


def test_pictures_are_no_strata(feed: h5feed.Feed) -> None:
    """A label of many values a row is not stratified by, and the splits say why."""
    for name in ("super_resolution", "segmentation", "labels_of_pictures", "dense_bits"):
        answer = feed[name].splits(test=0.25)
        assert (answer["stratify"], answer["classes_of"]) == (None, None), name
        assert "holds no classes" in answer["note"], name


def test_statistics_of_pictures(feed: h5feed.Feed) -> None:
    """Masks have a mean and no classes."""
    report = feed["segmentation"].stats("all", field="mask")
    assert report["classes"] is None and 0.4 < report["mean"] < 0.6


def test_names_belong_to_the_field_beside_them(feed: h5feed.Feed) -> None:
    """Lists of names in the label's group, or around it, are those of its classes; a name a row is none."""
    assert feed["names"].class_names is None
    assert feed["around"].class_names == ["a", "b", "c"]


def test_names_that_do_not_fit_the_labels(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Names are those of a label where every number that occurs has its own; else none is named, and it is said."""
    y = np.arange(ROWS) % 3
    one_hot, several = np.eye(3)[y], np.stack([y, y], 1)
    cases: dict[str, tuple[Any, list[str], str | None]] = {
        "fit": (y, ["z", "a", "m"], None),
        "more": (y, ["z", "a", "m", "q"], None),
        "two_occur": (y % 2 + 1, ["z", "a", "m"], None),
        "floats": (y * 1.0, ["z", "a", "m"], None),
        "one_hot": (one_hot, ["z", "a", "m"], None),
        "boxes": (several, ["z", "a", "m"], None),
        "unlabelled": (y - 1, ["z", "a"], "below 0"),
        "from_one": (y + 1, ["z", "a", "m"], "its labels are 1 … 3"),
        "too_few": (y, ["z", "a"], "labels up to 2"),
        "twice": (y, ["z", "z", "m"], "'z' occurs twice"),
        "scores": (random.random(ROWS), ["celsius"], "not integers"),
        "rare": (np.r_[np.zeros(5000, int), 3], ["z", "a", "m"], "labels up to 3"),
        "boxes_from_one": (several + 1, ["z", "a", "m"], "its labels are 1 … 3"),
    }
    for name, (labels, names, _) in cases.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["y"] = np.zeros((len(labels), 3)), labels
            file["y"].attrs["class_names"] = names
    for name in ("list", "declared", "declared_right", "words"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["y"] = np.zeros((ROWS, 3)), np.array([b"dog", b"cat"])[y % 2] if name == "words" else y + 1
            file["list_classes"] = np.array([b"z", b"a", b"m"])
    (tmp_path / "h5feed.toml").write_text(
        '[datasets.declared]\nfiles = ["declared.h5"]\nclass_names = ["b", "c", "d"]\n'
        '[datasets.declared_right]\nfiles = ["declared_right.h5"]\nclass_names = ["none", "b", "c", "d"]\n'
    )
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        for name, (_, names, note) in cases.items():
            fits = note is None or name == "unlabelled"
            assert feed[name].class_names == (names if fits else None), name
            assert feed[name].fields["y"].class_names == (tuple(names) if fits else None), name
            (said,) = (field["note"] for field in feed[name].info["fields"] if field["name"] == "y")
            assert said is None if note is None else note in said, name
        assert [feed[name].class_names for name in ("list", "declared", "words")] == [None] * 3
        assert feed["declared_right"].class_names == ["none", "b", "c", "d"]


def test_roles_that_are_told(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """By an attribute, or by h5feed.toml, which wins: what is told decides what is guessed of the others."""
    for name in ("attribute", "declared", "both", "nonsense"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["image"], file["mask"], file["label"] = _values(*IMAGE), _values(*MAP), _values(*CLASS)
            file["label"].attrs["role"] = "other" if name in ("attribute", "both") else "labels"
            file["image"].attrs["role"] = ["input", "input"]
    with h5py.File(tmp_path / "words.h5", "w") as file:
        file["image"], file["label"], file["species"] = _values(*IMAGE), _values(*CLASS), _values(*TEXT)
        file["species"].attrs["role"] = "label"
    (tmp_path / "h5feed.toml").write_text(
        '[datasets.declared]\nfiles = ["declared.h5"]\nroles = { label = "other" }\n'
        '[datasets.both]\nfiles = ["both.h5"]\nroles = { label = "label" }\n'
    )
    found = {}
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        for name in ("attribute", "declared", "both", "nonsense", "words"):
            found[name] = {field.name: field.role for field in feed[name].fields.values()}
    masks = {"image": "input", "mask": "label", "label": "other"}
    classes = {"image": "input", "mask": "other", "label": "label"}
    words = {"image": "input", "label": "label", "species": "label"}
    assert found == {"attribute": masks, "declared": masks, "both": classes, "nonsense": classes, "words": words}


def test_class_names_of_other_fields(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """An enum or the attribute `class_names` names the integers of any field, if the names fit."""
    sites, kinds = np.arange(12) % 2, np.arange(12) % 3
    for number, names in enumerate((["north", "south"], ["south", "north"])):
        with h5py.File(tmp_path / f"rows{number}.h5", "w") as file:
            file["x"] = np.zeros((12, 4), np.float32)
            file["y"] = kinds
            file["site"], file["few"], file["listed"], file["moved"] = sites, kinds, sites, sites
            file["site"].attrs["class_names"] = ["north", "south"]
            file["few"].attrs["class_names"] = ["one", "two"]
            # May as well be names of something else.
            file["listed"].attrs["names"] = ["north", "south"]
            file["moved"].attrs["class_names"] = names
            file.create_dataset("kind", data=kinds, dtype=h5py.enum_dtype({"c": 2, "a": 0, "b": 1}, "i1"))
            file["several"] = np.stack([sites, kinds], axis=1)
            file["several"].attrs["class_names"] = ["north", "south", "west"]
    server = serve(tmp_path)
    with h5feed.connect(server.url, deadline=60) as feed:
        fields = feed["rows"].fields
        assert {name: one.class_names for name, one in fields.items() if one.class_names} == {
            "site": ("north", "south"),
            "kind": ("a", "b", "c"),
        }
        assert [fields[name].role for name in ("y", "site", "kind")] == ["label", "other", "other"]
        found = {
            field: np.concatenate([batch.rows for batch in feed["rows"].batches(where=where)])
            for field, where in (("site", "site = south"), ("kind", "kind = c"))
        }
        assert np.array_equal(np.sort(found["site"]), np.flatnonzero(np.tile(sites, 2) == 1))
        assert np.array_equal(np.sort(found["kind"]), np.flatnonzero(np.tile(kinds, 2) == 2))
    notes = {field["name"]: field["note"] for field in described(server, "rows")["fields"]}
    assert (
        notes["few"] == "'one', 'two' are not used as class names: it has values up to 2, but the 2 names are for 0 … 1"
    )
    assert notes["moved"] == "its class names are not used: they differ between some of its pieces"
    assert not notes["listed"] and not notes["several"]
