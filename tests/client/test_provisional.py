"""Clients of servers that have not hashed their files: they wait for the server whose name they have, and resume."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import BadParameter, ConnectionFailed, Preparing, RevisionChanged
from h5feed.net.names import Names
from h5feed.revisions import header_of, is_provisional, names_in

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 400

NEVER = {"H5FEED_PROVISIONAL_BYTES": "0", "H5FEED_DIGEST_RATE": "1"}
SOON = {"H5FEED_PROVISIONAL_BYTES": "0", "H5FEED_DIGEST_RATE": "0"}

ORDER: dict[str, Any] = {"batch_size": 8, "shuffle": True, "seed": 3}


def _values(rows: npt.NDArray[Any], version: int = 1) -> npt.NDArray[np.int32]:
    return (rows[:, None] * 64 + version).astype(np.int32) + np.zeros(100, np.int32)


def _write(path: Path, version: int = 1) -> None:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["x"] = _values(np.arange(ROWS), version)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    _write(tmp_path / "data" / "d.h5")
    return tmp_path / "data"


def _restart(server: ServerProcess, **environment: str) -> None:
    server.stop()
    server._environment |= environment
    server.start()


def _is_settled(dataset: h5feed.Dataset) -> bool:
    """Whether an answer has named the content."""
    dataset.take([0])
    return not is_provisional(dataset.revision)


def test_names_in_headers() -> None:
    """What a server tells is what a client learns; anything else is nothing."""
    assert names_in(header_of("prov-abc", None)) == ("prov-abc", None)
    assert names_in(header_of("prov-abc", "0123")) == ("prov-abc", "0123")
    assert names_in(None) is names_in("") is names_in("0123; content=4567") is None


def test_an_epoch_goes_on_when_the_content_is_known(serve: Callable[..., ServerProcess], data: Path) -> None:
    """Each row once, right, in the same order; the client asks for the content as soon as an answer names it."""
    server = serve(data, **NEVER)
    with h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed["d"]
        provisional = dataset.revision
        assert is_provisional(provisional)
        order = [batch.rows.tolist() for batch in dataset.batches(**ORDER)]
        seen, names = [], set()
        for number, batch in enumerate(dataset.batches(**ORDER, readahead=5000, connections=1)):
            np.testing.assert_array_equal(batch["x"], _values(batch.rows))
            seen.append(batch.rows.tolist())
            names.add(batch.revision)
            if number == 4:
                _restart(server, **SOON)
            if number > 4 and len(names) == 1:
                # It is hashed in the background: leave it the time for that.
                wait_until(lambda: _is_settled(dataset))
        assert seen == order and sorted(row for rows in seen for row in rows) == list(range(ROWS))
        assert names == {provisional, dataset.revision} and not is_provisional(dataset.revision)
        assert feed["d"].revision == dataset.revision


@pytest.fixture
def replicas(serve: Callable[..., ServerProcess], data: Path, tmp_path: Path) -> list[ServerProcess]:
    """The first has hashed its files, the second never will."""
    shutil.copytree(data, tmp_path / "copy")
    servers = [serve(data), serve(tmp_path / "copy", **NEVER)]
    for server in servers:
        with h5feed.connect(server.url, deadline=60) as feed:
            feed["d"].take([0])
    return servers


def test_the_other_server_is_not_asked(replicas: list[ServerProcess]) -> None:
    """With a provisional name the client waits for the server that gave it, then fails over by content."""
    knows, late = replicas
    with h5feed.connect(f"{late.url},{knows.url}", deadline=3) as feed:
        dataset = feed["d"]
        provisional = dataset.revision
        assert is_provisional(provisional)
        # Not by turns, as with all else.
        for _ in range(4):
            assert dataset.batch(0, **ORDER).revision == provisional
        late.kill()
        with pytest.raises(ConnectionFailed, match=late.url) as raised:
            dataset.batch(1, **ORDER)
        assert "only this one knows the provisional revision" in "".join(raised.value.__notes__)
        assert knows.url not in str(raised.value)
        assert dataset.revision == provisional
    with h5feed.connect(f"{late.url},{knows.url}", deadline=90) as feed:
        # As a training loop in another process would go on.
        again = pickle.loads(pickle.dumps(dataset))
        again._client.deadline = 90
        got: list[Any] = []
        waiting = threading.Thread(target=lambda: got.append(again.batch(1, **ORDER)), daemon=True)
        waiting.start()
        time.sleep(1)
        assert waiting.is_alive() and not got
        late._environment |= SOON
        late.start()
        waiting.join(90)
        np.testing.assert_array_equal(got[0]["x"], _values(got[0].rows))
        wait_until(lambda: _is_settled(again))
        assert again.revision == h5feed.connect(knows.url)["d"].revision
        late.kill()
        for index in range(4):
            batch = again.batch(index, **ORDER)
            np.testing.assert_array_equal(batch["x"], _values(batch.rows))
            assert batch.revision == again.revision
        again._client.close()


def test_content_is_asked_of_the_server_that_knows_it(replicas: list[ServerProcess]) -> None:
    """A server that has not hashed its files says so at once, and the other one answers."""
    knows, late = replicas
    with h5feed.connect(knows.url, deadline=60) as feed:
        revision = feed["d"].revision
    with h5feed.connect(f"{late.url},{knows.url}", deadline=60) as feed:
        for _ in range(3):
            plan = feed._client.json("/v1/datasets/d/plan", {"revision": revision, "batch_size": "8"})
            assert plan["revision"] == revision
    with (
        h5feed.connect(late.url, deadline=2) as feed,
        pytest.raises(Preparing, match="until its files have been hashed"),
    ):
        feed._client.json("/v1/datasets/d/plan", {"revision": revision, "batch_size": "8"})


def test_who_gave_a_name_is_found_out(replicas: list[ServerProcess]) -> None:
    """A name from elsewhere is asked of each server; if none knows it, that is the error."""
    knows, late = replicas
    with h5feed.connect(late.url, deadline=60) as feed:
        provisional = feed["d"].revision
    with h5feed.connect(f"{knows.url},{late.url}", deadline=60) as feed:
        for _ in range(3):
            assert feed._client.json("/v1/datasets/d", {"revision": provisional})["revision"] == provisional
        with pytest.raises(RevisionChanged, match="provisional name"):
            feed._client.json("/v1/datasets/d", {"revision": "prov-aaaaaaaaaaa"})


def _some(dataset: h5feed.Dataset, batches: int) -> tuple[dict[str, Any], list[list[int]]]:
    """The state after some batches, and the rows of all batches of the pass."""
    loader = dataset.loader("all", **ORDER, x="x", y=None)
    stream = iter(loader)
    for _ in range(batches):
        next(stream)
    return loader.state_dict(), [batch.rows.tolist() for batch in dataset.batches(**ORDER)]


def _rest(dataset: h5feed.Dataset, state: dict[str, Any]) -> list[list[int]]:
    """The rows of the rest of the pass, by their values."""
    loader = dataset.loader("all", **ORDER, x="x", y=None)
    loader.load_state_dict(state)
    return [((np.asarray(_inputs(batch))[:, 0] - 1) // 64).tolist() for batch in loader]


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple) else batch


def test_a_saved_state_is_resumed(serve: Callable[..., ServerProcess], data: Path) -> None:
    """Under the provisional name, after a restart of the server, and when the content is known; not with other data."""
    server = serve(data, **NEVER)
    with h5feed.connect(server.url, deadline=60) as feed:
        state, order = _some(feed["d"], 5)
        assert is_provisional(state["revision"])
        assert _rest(feed["d"], state) == order[5:]
        _restart(server)
        assert _rest(feed["d"], state) == order[5:]
    _restart(server, **SOON)
    with h5feed.connect(server.url, deadline=60) as feed:
        wait_until(lambda: _is_settled(feed["d"]))
        dataset = feed["d"]
        assert not is_provisional(dataset.revision)
        assert _rest(dataset, state) == order[5:]
        later, _ = _some(dataset, 7)
        assert later["revision"] == dataset.revision
    # The cache folder is lost, so the name is provisional again.
    server.stop()
    shutil.rmtree(server.cache_dir)
    server.start()
    with h5feed.connect(server.url, deadline=60) as feed:
        assert _rest(feed["d"], later) == order[7:]
        assert _rest(feed["d"], state) == order[5:]
    _write(data / "new.tmp", 2)
    os.replace(data / "new.tmp", data / "d.h5")
    with h5feed.connect(server.url, deadline=60) as feed:
        for old in (state, later):
            with pytest.raises(RevisionChanged, match="the state was saved with 'd'"):
                _rest(feed["d"], old)
        # What the name stood for is not known any more.
        _restart(server)
        with pytest.raises(RevisionChanged, match="is a provisional name, which a server gives before"):
            _rest(feed["d"], state)


def test_a_state_waits_for_the_content(serve: Callable[..., ServerProcess], data: Path) -> None:
    """A state with the content's name says nothing about a server that has not hashed its files."""
    with h5feed.connect(serve(data).url, deadline=60) as feed:
        state, _ = _some(feed["d"], 3)
    with h5feed.connect(serve(data, **NEVER).url, deadline=60) as feed:
        dataset = feed["d"]
        feed._client.deadline = 5
        with pytest.raises(Preparing, match="has hashed"):
            _rest(dataset, state)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix == ".rows"]


def test_rows_are_cached_when_the_content_is_known(
    serve: Callable[..., ServerProcess], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing in the folder of a cache has a provisional name, and whoever wants a cache is told why there is none."""
    server, cache = serve(data, **NEVER), tmp_path / "rows"
    with h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed["d"]
        for batch in dataset.batches(**ORDER, cache=cache):
            np.testing.assert_array_equal(batch["x"], _values(batch.rows))
        assert not cache.exists()
        assert "not cached yet" in caplog.text and dataset.revision in caplog.text
        feed._client.deadline = 5
        with pytest.raises(Preparing, match="has hashed 0 of"):
            dataset.cache(cache)
        feed._client.deadline = 60
        began = dataset.batches(**ORDER, cache=cache, readahead=5000, connections=1)
        next(began)
        _restart(server, **SOON)
        wait_until(lambda: _is_settled(dataset))
        for batch in began:
            np.testing.assert_array_equal(batch["x"], _values(batch.rows))
        # Those that came after it was known.
        assert 0 < dataset.cache(cache).cached_rows < ROWS or _files(cache)
        for batch in dataset.batches(**ORDER, cache=cache):
            np.testing.assert_array_equal(batch["x"], _values(batch.rows))
        assert _files(cache) and not [path for path in cache.rglob("*") if "prov" in path.name]
        own = dataset.cache(cache)
        assert own.revision == dataset.revision
        with pytest.raises(BadParameter, match="belongs to"):
            own.check("d", "prov-aaaaaaaaaaa")


def test_names_are_bounded() -> None:
    """A client that runs for years does not keep every name it was told."""
    names = Names()
    for number in range(12_000):
        names.learn(header_of(f"prov-{number}", None), object())  # type: ignore[arg-type]
    assert len(names._known) == 10_000
    assert names.server_of("prov-0") is None and names.server_of("prov-11999") is not None
