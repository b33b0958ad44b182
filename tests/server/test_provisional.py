"""Files that are served before they are hashed: under a provisional name, which is never wrong, stored or lost."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import RevisionChanged
from h5feed.revisions import HEADER, LENGTH, is_provisional
from h5feed.stored.local_file import YOUNG_SECONDS, Identity
from h5feed.wire import read_body
from h5feed_server.cache_folder.folder import CacheFolder
from h5feed_server.catalog.digests import FILES_AT_ONCE, Digests
from h5feed_server.jobs.registry import Jobs, Progress, Request

from tests.support.server_process import ServerProcess
from tests.support.waiting import PatientTransport, wait_until

ROWS, WIDTH = 500, 40

NEVER = {"H5FEED_PROVISIONAL_BYTES": "0", "H5FEED_DIGEST_RATE": "1"}
"""Every file is served before it is hashed, which would take days."""

SOON = {"H5FEED_PROVISIONAL_BYTES": "0", "H5FEED_DIGEST_RATE": "0"}


def _values(version: int) -> npt.NDArray[np.int32]:
    return np.full((ROWS, WIDTH), version, np.int32) + np.arange(ROWS, dtype=np.int32)[:, None] * 100


def _write(path: Path, version: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["x"] = _values(version)
        file["label"] = np.arange(ROWS, dtype=np.int32) % 5


@pytest.fixture
def data(tmp_path: Path) -> Path:
    _write(tmp_path / "data" / "d.h5")
    return tmp_path / "data"


def _ask(server: ServerProcess, path: str, **params: Any) -> httpx.Response:
    with httpx.Client(transport=PatientTransport(), base_url=server.url, timeout=60) as client:
        return client.get(f"/v1/datasets{path}", params=params)


def _restart(server: ServerProcess, **environment: str) -> None:
    server.stop()
    server._environment |= environment
    server.start()


def _content(server: ServerProcess) -> str:
    """The revision by content, when every worker of the server knows it.

    A worker that does not know it yet stores nothing. Each request has a connection of its own, and the kernel deals
    connections to the workers: that 16 in a row miss one of two is as good as impossible.
    """
    found: set[str | None] = set()

    def is_known() -> bool:
        found.clear()
        found.update(_ask(server, "/d").json()["content"] for _ in range(16))
        return None not in found

    wait_until(is_known)
    (content,) = found
    assert content is not None
    return content


def test_served_before_it_is_hashed(serve: Callable[..., ServerProcess], data: Path) -> None:
    """The name is marked as provisional, as long as others, and nothing that has it may be stored by a cache."""
    server = serve(data, **NEVER)
    described = _ask(server, "/d")
    about = described.json()
    provisional = about["revision"]
    assert is_provisional(provisional) and len(provisional) == LENGTH
    assert (about["provisional"], about["content"]) == (True, None)
    size = (data / "d.h5").stat().st_size
    assert about["hashing"] == {"done": 0, "total": size} and "inode" in about["revision_covers"]
    (line,) = _ask(server, "").json()["datasets"]
    assert line["revision"] == provisional and line["provisional"] and line["hashing"]["total"] == size
    order = {"batch_size": 8, "split": "train", "test": "0.1", "shuffle": "true", "revision": provisional}
    answers = [
        described,
        _ask(server, ""),
        _ask(server, "/d/plan", **order),
        # The second one takes the short way.
        *(_ask(server, "/d/batches/0", **order) for _ in range(2)),
        *(_ask(server, "/d/batches", start=0, stop=2, **order) for _ in range(2)),
        _ask(server, "/d/rows", start=0, stop=3),
        _ask(server, "/d/splits", test="0.1"),
        _ask(server, "/d/splits/train/rows", test="0.1"),
        _ask(server, "/d/tree"),
        httpx.get(f"{server.url}/datasets/d", headers={"accept": "text/html"}, timeout=60),
    ]
    for number, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        assert answer.headers["cache-control"] == "no-store" and "etag" not in answer.headers, answer.url
        assert number == 1 or answer.headers[HEADER] == provisional, answer.url
    assert "(provisional: 0 % of the files are hashed)" in answers[-1].text
    tensors, about_batch, _ = read_body(np.frombuffer(answers[3].content, np.uint8))
    assert about_batch["revision"] == provisional
    np.testing.assert_array_equal(tensors["x"], _values(1)[tensors["__rows__"]])


def test_both_names_are_accepted(serve: Callable[..., ServerProcess], data: Path) -> None:
    """Who asks with the provisional name gets it back, and is told the name by content; bodies are equal otherwise."""
    server = serve(data, **NEVER)
    provisional = _ask(server, "/d").json()["revision"]
    assert _ask(server, "/d/rows", start=0, stop=3, revision="0123456789abcdef").status_code == 503
    _restart(server, **SOON)
    content = _content(server)
    bodies = {}
    for name in (provisional, content):
        for _ in range(2):
            answer = _ask(server, "/d/batches/3", batch_size=16, shuffle="true", revision=name)
            bodies[name] = answer.content
            if name == content:
                assert "immutable" in answer.headers["cache-control"] and HEADER not in answer.headers
            else:
                assert answer.headers["cache-control"] == "no-store"
                assert answer.headers[HEADER] == f"{provisional}; content={content}"
        for path in ("/d/plan", "/d", "/d/splits", "/d/stats"):
            assert _ask(server, path, revision=name).json()["revision"] == name
    assert bodies[provisional].replace(provisional.encode(), content.encode()) == bodies[content]
    assert _ask(server, "/d").json()["revision"] == content
    refused = _ask(server, "/d/rows", start=0, stop=3, revision="prov-aaaaaaaaaaa").json()
    assert refused["code"] == "revision_changed" and "provisional name" in refused["detail"]
    # What is found by name alone is pinned by its content: a copy elsewhere has the same revision.
    plain = serve(data)
    assert _ask(plain, "/d").json()["revision"] == content
    # A server that has never named it so knows the name all the same.
    assert _ask(plain, "/d/rows", start=0, stop=3, revision=provisional).headers[HEADER].endswith(content)


def test_batches_in_parts_while_the_name_changes(serve: Callable[..., ServerProcess], data: Path) -> None:
    """The parts of a batch that was begun under the provisional name come under the name by content."""
    server = serve(data, H5FEED_MAX_BODY_BYTES="65536", **NEVER)
    with h5feed.connect(server.url, local=False, deadline=60) as feed:
        dataset = feed["d"]
        assert is_provisional(dataset.revision) and dataset.plan(batch_size=450, fields=["x"]).part_rows
        _restart(server, **SOON)
        _content(server)
        for batch in dataset.batches(batch_size=450, fields=["x"]):
            assert np.array_equal(batch["x"], _values(1)[batch.rows])


def test_the_provisional_name_survives_a_touch(serve: Callable[..., ServerProcess], data: Path) -> None:
    """A hard link changes the identity. It is hashed again, and goes on under all names it had."""
    server = serve(data, **SOON)
    provisional, content = _ask(server, "/d").json()["revision"], _content(server)
    if not is_provisional(provisional):
        provisional = _ask(server, "/d", revision=content).json()["revision"]
    os.link(data / "d.h5", data / ".another")
    os.unlink(data / ".another")
    for name in {provisional, content}:
        assert _ask(server, "/d/rows", start=0, stop=3, revision=name).status_code == 200
    assert _content(server) == content


def _kinds(server: ServerProcess) -> set[str]:
    """The kinds of files in the cache folder."""
    below = [path.relative_to(server.cache_dir).parts for path in server.cache_dir.rglob("*") if path.is_file()]
    return {parts[1] for parts in below if parts[0].startswith("served-") and len(parts) > 2}


def test_nothing_on_disk_has_a_provisional_name(serve: Callable[..., ServerProcess], data: Path) -> None:
    """Splits, filters, statistics and jobs are computed and used, and stored when the content is known."""
    server = serve(data, "--workers", "2", **NEVER)
    options: dict[str, Any] = {"test": 0.1, "val": 0.1, "where": "label < 3"}
    with h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed["d"]
        splits = dataset.splits(**options)
        stats = dataset.stats("train", **options)
        rows = dataset.split_rows("train", **options)
        checks = httpx.get(f"{server.url}/datasets/d/checks", timeout=60)
        assert checks.status_code in (200, 404)
        assert is_provisional(dataset.revision) and is_provisional(stats.revision)
        expected = _values(1)[rows]
        assert stats["x"]["mean"] == pytest.approx(expected.mean())
        assert _kinds(server) <= {"digests", "layouts", "traffic"}
        _restart(server, **SOON)
        _content(server)
        assert dataset.splits(**options)["splits"] == splits["splits"]
        np.testing.assert_array_equal(dataset.split_rows("train", **options), rows)
        assert dataset.stats("train", **options)["x"]["mean"] == stats["x"]["mean"]
        wait_until(lambda: {"stats", "splits", "filters", "jobs"} <= _kinds(server))
        assert not is_provisional(dataset.revision)


def test_a_job_that_began_before_the_content_was_known(serve: Callable[..., ServerProcess], data: Path) -> None:
    """The result is found by both names in memory: it is not computed twice."""
    server = serve(data, **SOON)
    with h5feed.connect(server.url, deadline=60) as feed:
        before = feed["d"].stats()
        _content(server)
        after = feed["d"].stats()
        assert before["x"] == after["x"] and not is_provisional(after.revision)


def test_how_far_it_is(tmp_path: Path) -> None:
    """The catalogue of every worker tells how many bytes are hashed, and the log when it begins and ends."""
    data = tmp_path / "data"
    data.mkdir()
    with h5py.File(data / "d.h5", "w") as file:
        file["x"] = np.zeros((24, 1 << 20), np.uint8)
    size = (data / "d.h5").stat().st_size
    log = tmp_path / "log"
    environment = {**os.environ, "H5FEED_PROVISIONAL_BYTES": "0", "H5FEED_DIGEST_RATE": str(2 << 20)}
    with open(log, "wb") as stream:
        command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(data), "--port", "0", "--workers", "2"]
        command += ["--cache-dir", str(tmp_path / "cache")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().rsplit(" at ", 1)[1].strip()
            seen: set[int] = set()

            def is_hashed() -> bool:
                answer = httpx.get(f"{url}/v1/datasets", timeout=60).json()["datasets"][0]
                if answer["hashing"]:
                    assert answer["hashing"]["total"] == size and answer["content"] is None
                    seen.add(answer["hashing"]["done"])
                return answer["content"] is not None

            wait_until(is_hashed, 120)
            # Each request comes to another worker; only one of them hashes the file.
            assert any(0 < done < size for done in seen)
            wait_until(lambda: "hashed" in log.read_text(), 60)
        finally:
            process.terminate()
            process.wait(60)
    said = log.read_text()
    assert re.search(r"hashing 1 file in the background: 25\.\d MB; until then, revisions are provisional", said)
    assert re.search(r"1 file hashed, 25\.\d MB, in \d+\.\d s", said)


def test_hashed_files_are_not_hashed_again(serve: Callable[..., ServerProcess], data: Path) -> None:
    """After a restart the content is known at once, though nothing is hashed any more."""
    server = serve(data, **SOON)
    content = _content(server)
    wait_until(lambda: any(not path.name.startswith(".") for path in server.cache_dir.glob("served-*/digests/*")))
    _restart(server, **NEVER)
    about = _ask(server, "/d").json()
    assert (about["revision"], about["provisional"], about["hashing"]) == (content, False, None)


def _overwritten(path: Path, new: Path) -> None:
    """Other bytes in place: same inode, size and time of modification."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(new.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = path.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (status.st_ino, status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("environment", [NEVER, SOON], ids=["never hashed", "soon hashed"])
def test_overwritten_while_provisional(
    serve: Callable[..., ServerProcess], data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Every row is of the version that the name stands for, or the request is refused."""
    server = serve(data, "--workers", "2", **environment, H5FEED_CACHE_BYTES="0")
    new = tmp_path / "new.h5"
    stop, wrong, seen = threading.Event(), [], set()

    def read() -> None:
        with h5feed.connect(server.url, deadline=120) as feed:
            while not stop.is_set():
                try:
                    dataset = feed["d"]
                    versions = set()
                    for batch in dataset.batches(batch_size=32, shuffle=True, fields=["x"]):
                        version = int(batch["x"][0, 0]) % 100
                        versions.add(version)
                        if not (batch["x"] == _values(version)[batch.rows]).all():
                            wrong.append("rows of two versions in one batch")
                    if len(versions) != 1:
                        wrong.append(f"versions {versions} in one epoch of {dataset.revision}")
                    seen.update(versions)
                except RevisionChanged:
                    continue

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_until(lambda: 1 in seen)
        for version in (2, 3, 4):
            _write(new, version)
            _overwritten(data / "d.h5", new)
            wait_until(lambda version=version: version in seen)  # type: ignore[misc]
    finally:
        stop.set()
        reader.join(120)
    assert not wrong and not reader.is_alive()


def test_an_old_name_is_refused_after_a_change(serve: Callable[..., ServerProcess], data: Path, tmp_path: Path) -> None:
    """By each server, whether it has seen the change or was started after it."""
    server = serve(data, **NEVER)
    with h5feed.connect(server.url, deadline=60) as feed:
        before = feed["d"]
        _write(tmp_path / "new.h5", 2)
        _overwritten(data / "d.h5", tmp_path / "new.h5")
        with pytest.raises(RevisionChanged, match="provisional name"):
            before.take([0])
        now = feed["d"]
        np.testing.assert_array_equal(now.take(range(ROWS), fields=["x"])["x"], _values(2))
        assert is_provisional(now.revision) and now.revision != before.revision
        _restart(server)
        with pytest.raises(RevisionChanged, match="provisional name"):
            before.take([0])
        assert now.take([0]).revision == now.revision


def test_a_young_file_is_not_trusted(serve: Callable[..., ServerProcess], data: Path) -> None:
    """Its times are too coarse to tell a change: it is served when they are two seconds old."""
    server = serve(data, **NEVER)
    for name in ("young", "fresh"):
        _write(data / f"{name}.h5")
        began = (data / f"{name}.h5").stat().st_ctime
        answer = _ask(server, f"/{name}/rows", start=0, stop=1)
        assert answer.status_code == 200 and is_provisional(answer.headers[HEADER])
        assert time.time() - began >= YOUNG_SECONDS


def test_small_files_are_hashed_first(serve: Callable[..., ServerProcess], data: Path) -> None:
    """Nobody is given a provisional name where hashing takes no time, or where it is turned off."""
    for environment in ({}, {"H5FEED_PROVISIONAL_BYTES": str(1 << 60)}):
        about = _ask(serve(data, **environment), "/d").json()
        assert not about["provisional"] and about["content"] == about["revision"] and about["hashing"] is None


def test_a_large_family_beyond_the_limit(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Many files of one dataset count together, and their joint content is that of the same files hashed at once."""
    data = tmp_path / "many"
    for number in range(12):
        _write(data / f"part_{number:02}.h5", number)
    size = (data / "part_00.h5").stat().st_size
    late = serve(data, H5FEED_PROVISIONAL_BYTES=str(3 * size), H5FEED_DIGEST_RATE="1")
    wait_until(lambda: _ask(late, "").json()["datasets"][0]["status"] == "ok")
    (line,) = _ask(late, "").json()["datasets"]
    assert line["provisional"] and line["hashing"] == {"done": 3 * size, "total": 12 * size}
    _restart(late, H5FEED_DIGEST_RATE="0")
    wait_until(lambda: _ask(late, "").json()["datasets"][0]["content"] is not None)
    (own,) = _ask(serve(data, H5FEED_PROVISIONAL_BYTES=str(1 << 60)), "").json()["datasets"]
    assert _ask(late, "").json()["datasets"][0]["revision"] == own["revision"]


def _contents(folder: Path, digests: Digests, count: int, nbytes: int) -> list[Any]:
    folder.mkdir()
    contents = []
    for number in range(count):
        path = folder / f"{number:03}"
        path.write_bytes(bytes([number]) * nbytes)
        contents.append(digests.later(str(path), Identity.of(path.stat()), b""))
    return contents


def test_what_is_asked_for_is_hashed_first(tmp_path: Path) -> None:
    """The last of many files in the queue is done when not many others are."""
    folder = CacheFolder(tmp_path / "cache", 10, 1 << 30)
    digests = Digests(folder, 1 << 30, 200 << 10)
    try:
        contents = _contents(tmp_path / "data", digests, 40, 100 << 10)
        digests.begin(contents)
        digests.prefer(contents[-1:])
        wait_until(lambda: contents[-1].digest is not None)
        assert sum(one.digest is not None for one in contents) <= FILES_AT_ONCE + 3
        assert digests.seconds_left(contents) > digests.seconds_left(contents[:5]) > 0
    finally:
        digests.close(wait=True)
        folder.close()


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """Each file is hashed by one of them, and both know all digests in the end."""
    folders = [CacheFolder(tmp_path / "cache", 10, 1 << 30) for _ in range(2)]
    both = [Digests(folder, 1 << 30, 0) for folder in folders]
    try:
        contents = _contents(tmp_path / "data", both[0], 20, 3 << 20)
        again = [both[1].later(one.path, one.identity, b"") for one in contents]
        both[0].begin(contents)
        both[1].begin(again)
        wait_until(lambda: all(one.digest is not None for one in (*contents, *again)))
        assert [one.digest for one in contents] == [one.digest for one in again]
        wait_until(lambda: not both[0].left and not both[1].left)
        # None left behind: neither locks nor threads.
        assert len(list((tmp_path / "cache").glob("served-*/digests/*"))) == 20
        wait_until(lambda: not any(t.name.startswith("h5feed-digests") for t in threading.enumerate()))
    finally:
        for digests, folder in zip(both, folders, strict=True):
            digests.close(wait=True)
            folder.close()


def test_a_cut_digest_is_begun_anew(tmp_path: Path) -> None:
    """Closing does not wait for a file, nothing of it is kept, and the next process computes the whole digest."""
    folder = CacheFolder(tmp_path / "cache", 10, 1 << 30)
    slow = Digests(folder, 1 << 30, 1)
    (content,) = _contents(tmp_path / "data", slow, 1, 9 << 20)
    slow.begin([content])
    wait_until(lambda: slow.left == 1 and not slow._queue)
    began = time.monotonic()
    slow.close(wait=True)
    assert time.monotonic() - began < 30 and content.digest is None
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name[0] != "."]
    fast = Digests(folder, 1 << 30, 0)
    later = fast.later(content.path, content.identity, b"")
    fast.begin([later])
    wait_until(lambda: later.digest is not None)
    assert later.digest == Digests(folder, 1 << 30, 0).compute(content.path, content.identity, b"", keep=False)
    fast.close(wait=True)
    folder.close()


def test_closing_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file whose blocks are being hashed when a server stops is given up without a word."""
    folder = CacheFolder(tmp_path / "cache", 10, 1 << 30)
    digests = Digests(folder, 1 << 30, 0)
    (content,) = _contents(tmp_path / "data", digests, 1, 64 << 20)
    digests.begin([content])
    wait_until(lambda: digests._bytes > 0)
    digests.close(wait=False)
    wait_until(lambda: not any(t.name.startswith("h5feed-digests") for t in threading.enumerate()))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    folder.close()


def test_without_a_cache_folder(serve: Callable[..., ServerProcess], data: Path, tmp_path: Path) -> None:
    """Digests are known as long as the server runs."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    server = ServerProcess(data, blocked / "cache", **SOON)
    try:
        content = _content(server)
        assert _ask(server, "/d").json()["revision"] == content
    finally:
        server.stop()


def test_a_job_goes_on_under_its_first_name(tmp_path: Path) -> None:
    """Whoever asks for the same work by its content gets the job that is at work, in any worker; files of such a job
    are not in the cache folder."""
    go_on = threading.Event()
    both = [Jobs(tmp_path / "jobs", 1e9, tmp_path / "scratch") for _ in range(2)]

    def work(request: Request, progress: Progress) -> None:
        go_on.wait(60)

    for jobs in both:
        jobs.register("work", "rows", work)
    request = {"dataset": "d", "revision": "prov-aaaaaaaaaaa"}
    named = request | {"revision": "0123456789abcdef"}
    first = both[0].start("work", request, "/there", "prov-aaaaaaaaaaa")
    for jobs in both:
        assert jobs.start("work", named, "/there", "prov-aaaaaaaaaaa").id == first.id
        assert jobs.state(first.id) is not None
    assert list((tmp_path / "scratch").glob("*.json")) and not list((tmp_path / "jobs").glob("*"))
    go_on.set()
    wait_until(lambda: (state := both[1].state(first.id)) is not None and state.is_over)
    later = both[1].start("work", named, "/there", "prov-aaaaaaaaaaa")
    assert later.id != first.id
    wait_until(lambda: (state := both[0].state(later.id)) is not None and state.is_over)
    assert list((tmp_path / "jobs").glob("*.json"))
    for jobs in both:
        jobs.close()
