"""Batches on a JAX device: the CPU uses the memory that was received, and it is not reused under a `jax.Array`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.fetching import parts
from h5feed.jax import to_device
from h5feed.wire import ALIGNMENT

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

jax = pytest.importorskip("jax")

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory of their own")

ROWS, SHAPE = 130, (160, 160, 3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are large enough for a response of their own for each batch of 64 or 50."""
    path = tmp_path_factory.mktemp("data") / "images.h5"
    random = np.random.default_rng(3)
    with h5py.File(path, "w") as file:
        file["images"] = random.integers(0, 256, (ROWS, *SHAPE), np.uint8)
        file["depth"] = random.normal(size=(ROWS, 96, 96)).astype("f4")
        file["labels"] = np.arange(ROWS, dtype=np.uint8)
    return path


@pytest.fixture(scope="module")
def server(
    path: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> ServerProcess:
    return serve_module(path.parent, "--uds", str(tmp_path_factory.mktemp("uds") / "socket"), "--port", "0")


@pytest.fixture(params=["network", "files"])
def feed(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[h5feed.Feed]:
    """Rows from responses, and rows that the client reads from the files."""
    url = server.url if request.param == "network" else f"unix://{server.socket}"
    with h5feed.connect(url, local=False, deadline=60) as connected:
        yield connected


def addresses(arrays: Any) -> dict[str, int]:
    return {name: array.ctypes.data for name, array in arrays.items()}


@pytest.mark.parametrize("batch_size", [64, 50, 51])
@pytest.mark.parametrize("cached", [False, True])
def test_large_batches_are_not_copied(feed: h5feed.Feed, tmp_path: Path, batch_size: int, cached: bool) -> None:
    """Every field of every batch of this size is aligned, the last batch too, and its `jax.Array` is that memory."""
    options: dict[str, Any] = {"batch_size": batch_size, "cache": tmp_path if cached else None}
    fields = ["images", "depth", "labels"]
    for epoch in range(2 if cached else 1):
        order: dict[str, Any] = {"shuffle": True, "epoch": epoch, "fields": fields}
        for batch in feed["images"].batches(**options, **order):
            found = addresses(batch)
            assert [address % ALIGNMENT for address in found.values()] == [0, 0, 0]
            (moved,) = to_device([batch])
            assert {name: array.unsafe_buffer_pointer() for name, array in moved.items()} == found


def test_batches_larger_than_a_response(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any
) -> None:
    """Their parts are received into aligned arrays, which JAX uses."""
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    with h5feed.connect(serve(path.parent, H5FEED_MAX_BODY_BYTES=str(1 << 20)).url, local=False) as feed:
        for batch in feed["images"].batches(batch_size=50, fields=["images", "depth"], decode="server"):
            (moved,) = to_device([batch])
            assert {name: array.unsafe_buffer_pointer() for name, array in moved.items()} == addresses(batch)


def test_scaled_inputs_are_not_copied(feed: h5feed.Feed) -> None:
    with feed["images"].loader(batch_size=50, x="images", y="labels", rescale=1 / 255) as loader:
        for x, y in loader:
            ((on_device, _),) = to_device([(x, y)])
            assert on_device.unsafe_buffer_pointer() == x.ctypes.data


def test_a_full_pool_gives_aligned_memory(feed: h5feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory in the place of recycled memory is aligned, too."""
    monkeypatch.setattr(feed._client.pool, "max_bytes", 1)
    kept = list(feed["images"].batches(batch_size=50, fields=["images", "depth"]))
    assert all(address % ALIGNMENT == 0 for batch in kept for address in addresses(batch).values())


def test_memory_is_reused_only_after_the_array(feed: h5feed.Feed) -> None:
    """As long as a `jax.Array` of it lives, a buffer is in use; after it, it is idle."""
    pool = feed._client.pool
    batches = feed["images"].batches(batch_size=64, fields=["images"])
    (kept,) = to_device([next(batches)])
    batches.close()
    gc.collect()
    assert pool.bytes_in_use >= kept["images"].nbytes
    del kept, batches

    def all_idle() -> bool:
        # JAX lets go of the array of numpy at the next collection or call, the reader of what it read ahead on its own.
        gc.collect()
        return pool.bytes_in_use == 0

    wait_until(all_idle)


@pytest.mark.parametrize("batch_size", [64, 50, 7])
def test_kept_arrays_stay_as_they_are(feed: h5feed.Feed, path: Path, batch_size: int) -> None:
    """Arrays of earlier passes are those of h5py after later passes have recycled all other buffers.

    Half of the steps donate their arguments: JAX does not write its results to the memory of numpy.
    """
    with h5py.File(path) as file:
        stored = {name: file[name][:] for name in ("images", "depth", "labels")}
    normal = jax.jit(lambda images, depth: (images.sum(axis=(1, 2, 3), dtype="uint32"), depth * 2))
    donating = jax.jit(lambda images, depth: (images ^ 255, depth * 2), donate_argnums=(0, 1))
    kept, results = [], []
    with feed["images"].loader(
        batch_size=batch_size, shuffle=True, x=("images", "depth"), y="labels", readahead=16 << 20
    ) as loader:
        for epoch in range(3):
            for step, ((images, depth), labels) in enumerate(to_device(loader, ahead=1)):
                if step % 5 == epoch:
                    kept.append((images, depth, labels))
                elif step % 2:
                    # Not waited for: JAX computes while the next batches are received.
                    results.append((labels, normal(images, depth)))
                else:
                    results.append((labels, donating(images, depth)))
                del images, depth, labels
    assert kept and results
    for images, depth, labels in kept:
        rows = np.asarray(labels)
        np.testing.assert_array_equal(images, stored["images"][rows])
        np.testing.assert_array_equal(depth, stored["depth"][rows])
    for labels, (of_images, of_depth) in results:
        images = stored["images"][np.asarray(labels)]
        expected = images ^ 255 if of_images.ndim == 4 else images.sum(axis=(1, 2, 3), dtype=np.uint32)
        np.testing.assert_array_equal(of_images, expected)
        np.testing.assert_array_equal(of_depth, stored["depth"][np.asarray(labels)] * 2)


def test_arguments_of_compiled_functions(feed: h5feed.Feed, path: Path) -> None:
    """Numpy arrays that a compiled function gets, as from Keras on the CPU, are used up before they are recycled."""
    with h5py.File(path) as file:
        stored = file["images"][:]
    step = jax.jit(lambda images: jax.numpy.cumsum(images.astype("uint32"), axis=1)[:, -1])
    results = []
    with feed["images"].loader(batch_size=50, shuffle=True, x="images", y="labels", readahead=16 << 20) as loader:
        for _ in range(3):
            for images, labels in loader:
                results.append((labels.copy(), step(images)))
                del images
    for labels, result in results:
        np.testing.assert_array_equal(result, stored[labels].sum(axis=1, dtype=np.uint32))
