"""Images of a server on another machine: by default they come as files, if they are certain to decode alike here."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.decode import decode_image, libraries
from h5feed.errors import DatasetCorrupt
from h5feed.images import ImageSpec
from PIL import Image

from tests.support.far_away import NAME, far_away
from tests.support.not_installed import no_image_libraries
from tests.support.photographs import encoded, photograph
from tests.support.same_batches import assert_same_batch
from tests.support.server_process import ServerProcess


def _plain(number: int) -> bytes:
    """All kinds that are decoded here: progressive, grey, CMYK, upright or not, JPEG and PNG, of odd sizes."""
    height, width = 91 + 7 * number % 250, 97 + 11 * number % 300
    image = Image.fromarray(photograph(number, height, width))
    rotated = Image.Exif()
    rotated[0x0112] = 1 + number % 8
    kinds: list[Callable[[], bytes]] = [
        lambda: encoded(image, quality=70),
        lambda: encoded(image, progressive=True, quality=70),
        lambda: encoded(image.convert("L")),
        lambda: encoded(image.convert("CMYK")),
        lambda: encoded(image, exif=rotated, quality=70),
        lambda: encoded(image, quality=80, subsampling=0),
        lambda: encoded(image, quality=60, subsampling=2, restart_marker_blocks=3),
        lambda: encoded(image.convert("L"), progressive=True),
        lambda: encoded(image.quantize(16), "PNG"),
        lambda: encoded(image.convert("L").quantize(8), "PNG"),
        lambda: encoded(image.resize((61, 45)).convert("RGBA"), "PNG"),
        lambda: encoded(image.resize((33, 41)), "PNG", optimize=True),
    ]
    return kinds[number % len(kinds)]()


FILES = [_plain(number) for number in range(48)]
ROWS, FILE_BYTES = len(FILES), sum(map(len, FILES))

SPECS = {
    "images": ImageSpec((100, 110), "aspect", "linear"),
    "padded": ImageSpec((111, 97), "pad", "linear", "bgr"),
    "lanczos": ImageSpec((104, 104), "stretch", "lanczos"),
    "whole": ImageSpec((120, 130), "stretch", "nearest", "rgba"),
}


def _write(group: h5py.Group, name: str, files: list[bytes], spec: ImageSpec) -> None:
    flat = group.create_dataset(name, data=np.frombuffer(b"".join(files), np.uint8))
    about = {"encoding": "mixed", "resize": spec.resize, "interpolation": spec.interpolation, "channels": spec.colour}
    flat.attrs.update({**about, "shape": spec.shape})
    group[f"{name}.offsets"] = np.cumsum([0, *map(len, files)])


def _lists(path: Path, files: list[bytes], shape: tuple[int, ...]) -> None:
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (len(files),), h5py.vlen_dtype(np.uint8))
        for row, data in enumerate(files):
            images[row] = np.frombuffer(data, np.uint8)
        images.attrs.update({"encoding": "mixed", "shape": shape})
        file["labels"] = np.arange(len(files)) % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("far")
    with h5py.File(path / "photos.h5", "w") as file:
        for name, spec in SPECS.items():
            _write(file, name, FILES, spec)
        _write(file, "tiny", FILES, ImageSpec((8, 8), "stretch", "linear", "grey"))
        file["labels"] = np.arange(ROWS) % 4
        chunked = np.repeat(np.arange(ROWS, dtype="<i4"), 900).reshape(ROWS, 900)
        file.create_dataset("packed", data=chunked, chunks=(1, 900), compression="gzip")
        file["wide"] = np.arange(ROWS) / 3
        file["names"] = np.array([f"row {row}" * (row % 3) for row in range(ROWS)], "S20")
    odd = [photograph(number, 90, 100) for number in range(ROWS)]
    with h5py.File(path / "odd.h5", "w") as file:
        kinds = ("WEBP", "GIF", "BMP", "JPEG")
        _write(file, "images", [encoded(image, kinds[n % 4]) for n, image in enumerate(odd)], ImageSpec((120, 120)))
        rare = [encoded(image, "WEBP" if n == 20 else "JPEG") for n, image in enumerate(odd)]
        _write(file, "rare", rare, ImageSpec((60, 60)))
    with h5py.File(path / "torn.h5", "w") as file:
        torn = [encoded(image) for image in odd]
        torn[9] = torn[9][: len(torn[9]) // 2]
        _write(file, "images", torn, ImageSpec((60, 60)))
        file["labels"] = np.arange(ROWS) % 4
    _lists(path / "lists.h5", FILES, (170, 170, 3))
    _lists(path / "small_lists.h5", FILES, (9, 9, 3))
    return path


@pytest.fixture(scope="module")
def server(folder: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(folder, H5FEED_ALLOWED_HOSTS=NAME)


@pytest.fixture
def far(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with far_away(server.port) as url, h5feed.connect(url, deadline=60) as connected:
        assert not connected._client.is_near
        yield connected


def _stats(dataset: h5feed.Dataset, fields: list[str], **options: Any) -> Any:
    """Of one pass, whose arrays are those that the server decodes."""
    with dataset.loader(x=fields, y=None, batch_size=7, **options) as loader:
        came = list(loader)
        there = dataset.batches(fields=fields, batch_size=7, decode="server")
        for batch, other in zip(came, there, strict=True):
            for name in fields:
                assert (batch[0][name] if len(fields) > 1 else batch[0]).tobytes() == other[name].tobytes()
        return loader.stats()


@pytest.mark.parametrize("field", SPECS)
def test_the_same_arrays(far: h5feed.Feed, field: str) -> None:
    """Of every kind of file and format: those of the server, and of the decoder. Fewer bytes come."""
    photos = far["photos"]
    expected = np.stack([decode_image(data, SPECS[field], exact=True).pixels for data in FILES])
    for batch in photos.batches(fields=[field], batch_size=7, shuffle=True):
        assert np.array_equal(batch[field], expected[batch.rows])
    stats = _stats(photos, [field])
    assert stats.from_images == ROWS and not stats.why
    assert "rows from image files" in repr(stats) and "as arrays" not in repr(stats)
    assert FILE_BYTES < stats.bytes < FILE_BYTES + 20_000 < expected.nbytes
    there = _stats(photos, [field], decode="server")
    assert there.from_images == 0 and "decode='server'" in there.why and there.bytes > expected.nbytes


def test_files_that_are_longer_than_pixels(far: h5feed.Feed) -> None:
    """They are decoded by the server, others of the same batches here."""
    stats = _stats(far["photos"], ["tiny"])
    assert stats.from_images == 0
    assert stats.why == f"tiny: {ROWS * 64:,} bytes of pixels are stored in image files of {FILE_BYTES:,} bytes"
    stats = _stats(far["photos"], ["whole", "tiny"])
    assert stats.from_images == ROWS
    assert stats.why.startswith("tiny: ") and "whole" not in stats.why


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True, "epoch": 3},
        {"shuffle": True, "shards": 5, "shard": 2, "last": "pad"},
        {"where": "labels >= 2", "shuffle": True},
        {"encoded": ["images"]},
    ],
)
def test_beside_other_fields(far: h5feed.Feed, options: dict[str, Any]) -> None:
    """Text, numbers, and chunks that are decoded here too: the batches are the same in every detail."""
    photos = far["photos"]
    fields = ["wide", "whole", "packed", "labels", "names", "images", "padded"]
    here = list(photos.batches(batch_size=5, fields=fields, **options))
    there = list(photos.batches(batch_size=5, fields=fields, decode="server", **options))
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        assert_same_batch(one, other)


def test_pieces_and_images_of_one_loop(far: h5feed.Feed) -> None:
    stats = _stats(far["photos"], ["whole", "packed"])
    assert stats.from_images == stats.from_chunks == ROWS and not stats.why
    assert stats.bytes < 1.1 * FILE_BYTES


def test_what_may_take_long_is_decoded_by_the_server(far: h5feed.Feed) -> None:
    """Other formats than JPEG and PNG, which the server decodes in processes of their own."""
    odd = far["odd"]
    stats = _stats(odd, ["images"])
    assert stats.from_images == 0 and "not a JPEG or PNG" in stats.why
    # A single one: only its block is fetched again.
    with odd.loader(x="rare", y=None, batch_size=4, readahead=1, connections=1) as loader:
        there = odd.batches(fields=["rare"], batch_size=4, decode="server")
        for one, other in zip(loader, there, strict=True):
            assert np.array_equal(one[0], other["rare"])
        assert 0 < loader.stats().from_images < ROWS and "row 20 of 'rare'" in loader.stats().why


def test_the_server_tells_what_is_broken(far: h5feed.Feed) -> None:
    """The error is the one of the server, and the batches without the broken image are there."""
    torn, errors = far["torn"], {}
    for decode in ("auto", "server"):
        batches = torn.batches(fields=["images"], batch_size=6, decode=decode, connections=1, readahead=1)
        assert next(batches)["images"].shape == (6, 60, 60, 3)
        with pytest.raises(DatasetCorrupt, match="broken image") as raised:
            next(batches)
        errors[decode] = raised.value.detail
    assert errors["auto"] == errors["server"]


def test_on_this_machine_the_server_decodes(server: ServerProcess) -> None:
    with h5feed.connect(server.url, local=False, deadline=60) as near:
        stats = _stats(near["photos"], ["whole"])
        assert stats.from_images == 0 and "on this machine" in stats.why
        assert _stats(near["photos"], ["whole"], decode="client").from_images == ROWS


def test_other_libraries(far: h5feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, other pixels of the same version, or a server that does not tell: the server decodes."""
    about = next(field for field in far["photos"].info["fields"] if field["name"] == "whole")
    assert about["image_libraries"] == libraries()
    for library in ("Pillow", "libjpeg", "simplejpeg", "OpenCV"):
        assert f"{library}" in libraries()
    with monkeypatch.context() as patch:
        patch.setattr("h5feed.decode.libraries", lambda: "Pillow 1.1.7")
        stats = _stats(far["photos"], ["whole"])
        assert stats.from_images == 0
        assert stats.why == f"whole: the server decodes with {libraries()}, but here is Pillow 1.1.7"
        assert stats.why in repr(stats)
    with monkeypatch.context() as patch:
        patch.setattr("h5feed.decode.fingerprint", lambda: "other")
        stats = _stats(far["photos"], ["whole"])
        assert stats.from_images == 0 and "other pixels" in stats.why
    older = far["photos"]
    for field in older.info["fields"]:
        field.pop("image_libraries")
        field.pop("image_bytes")
    stats = _stats(older, ["whole"])
    assert stats.from_images == 0 and "does not tell its image libraries" in stats.why
    # Who asks for it explicitly decides on the fingerprint alone, as before.
    assert _stats(older, ["whole"], decode="client").from_images == ROWS


def test_without_the_image_libraries(far: h5feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    no_image_libraries(monkeypatch, "simplejpeg")
    stats = _stats(far["photos"], ["whole"])
    assert stats.from_images == 0
    assert stats.why == "whole: simplejpeg is not installed: `pip install 'h5feed[decode]'`"


def test_sizes_that_only_the_files_tell(far: h5feed.Feed) -> None:
    """Of lists that h5py reads, the first block tells whether it is worth it; so the next ones may be pixels."""
    stats = _stats(far["lists"], ["images"])
    assert stats.from_images == ROWS and not stats.why
    small = far["small_lists"].loader(x="images", y=None, batch_size=4, readahead=1, connections=1)
    for _ in range(2):
        for _ in small:
            pass
    assert 0 < small.stats().from_images < ROWS and "stored in image files of" in small.stats().why
    small.close()


def test_the_local_cache(far: h5feed.Feed, tmp_path: Path) -> None:
    """It keeps pixels, whoever has decoded them; missing rows come as files, too."""
    photos = far["photos"]
    fields = ["whole", "labels", "names"]
    options: dict[str, Any] = {"batch_size": 10, "shuffle": True, "fields": fields}
    plain = [list(photos.batches(epoch=epoch, decode="server", **options)) for epoch in range(3)]
    for number, ways in enumerate([("auto", "server", "client"), ("server", "auto", "auto")]):
        for epoch, decode in enumerate(ways):
            found: Any = {"epoch": epoch, "decode": decode, "cache": tmp_path / str(number)}
            for one, other in zip(photos.batches(**options, **found), plain[epoch], strict=True):
                assert {*one} == {*other}
                for name in other:
                    assert one[name].tobytes() == other[name].tobytes()
    half = tmp_path / "half"
    for _ in photos.batches(**{**options, "fields": ["whole", "labels"]}, limit=25, cache=half):
        pass
    # Another object does not know what was just stored: it looks.
    with far["photos"].loader(x="whole", y=None, batch_size=10, shuffle=True, cache=half) as loader:
        assert sum(len(batch[0]) for batch in loader) == ROWS
        stats = loader.stats()
        assert stats.cached == 25 and stats.from_images == ROWS - 25


def test_a_loop_goes_on_where_the_other_way_stopped(far: h5feed.Feed, server: ServerProcess) -> None:
    """States do not say where images were decoded: a run goes on on another machine."""
    with h5feed.connect(server.url, local=False, deadline=60) as near:
        options: dict[str, Any] = {"x": "whole", "y": "labels", "batch_size": 7, "shuffle": True}
        with far["photos"].loader(**options) as one, near["photos"].loader(**options) as other:
            first = iter(one)
            for _ in range(3):
                next(first)
            state = one.state_dict()
            other.load_state_dict(state)
            for left, right in zip(first, other, strict=True):
                for a, b in zip(left, right, strict=True):
                    assert np.array_equal(a, b)
            state = other.state_dict()
            one.load_state_dict(state)
            for left, right in zip(one, other, strict=True):
                assert np.array_equal(left[0], right[0])
            assert one.stats().from_images > 0 == other.stats().from_images


def test_batches_in_parts(far: h5feed.Feed, folder: Path, serve: Callable[..., ServerProcess]) -> None:
    """A batch whose pixels need several responses: its files may fit into one, and are decoded alike."""
    server = serve(folder, H5FEED_MAX_BODY_BYTES=str(1 << 20), H5FEED_ALLOWED_HOSTS=NAME)
    options: dict[str, Any] = {"fields": ["whole"], "batch_size": 40, "shuffle": True}
    there = list(far["photos"].batches(decode="server", **options))
    with far_away(server.port) as url, h5feed.connect(url, deadline=60) as parted:
        for one, other in zip(parted["photos"].batches(**options), there, strict=True):
            assert_same_batch(one, other)


def test_files_are_read_as_they_are() -> None:
    """The files of these tests are of the kinds that their names say."""
    kinds = {(Image.open(io.BytesIO(data)).format, Image.open(io.BytesIO(data)).mode) for data in FILES}
    assert {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "RGB")} <= kinds
