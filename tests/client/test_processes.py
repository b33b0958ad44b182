"""Loops that are copied into other processes, that are forked, and whose process ends in the middle of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
import operator
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.cache.locks import exclusive

from tests.support.photographs import encoded, photograph
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 50
BATCH = 4
SECONDS = 60
"""Deadline of whatever a process is waited for: starting one takes seconds on a busy machine."""

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """Serves `photos`: JPEGs, and the row's own id as its label."""
    folder = tmp_path_factory.mktemp("data")
    files = [encoded(photograph(row, 120, 160)) for row in range(ROWS)]
    with h5py.File(folder / "photos.h5", "w") as file:
        file["images"] = np.frombuffer(b"".join(files), np.uint8)
        file["images"].attrs.update({"encoding": "jpeg", "shape": (96, 96, 3), "resize": "aspect"})
        file["images.offsets"] = np.cumsum([0, *map(len, files)])
        file["labels"] = np.arange(ROWS)
    return serve_module(folder)


@pytest.fixture
def photos(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=30) as feed:
        yield feed["photos"]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[concurrent.futures.Executor]:
    """A process that is started afresh and knows of this one only what it is given."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(params=["loader", "sequence"])
def make(request: pytest.FixtureRequest, photos: h5feed.Dataset) -> Make:
    """Makes a loop of shuffled batches, decoded here."""

    def made(**options: Any) -> Any:
        quiet = {"verbose": False} if request.param == "sequence" else {}
        return getattr(photos, request.param)(
            batch_size=BATCH, shuffle=True, decode="client", readahead=BATCH * 96 * 96 * 3 * 4, **quiet, **options
        )

    return made


def ids(batches: Any) -> list[int]:
    """The rows that were delivered: their labels are their numbers."""
    return [int(label) for batch in batches for label in keras.ops.convert_to_numpy(batch[1])]


def golden(photos: h5feed.Dataset, epoch: int) -> list[int]:
    batches = photos.batches(batch_size=BATCH, shuffle=True, epoch=epoch, fields=[])
    return [row for batch in batches for row in batch.rows.tolist()]


@contextlib.contextmanager
def forked(work: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """What `work` returns in a child of a fork, to be asked for within this context."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    child = context.Process(target=lambda: sender.send(work()), daemon=True)
    with warnings.catch_warnings():
        # JAX says that its own threads do not survive this.
        warnings.simplefilter("ignore", RuntimeWarning)
        child.start()
    sender.close()

    def result() -> Any:
        assert receiver.poll(SECONDS), "the child hangs"
        found = receiver.recv()
        child.join(SECONDS)
        assert child.exitcode == 0
        return found

    try:
        yield result
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("cached", [False, True])
def test_a_copy_goes_on_elsewhere(
    photos: h5feed.Dataset, make: Make, elsewhere: concurrent.futures.Executor, tmp_path: Path, cached: bool
) -> None:
    """Pickled in the middle of a pass, the copy delivers the rest of it, and the original goes on untouched."""
    train = make(cache=tmp_path if cached else None)
    batches = iter(train)
    begun = [next(batches) for _ in range(3)]
    there = elsewhere.submit(list, train).result(SECONDS)
    here = list(batches)
    assert ids(begun + there) == ids(begun + here) == golden(photos, 0)
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(ours[0]), keras.ops.convert_to_numpy(theirs[0]))
    # Between passes a copy begins with the next one.
    assert ids(elsewhere.submit(list, train).result(SECONDS)) == ids(train) == golden(photos, 1)
    if cached:
        assert photos.cache(tmp_path).cached_rows == ROWS
    train.close()


def test_a_look_is_no_pass(photos: h5feed.Dataset) -> None:
    """A copy of a sequence that was only looked at begins with the first batch."""
    train = photos.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    x, _ = train[0]
    assert x.shape == (BATCH, 96, 96, 3)
    copy = pickle.loads(pickle.dumps(train))
    assert ids(copy) == golden(photos, 0)
    for one in (train, copy):
        one.close()


def test_transforms_travel(photos: h5feed.Dataset, elsewhere: concurrent.futures.Executor) -> None:
    """Functions that can be imported and Keras layers do, and augment alike there; a lambda is refused by pickle."""
    augmented = photos.sequence(batch_size=BATCH, transform=keras.layers.RandomFlip(seed=1), verbose=False)
    negative = photos.loader(batch_size=BATCH, transform=operator.invert)
    for train in (augmented, negative):
        there = elsewhere.submit(list, train).result(SECONDS)
        for (ours, _), (theirs, _) in zip(train, there, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs))
        train.close()
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(photos.loader(transform=lambda x: x))


def test_tokens_that_no_header_carries() -> None:
    """A header has printable ASCII characters only: others are named at once, and the token itself is not shown."""
    for token, odd in (("secret…", "'…'"), ("se\ncret", r"'\\n'")):
        with pytest.raises(h5feed.errors.BadParameter, match=f"^token .*ASCII.*{odd}$") as caught:
            h5feed.connect("http://127.0.0.1:8000", token=token)
        assert "cret" not in str(caught.value)


def test_the_token_travels(serve: Callable[..., ServerProcess], server: ServerProcess) -> None:
    """One that was given is in the pickle, so that a copy is let in; whoever keeps pickles keeps the token."""
    closed = serve(server.folder, H5FEED_TOKENS="secret")
    with h5feed.connect(closed.url, token="secret", deadline=30) as feed:
        pickled = pickle.dumps(feed["photos"].loader(batch_size=BATCH))
    assert b"secret" in pickled
    copy = pickle.loads(pickled)
    assert ids(copy) == list(range(ROWS))
    copy.close()


@pytest.mark.parametrize("cached", [False, True])
def test_a_fork_goes_on_and_so_does_the_parent(
    photos: h5feed.Dataset, make: Make, tmp_path: Path, cached: bool
) -> None:
    """Forked in the middle of a pass, both deliver the rest of it at the same time, over connections of their own."""
    train = make(cache=tmp_path if cached else None)
    batches = iter(train)
    begun = [next(batches) for _ in range(3)]
    with forked(lambda: [ids(batches), ids(train)]) as result:
        here = [ids(batches), ids(train)]
        assert result() == here
    assert [ids(begun) + here[0], here[1]] == [golden(photos, 0), golden(photos, 1)]
    train.close()


def test_a_lock_of_the_cache_ends_with_its_holder(tmp_path: Path) -> None:
    """A child that was forked while the folder was locked does not keep it locked."""
    release = multiprocessing.get_context("fork").Event()
    with contextlib.ExitStack() as stack:
        with exclusive(tmp_path / ".lock", 0.0) as mine:
            result = stack.enter_context(forked(lambda: release.wait(SECONDS)))
        with exclusive(tmp_path / ".lock", 0.0) as again:
            assert mine and again
        release.set()
        assert result()


def test_locks_held_at_a_fork(photos: h5feed.Dataset, make: Make, tmp_path: Path) -> None:
    """What threads of the parent hold when it forks, the child does not wait for."""
    train = make(rescale=1 / 255, cache=tmp_path)
    next(iter(train))
    client, cache = photos._client, photos.cache(tmp_path)
    held = [train._lock, train._meter._lock, train._prepare._pool._lock, client.pool._lock, client._servers._lock]
    held += [cache._lock, cache.row_ids._lock]
    for one in client._servers:
        held += [one._transport._lock, one._http.cookies.jar._cookies_lock]  # type: ignore[attr-defined]
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in held:
                stack.enter_context(lock)
            holding.set()
            release.wait(2 * SECONDS)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(SECONDS)
    try:
        with forked(lambda: (len(ids(train)), photos.splits()["splits"]["all"]["rows"], cache.cached_rows)) as result:
            assert result()[1:] == (ROWS, ROWS)
    finally:
        release.set()
        holder.join()
    train.close()


LOOP = """
import os, signal, sys, time
import h5feed
# Whoever runs the tests in the background has them ignore the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
url, kind, folder = sys.argv[1:4]
options = dict(batch_size=2, shuffle=True, decode="client", cache=folder)

def ready(number):
    if number == 3:
        print("ready", flush=True)
        {ends}

photos = h5feed.connect(url)["photos"]
if kind == "loader":
    train = photos.loader(**options)
    while True:
        for number, _ in enumerate(train):
            ready(number)
else:
    import keras
    train = photos.sequence(**options, verbose=False)
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(60)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    told = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ready(batch))
    model.fit(train, epochs=10**6, verbose=0, callbacks=[told])
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("ends", "code"),
    [("SIGINT", -signal.SIGINT), ("SIGTERM", -signal.SIGTERM), ("raise OSError('enough')", 1), ("sys.exit(3)", 3)],
)
@pytest.mark.parametrize("kind", ["loader", "sequence"])
def test_processes_end(
    server: ServerProcess, photos: h5feed.Dataset, tmp_path: Path, kind: str, ends: str, code: int
) -> None:
    """However a process ends in the middle of a pass, it ends, says nothing of threads, and leaves nothing in the way
    of the next one."""
    cache = tmp_path / "cache"
    by_signal = ends.startswith("SIG")
    # Keras drops a KeyboardInterrupt that comes while it waits for a step's logs: it is held where none is dropped.
    script = LOOP.replace("{ends}", f"time.sleep({2 * SECONDS})" if by_signal else ends)
    command = [sys.executable, "-c", script, server.url, kind, str(cache)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], SECONDS)[0], "it does not begin"
        if by_signal:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(getattr(signal, ends))
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, said
    assert "Exception in thread" not in said and "Exception ignored" not in said and "h5feed-" not in said, said
    assert "the cache folder" not in said, said
    with exclusive(cache / ".lock", 0.0) as free:
        assert free
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    train = photos.loader(batch_size=BATCH, shuffle=True, decode="client", cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(train) == golden(photos, 0)
    assert photos.cache(cache).cached_rows == ROWS
    train.close()


def test_what_is_dropped_ends(photos: h5feed.Dataset, make: Make, tmp_path: Path) -> None:
    """Dropped in the middle of a pass, a loop leaves no thread of ours, with a cache and decoding under way."""

    def ours() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("h5feed-")]

    # Errors of other tests may keep what raised them in reference cycles.
    gc.collect()
    wait_until(lambda: not ours())
    train = make(cache=tmp_path)
    batches = iter(train)
    next(batches)
    assert ours()
    del train, batches
    wait_until(lambda: not ours())


DECODING = """
import sys, time
import cv2, numpy
from h5feed.fetching.readahead import ReadAhead
from h5feed.blocks import blocks_of

begun = []

def fetch(block, cancelled):
    begun.append(block)
    cancelled.wait(30)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        cv2.resize(numpy.zeros((600, 600, 3), numpy.uint8), (1200, 1200), interpolation=cv2.INTER_CUBIC)
    print("done", flush=True)
    return []

stream = ReadAhead(fetch, blocks_of(0, 1, 1, 1), max_bytes=1, deadline=30)
while not begun:
    time.sleep(0.01)
sys.exit(3)
"""


def test_the_interpreter_waits_for_what_is_being_decoded() -> None:
    """A thread that is in a library of C++ when the interpreter ends would take the process down."""
    command = [sys.executable, "-c", DECODING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
