"""Uses everything that `slim.py` could have broken, and fails the image build if something does not work."""

from __future__ import annotations

import contextlib
import io
import tempfile
import urllib.request
from pathlib import Path

import cv2
import h5py
import imagecodecs
import numpy as np
import PIL.Image
import simplejpeg
import tifffile
from h5feed.decode import decode_image, resizer
from h5feed.images import ImageSpec
from h5feed.stored.codecs import load_codecs
from h5feed_server.cli import main
from h5feed_server.demo import served
from h5feed_server.storage.objects.store import check
from h5feed_server.store_address import StoreAddress


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def check_codecs() -> None:
    load_codecs()
    data = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert imagecodecs.png_encode(data)[1:4] == b"PNG"
    for kind in ("png", "jpeg", "tiff", "webp", "bmp"):
        stream = io.BytesIO()
        PIL.Image.fromarray(data).save(stream, kind)
        assert cv2.imdecode(np.frombuffer(stream.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED) is not None, kind
    jpeg = simplejpeg.encode_jpeg(np.zeros((32, 32, 3), np.uint8))
    assert decode_image(jpeg, ImageSpec((24, 24))).pixels.shape == (24, 24, 3), resizer(exact=False)
    tifffile.imwrite(io.BytesIO(), data)


def check_server(folder: Path) -> None:
    with h5py.File(folder / "things.h5", "w") as file:
        images = np.random.default_rng(1).integers(0, 255, (40, 8, 8, 3), np.uint8)
        file.create_dataset("images", data=images, chunks=(10, 8, 8, 3), compression="gzip", shuffle=True)
        file.create_dataset("more", data=images, chunks=(10, 8, 8, 3), compression="lzf", fletcher32=True)
        file["labels"] = np.arange(40) % 4
    with served(folder, cache_dir=folder / "cache") as url:
        data = f"{url}/v1/datasets/things"
        assert b"images" in fetch(f"{data}/batches/0?batch_size=8&format=npz")
        for kind in ("png", "svg"):
            assert len(fetch(f"{data}/stats/plot?field=labels&format={kind}")) > 1000
        assert fetch(f"{data}/preview?field=images")[1:4] == b"PNG"
        for page in ("/", "/datasets/things", "/datasets/things/rows", "/docs", "/redoc", "/simple/h5feed/"):
            assert b"<html" in fetch(url + page), page
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["inspect", str(folder / "things.h5")]) == 0


def check_stores() -> None:
    for url in ("s3://bucket/prefix", "gs://bucket/prefix", "https://files.example.org/folder"):
        check(StoreAddress.parse(url))


if __name__ == "__main__":
    check_codecs()
    check_stores()
    with tempfile.TemporaryDirectory() as name:
        check_server(Path(name))
    print("the environment works")
