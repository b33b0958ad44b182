"""What no layout can describe, read by h5py in other processes: equal to h5py, confined, replaced when they die."""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import struct
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5feed
import h5py
import httpx
import ml_dtypes
import numpy as np
import psutil
import pytest
from h5feed.errors import RevisionChanged, TooLarge, Unreadable
from h5feed.stored.local_file import YOUNG_SECONDS
from sklearn.model_selection import train_test_split

from tests.support.object_store import SOURCES, served_from
from tests.support.server_process import ServerProcess
from tests.support.waiting import suspend, wait_until

ROWS = 300
A, B = np.arange(600).reshape(100, 6), np.arange(600).reshape(100, 6) + 1000


def _lists(folder: Path) -> None:
    random = np.random.default_rng(0)
    with h5py.File(folder / "lists.h5", "w") as file:
        images = file.create_dataset("images", (ROWS,), h5py.vlen_dtype(np.uint8), chunks=(16,), compression="gzip")
        angles = file.create_dataset("angles", (ROWS,), h5py.vlen_dtype("<f4"))
        for row in range(ROWS - 1):
            images[row] = random.integers(0, 256, random.integers(0, 3000), dtype=np.uint8)
            angles[row] = np.arange(row % 9)
        file.create_dataset(
            "caption", data=[f"näme {row}" * (row % 4) for row in range(ROWS)], dtype=h5py.string_dtype()
        )
        kinds = [("cat", "dog", "fish")[row % 3] for row in range(ROWS)]
        file.create_dataset("label", data=kinds, dtype=h5py.string_dtype("ascii"), compression="gzip")
        file["x"] = random.random((ROWS, 4))
        big = file.create_dataset("swapped", (ROWS,), h5py.vlen_dtype(">i4"))
        big[0] = np.arange(3)


def _parts(folder: Path) -> None:
    (folder / "parts").mkdir()
    for name, values in (("a", A), ("b", B)):
        with h5py.File(folder / "parts" / f"{name}.h5", "w") as file:
            file["x"], file["y"] = values, np.arange(100) % 3
    np.arange(60, dtype="<i4").tofile(folder / "parts" / "raw.bin")


def _virtual(folder: Path) -> None:
    with h5py.File(folder / "virtual.h5", "w") as file:
        whole = h5py.VirtualLayout((200, 6), "i8")
        whole[:100] = h5py.VirtualSource("parts/a.h5", "x", (100, 6))
        whole[100:] = h5py.VirtualSource("parts/b.h5", "x", (100, 6))
        file.create_virtual_dataset("x", whole)
        absolute = h5py.VirtualLayout((200, 6), "i8")
        absolute[100:] = h5py.VirtualSource(str(folder / "parts" / "b.h5"), "x", (100, 6))
        file.create_virtual_dataset("absolute", absolute)
        gaps = h5py.VirtualLayout((200, 3, 2), "f4")
        gaps[3:180:7, 1] = h5py.VirtualSource("parts/a.h5", "x", (100, 6))[10:36, 2:4]
        gaps[190] = h5py.VirtualSource(".", "own", (3, 2))
        file.create_virtual_dataset("gaps", gaps, fillvalue=-1.5)
        file["own"] = np.arange(6).reshape(3, 2)
        woven = h5py.VirtualLayout((200, 2), ">i8")
        woven[::2] = h5py.VirtualSource("parts/a.h5", "x", (100, 6))[:, 4:]
        woven[1::2] = h5py.VirtualSource("parts/b.h5", "x", (100, 6))[:, :2]
        file.create_virtual_dataset("woven", woven)
        file["y"] = np.arange(200) % 2
    with h5py.File(folder / "nested.h5", "w") as file:
        layout = h5py.VirtualLayout((200, 6), "i8")
        layout[:] = h5py.VirtualSource("virtual.h5", "x", (200, 6))
        file.create_virtual_dataset("x", layout)
        layout = h5py.VirtualLayout((200, 2), "f8")
        layout[5:] = h5py.VirtualSource("virtual.h5", "gaps", (200, 3, 2))[:195, 1]
        file.create_virtual_dataset("gaps", layout, fillvalue=3)
        # In its own file, but that has its rows in another one.
        layout = h5py.VirtualLayout((200, 6), "i8")
        layout[:150] = h5py.VirtualSource(".", "x", (200, 6))[50:]
        file.create_virtual_dataset("inner", layout)
        words = file.create_dataset("words", (200,), h5py.string_dtype())
        words[:] = [f"word {row}" for row in range(200)]
        layout = h5py.VirtualLayout((200,), h5py.string_dtype())
        layout[:100] = h5py.VirtualSource(".", "words", (200,), h5py.string_dtype())[100:]
        layout[100:] = h5py.VirtualSource(".", "words", (200,), h5py.string_dtype())[:100]
        file.create_virtual_dataset("turned", layout)


def _links(folder: Path) -> None:
    with h5py.File(folder / "links.h5", "w") as file:
        file["all"] = h5py.ExternalLink("parts/a.h5", "/")
        file["extra"] = h5py.ExternalLink("parts/b.h5", "/x")
        file["gone"] = h5py.ExternalLink("nowhere.h5", "/x")
        file["empty"] = h5py.ExternalLink("parts/a.h5", "/nothing")
    with h5py.File(folder / "stored.h5", "w") as file:
        file.create_dataset("x", (10, 5), "<i4", external=[("parts/raw.bin", 40, 200)])
    for here, there in (("ring_a", "ring_b"), ("ring_b", "ring_a")):
        with h5py.File(folder / f"{here}.h5", "w") as file:
            file["x"], file["on"] = np.arange(4), h5py.ExternalLink(f"{there}.h5", "/")


def _in_parts(folder: Path) -> None:
    with h5py.File(folder / "two", "w", driver="split", meta_ext=b"-m.h5", raw_ext=b"-r.h5") as file:
        file.create_dataset("x", data=A, chunks=(7, 6), compression="gzip")
    with h5py.File(folder / "many%03d.h5", "w", driver="family", memb_size=2048) as file:
        file["x"] = A


def _halves(folder: Path) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(folder / "halves.h5", "w") as file:
        array = h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((50, 2)))
        array.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(100, dtype="f4").reshape(50, 2))


def _astray(folder: Path) -> None:
    """Names that lead out of the folder, and virtual arrays that lead in circles."""
    outside = folder.parent / "outside"
    outside.mkdir()
    with h5py.File(outside / "secret.h5", "w") as file:
        file["x"] = A
    (folder / "way_out").symlink_to(outside)
    for name, source in (("up", "../outside/secret.h5"), ("by_link", "way_out/secret.h5")):
        with h5py.File(folder / f"virtual_{name}.h5", "w") as file:
            layout = h5py.VirtualLayout((100, 6), "i8")
            layout[:] = h5py.VirtualSource(source, "x", (100, 6))
            file.create_virtual_dataset("x", layout)
        with h5py.File(folder / f"stored_{name}.h5", "w") as file:
            file.create_dataset("x", (10,), "u1", external=[(source, 0, 10)])
        with h5py.File(folder / f"link_{name}.h5", "w") as file:
            file["x"] = h5py.ExternalLink(source, "/x")
    # A part that is itself reached by a link out of its file.
    with h5py.File(folder / "door.h5", "w") as file:
        file["y"], file["x"] = np.arange(3), h5py.ExternalLink("../outside/secret.h5", "/x")
    circles = {"circle_itself": ["circle_itself"], "circle_one": ["circle_two"], "circle_two": ["circle_one"]}
    for name, sources in (circles | {"through_door": ["door"]}).items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            layout = h5py.VirtualLayout((100, 6), "i8")
            for source in sources:
                layout[:] = h5py.VirtualSource(f"{source}.h5", "x", (100, 6))
            file.create_virtual_dataset("x", layout)
    with h5py.File(folder / "circle_soft.h5", "w") as file:
        layout = h5py.VirtualLayout((100, 6), "i8")
        layout[:] = h5py.VirtualSource(".", "other", (100, 6))
        file.create_virtual_dataset("x", layout)
        file["other"] = h5py.SoftLink("/x")


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    """Where the files are."""
    return str(request.param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, source: str) -> Iterator[ServerProcess]:
    scratch = tmp_path_factory.mktemp("by_h5py")
    folder = scratch / "data"
    folder.mkdir()
    for write in (_lists, _parts, _virtual, _links, _in_parts, _halves, _astray):
        write(folder)
    with served_from(source, folder, scratch, "--workers", "2") as process:
        yield process
        pids = process.worker_pids()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def _readers(server: ServerProcess) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if any("h5py_reader" in word for word in child.cmdline())]


@pytest.mark.parametrize("shuffle", [True, False])
def test_lists_and_text(server: ServerProcess, feed: h5feed.Feed, shuffle: bool) -> None:
    """Every row of every list and text is what h5py gives, in streams of batches and by ids with duplicates."""
    dataset = feed["lists"]
    names = ["images", "angles", "caption", "label", "x"]
    with h5py.File(server.folder / "lists.h5") as file:
        expected = {name: file[name][()] for name in names}

    def check(batch: h5feed.Batch) -> None:
        for name in ("images", "angles"):
            for found, row in zip(batch.lists(name), batch.rows, strict=True):
                np.testing.assert_array_equal(found, expected[name][row])
                assert found.dtype == expected[name][0].dtype
        for name in ("caption", "label"):
            assert batch.text(name) == [expected[name][row].decode() for row in batch.rows]
        np.testing.assert_array_equal(batch["x"], expected["x"][batch.rows])

    seen = []
    for batch in dataset.batches(batch_size=16, shuffle=shuffle, fields=names):
        check(batch)
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(ROWS))
    check(dataset.take([5, ROWS - 1, 5, 0], fields=names))
    assert len(dataset.take([], fields=names).lists("images")) <= 1


def test_how_lists_are_described(feed: h5feed.Feed) -> None:
    """They are not in batches unless asked for; those that h5py itself misreads are not served."""
    dataset = feed["lists"]
    assert dataset.fields["images"].ragged and dataset.fields["images"].dtype == "uint8"
    assert list(dataset.batch(0)) == ["x"]
    assert ">i4" in str(dataset.fields["swapped"].reason)
    assert dataset.plan(fields=["images"], batch_size=10).batch_bytes > 10 * 500


def test_split_by_text(feed: h5feed.Feed) -> None:
    """Labels of any length stratify like those of one length: rows equal scikit-learn's."""
    kinds = [row % 3 for row in range(ROWS)]
    _, test = train_test_split(np.arange(ROWS), test_size=60, stratify=kinds, random_state=42)
    assert feed["lists"].split_rows("test", test=60).tolist() == sorted(test.tolist())


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("virtual", "x"),
        ("virtual", "absolute"),
        ("virtual", "gaps"),
        ("virtual", "woven"),
        ("nested", "x"),
        ("nested", "gaps"),
        ("stored", "x"),
        ("links", "all.x"),
        ("links", "extra"),
    ],
)
def test_data_in_other_files(server: ServerProcess, feed: h5feed.Feed, source: str, name: str, field: str) -> None:
    """Virtual arrays, links and storage in other files of the data folder are what h5py makes of them."""
    if source == "store" and field == "absolute":
        assert "outside the data folder" in str(feed[name].fields[field].reason)
        return
    if source == "store" and name == "stored":
        with pytest.raises(Unreadable, match="in another file, which is not read from an object store"):
            feed[name]
        return
    os.chdir(server.folder)
    with h5py.File(server.folder / f"{name}.h5") as file:
        expected = file[field.replace(".", "/")][()]
    rows = [len(expected) - 1, 0, 5, 5, 6, 7, 3]
    np.testing.assert_array_equal(feed[name].take(rows, fields=[field])[field], expected[rows])
    whole = np.concatenate([b[field] for b in feed[name].batches(batch_size=7, fields=[field])])
    np.testing.assert_array_equal(whole, expected)


def test_virtual_text(feed: h5feed.Feed) -> None:
    """Of text in the same file."""
    rows = [199, 0, 7, 150]
    found = feed["nested"].take(rows, fields=["turned"]).text("turned")
    assert found == [f"word {(row + 100) % 200}" for row in rows]


def test_viewers_get_no_values_of_another_object(server: ServerProcess, feed: h5feed.Feed, source: str) -> None:
    """libhdf5 would look for it in the same one, however many virtual arrays are between."""
    feed["nested"].take([0])
    with h5py.File(server.folder / "nested.h5") as file:
        expected = {name: file[name][()].tolist() for name in ("x", "gaps", "inner")}
    for name, values in expected.items():
        query = {"file": "nested.h5", "path": f"/{name}"}
        answer = httpx.get(f"{server.url}/h5grove/data", params=query, timeout=60)
        if source == "store":
            assert answer.status_code == 422 and "is another object" in answer.json()["detail"]
        else:
            assert answer.json() == values


@pytest.mark.parametrize("name", ["two-m", "many000"])
def test_files_in_parts(feed: h5feed.Feed, source: str, name: str) -> None:
    """A file that HDF5 wrote in parts is one dataset, and its parts are nothing else."""
    if source == "store":
        with pytest.raises(Unreadable, match=r"several parts .* not read from an object store"):
            feed[name]
        return
    np.testing.assert_array_equal(feed[name].take([99, 0, 0])["x"], A[[99, 0, 0]])
    assert not [entry for entry in feed.datasets() if entry["name"] in ("two-r", "many001", "many002")]


def test_bfloat16(server: ServerProcess, feed: h5feed.Feed) -> None:
    """It travels as BF16, and arrives as ml_dtypes' number."""
    batch = feed["halves"].take([3, 1])
    assert batch["x"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(batch["x"].astype("f4"), [[6, 7], [2, 3]])
    body = httpx.get(f"{server.url}/v1/datasets/halves/rows?start=0&stop=2", timeout=60).content
    (length,) = struct.unpack_from("<Q", body)
    assert json.loads(body[8 : 8 + length])["x"]["dtype"] == "BF16"
    plan = httpx.get(f"{server.url}/v1/datasets/halves/plan?batch_size=2", timeout=60).json()
    assert "bfloat16" in [tensor["dtype"] for tensor in plan["tensors"]]


def test_what_links_lead_to_is_said(feed: h5feed.Feed) -> None:
    """A link that leads nowhere is a field that cannot be read, with the reason; files may link to one another."""
    fields = feed["links"].fields
    assert "'nowhere.h5', which is missing" in str(fields["gone"].reason)
    assert "there is no array" in str(fields["empty"].reason)
    assert "links back to this one" in str([field.reason for field in feed["ring_a"].fields.values()])


@pytest.mark.parametrize(
    "name", ["virtual_up", "virtual_by_link", "stored_up", "stored_by_link", "link_up", "link_by_link"]
)
def test_nothing_outside_is_served(feed: h5feed.Feed, source: str, name: str) -> None:
    """Names that lead out of the data folder, by dots or by a link of the file system, lead nowhere."""
    reason = "outside the data folder"
    if source == "store":
        # It has no links of a file system.
        reason = "not read from an object store" if "stored" in name else f"{reason}|is missing"
    with pytest.raises(Unreadable, match=reason):
        feed[name]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("circle_itself", "with itself as a source"),
        ("circle_one", "with itself as a source"),
        ("circle_soft", "with itself as a source"),
        ("through_door", "is missing|link class"),
    ],
)
def test_virtual_arrays_in_circles(server: ServerProcess, feed: h5feed.Feed, name: str, word: str) -> None:
    """A virtual array that is made of itself, by whatever way, or of what lies outside, is an unreadable entry."""
    pids = server.worker_pids()
    with pytest.raises(Unreadable, match=word):
        feed[name]
    assert server.worker_pids() == pids


def test_a_part_that_changes(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Who began with the old bytes of a part is told; a part that goes away and comes back is noticed."""
    folder = tmp_path / "data"
    folder.mkdir()
    _parts(folder)
    _virtual(folder)
    with h5feed.connect(serve(folder).url, deadline=60) as feed:
        before = feed["virtual"]
        np.testing.assert_array_equal(before.take([100])["x"], B[:1])
        with h5py.File(folder / "parts" / "new.h5", "w") as file:
            file["x"] = B * 2
        os.replace(folder / "parts" / "new.h5", folder / "parts" / "b.h5")
        with pytest.raises(RevisionChanged):
            before.take([100])
        after = feed["virtual"]
        assert after.revision != before.revision
        np.testing.assert_array_equal(after.take([100])["x"], 2 * B[:1])
        os.rename(folder / "parts" / "b.h5", folder / "away")
        with pytest.raises((Unreadable, RevisionChanged)):
            after.take([100])
        reasons = {field.name: str(field.reason) for field in feed["virtual"].fields.values()}
        assert "missing" in reasons["x"]
        os.rename(folder / "away", folder / "parts" / "b.h5")
        np.testing.assert_array_equal(feed["virtual"].take([100])["x"], 2 * B[:1])


def test_external_storage_is_told_apart(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Arrays of the same path in one raw file are as many as the files that say where they begin, and of what type."""
    folder = tmp_path / "data"
    folder.mkdir()
    values = np.arange(1000, dtype="<i4")
    values.tofile(folder / "raw.bin")

    def write(name: str, begin: int, dtype: str = "<i4", rows: int = 20) -> None:
        with h5py.File(folder / "new", "w") as file:
            file.create_dataset("x", (rows, 5), dtype, external=[("raw.bin", begin, 1000)])
        os.replace(folder / "new", folder / f"{name}.h5")

    write("a", 0)
    write("b", 400)
    write("c", 0, "<f4", 10)
    with h5feed.connect(serve(folder).url, deadline=60) as feed:
        for name, begin in (("a", 0), ("b", 100)):
            np.testing.assert_array_equal(feed[name].take([1, 0])["x"], [values[begin + 5 :][:5], values[begin:][:5]])
        np.testing.assert_array_equal(feed["c"].take([9])["x"][0], values[45:50].view("<f4"))
        write("a", 800)
        np.testing.assert_array_equal(feed["a"].take([0])["x"][0], values[200:205])


def test_matrices_that_are_turned_and_not(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """One array may be a field of two datasets that see its rows along other axes."""
    x, y = np.arange(500).reshape(5, 100), np.arange(35).reshape(5, 7)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in (("x", x), ("y", y)):
            file.create_dataset(name, data=values).attrs["MATLAB_class"] = np.bytes_("double")
    (tmp_path / "h5feed.toml").write_text(
        """
        [datasets.turned]
        files = ["a.h5"]
        fields = { x = "x" }
        [datasets.plain]
        files = ["a.h5"]
        fields = { x = "x", y = "y" }
        """
    )
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        np.testing.assert_array_equal(feed["turned"].take([3])["x"], x.T[3:4])
        np.testing.assert_array_equal(feed["plain"].take([3], fields=["x"])["x"], x[3:4])


def test_names_that_lead_to_what_is_hidden(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Hidden files are no data, whatever a file says; links of the file system may lead to them, as git-annex's do."""
    (tmp_path / ".annex").mkdir()
    (tmp_path / ".token").write_bytes(b"secret" * 10)
    with h5py.File(tmp_path / ".annex" / "a", "w") as file:
        file["x"] = A
    (tmp_path / "part.h5").symlink_to(".annex/a")
    for name, way in (("token", ".token"), ("folder", "./.annex/a"), ("whole", str(tmp_path / ".token"))):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("x", (10,), "u1", external=[(way, 0, 10)])
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((100, 6), "i8")
        layout[:] = h5py.VirtualSource("part.h5", "x", (100, 6))
        file.create_virtual_dataset("x", layout)
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        for name in ("token", "folder", "whole"):
            with pytest.raises(Unreadable, match="hidden"):
                feed[name]
        np.testing.assert_array_equal(feed["virtual"].take([3])["x"], A[3:4])
        # Led elsewhere, though no file has changed.
        with h5py.File(tmp_path / ".annex" / "b", "w") as file:
            file["x"] = B
        (tmp_path / "next").symlink_to(".annex/b")
        os.replace(tmp_path / "next", tmp_path / "part.h5")
        np.testing.assert_array_equal(feed["virtual"].take([3])["x"], B[3:4])


def test_files_that_lead_to_one_another(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Files may be made of parts of each other, as long as no array is made of itself."""
    for here, there, part in (("a", "b", "x"), ("b", "a", "x"), ("c", "a", "part")):
        with h5py.File(tmp_path / f"{here}.h5", "w") as file:
            file["x"] = {"a": A, "b": B, "c": A}[here]
            layout = h5py.VirtualLayout((100, 6), "i8")
            layout[:] = h5py.VirtualSource(f"{there}.h5", part, (100, 6))
            file.create_virtual_dataset("part", layout)
            file["link"] = h5py.ExternalLink(f"{there}.h5", "/part")
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        for name, field, expected in (
            ("a", "part", B),
            ("a", "link", A),
            ("b", "part", A),
            ("b", "link", B),
            ("c", "part", B),
        ):
            np.testing.assert_array_equal(feed[name].take([3], fields=[field])[field], expected[3:4])


def test_members_that_come_later(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A file of which a part is missing is said to be unreadable, and read when the part is there."""
    folder, away = tmp_path / "data", tmp_path / "away"
    folder.mkdir()
    away.mkdir()
    _in_parts(folder)
    for part in ("two-r.h5", "many001.h5"):
        os.rename(folder / part, away / part)
    server = serve(folder)
    with h5feed.connect(server.url, deadline=60) as feed:
        for name, reason in (("two-m", "'two-r.h5' is missing"), ("many000", "truncated")):
            with pytest.raises(Unreadable, match=reason):
                feed[name]
        assert str(tmp_path) not in httpx.get(f"{server.url}/v1/datasets", timeout=60).text
        for part in ("two-r.h5", "many001.h5"):
            os.rename(away / part, folder / part)
        for name in ("two-m", "many000"):
            np.testing.assert_array_equal(feed[name].take([99])["x"], A[99:])


def test_lists_of_text_and_in_records(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """What cannot travel is listed with the reason, beside what can."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        words = file.create_dataset("words", (10,), h5py.vlen_dtype(np.dtype("S4")))
        words[0] = np.array([b"ab", b"abcd"])
        kind = np.dtype([("n", "i4"), ("s", h5py.string_dtype()), ("r", h5py.ref_dtype)])
        file.create_dataset("table", (10,), kind)
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        fields = feed["a"].fields
        assert "lists are of text" in str(fields["words"].reason)
        assert feed["a"].take([3], fields=["table.s"]).text("table.s") == [""]
        assert "reference" in str(fields["table.r"].reason)
        assert feed["a"].take([3])["table.n"].tolist() == [0]


def test_a_file_that_is_being_written(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Each state is looked at only while it lasts: others do not wait for them, and the last one is served."""
    for name in ("grows", "template"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = A
    os.rename(tmp_path / "template.h5", tmp_path / "template")
    with open(tmp_path / "grows.h5", "ab") as file:
        file.truncate(400 << 20)
        url = serve(tmp_path).url
        with h5feed.connect(url, deadline=60) as feed:
            for number in range(40):
                file.write(b"\0" * 4096)
                file.flush()
                feed.datasets()
                if number % 10 == 0:
                    os.replace(tmp_path / "template", tmp_path / f"new{number}.h5")
                    np.testing.assert_array_equal(feed[f"new{number}"].take([3])["x"], A[3:4])
                    os.replace(tmp_path / f"new{number}.h5", tmp_path / "template")
            np.testing.assert_array_equal(feed["grows"].take([3])["x"], A[3:4])


def _code(server: ServerProcess, *rows: int) -> str:
    """How a request for some images ends."""
    answer = httpx.post(f"{server.url}/v1/datasets/lists/rows", json={"rows": rows, "fields": ["images"]}, timeout=60)
    return "ok" if answer.status_code == 200 else str(answer.json()["code"])


def _code_when_killed(server: ServerProcess, *rows: int) -> str:
    """The same, when its reader is killed while it works."""
    readers = _readers(server)
    suspend(*readers)
    with ThreadPoolExecutor(1) as thread:
        code = thread.submit(_code, server, *rows)
        wait_until(lambda: any(map(_is_asked, readers)))
        for reader in readers:
            reader.kill()
        return code.result(60)


def _is_asked(reader: psutil.Process) -> bool:
    """Whether a request waits in the pipe from which a suspended reader has them."""
    waiting = array.array("i", [0])
    with open(f"/proc/{reader.pid}/fd/0", "rb", buffering=0) as pipe:
        fcntl.ioctl(pipe, termios.FIONREAD, waiting)
    return waiting[0] > 0


@pytest.fixture
def of_one_reader(serve: Callable[..., ServerProcess], tmp_path: Path) -> Callable[..., ServerProcess]:
    folder = tmp_path / "data"
    folder.mkdir()
    _lists(folder)
    # A file that is young when it is inspected is inspected a second time, by the same reader, whenever that is.
    time.sleep(YOUNG_SECONDS)
    return lambda **environment: serve(folder, H5FEED_READERS="1", **environment)


def test_a_reader_that_dies(of_one_reader: Callable[..., ServerProcess]) -> None:
    """It costs one 503 and is replaced; a request that kills it twice is not tried again, others go on."""
    server = of_one_reader()
    pids = server.worker_pids()
    assert _code(server, 0) == "ok"
    for _ in range(2):
        assert _code_when_killed(server, 1, 2) == "reader_crashed"
        assert _code(server, 0) == "ok"
    assert _code(server, 1, 2) == "dataset_corrupt"
    assert _code(server, 1, 2, 3) == "ok"
    with h5feed.connect(server.url, deadline=60) as feed, ThreadPoolExecutor(1) as thread:
        dataset = feed["lists"]
        readers = _readers(server)
        suspend(*readers)
        rows = thread.submit(dataset.take, [7], fields=["images"])
        wait_until(lambda: any(map(_is_asked, readers)))
        for reader in readers:
            reader.kill()
        # Clients retry: nobody notices.
        assert len(rows.result(60).lists("images")) == 1
    assert server.worker_pids() == pids


def test_a_reader_that_hangs(of_one_reader: Callable[..., ServerProcess]) -> None:
    """A read that does not end is given up, and its reader with it; when the server dies, none is left."""
    server = of_one_reader(H5FEED_READ_TIMEOUT="3")
    assert _code(server, 0) == "ok"
    hung = _readers(server)
    suspend(*hung)
    assert _code(server, 1) == "read_timeout"
    wait_until(lambda: not any(reader.is_running() for reader in hung))
    assert _code(server, 1) == "ok"
    readers = _readers(server)
    assert readers
    server.kill()
    wait_until(lambda: not any(reader.is_running() for reader in readers))


def test_a_reader_that_hangs_when_a_file_is_tried(of_one_reader: Callable[..., ServerProcess]) -> None:
    """That says nothing of the file: it is served when there is a reader again."""
    server = of_one_reader(H5FEED_READ_TIMEOUT="3")
    assert _code(server, 0) == "ok"
    suspend(*_readers(server))
    with h5py.File(server.folder / "new.h5", "w") as file:
        file.create_dataset("caption", data=["a", "b"], dtype=h5py.string_dtype())
    with h5feed.connect(server.url, deadline=60) as feed:
        assert feed["new"].take([1], fields=["caption"]).text("caption") == ["b"]


def test_lists_that_are_too_long(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """An answer is bounded whatever its rows turn out to be, also where the first ones look short."""
    with h5py.File(tmp_path / "long.h5", "w") as file:
        images = file.create_dataset("images", (100,), h5py.vlen_dtype(np.uint8))
        for row in range(100):
            images[row] = np.zeros(300_000 if row % 2 else 1, np.uint8)
    with h5feed.connect(serve(tmp_path, H5FEED_MAX_BODY_BYTES="1000000").url, deadline=60) as feed:
        dataset = feed["long"]
        with pytest.raises(TooLarge, match="fewer"):
            dataset.take([1, 3, 5, 7], fields=["images"])
        with pytest.raises(TooLarge, match="fewer"):
            dataset.take([1] * 10, fields=["images"])
        assert dataset.take([1, 3, 5], fields=["images"])["images"].nbytes == 900_000


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_readers_end_with_the_server(serve: Callable[..., ServerProcess], tmp_path: Path, signal_number: int) -> None:
    _lists(tmp_path)
    server = serve(tmp_path)
    with h5feed.connect(server.url, deadline=60) as feed:
        feed["lists"].take([0], fields=["images"])
        readers = _readers(server)
        assert readers
    server.process.send_signal(signal_number)
    server.process.wait(60)
    wait_until(lambda: not any(reader.is_running() for reader in readers))
