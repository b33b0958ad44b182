"""Crops in all loops, on several servers, of pixels and of image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import BadParameter, FieldNotFound

from tests.support.object_store import StoreProxy, serve_folder
from tests.support.photographs import encoded, photograph
from tests.support.server_process import ServerProcess

ROWS, HEIGHT, WIDTH = 30, 70, 90
CROP: dict[str, Any] = {"crop": (32, 48)}


def _write(path: Path) -> None:
    images = np.stack([photograph(number, HEIGHT, WIDTH) for number in range(ROWS)])
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=images, chunks=(1, 32, 32, 3), compression="gzip")
        # A mask that shows of which row and place it is.
        file["mask"] = np.arange(ROWS * HEIGHT * WIDTH, dtype=np.int32).reshape(ROWS, HEIGHT, WIDTH)
        file["label"] = np.arange(ROWS) % 3
        files = [encoded(image, quality=95) for image in images]
        photos = file.create_dataset("photo", (ROWS,), h5py.vlen_dtype(np.uint8))
        for row, data in enumerate(files):
            photos[row] = np.frombuffer(data, np.uint8)
        photos.attrs.update({"encoding": "mixed", "shape": (HEIGHT, WIDTH, 3)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    _write(path / "scans.h5")
    with h5py.File(path / "scans.h5") as scans, h5py.File(path / "masks.h5", "w") as file:
        file["mask"] = scans["mask"][:]
    return path


@pytest.fixture(scope="module")
def servers(folder: Path, serve_module: Callable[..., ServerProcess]) -> list[ServerProcess]:
    """Two over the same data. The first keeps no fields in memory, so it reads the parts from the file."""
    return [serve_module(folder, H5FEED_CACHE_BYTES="0"), serve_module(folder)]


@pytest.fixture(scope="module")
def ds(servers: list[ServerProcess]) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(servers[0].url, deadline=60) as feed:
        yield feed["scans"]


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, npt.NDArray[Any]]:
    with h5py.File(folder / "scans.h5") as file:
        return {name: file[name][:] for name in ("image", "mask")}


def _cut(array: npt.NDArray[Any], batch: h5feed.Batch, lengths: tuple[int, ...] = (32, 48)) -> npt.NDArray[Any]:
    """What numpy takes of the rows of a batch."""
    parts = [
        array[row][tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))]
        for row, starts in zip(batch.rows.tolist(), batch["__crop__"].tolist(), strict=True)
    ]
    return np.stack(parts)


@pytest.mark.parametrize("at", ["random", "center", "grid"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches(
    ds: h5feed.Dataset, servers: list[ServerProcess], truth: dict[str, npt.NDArray[Any]], at: Any, shuffle: bool
) -> None:
    """Images and masks have the same part, and two servers send the same; the plan has the shapes."""
    order: dict[str, Any] = {**CROP, "crop_at": at, "batch_size": 7, "shuffle": shuffle, "epoch": 2}
    order["fields"] = ["image", "mask", "label"]
    plan = ds.plan(**order)
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    assert shapes["image"] == (7, 32, 48, 3) and shapes["mask"] == (7, 32, 48)
    assert shapes["__crop__"] == (7, 2) and shapes["label"] == (7,)
    assert plan.rows == ROWS * (6 if at == "grid" else 1)
    with h5feed.connect(servers[1].url, deadline=60) as feed:
        others = feed["scans"].batches(**order)
        count = 0
        for batch, other in zip(ds.batches(**order), others, strict=True):
            for name in ("image", "mask"):
                np.testing.assert_array_equal(batch[name], _cut(truth[name], batch))
            np.testing.assert_array_equal(batch["label"], batch.rows % 3)
            assert all(np.array_equal(batch[name], other[name]) for name in batch)
            np.testing.assert_array_equal(ds.batch(batch.index, **order)["image"], batch["image"])
            count += len(batch.rows)
    assert count == plan.rows


def test_predictions_are_put_together(ds: h5feed.Dataset, truth: dict[str, npt.NDArray[Any]]) -> None:
    """A grid in any order of the cells covers each row: put in their places, the crops are the rows."""
    found = np.zeros_like(truth["mask"])
    for batch in ds.batches(**CROP, crop_at="grid", shuffle=True, fields=["mask"], shard=0, shards=1):
        for row, (top, left), part in zip(batch.rows, batch["__crop__"], batch["mask"], strict=True):
            found[row, top : top + 32, left : left + 48] = part
    np.testing.assert_array_equal(found, truth["mask"])


def test_passes_have_other_crops(ds: h5feed.Dataset) -> None:
    """Also without a shuffled order, and a loop that continues from a state delivers what it would have."""
    options: dict[str, Any] = {**CROP, "x": "mask", "y": "label", "batch_size": 8}
    loader = ds.loader(**options)
    passes = [[x.copy() for x, _ in loader] for _ in range(2)]
    assert passes[0][0].shape == (8, 32, 48)
    assert all((a != b).any() for a, b in zip(*passes, strict=True))
    expected = [batch["mask"] for batch in ds.batches(**CROP, fields=["mask", "label"], batch_size=8, epoch=1)]
    assert all(np.array_equal(a, b) for a, b in zip(passes[1], expected, strict=True))
    loader = ds.loader(**options)
    begun = iter(loader)
    first = [next(begun)[0].copy() for _ in range(2)]
    state = loader.state_dict()
    again = ds.loader(**options)
    again.load_state_dict(state)
    rest = [x for x, _ in again]
    assert all(np.array_equal(a, b) for a, b in zip([*first, *rest], passes[0], strict=True))
    still = ds.loader(**options, crop_at="center")
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(list(still), list(still), strict=True))


@pytest.mark.parametrize("at", ["random", "center", "grid"])
def test_frames_of_a_window_have_the_same_crop(ds: h5feed.Dataset, truth: dict[str, npt.NDArray[Any]], at: Any) -> None:
    """Also under another name: a sample of several rows has one place."""
    options: dict[str, Any] = {"sequence_length": 3, "offsets": {"next": ("mask", 3)}, "fields": ["mask", "next"]}
    seen = []
    for batch in ds.batches(**CROP, crop_at=at, shuffle=True, batch_size=8, **options):
        assert batch["mask"].shape[1:] == (3, 32, 48) and batch["next"].shape[1:] == (32, 48)
        for place, (row, (top, left)) in enumerate(zip(batch.rows.tolist(), batch["__crop__"].tolist(), strict=True)):
            part = truth["mask"][row : row + 4, top : top + 32, left : left + 48]
            np.testing.assert_array_equal(batch["mask"][place], part[:3])
            np.testing.assert_array_equal(batch["next"][place], part[3])
            seen.append((row, top, left))
    cells = 6 if at == "grid" else 1
    assert len(seen) == len(set(seen)) == (ROWS - 3) * cells


def test_joined_masks(ds: h5feed.Dataset, truth: dict[str, npt.NDArray[Any]]) -> None:
    """Of another dataset, they are cropped like the images."""
    options: dict[str, Any] = {**CROP, "join": "masks", "fields": ["image", "masks/mask"], "shuffle": True}
    for batch in ds.batches(batch_size=8, **options):
        np.testing.assert_array_equal(batch["image"], _cut(truth["image"], batch))
        np.testing.assert_array_equal(batch["masks/mask"], _cut(truth["mask"], batch))
    loader = ds.loader(x="image", y="masks/mask", **{name: options[name] for name in ("crop", "join")})
    x, y = next(iter(loader))
    assert x.shape == (30, 32, 48, 3) and y.shape == (30, 32, 48)


def test_why_rows_are_not_read_here(ds: h5feed.Dataset) -> None:
    """The server crops, which a loop says."""
    loader = ds.loader(**CROP, x="image", y="label", decode="client")
    assert len(list(loader)) == loader.plan.batches
    assert "cropped by the server" in loader.stats().why


def test_with_placement(servers: list[ServerProcess], truth: dict[str, npt.NDArray[Any]]) -> None:
    """Where rows have owners, any server may send their parts."""
    urls = ",".join(server.url for server in servers)
    with h5feed.connect(urls, deadline=60, local=False, placement="cache") as feed:
        for batch in feed["scans"].batches(**CROP, fields=["mask"], batch_size=9, shuffle=True):
            np.testing.assert_array_equal(batch["mask"], _cut(truth["mask"], batch))


@pytest.mark.parametrize("decode", ["auto", "server", "client"])
def test_image_files(ds: h5feed.Dataset, decode: Any) -> None:
    """They are decoded and cropped by the server: parts of the pixels that whole rows have."""
    whole = ds.take(range(ROWS), fields=["photo"])["photo"]
    for batch in ds.batches(**CROP, fields=["photo"], batch_size=8, shuffle=True, decode=decode):
        np.testing.assert_array_equal(batch["photo"], _cut(whole, batch))
    with pytest.raises(BadParameter, match="photo"):
        ds.plan(**CROP, fields=["photo"], encoded=["photo"])


def test_statistics_fit(ds: h5feed.Dataset) -> None:
    """Those of whole rows, per channel, scale crops; an image of means cannot."""
    loader = ds.loader(**CROP, x="image", y="label", mean="server", std="server")
    x, _ = next(iter(loader))
    assert x.shape == (30, 32, 48, 3) and x.dtype == np.float32
    with pytest.raises(BadParameter, match=r"does not broadcast to \[32, 48, 3\]"):
        ds.loader(**CROP, x="image", y="label", mean=np.zeros((HEIGHT, WIDTH, 3)))


def test_keras(ds: h5feed.Dataset, truth: dict[str, npt.NDArray[Any]]) -> None:
    """A model that crops away all but its input's size is trained on images and masks, and validated on a grid."""
    keras = pytest.importorskip("keras")
    options: dict[str, Any] = {**CROP, "x": "image", "y": "mask", "batch_size": 10, "verbose": False}
    sequence = ds.sequence("train", **options, shuffle=True, val=0.2)
    x, y = sequence[0]
    assert x.shape == (10, 32, 48, 3) and y.shape == (10, 32, 48)
    val = ds.sequence("val", **options, crop_at="grid", val=0.2)
    assert len(val) == -(-6 * 6 // 10)
    model = keras.Sequential([keras.layers.Input((32, 48, 3)), keras.layers.Conv2D(1, 1)])
    model.compile("sgd", "mse")
    model.fit(sequence, epochs=1, verbose=0)
    assert model.predict(val, verbose=0).shape == (36, 32, 48, 1)
    for split, ordered, each in (("train", sequence, 1), ("val", val, 6)):
        rows = np.repeat(ds.split_rows(split, val=0.2), each)
        assert ordered.row_ids.tolist() == rows.tolist() and len(rows) == ordered.samples
    rows = np.repeat(ds.split_rows("val", val=0.2), 6)
    classes = ds.sequence("val", **{**options, "y": "label"}, crop_at="grid", val=0.2).classes
    np.testing.assert_array_equal(classes, rows % 3)


def test_torch(ds: h5feed.Dataset) -> None:
    torch = pytest.importorskip("torch")
    batches = ds.torch(**CROP, x="mask", y="label", batch_size=6, shuffle=True, seed=3)
    expected = ds.batches(**CROP, fields=["mask"], batch_size=6, shuffle=True, seed=3)
    for (x, _), batch in zip(torch.utils.data.DataLoader(batches, batch_size=None), expected, strict=True):
        np.testing.assert_array_equal(x.numpy(), batch["mask"])
    with pytest.raises(BadParameter, match="crop"):
        ds.torch_map(**CROP)


def test_a_record_reopens_the_same_crops(ds: h5feed.Dataset) -> None:
    loader = ds.loader(crop=(32, 48), crop_fields=["mask"], x="mask", y="label", shuffle=True)
    again = h5feed.reopen(loader.source().json()).loader(x="mask", y="label")
    for (x, _), (other, _) in zip(loader, again, strict=True):
        np.testing.assert_array_equal(x, other)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"crop": (100, 48)}, BadParameter, r"larger than the rows of 'image'.*\[70, 90, 3\]"),
        ({"crop": "32*48"}, BadParameter, "64x64"),
        ({"crop": 1.5}, BadParameter, "tuple of lengths"),
        ({"crop": (32, 48), "crop_fields": ["imag"]}, FieldNotFound, "image"),
        ({"crop": (32, 48, 3)}, BadParameter, "rows with 3 axes that can be cropped"),
        ({"crop": (32, 48), "crop_at": "middle"}, BadParameter, "center"),
    ],
)
def test_bad_options(ds: h5feed.Dataset, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ds.plan(**{"fields": ["image", "mask"], **options})


def test_over_http(servers: list[ServerProcess]) -> None:
    """What the server refuses is a problem with a code; other forms have the crops, too."""
    url = f"{servers[1].url}/v1/datasets/scans"
    problem = httpx.get(f"{url}/plan", params={"crop": "500x48", "fields": "mask"})
    assert problem.status_code == 400 and problem.json()["code"] == "bad_parameter"
    assert "[70, 90]" in problem.json()["detail"]
    shown = httpx.get(f"{url}/batches/0", params={"crop": "32x48", "fields": "mask", "format": "json"}).json()
    assert "__crop__" in str(shown)


def test_from_an_object_store(tmp_path: Path) -> None:
    """Only what crops touch is fetched: of chunks these, and of contiguous rows the lines."""
    pytest.importorskip("obstore")
    pytest.importorskip("hadro")
    rows, size, chunk = 6, 1024, 256
    (tmp_path / "buckets" / "data").mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 256, (rows, size, size), np.uint8)
    with h5py.File(tmp_path / "buckets" / "data" / "scans.h5", "w") as file:
        file["plain"] = values.astype(np.int16)
        file.create_dataset("packed", data=values, chunks=(1, chunk, chunk), compression="gzip", compression_opts=1)
    store = serve_folder(tmp_path / "buckets")
    proxy = StoreProxy(store)
    settings = {"H5FEED_CACHE_BYTES": "0", "H5FEED_STORE_CACHE_BYTES": "0"}
    try:
        server = ServerProcess("s3://data", tmp_path / "cache", **settings, **proxy.environment)
        with h5feed.connect(server.url, deadline=60) as feed:
            ds = feed["scans"]
            ds.settle()
            before = proxy.nbytes
            for batch in ds.batches(crop=(64, 64), shuffle=True, batch_size=2):
                for name in ("plain", "packed"):
                    np.testing.assert_array_equal(batch[name], _cut(values, batch, (64, 64)))
            fetched = proxy.nbytes - before
        assert server.stop() == 0
    finally:
        proxy.stop()
        store.stop()
    # At most four of sixteen chunks, and 64 of 1,024 lines.
    assert 0 < fetched < rows * (4 * 1.1 * chunk * chunk + 2 * 70 * size)
