"""`h5feed.stored.io_ring` against `os.preadv`: the same bytes, whatever the kernel allows."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
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
    # The end of the last would be negative: 64 bits overflow.
    for begins in ([0, 10, 20, 31], [-1, 10, 20, 30], [0, 10, 20, 2**63 - 1]):
        with pytest.raises(ValueError, match="do not fit"):
            file.read_rows(offsets, sizes, np.zeros(40, np.uint8), np.array(begins))


def test_targets_that_preadv_would_refuse_are_refused(path: Path) -> None:
    """The kernel gets addresses only: without a check, it would write to the bytes of a constant."""
    file, content = file_at(path), bytes(400)
    begins, sizes = np.arange(4) * 100, np.full(4, 100)
    for target in (np.frombuffer(content, np.uint8), np.zeros(800, np.uint8)[::2]):
        with pytest.raises(BufferError):
            file.read_rows(begins, sizes, target, begins)
        assert not target.any()


def test_threads_that_end_give_back_their_rings(path: Path) -> None:
    file = file_at(path)
    check(file, 50, 0)
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(50):
        thread = threading.Thread(target=check, args=(file, 50, seed))
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) <= before


_FEW_DESCRIPTORS = """
import resource, sys
from tests.client.test_io_ring import *
file, most = file_at(Path(sys.argv[1])), resource.getrlimit(resource.RLIMIT_NOFILE)
check(file, 3, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + int(sys.argv[2]), most[1]))
check(file, 300, 1)
print(io_ring._rings.ring)
resource.setrlimit(resource.RLIMIT_NOFILE, most)
thread = threading.Thread(target=lambda: (check(file, 300, 2), print(type(io_ring._rings.ring).__name__)))
thread.start()
thread.join()
"""


@needs_ring
@pytest.mark.parametrize("free", [0, 1, 2])
def test_a_lack_of_descriptors_is_no_error_and_may_end(path: Path, free: int) -> None:
    command = [sys.executable, "-c", _FEW_DESCRIPTORS, str(path), str(free)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["None", "ReadRing"], done.stderr


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


class Interrupted(Exception):
    """Raised by a signal handler, as `KeyboardInterrupt` is."""


@contextlib.contextmanager
def handling(handler: Callable[[], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt() -> None:
    raise Interrupted


def test_rows_are_right_after_signal_handlers_that_raise(path: Path) -> None:
    """Requests and results that are left in a ring must not be taken for those of the next read."""
    file, came = file_at(path), 0
    offsets, sizes, begins, nbytes = scattered(200, 5)
    abandoned = np.zeros(nbytes, np.uint8)
    with handling(interrupt):
        for number in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, 3e-5 * (1 + number % 20))
                for _ in range(100):
                    file.read_rows(offsets, sizes, abandoned, begins)
            except Interrupted:
                came += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            abandoned[:] = 0
            check(file, 200, number)
            assert not abandoned.any()
    assert came


@needs_ring
def test_an_exception_waits_until_nothing_is_written_any_more(path: Path) -> None:
    """Reads of an empty pipe are under way until somebody writes to it, as those of a slow disk are."""
    ring, target = io_ring.ReadRing(), np.zeros(40, np.uint8)
    receiving, sending = os.pipe()
    addresses = target.ctypes.data + np.arange(4) * 10
    # Two signals: the second comes while the first exception is on its way.
    writing = threading.Timer(0.5, os.write, (sending, bytes([7]) * 40))
    writing.start()
    with handling(interrupt), pytest.raises(Interrupted):
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        ring.read(receiving, np.zeros(4, np.int64), addresses, np.full(4, 10))
    assert (target == 7).all() and ring.is_closed
    writing.join()
    os.close(receiving)
    os.close(sending)


def test_a_signal_handler_may_read_rows(path: Path) -> None:
    file, came = file_at(path), [0]

    def read() -> None:
        came[0] += 1
        check(file, 60, came[0])

    with handling(read):
        for seed in range(150):
            signal.setitimer(signal.ITIMER_REAL, 0.0003)
            check(file, 300, seed)
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


def test_a_c_library_that_cannot_ask_the_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT")
    check(file_at(path), 300, 0)


def test_the_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_ring, "_allowed", None)
    monkeypatch.setenv("H5FEED_IO_URING", "off")
    assert io_ring.this_thread() is None
    monkeypatch.setattr(io_ring, "_allowed", None)
    monkeypatch.setenv("H5FEED_IO_URING", "perhaps")
    with pytest.raises(BadParameter, match="H5FEED_IO_URING='perhaps' must be 1 or 0"):
        io_ring.this_thread()
    with pytest.raises(BadParameter, match="H5FEED_IO_URING='perhaps' must be 1 or 0"):
        h5feed.connect("http://127.0.0.1:1")
