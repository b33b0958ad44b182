"""Splits that take long: jobs that all callers and workers share, and that tell how far they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import FieldNotFound, ReadTimeout, SplitImpossible, SplitNotFound
from h5feed_server.splits.on_request import QUICK_ROWS
from sklearn.model_selection import train_test_split

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

ROWS = 12_000_000
MEDIUM = 2 * QUICK_ROWS
"""Rows of a dataset that is just not divided while the request waits."""

DIVIDED: dict[str, Any] = {"test": 0.1, "val": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`many`: labels of many rows. `medium`: labels, and a field with a class of one row."""
    path = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(5)
    with h5py.File(path / "many.h5", "w") as file:
        file["labels"] = random.integers(0, 10, ROWS, np.uint8)
    with h5py.File(path / "medium.h5", "w") as file:
        file["images"] = random.integers(0, 256, (MEDIUM, 2), np.uint8)
        file["labels"] = random.choice(3, MEDIUM, p=[0.6, 0.3, 0.1]).astype(np.uint8)
        file["lonely"] = (np.arange(MEDIUM) == 7).astype(np.uint8)
        file["patient"] = np.arange(MEDIUM) // 4
    return path


@pytest.fixture(scope="module")
def medium_labels(data: Path) -> np.ndarray[Any, Any]:
    with h5py.File(data / "medium.h5") as file:
        return np.asarray(file["labels"])


def test_progress_that_all_share(data: Path, serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """What takes long is 202 with the URL of a job, one for all callers of all workers, which counts rows."""
    server = serve(data, "--workers", "2")
    # Of these one or the other asks one worker, and always the same.
    with httpx.Client(base_url=server.url, timeout=60) as one, httpx.Client(base_url=server.url, timeout=60) as two:
        assert one.get("/v1/datasets/many").status_code == two.get("/v1/datasets/many").status_code == 200

        def ask(client: httpx.Client, path: str) -> httpx.Response:
            return client.get(f"/v1/datasets/many/splits{path}", params=DIVIDED, headers={"prefer": "wait=0"})

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(ask, [one, one, two, two] * 2, ["", "/train/rows"] * 4))
        assert {answer.status_code for answer in answers} == {202}
        (job,) = {answer.headers["location"] for answer in answers}
        seen: dict[httpx.Client, list[dict[str, Any]]] = {one: [], two: []}

        def over() -> bool:
            for client, states in seen.items():
                states.append(client.get(job).json())
                assert client.get("/healthz").status_code == 200
                assert states[-1]["status"] in ("queued", "running", "done"), states[-1]
            return all(states[-1]["status"] == "done" for states in seen.values())

        wait_until(over, 150)
        for states in seen.values():
            done = [state["done"] for state in states]
            assert done == sorted(done)
            assert states[-1]["unit"] == "rows" and states[-1]["total"] == 3 * ROWS
        assert any(0 < state["done"] < state["total"] for states in seen.values() for state in states)
        report = one.get(states[-1]["result"]).json()
        assert [split["rows"] for split in report["splits"].values()] == [ROWS, ROWS * 8 // 10, ROWS // 10, ROWS // 10]
        for client in (one, two):
            assert ask(client, "").status_code == ask(client, "/val/rows").status_code == 200
    assert len(list((tmp_path / "cache0").glob("served-*/splits/*"))) == 1


def test_equal_to_scikit_learn(
    data: Path, serve: Callable[..., ServerProcess], medium_labels: np.ndarray[Any, Any]
) -> None:
    """Rows that a job finds are the same rows."""
    rows = np.arange(MEDIUM)
    rest, test = train_test_split(rows, test_size=9000, stratify=medium_labels, random_state=42)
    with h5feed.connect(serve(data).url, deadline=60) as feed:
        dataset = feed["medium"]
        np.testing.assert_array_equal(dataset.split_rows("test", test=9000), np.sort(test))
        np.testing.assert_array_equal(dataset.split_rows("train", test=9000), np.sort(rest))
        by_patient = dataset.splits(test=0.25, group="patient")
        assert by_patient["splits"]["test"]["groups"] == MEDIUM // 16


def test_a_job_outlives_its_worker(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """SIGKILL to the worker that divides: the next one that is asked goes on, and no caller notices."""
    server = serve(data, "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed, ThreadPoolExecutor(2) as threads:
        dataset = feed["many"]
        told: list[tuple[int, int]] = []
        waiting = threads.submit(dataset.splits, progress=lambda *state: told.append(state), timeout=150, **DIVIDED)
        batch = threads.submit(
            dataset.batch, 3, split="train", batch_size=8, fields=["labels"], shuffle=True, **DIVIDED
        )
        wait_until(lambda: bool(server.working_pids()))
        killed = server.working_pids()[0]
        os.kill(killed, signal.SIGKILL)
        assert waiting.result(150)["splits"]["val"]["rows"] == ROWS // 10
        assert killed not in server.worker_pids()
        assert len(batch.result(150).rows) == 8
    assert all(done <= total for done, total in told)


def test_batches_wait_for_their_split(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """Longer than the server answers: 503 with Retry-After and how far it is; a client has its batch in the end."""
    server = serve(data, "--workers", "2", H5FEED_READ_TIMEOUT="1")
    query: dict[str, Any] = {**DIVIDED, "split": "train", "batch_size": 8, "fields": "labels"}
    options: dict[str, Any] = query | {"fields": ["labels"]}
    splits = "/v1/datasets/many/splits"
    soon = {"prefer": "wait=0"}
    with httpx.Client(base_url=server.url, timeout=60) as one, httpx.Client(base_url=server.url, timeout=60) as two:
        # A connection to each worker. What one of them is at does not end while it is held, however fast the machine.
        wait_until(lambda: one.get("/v1/datasets/many/batches/0").status_code == 200)
        wait_until(lambda: two.get("/v1/datasets/many/batches/0").status_code == 200)
        assert two.get(splits, params=DIVIDED, headers=soon).status_code == 202
        (at_work,) = server.working_pids()
        os.kill(at_work, signal.SIGSTOP)
        try:
            for path in ("plan", "batches/0", "batches?start=0&stop=2"):
                answer = one.get(httpx.URL(f"/v1/datasets/many/{path}").copy_merge_params(query))
                assert (answer.status_code, answer.json()["code"]) == (503, "overloaded"), answer.text
                assert int(answer.headers["retry-after"]) >= 1
                assert "'many' is being computed" in answer.json()["detail"]
                assert "the server goes on" in answer.json()["detail"]
        finally:
            os.kill(at_work, signal.SIGCONT)
        with h5feed.connect(server.url, deadline=60) as feed:
            dataset = feed["many"]
            assert len(dataset.batch(0, **options).rows) == 8
            for seed in range(16):
                # These come first, whichever worker is asked.
                ahead = (one, two)[seed % 2].get(splits, params=DIVIDED | {"split_seed": 100 + seed}, headers=soon)
                assert ahead.status_code == 202
            with pytest.raises(ReadTimeout, match=r"splits are not ready after 0.2 s .*try again later"):
                dataset.splits(test=0.3, timeout=0.2)


def test_what_is_wrong_is_said(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """Errors of a job are those of a request, for whoever waits for it, each time."""
    with h5feed.connect(serve(data).url, deadline=60) as feed:
        dataset = feed["medium"]
        for _ in range(2):
            with pytest.raises(SplitImpossible, match="class 1 has only 1 row"):
                dataset.splits(test=0.1, stratify="lonely")
            with pytest.raises(SplitImpossible, match="class 1 has only 1 row"):
                dataset.batch(0, split="train", test=0.1, stratify="lonely")
            with pytest.raises(SplitImpossible, match="class 1 has only 1 row"):
                dataset.stats("train", field="labels", test=0.1, stratify="lonely")
        with pytest.raises(FieldNotFound, match="lonely"):
            dataset.splits(test=0.1, stratify="nix")
        with pytest.raises(SplitNotFound, match="train, test"):
            dataset.split_rows("val", test=0.1)


def test_other_ways_to_rows(
    data: Path, serve: Callable[..., ServerProcess], medium_labels: np.ndarray[Any, Any]
) -> None:
    """Statistics, balanced epochs and plots of rows that have yet to be divided."""
    server = serve(data, "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed["medium"]
        stats = dataset.stats("val", field="labels", val=0.5, split_seed=3)
        assert stats.rows == MEDIUM // 2
        assert stats.mean == pytest.approx(medium_labels[dataset.split_rows("val", val=0.5, split_seed=3)].mean())
        batch = dataset.batch(0, batch_size=9, balance=True, shuffle=True, stratify="lonely", fields=["lonely"])
        assert sorted(np.bincount(batch["lonely"])) == [4, 5]
    plot = httpx.get(f"{server.url}/v1/datasets/medium/stats/plot?test=0.2&format=txt", timeout=60)
    assert plot.status_code == 200 and "test" in plot.text


def test_no_cache_folder(data: Path, serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Where nothing can be kept on disk, each worker divides rows once for itself."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    server = serve(data, "--cache-dir", str(blocked / "below"))
    with h5feed.connect(server.url, deadline=60) as feed:
        report = feed["medium"].splits(test=0.5)
        assert report["splits"]["test"]["rows"] == MEDIUM // 2
        assert feed["medium"].splits(test=0.5) == report


def test_a_server_that_stops(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """A server that is stopped does not finish first."""
    server = serve(data)
    answer = httpx.get(
        f"{server.url}/v1/datasets/many/splits", params=DIVIDED, headers={"prefer": "wait=0"}, timeout=30
    )
    assert answer.status_code == 202
    assert server.stop() == 0
    assert server.unfinished_jobs() == ["splits"]


def test_documented(server: ServerProcess) -> None:
    """The OpenAPI page tells of the job and how to wait for it."""
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    for path in ("splits", "splits/{split}/rows"):
        operation = paths[f"/v1/datasets/{{name}}/{path}"]["get"]
        assert "Location" in operation["responses"]["202"]["description"]
        assert "wait=5" in next(one for one in operation["parameters"] if one["name"] == "prefer")["description"]
