"""Loops of one's own: passes, where they are left and taken up again, and what is fetched ahead of them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5feed
import numpy as np
import pytest
from h5feed.errors import BadParameter, RevisionChanged
from h5feed.jax import to_device
from h5feed.loops.loader import Loader

from tests.support.data_folder import ROWS
from tests.support.listener import Listener, hand_on
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ORDER: dict[str, Any] = {"batch_size": 64, "shuffle": True, "seed": 5}


def loader(feed: h5feed.Feed, **options: Any) -> Loader:
    return feed["mixed"].loader(**{**ORDER, "x": "images", "y": "lzf", **options})


def rows_of(feed: h5feed.Feed, epoch: int, **options: Any) -> list[int]:
    """What the server says of the order; the field `lzf` holds the row ids."""
    batches = feed["mixed"].batches(**{**ORDER, "fields": [], "epoch": epoch, **options})
    return [row for batch in batches for row in batch.rows.tolist()]


def delivered(batches: Any) -> list[int]:
    return [row for _, y, *_ in batches for row in y.tolist()]


@pytest.mark.parametrize("options", [{}, {"last": "pad"}, {"last": "drop"}, {"shard": 1, "shards": 2}])
@pytest.mark.parametrize("cached", [False, True])
def test_each_pass_has_its_order(feed: h5feed.Feed, tmp_path: Path, options: dict[str, Any], cached: bool) -> None:
    """Pass e of a loader is epoch e of the order, whole and in order."""
    with loader(feed, cache=tmp_path if cached else None, **options) as train:
        for epoch in range(3):
            assert train.epoch == epoch
            got = delivered(train)
            assert got == rows_of(feed, epoch, **options)
        assert len(train) == -(-len(got) // 64)


def test_passes_that_are_alike(feed: h5feed.Feed) -> None:
    """Without shuffle each pass is ascending, and what was read ahead for the next one is used."""
    with loader(feed, shuffle=False) as rows:
        for _ in range(3):
            assert delivered(rows) == list(range(ROWS))
        assert rows.epoch == 3


def test_a_pass_left_early(feed: h5feed.Feed) -> None:
    """It is over: the next loop is the next pass. An old loop that goes on is told so."""
    with loader(feed) as train:
        old = iter(train)
        next(old)
        assert delivered(train) == rows_of(feed, 1)
        with pytest.raises(RuntimeError, match="another pass"):
            next(old)
        train.set_epoch(7)
        assert delivered(train) == rows_of(feed, 7) and train.epoch == 8


def test_a_look_costs_no_pass(feed: h5feed.Feed) -> None:
    """An iterator that is made and dropped begins no pass, nor does it end the one that is under way."""
    with loader(feed) as train:
        iter(train), iter(train)
        assert train.epoch == 0
        under_way = iter(train)
        first = next(under_way)
        iter(train)
        assert delivered([first, *under_way]) == rows_of(feed, 0)


@pytest.mark.parametrize("taken", [0, 1, 9, 16])
def test_resuming(feed: h5feed.Feed, taken: int) -> None:
    """A loader that loads the state of another, through JSON, goes on with exactly what that had not delivered."""
    with loader(feed) as first, loader(feed) as second:
        delivered(first)
        got = []
        for number, (_, y) in enumerate(first):
            if number == taken:
                break
            got += y.tolist()
            state = first.state_dict()
        if not taken:
            return
        second.load_state_dict(json.loads(json.dumps(state)))
        if taken < len(first):
            assert (state["epoch"], state["delivered"]) == (1, taken)
            got += delivered(second)
            assert got == rows_of(feed, 1)
        assert delivered(second) == rows_of(feed, 2)


def test_resuming_with_other_shards(feed: h5feed.Feed) -> None:
    """At a step boundary two shards may become four of half the size: together they go on in the global order."""
    parts = []
    for shard in range(2):
        train = loader(feed, batch_size=50, shard=shard, shards=2)
        passing = iter(train)
        parts.append([next(passing)[1] for _ in range(4)])
        state = train.state_dict()
        train.close()
    got = [row for step in zip(*parts, strict=True) for y in step for row in y.tolist()]
    later = []
    for shard in range(4):
        with loader(feed, batch_size=25, shard=shard, shards=4) as train:
            train.load_state_dict(state)
            later.append([y for _, y, _ in train])
    got += [row for step in zip(*later, strict=True) for y in step for row in y.tolist()]
    assert got == rows_of(feed, 0, batch_size=100)


def test_states_of_something_else(feed: h5feed.Feed) -> None:
    """The state of another order, revision or version is refused, with what differs."""
    with loader(feed) as train:
        state = train.state_dict()
        with pytest.raises(BadParameter, match="seed=5, but here seed=6"):
            loader(feed, seed=6).load_state_dict(state)
        with pytest.raises(BadParameter, match="64 rows per step, but here a step has 32"):
            loader(feed, batch_size=32).load_state_dict(state)
        with pytest.raises(RevisionChanged, match="restart the pass"):
            train.load_state_dict({**state, "revision": "0" * 16})
        with pytest.raises(BadParameter, match="version 99"):
            train.load_state_dict({**state, "version": 99})
        with pytest.raises(BadParameter, match="not a state"):
            train.load_state_dict({"epoch": 1})
        with pytest.raises(BadParameter, match="17 of 16 batches"):
            train.load_state_dict({**state, "delivered": 17})


def test_what_a_model_is_given(feed: h5feed.Feed) -> None:
    """Class modes, scaling and transforms are those of a Sequence; fields= is not an option."""
    with loader(feed, y="labels", class_mode="categorical", rescale=1 / 255, last="pad") as train:
        x, y, weight = next(iter(train))
        assert (x.dtype, x.shape, y.shape, weight.shape) == (np.float32, (64, 12, 10, 3), (64, 4), (64,))
        assert x.min() >= 0 and x.max() <= 1
    with pytest.raises(BadParameter, match="x=, y="):
        loader(feed, fields=["images"])
    with pytest.raises(BadParameter, match="unknown option 'shufle'"):
        loader(feed, shufle=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"readahead": 0}, "^readahead=0 must be a number of bytes, 1 or more"),
        ({"readahead": "64MB"}, "^readahead='64MB' must be a number of bytes"),
        ({"connections": 0}, "^connections=0 must be 1 or more"),
        ({"connections": "2"}, "^connections='2' must be 1 or more"),
    ],
)
def test_limits_that_cannot_be(feed: h5feed.Feed, options: dict[str, Any], said: str) -> None:
    """The message names the one that is wrong, alone."""
    with pytest.raises(BadParameter, match=said):
        next(iter(loader(feed, **options)))


def test_the_rank_is_picked_up(feed: h5feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """``shard="auto"`` asks for the share of this rank."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with loader(feed, shard="auto") as train:
        assert delivered(train) == rows_of(feed, 0, shard=1, shards=2)


def test_threads_end(feed: h5feed.Feed) -> None:
    """Dropped or closed, a loader leaves no thread."""

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("h5feed-")} - before

    before: set[threading.Thread] = set()
    before = threads()
    train = loader(feed)
    next(iter(train))
    assert threads()
    train.close()
    wait_until(lambda: not threads())
    next(iter(train))
    del train
    wait_until(lambda: not threads())


class Gate:
    """A TCP proxy that hands on nothing to the server while it is closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = threading.Event()
        self._open.set()
        self._listener = Listener(self._serve)
        self.url = self._listener.url

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def close(self) -> None:
        self._listener.close()

    def _serve(self, near: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as far:
            threading.Thread(target=hand_on, args=(far, near), daemon=True).start()
            with contextlib.suppress(OSError):
                while content := near.recv(1 << 16):
                    self._open.wait()
                    far.sendall(content)


@pytest.fixture
def gate(server: ServerProcess) -> Iterator[Gate]:
    proxy = Gate(server.port)
    yield proxy
    proxy.close()


def test_later_epochs_do_not_wait_for_the_server(gate: Gate, feed: h5feed.Feed, tmp_path: Path) -> None:
    """With everything in the cache, a pass needs no answer that was not asked for in the pass before."""

    def is_asked_ahead() -> bool:
        return not any(thread.name == "h5feed-row-ids" for thread in threading.enumerate())

    with h5feed.connect(gate.url, deadline=60) as behind, loader(behind, cache=tmp_path, readahead=1) as train:
        for epoch in range(2):
            assert delivered(train) == rows_of(feed, epoch)
        for epoch in (2, 3, 4):
            wait_until(is_asked_ahead)
            with gate.closed():
                assert delivered(train) == rows_of(feed, epoch)


@pytest.mark.parametrize("ahead", [0, 1, 5, 100])
def test_on_a_device(feed: h5feed.Feed, ahead: int) -> None:
    """JAX arrays of all batches, in order; memory that is recycled meanwhile does not show in them."""
    jax = pytest.importorskip("jax")
    with loader(feed) as train:
        train.set_epoch(3)
        held = list(to_device(train, ahead=ahead))
        delivered(train)
        assert [row for _, y in held for row in np.asarray(y).tolist()] == rows_of(feed, 3)
        for x, y in held:
            assert isinstance(x, jax.Array)
            np.testing.assert_array_equal(x, feed["mixed"].take(np.asarray(y), fields=["images"])["images"])


def test_on_several_devices(feed: h5feed.Feed) -> None:
    """A sharding spreads each batch; a Batch becomes a dict."""
    jax = pytest.importorskip("jax")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batches = feed["mixed"].batches(**ORDER, last="drop", fields=["images", "lzf"])
    got = list(to_device(batches, device=sharding))
    assert got[0]["images"].sharding == sharding
    assert [row for batch in got for row in np.asarray(batch["lzf"]).tolist()] == rows_of(feed, 0, last="drop")
    with pytest.raises(BadParameter, match="ahead=-1"):
        to_device([], ahead=-1)
