"""Images are decoded to the same pixels wherever that is done, and by whatever way they come."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import h5feed
import h5py
import httpx
import keras
import numpy as np
import pytest
from h5feed import decode
from h5feed.decode import MAX_SCANS, BrokenImage, Decoded, decode_image, decode_into, fingerprint
from h5feed.errors import BadParameter, DatasetCorrupt
from h5feed.fetching import decoding
from h5feed.images import ImageSpec
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.support.not_installed import no_image_libraries
from tests.support.server_process import ServerProcess

ROWS = 48
SHAPE = (40, 48, 3)
SHORT_WAYS: list[tuple[Any, Any]] = [("aspect", "rgb"), ("stretch", "bgr"), ("pad", "rgb"), ("aspect", "grey")]
PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]


def _encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _file(row: int) -> bytes:
    piece = PHOTOS[row % 2].crop((5 * row, 3 * row, 5 * row + 100 + 2 * row, 3 * row + 90 + row))
    return _encoded(piece, "PNG" if row % 3 == 2 else "JPEG")


FILES = [_file(row) for row in range(ROWS)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    for name, files in (("photos", FILES), ("torn", [*FILES[:9], FILES[9][:200], *FILES[10:]])):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["images"] = np.frombuffer(b"".join(files), np.uint8)
            file["images"].attrs.update({"encoding": "mixed", "shape": SHAPE, "resize": "aspect"})
            file["images.offsets"] = np.cumsum([0, *map(len, files)])
            file["labels"] = np.arange(ROWS) % 4
    return serve_module(folder)


@pytest.fixture
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(server.url, deadline=60) as connected:
        yield connected


def _same(one: h5feed.Batch, other: h5feed.Batch) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one.rows, other.rows)
    assert (one.index, one.epoch, one.revision) == (other.index, other.epoch, other.revision)


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "epoch": 3}, {"shuffle": True, "shards": 3, "last": "pad"}])
def test_batches_are_the_same_wherever_they_are_decoded(feed: h5feed.Feed, options: dict[str, Any]) -> None:
    photos = feed["photos"]
    here = list(photos.batches(batch_size=10, decode="client", **options))
    there = list(photos.batches(batch_size=10, decode="server", **options))
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        _same(one, other)
        assert (one.weight is None) == (other.weight is None)
    _same(photos.batch(1, batch_size=7, decode="client"), photos.batch(1, batch_size=7))


def test_loops_are_the_same(feed: h5feed.Feed) -> None:
    """Loader and Sequence give equal batches, and a model trains on those that are decoded here."""
    photos = feed["photos"]
    options: dict[str, Any] = {"batch_size": 12, "shuffle": True, "test": 12}
    with photos.loader("train", decode="client", **options) as here, photos.loader("train", **options) as there:
        for _ in range(2):
            for one, other in zip(here, there, strict=True):
                np.testing.assert_array_equal(one[0], other[0])
                np.testing.assert_array_equal(one[1], other[1])
        state = here.state_dict()
        there.load_state_dict(state)
    sequence = photos.sequence("train", decode="client", verbose=False, **options)
    model = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(sequence, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_pixels_are_kept_in_the_local_cache(feed: h5feed.Feed, tmp_path: Path) -> None:
    """What was decoded here serves who wants it decoded there, and the other way round; each is decoded once."""
    photos = feed["photos"]
    options: dict[str, Any] = {"batch_size": 10, "shuffle": True, "cache": tmp_path}
    plain = [list(photos.batches(batch_size=10, shuffle=True, epoch=epoch)) for epoch in range(3)]
    places: list[Literal["client", "server"]] = ["client", "server", "client"]
    for epoch, where in enumerate(places):
        for one, other in zip(photos.batches(decode=where, epoch=epoch, **options), plain[epoch], strict=True):
            _same(one, other)
    photos.take(range(0, ROWS, 2))
    half = photos.cache(tmp_path / "other")
    for batch in photos.batches(batch_size=10, limit=25, decode="client", cache=half):
        _same(batch, photos.batch(batch.index, batch_size=10, limit=25))
    for one, other in zip(
        photos.batches(batch_size=10, shuffle=True, decode="client", cache=half), plain[0], strict=True
    ):
        _same(one, other)


def test_what_travels_is_the_files(server: ServerProcess, feed: h5feed.Feed) -> None:
    """With decode='client' a batch has no more bytes than its files, their offsets and a header."""
    answer = httpx.get(f"{server.url}/v1/datasets/photos/batches/0?batch_size={ROWS}&encoded=images", timeout=60)
    assert len(answer.content) < sum(map(len, FILES)) + 3 * 8 * (ROWS + 1) + 1024
    plan = feed["photos"].plan(batch_size=ROWS, decode="client")
    assert plan.params["encoded"] == "images" and plan.tensors[-1].shape == (ROWS, *SHAPE)


def test_what_is_broken_is_named_here_too(feed: h5feed.Feed) -> None:
    torn = feed["torn"]
    for where in ("client", "server"):
        with pytest.raises(DatasetCorrupt, match="row 9 of 'images' is a broken image"):
            list(torn.batches(batch_size=6, decode=where))
        assert torn.batch(0, batch_size=6, decode=where)["images"].shape == (6, *SHAPE)


def test_other_libraries_are_noticed(feed: h5feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that makes other pixels than the server's is refused before the first batch."""
    monkeypatch.setattr("h5feed.decode.fingerprint", lambda: "other")
    with pytest.raises(BadParameter, match="different pixels for 'images' than the server"):
        feed["photos"].batches(decode="client")
    assert feed["photos"].batch(0, decode="client", fields=["labels"])["labels"].shape == (32,)
    with pytest.raises(BadParameter, match="'server' or 'client'"):
        feed["photos"].batch(0, decode="elsewhere")  # type: ignore[arg-type]


def test_without_the_extra_the_message_says_what_to_install(feed: h5feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    no_image_libraries(monkeypatch, "cv2")
    with pytest.raises(ModuleNotFoundError, match=r"'cv2' is not installed: `pip install 'h5feed\[decode\]'`"):
        feed["photos"].batches(decode="client")
    monkeypatch.undo()
    assert decoding.specs_for({}) == {}


def test_linear_is_what_opencv_and_tensorflow_do() -> None:
    """Against bilinear interpolation written out: centres of pixels, the nearest four, rounded."""
    photo = np.asarray(PHOTOS[0].crop((0, 0, 90, 70)))
    found = decode_image(_encoded(Image.fromarray(photo), "PNG"), ImageSpec((50, 60), "stretch", "linear")).pixels
    y, x = (np.arange(50) + 0.5) * 70 / 50 - 0.5, (np.arange(60) + 0.5) * 90 / 60 - 0.5
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    bottom, across = np.minimum(top + 1, 69), np.minimum(left + 1, 89)
    top, left = np.maximum(top, 0), np.maximum(left, 0)
    upper = photo[top][:, left] * (1 - right) + photo[top][:, across] * right
    lower = photo[bottom][:, left] * (1 - right) + photo[bottom][:, across] * right
    assert np.abs(found - (upper * (1 - down) + lower * down)).max() <= 1


@pytest.mark.parametrize("size", [(100, 100), (60, 60), (30, 40)])
@pytest.mark.parametrize("resize", ["aspect", "stretch", "pad"])
def test_halving_in_the_jpeg_is_exact_enough(size: tuple[int, int], resize: Any) -> None:
    """On photographs, pixels differ little from those that averaging over a full decode gives."""
    for photo in PHOTOS:
        data = _encoded(photo, quality=90)
        fast = decode_image(data, ImageSpec(size, resize, "linear")).pixels.astype(float)
        slow = decode_image(data, ImageSpec(size, resize, "bilinear")).pixels
        assert np.abs(fast - slow).mean() < 8
        assert abs(fast.mean() - slow.mean()) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize", ["aspect", "stretch", "pad"])
def test_every_orientation_by_the_short_way(orientation: int, resize: Any) -> None:
    """EXIF's eight orientations: the short way turns images as Pillow does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = PHOTOS[1].crop((0, 0, 200, 160))
    spec = ImageSpec((100, 120), resize, "linear")
    fast = decode_image(_encoded(photo, quality=95, exif=exif), spec).pixels.astype(float)
    upright = decode_image(_encoded(photo, quality=95, exif=exif), ImageSpec(None)).pixels
    slow = decode_image(_encoded(Image.fromarray(upright), "PNG"), spec).pixels
    assert fast.shape == slow.shape and np.abs(fast - slow).mean() < 3


def _jpegs() -> Iterator[bytes]:
    """JPEGs as many programs write them: sizes, subsampling, qualities, restarts, progressive, with metadata, grey …"""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(60):
        wide, high = random.integers(1, 400, 2).tolist()
        photo = PHOTOS[number % 2].crop((30, 20, 30 + wide, 20 + high))
        options: dict[str, Any] = {"quality": int(random.integers(20, 96)), "subsampling": number % 3}
        yield _encoded(photo, **options)
        extras: tuple[dict[str, Any], ...] = (
            {"progressive": True},
            {"exif": exif},
            {"comment": "taken by hand"},
            {"icc_profile": b"no profile"},
            {"restart_marker_blocks": 3},
        )
        yield _encoded(photo, **options, **extras[number % 5])
        yield _encoded(photo.convert(("L", "CMYK")[number % 2]), **options)


@pytest.mark.parametrize("spec", [ImageSpec((64, 48), resize, "bilinear", colour) for resize, colour in SHORT_WAYS])
def test_without_pillows_headers_pixels_are_the_same(spec: ImageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole files, and of files that are damaged or cut off somewhere."""
    if decode._simd() is None:
        pytest.skip("cykooz.resizer is not installed")
    random = np.random.default_rng(1)
    files = list(_jpegs())
    for data in files[::4]:
        damaged = bytearray(data)
        for at in random.integers(2, min(len(data), 700), 3).tolist():
            damaged[at] = int(random.integers(0, 256))
        files += [bytes(damaged), data[: int(random.integers(2, len(data)))]]
    short = [_decoded(data, spec) for data in files]
    assert sum(decode._frame(data) is not None for data in files) > 60
    monkeypatch.setattr(decode, "_frame", lambda data: None)
    for data, found in zip(files, short, strict=True):
        expected = _decoded(data, spec)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
        else:
            assert (found.height, found.width) == (expected.height, expected.width)
            np.testing.assert_array_equal(found.pixels, expected.pixels)


def _decoded(data: bytes, spec: ImageSpec) -> Decoded | str:
    try:
        return decode_image(data, spec)
    except BrokenImage as error:
        return str(error)


def test_colours_of_the_short_way() -> None:
    photo = PHOTOS[0].crop((0, 0, 120, 90))
    for data in (_encoded(photo), _encoded(photo.convert("L")), _encoded(photo.convert("CMYK"))):
        rgb, bgr, grey, rgba = (
            decode_image(data, ImageSpec((40, 40), "aspect", "linear", colour)).pixels
            for colour in ("rgb", "bgr", "grey", "rgba")
        )
        np.testing.assert_array_equal(rgb, bgr[..., ::-1])
        np.testing.assert_array_equal(rgb, rgba[..., :3])
        assert (rgba[..., 3] == 255).all() and grey.shape == (40, 40, 1)
        assert np.abs(rgb.astype(float) @ [0.299, 0.587, 0.114] - grey[..., 0]).mean() < 3


def test_the_short_way_writes_in_place_and_refuses_what_does_not_fit() -> None:
    data, spec = FILES[0], ImageSpec(SHAPE[:2], "aspect", "linear")
    out = np.empty((2, *SHAPE), np.uint8)
    decode_into(memoryview(np.frombuffer(data, np.uint8)), spec, out[1])
    np.testing.assert_array_equal(out[1], decode_image(data, spec).pixels)
    with pytest.raises(BrokenImage, match="pixels, expected"):
        decode_into(data, ImageSpec((7, 7), "none", "linear"), np.empty((7, 7, 3), np.uint8))
    with pytest.raises(BrokenImage, match="not an image in a known format"):
        decode_into(_encoded(PHOTOS[0], "TIFF"), spec, out[0])


def test_a_jpeg_that_is_made_to_take_long_is_refused() -> None:
    """A progressive JPEG whose last scan comes again and again."""
    data = _encoded(PHOTOS[0].crop((0, 0, 64, 64)), progressive=True)
    begin = data.rindex(b"\xff\xda")
    decode_image(data, ImageSpec((32, 32), "aspect", "linear"))
    with pytest.raises(BrokenImage, match="scans"):
        decode_image(data[:-2] + data[begin:-2] * (MAX_SCANS + 1) + data[-2:], ImageSpec((32, 32), "aspect", "linear"))


def test_cut_off_anywhere_it_is_an_error() -> None:
    """A JPEG without its last rows is broken, never grey at the bottom."""
    data = _encoded(PHOTOS[0].crop((0, 0, 200, 150)))
    spec = ImageSpec((64, 64), "aspect", "linear")
    for kept in (0.2, 0.5, 0.9):
        with pytest.raises(BrokenImage):
            decode_image(data[: int(len(data) * kept)], spec)


def test_the_fingerprint_is_that_of_the_pixels() -> None:
    """The same on every machine that decodes alike; a new one means that stored digests of pixels are void."""
    assert fingerprint() == fingerprint() and len(fingerprint()) == 16


def test_specs_check_themselves() -> None:
    spec = ImageSpec((4, 5), "pad", "area", "grey")
    assert ImageSpec.of(spec.about()) == spec and spec.shape == (4, 5, 1)
    for wrong in ({"size": (0, 5)}, {"resize": "squeeze"}, {"interpolation": "cubic"}, {"colour": "hsv"}, {"x": 1}):
        with pytest.raises(BadParameter):
            ImageSpec.of(spec.about() | wrong)
