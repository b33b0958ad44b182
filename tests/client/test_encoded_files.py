"""The files of images, for decoders on the GPU: torchvision's nvJPEG and NVIDIA DALI."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.dali import Source
from h5feed.errors import BadParameter
from PIL import Image

from tests.support.server_process import ServerProcess

ROWS = 45


def _file(row: int) -> bytes:
    """A smooth picture, of a size of its own."""
    height, width = 40 + row, 64 + row % 7
    down, right = np.mgrid[0:height, 0:width]
    pixels = np.stack([down * 3 + row, right * 3, (down + right) * 2], axis=-1) % 256
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).resize((width, height)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


FILES = [_file(row) for row in range(ROWS)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "photos.h5", "w") as file:
        file["images"] = np.frombuffer(b"".join(FILES), np.uint8)
        file["images"].attrs.update({"encoding": "jpeg", "shape": (32, 32, 3), "resize": "aspect"})
        file["images.offsets"] = np.cumsum([0, *map(len, FILES)])
        file["labels"] = np.arange(ROWS)
    return serve_module(folder)


@pytest.fixture
def photos(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["photos"]


def pixels_of(file: bytes) -> Any:
    """(height, width, 3) uint8, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def rows_of(photos: h5feed.Dataset, epoch: int, **options: Any) -> list[list[int]]:
    batches = photos.batches(batch_size=8, shuffle=True, fields=["labels"], epoch=epoch, **options)
    return [batch["labels"].tolist() for batch in batches]


def test_tensors_of_files(photos: h5feed.Dataset) -> None:
    """One for each row, byte for byte, in the memory of the batch."""
    torch = pytest.importorskip("torch")
    from h5feed.torch import encoded

    for batch in photos.batches(batch_size=8, shuffle=True, encoded=["images"]):
        tensors = encoded(batch, "images")
        assert [tensor.numpy().tobytes() for tensor in tensors] == [FILES[row] for row in batch.rows]
        assert {(tensor.dtype, tensor.dim()) for tensor in tensors} == {(torch.uint8, 1)}
        assert np.shares_memory(tensors[0].numpy(), batch["images"])
    with pytest.raises(BadParameter, match=r"encoded=\['images'\]"):
        encoded(photos.batch(0), "images")
    with pytest.raises(BadParameter, match="no field 'pixels': it has 'labels', 'images'"):
        encoded(photos.batch(0), "pixels")


def test_decoded_by_torchvision(photos: h5feed.Dataset) -> None:
    """On the CPU, they are those of Pillow, up to rounding; on a GPU, nvJPEG's are close to them."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from h5feed.torch import encoded
    from torchvision.io import ImageReadMode, decode_jpeg

    for device, most in (("cpu", 1.0), ("cuda", 4.0)):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for batch in photos.batches(batch_size=8, shuffle=True, encoded=["images"]):
            images = decode_jpeg(encoded(batch, "images"), mode=ImageReadMode.RGB, device=device)
            for image, row in zip(images, batch.rows, strict=True):
                expected = pixels_of(FILES[row]).transpose(2, 0, 1).astype(int)
                assert image.shape == expected.shape
                assert np.abs(image.cpu().numpy() - expected).mean() <= most


@dataclass(frozen=True)
class Info:
    """As `nvidia.dali.types.BatchInfo`."""

    iteration: int
    epoch_idx: int


def run_as_dali(source: Any, epoch: int) -> Iterator[Any]:
    """Call the source as DALI does, up to StopIteration."""
    for iteration in itertools.count():
        try:
            yield source(Info(iteration, epoch))
        except StopIteration:
            return


@pytest.mark.parametrize("options", [{}, {"last": "drop"}, {"shard": 1, "shards": 2, "last": "pad"}], ids=str)
def test_the_protocol_of_dali(photos: h5feed.Dataset, options: dict[str, Any]) -> None:
    """Each epoch is a pass in its own order, and ends with StopIteration, as often as it is asked."""
    source = Source(photos, "all", ("images", "labels"), batch_size=8, shuffle=True, epoch=3, **options)
    for epoch in range(3):
        batches = list(run_as_dali(source, epoch))
        assert [labels.tolist() for _, labels in batches] == rows_of(photos, 3 + epoch, **options)
        for files, labels in batches:
            assert [file.tobytes() for file in files] == [FILES[row] for row in labels]
            assert {(file.dtype.name, file.ndim) for file in files} == {("uint8", 1)}
        assert len(batches) == len(source)
        for _ in range(2):
            with pytest.raises(StopIteration):
                source(Info(len(source), epoch))
    source.close()


def test_one_field_any_place_and_copies(photos: h5feed.Dataset) -> None:
    """A name alone gives a batch instead of a tuple; batches may be asked for in any order, by a copy too."""
    source = Source(photos, fields="labels", batch_size=8, shuffle=True)
    expected = [rows_of(photos, epoch) for epoch in range(2)]
    copied = pickle.loads(pickle.dumps(source))
    for one in (source, copied):
        for epoch, iteration in ((1, 4), (0, 0), (0, 1), (1, 5), (0, 3)):
            assert np.asarray(one(Info(iteration, epoch))).tolist() == expected[epoch][iteration]
        one.close()
    pixels = Source(photos, fields="images", batch_size=8, encoded=[])(Info(0, 0))
    assert isinstance(pixels, np.ndarray) and pixels.shape == (8, 32, 32, 3)


def test_wrong_use(photos: h5feed.Dataset) -> None:
    with pytest.raises(BadParameter, match="batch_info=True"):
        Source(photos)(3)  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="rescale"):
        Source(photos, rescale=0.5)  # type: ignore[call-arg]


def test_a_pipeline_of_dali(photos: h5feed.Dataset) -> None:
    """A real pipeline, on the CPU: every row once in each epoch, and its pixels about those of Pillow."""
    dali = pytest.importorskip("nvidia.dali")
    source = Source(photos, fields=("images", "labels"), batch_size=8, shuffle=True)

    @dali.pipeline_def(batch_size=8, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        files, labels = dali.fn.external_source(source, num_outputs=2, batch_info=True)
        return dali.fn.decoders.image(files, device="cpu"), labels

    running = pipeline()
    running.build()
    for epoch in range(2):
        order = []
        with pytest.raises(StopIteration):
            while True:
                images, labels = running.run()
                order.append(np.asarray(labels.as_array()).tolist())
                for image, row in zip(images, order[-1], strict=True):
                    difference = np.abs(np.asarray(image).astype(int) - pixels_of(FILES[row]))
                    assert difference.mean() < 2
        assert order == rows_of(photos, epoch)
        running.reset()
    source.close()
