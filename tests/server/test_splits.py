"""Splits equal scikit-learn's, row by row, whatever the labels are."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadParameter, SplitImpossible, SplitNotFound, TooLarge, UnsupportedField
from h5feed.options import SplitOptions
from h5feed_server.splits.compute import Splits, compute_splits, dump_splits, load_splits
from h5feed_server.splits.describe import describe_splits
from h5feed_server.splits.labels import Labels, NoClasses, Strata, dump_strata, encode, load_strata, read_labels
from h5feed_server.splits.multilabel import stratify
from h5feed_server.splits.split_spec import SplitSpec
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    train_test_split,
)
from sklearn.utils.class_weight import compute_class_weight

from tests.support.server_process import ServerProcess

ROWS = 600
random = np.random.default_rng(11)
CLASSES = random.choice(3, ROWS, p=[0.6, 0.3, 0.1])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[h5feed.Feed, Path]]:
    """A server over one file with a label field of every kind, datasets with native splits, and its folder."""
    folder = tmp_path_factory.mktemp("labelled")
    with h5py.File(folder / "kinds.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype="<f4")[:, None].repeat(2, axis=1)
        file["label"] = CLASSES
        file["small"] = CLASSES.astype(np.uint8)
        file["swapped"] = CLASSES.astype(">i4")
        file["column"] = CLASSES[:, None]
        file["flag"] = CLASSES > 0
        file["float"] = CLASSES.astype("<f4")
        file["one_hot"] = np.eye(3, dtype="<f4")[CLASSES]
        file["text"] = np.array([b"cat", b"dog", b"a long name"])[CLASSES]
        file.create_dataset(
            "words", data=np.array(["tschüß", "dog", "bird"], object)[CLASSES], dtype=h5py.string_dtype()
        )
        file.create_dataset("enum", data=CLASSES, dtype=h5py.enum_dtype({"A": 0, "B": 1, "C": 2}, basetype="i1"))
        file["many"] = (random.random((ROWS, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).astype(np.uint8)
        file["age"] = random.normal(40, 12, ROWS)
        file["gaps"] = np.where(np.arange(ROWS) == 3, np.nan, 0.5)
        file["rare"] = np.where(np.arange(ROWS) == 5, 9, CLASSES)
        file["patient"] = random.integers(0, 80, ROWS)
        file["site"] = np.array([b"north", b"south", b"east"])[random.integers(0, 3, ROWS)]
        file["box"] = random.random((ROWS, 4))
    with h5py.File(folder / "stored.h5", "w") as file:
        for split, rows in (("train", 300), ("test", 60)):
            file[f"{split}/x"] = np.zeros((rows, 2))
            file[f"{split}/y"] = np.arange(rows) % 4
    with h5py.File(folder / "plain.h5", "w") as file:
        file["x"], file["y"] = np.zeros((100, 2)), np.arange(100) % 2
    (folder / "h5feed.toml").write_text(
        '[datasets.ranges]\nfiles = ["plain.h5"]\n'
        "[datasets.ranges.splits]\ntrain = [[0, 40], [60, 80]]\nvalidation = [40, 60]\nnight = [90, 100]\n"
    )
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed, folder
    assert server.stop() == 0


@pytest.fixture(scope="module")
def kinds(labelled: tuple[h5feed.Feed, Path]) -> h5feed.Dataset:
    return labelled[0]["kinds"]


def field_of(labelled: tuple[h5feed.Feed, Path], name: str) -> np.ndarray[Any, Any]:
    with h5py.File(labelled[1] / "kinds.h5") as file:
        return np.asarray(file[name])


def labels_of(values: np.ndarray[Any, Any], bins: bool = False, step: int = 7) -> Labels:
    """The labels of an array that is read in small pieces."""

    def blocks() -> Iterator[np.ndarray[Any, Any]]:
        for start in range(0, len(values), step):
            yield values[start : start + step]

    return read_labels(blocks, len(values), values.dtype, values.shape[1:], bins=bins)


def divided(values: np.ndarray[Any, Any] | None, rows: int, groups: Any = None, **options: Any) -> Splits[Any]:
    spec = SplitSpec(stratify="none" if values is None else "y", **options)
    strata = None if values is None else Strata("y", labels_of(values))
    return compute_splits(rows, None, spec, strata, None if groups is None else labels_of(groups))


def twice(
    labels: np.ndarray[Any, Any] | None, rows: int, seed: int, test: float | None = None, val: float | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Splits by two calls of scikit-learn by hand."""
    rest, expected = np.arange(rows), {}
    for name, share in (("test", test), ("val", val)):
        if share is not None:
            count = math.ceil(share * rows) if isinstance(share, float) else share
            by = None if labels is None else labels[rest]
            rest, expected[name] = train_test_split(rest, test_size=count, stratify=by, random_state=seed)
    return {"train": rest, **expected}


def assert_equal(splits: Splits[Any], expected: dict[str, np.ndarray[Any, Any]]) -> None:
    assert {name: rows.tolist() for name, rows in splits.rows.items()} == {
        name: sorted(rows.tolist()) for name, rows in expected.items()
    }


@pytest.mark.parametrize(("test", "val"), [(0.1, 0.1), (100, 57), (0.33, None), (None, 0.25)])
@pytest.mark.parametrize("seed", [42, 7])
def test_equal_to_train_test_split_called_twice(
    feed: h5feed.Feed, folder: Path, test: float | None, val: float | None, seed: int
) -> None:
    """On an imbalanced label field, the three sets are those of two calls by hand, and stratified."""
    with h5py.File(folder / "mixed.h5") as file:
        labels = file["labels"][:]
    options: SplitOptions = {"split_seed": seed}
    if test is not None:
        options["test"] = test
    if val is not None:
        options["val"] = val
    report = feed["mixed"].splits(**options)
    assert (report["stratify"], report.method) == ("labels", "train_test_split")
    for name, rows in twice(labels, len(labels), seed, test, val).items():
        got = feed["mixed"].split_rows(name, **options)
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, np.sort(rows))
        assert report["splits"][name]["rows"] == len(rows)
        counts = {entry["value"]: entry["rows"] for entry in report["splits"][name]["classes"]}
        assert counts == dict(zip(*(a.tolist() for a in np.unique(labels[rows], return_counts=True)), strict=True))


@pytest.mark.parametrize(
    "field", ["label", "small", "swapped", "column", "flag", "float", "one_hot", "text", "words", "enum"]
)
def test_every_kind_of_label(labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset, field: str) -> None:
    """Ints of any width, bools, whole floats, one-hot rows, text of fixed and of any length: scikit-learn's rows."""
    stored = field_of(labelled, field)
    labels = stored.argmax(axis=1) if field == "one_hot" else stored.reshape(-1)
    report = kinds.splits(test=0.2, val=60, stratify=field)
    assert (report["stratify"], report["classes_of"], report.note) == (field, field, None)
    for name, rows in twice(labels, ROWS, 42, 0.2, 60).items():
        np.testing.assert_array_equal(kinds.split_rows(name, test=0.2, val=60, stratify=field), np.sort(rows))
        values, counts = np.unique(labels[rows], return_counts=True)
        entries = report["splits"][name]["classes"]
        texts = [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
        assert [entry["value"] for entry in entries] == texts
        assert [entry["rows"] for entry in entries] == counts.tolist()
        weights = compute_class_weight("balanced", classes=values, y=labels[rows])
        np.testing.assert_allclose([entry["weight"] for entry in entries], weights)
        shares = np.unique(labels, return_counts=True)[1] / ROWS
        deviation = np.abs(counts / len(rows) - shares).max()
        assert report["splits"][name]["max_deviation"] == pytest.approx(deviation)


def test_names_of_classes(kinds: h5feed.Dataset, feed: h5feed.Feed) -> None:
    """Names that the dataset has for its labels go with them."""
    names = [entry["name"] for entry in feed["mixed"].splits()["splits"]["all"]["classes"]]
    assert names == ["cat", "dog", "bird", "fish"]
    assert kinds.splits(test=0.1, stratify="small")["splits"]["all"]["classes"][0]["name"] is None


def test_numbers_on_a_scale(labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset) -> None:
    """Asked for by name they are stratified by ten quantile bins, as by hand, and the answer says so."""
    age = field_of(labelled, "age")
    bins = np.digitize(age, np.quantile(age, np.linspace(0, 1, 11))[1:-1])
    report = kinds.splits(test=0.2, val=0.1, stratify="age")
    assert report["classes_are"] == "bins" and "quantile bins" in (report.note or "")
    for name, rows in twice(bins, ROWS, 42, 0.2, 0.1).items():
        np.testing.assert_array_equal(kinds.split_rows(name, test=0.2, val=0.1, stratify="age"), np.sort(rows))
    assert [entry["rows"] for entry in report["splits"]["all"]["classes"]] == [60] * 10
    with pytest.raises(SplitImpossible, match=r"NaN.*stratify=none"):
        kinds.splits(test=0.2, stratify="gaps")


def test_several_labels(labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset) -> None:
    """Splits have exactly the rows asked for, and of each label their share to within one row."""
    table = field_of(labelled, "many").astype(int)
    report = kinds.splits(test=0.2, val=60, stratify="many")
    assert report.method is not None and "Sechidis" in report.method
    for name, size in (("test", 120), ("val", 60), ("train", 420)):
        rows = kinds.split_rows(name, test=0.2, val=60, stratify="many")
        assert len(rows) == size
        assert np.abs(table[rows].sum(axis=0) - table.sum(axis=0) * size / ROWS).max() <= 1
    folds = [kinds.split_rows("val", folds=5, fold=fold, stratify="many") for fold in range(5)]
    assert np.sort(np.concatenate(folds)).tolist() == list(range(ROWS))
    for rows in folds:
        assert len(rows) == ROWS // 5
        assert np.abs(table[rows].sum(axis=0) - table.sum(axis=0) / 5).max() <= 1
    with pytest.raises(BadParameter, match="multi-label"):
        report.class_weight("train")


def test_a_class_too_small_is_said(feed: h5feed.Feed, kinds: h5feed.Dataset) -> None:
    """By default a class of one row means no stratification, with the reason; asked for by name it is an error."""
    report = feed["sub.small"].splits(test=2)
    assert report["stratify"] is None and "only 1 row" in (report.note or "")
    with pytest.raises(SplitImpossible, match=r"class 9 has only 1 row.*stratify=none"):
        kinds.splits(test=2, stratify="rare")
    with pytest.raises(SplitImpossible, match=r"3 classes do not fit into 2 rows"):
        kinds.splits(test=2, stratify="label")
    with pytest.raises(SplitImpossible, match=r"a row is 4 numbers"):
        kinds.splits(test=2, stratify="box")


def test_by_position(feed: h5feed.Feed, labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset) -> None:
    """Without shuffling, val and test come from the end, in that order; of groups the ones that come last."""
    options: dict[str, Any] = {"test": 100, "val": 0.2, "split_shuffle": False}
    assert feed["mixed"].split_rows("train", **options).tolist() == list(range(700))
    assert feed["mixed"].split_rows("validation", **options).tolist() == list(range(700, 900))
    assert feed["mixed"].split_rows("test", **options).tolist() == list(range(900, 1000))
    patients = field_of(labelled, "patient")
    came = list(dict.fromkeys(patients.tolist()))
    rows = kinds.split_rows("test", test=8, group="patient", split_shuffle=False)
    assert set(patients[rows].tolist()) == set(came[-8:])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group", [None, "patient"])
@pytest.mark.parametrize("stratify", ["label", "none"])
def test_folds(
    labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset, shuffle: bool, group: str | None, stratify: str
) -> None:
    """folds=K&fold=k are scikit-learn's four k-fold splitters."""
    splitter = {
        (None, "none"): KFold,
        (None, "label"): StratifiedKFold,
        ("patient", "none"): GroupKFold,
        ("patient", "label"): StratifiedGroupKFold,
    }[group, stratify]
    made = splitter(4, shuffle=shuffle, random_state=9 if shuffle else None)
    groups = None if group is None else field_of(labelled, group)
    options: dict[str, Any] = {"folds": 4, "split_shuffle": shuffle, "stratify": stratify}
    if shuffle:
        options["split_seed"] = 9
    if group is not None:
        options["group"] = group
    assert kinds.splits(**options).method == splitter.__name__
    for fold, (train, val) in enumerate(made.split(np.zeros(ROWS), CLASSES, groups)):
        np.testing.assert_array_equal(kinds.split_rows("train", fold=fold, **options), np.sort(train))
        np.testing.assert_array_equal(kinds.split_rows("val", fold=fold, **options), np.sort(val))


def test_folds_of_what_test_leaves(kinds: h5feed.Dataset) -> None:
    """With test=, the folds are those of the rows that train_test_split leaves, in its order."""
    rest, test = train_test_split(np.arange(ROWS), test_size=100, stratify=CLASSES, random_state=42)
    folds = StratifiedKFold(5, shuffle=True, random_state=42).split(rest, CLASSES[rest])
    for fold, (train, val) in enumerate(folds):
        options: dict[str, Any] = {"test": 100, "folds": 5, "fold": fold}
        np.testing.assert_array_equal(kinds.split_rows("train", **options), np.sort(rest[train]))
        np.testing.assert_array_equal(kinds.split_rows("val", **options), np.sort(rest[val]))
        np.testing.assert_array_equal(kinds.split_rows("test", **options), np.sort(test))


def test_groups_stay_together(labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset) -> None:
    """group= is GroupShuffleSplit, called twice: shares are of groups, no group lies on two sides, and it is said."""
    for field in ("patient", "site"):
        groups = field_of(labelled, field)
        total = len(np.unique(groups))
        rest, expected = np.arange(ROWS), {}
        for name, count in (("test", math.ceil(0.2 * total)), ("val", 1)):
            splitter = GroupShuffleSplit(1, test_size=count, random_state=42)
            left, held = next(splitter.split(rest, groups=groups[rest]))
            rest, expected[name] = rest[left], rest[held]
        report = kinds.splits(test=0.2, val=1, group=field)
        assert (report.method, report["group"], report["stratify"]) == ("GroupShuffleSplit", field, None)
        assert "groups stay together" in (report.note or "") and f"there are {total} groups" in (report.note or "")
        for name, rows in {"train": rest, **expected}.items():
            np.testing.assert_array_equal(kinds.split_rows(name, test=0.2, val=1, group=field), np.sort(rows))
            assert report["splits"][name]["groups"] == len(np.unique(groups[rows]))
    with pytest.raises(UnsupportedField, match="one value per row"):
        kinds.splits(test=0.2, group="box")
    with pytest.raises(SplitImpossible, match=r"takes 80 of 80 groups of 'patient'"):
        kinds.splits(test=80, group="patient")


def test_small_classes_in_folds(labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset) -> None:
    """As in scikit-learn, a class of fewer rows than folds is spread as far as it goes; the answer says which."""
    report = kinds.splits(folds=3, fold=1, stratify="rare")
    assert "class 9 has 1 row," in (report.note or "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = StratifiedKFold(3, shuffle=True, random_state=42)
        _, val = list(made.split(np.zeros(ROWS), field_of(labelled, "rare")))[1]
    np.testing.assert_array_equal(kinds.split_rows("val", folds=3, fold=1, stratify="rare"), val)


def test_out_of_native_train(labelled: tuple[h5feed.Feed, Path]) -> None:
    """val= and folds= divide what is stored for training, and leave the stored test split alone."""
    stored = labelled[0]["stored"]
    labels = np.arange(300) % 4
    _, expected = train_test_split(np.arange(300), test_size=30, stratify=labels, random_state=42)
    assert stored.split_rows("val", val=0.1).tolist() == sorted(expected.tolist())
    assert stored.split_rows("test", val=0.1).tolist() == list(range(300, 360))
    _, val = list(StratifiedKFold(3, shuffle=True, random_state=42).split(labels, labels))[2]
    assert stored.split_rows("val", folds=3, fold=2).tolist() == val.tolist()
    assert stored.splits(folds=3)["splits"]["test"]["rows"] == 60
    assert stored.splits().method is None and stored.splits()["splits"]["train"]["rows"] == 300


def test_declared_ranges(labelled: tuple[h5feed.Feed, Path]) -> None:
    """Row ranges in h5feed.toml are native splits, under our names for them or their own."""
    ranges = labelled[0]["ranges"]
    assert ranges.split_rows("train").tolist() == [*range(40), *range(60, 80)]
    assert ranges.split_rows("val").tolist() == list(range(40, 60))
    assert ranges.split_rows("night").tolist() == list(range(90, 100))
    assert ranges.batch(0, split="night", batch_size=4).rows.tolist() == [90, 91, 92, 93]
    with pytest.raises(SplitNotFound, match="night"):
        ranges.split_rows("dusk")


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        ("train = [0, 101]", "0 ≤ begin < end ≤ 100"),
        ("train = [0, 50]\ntest = [49, 60]", "row 49 is both in split 'train' and in split 'test'"),
        ("all = [0, 50]", "not a valid split name"),
    ],
)
def test_declared_nonsense(serve: Callable[..., ServerProcess], tmp_path: Path, splits: str, reason: str) -> None:
    """Ranges that cannot be make the dataset unreadable, and say why."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "plain.h5", "w") as file:
        file["x"], file["y"] = np.zeros((100, 2)), np.arange(100) % 2
    (folder / "h5feed.toml").write_text(f'[datasets.d]\nfiles = ["plain.h5"]\n[datasets.d.splits]\n{splits}\n')
    with h5feed.connect(serve(folder).url, deadline=60) as feed, pytest.raises(h5feed.FeedError, match=reason):
        _ = feed["d"]


def test_dogs_and_cats(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """2,500 test and 2,500 val rows of 25,000, stratified, seed 42: train_test_split called twice."""
    folder = tmp_path / "data"
    folder.mkdir()
    labels = np.array([0] * 12_500 + [1] * 12_500)
    np.random.default_rng(5).shuffle(labels)
    with h5py.File(folder / "dogs_vs_cats.h5", "w") as file:
        file["images"] = np.zeros((25_000, 2, 2, 3), np.uint8)
        file["labels"] = labels
        file["labels"].attrs["class_names"] = ["cat", "dog"]
    paths = np.arange(25_000)
    train, test, y, _ = train_test_split(paths, labels, test_size=2500, stratify=labels, random_state=42)
    train, val, _, _ = train_test_split(train, y, test_size=2500, stratify=y, random_state=42)
    with h5feed.connect(serve(folder, "--workers", "2").url, deadline=60) as feed:
        dataset = feed["dogs_vs_cats"]
        options: dict[str, Any] = {"test": 2500, "val": 2500, "split_seed": 42}
        for name, rows in (("train", train), ("val", val), ("test", test)):
            np.testing.assert_array_equal(dataset.split_rows(name, **options), np.sort(rows))
        report = dataset.splits(**options)
        assert [entry["rows"] for entry in report["splits"]["test"]["classes"]] == [1250, 1250]
        assert report.class_weight() == {0: 1.0, 1: 1.0}


def test_a_server_that_starts_anew(labelled: tuple[h5feed.Feed, Path], tmp_path: Path) -> None:
    """What is in the cache folder is used again; a damaged file there is found out and computed anew."""
    folder, cache = labelled[1], tmp_path / "cache"
    options: dict[str, Any] = {"test": 0.2, "val": 0.1, "group": "patient"}
    server = ServerProcess(folder, cache)
    try:
        with h5feed.connect(server.url, deadline=60) as feed:
            before = feed["kinds"].splits(**options)
        server.stop()
        names = ("splits", "reports", "classes", "groups")
        kept = [file for name in names for file in cache.glob(f"served-*/{name}/*")]
        assert len(kept) == 4
        for file in kept:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        server.start()
        with h5feed.connect(server.url, deadline=60) as feed:
            assert feed["kinds"].splits(**options) == before
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("folds=1", "greater than or equal to 2"),
        ("folds=3&fold=3", "0 … folds-1 = 2"),
        ("fold=1&test=0.1", "fold needs folds"),
        ("folds=3&val=0.1", "leave val out"),
        ("group=patient", "group needs test, val or folds"),
        ("group=patient&test=0.2&stratify=label", "together need folds"),
        ("test=0.2&stratify=label&split_shuffle=false", "split_shuffle=true"),
        ("test=1.0", "greater than 0 and less than 1"),
    ],
)
def test_specs_that_cannot_be(labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset, query: str, says: str) -> None:
    """Options that contradict each other are refused with what would be right."""
    options: dict[str, Any] = dict(item.split("=") for item in query.split("&"))
    with pytest.raises(ValidationError, match=says):
        SplitSpec(**options)
    with pytest.raises(BadParameter, match=says):
        kinds.splits(**options)


def test_every_parameter_is_documented(server: ServerProcess) -> None:
    """The OpenAPI page says of each what it does, at every endpoint that takes it."""
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    for path, names in (
        ("splits", ["test", "val", "stratify", "group", "folds", "fold", "split_seed", "split_shuffle"]),
        ("batches/{index}", ["folds", "fold", "group", "balance", "weights", "epoch_rows", "limit", "window"]),
    ):
        given_at = {one["name"]: one for one in schema["paths"][f"/v1/datasets/{{name}}/{path}"]["get"]["parameters"]}
        for name in names:
            assert len(given_at[name]["description"]) > 20, name


def test_readable(labelled: tuple[h5feed.Feed, Path], kinds: h5feed.Dataset, feed: h5feed.Feed) -> None:
    """Splits print as tables, also in a notebook, escaped; they are still a dict that JSON takes."""
    report = feed["mixed"].splits(test=0.1, val=0.1)
    shown = repr(report)
    for word in (
        "train_test_split",
        "stratified by 'labels'",
        "train",
        "80.0%",
        "max. deviation",
        "cat",
        report["splits"]["val"]["digest"],
    ):
        assert word in shown, shown
    assert "<table>" in report._repr_html_() and '<th scope="row">cat</th>' in report._repr_html_()
    assert json.loads(json.dumps(report)) == report and dict(report) == report
    assert set(report.class_weight("train")) == {0, 1, 2, 3}
    assert sum(report.class_weight("all")[c] * n for c, n in _counts(report, "all").items()) == pytest.approx(1000)
    assert set(kinds.splits(test=0.1, stratify="text").class_weight()) == {0, 1, 2}
    assert "groups" in repr(kinds.splits(test=0.2, group="patient"))
    with pytest.raises(BadParameter, match="choose from all, train, val, test"):
        report.class_weight("dev")


def _counts(report: dict[str, Any], split: str) -> dict[int, int]:
    return {entry["value"]: entry["rows"] for entry in report["splits"][split]["classes"]}


def test_too_many_rows_for_memory(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """What the setting leaves no room for is refused, and the setting named."""
    server = serve(folder, H5FEED_ORDER_CACHE_BYTES="3999")
    with h5feed.connect(server.url, deadline=60) as feed, pytest.raises(TooLarge, match="H5FEED_ORDER_CACHE_BYTES"):
        feed["mixed"].splits(test=0.1)


# Any label field: ints, text and bools of few values, in arrays of any such dtype.
few = st.integers(-3, 3)
label_fields = st.one_of(
    hnp.arrays(st.sampled_from(["<i8", ">i4", "i1"]), st.integers(4, 120), elements=few),
    hnp.arrays("?", st.integers(4, 120)),
    hnp.arrays("S3", st.integers(4, 120), elements=st.sampled_from([b"a", b"b", b"ab", b"zzz"])),
    hnp.arrays("<f4", st.integers(4, 120), elements=st.sampled_from([0.0, 1.0, 2.0])),
)


@given(labels=label_fields, test=st.integers(1, 40), val=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_any_labels(labels: np.ndarray[Any, Any], test: int, val: int, seed: int) -> None:
    """Equal to scikit-learn, or refused where it refuses; disjoint, complete, and within one row of each class's
    share wherever its own are."""
    rows = len(labels)
    assume(test + val < rows)
    try:
        expected = twice(labels, rows, seed, test, val)
    except ValueError:
        with pytest.raises(SplitImpossible, match="stratify=none"):
            divided(labels, rows, test=test, val=val, split_seed=seed)
        default = compute_splits(
            rows, None, SplitSpec(test=test, val=val, split_seed=seed), Strata("y", labels_of(labels)), None
        )
        assert default.note is not None and default.stratify is None
        assert_equal(default, twice(None, rows, seed, test, val))
        return
    splits = divided(labels, rows, test=test, val=val, split_seed=seed)
    assert_equal(splits, expected)
    assert np.sort(np.concatenate(list(splits.rows.values()))).tolist() == list(range(rows))
    report = describe_splits(splits, rows, labels_of(labels), None, {})
    for split in splits.rows:
        size = report[split]["rows"]
        share = {entry["value"]: entry["rows"] * size / rows for entry in report["all"]["classes"]}
        # Test's shares are of all rows; val's and train's are of what rounding left there.
        room = 1 if split == "test" else 2
        for entry in report[split]["classes"]:
            assert abs(entry["rows"] - share[entry["value"]]) < room + 1e-9
    again = load_splits(dump_splits(splits))
    assert_equal(again, expected)
    assert (again.method, again.stratify) == (splits.method, splits.stratify)


@given(
    labels=hnp.arrays("<i8", st.integers(2, 90), elements=few),
    folds=st.integers(2, 6),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_folds(labels: np.ndarray[Any, Any], folds: int, shuffle: bool, seed: int, data: st.DataObject) -> None:
    """Every k-fold splitter of scikit-learn gives the same rows, or both refuse."""
    rows = len(labels)
    groups = data.draw(hnp.arrays("<i8", rows, elements=st.integers(0, 12)))
    for splitter in (KFold, StratifiedKFold, GroupKFold, StratifiedGroupKFold):
        by = labels if "Stratified" in splitter.__name__ else None
        together = groups if "Group" in splitter.__name__ else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = splitter(folds, shuffle=shuffle, random_state=seed if shuffle else None)
                expected = [val for _, val in made.split(np.zeros(rows), labels, groups)]
        except ValueError:
            expected = None
        for fold in range(folds):
            options: dict[str, Any] = {"folds": folds, "fold": fold, "split_shuffle": shuffle}
            options |= {"split_seed": seed} if shuffle else {}
            options |= {} if together is None else {"group": "g"}
            if expected is None:
                with pytest.raises(SplitImpossible):
                    divided(by, rows, together, **options)
                continue
            splits = divided(by, rows, together, **options)
            assert splits.rows["val"].tolist() == sorted(expected[fold].tolist() if len(expected[fold]) else [])
            assert splits.method == splitter.__name__
            assert len(np.union1d(splits.rows["train"], splits.rows["val"])) == rows


@given(
    groups=hnp.arrays("<i4", st.integers(3, 90), elements=st.integers(0, 20)),
    test=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_groups(groups: np.ndarray[Any, Any], test: int, seed: int) -> None:
    """GroupShuffleSplit's rows, and no group on two sides."""
    total = len(np.unique(groups))
    assume(test < total)
    splits = divided(None, len(groups), groups, group="g", test=test, split_seed=seed)
    made = GroupShuffleSplit(1, test_size=test, random_state=seed)
    train, held = next(made.split(groups, groups=groups))
    assert_equal(splits, {"train": train, "test": held})
    assert not set(groups[splits.rows["train"]]) & set(groups[splits.rows["test"]])


@given(
    table=hnp.arrays("u1", st.tuples(st.integers(2, 80), st.integers(2, 9)), elements=st.integers(0, 1)),
    parts=st.integers(2, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_several_labels(table: np.ndarray[Any, Any], parts: int, seed: int) -> None:
    """Parts have exactly their sizes, and the rarest label is within one row of its share."""
    sizes = np.array([len(part) for part in np.array_split(np.arange(len(table)), parts)])
    dealt = stratify(table, sizes, seed)
    assert np.bincount(dealt, minlength=parts).tolist() == sizes.tolist()
    assert dealt.tolist() == stratify(table, sizes, seed).tolist()
    totals = table.sum(axis=0)
    if totals.any():
        rarest = int(np.where(totals > 0, totals, 1 << 20).argmin())
        got = np.array([table[dealt == part, rarest].sum() for part in range(parts)])
        assert np.abs(got - totals[rarest] * sizes / len(table)).max() <= 1 + 1e-9


@given(
    values=st.one_of(
        hnp.arrays("<i8", st.integers(0, 400), elements=st.integers(-(2**62), 2**62)),
        hnp.arrays("S5", st.integers(0, 200)),
        hnp.arrays("u2", st.integers(0, 400)),
    ),
    step=st.integers(1, 60),
)
def test_values_are_numbered(values: np.ndarray[Any, Any], step: int) -> None:
    """In pieces of any length, as np.unique numbers them at once; and what is kept on disk is the same."""
    kept, codes = encode(lambda: iter([values[i : i + step] for i in range(0, len(values), step)]), len(values))
    unique, inverse = np.unique(values, return_inverse=True)
    plain = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in unique.tolist()]
    assert (list(kept), codes.tolist()) == (plain, inverse.tolist())
    strata = load_strata(dump_strata(Strata("y", Labels("classes", kept, codes))))
    assert strata.labels is not None and strata.labels.codes.tolist() == inverse.tolist()


def test_what_rows_are_classes() -> None:
    """One-hot rows are classes by their position, several ones are several labels, others none."""
    assert labels_of(np.eye(3)[[2, 0, 1]]).codes.tolist() == [2, 0, 1]
    assert labels_of(np.array([[1, 1], [0, 1]])).kind == "multi-label"
    with pytest.raises(NoClasses, match="quantile bins"):
        labels_of(np.array([0.5, 1.5]))
    with pytest.raises(NoClasses, match="not all of them 0 or 1"):
        labels_of(np.full((4, 3), 2))
    with pytest.raises(NoClasses, match="holds no classes"):
        labels_of(np.zeros((2, 3, 3)))
    # Text that is read in pieces is as wide as the longest in each.
    blocks = [np.array([b"a"]), np.array([b"long name"]), np.array([b"b"])]
    assert encode(lambda: iter(blocks), 3)[0] == ("a", "b", "long name")
