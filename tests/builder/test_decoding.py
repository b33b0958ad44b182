"""From the bytes of image files to arrays."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
from h5feed.decode import FORMATS, MAX_PIXELS, decode_into
from h5feed.errors import BadParameter, Overloaded
from h5feed.plain_images import is_plain
from h5feed_server.builder import BuildOptions, ImageSpec, decode_image
from h5feed_server.builder.image_spec import BrokenImage
from h5feed_server.storage.images.decoding import Decoding, ImageDecoders, served
from PIL import Image

from tests.support.photographs import encoded, photograph

PIXELS = photograph(1, 120, 90)
AS_IS = ImageSpec(None)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_come_out_as_they_went_in(kind: str, options: dict[str, Any]) -> None:
    decoded = decode_image(encoded(PIXELS, kind, **options), AS_IS)
    np.testing.assert_array_equal(decoded.pixels, PIXELS)
    assert (decoded.height, decoded.width) == (120, 90)


def test_jpeg_pixels_are_those_of_libjpeg_turbo() -> None:
    data = encoded(PIXELS, quality=90)
    np.testing.assert_array_equal(decode_image(data, AS_IS).pixels, imagecodecs.jpeg8_decode(data))


def test_of_a_gif_the_first_frame_is_taken() -> None:
    """In its palette, as every viewer shows it first."""
    first, second = (Image.fromarray(photograph(n, 40, 40)).quantize(64) for n in (1, 2))
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode_image(data, AS_IS).pixels, np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_exif_says(orientation: int) -> None:
    turns: dict[int, Any] = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](PIXELS))
    decoded = decode_image(encoded(stored, "PNG", exif=exif), AS_IS)
    np.testing.assert_array_equal(decoded.pixels, PIXELS)
    assert (decoded.height, decoded.width) == (120, 90)


def test_grey_of_16_bits_keeps_its_range() -> None:
    """Scaled to 8 bits, not cut off at 255; and bit by bit where uint16 is asked for."""
    deep = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70) * 15
    data = encoded(Image.fromarray(deep), "PNG")
    eight = decode_image(data, ImageSpec(None, colour="grey")).pixels
    np.testing.assert_array_equal(eight[..., 0], np.rint(deep / 257).astype(np.uint8))
    sixteen = decode_image(data, ImageSpec(None, colour="grey", dtype="uint16")).pixels
    np.testing.assert_array_equal(sixteen[..., 0], deep)


def test_colours() -> None:
    data = encoded(PIXELS, "PNG")
    np.testing.assert_array_equal(decode_image(data, ImageSpec(None, colour="bgr")).pixels, PIXELS[..., ::-1])
    assert decode_image(data, ImageSpec(None, colour="grey")).pixels.shape == (120, 90, 1)
    opaque = decode_image(data, ImageSpec(None, colour="rgba")).pixels
    np.testing.assert_array_equal(opaque, np.dstack([PIXELS, np.full((120, 90), 255, np.uint8)]))
    grey = decode_image(encoded(Image.fromarray(PIXELS).convert("L"), "PNG"), AS_IS).pixels
    assert (grey == grey[..., :1]).all() and grey.shape == (120, 90, 3)
    ink = decode_image(encoded(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), AS_IS).pixels
    assert np.abs(ink.astype(int) - PIXELS).max() <= 2


def test_floats_only_when_asked_for() -> None:
    data = encoded(PIXELS, "PNG")
    np.testing.assert_array_equal(decode_image(data, ImageSpec(None, dtype="float32")).pixels, PIXELS)
    scaled = decode_image(data, ImageSpec(None, dtype="float64", rescale=1 / 255)).pixels
    np.testing.assert_array_equal(scaled, PIXELS * (1 / 255))
    with pytest.raises(BadParameter, match="needs dtype float16"):
        BuildOptions(rescale=0.5)


@pytest.mark.parametrize(("height", "width"), [(120, 90), (90, 120), (64, 64), (30, 200), (20, 20)])
def test_aspect_crops_the_centre(height: int, width: int) -> None:
    """What the crop's corners are in the image is exact to a fraction of a pixel: a ramp stays a ramp."""
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width)[None]
    found = decode_image(encoded(ramp, "PNG"), ImageSpec((48, 48))).pixels.astype(float)
    side = min(height, width)
    for channel, length in ((0, height), (1, width)):
        centres = (length - side) / 2 + (np.arange(48) + 0.5) * side / 48 - 0.5
        wanted = np.clip(centres, 0, length - 1) * 255 / (length - 1)
        line = found[:, 24, 0] if channel == 0 else found[24, :, 1]
        assert np.abs(line - wanted)[2:-2].max() < 4


def test_pad_keeps_all_of_the_image_and_stretch_its_corners() -> None:
    white = np.full((40, 80, 3), 255, np.uint8)
    padded = decode_image(encoded(white, "PNG"), ImageSpec((64, 64), "pad")).pixels
    assert (padded[16:48] == 255).all() and not padded[:16].any() and not padded[48:].any()
    assert (decode_image(encoded(white, "PNG"), ImageSpec((64, 32), "stretch")).pixels == 255).all()


@pytest.mark.parametrize("resize", ["aspect", "stretch", "pad"])
def test_reduced_decoding_is_exact_enough(resize: Any) -> None:
    """Of a JPEG that is four times as large, libjpeg decodes a half, and pixels differ by less than a level."""
    large = np.asarray(Image.fromarray(photograph(3, 400, 600)).resize((1200, 800), Image.Resampling.BICUBIC))
    data = encoded(large, quality=95)
    spec = ImageSpec((160, 160), resize)
    from_whole = decode_image(encoded(decode_image(data, AS_IS).pixels, "PNG"), spec).pixels
    reduced = decode_image(data, spec).pixels
    difference = np.abs(reduced.astype(float) - from_whole)
    assert 0 < difference.mean() < 1.0


NOISE_PIXELS = np.random.default_rng(1).integers(0, 2, (83, 131, 3), np.uint8) * 255


@pytest.mark.parametrize("size", [(48, 48), (31, 77), (200, 90)])
@pytest.mark.parametrize("resize", ["aspect", "stretch", "pad"])
@pytest.mark.parametrize("colour", ["rgb", "bgr", "grey", "rgba"])
def test_a_pixel_is_at_most_one_level_from_pillows(size: tuple[int, int], resize: Any, colour: Any) -> None:
    """Also of noise, which has the largest differences, and of a JPEG that is decoded at half its size."""
    pytest.importorskip("cykooz_resizer")
    spec, differing = ImageSpec(size, resize, colour=colour), 0.0
    large = np.asarray(Image.fromarray(photograph(3, 400, 600)).resize((1201, 803), Image.Resampling.BICUBIC))
    grey = Image.fromarray(PIXELS).convert("L")
    for data in (encoded(PIXELS), encoded(PIXELS, "PNG"), encoded(NOISE_PIXELS, "PNG"), encoded(large), encoded(grey)):
        fast, exact = decode_image(data, spec), decode_image(data, spec, exact=True)
        difference = np.abs(fast.pixels.astype(int) - exact.pixels)
        assert difference.max() <= 1 and (fast.height, fast.width) == (exact.height, exact.width)
        differing = max(differing, difference.mean())
    # An image with an alpha channel is always resized by Pillow.
    assert differing > 0 or colour == "rgba"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_resized_alike(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, spec = encoded(PIXELS, quality=95, exif=exif), ImageSpec((40, 30))
    fast, exact = decode_image(data, spec).pixels, decode_image(data, spec, exact=True).pixels
    assert np.abs(fast.astype(int) - exact).max() <= 1


def test_exact_is_what_pillow_gives() -> None:
    """And what a server and its clients decode to, on whatever machine."""
    data, spec = encoded(PIXELS), ImageSpec((64, 50), "stretch")
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.resize((50, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(data, spec, exact=True).pixels, wanted)
    out = np.empty((64, 50, 3), np.uint8)
    decode_into(data, spec, out)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(served(spec, 60.0).decode(data).pixels, wanted)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "not an image in a known format"),
        (encoded(PIXELS)[:1500], "truncated"),
        (encoded(PIXELS, "PNG")[:-200], "trunc|broken|incomplete|unrecognized"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image in a known format"),
    ],
)
def test_broken_images_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason):
        decode_image(data, AS_IS)


def test_images_of_too_many_pixels_are_refused_by_their_header() -> None:
    bomb = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(BrokenImage, match=r"bomb|more than"):
        decode_image(bomb, AS_IS)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


NOISE = np.random.default_rng(0).bytes(100_000)
JPEG, PNG = encoded(PIXELS, quality=90), encoded(PIXELS, "PNG")
EXIF = _segment(0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\x08" + bytes(6))


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (JPEG, True),
        (encoded(PIXELS, quality=90, progressive=True), True),
        (PNG, True),
        (JPEG[:2] + EXIF + JPEG[2:], True),
        # Merged, and read for each entry of each.
        (JPEG[:2] + EXIF * 2 + JPEG[2:], False),
        # Passed over byte by byte.
        (JPEG[:2] + b"\xff" * 1000 + JPEG[2:], False),
        (JPEG[:2] + _segment(0xFE, b"?") * 1000 + JPEG[2:], False),
        (JPEG + b"\xff\xda" * 100, False),
        (
            PNG[:33] + _chunk(b"zTXt", b"k\0\0" + zlib.compress(NOISE)) + PNG[33:],
            False,
        ),
        (encoded(PIXELS, "GIF"), False),
        (encoded(PIXELS, "WEBP"), False),
        (JPEG[:100], False),
        (PNG[:40], False),
        (b"", False),
    ],
)
def test_plain_files_are_told_by_their_structure(data: bytes, plain: bool) -> None:
    """What is not plain is decoded to the same pixels, or refused with the same words, by another process."""
    assert is_plain(data) is plain
    form = Decoding(ImageSpec((48, 48)), FORMATS, MAX_PIXELS, 60.0)
    decoders = ImageDecoders(form.max_bytes)
    try:
        wanted = decode_image(data, ImageSpec((48, 48)))
    except BrokenImage as error:
        with pytest.raises(BrokenImage, match=re.escape(str(error))):
            decoders.decode(data, form)
    else:
        found = decoders.decode(data, form)
        np.testing.assert_array_equal(found.pixels, wanted.pixels)
        assert (found.height, found.width) == (wanted.height, wanted.width)
    finally:
        decoders.close()


def test_no_image_is_broken_by_what_happens_to_a_decoder() -> None:
    """No process can be started: the caller may come again. All that were idle have been killed: a new one is."""
    data, form = encoded(PIXELS, "GIF"), Decoding(AS_IS, FORMATS, MAX_PIXELS, 60.0)
    decoders = ImageDecoders(form.max_bytes)
    try:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(lowest := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            with pytest.raises(Overloaded, match="cannot start a process"):
                decoders.decode(data, form)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        decoders._idle += [decoders._start(), decoders._start()]
        for child in decoders._idle:
            child.kill()
        np.testing.assert_array_equal(decoders.decode(data, form).pixels, decode_image(data, AS_IS).pixels)
    finally:
        decoders.close()
