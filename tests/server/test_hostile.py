"""No file can bring the server down: crafted and damaged ones are listed with a reason, and good ones go on."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h5py
import httpx
import numpy as np
import psutil
import pytest
import safetensors.numpy
from h5feed.stored.layout import ArrayLayout, ChunkTable, FileLayout, dump_layout, load_layout
from h5feed_server.serve.supervisor import STOP_SECONDS

from tests.support.server_process import ServerProcess
from tests.support.slow_file import write_slow
from tests.support.waiting import PatientTransport, wait_until

GOOD = np.arange(600, dtype=np.int32).reshape(100, 6)
SECRET = 7_777_777


WORKER_BYTES = 5 << 30
"""Address space of a worker in these tests: what would take all memory of a machine fails instead."""

TOO_MUCH_BYTES = 900 << 20
"""What a worker must not grow to: body buffers of 256 MiB, and a chunk and its scratch beside them."""


_FIRST_ASKS = 8
"""Requests until all workers have answered."""


def write_good(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=GOOD, chunks=(8, 6), compression="gzip")
        file["y"] = np.arange(100) % 3


class Watched:
    """A server over `folder`, of which the good dataset is asked for all the time."""

    def __init__(self, folder: Path, cache: Path, *options: str, good: str, **environment: str) -> None:
        self.process = ServerProcess(folder, cache, *options, **environment)
        self.http = httpx.Client(base_url=self.process.url, timeout=60, transport=PatientTransport())
        self._good = good
        self._pids = self.process.worker_pids()
        for pid in self._pids:
            resource.prlimit(pid, resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
        self.asked = 0
        self._failures: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        """Each row is to be what it is, whoever else is served."""
        while not self._ended.wait(0.05):
            try:
                # A connection each, so that all workers are asked. Each has to look at the good one once, too.
                transport = PatientTransport() if self.asked < _FIRST_ASKS else None
                with httpx.Client(base_url=self.process.url, timeout=60, transport=transport) as client:
                    answer = client.get(
                        f"/v1/datasets/{self._good}/rows",
                        params={"start": self.asked % 90, "stop": self.asked % 90 + 9},
                    )
                    expected = GOOD[self.asked % 90 :][:9].tobytes()
                    if answer.status_code != 200 or expected not in answer.content:
                        self._failures.append(f"{answer.status_code} {answer.content[:300]!r}")
                self.asked += 1
            except httpx.HTTPError as error:
                self._failures.append(repr(error))

    def check(self) -> None:
        """Nothing has happened to the workers, nor to the good dataset."""
        assert not self._failures, self._failures[:3]
        assert self.process.worker_pids() == self._pids
        peak = max(_peak_bytes(pid) for pid in self._pids)
        assert peak < TOO_MUCH_BYTES, f"a worker took {peak >> 20} MiB"

    def stop_asking(self) -> None:
        wait_until(lambda: self.asked > 3)
        self._ended.set()
        self._thread.join()
        self.check()

    def close(self) -> None:
        """Stop the server, unless it has been."""
        try:
            if not self._ended.is_set():
                self.stop_asking()
        finally:
            self._ended.set()
            self.http.close()
            assert self.process.stop() == 0

    def listing(self) -> list[dict[str, Any]]:
        """The whole catalogue, once everything is inspected."""
        found: list[dict[str, Any]] = []

        def is_ready() -> bool:
            found.clear()
            while True:
                page = self.http.get("/v1/datasets", params={"limit": 1000, "offset": len(found)})
                assert page.status_code == 200, page.text
                found.extend(page.json()["datasets"])
                if len(found) >= page.json()["total"]:
                    return not any(entry["status"] == "preparing" for entry in found)

        wait_until(is_ready, 120)
        return found

    def entry(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.listing() if entry["name"] == name)

    def whole(self, name: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/datasets/{quote(name, safe='')}")
        assert answer.status_code == 200, answer.text
        whole: dict[str, Any] = answer.json()
        return whole

    def rows(self, name: str, *fields: str, rows: tuple[int, ...] = (0,)) -> httpx.Response:
        """Rows of fields: they, or an error that says what is wrong and is not the server's own."""
        return self.get(f"{quote(name, safe='')}/rows", {"rows": rows, "fields": fields})

    def get(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        url = f"/v1/datasets/{path}"
        deadline = time.monotonic() + 60
        while True:
            answer = self.http.get(url) if body is None else self.http.post(url, json=body)
            if answer.status_code != 202 or time.monotonic() > deadline:
                break
            # A job computes it, where the machine is slow.
            time.sleep(0.1)
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/problem+json", answer.text
            assert answer.json()["code"] != "internal_error" and answer.json()["detail"], answer.text
            assert "/tmp" not in answer.text and "Traceback" not in answer.text
        return answer


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


# Crafted files -------------------------------------------------------------------------------------------------------


def _damaged_type(path: Path) -> None:
    """Records that claim 128 MiB each: libhdf5 crashes when it is asked for their fill value."""
    kind = np.dtype([("a", "<i4"), ("b", "<f8", (3,)), ("c", "S5")])
    with h5py.File(path, "w") as file:
        file.create_dataset("records", (5,), kind, fillvalue=np.zeros((), kind))
    _replace(path, struct.pack("<I2s", kind.itemsize, b"a\0"), struct.pack("<I2s", 1 << 27 | kind.itemsize, b"a\0"))


def _damaged_fill(path: Path) -> None:
    """A fill value that claims 2 GiB: libhdf5 crashes when it is asked for it."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (5,), "<i4", fillvalue=0x71727374)
    _replace(path, struct.pack("<II", 4, 0x71727374), struct.pack("<II", 1 << 31 | 4, 0x71727374))


def _virtual_of_itself(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        layout = h5py.VirtualLayout((4,), "i4", maxshape=(None,))
        source = h5py.VirtualSource(".", "v", (4,), maxshape=(None,))
        layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
        file.create_virtual_dataset("v", layout)


def _region_references(path: Path) -> None:
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", data=np.arange(10))
        values = np.empty(3, object)
        for number in range(3):
            values[number] = np.array([x.regionref[0:2], x.regionref[3:4]], dtype=h5py.regionref_dtype)
        for number in range(20):
            x.attrs.create(f"regions{number}", values, dtype=h5py.vlen_dtype(h5py.regionref_dtype))


def _loops(path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("a/b")
        group["x"] = np.arange(5)
        group["root"], group["itself"], group["ancestor"] = file["/"], group, h5py.SoftLink("/a")
        file["again"] = h5py.SoftLink("/again")
        file["there"], file["back"] = h5py.SoftLink("/back"), h5py.SoftLink("/there")


def _deep(path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(20_000):
            group = group.create_group("g")
        group["x"] = np.arange(3)


def _external_storage(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (100,), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def _external_links(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.mkdir()
    with h5py.File(outside / "secret.h5", "w") as file:
        file["x"] = np.full(50, SECRET)
    os.mkfifo(outside / "pipe.h5")
    with h5py.File(path, "w") as file:
        file["out"] = h5py.ExternalLink(str(outside / "secret.h5"), "/x")
        file["root"] = h5py.ExternalLink(str(outside / "secret.h5"), "/")
        file["through"], file["beyond"] = h5py.SoftLink("/out"), h5py.SoftLink("/root/x")
        file["pipe"] = h5py.ExternalLink(str(outside / "pipe.h5"), "/x")
        file["into_pipe"] = h5py.SoftLink("/pipe")
        layout = h5py.VirtualLayout((50,), "i8")
        layout[:] = h5py.VirtualSource(str(outside / "secret.h5"), "x", (50,))
        file.create_virtual_dataset("virtual", layout)


def _zeros_gzipped(nbytes: int) -> bytes:
    """A zlib stream of zeros: blocks of 16 MiB that are all alike, because each begins anew."""
    packer = zlib.compressobj(9)
    packer.compress(b"")
    zlib_head = 2
    block = packer.compress(bytes(16 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    head, block = block[:zlib_head], block[zlib_head:]
    checksum = (nbytes % 65521) << 16 | 1
    return head + block * (nbytes >> 24) + b"\x03\0" + struct.pack(">I", checksum)


def _bomb(path: Path, chunk: int, nbytes: int) -> None:
    """A chunk that was compressed twice: a few KB that decode to `nbytes`."""
    stored = zlib.compress(_zeros_gzipped(nbytes), 9)
    assert len(stored) < 32 << 10
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((chunk,))
    properties.set_deflate(9)
    properties.set_filter(h5py.h5z.FILTER_DEFLATE, 0, (9,))
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((chunk,))
        dataset = h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, space, properties)
        dataset.write_direct_chunk((0,), stored)


def _exabytes(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (1 << 40, 1 << 20), "u1", chunks=(1, 1 << 20), fillvalue=3)
        file.create_dataset("y", (1 << 40,), "i4", chunks=(1 << 20,))
        file.create_dataset("whole", (1 << 40, 4), "i2")
        file.create_dataset("beyond", (1 << 60, 16), "f8", chunks=(1000, 16))
        file.create_dataset("hidden", (1 << 60, 0), "f8", maxshape=(1 << 60, 2), chunks=(1000, 1))


def _huge_row(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (4, 10 << 30), "u1")


def _huge_plain_chunk(path: Path) -> None:
    """Chunks of nearly 4 GiB, which hold parts of rows, not compressed; the file is sparse."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((31, (1 << 27) - 1))
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w") as file:
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, h5py.h5s.create_simple((31, 1 << 27)), properties)


def _tiny_chunks(path: Path) -> None:
    """Chunks of one byte, never written: a row is a hundred million of them."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (4, 10_000, 10_000), "u1", chunks=(1, 1, 1))


def _dust(path: Path) -> None:
    """A chunk for every byte of 40 million rows."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (40_000_000,), "u1", chunks=(1,))


def _big_records(path: Path) -> None:
    """A member of one byte in records of 32 KiB, never written."""
    with h5py.File(path, "w") as file:
        kind = np.dtype({"names": ["a"], "formats": ["u1"], "offsets": [0], "itemsize": 32 << 10})
        file.create_dataset("records", (1_000_000,), kind, chunks=(1000,))


def _packed_records(path: Path) -> None:
    """A table of compressed records, never written."""
    with h5py.File(path, "w") as file:
        kind = np.dtype({"names": ["a"], "formats": ["u1"], "offsets": [0], "itemsize": 32 << 10})
        file.create_dataset("records", (1_000_000,), kind, chunks=(1000,), compression="gzip")


def _no_width(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (1 << 55, 0), "u1", maxshape=(1 << 55, 2), chunks=(1000, 1))


def _same_heap_object(path: Path) -> None:
    """3000 strings of an attribute that all are one of 4 MB: 12 GB to read, 4 MB to store."""
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(4)
        file.attrs.create("s", ["a" * 4_000_000] + ["bcde"] * 2999, dtype=h5py.string_dtype())
    content = path.read_bytes()
    begin = content.index(struct.pack("<I", 4_000_000))
    element = content[begin : begin + 16]
    path.write_bytes(content[:begin] + element * 3000 + content[begin + 48_000 :])


def _forged_lengths(path: Path) -> None:
    """Strings that claim nearly 4 GiB each, in an attribute and in a list that may be names of classes."""
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(4)
        file["list_classes"] = np.array(["q" * 101] * 4, dtype=object)
        file.attrs.create("s", ["q" * 101] * 4, dtype=h5py.string_dtype())
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 101), struct.pack("<I", 0xFFFFFFF0)))


def _forged_heap(path: Path) -> None:
    """A global heap that claims to be 1 TiB."""
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(4)
        file["list_classes"] = np.array(["cat", "dog"], dtype=object)
    _replace(path, b"GCOL\x01\0\0\0" + struct.pack("<Q", 4096), b"GCOL\x01\0\0\0" + struct.pack("<Q", 1 << 40))


def _names_in_file(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name in ('quo"te', "new\nline", "bell\x07\x1f\x7f", "é\u2028", "__metadata__", "a,b", "..", "n" * 2000):
            file[name] = np.arange(3)
        file[b"latin\xe9"] = np.arange(3)
        h5py.h5g.create(file.id, b"\xff\xfe")
        file.attrs.create("text", b"s\xff", dtype=h5py.string_dtype())
        file.attrs.create("lone", b"\xed\xa0\x80", dtype=h5py.string_dtype())
        file.attrs["nan"] = np.nan


def _replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) >= 1, f"{path.name} is not laid out as expected"
    path.write_bytes(content.replace(old, new))


OPTIONS = {"H5FEED_INSPECT_TIMEOUT": "5", "H5FEED_DIGEST_LIMIT": str(64 << 20), "H5FEED_READ_TIMEOUT": "20"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Files that libhdf5 chokes on, or that would have it read what is none of theirs."""
    base = tmp_path_factory.mktemp("hostile")
    folder = base / "data"
    folder.mkdir()
    write_good(folder / "a_good.h5")
    for write in (
        _damaged_type,
        _damaged_fill,
        _virtual_of_itself,
        _loops,
        _deep,
        _external_storage,
        _external_links,
        _same_heap_object,
        _forged_lengths,
        _forged_heap,
        _names_in_file,
        write_slow,
    ):
        write(folder / f"{write.__name__.strip('_').removeprefix('write_')}.h5")
    for number in range(8):
        _region_references(folder / f"region_references_{'abcdefgh'[number]}.h5")
    (folder / "empty.h5").touch()
    (folder / "truncated.h5").write_bytes((folder / "a_good.h5").read_bytes()[:-100])
    os.mkfifo(folder / "pipe.h5")
    (folder / "device.h5").symlink_to("/dev/zero")
    write_good(folder / "zz_good.h5")
    watched = Watched(folder, base / "cache", "--workers", "2", good="a_good", **OPTIONS)
    yield watched
    watched.close()


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Files of a few KB whose arrays would take all memory or time."""
    base = tmp_path_factory.mktemp("greedy")
    folder = base / "data"
    folder.mkdir()
    write_good(folder / "a_good.h5")
    for write in (
        _exabytes,
        _huge_row,
        _huge_plain_chunk,
        _tiny_chunks,
        _dust,
        _big_records,
        _packed_records,
        _no_width,
    ):
        write(folder / f"{write.__name__.strip('_')}.h5")
    _bomb(folder / "bomb_claimed.h5", 3 << 30, 3 << 30)
    _bomb(folder / "bomb_hidden.h5", 1000, 3 << 30)
    watched = Watched(folder, base / "cache", "--workers", "2", good="a_good", **OPTIONS)
    yield watched
    watched.close()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("damaged_type", "records have 134217761 bytes"),
        ("damaged_fill", "fill-value"),
        ("virtual_of_itself", "virtual"),
        ("deep", "more than 32 deep"),
        ("external_storage", "outside the data folder"),
        ("external_links", "outside the data folder"),
        ("forged_heap", "cannot be opened|cannot read it|crashed|memory"),
        ("empty", "not an HDF5 file"),
        ("truncated", "truncated"),
        ("pipe", "not a regular file"),
        ("device", "leads out of the data folder"),
        ("slow", "took more than 5 s"),
    ],
)
def test_it_is_one_unreadable_entry(hostile: Watched, name: str, word: str) -> None:
    """A file that nothing can be read of is one entry, with the reason; asking for it gives the same reason."""
    entry = hostile.entry(name)
    if entry["status"] == "unreadable":
        assert re.search(word, entry["reason"])
        answer = hostile.get(name)
        assert (answer.status_code, answer.json()["code"]) == (422, "unreadable")
    else:
        damaged = [field for field in entry["fields"] if not field["readable"]]
        assert any(re.search(word, field["reason"]) for field in damaged)
    hostile.check()


def test_external_data_is_never_served(hostile: Watched) -> None:
    """Neither /etc/passwd as raw storage nor another HDF5 file by a link leaves the server."""
    secret = np.full(2, SECRET).tobytes()
    for name, field in [("external_storage", "x"), *(("external_links", f) for f in ("out", "through", "beyond", "x"))]:
        answer = hostile.rows(name, field)
        assert answer.status_code in (404, 422)
        assert b"root:x:" not in answer.content and secret not in answer.content
    hostile.check()


def test_references_in_attributes(hostile: Watched) -> None:
    """Many files of region references, one after the other: named, not read."""
    for number in range(8):
        (field,) = hostile.whole(f"region_references_{'abcdefgh'[number]}")["fields"]
        assert all("not shown" in value for value in field["attributes"].values()) and len(field["attributes"]) == 20
        assert hostile.rows(f"region_references_{'abcdefgh'[number]}", "x", rows=(9, 0)).status_code == 200
    hostile.check()


def test_loops(hostile: Watched) -> None:
    """Each array is listed once, however many ways lead to it."""
    entry = hostile.entry("loops")
    assert sorted(field["name"] for field in entry["fields"] if field["readable"]) in (["x"], ["a.b.x"])
    reasons = [field["reason"] for field in entry["fields"] if not field["readable"]]
    assert len(reasons) == 3 and all("broken link" in reason for reason in reasons)


def test_gzip_bombs(greedy: Watched) -> None:
    """A chunk that claims 3 GiB is refused unread; one that decodes to more than it claims is corrupt."""
    answer = greedy.rows("bomb_claimed", "x")
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    answer = greedy.rows("bomb_hidden", "x")
    assert (answer.status_code, answer.json()["code"]) == (500, "dataset_corrupt")
    greedy.check()


def test_exabytes(greedy: Watched) -> None:
    """Rows of arrays as large as numbers go are what was never written; what takes them whole is refused."""
    fields = {field["name"]: field for field in greedy.whole("exabytes")["fields"]}
    assert "is larger than an array can be" in fields["beyond"]["reason"]
    assert "is larger than an array can be" in fields["hidden"]["reason"]
    last = (1 << 40) - 1
    answer = greedy.rows("exabytes", "x", "y", "whole", rows=(last, 0))
    assert answer.status_code == 200 and answer.content.count(b"\3" * (1 << 20)) == 2
    for path in ("plan?batch_size=4&shuffle=true", "batches/123456789?batch_size=4&shuffle=true&fields=y"):
        assert greedy.get(f"exabytes/{path}").status_code == 200
    for path in (
        "rows?fields=y",
        "splits?test=0.2",
        "splits/all/rows",
        "splits/train/rows?val=5",
        "batches/0?val=4&split=val",
    ):
        answer = greedy.get(f"exabytes/{path}")
        assert answer.status_code in (413, 422), (path, answer.text)
    greedy.check()


def test_a_row_of_10_gib(greedy: Watched) -> None:
    """It is refused before a byte is read."""
    for answer in (greedy.rows("huge_row", "x"), greedy.get("huge_row/batches/0?batch_size=1")):
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    greedy.check()


@pytest.mark.parametrize(
    "name", ["huge_plain_chunk", "tiny_chunks", "dust", "big_records", "packed_records", "no_width"]
)
def test_layouts_that_would_take_all_memory(greedy: Watched, name: str) -> None:
    """Rows of such an array come, or are refused, in bounded time and memory."""
    entry = greedy.entry(name)
    fields = [field["name"] for field in entry["fields"] if field["readable"]]
    for rows in ((0,), (3, 1, 2)):
        for field in fields:
            assert greedy.rows(name, field, rows=rows).status_code in (200, 413, 422)
    for path in ("plan?batch_size=2", "batches/0?batch_size=2", "splits?test=0.2"):
        greedy.get(f"{name}/{path}")
    greedy.check()


def test_many_small_reads_at_once(greedy: Watched) -> None:
    """A batch of one million chunks is refused, or read in bounded memory."""
    for path in ("dust/batches/0?batch_size=1000000", "big_records/batches/0?batch_size=1000000"):
        greedy.get(path)
    greedy.check()


@pytest.mark.parametrize("name", ["same_heap_object", "forged_lengths", "forged_heap"])
def test_damage_beside_the_data(hostile: Watched, name: str) -> None:
    """Heaps that lie about their size cost what they describe, or the file, and nothing else."""
    entry = hostile.entry(name)
    if entry["status"] == "unreadable":
        assert entry["reason"]
    else:
        for field in entry["fields"]:
            assert field["readable"] or field["reason"]
            hostile.rows(name, field["name"])
    hostile.check()


def test_names_in_a_file_that_are_no_text(hostile: Watched) -> None:
    """Whatever an array or an attribute is called, metadata are JSON, and its rows come under its name."""
    whole = hostile.whole("names_in_file")
    assert whole["attributes"] == {"text": "s\ufffd", "lone": "\ufffd\ufffd\ufffd", "nan": "nan"}
    assert any("cannot be followed" in note for note in whole["notes"])
    answers = {field["name"]: hostile.rows("names_in_file", field["name"]) for field in whole["fields"]}
    assert {'quo"te', "new\nline", "bell\x07\x1f\x7f", "é\u2028", "a,b", "latin\ufffd"} <= set(answers)
    for name, answer in answers.items():
        if "\ufffd" in name:
            assert answer.status_code == 422 and "not UTF-8" in answer.json()["detail"]
        elif name == "__metadata__":
            # What safetensors keeps for itself.
            assert answer.status_code in (400, 422)
        else:
            assert answer.status_code == 200, (name, answer.text)
            assert set(safetensors.numpy.load(answer.content)) == {name, "__rows__"}
    hostile.check()


def test_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    """Whatever a file is called, the catalogue is JSON and the dataset can be asked for."""
    folder = tmp_path / "data"
    folder.mkdir()
    for raw in (b"a_good.h5", b"bad\xff.h5", b'quo"te.h5', b"new\nline.h5", b"bell\x07.h5", "é\u2028%2F?#.h5".encode()):
        write_good(Path(os.fsdecode(os.fsencode(folder) + b"/" + raw)))
    (folder / os.fsdecode(b"broken\xff.h5")).write_bytes(b"this is no HDF5 file")
    watched = Watched(folder, tmp_path / "cache", good="a_good")
    try:
        entries = {entry["name"]: entry for entry in watched.listing()}
        assert entries["broken\ufffd"]["status"] == "unreadable"
        for name in ("bad\ufffd", 'quo"te', "new\nline", "bell\x07", "é\u2028%2F?#"):
            assert watched.whole(name)["rows"] == len(GOOD)
            assert GOOD[:1].tobytes() in watched.rows(name, "x").content
    finally:
        watched.close()


def test_others_are_served_afterwards(hostile: Watched) -> None:
    """The last file in the folder is inspected behind all of these, and everything is listed with a reason."""
    assert GOOD[5:6].tobytes() in hostile.rows("zz_good", "x", rows=(5,)).content
    for entry in hostile.listing():
        assert entry["status"] in ("ok", "unreadable")
        assert entry["status"] == "ok" or entry["reason"]
        for text in (entry["reason"], *(field["reason"] for field in entry["fields"])):
            assert "/tmp" not in (text or "") and "Too many open files" not in (text or "")
    assert hostile.http.get("/openapi.json").status_code == 200
    hostile.check()


def test_no_inspector_is_left(hostile: Watched) -> None:
    """When all is inspected, the children are gone."""
    hostile.listing()
    workers = [psutil.Process(pid) for pid in hostile.process.worker_pids()]
    wait_until(lambda: not any(worker.children(recursive=True) for worker in workers), 120)


LOOKS = {
    "tree": ("/v1/datasets/{name}/tree", {"file": "{name}.h5", "depth": "16", "limit": "1000"}),
    "meta": ("/h5grove/meta", {"file": "{name}.h5", "path": "{path}"}),
    "attr": ("/h5grove/attr", {"file": "{name}.h5", "path": "{path}"}),
    "paths": ("/h5grove/paths", {"file": "{name}.h5"}),
    "data": ("/h5grove/data", {"file": "{name}.h5", "path": "{path}", "format": "bin", "selection": "0"}),
    "stats": ("/h5grove/stats", {"file": "{name}.h5", "path": "{path}"}),
}
"""Requests that list the objects of a file or read their values."""


def _look_into(watched: Watched, names: Sequence[str]) -> None:
    """Send all requests for each file. A damaged file gives an error with a reason, and affects no other request."""
    watched.listing()
    for name in names:
        for path in ("/", "/x", "/v", "/records", "/list_classes", "/out", "/virtual", "/whole"):
            for url, query in LOOKS.values():
                if "{path}" not in str(query) and path != "/":
                    continue
                filled = {key: value.format(name=name, path=path) for key, value in query.items()}
                answer = watched.http.get(url.format(name=name), params=filled)
                assert answer.status_code in (200, 404, 413, 422, 504), (filled, answer.text)
                assert b"root:x:" not in answer.content and np.full(2, SECRET).tobytes() not in answer.content
                if answer.status_code != 200:
                    assert answer.json()["detail"] and answer.json()["code"] != "internal_error", answer.text
                    assert "/tmp" not in answer.text and "Traceback" not in answer.text
    watched.check()


def test_looking_into_files_that_choke_libhdf5(hostile: Watched) -> None:
    """Crafted and damaged files."""
    names = ("damaged_type", "damaged_fill", "virtual_of_itself", "loops", "deep", "external_storage", "external_links")
    _look_into(hostile, (*names, "region_references_a", "names_in_file", "empty", "truncated", "pipe", "device"))


def test_looking_into_files_that_lie(hostile: Watched) -> None:
    """Forged heaps and lengths."""
    _look_into(hostile, ("same_heap_object", "forged_lengths", "forged_heap"))


def test_looking_into_files_that_would_take_all(greedy: Watched) -> None:
    """Arrays as large as numbers go, and chunks that decode to gigabytes."""
    names = ("exabytes", "huge_row", "huge_plain_chunk", "tiny_chunks", "dust", "big_records", "packed_records")
    _look_into(greedy, (*names, "no_width", "bomb_claimed", "bomb_hidden"))


def _slow_one(watched: Watched) -> psutil.Process:
    """The process that inspects the slow file."""
    worker = psutil.Process(watched.process.worker_pids()[0])
    found: list[psutil.Process] = []

    def is_at_work() -> bool:
        # Processes come and go while they are looked at.
        with contextlib.suppress(psutil.Error):
            forks = [fork for child in worker.children() for fork in child.children()]
            found[:] = [fork for fork in forks if any("slow" in file.path for file in fork.open_files())]
        return bool(found)

    wait_until(is_at_work)
    return found[0]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Watched]:
    """A server with a file whose inspection takes seconds."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_good(folder / "a_good.h5")
    write_slow(folder / "slow.h5")
    watched = Watched(folder, tmp_path / "cache", good="a_good", H5FEED_INSPECT_TIMEOUT="30")
    yield watched
    watched.close()


def test_a_crash_of_libhdf5(slow: Watched) -> None:
    """A signal that ends the inspection of a file makes it unreadable, with the name of the signal."""
    _slow_one(slow).send_signal(signal.SIGSEGV)
    wait_until(lambda: slow.entry("slow")["status"] == "unreadable")
    assert "crashed libhdf5 (SIGSEGV)" in slow.entry("slow")["reason"]
    write_good(slow.process.folder / "later.h5")
    wait_until(lambda: any((entry["name"], entry["status"]) == ("later", "ok") for entry in slow.listing()))
    slow.check()


def test_the_death_of_an_inspector(slow: Watched) -> None:
    """Inspectors that something else has killed are replaced: the file is inspected again."""
    parent = _slow_one(slow).parent()
    assert parent is not None
    os.killpg(parent.pid, signal.SIGKILL)
    again: list[psutil.Process] = []

    def is_begun_anew() -> bool:
        # The killed ones may be there for a moment still.
        with contextlib.suppress(psutil.Error):
            again[:] = [_slow_one(slow)]
            return again[0].parent() not in (None, parent)
        return False

    wait_until(is_begun_anew)
    again[0].send_signal(signal.SIGABRT)
    wait_until(lambda: slow.entry("slow")["status"] == "unreadable")
    assert "SIGABRT" in slow.entry("slow")["reason"]


def test_a_stop_while_a_file_is_inspected(slow: Watched) -> None:
    """The server ends at once, and what inspects for it ends too."""
    fork = _slow_one(slow)
    parent = fork.parent()
    assert parent is not None
    slow.stop_asking()
    began = time.monotonic()
    assert slow.process.stop() == 0
    # Workers that do not end by themselves are killed then.
    assert time.monotonic() - began < STOP_SECONDS
    wait_until(lambda: not fork.is_running() and not parent.is_running())


# Damaged files -------------------------------------------------------------------------------------------------------


def _contiguous(file: h5py.File) -> None:
    values = np.arange(120)
    file["images"], file["labels"] = values.astype("u1").reshape(10, 4, 3), values[:10]
    file["swapped"] = values[:20].reshape(10, 2).astype(">f4")
    file.create_dataset("unwritten", (10, 3), "<f8", fillvalue=2.5)


def _chunked(file: h5py.File) -> None:
    values = np.arange(240, dtype="<i2").reshape(20, 12)
    file.create_dataset("x", data=values, chunks=(6, 5), compression="gzip", shuffle=True)
    file.create_dataset("y", data=values[:, 0], chunks=(7,), maxshape=(None,), fletcher32=True)
    file.create_dataset("z", data=values.astype("f4"), chunks=(8, 12), scaleoffset=2, compression="lzf")


def _compound(file: h5py.File) -> None:
    kind = np.dtype([("a", "<i4"), ("b", "<f8", (3,)), ("c", "S5"), ("d", "<c8"), ("e", [("f", "u1")])])
    file.create_dataset("table", data=np.zeros(12, kind), chunks=(5,), compression="gzip", fillvalue=np.zeros((), kind))
    file.create_dataset("plain", data=np.ones(12, kind))


def _strings(file: h5py.File) -> None:
    file["fixed"] = np.array([b"one", b"three"] * 4)
    file["names"] = np.array(["cat", "dog"] * 4, dtype=object)
    file["labels"] = np.arange(8) % 2
    file.create_dataset("colour", data=np.arange(8) % 2, dtype=h5py.enum_dtype({"RED": 0, "GREEN": 1}, basetype="i1"))
    ragged = file.create_dataset("ragged", (8,), h5py.vlen_dtype("i4"))
    ragged[0] = np.arange(3)


def _described(file: h5py.File) -> None:
    file["x"] = np.arange(24.0).reshape(6, 4)
    for where in (file, file["x"]):
        where.attrs["class_names"] = ["cat", "dog", "bird"]
        where.attrs["number"], where.attrs["flags"] = 3.5, np.arange(5)
        where.attrs["text"], where.attrs["reference"] = np.bytes_("fixed"), file["x"].ref
        where.attrs["kind"] = np.zeros(2, [("a", "i4"), ("b", "S3")])


def _grouped(file: h5py.File) -> None:
    for split, rows in (("train", 9), ("test", 4)):
        group = file.create_group(split)
        group["data"], group["target"] = np.arange(rows * 3.0).reshape(rows, 3), np.arange(rows)
    file["deep/er/still"] = np.arange(5)
    file["soft"], file["outside"] = h5py.SoftLink("/train/data"), h5py.ExternalLink("other.h5", "/x")
    for number in range(12):
        file[f"many/g{number}"] = np.arange(2)


def _mutants(folder: Path, count: int, seed: int) -> None:
    """Valid files with bits flipped, bytes overwritten, or their end cut off."""
    chance = random.Random(seed)
    originals = []
    for write in (_contiguous, _chunked, _compound, _strings, _described, _grouped):
        for version in ("earliest", "latest"):
            path = folder / "original.h5"
            with h5py.File(path, "w", libver=version) as file:
                write(file)
            originals.append((f"{write.__name__}_{version}", path.read_bytes()))
            path.unlink()
    for number in range(count):
        name, content = originals[number % len(originals)]
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            where = chance.randrange(len(damaged))
            damaged[where] = chance.choice((damaged[where] ^ 1 << chance.randrange(8), 0, 0x7F, 0xFF))
        if chance.random() < 0.1:
            damaged = damaged[: chance.randrange(len(damaged))]
        (folder / f"m{number:04d}{name}.h5").write_bytes(damaged)


@pytest.mark.parametrize("count", [80, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path: Path, count: int) -> None:
    """Many damaged files beside a good one: each is listed as what it is, and answers with rows or an error."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_good(folder / "a_good.h5")
    _mutants(folder, count, seed=20240611)
    watched = Watched(folder, tmp_path / "cache", good="a_good", H5FEED_INSPECT_TIMEOUT="3", H5FEED_READ_TIMEOUT="10")
    try:
        statuses: dict[int, int] = {}
        entries = watched.listing()
        assert len({file for entry in entries for file in entry["files"]}) == count + 1
        for entry in entries:
            assert entry["status"] == "ok" or entry["reason"]
            if entry["status"] != "ok" or not entry["rows"]:
                continue
            assert watched.whole(entry["name"])["name"] == entry["name"]
            readable = [field["name"] for field in entry["fields"] if field["readable"]]
            assert all(field["readable"] or field["reason"] for field in entry["fields"])
            rows = (entry["rows"] - 1, 0)
            answers = [watched.rows(entry["name"], *readable, rows=rows)]
            if answers[0].status_code != 200:
                # One of them is damaged: which?
                answers = [watched.rows(entry["name"], field, rows=rows) for field in readable]
            answers.append(watched.get(f"{quote(entry['name'], safe='')}/batches/0?batch_size=3&shuffle=true"))
            for answer in answers:
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        # Most files survive a flipped bit or two, and some do not.
        assert statuses[200] > count // 4
        assert sum(entry["status"] == "unreadable" for entry in entries) > count // 20
    finally:
        watched.close()


# What the child says -------------------------------------------------------------------------------------------------


def _table(numbers: list[int], offsets: list[int], sizes: list[int]) -> ChunkTable:
    zeros = np.zeros(len(numbers), np.int64)
    return ChunkTable(np.array(numbers, np.int64), np.array(offsets, np.int64), np.array(sizes, np.int64), zeros)


PLAIN: dict[str, Any] = {"path": "x", "shape": (6, 4), "dtype": "<f4", "offset": 512, "fill": bytes(4)}
CHUNKED = PLAIN | {"offset": None, "chunk_shape": (2, 4), "chunks": _table([0, 2], [512, 544], [32, 32])}
MEMBER = PLAIN | {"record": (40, 24)}


@pytest.mark.parametrize("valid", [PLAIN, CHUNKED, MEMBER, PLAIN | {"offset": None}])
def test_a_layout_comes_back(valid: dict[str, Any]) -> None:
    """What is written is what is read."""
    (array,) = load_layout(dump_layout(FileLayout((ArrayLayout(**valid),), {"a": 1}))).arrays
    assert (array.shape, array.offset, array.record) == (valid["shape"], valid["offset"], valid.get("record"))
    if array.chunks is not None:
        assert array.chunks.find(np.arange(3)).tolist() == [0, -1, 1]


@pytest.mark.parametrize(
    "nonsense",
    [
        PLAIN | {"offset": -1},
        PLAIN | {"offset": 1 << 63},
        PLAIN | {"stored_bytes": -5},
        PLAIN | {"shape": (6, -4)},
        PLAIN | {"shape": (1 << 40, 1 << 40)},
        PLAIN | {"shape": (0, 1 << 40, 1 << 40)},
        PLAIN | {"shape": (True, 4)},
        PLAIN | {"shape": ()},
        PLAIN | {"dtype": "O"},
        PLAIN | {"dtype": "<f16"},
        PLAIN | {"dtype": "nonsense"},
        PLAIN | {"offset": None, "fill": b""},
        PLAIN | {"inline": bytes(96)},
        PLAIN | {"offset": None, "inline": bytes(95)},
        PLAIN | {"unreadable": "it is not"},
        PLAIN | {"path": ""},
        PLAIN | {"attributes": None},
        PLAIN | {"enum_names": {"a": 0.5}},
        MEMBER | {"record": (39, 24)},
        MEMBER | {"record": (40, -1)},
        MEMBER | {"record": (1 << 40, 24)},
        CHUNKED | {"chunk_shape": (0, 4)},
        CHUNKED | {"chunk_shape": (2, -4)},
        CHUNKED | {"chunk_shape": (8,)},
        CHUNKED | {"chunk_shape": None},
        CHUNKED | {"chunk_shape": (1 << 20, 1 << 20)},
        CHUNKED | {"shape": (6, 1 << 20), "chunk_shape": (1, 1)},
        CHUNKED | {"offset": 3},
        CHUNKED | {"chunks": _table([0, 3], [512, 544], [32, 32])},
        CHUNKED | {"chunks": _table([1, 1], [512, 544], [32, 32])},
        CHUNKED | {"chunks": _table([2, 0], [512, 544], [32, 32])},
        CHUNKED | {"chunks": _table([-1, 0], [512, 544], [32, 32])},
        CHUNKED | {"chunks": _table([0, 1], [-512, 544], [32, 32])},
        CHUNKED | {"chunks": _table([0, 1], [512, 1 << 62], [32, 32])},
        CHUNKED | {"chunks": _table([0, 1], [512, 544], [32, -32])},
        CHUNKED | {"chunks": _table([0, 1], [512, 544], [32])},
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(nonsense: dict[str, Any]) -> None:
    """The child that writes layouts has run libhdf5 on the file: nothing that it says is taken on trust."""
    with pytest.raises(ValueError, match=r"."):
        load_layout(dump_layout(FileLayout((ArrayLayout(**nonsense),), {})))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: data[:-8],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"data_offsets":[0', b'"data_offsets":[-', 1),
        lambda data: data.replace(b"arrays", b"ARRAYS"),
        lambda data: data.replace(b"null", b"true"),
    ],
)
def test_bytes_that_are_no_layout_are_refused(damage: Callable[[bytes], bytes]) -> None:
    """Whatever comes through the pipe or lies in the cache folder is a layout or an error."""
    data = dump_layout(FileLayout((ArrayLayout(**CHUNKED),), {}))
    with pytest.raises(ValueError, match=r"."):
        load_layout(damage(data))
