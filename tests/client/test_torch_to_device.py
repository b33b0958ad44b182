"""Batches on their way to a GPU: page-locked memory, and copies beside the computation.

Most of it is tested with a card that puts off its copies for as long as CUDA may, and refuses what CUDA refuses. What
only a GPU can show is tested where there is one.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.buffers import PAGE, BufferPool
from h5feed.errors import BadParameter

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

torch = pytest.importorskip("torch")
from h5feed.loops.card import LEAST_LOCKED_BYTES, CudaCard, LockedMemory, Mark, moved  # noqa: E402
from h5feed.torch import _on_card, to_device  # noqa: E402

ROWS = 288

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class LateMark:
    """Behind the copies that were started before it."""

    def __init__(self, card: LateCard, copies: int) -> None:
        self._card, self._copies = card, copies

    def query(self) -> bool:
        return self._card.done >= self._copies

    def synchronize(self) -> None:
        self._card.catch_up(self._copies)


class LateCard:
    """Copies nothing before somebody waits for it, and fails if memory that is locked is locked again."""

    def __init__(self, refuses: str | None = None) -> None:
        self._refuses = refuses
        self._copies: list[tuple[Any, Any]] = []
        self.done = 0
        self.locked: dict[int, int] = {}
        self.locks = 0
        self.copied_from_locked = 0
        self.most_behind = 0

    def lock(self, address: int, nbytes: int) -> str | None:
        self.locks += 1
        assert address % PAGE == nbytes % PAGE == 0
        assert all(address + nbytes <= begin or begin + size <= address for begin, size in self.locked.items())
        if self._refuses is None:
            self.locked[address] = nbytes
        return self._refuses

    def unlock(self, address: int) -> None:
        # The memory is still there.
        assert any(line.startswith(f"{address:x}-".zfill(13)) or f"{address:08x}-" in line for line in _maps())
        del self.locked[address]

    def copy(self, tensor: Any) -> Any:
        copy = torch.full_like(tensor, 99)
        self._copies.append((copy, tensor.numpy().__array_interface__))
        begin = tensor.data_ptr()
        self.copied_from_locked += any(
            first <= begin and begin + tensor.nbytes <= first + size for first, size in self.locked.items()
        )
        return copy

    def catch_up(self, copies: int) -> None:
        """Copy what is in the memory now: the card, as CUDA, knows an address only, and keeps nothing alive."""
        for copy, interface in self._copies[self.done : copies]:
            copy.copy_(torch.from_numpy(np.asarray(_At(interface)).copy()))
        self.done = max(self.done, copies)

    def copied(self) -> LateMark:
        self.most_behind = max(self.most_behind, len(self._copies) - self.done)
        return LateMark(self, len(self._copies))

    def hand_over(self, tensors: list[Any], copied: Mark) -> None:
        copied.synchronize()

    def used(self) -> LateMark:
        return LateMark(self, 0)


class _At:
    """An array at an address."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.h5"
    random = np.random.default_rng(3)
    with h5py.File(path, "w") as file:
        file["images"] = random.integers(0, 256, (ROWS, 160, 160, 3), np.uint8)
        file["labels"] = np.arange(ROWS)
    return path


@pytest.fixture(scope="module")
def stored(path: Path) -> Any:
    with h5py.File(path) as file:
        return file["images"][:]


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


def made(feed: h5feed.Feed, **options: Any) -> Any:
    return feed["images"].torch(
        **{"batch_size": 32, "shuffle": True, "x": "images", "y": "labels", "readahead": 12 << 20, **options}
    )


@pytest.mark.parametrize("ahead", [0, 2, 5])
@pytest.mark.parametrize("options", [{}, {"rescale": 0.5}, {"batch_size": 25, "last": "pad"}], ids=str)
def test_rows_are_whole(feed: h5feed.Feed, stored: Any, ahead: int, options: dict[str, Any]) -> None:
    """A copy that happens as late as it may reads the rows of its batch: no buffer was reused before. All copies are
    made from locked memory, and no buffer is locked twice."""
    card = LateCard()
    train = made(feed, **options)
    scale = options.get("rescale", 1)
    for epoch in range(3):
        seen = []
        for step, (x, y, *_) in enumerate(_on_card(train, card, ahead)):
            assert torch.equal(x, torch.from_numpy(stored[y.numpy()]) * scale)
            seen += y.tolist()
            assert card.most_behind <= (2 + ("last" in options)) * (ahead + 1), step
        assert sorted(set(seen)) == list(range(ROWS)) and train.epoch == epoch + 1
    assert card.done == len(card._copies) == (2 + ("last" in options)) * 3 * len(train)
    # All images; labels that do not come with them are in small buffers.
    assert card.copied_from_locked >= 3 * len(train)
    assert 0 < sum(card.locked.values()) <= 256 << 20
    # Later passes reuse what the first one locked.
    assert card.locks < 3 * len(train) and card.locks == len(card.locked)


def test_memory_is_unlocked_before_it_is_freed(feed: h5feed.Feed) -> None:
    """When nothing refers to it any more: neither the loop nor a batch."""
    card = LateCard()
    train = made(feed)
    (kept,) = [next(iter(train._for_card(card)))]
    assert card.locked
    train.close()
    del train
    # Threads that read ahead let go of their batches when they end.
    wait_until(lambda: gc.collect() >= 0 and len(card.locked) == 1)
    (address,) = card.locked
    assert address <= kept[0].data_ptr() < address + card.locked[address]
    del kept
    gc.collect()
    assert not card.locked


def test_what_is_left_early(feed: h5feed.Feed, stored: Any) -> None:
    """After a `break` or an error, the copies that were started are waited for before their memory is recycled."""
    card = LateCard()
    train = made(feed)
    for leave in range(3):
        loop = _on_card(train, card, 2)
        x, y = next(loop)
        if leave == 1:
            with pytest.raises(ZeroDivisionError):
                loop.throw(ZeroDivisionError)  # type: ignore[attr-defined]
        loop.close()  # type: ignore[attr-defined]
        assert card.done == len(card._copies) > 0
        for copy, label in zip(card._copies[::2], card._copies[1::2], strict=True):
            assert torch.equal(copy[0], torch.from_numpy(stored[label[0].numpy()]))
        assert torch.equal(x, torch.from_numpy(stored[y.numpy()]))


def test_memory_that_cannot_be_locked(feed: h5feed.Feed, stored: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One line of warning, one attempt, and the same rows."""
    card = LateCard(refuses="out of memory")
    train = made(feed)
    with caplog.at_level(logging.WARNING, "h5feed"):
        for _ in range(2):
            for x, y in _on_card(train, card, 2):
                assert torch.equal(x, torch.from_numpy(stored[y.numpy()]))
    assert [record.getMessage() for record in caplog.records] == [
        "batches are copied to the GPU from ordinary memory, which is slower: out of memory"
    ]
    assert card.locks == 1 and card.copied_from_locked == 0


def test_a_card_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """An error of torch is a reason like any other."""

    class Broken(LateCard):
        def lock(self, address: int, nbytes: int) -> str | None:
            raise RuntimeError("no driver")

    memory = LockedMemory(Broken())
    with caplog.at_level(logging.WARNING, "h5feed"):
        assert all(len(memory.allocate(LEAST_LOCKED_BYTES)) == LEAST_LOCKED_BYTES for _ in range(2))
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["no driver"]


def test_what_a_transform_gets(feed: h5feed.Feed, stored: Any) -> None:
    """A transform never sees locked memory: it could start copies that nobody waits for."""
    card = LateCard()
    flipped = made(feed, transform=lambda x: x[:, ::-1])
    for x, y in _on_card(flipped, card, 2):
        assert torch.equal(x, torch.from_numpy(stored[y.numpy()][:, ::-1].copy()))
    assert card.locks == card.copied_from_locked == 0


def test_other_loops_have_ordinary_memory(feed: h5feed.Feed) -> None:
    """Memory that is locked belongs to the loop that waits for the copies: all others may copy as they like."""
    card = LateCard()
    train = made(feed)
    for _ in _on_card(train, card, 2):
        pass
    tensors = [x for x, _ in train] + [x for x, _ in made(feed)]
    for tensor in tensors:
        assert not any(first <= tensor.data_ptr() < first + size for first, size in card.locked.items())


def test_the_pool_of_locked_memory() -> None:
    """Small buffers are not locked. A buffer is recycled only when all views are gone, and is locked once."""
    card = LateCard()
    pool = BufferPool(16 << 20, allocate=LockedMemory(card).allocate)
    pool.lease(1000)
    assert not card.locked
    lease = pool.lease(2 << 20)
    address, view = lease.ctypes.data, memoryview(lease[5:])
    del lease
    other = pool.lease(2 << 20)
    assert other.ctypes.data != address and len(card.locked) == 2
    del view, other
    assert pool.lease(2 << 20).ctypes.data in card.locked
    assert card.locks == 2
    pool.drop_idle()
    assert not card.locked


def test_a_forked_child_leaves_it_alone() -> None:
    """The child neither reuses nor unlocks the memory, and what the parent writes afterwards stays where CUDA reads."""
    card = LateCard()
    pool = BufferPool(16 << 20, allocate=LockedMemory(card).allocate)
    lease = pool.lease(2 << 20)
    lease[:] = 1
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(writing)
            os.read(reading, 1)
            # What the parent wrote after the fork is in the same pages.
            seen = bool((lease == 2).all())
            del lease
            gc.collect()
            other = pool.lease(2 << 20)
            other[:] = 3
            code = 0 if seen and len(card.locked) == card.locks == 1 and pool.nbytes < 4 << 20 else 2
        finally:
            os._exit(code)
    os.close(reading)
    lease[:] = 2
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    assert (lease == 2).all() and len(card.locked) == 1
    assert len(pickle.loads(pickle.dumps(pool)).lease(2 << 20)) == 2 << 20 and card.locks == 1


@pytest.mark.parametrize("wrapped", [lambda batches: batches, lambda batches: iter(batches)], ids=["loop", "iterator"])
def test_on_the_cpu(feed: h5feed.Feed, stored: Any, wrapped: Callable[[Any], Any]) -> None:
    """Tensors pass through without a copy."""
    received = []

    def noted() -> Iterator[Any]:
        for x, y in wrapped(made(feed)):
            received.append(x.data_ptr())
            yield x, y

    seen = []
    for x, y in to_device(noted(), "cpu"):
        assert torch.equal(x, torch.from_numpy(stored[y.numpy()])) and x.data_ptr() == received[-1]
        seen += y.tolist()
    assert sorted(seen) == list(range(ROWS))
    for batch in to_device(feed["images"].batches(batch_size=64), "cpu"):
        assert set(batch) == {"images", "labels"} and isinstance(batch["images"], torch.Tensor)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "device='gpu' is not a device of this machine: use 'cuda'"),
        (None, "device=None is not a device"),
        ("cuda:99", "device='cuda:99'"),
        pytest.param(
            "cuda",
            "device='cuda' needs a CUDA GPU, but torch .* finds none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_devices_that_are_not_there(device: Any, said: str) -> None:
    """They are refused when the loop is made, not by an assertion of torch at its first batch."""
    with pytest.raises(BadParameter, match=said):
        to_device([], device)


def test_other_iterables(stored: Any) -> None:
    """Trees of arrays and tensors of anybody; what torch has no type for stays as it is."""
    trees = [{"a": (stored[index], torch.full((2,), index)), "text": np.array(["x"])} for index in range(5)]
    for index, tree in enumerate(moved(trees, LateCard(), 2)):
        assert torch.equal(tree["a"][0], torch.from_numpy(stored[index])) and tree["a"][1].tolist() == [index] * 2
        assert tree["text"].tolist() == ["x"]
    with pytest.raises(BadParameter, match="ahead=-1"):
        to_device([], "cpu", ahead=-1)


@on_a_gpu
@pytest.mark.parametrize("ahead", [0, 2])
def test_rows_on_a_gpu(feed: h5feed.Feed, stored: Any, ahead: int) -> None:
    """The rows of h5py, through page-locked memory, while the GPU computes with earlier batches."""
    train = made(feed)
    work = torch.rand(2048, 2048, device="cuda")
    pinned = []
    for x, y in train._for_card(CudaCard(torch.device("cuda"))):
        pinned.append(x.is_pinned())
        assert torch.equal(x, torch.from_numpy(stored[y.numpy()]))
    assert all(pinned)
    for _ in range(3):
        results = []
        for x, y in to_device(train, ahead=ahead):
            assert x.is_cuda
            for _ in range(20):
                work = (work @ work).clamp(0, 1)
            results.append((x.sum(dim=(1, 2, 3), dtype=torch.int64), y))
            del x, y
        for sums, rows in results:
            of_rows = stored[rows.cpu().numpy()].sum(axis=(1, 2, 3), dtype=np.int64)
            np.testing.assert_array_equal(sums.cpu().numpy(), of_rows)


@on_a_gpu
def test_copies_do_not_wait_on_a_gpu(feed: h5feed.Feed) -> None:
    """A copy from page-locked memory is only started: its mark is not reached while the stream does something else."""
    card = CudaCard(torch.device("cuda"))
    x, _ = next(iter(made(feed)._for_card(card)))
    with torch.cuda.stream(card._stream):
        torch.cuda._sleep(200_000_000)
    copy = card.copy(x)
    copied = card.copied()
    assert not copied.query()
    card.hand_over([copy], copied)
    assert torch.equal(copy.cpu(), x) and copied.query()
