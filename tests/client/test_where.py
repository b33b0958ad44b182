"""``where=`` and ``classes=`` of the loops: the rows, their order, and the numbers of the classes."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.cli import main
from h5feed.errors import BadParameter, RowOutOfRange
from keras.src.legacy.preprocessing.image import ImageDataGenerator

from tests.support.server_process import ServerProcess

ROWS = 240
NAMES = ["ant", "cat", "dog", "fox"]
KINDS = np.random.default_rng(1).permutation(np.arange(ROWS) % 4)
WIDTH = np.random.default_rng(2).integers(0, 100, ROWS)
IMAGES = np.random.default_rng(3).integers(0, 256, (ROWS, 4, 4, 3), np.uint8)

WHERE = ["width >= 30", "labels in cat, dog, fox"]
KEPT = np.flatnonzero((WIDTH >= 30) & (KINDS > 0))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """Datasets of which the labels are `named` numbers, `text`, `grades` from 5, `halves` (floats) and `onehot`."""
    folder = tmp_path_factory.mktemp("kinds")
    labels: dict[str, Any] = {
        "named": KINDS,
        "text": np.array([name.encode() for name in NAMES])[KINDS],
        "grades": KINDS + 5,
        "halves": KINDS / 2,
        "onehot": np.eye(4, dtype=np.uint8)[KINDS],
    }
    for name, values in labels.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["images"], file["labels"], file["width"] = IMAGES, values, WIDTH
            if name == "named":
                file["labels"].attrs["class_names"] = NAMES
    return serve_module(folder, "--workers", "2")


@pytest.fixture
def named(feed: h5feed.Feed) -> h5feed.Dataset:
    return feed["named"]


def _rows_of(images: npt.NDArray[Any]) -> list[int]:
    """The rows that images are of: no two are the same."""
    number = {image.tobytes(): row for row, image in enumerate(IMAGES)}
    return [number[np.asarray(image).tobytes()] for image in images]


def _seen(loop: Any) -> list[int]:
    return [row for x, *_ in loop for row in _rows_of(x)]


@pytest.mark.parametrize(
    "call",
    [
        lambda feed, odd: feed[odd],
        lambda feed, odd: feed["named"].batch(0, where=f"label = {odd}"),
        lambda feed, odd: feed["named"].batch(0, split=odd),
        lambda feed, odd: feed["named"].splits(stratify=odd),
        lambda feed, odd: feed["named"].stats(odd),
        lambda feed, odd: feed["named"].take([0], fields=[odd]),
        lambda feed, odd: feed["named"].show(field=odd),
    ],
)
def test_what_is_no_text(feed: h5feed.Feed, call: Any) -> None:
    """Python strings may hold half of a surrogate pair, which no URL and no JSON can."""
    with pytest.raises(BadParameter, match=r"\\ud800' is not text"):
        call(feed, "\ud800")


def test_one_or_several_conditions(named: h5feed.Dataset) -> None:
    """A string is one, a list several."""
    np.testing.assert_array_equal(named.split_rows("all", where=WHERE), KEPT)
    np.testing.assert_array_equal(named.split_rows("all", where="width >= 30"), np.flatnonzero(WIDTH >= 30))
    np.testing.assert_array_equal(named.split_rows("all", where=()), np.arange(ROWS))
    with pytest.raises(BadParameter, match="must be a condition such as"):
        named.split_rows("all", where=[3])  # type: ignore[list-item]
    with pytest.raises(BadParameter, match="did you mean 'width'"):
        named.plan(where="widht > 3")


@pytest.mark.parametrize("kind", ["loader", "sequence", "torch"])
def test_loops(named: h5feed.Dataset, kind: str) -> None:
    """Each row that meets the conditions once a pass, in a new order each time."""
    if kind == "torch":
        pytest.importorskip("torch")
    options: dict[str, Any] = {"verbose": False} if kind == "sequence" else {}
    loop = getattr(named, kind)(batch_size=16, shuffle=True, where=WHERE, **options)
    assert loop.samples == len(KEPT)
    first, second = _seen(loop), _seen(loop)
    assert sorted(first) == sorted(second) == KEPT.tolist() and first != second
    assert "where" in repr(loop)


def test_single_rows(named: h5feed.Dataset) -> None:
    pytest.importorskip("torch")
    rows = named.torch_map(where=WHERE)
    np.testing.assert_array_equal(rows.row_ids, KEPT)
    chosen = named.torch_map(classes=["fox", "ant"])
    labels = [int(chosen[place][1]) for place in range(20)]
    assert labels == [["fox", "ant"].index(NAMES[KINDS[row]]) for row in chosen.row_ids[:20]]


def test_splits_and_statistics(named: h5feed.Dataset) -> None:
    splits = named.splits(test=0.25, where=WHERE)
    assert splits["splits"]["all"]["rows"] == len(KEPT) and "where labels in cat, dog, fox and width >= 30" in repr(
        splits
    )
    assert set(splits.class_weight("train")) == {1, 2, 3}
    train = named.split_rows("train", test=0.25, where=WHERE)
    assert named.stats("train", field="width", test=0.25, where=WHERE).mean == pytest.approx(WIDTH[train].mean())
    x, *_ = named.loader("train", test=0.25, where=WHERE, batch_size=ROWS, mean="server", std="server").example()
    np.testing.assert_allclose(x.reshape(-1, 3).mean(axis=0), 0, atol=1e-4)


def test_resuming(named: h5feed.Dataset) -> None:
    """A pass goes on where it was, with the same conditions in any order; with others it does not."""
    loader = named.loader(batch_size=16, shuffle=True, where=WHERE)
    whole = _seen(loader)
    loader.set_epoch(0)
    begun = []
    for x, *_ in loader:
        begun += _rows_of(x)
        if len(begun) == 48:
            break
    state = json.loads(json.dumps(loader.state_dict()))
    again = named.loader(batch_size=16, shuffle=True, where=list(reversed(WHERE)))
    again.load_state_dict(state)
    assert begun + _seen(again) == whole
    assert begun + _seen(pickle.loads(pickle.dumps(loader))) == whole
    for other in ("width >= 30", None):
        with pytest.raises(BadParameter, match="the state was saved with where="):
            named.loader(batch_size=16, shuffle=True, where=other).load_state_dict(state)


def test_the_cache_of_rows(named: h5feed.Dataset, tmp_path: Path) -> None:
    """Rows in it serve all conditions; the order is that of the conditions."""
    for where in (["width >= 30"], ["width < 50"], WHERE, []):
        cached = named.loader(batch_size=16, shuffle=True, seed=4, where=where, cache=tmp_path / "rows")
        plain = named.loader(batch_size=16, shuffle=True, seed=4, where=where)
        for _ in range(2):
            assert _seen(cached) == _seen(plain)


CHOSEN = ["fox", "ant", "dog"]


@pytest.fixture(scope="module")
def as_keras(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keras' own loader over a folder of as many images, of the same classes."""
    folder = tmp_path_factory.mktemp("photos")
    for row, kind in enumerate(KINDS):
        (folder / NAMES[kind]).mkdir(exist_ok=True)
        (folder / NAMES[kind] / f"{row:03}.png").write_bytes(b"")
    return ImageDataGenerator().flow_from_directory(folder, classes=CHOSEN, shuffle=False, class_mode="sparse")


@pytest.mark.parametrize("name", ["named", "text"])
def test_classes_are_numbered_as_keras_does(feed: h5feed.Feed, as_keras: Any, name: str) -> None:
    """The same classes get the same numbers, and as many rows."""
    sequence = feed[name].sequence(batch_size=16, classes=CHOSEN, class_mode="int", verbose=False)
    assert sequence.samples == as_keras.samples
    assert sequence.class_indices == as_keras.class_indices
    number = {int(Path(file).stem): kind for file, kind in zip(as_keras.filenames, as_keras.classes, strict=True)}
    assert sequence.classes.tolist() == [number[row] for row in sequence.row_ids.tolist()]
    weights = sequence.class_weight
    counts = np.bincount(as_keras.classes)
    assert weights == {kind: pytest.approx(as_keras.samples / (3 * count)) for kind, count in enumerate(counts)}


@pytest.mark.parametrize(
    ("name", "classes", "kinds"),
    [
        ("named", ["fox", "ant"], [3, 0]),
        ("named", [3, "ant"], [3, 0]),
        ("named", np.array([2, 0, 1]), [2, 0, 1]),
        ("text", ["fox", "ant"], [3, 0]),
        ("grades", [8, 5], [3, 0]),
        ("halves", [1.5, 0], [3, 0]),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "int", "categorical", "binary"])
def test_targets_of_classes(feed: h5feed.Feed, name: str, classes: Any, kinds: list[int], mode: Any) -> None:
    """In every class mode, targets are the places in the list."""
    if mode == "binary" and len(kinds) != 2:
        with pytest.raises(BadParameter, match="needs two classes"):
            feed[name].loader(classes=classes, class_mode=mode)
        return
    loader = feed[name].loader(batch_size=16, classes=classes, class_mode=mode, shuffle=True, where="width >= 30")
    rows, targets = [], []
    for x, y in loader:
        rows += _rows_of(x)
        targets.append(np.asarray(y).copy())
    assert sorted(rows) == np.flatnonzero(np.isin(KINDS, kinds) & (WIDTH >= 30)).tolist()
    places = np.array([kinds.index(KINDS[row]) for row in rows])
    found = np.concatenate(targets)
    expected = np.eye(len(kinds))[places] if mode == "categorical" else places
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == (np.float32 if mode in ("categorical", "binary") else np.int64)


def test_a_model_learns_chosen_classes(named: h5feed.Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """Three outputs for three classes, whatever the file numbers them."""
    train = named.sequence("train", val=0.25, shuffle=True, batch_size=16, classes=CHOSEN, rescale=1 / 255)
    assert "belonging to 3 classes (as numbers)" in capsys.readouterr().out
    val = named.sequence("val", val=0.25, batch_size=16, classes=CHOSEN, rescale=1 / 255, verbose=False)
    assert val.class_indices == train.class_indices == {"fox": 0, "ant": 1, "dog": 2}
    assert not set(train.row_ids.tolist()) & set(val.row_ids.tolist())
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(train, validation_data=val, epochs=2, verbose=0).history
    assert np.isfinite(losses["loss"]).all() and np.isfinite(losses["val_loss"]).all()


def test_classes_without_targets(named: h5feed.Dataset) -> None:
    """They select rows for an autoencoder, too."""
    loader = named.loader(batch_size=16, classes=["dog"], class_mode="input")
    assert sorted(_seen(loader)) == np.flatnonzero(KINDS == 2).tolist()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("named", {"classes": ["catt"]}, "has no class 'catt': did you mean 'cat'"),
        ("named", {"classes": "cat"}, "must be a list of classes"),
        ("named", {"classes": []}, "must be a list of classes"),
        ("named", {"classes": ["cat", 1]}, "has 'cat' twice"),
        ("named", {"classes": [None]}, "neither the name of a class nor a number"),
        ("named", {"classes": ["cat"], "class_mode": "raw"}, "class_mode='raw' gives stored values"),
        ("named", {"classes": ["cat"], "y": ["labels", "width"]}, "needs one label field"),
        ("grades", {"classes": ["five"]}, "holds numbers without names"),
        ("onehot", {"classes": [1]}, "one number or text per row"),
        ("named", {"classes": [-1]}, "'labels' has no class '-1': did you mean '1'"),
        ("grades", {"classes": [5, 2**70]}, "has no class '1180591620717411303424': the classes are 5, 6, 7, 8"),
        ("text", {"classes": ["dgo"]}, "'labels' has no class 'dgo': did you mean 'dog'?"),
        ("named", {"where": 5}, "where=5 must be a condition"),
        ("named", {"where": [5]}, r"where=\[5\] must be a condition"),
    ],
)
def test_what_is_no_choice(feed: h5feed.Feed, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        feed[name].loader(**options)


def test_no_row_is_left(feed: h5feed.Feed) -> None:
    """Training and evaluating on nothing is an error that names the filter."""
    sequence = feed["named"].sequence(batch_size=8, where="width > 1e9")
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(4, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    for use in (model.fit, model.evaluate, model.predict):
        with pytest.raises(RowOutOfRange, match=r"no batches: 'all' of 'named' where width > 1e9: 0 rows"):
            use(sequence, verbose=0)
    with pytest.raises(IndexError, match="0 batches: 'all' of 'named' where width > 1e9"):
        sequence[0]
    assert list(sequence) == []


def test_on_the_command_line(server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`--where` selects rows, and may be given several times."""
    where = [word for condition in WHERE for word in ("--where", condition)]
    assert main(["stats", server.url, "named", "--field", "width", *where]) == 0
    assert f"{len(KEPT)} rows" in capsys.readouterr().out
    output = tmp_path / "batch.npz"
    assert main(["get", server.url, "named", "--batch-size", "20", "-o", str(output), *where]) == 0
    np.testing.assert_array_equal(np.load(output)["__rows__"], KEPT[:20])
    assert main(["info", server.url, "named", "--where", "widht > 3"]) == 1
    assert "did you mean 'width'" in capsys.readouterr().err
