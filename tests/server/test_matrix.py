"""Filters × layouts × dtypes over HTTP: every cell as h5py reads it, in order, shuffled, with duplicates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import pytest

from tests.support.matrix import FILTERS, check_cells, write_matrix
from tests.support.object_store import serve_folder
from tests.support.server_process import ServerProcess

STORE = "object store"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("buckets") / "matrix" / "matrix.h5"
    path.parent.mkdir()
    write_matrix(path)
    return path


@pytest.fixture(scope="module", params=["cached", "uncached", STORE])
def dataset(
    path: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[h5feed.Dataset]:
    sizes = {} if request.param == "cached" else {"H5FEED_CACHE_BYTES": "0", "H5FEED_CHUNK_CACHE_BYTES": "0"}
    cache = tmp_path_factory.mktemp("cache")
    with contextlib.ExitStack() as stack:
        if request.param == STORE:
            pytest.importorskip("obstore")
            pytest.importorskip("hadro")
            store = serve_folder(path.parent.parent)
            stack.callback(store.stop)
            process = ServerProcess("s3://matrix", cache, **sizes, **store.environment)
        else:
            process = ServerProcess(path.parent, cache, **sizes)
        stack.callback(process.stop)
        feed = stack.enter_context(h5feed.connect(process.url, deadline=60))
        yield feed["matrix"]
        assert process.stop() == 0


@pytest.mark.parametrize("name", FILTERS)
def test_every_cell(dataset: h5feed.Dataset, path: Path, name: str) -> None:
    """See `check_cells`."""
    check_cells(dataset, path, name)


def test_ranges(dataset: h5feed.Dataset, path: Path) -> None:
    """Steps skip rows; negative ones are refused with what would be right."""
    base = f"{dataset._client.url}/v1/datasets/matrix/rows"
    params: dict[str, Any] = {"start": 3, "stop": 50, "step": 7, "fields": "gzip-parts-i2", "format": "npy"}
    answer = httpx.get(base, params=params, timeout=60)
    with h5py.File(path) as file:
        expected = file["gzip-parts-i2"][3:50:7]
    assert answer.content.endswith(expected.tobytes())
    refused = httpx.get(base, params={**params, "step": -1}, timeout=60)
    assert refused.status_code == 400
    assert "step=-1" in refused.json()["detail"]
