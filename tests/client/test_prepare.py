"""What a model is given of a batch: real files, a real server, real Keras."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.errors import BadParameter, FieldNotFound
from h5feed.prepare import Preparation
from keras.src.legacy.preprocessing.image import ImageDataGenerator

from tests.support.server_process import ServerProcess

ROWS = 60
BATCH = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 6, 3), dtype=np.uint8)
KINDS = np.random.default_rng(1).permutation(np.arange(ROWS) % 3)
NAMES = np.array([b"cat", b"dog", b"ant"])
FLOATS = np.random.default_rng(2).random((ROWS, 2)) * 9 - 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """Datasets `ints`, `text`, `onehot`, `wide` (many labels a row), `two` (0 and 1), `signs` (-1 and 1), `many`."""
    folder = tmp_path_factory.mktemp("labels")
    labels: dict[str, Any] = {
        "ints": KINDS,
        "text": NAMES[KINDS],
        "onehot": np.eye(3, dtype=np.uint8)[KINDS],
        "wide": (np.arange(ROWS)[:, None] >> np.arange(3)) & 1,
        "two": KINDS > 0,
        "signs": np.where(KINDS > 0, 1, -1),
        "targets": FLOATS,
        "grades": KINDS + 5,
        "ids": KINDS + 10**12 - 2,
    }
    for name, values in labels.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["images"], file["labels"] = IMAGES, values
            if name == "ints":
                file["labels"].attrs["class_names"] = ["cat", "dog", "ant"]
    with h5py.File(folder / "many.h5", "w") as file:
        file["image"], file["depth"] = IMAGES, FLOATS
        file["kind"], file["mask"] = KINDS, IMAGES[..., :1]
        first = file.create_dataset("first", data=np.ascontiguousarray(np.moveaxis(IMAGES, -1, 1)))
        first.attrs["channels"] = "rgb"
        file["weight"] = np.arange(ROWS, dtype=np.float64)
    return serve_module(folder, "--workers", "1")


def prepared(dataset: h5feed.Dataset, index: int = 0, *, last: Any = "keep", **options: Any) -> tuple[Any, ...]:
    """Batch `index` of the rows in their own order."""
    prepare = Preparation(dataset, **options)
    return prepare(dataset.batch(index, batch_size=BATCH, fields=prepare.fields, last=last))


ONE_HOT = np.eye(3, dtype=np.float32)

TARGETS: list[tuple[str, str, Any]] = [
    ("ints", "auto", KINDS),
    ("onehot", "auto", np.eye(3, dtype=np.uint8)[KINDS]),
    ("text", "auto", np.array([1, 2, 0])[KINDS]),
    ("two", "auto", KINDS > 0),
    ("signs", "auto", np.where(KINDS > 0, 1, -1)),
    ("wide", "auto", (np.arange(ROWS)[:, None] >> np.arange(3)) & 1),
    ("targets", "auto", FLOATS),
    ("ints", "int", KINDS),
    ("ints", "sparse", KINDS),
    ("ints", "raw", KINDS),
    ("ints", "categorical", ONE_HOT[KINDS]),
    ("onehot", "int", KINDS),
    ("onehot", "raw", np.eye(3, dtype=np.uint8)[KINDS]),
    ("onehot", "categorical", ONE_HOT[KINDS]),
    # ant, cat, dog
    ("text", "int", np.array([1, 2, 0])[KINDS]),
    ("text", "categorical", ONE_HOT[np.array([1, 2, 0])[KINDS]]),
    ("two", "int", KINDS > 0),
    ("two", "binary", (KINDS > 0).astype(np.float32)),
    ("two", "categorical", np.eye(2, dtype=np.float32)[(KINDS > 0).astype(int)]),
    ("signs", "binary", (KINDS > 0).astype(np.float32)),
    ("wide", "int", (np.arange(ROWS)[:, None] >> np.arange(3)) & 1),
    ("wide", "categorical", ((np.arange(ROWS)[:, None] >> np.arange(3)) & 1).astype(np.float32)),
    ("targets", "int", FLOATS),
    ("targets", "raw", FLOATS),
]


@pytest.mark.parametrize(("name", "mode", "expected"), TARGETS)
def test_class_modes(feed: h5feed.Feed, name: str, mode: Any, expected: Any) -> None:
    """Each kind of label in each class mode gives these values, in this dtype; images stay uint8."""
    x, y = prepared(feed[name], 1, class_mode=mode)
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, IMAGES[BATCH : 2 * BATCH])
    np.testing.assert_array_equal(y, expected[BATCH : 2 * BATCH])
    assert y.dtype.kind in "iu" if y.dtype.kind in "iu" else y.dtype == expected.dtype


@pytest.mark.parametrize(
    ("name", "loss", "given"),
    [
        ("onehot", "categorical_crossentropy", "as one-hot rows"),
        ("ints", "sparse_categorical_crossentropy", "as numbers"),
        ("text", "sparse_categorical_crossentropy", "as numbers"),
    ],
)
def test_the_loss_that_fits_what_is_stored(
    feed: h5feed.Feed, capsys: pytest.CaptureFixture[str], name: str, loss: str, given: str
) -> None:
    """Labels as they lie in the file suit the loss of their kind; the line that is printed says which kind it is."""
    train = feed[name].sequence(batch_size=BATCH)
    assert f"belonging to 3 classes ({given})." in capsys.readouterr().out
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3, activation="softmax")])
    model.compile(loss=loss, optimizer="sgd")
    assert np.isfinite(model.fit(train, verbose=0).history["loss"]).all()
    train.close()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ints", {"class_mode": "binary"}, "two classes, but 'labels' has 3"),
        ("ints", {"class_mode": "multi"}, "class_mode='multi' must be one of 'auto', 'int'"),
        ("ids", {"class_mode": "categorical"}, "rows of 1,000,000,000,001 numbers"),
        ("signs", {"class_mode": "categorical"}, "needs classes >= 0, but 'labels' holds -1"),
        ("wide", {"class_mode": "binary"}, "needs classes: integers, bools, text or one-hot rows"),
        ("text", {"class_mode": "raw"}, "is text"),
        ("text", {"x": "labels"}, "is text"),
        ("ints", {"x": "pictures"}, "no field 'pictures': choose from images, labels"),
        ("ints", {"sample_weight": "w"}, "no field 'w'"),
        ("ints", {"rescale": "a lot"}, "rescale='a lot' must be a number"),
        ("ints", {"mean": [1, 2]}, "does not broadcast to \\[8, 6, 3\\], a sample of 'images'"),
        ("ints", {"std": float("nan")}, "must be finite"),
        ("ints", {"transform": 5}, "must be a function"),
        ("ints", {"transform": keras.layers.MixUp()}, "also mixes targets"),
    ],
)
def test_what_cannot_be_is_said(feed: h5feed.Feed, name: str, options: dict[str, Any], message: str) -> None:
    """Wrong options are refused when they are given, by name and with what would be right."""
    with pytest.raises((BadParameter, FieldNotFound), match=message):
        Preparation(feed[name], **options)


def test_several_fields(feed: h5feed.Feed) -> None:
    """A list of fields is a dict, a tuple a tuple, a dict renames; no labels are no targets."""
    many = feed["many"]
    x, y = prepared(many, x=["image", "depth"], y=("kind", "mask"))
    assert list(x) == ["image", "depth"] and [type(y), len(y)] == [tuple, 2]
    np.testing.assert_array_equal(x["depth"], FLOATS[:BATCH])
    np.testing.assert_array_equal(y[1], IMAGES[:BATCH, ..., :1])
    x, y = prepared(many, x={"left": "image"}, y="kind", class_mode="categorical")
    np.testing.assert_array_equal(x["left"], IMAGES[:BATCH])
    np.testing.assert_array_equal(y, ONE_HOT[KINDS[:BATCH]])
    assert len(prepared(many, x="image", y=[])) == len(prepared(many, x="image", class_mode=None)) == 1
    x, y = prepared(many, x="image", class_mode="input", rescale=1 / 255)
    assert x is y
    assert Preparation(many, x="image", class_mode=None).fields == ["image"]


def test_numbers_that_do_not_begin_at_0_are_told(feed: h5feed.Feed) -> None:
    """Three classes by the numbers 5, 6 and 7 are eight outputs of a model."""
    for name, given in (
        ("grades", "as numbers from 5 to 7: the model needs 8 outputs"),
        ("signs", "as numbers from -1 to 1"),
        ("ints", "as numbers"),
        ("text", "as numbers"),
        ("two", "as numbers"),
    ):
        labels = Preparation(feed[name]).labels
        assert labels is not None and labels.are_classes and labels.given == given, name


def test_what_is_named_once_is_not_taken_again(feed: h5feed.Feed) -> None:
    """A field that is named as target or weight is no input by default, and an input is no target."""
    many = feed["many"]
    assert set(Preparation(many).inputs) >= {"image", "first"} and "depth" in many.fields
    inputs = Preparation(many).inputs
    assert Preparation(many, y="first").inputs == [name for name in inputs if name != "first"]
    assert Preparation(many, y={"out": "image"}).inputs == [name for name in inputs if name != "image"]
    assert "image" not in Preparation(many, y="kind", sample_weight="image").inputs
    both = Preparation(feed["ints"], x=["images", "labels"])
    assert both.inputs == ["images", "labels"] and both.labels is None and "y=" in str(both.no_targets)


def test_weights_of_samples_and_of_the_padded_tail(feed: h5feed.Feed) -> None:
    """A weight field is the third value; rows that pad the tail weigh nothing, with a field or without."""
    many = feed["many"]
    _, _, weight = prepared(many, 1, x="image", y="kind", sample_weight="weight")
    assert weight.dtype == np.float32 and weight.tolist() == list(range(BATCH, 2 * BATCH))
    _, _, weight = prepared(many, 3, x="image", y="kind", sample_weight="weight", last="pad")
    assert weight.tolist() == [*range(48, 60), 0, 0, 0, 0]
    x, y, weight = prepared(many, 3, x="image", class_mode=None, last="pad")
    assert y is None and weight.tolist() == [1] * 12 + [0] * 4 and len(x) == BATCH


def test_scaling(feed: h5feed.Feed) -> None:
    """(x * rescale - mean) / std, by number, by channel and by field, as float32; the batch keeps what it held."""
    ints = feed["ints"]
    for rescale, mean, std in [(1 / 255, None, None), (None, 100, 7), (1 / 255, [0.1, 0.2, 0.3], [1, 0, 3])]:
        batch = ints.batch(0, batch_size=BATCH)
        x, _ = Preparation(ints, rescale=rescale, mean=mean, std=std)(batch)
        spread = np.where(np.equal(std, 0), 1, std) if std is not None else 1
        expected = (IMAGES[:BATCH] * (rescale or 1) - np.array(0 if mean is None else mean)) / spread
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(batch["images"], IMAGES[:BATCH])
    x, _ = prepared(feed["many"], x=["image", "depth"], y="kind", rescale={"image": 2.0}, mean={"depth": 1e6})
    np.testing.assert_array_equal(x["image"], IMAGES[:BATCH] * np.float32(2))
    np.testing.assert_array_equal(x["depth"], (FLOATS[:BATCH] - 1e6).astype(np.float32))


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_the_servers_statistics(feed: h5feed.Feed, split: str) -> None:
    """mean="server" and std="server" are those of the training rows, per channel, for validation rows too."""
    ints = feed["ints"]
    options: dict[str, Any] = {} if split == "all" else {"val": 0.25, "stratify": "none"}
    rows = IMAGES if split == "all" else IMAGES[ints.split_rows("train", **options)]
    mean, std = rows.mean((0, 1, 2)) / 255, rows.std((0, 1, 2)) / 255
    prepare = Preparation(ints, split, rescale=1 / 255, mean="server", std="server", split_options=options)
    batch = ints.batch(0, split=split, batch_size=BATCH, **options)
    np.testing.assert_allclose(prepare(batch)[0], (IMAGES[batch.rows] / 255 - mean) / std, rtol=1e-4, atol=1e-5)
    depth, _ = prepared(feed["many"], x="depth", y="kind", mean="server")
    np.testing.assert_allclose(depth.mean(0), (FLOATS[:BATCH] - FLOATS.mean(0)).mean(0), atol=1e-6)


def test_scaled_batches_do_not_share_memory(feed: h5feed.Feed) -> None:
    """Buffers are recycled only when nobody holds a batch any more."""
    ints = feed["ints"]
    prepare = Preparation(ints, rescale=1.0)
    kept = [prepare(batch)[0][:, :2] for batch in ints.batches(batch_size=BATCH)]
    np.testing.assert_array_equal(np.concatenate(kept), IMAGES[:, :2].astype(np.float32))


def test_functions(feed: h5feed.Feed) -> None:
    """f(x), f(x, y), f(x, y, rng) and f(x, y, *, rng) are called as their signatures say."""
    ints = feed["ints"]

    def noisy(x: Any, y: Any, rng: np.random.Generator) -> Any:
        return x + rng.random(x.shape, np.float32), y

    def keyword(x: Any, y: Any, *, rng: np.random.Generator) -> Any:
        return noisy(x, y, rng)

    def weighted(x: Any, y: Any) -> Any:
        x[...] = 0
        return x, y, np.full(len(x), 2.0)

    np.testing.assert_array_equal(prepared(ints, transform=lambda x: x // 2)[0], IMAGES[:BATCH] // 2)
    np.testing.assert_array_equal(prepared(ints, transform=lambda x, y: (x, y + 1))[1], KINDS[:BATCH] + 1)
    np.testing.assert_array_equal(
        prepared(ints, transform=keras.applications.mobilenet.preprocess_input, rescale=1)[0],
        IMAGES[:BATCH] / np.float32(127.5) - 1,
    )
    first, again, other = (
        prepared(ints, transform=noisy, seed=3)[0],
        prepared(ints, transform=keyword, seed=3)[0],
        prepared(ints, transform=noisy, seed=4)[0],
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    batch = ints.batch(3, batch_size=BATCH, last="pad")
    x, _, weight = Preparation(ints, transform=weighted)(batch)
    assert not x.any() and weight.tolist() == [2] * 12 + [0] * 4
    np.testing.assert_array_equal(batch["images"][:12], IMAGES[48:])
    with pytest.raises(BadParameter, match="must return"):
        prepared(ints, transform=lambda x, y: x)


def test_the_generator_depends_on_the_place_alone(feed: h5feed.Feed) -> None:
    """Same seed, epoch, batch and shard: same numbers; any of them another: others; a pass's number may be given."""
    ints = feed["ints"]
    batch = ints.batch(1, batch_size=BATCH, shuffle=True, epoch=2)

    def drawn(batch: Any, epoch: int | None = None, **options: Any) -> float:
        prepare = Preparation(ints, transform=lambda x, y, rng: (rng.random(), y), **options)
        return float(prepare(batch, epoch)[0])

    assert drawn(batch) == drawn(batch) == drawn(batch, 2)
    other = ints.batch(0, batch_size=BATCH, shuffle=True, epoch=2)
    values = [drawn(batch), drawn(batch, 3), drawn(other), drawn(batch, seed=-1), drawn(batch, shard=1)]
    assert len(set(values)) == len(values)


def test_keras_layers(feed: h5feed.Feed) -> None:
    """Preprocessing layers augment as in training, alike for the same batch whatever was drawn before."""
    ints = feed["ints"]
    augment = keras.Sequential([keras.layers.RandomFlip(), keras.layers.RandomRotation(0.2), keras.layers.Rescaling(2)])

    def drawn(index: int) -> Any:
        return np.asarray(keras.ops.convert_to_numpy(prepared(ints, index, transform=augment)[0]))

    first, second = drawn(0), drawn(1)
    np.testing.assert_array_equal(drawn(0), first)
    assert (first != second).any() and (first != 2.0 * IMAGES[:BATCH]).any()
    doubled, _ = prepared(ints, transform=keras.layers.Rescaling(2))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(doubled), IMAGES[:BATCH] * np.float32(2))


def test_image_data_generator(feed: h5feed.Feed) -> None:
    """An ImageDataGenerator treats each image as its own `flow` would, and leaves numpy's global generator alone."""
    generator = ImageDataGenerator(
        rescale=1 / 255, rotation_range=30, horizontal_flip=True, width_shift_range=0.2, featurewise_center=True
    )
    generator.fit(IMAGES)
    np.random.seed(7)
    expected = np.random.random(3)
    np.random.seed(7)
    x, _ = prepared(feed["ints"], transform=generator, seed=5)
    np.testing.assert_array_equal(np.random.random(3), expected)
    assert x.dtype == np.float32 and x.shape == (BATCH, 8, 6, 3)
    np.testing.assert_array_equal(x, prepared(feed["ints"], transform=generator, seed=5)[0])
    assert (x != prepared(feed["ints"], transform=generator, seed=6)[0]).any()
    seeds = np.random.default_rng([5, 0, 0, 0]).integers(0, 2**31, BATCH)
    for image, row, seed in zip(x, IMAGES, seeds, strict=False):
        (flowed,), _ = next(_flow(generator, row, int(seed)))
        np.testing.assert_allclose(image, flowed, atol=1e-6)


def _flow(generator: Any, row: Any, seed: int) -> Any:
    """What `flow` gives of one image, its transformation drawn from `seed`."""
    drawn = generator.get_random_transform
    generator.get_random_transform = lambda shape, _=None: drawn(shape, seed)
    try:
        yield next(generator.flow(row[None], [0], batch_size=1, shuffle=False))
    finally:
        del generator.get_random_transform


def test_like_flow_from_directory(feed: h5feed.Feed, tmp_path: Path) -> None:
    """Images, targets and classes equal those of `flow_from_directory` over the same images as files."""
    order = []
    for name in sorted(NAMES.tolist()):
        (tmp_path / name.decode()).mkdir()
        for row in np.flatnonzero(NAMES[KINDS] == name):
            keras.utils.save_img(tmp_path / name.decode() / f"{row:03}.png", IMAGES[row], scale=False)
            order.append(row)
    text = feed["text"]
    for mode in ("categorical", "sparse"):
        flow = ImageDataGenerator(rescale=1 / 255).flow_from_directory(
            tmp_path, target_size=(8, 6), class_mode=mode, batch_size=ROWS, shuffle=False
        )
        theirs = flow[0]
        prepare = Preparation(text, class_mode=mode, rescale=1 / 255)
        ours = prepare(text.batch(0, batch_size=ROWS, fields=prepare.fields))
        np.testing.assert_allclose(ours[0][order], theirs[0], atol=1e-6)
        np.testing.assert_array_equal(ours[1][order], theirs[1])
        assert prepare.labels is not None and prepare.labels.class_indices == flow.class_indices


def test_the_servers_statistics_of_channels_first(feed: h5feed.Feed) -> None:
    """Means of channels go to the axis that the channels are on."""
    images, _ = prepared(feed["many"], x="first", y="kind", mean="server")
    expected = np.moveaxis(IMAGES[:BATCH] - IMAGES.mean((0, 1, 2)), -1, 1)
    np.testing.assert_allclose(images, expected, atol=1e-3)
