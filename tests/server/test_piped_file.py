"""Files that a child reads through its parent: the same bytes, in few steps, and in bounded memory."""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5feed.stored.local_file import FileSource, Identity, LocalFile, OpenFiles
from h5feed_server.storage.hdf5 import piping
from h5feed_server.storage.hdf5.child import LENGTH
from h5feed_server.storage.hdf5.piped_file import BLOCK_BYTES, MOST_BYTES, RUN, WANTED, Pipe, PipedFile
from h5feed_server.storage.hdf5.read_ahead import read_ahead


class Parent:
    """Answers what comes through a pipe.

    Attributes
    ----------
    frames : int
        How often blocks were asked for. Each time takes as long as the store takes for an answer.
    nbytes : int
        Bytes of these blocks.
    """

    def __init__(self, source: FileSource, requests: int, replies: int) -> None:
        self.frames = self.nbytes = 0
        self._files = (source,)
        self._pipes = requests, replies
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        requests, replies = self._pipes
        while length := os.read(requests, LENGTH.size):
            frame = os.read(requests, LENGTH.unpack(length)[0])
            assert frame[:1] == WANTED
            answer = memoryview(piping._blocks(self._files, memoryview(frame)[1:]))
            self.frames += 1
            self.nbytes += len(answer) - LENGTH.size
            while answer:
                answer = answer[os.write(replies, answer) :]


@contextlib.contextmanager
def piped(path: Path, levels: int = 1) -> Iterator[tuple[PipedFile, Parent]]:
    """A file as a child has it, and the other end."""
    source = LocalFile(OpenFiles(1), str(path), Identity.of(path.stat()))
    source.remote_bytes = path.stat().st_size
    asked, requests = os.pipe()
    replies, answers = os.pipe()
    parent = Parent(source, asked, answers)
    try:
        yield PipedFile(Pipe(requests, replies, levels), 0, source.remote_bytes, "a version"), parent
    finally:
        os.close(requests)
        parent.thread.join(60)
        for descriptor in (asked, replies, answers):
            os.close(descriptor)


def test_any_range(tmp_path: Path) -> None:
    """Within a block, over blocks and steps, up to the end and beyond it."""
    content = np.random.default_rng(0).bytes(3 * MOST_BYTES + 12_345)
    path = tmp_path / "file"
    path.write_bytes(content)
    random = np.random.default_rng(1)
    lengths = [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, MOST_BYTES, MOST_BYTES + 7, 2 * MOST_BYTES + 9]
    with piped(path) as (file, parent):
        for _ in range(60):
            begin, length = int(random.integers(0, len(content) + 10)), int(random.choice(lengths))
            target = bytearray(length)
            file.seek(begin)
            assert file.readinto(target) == len(content[begin : begin + length])
            assert target[: len(content[begin : begin + length])] == content[begin : begin + length]
        assert file.at(0, len(content)) == content
        asked = parent.frames
        assert file.at(0, len(content)) == content
        assert parent.frames == asked, "all of it was read before"


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as sparse:
        sparse.truncate(300 << 20)
    with piped(path) as (file, _):
        file.fetch((begin << 20, 1 << 20) for begin in range(300))
        file.at(0, 300 << 20)
        assert file._pipe._held == sum(map(len, file._pipe._blocks.values())) <= 64 << 20


def write_interleaved(path: Path, **options: Any) -> None:
    """Two arrays whose chunks alternate with the nodes of their indices, and many groups."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w", **options) as file:
        grows = (None, 4096) if options["libver"] == "latest" else None
        arrays = [file.create_dataset(name, (3000, 4096), "u1", chunks=(1, 4096), maxshape=grows) for name in "ab"]
        for begin in range(0, 3000, 500):
            for array in arrays:
                array[begin : begin + 500] = random.integers(0, 256, (500, 4096), dtype=np.uint8)
        for number in range(300):
            file[f"group/array {number}"] = random.integers(0, 256, 20_000, dtype=np.uint8)


@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize("user_block", [0, 512])
def test_indices_are_read_level_by_level(tmp_path: Path, user_block: int, version: str) -> None:
    """Not node by node, of which the chunks have more than a hundred; wherever HDF5 begins in the file."""
    path = tmp_path / "file.h5"
    write_interleaved(path, libver=version, userblock_size=user_block)
    places: dict[str, list[int]] = {}
    frames = {}
    for levels in (0, 1, 8):
        with piped(path, levels) as (file, parent), h5py.File(file, "r") as opened:
            for name in "ab":
                found: list[int] = []
                opened[name].id.chunk_iter(lambda chunk, found=found: found.append(chunk.byte_offset))
                assert len(found) == 3000 and places.setdefault(name, found) == found
            sizes = {opened["group"][name].shape for name in opened["group"]}
            assert sizes == {(20_000,)}
            frames[levels] = parent.frames
            if levels == 8:
                assert parent.nbytes < path.stat().st_size / 2
    assert frames[8] < 35 and frames[8] <= frames[1] < frames[0] / 2, frames


@pytest.mark.parametrize("kind", ["again", "overlapping", "back", "heap", "beyond"])
def test_crafted_indices_take_little(tmp_path: Path, kind: str) -> None:
    """Nodes may lead to each other, to one place many times, to all of the file, or out of it."""
    nbytes = 1 << 20
    addresses = {
        "again": [nbytes] * 65_000,
        "overlapping": [nbytes + number for number in range(65_000)],
        "back": [number % 8 * nbytes for number in range(65_000)],
        "beyond": [2**64 - 1 - number for number in range(65_000)],
    }.get(kind, [])
    node = b"TREE" + struct.pack("<BBH16x", 0, 1, 65_000)
    node += b"".join(struct.pack("<QQ", 0, address) for address in addresses)
    if kind == "heap":
        node = b"HEAP" + struct.pack("<4xQQQ", 1 << 40, 0, 0)
    path = tmp_path / "file"
    path.write_bytes(node.ljust(nbytes, b"\0")[:nbytes] * 8)
    with path.open("r+b") as file:
        file.truncate((1 << 40) + nbytes)
    with piped(path, levels=8) as (piped_file, parent):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        target = bytearray(nbytes)
        assert piped_file.readinto(target) == nbytes and target == path.open("rb").read(nbytes)
        assert parent.nbytes <= 128 << 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def write_lists(path: Path, **options: Any) -> None:
    """Lists and text of different lengths, with images between them."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w", **options) as file:
        plain = file.create_dataset("plain", (400,), h5py.vlen_dtype("u1"))
        packed = file.create_dataset("packed", (400,), h5py.string_dtype(), chunks=(16,), compression="gzip")
        wide = file.create_dataset("wide", (400, 100_000), "u1", chunks=(1, 100_000), shuffle=True)
        for row in range(400):
            plain[row] = random.integers(0, 256, random.integers(0, 30_000), dtype=np.uint8)
            packed[row] = "x" * int(random.integers(1, 9_000))
            wide[row] = random.integers(0, 256, 100_000, dtype=np.uint8)


@pytest.mark.parametrize("user_block", [0, 2048])
def test_what_rows_need_is_read_together(tmp_path: Path, user_block: int) -> None:
    """Chunks, and the places in the global heap that lists and text are in."""
    path = tmp_path / "file.h5"
    write_lists(path, userblock_size=user_block)
    rows = np.random.default_rng(2).permutation(400)[:40]
    with h5py.File(path) as file:
        truth = {name: [file[name][row] for row in rows.tolist()] for name in file}
    for name, expected in truth.items():
        frames = []
        for is_ahead in (False, True):
            with piped(path) as (file, parent), h5py.File(file, "r", rdcc_nbytes=0) as opened:
                array = opened[name]
                if is_ahead:
                    read_ahead(file, array, rows)
                for row, right in zip(rows.tolist(), expected, strict=True):
                    np.testing.assert_array_equal(array[row], right)
                frames.append(parent.frames)
        assert frames[1] < 15 and frames[1] < frames[0] / 2, (name, frames)


@pytest.mark.parametrize(
    "asked",
    [
        b"",
        b"x",
        RUN.pack(1, 0, 1),
        RUN.pack(0, 0, 0),
        RUN.pack(0, 3, 1),
        RUN.pack(0, 0, 4),
        RUN.pack(0, 0, MOST_BYTES // BLOCK_BYTES + 1),
        RUN.pack(0, 0, 2**32 - 1) * 2,
    ],
)
def test_a_child_gets_only_what_is_there(tmp_path: Path, asked: bytes) -> None:
    """libhdf5 may have corrupted its memory."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * BLOCK_BYTES + 1))
    source = LocalFile(OpenFiles(1), str(path), Identity.of(path.stat()))
    source.remote_bytes = path.stat().st_size
    assert len(piping._blocks([source], memoryview(RUN.pack(0, 1, 2)))) == LENGTH.size + BLOCK_BYTES + 1
    with pytest.raises(EOFError):
        piping._blocks([source], memoryview(asked))
    source.remote_bytes = None
    with pytest.raises(EOFError):
        piping._blocks([source], memoryview(RUN.pack(0, 1, 2)))
