"""`h5feed.stored.io_ring` against `os.preadv`: the same bytes, whatever the kernel allows."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from h5feed.errors import BadParameter, DatasetCorrupt, RevisionChanged
from h5feed.stored import io_ring
from h5feed.stored.local_file import Identity, LocalFile, OpenFiles

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)


def _is_available() -> bool:
    try:
        io_ring.ReadRing()
    except io_ring.Unusable:
        return False
    return True


needs_ring = pytest.mark.skipif(not _is_available(), reason="this kernel does not allow io_uring")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(CONTENT.tobytes())
    return path


def file_at(path: Path) -> LocalFile:
    return LocalFile(OpenFiles(4), str(path), Identity.of(path.stat()))


def scattered(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Offsets, sizes and begins of ranges in any order, with gaps between their targets; and the bytes of all."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 5_000, count)
    offsets = random.integers(0, len(CONTENT) - sizes, count)
    gaps = random.integers(0, 3, count)
    begins = np.cumsum(sizes + gaps) - sizes
    mixed = random.permutation(count)
    return offsets[mixed], sizes[mixed], begins[mixed], int((sizes + gaps).sum())


def check(file: LocalFile, count: int, seed: int) -> None:
    offsets, sizes, begins, nbytes = scattered(count, seed)
    target = np.full(nbytes, 7, np.uint8)
    expected = target.copy()
    for offset, size, begin in zip(offsets.tolist(), sizes.tolist(), begins.tolist(), strict=True):
        expected[begin : begin + size] = CONTENT[offset : offset + size]
    file.read_rows(offsets, sizes, target, begins)
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("allowed", [True, False])
def test_ranges_are_read_into_their_places(path: Path, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_ring, "_allowed", allowed)
    file = file_at(path)
    # More than the ring has entries, and numbers that make its slots wrap around in the middle of a read.
    for seed, count in enumerate([1, 3, 4, 5, 255, 256, 257, 700, *[37] * 20, 255, 256, 1]):
        check(file, count, seed)


@needs_ring
def test_a_ring_is_used_from_four_ranges_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    read = io_ring.ReadRing.read

    def noting(self: io_ring.ReadRing, fd: int, offsets: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        used.append(len(offsets))
        return read(self, fd, offsets, *rest)

    monkeypatch.setattr(io_ring.ReadRing, "read", noting)
    file = file_at(path)
    for count in (3, 4, 300):
        check(file, count, count)
    assert used == [4, 300]


@needs_ring
def test_results_are_counts_of_bytes(path: Path) -> None:
    ring = io_ring.ReadRing()
    target = np.zeros((5, 100), np.uint8)
    addresses = target.ctypes.data + np.arange(5) * 100
    offsets = np.array([0, len(CONTENT) - 10, len(CONTENT), len(CONTENT) + 5, 1])
    with path.open("rb") as file:
        counts = ring.read(file.fileno(), offsets, addresses, np.full(5, 100))
        assert counts.tolist() == [100, 10, 0, 0, 100]
        bad = ring.read(10_000, offsets, addresses, np.full(5, 100))
        assert bad.tolist() == [-errno.EBADF] * 5
        # To memory that does not exist.
        bad = ring.read(file.fileno(), offsets[:1], np.array([8]), np.array([100]))
        assert bad.tolist() == [-errno.EFAULT]
        assert ring.read(file.fileno(), offsets, addresses, np.full(5, 100)).tolist() == counts.tolist()


def test_a_file_that_became_shorter_is_noticed(path: Path) -> None:
    file = file_at(path)
    offsets = np.arange(8) * 300_000
    sizes, begins, target = np.full(8, 1000), np.arange(8) * 1000, np.zeros(8000, np.uint8)
    file.read_rows(offsets, sizes, target, begins)
    with pytest.raises(DatasetCorrupt, match="the file ends at byte 3000001"):
        file.read_rows(offsets + 2_999_000, sizes, target, begins)
    os.truncate(path, 1_000_000)
    with pytest.raises(RevisionChanged):
        file.read_rows(offsets, sizes, target, begins)


def test_ranges_outside_of_the_target_are_refused(path: Path) -> None:
    file = file_at(path)
    offsets, sizes = np.arange(4) * 10, np.full(4, 10)
    for begins in ([0, 10, 20, 31], [-1, 10, 20, 30]):
        with pytest.raises(ValueError, match="do not fit"):
            file.read_rows(offsets, sizes, np.zeros(40, np.uint8), np.array(begins))


def test_threads_and_forked_children_have_rings_of_their_own(path: Path) -> None:
    file = file_at(path)
    check(file, 50, 0)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(40):
                check(file, 50, seed + number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    children = []
    for number in range(3):
        # The parent's ring is in the middle of its slots: a child that shared it would take its results.
        child = os.fork()
        if child == 0:
            try:
                for seed in range(40):
                    check(file, 50, 1000 * number + seed)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
        for seed in range(20):
            check(file, 50, seed)
    for thread in threads:
        thread.join()
    assert not failed
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_signals_do_not_end_a_read_early(path: Path) -> None:
    file, came = file_at(path), [0]

    def count(*_: object) -> None:
        came[0] += 1

    before = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for seed in range(150):
            check(file, 300, seed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came[0]


def _only_without(forbidden: int, error: int) -> str:
    """A program that reads rows after it has forbidden itself a system call, as a container's seccomp profile does."""
    # BPF: load the number of the system call; if it is the forbidden one, return the error, else allow.
    program = b"".join(
        struct.pack("<HBBI", *line)
        for line in (
            (0x20, 0, 0, 0),
            (0x15, 0, 1, forbidden),
            (0x06, 0, 0, 0x00050000 | error),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    return textwrap.dedent(f"""
        import ctypes, sys
        from tests.client.test_io_ring import *
        check(file_at(Path(sys.argv[1])), 300, 1) if {forbidden} == 426 else None
        program = ctypes.create_string_buffer({program!r}, {len(program)})
        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.addressof(program))), 0, 0) == 0
        file = file_at(Path(sys.argv[1]))
        for seed in range(5):
            check(file, 300, seed)
        print(io_ring._allowed, io_ring._rings.ring)
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
@pytest.mark.parametrize(
    ("forbidden", "error"), [(425, errno.EPERM), (425, errno.ENOSYS), (426, errno.EPERM), (426, errno.EAGAIN)]
)
def test_a_kernel_that_refuses_is_no_error(path: Path, forbidden: int, error: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _only_without(forbidden, error), str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "None"] if forbidden == 425 else done.stdout.split()[-1] == "None"


def test_file_systems_that_would_hand_reads_to_other_threads_are_told_apart(path: Path) -> None:
    with path.open("rb") as file:
        assert io_ring.is_direct(file.fileno())
    with Path("/proc/self/status").open("rb") as file:
        assert not io_ring.is_direct(file.fileno())


def test_the_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_ring, "_allowed", None)
    monkeypatch.setenv("H5FEED_IO_URING", "off")
    assert io_ring.this_thread() is None
    monkeypatch.setattr(io_ring, "_allowed", None)
    monkeypatch.setenv("H5FEED_IO_URING", "perhaps")
    with pytest.raises(BadParameter, match="H5FEED_IO_URING='perhaps' must be 1 or 0"):
        io_ring.this_thread()
