"""Images that are stored as the bytes of their files: served as pixels or as bytes, the same for everybody."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from h5feed.decode import decode_image
from h5feed.errors import BadParameter, DatasetCorrupt, FieldNotFound, TooLarge, UnsupportedField
from h5feed.images import ImageSpec
from h5feed.wire import read_body
from h5feed_server.builder import BuildOptions, build
from h5feed_server.builder.progress import Progress
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.support.photographs import encoded, endless_bmp, photograph
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 60
SPEC = ImageSpec((48, 40), "aspect", "linear")
ATTRIBUTES = {"encoding": "mixed", "shape": (48, 40, 3), "resize": "aspect", "interpolation": "linear"}
BROKEN = 17


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """Pieces of scikit-learn's two photographs, of all sizes, each fourth one a PNG."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.default_rng(seed)
    files = []
    for number in range(count):
        width, height = random.integers(30, 300, 2).tolist()
        left, top = random.integers(0, 640 - width), random.integers(0, 427 - height)
        stream = io.BytesIO()
        piece = photos[number % 2].crop((left, top, left + width, top + height))
        piece = piece.convert("L") if number % 7 == 3 else piece
        piece.save(stream, "PNG" if number % 4 == 3 else "JPEG", quality=85)
        files.append(stream.getvalue())
    return files


def write_flat(group: h5py.Group, name: str, files: list[bytes], attributes: dict[str, Any], **how: Any) -> None:
    flat = group.create_dataset(name, data=np.frombuffer(b"".join(files), np.uint8), **how)
    flat.attrs.update(attributes)
    group[f"{name}.offsets"] = np.cumsum([0, *map(len, files)])


def bomb(side: int) -> bytes:
    """A PNG of side × side pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pixels(files: list[bytes], spec: ImageSpec = SPEC) -> npt.NDArray[Any]:
    return np.stack([decode_image(file, spec).pixels for file in files])


FILES = photographs(ROWS)
LISTS = [np.arange(row % 5, dtype="<f4") + row for row in range(ROWS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoded")
    with h5py.File(path / "photos.h5", "w") as file:
        write_flat(file, "images", FILES, ATTRIBUTES)
        file["labels"] = np.arange(ROWS) % 3
        write_flat(file, "small", FILES, ATTRIBUTES | {"shape": (8, 8, 1), "resize": "stretch"}, chunks=(1 << 14,))
        gzip = {"chunks": (5000,), "compression": "gzip"}
        write_flat(file, "packed", FILES, ATTRIBUTES | {"channels": "bgr"}, **gzip)
        file["boxes"] = np.concatenate(LISTS).astype(">f8")
        file["boxes.offsets"] = np.cumsum([0, *map(len, LISTS)])
    with h5py.File(path / "splits.h5", "w") as file:
        for split, begin, end in (("train", 0, 40), ("val", 40, 50), ("test", 50, 60)):
            write_flat(file.create_group(split), "images", FILES[begin:end], ATTRIBUTES)
            file[split]["labels"] = np.arange(begin, end) % 3
    with h5py.File(path / "lists.h5", "w") as file:
        images = file.create_dataset("photo", (ROWS,), h5py.vlen_dtype(np.uint8))
        for row, data in enumerate(FILES):
            images[row] = np.frombuffer(data, np.uint8)
        file["labels"] = np.arange(ROWS) % 3
    (path / "h5feed.toml").write_text(
        '[datasets.lists]\nfiles = ["lists.h5"]\ndecode = {photo = {shape = [48, 40]}}\n'
        '[datasets.wrong]\nfiles = ["wrong.h5"]\ndecode = {labels = {shape = [48, 40]}}\n'
    )
    with h5py.File(path / "wrong.h5", "w") as file:
        file["x"], file["labels"] = np.zeros((5, 2)), np.arange(5)
    with h5py.File(path / "hostile.h5", "w") as file:
        files = [*FILES[:BROKEN], FILES[BROKEN][: len(FILES[BROKEN]) // 2], bomb(20_000), b"", b"no image at all"]
        write_flat(file, "images", files, ATTRIBUTES)
        file["labels"] = np.arange(len(files)) % 2
        group = file.create_group("off")
        write_flat(group, "images", files, ATTRIBUTES)
        group["images.offsets"][3] = 10**9
        group["labels"] = np.arange(len(files))
    with h5py.File(path / "odd.h5", "w") as file:
        write_flat(file, "images", FILES, ATTRIBUTES | {"shape": (48, 40, 2)})
        file["labels"] = np.arange(ROWS)
    return path


@pytest.fixture(scope="module")
def server(folder: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(folder, H5FEED_MAX_BODY_BYTES=str(1 << 20))


def test_images_are_served_as_pixels_by_default(feed: h5feed.Feed) -> None:
    """Each row is what the one decoder makes of its file, however the batch is asked for."""
    photos, expected = feed["photos"], pixels(FILES)
    field = photos.fields["images"]
    assert (field.role, field.shape, field.dtype, field.ragged) == ("input", (48, 40, 3), "uint8", False)
    for shuffle in (False, True):
        seen = 0
        for batch in photos.batches(batch_size=16, shuffle=shuffle, seed=1):
            np.testing.assert_array_equal(batch["images"], expected[batch.rows])
            np.testing.assert_array_equal(batch["labels"], batch.rows % 3)
            seen += len(batch.rows)
        assert seen == ROWS
    rows = [5, 1, 5, 59]
    np.testing.assert_array_equal(photos.take(rows)["images"], expected[rows])


def test_chunks_filters_colours_and_sizes(feed: h5feed.Feed) -> None:
    """Bytes that lie in chunks, compressed or not; grey; blue first."""
    batch = feed["photos"].batch(1, batch_size=20, fields=["small", "packed"])
    grey = ImageSpec((8, 8), "stretch", "linear", "grey")
    np.testing.assert_array_equal(batch["small"], pixels(FILES[20:40], grey))
    np.testing.assert_array_equal(batch["packed"], pixels(FILES[20:40])[..., ::-1])
    channels = {field["name"]: field["channels"] for field in feed["photos"].info["fields"]}
    assert (channels["images"], channels["small"], channels["packed"]) == ("rgb", "grey", "bgr")


def test_bytes_of_the_files_on_demand(server: ServerProcess, feed: h5feed.Feed) -> None:
    """``encoded=`` gives exactly the files, in batches and in rows; nothing else changes."""
    for name in ("images", "packed"):
        batch = feed["photos"].batch(0, batch_size=32, shuffle=True, fields=[name, "labels"], encoded=[name])
        assert [bytes(data) for data in batch.lists(name)] == [FILES[row] for row in batch.rows]
        np.testing.assert_array_equal(batch["labels"], batch.rows % 3)
    url = f"{server.url}/v1/datasets/photos"
    answer = httpx.get(f"{url}/rows?start=3&stop=9&step=2&encoded=images", timeout=60)
    tensors, _, _ = read_body(np.frombuffer(answer.content, np.uint8))
    flat, offsets = tensors["images"].tobytes(), tensors["images.offsets"].tolist()
    assert [flat[begin:end] for begin, end in pairwise(offsets)] == FILES[3:9:2]
    answer = httpx.post(f"{url}/rows", json={"rows": [7, 7], "fields": ["images"], "encoded": ["images"]}, timeout=60)
    tensors, _, _ = read_body(np.frombuffer(answer.content, np.uint8))
    assert tensors["images"].tobytes() == 2 * FILES[7]
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    parameters = paths["/v1/datasets/{name}/batches/{index}"]
    assert any(one["name"] == "encoded" and "JPEG" in one["description"] for one in parameters["get"]["parameters"])


def test_native_splits(feed: h5feed.Feed) -> None:
    """Bytes and offsets in groups of splits make one field."""
    splits, expected = feed["splits"], pixels(FILES)
    assert splits.rows == ROWS
    for split, begin, end in (("train", 0, 40), ("val", 40, 50), ("test", 50, 60)):
        (batch,) = splits.batches(split, batch_size=64)
        np.testing.assert_array_equal(batch["images"], expected[begin:end])
    spread = [55, 3, 41]
    batch = splits.take(spread, fields=["images"])
    np.testing.assert_array_equal(batch["images"], expected[spread])


def test_other_lists_travel_flat(feed: h5feed.Feed) -> None:
    """Any flat array with offsets beside it is a field of lists, read without HDF5."""
    batch = feed["photos"].batch(0, batch_size=ROWS, shuffle=True, fields=["boxes"])
    for row, found in zip(batch.rows.tolist(), batch.lists("boxes"), strict=True):
        np.testing.assert_array_equal(found, LISTS[row])
    assert "boxes.offsets" not in feed["photos"].fields


def test_lists_of_bytes_that_h5py_reads(feed: h5feed.Feed) -> None:
    """Variable-length bytes become images where h5feed.toml says what they are decoded to."""
    batch = feed["lists"].batch(0, batch_size=ROWS, shuffle=True)
    np.testing.assert_array_equal(batch["photo"], pixels(FILES)[batch.rows])
    batch = feed["lists"].batch(0, batch_size=5, fields=["photo"], encoded=["photo"])
    assert [bytes(data) for data in batch.lists("photo")] == FILES[:5]


def test_statistics_and_pictures_are_of_the_pixels(server: ServerProcess, feed: h5feed.Feed) -> None:
    expected = pixels(FILES)
    stats = feed["photos"].stats(field="images")
    np.testing.assert_allclose([one["mean"] for one in stats["channels"]], expected.mean(axis=(0, 1, 2)))
    answer = httpx.get(f"{server.url}/v1/datasets/photos/rows/7/image?field=images", timeout=60)
    shown = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))
    np.testing.assert_array_equal(shown, expected[7])
    assert httpx.get(f"{server.url}/v1/datasets/photos/preview?field=images", timeout=60).status_code == 200


def test_a_broken_image_is_named_and_spoils_nothing_else(feed: h5feed.Feed) -> None:
    """Cut off, a bomb, empty, no image: dataset_corrupt with the row and the reason; other rows are served."""
    hostile = feed["hostile"]
    np.testing.assert_array_equal(hostile.take(range(BROKEN))["images"], pixels(FILES[:BROKEN]))
    reasons = ("truncated|end", "pixels", "empty", "not an image")
    for row, reason in zip(range(BROKEN, BROKEN + 4), reasons, strict=True):
        with pytest.raises(DatasetCorrupt, match=rf"row {row} of 'images' is a broken image: .*({reason})"):
            hostile.take([0, row, 2])
    batch = hostile.take([BROKEN + 3], fields=["labels"])
    np.testing.assert_array_equal(batch["labels"], [(BROKEN + 3) % 2])


def test_an_image_that_takes_too_long_costs_nobody_else(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Decoders of what is not plain have processes and a deadline; formats that only they decode are served."""
    ways: list[tuple[str, dict[str, Any]]] = [("JPEG", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("BMP", {})]
    files = [encoded(photograph(number, 60, 50), *way[:1], **way[1]) for number, way in enumerate(ways)]
    with h5py.File(tmp_path / "mixed.h5", "w") as file:
        slow = endless_bmp(5500, 5500)
        write_flat(file, "images", [*files, slow], ATTRIBUTES, chunks=(1 << 20,), compression="gzip")
    server = serve(tmp_path, H5FEED_READ_TIMEOUT="8", H5FEED_CHUNK_CACHE_BYTES="0")
    pids = server.worker_pids()
    with h5feed.connect(server.url, deadline=120) as feed:
        dataset = feed["mixed"]
        with pytest.raises(DatasetCorrupt, match=r"row 4 of 'images' is a broken image: .* took more than 4 s"):
            dataset.take([0, 4])
        np.testing.assert_array_equal(dataset.take(range(4))["images"], pixels(files))
    children = [
        child for pid in pids for child in psutil.Process(pid).children() if "images.decoding" in str(child.cmdline())
    ]
    assert children and server.worker_pids() == pids
    assert server.stop() == 0
    wait_until(lambda: not any(child.is_running() for child in children))


def test_offsets_and_attributes_that_cannot_be(feed: h5feed.Feed) -> None:
    """What contradicts itself is listed with the reason."""
    off, odd = feed["hostile.off"].fields["images"], feed["odd"].fields["images"]
    assert not off.readable and "do not ascend from 0" in str(off.reason)
    assert not odd.readable and "1, 3 or 4 channels" in str(odd.reason)
    wrong = feed["wrong"].fields["labels"]
    assert not wrong.readable and "not lists of bytes" in str(wrong.reason)
    with pytest.raises(UnsupportedField):
        feed["hostile.off"].batch(0, fields=["images"])


def test_parameters_that_cannot_be(feed: h5feed.Feed) -> None:
    photos = feed["photos"]
    with pytest.raises(BadParameter, match="'labels' are not stored as the bytes"):
        photos.batch(0, encoded=["labels"])
    with pytest.raises(BadParameter, match="not among the requested"):
        photos.batch(0, fields=["labels"], encoded=["images"])
    with pytest.raises(FieldNotFound, match="'nothing'"):
        photos.batch(0, encoded=["nothing"])


def test_sizes_are_known_before_anything_is_read(server: ServerProcess, feed: h5feed.Feed) -> None:
    """Too many rows are refused by their real lengths: pixels by their shape, bytes by the offsets."""
    photos = feed["photos"]
    with pytest.raises(TooLarge, match="request at most"):
        photos.take([0] * 1000, fields=["images"])
    largest = int(np.argmax([len(file) for file in FILES]))
    count = (1 << 20) // len(FILES[largest]) + 2
    request = {"rows": [largest] * count, "fields": ["images"], "encoded": ["images"]}
    answer = httpx.post(f"{server.url}/v1/datasets/photos/rows", json=request, timeout=60)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "more than the limit of 1048576" in answer.json()["detail"]


def test_one_revision_and_one_tag_for_each_way(server: ServerProcess, feed: h5feed.Feed) -> None:
    """Pixels and bytes are different answers of the same revision; each is cached by its own URL."""
    url = f"{server.url}/v1/datasets/photos/batches/0?revision={feed['photos'].revision}"
    plain, encoded = httpx.get(url, timeout=60), httpx.get(f"{url}&encoded=images", timeout=60)
    assert plain.headers["etag"] != encoded.headers["etag"] and "immutable" in encoded.headers["cache-control"]
    held = {"if-none-match": encoded.headers["etag"]}
    assert httpx.get(f"{url}&encoded=images", headers=held, timeout=60).status_code == 304
    assert httpx.get(f"{url}&encoded=images", timeout=60).content == encoded.content


def test_a_changed_file_is_another_revision(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_flat(file, "images", FILES[:10], ATTRIBUTES)
    with h5feed.connect(serve(tmp_path).url) as feed:
        before = feed["a"]
        before.batch(0)
        with h5py.File(tmp_path / "b.h5", "w") as file:
            write_flat(file, "images", FILES[10:20], ATTRIBUTES)
        (tmp_path / "b.h5").replace(tmp_path / "a.h5")
        with pytest.raises(h5feed.errors.RevisionChanged):
            before.batch(0)
        np.testing.assert_array_equal(feed["a"].batch(0)["images"], pixels(FILES[10:20]))


def _folder(path: Path) -> None:
    for row, data in enumerate(FILES):
        suffix = "png" if data[:4] == b"\x89PNG" else "jpg"
        file = path / ("cat", "dog", "fish")[row % 3] / f"{row:03d}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def test_build_keeps_the_bytes_and_serves_the_pixels(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Of one folder, what is built encoded and what is built as pixels are served alike, but for the bytes on disk."""
    _folder(tmp_path / "source")
    (tmp_path / "source" / "cat" / "torn.jpg").write_bytes(FILES[0][:500])
    served = tmp_path / "served"
    options: dict[str, Any] = {"size": (48, 40), "interpolation": "linear", "val": 6, "test": 6}
    reports = {
        store: build(tmp_path / "source", served / f"{store}.h5", BuildOptions(store=store, **options))
        for store in ("encoded", "pixels")
    }
    assert [list(report.left_out) for report in reports.values()] == 2 * [["cat/torn.jpg"]]
    assert reports["encoded"].means == reports["pixels"].means
    build(tmp_path / "source", tmp_path / "again.h5", BuildOptions(store="encoded", **options))
    with h5py.File(served / "encoded.h5") as file, h5py.File(tmp_path / "again.h5") as again:
        names = file["train/filenames"][:].astype(str)
        flat, offsets = file["train/images"][:].tobytes(), file["train/images.offsets"][:]
        for name, begin, end in zip(names, offsets[:-1], offsets[1:], strict=True):
            assert flat[begin:end] == (tmp_path / "source" / name).read_bytes()
        assert flat == again["train/images"][:].tobytes()
    with h5feed.connect(serve(served).url, deadline=60) as feed:
        for split in ("train", "val", "test"):
            pairs = zip(*(feed[name].batches(split, batch_size=16, shuffle=True) for name in reports), strict=True)
            for one, other in pairs:
                np.testing.assert_array_equal(one["images"], other["images"])
                np.testing.assert_array_equal(one["labels"], other["labels"])
        assert feed["encoded"].info["fields"][0]["stored_bytes"] > 0


def test_an_interrupted_build_of_bytes_goes_on(tmp_path: Path) -> None:
    """Stopped in the middle, the same call gives the bytes of an undisturbed build."""
    _folder(tmp_path / "source")
    options = BuildOptions((48, 40), store="encoded", threads=1)
    build(tmp_path / "source", tmp_path / "a" / "x.h5", options)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.phase == "rows" and progress.rows > 20:
            raise Stop

    with pytest.raises(Stop):
        build(tmp_path / "source", tmp_path / "b" / "x.h5", options, on_progress=stop)
    report = build(tmp_path / "source", tmp_path / "b" / "x.h5", options)
    assert 0 < report.resumed < ROWS
    assert (tmp_path / "a" / "x.h5").read_bytes() == (tmp_path / "b" / "x.h5").read_bytes()


@pytest.mark.parametrize("wrong", [{"dtype": "float32"}, {"compression": "zstd"}, {"resize": "none"}])
def test_options_that_bytes_do_not_have(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match="store=encoded"):
        BuildOptions(store="encoded", **wrong)
