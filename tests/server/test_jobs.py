"""Long work: bounded, shared out among datasets, stopped when nobody wants it."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import JobWanted, Overloaded
from h5feed_server.api.one_at_a_time import OneAtATime
from h5feed_server.api.response_models import Job
from h5feed_server.jobs import registry
from h5feed_server.jobs import turns as turns_module
from h5feed_server.jobs.registry import MAX_OF_DATASET, MAX_WAITING, Jobs, Progress, Request
from h5feed_server.jobs.turns import Turns
from h5feed_server.tokens.scope import SCOPE, DatasetScope

from tests.support.no_threads import no_more_threads
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

NEVER = 1 << 50
"""Rows that nobody can read one by one."""

LONG = 1 << 36
"""Bytes that take long to read, and lie in a file of a few kB on the disk."""


def _zeros(path: Path, nbytes: int) -> None:
    """A file with so many bytes of zeros, none of which takes room on the disk."""
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((nbytes,))
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, space, properties)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    for name, options in (("chunked", {"chunks": (1 << 20,), "compression": "gzip"}), ("contiguous", {})):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("x", (NEVER,), np.int16, fillvalue=-3, **options)
            if options:
                file["x"][5 << 20 : (5 << 20) + 4] = [1, 2, 3, 4]
    for name in ("longone", "another"):
        _zeros(folder / f"{name}.h5", LONG)
    with h5py.File(folder / "small.h5", "w") as file:
        file["x"] = np.arange(1000.0)
    # These tests look at the files of jobs, which are elsewhere as long as a revision is provisional.
    hashed_first = {"H5FEED_PROVISIONAL_BYTES": str(1 << 62)}
    return serve_module(folder, "--workers", "2", **hashed_first)


def _stats(server: ServerProcess, name: str, wait: int = 60, **headers: str) -> httpx.Response:
    url = f"{server.url}/v1/datasets/{name}/stats"
    wait_until(lambda: httpx.get(f"{server.url}/v1/datasets/{name}", timeout=60).status_code == 200)
    return httpx.get(url, headers={"prefer": f"wait={wait}", **headers}, timeout=90)


def test_what_was_never_written_costs_nothing(server: ServerProcess) -> None:
    """2⁵⁰ rows, of which four or none were written: exact statistics, at once."""
    chunked = _stats(server, "chunked").json()["fields"]["x"]
    assert (chunked["count"], chunked["min"], chunked["max"]) == (NEVER, -3, 4)
    assert sum(chunked["histogram"]["counts"]) == NEVER
    contiguous = _stats(server, "contiguous").json()["fields"]["x"]
    assert (contiguous["count"], contiguous["mean"], contiguous["std"]) == (NEVER, -3, 0)


def test_long_jobs_hold_up_no_others(server: ServerProcess) -> None:
    """Two that take very long occupy all turns there are: another dataset's work is done all the same. Then they are
    deleted: not by somebody else while their owner asks, but by the owner, and the workers stop."""
    jobs = [_stats(server, name, 0, **{"user-agent": "owner"}) for name in ("longone", "another")]
    assert [job.status_code for job in jobs] == [202, 202]
    wait_until(lambda: sorted(server.unfinished_jobs()) == ["stats", "stats"])
    assert _stats(server, "small").json()["fields"]["x"]["mean"] == 499.5
    for job in jobs:
        url = f"{server.url}{job.headers['location']}"
        Job.model_validate_json(job.content, strict=True)
        for _ in range(4):
            refused = httpx.delete(url, headers={"user-agent": "stranger"}, timeout=60)
            assert (refused.status_code, refused.json()["code"]) == (409, "job_wanted"), refused.text
        assert httpx.get(url, headers={"user-agent": "owner"}, timeout=60).json()["status"] in ("queued", "running")
        assert httpx.delete(url, headers={"user-agent": "owner"}, timeout=60).status_code == 204
        for _ in range(4):
            assert httpx.get(url, timeout=60).json()["code"] == "not_found"
            assert httpx.delete(url, timeout=60).status_code == 404
    wait_until(lambda: not server.working_pids() and not server.unfinished_jobs())
    # It is forgotten, not forbidden.
    again = _stats(server, "longone", 0, **{"user-agent": "owner"})
    assert again.status_code == 202
    url = f"{server.url}{again.headers['location']}"
    assert httpx.delete(url, headers={"user-agent": "owner"}, timeout=60).status_code == 204


def test_every_worker_knows_a_job_when_the_cache_was_deleted(server: ServerProcess) -> None:
    """The cache folder may go at any time: what is started then is known to whoever is asked for it."""

    def is_gone() -> bool:
        # Workers may be writing into it.
        shutil.rmtree(server.cache_dir, ignore_errors=True)
        return not server.cache_dir.exists()

    wait_until(is_gone)
    owner = {"user-agent": "owner"}
    job = _stats(server, "another", 0, **owner)
    assert job.status_code == 202
    url = job.headers["location"]
    # Of connections that stay open, each worker has one.
    with (
        httpx.Client(base_url=server.url, headers=owner, timeout=60) as one,
        httpx.Client(base_url=server.url, headers=owner, timeout=60) as other,
    ):
        assert [client.get("/healthz").status_code for client in (one, other)] == [200, 200]
        assert [client.get(url).status_code for client in (one, other)] == [200, 200]
        assert one.delete(url).status_code == 204


def test_a_job_reads_so_much_at_most(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """More is 413, which names the setting."""
    (tmp_path / "data").mkdir()
    _zeros(tmp_path / "data" / "a.h5", 3 << 20)
    answer = _stats(serve(tmp_path / "data", H5FEED_MAX_JOB_BYTES=str(2 << 20)), "a")
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "H5FEED_MAX_JOB_BYTES" in answer.json()["detail"] and "3,145,728" in answer.json()["detail"]


def test_turns_are_shared_out_among_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that has begun gives way to that of a dataset which has had less; of one dataset, one after the other."""
    monkeypatch.setattr(turns_module, "SLICE_SECONDS", 0.0)
    turns = Turns(2)
    ended = threading.Event()
    order: list[str] = []

    def long(dataset: str) -> None:
        with turns.of(dataset, lambda: False) as turn:
            while not ended.is_set():
                turn.give_way()
            order.append(dataset)

    threads = [threading.Thread(target=long, args=(name,), daemon=True) for name in ("a", "a", "b", "b", "b")]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(turns._running) == 2)

    def short() -> None:
        with turns.of("c", lambda: False):
            order.append("c")
            ended.set()

    last = threading.Thread(target=short)
    last.start()
    last.join(60)
    for thread in threads:
        thread.join(60)
    assert order[0] == "c" and Counter(order) == {"a": 2, "b": 3, "c": 1}
    assert not turns._spent and not turns._running and not turns._waiting


class _Endless:
    """Work that goes on until it is cancelled."""

    def __init__(self) -> None:
        self.running = 0
        self._lock = threading.Lock()

    def __call__(self, request: Request, progress: Progress) -> None:
        with self._lock:
            self.running += 1
        try:
            progress.expect(1 << 60)
            while not progress.cancelled.wait(0.001):
                progress.advance(1)
            progress.advance(1)
        finally:
            with self._lock:
                self.running -= 1


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Jobs, _Endless]]:
    monkeypatch.setattr(registry, "_TICK_SECONDS", 0.02)
    work, jobs = _Endless(), Jobs(tmp_path / "jobs", 1e9)
    jobs.register("endless", "rows", work)
    yield jobs, work
    jobs.close()


def _start(jobs: Jobs, dataset: str, number: int = 0) -> str:
    request: dict[str, Any] = {"dataset": dataset, "number": number}
    return jobs.start("endless", request, "/there").id


def test_a_job_without_a_thread(endless: tuple[Jobs, _Endless], tmp_path: Path) -> None:
    """It is refused, and left to whoever asks next, here or in another worker."""
    jobs, work = endless
    with no_more_threads(), pytest.raises(Overloaded, match="no thread"):
        _start(jobs, "a")
    assert not jobs._mine and not list((tmp_path / "jobs").iterdir())
    _start(jobs, "a")
    wait_until(lambda: work.running == 1)
    # Whether it is still wanted is looked at, too.
    ticks = jobs.ticks
    wait_until(lambda: jobs.ticks > ticks)


def test_checks_without_a_thread() -> None:
    """The server's checks of itself go on when there are threads again."""

    async def check() -> int:
        checks = OneAtATime[int]("check")
        with no_more_threads(), pytest.raises(Overloaded, match="no thread"):
            await checks.run(lambda: 1, 60)
        return await checks.run(lambda: 2, 60)

    assert asyncio.run(check()) == 2


def test_a_job_about_two_datasets_needs_a_scope_of_both(endless: tuple[Jobs, _Endless]) -> None:
    """As joins are: whoever may not see the other dataset neither sees nor stops the job."""
    jobs, _ = endless
    job = jobs.start("endless", {"dataset": "a", "other": {"dataset": "b", "revision": "0"}}, "").id
    for patterns, is_seen in ((("a",), False), (("b",), False), (("a", "b"), True), (None, True)):
        before = SCOPE.set(DatasetScope(patterns))
        try:
            assert (jobs.state(job, "somebody") is not None) == is_seen
            if not is_seen:
                assert not jobs.delete(job, "somebody")
        finally:
            SCOPE.reset(before)


def test_a_job_that_nobody_asks_for_is_stopped(endless: tuple[Jobs, _Endless], tmp_path: Path) -> None:
    """It goes on as long as it is asked for, by any worker, whatever the clock says; else it begins anew."""
    jobs, work = endless
    job = _start(jobs, "a")
    other = Jobs(tmp_path / "jobs", 1e9)
    other.register("endless", "rows", work)
    assert other.state(job, "somebody") is not None
    (asked,) = (tmp_path / "jobs").glob("*.asked")
    wait_until(lambda: work.running == 1)
    jobs._patience = 1e6
    for moment in (time.time() + 1e7, 0.0, time.time()):
        ticks, before = jobs.ticks, jobs._mine[job].asked
        os.utime(asked, (moment, moment))
        wait_until(lambda: jobs.ticks > ticks + 3)  # noqa: B023
        assert work.running == 1 and jobs._mine[job].asked > before
    # The last that anybody has asked was long ago.
    jobs._mine[job].asked = float("-inf")
    wait_until(lambda: work.running == 0)

    def is_begun_anew() -> bool:
        # The worker that has stopped it may hold its lock for a moment.
        state = other.state(job, "somebody")
        assert state is not None and not state.is_over
        return work.running == 1

    wait_until(is_begun_anew)
    other.close()


def test_no_dataset_takes_all_room(endless: tuple[Jobs, _Endless]) -> None:
    """So many jobs for each dataset; when all room is taken, who has least still gets some."""
    jobs, _ = endless
    each = MAX_WAITING // MAX_OF_DATASET
    for dataset in "abcdefgh"[:each]:
        for number in range(MAX_OF_DATASET):
            _start(jobs, dataset, number)
        with pytest.raises(Overloaded, match=f"{MAX_OF_DATASET} jobs for '{dataset}'"):
            _start(jobs, dataset, MAX_OF_DATASET)
    for number in range(MAX_OF_DATASET // 2):
        assert _start(jobs, "new", number)
    wait_until(lambda: len(jobs._mine) <= MAX_WAITING)


def test_what_somebody_else_wants_is_not_deleted(endless: tuple[Jobs, _Endless], tmp_path: Path) -> None:
    """By whichever worker it was asked for, and whichever works on it."""
    jobs, work = endless
    job = _start(jobs, "a")
    other = Jobs(tmp_path / "jobs", 1e9)
    assert jobs.state(job, "me") is not None and other.state(job, "you") is not None
    for worker in (jobs, other):
        with pytest.raises(JobWanted):
            worker.delete(job, "me")
    wait_until(lambda: work.running == 1)
    assert not other.delete("0" * 32, "me")
    wanted_seconds = registry.WANTED_SECONDS
    registry.WANTED_SECONDS = -1.0
    try:
        assert other.delete(job, "me")
    finally:
        registry.WANTED_SECONDS = wanted_seconds
    assert jobs.state(job, "you") is None
    wait_until(lambda: work.running == 0)
    wait_until(lambda: not list((tmp_path / "jobs").iterdir()))
    other.close()


def test_what_fails_because_the_process_ends_has_not_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Threads that read may end before the job does: it stays unfinished, for another worker to take up."""
    jobs, ended = Jobs(tmp_path / "jobs", 1e9), threading.Event()

    def work(request: Request, progress: Progress) -> None:
        progress.cancelled.wait(60)
        ended.set()
        raise RuntimeError("cannot schedule new futures after shutdown")

    jobs.register("stats", "bytes", work)
    job = jobs.start("stats", {"dataset": "a"}, "/").id
    wait_until(lambda: jobs.state(job).status == "running")  # type: ignore[union-attr]
    jobs.close()
    assert ended.wait(60)
    wait_until(lambda: not jobs._mine)
    other = Jobs(tmp_path / "jobs", 1e9)
    other.register("stats", "bytes", lambda request, progress: None)
    assert other.state(job, "somebody") is not None
    wait_until(lambda: other.state(job, "somebody").status == "done")  # type: ignore[union-attr]
    other.close()
    assert not caplog.records
