"""What a training loop waits for: each cause, brought about on purpose, is the one that is named."""

from __future__ import annotations

import contextlib
import csv
import gc
import math
import os
import pickle
import re
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.errors import BadParameter
from h5feed.keras import WaitMonitor
from h5feed.loops.meter import Meter
from h5feed.loops.wait_stats import BINS, LoopStats
from h5feed.net.trace import DECODE, TRANSFER, WAITING, Trace, clock
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess
from tests.support.slow_link import Line

BACKEND = keras.backend.backend()
ROWS = 96
BATCH = 16
BATCHES = 6
BATCH_BYTES = BATCH * 40 * 40 * 3
RATE = 3 * BATCH_BYTES
PARTS = ("waiting", "transfer", "decode")


@pytest.fixture(scope="module")
def pictures_server(
    tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> ServerProcess:
    folder = tmp_path_factory.mktemp("pictures")
    with h5py.File(folder / "pictures.h5", "w") as file:
        file["image"] = np.random.default_rng(0).integers(0, 256, (ROWS, 40, 40, 3), np.uint8)
        file["label"] = np.arange(ROWS) % 3
    return serve_module(folder)


Far = Callable[..., h5feed.Dataset]


@pytest.fixture
def far(pictures_server: ServerProcess) -> Iterator[Far]:
    """Gives the dataset behind a line with a delay, in seconds each way, or a rate, in bytes per second."""
    with contextlib.ExitStack() as opened:

        def connect(**line: float) -> h5feed.Dataset:
            proxy = Line(pictures_server.port, **line)
            opened.callback(proxy.close)
            return opened.enter_context(h5feed.connect(proxy.url, deadline=60))["pictures"]

        yield connect


@pytest.fixture
def near(pictures_server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(pictures_server.url, deadline=60) as feed:
        yield feed["pictures"]


ONE_BY_ONE: dict[str, Any] = {"batch_size": BATCH, "connections": 1, "readahead": BATCH_BYTES}
"""Each batch is a request of its own, and is asked for when the one before is done with: whatever is slow shows."""


def run(loop: Any, step: float = 0.0) -> float:
    """One pass, with steps of so many seconds; returns the seconds in which it was held up, as the loop sees them."""
    held_up, batches = 0.0, iter(loop)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        held_up += time.perf_counter() - asked
        if batch is None:
            return held_up
        time.sleep(step)


def assert_mostly(stats: LoopStats, name: str) -> None:
    """That part is more than all others together, and they add up."""
    assert stats.waited == stats.waiting + stats.transfer + stats.decode
    assert stats[name] > sum(stats[other] for other in PARTS if other != name), stats


def small_model() -> Any:
    model = keras.Sequential([keras.Input((40, 40, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class SlowSteps(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        time.sleep(self._seconds)


def test_a_server_that_is_slow_to_answer(far: Far) -> None:
    """It is what the loop waits for, all the time that the loop sees."""
    with far(delay=0.1).loader(**ONE_BY_ONE) as train:
        held_up = run(train)
        stats = train.stats()
    assert_mostly(stats, "waiting")
    assert stats.waiting >= 0.9 * BATCHES * 0.2
    # Little time is lost between the loop's clock and ours, and none is made up.
    assert 0.5 * held_up <= stats.waited <= held_up
    assert stats.waited <= stats.seconds and stats.compute == stats.seconds - stats.waited
    assert (stats.passes, stats.steps, stats.rows) == (1, BATCHES, ROWS)
    assert "--workers" in stats.advice() and stats.advice() in repr(stats)


def test_a_link_that_is_slow(far: Far) -> None:
    """Its time is that of the transfer."""
    with far(rate=RATE).loader(**ONE_BY_ONE) as train:
        run(train)
        stats = train.stats()
    assert_mostly(stats, "transfer")
    assert stats.bytes >= BATCHES * BATCH_BYTES
    assert stats.bytes_per_second < 2 * RATE
    assert "link" in stats.advice()
    # Over a Unix socket, there is none that could be slow; and of the first moments, nothing can be said.
    assert "--workers" in replace(stats, via="Unix socket /run/h5feed/socket").advice()
    assert not replace(stats, seconds=0.1).advice()


@pytest.mark.parametrize("kind", ["loader", "sequence", "torch"])
def test_a_transform_that_is_slow(near: h5feed.Dataset, kind: str) -> None:
    """Its time is that of decoding, by preparing, whatever the loop."""

    def transform(x: Any, y: Any) -> Any:
        time.sleep(0.1)
        return x, y

    if kind == "torch":
        pytest.importorskip("torch")
    options: dict[str, Any] = {"verbose": False} if kind == "sequence" else {}
    train = getattr(near, kind)(batch_size=BATCH, transform=transform, **options)
    run(train)
    stats = train.stats()
    assert_mostly(stats, "decode")
    assert stats.decode >= stats.preparing >= 0.1 * BATCHES
    assert stats.utilisation < 0.5 and "transform" in stats.advice()
    assert stats.median >= 0.09 and stats.p95 <= stats.longest
    if kind != "torch":
        train.close()


def test_a_slow_step_waits_for_nothing(near: h5feed.Dataset) -> None:
    """What comes next is there when a step is done: the first batch apart, there is no wait to speak of."""
    with near.loader(batch_size=BATCH) as train:
        run(train, 0.2)
        stats = train.stats()
    assert stats.compute >= 0.2 * BATCHES
    # Of all steps but the first.
    assert stats.utilisation > 0.5


def test_what_is_between_passes_is_no_part_of_them(near: h5feed.Dataset) -> None:
    """Neither is the rest of a pass that was left early; the last pass is told apart from all."""
    with near.loader(batch_size=BATCH) as train:
        began = time.perf_counter()
        for _ in range(2):
            run(train)
            time.sleep(0.5)
        for _ in train:
            break
        time.sleep(0.5)
        stats = train.stats()
        assert stats.seconds <= time.perf_counter() - began - 1.5
    assert (stats.passes, stats.steps, stats.rows) == (3, 2 * BATCHES + 1, 2 * ROWS + BATCH)
    assert stats.last is not None and (stats.last.passes, stats.last.steps) == (1, 1)
    assert math.isnan(stats.last.utilisation) and not stats.last.advice()


def test_requests_that_are_sent_again(pictures_server: ServerProcess, serve: Callable[..., ServerProcess]) -> None:
    """While a server is killed and started again: they are counted, and that time is waited for the server."""
    server = serve(pictures_server.folder)
    with h5feed.connect(server.url, deadline=60) as feed, feed["pictures"].loader(**ONE_BY_ONE) as train:
        batches = iter(train)
        next(batches)
        server.kill()
        starting = threading.Thread(target=server.start)
        starting.start()
        assert len(list(batches)) == BATCHES - 1
        starting.join()
        stats = train.stats()
    assert stats.retries >= 1 and (stats.steps, stats.rows) == (BATCHES, ROWS)
    assert_mostly(stats, "waiting")


def test_rows_of_the_local_cache(near: h5feed.Dataset, tmp_path: Path) -> None:
    """They are counted, and no bytes of images come for them."""
    with near.loader(batch_size=BATCH, cache=tmp_path) as train:
        for _ in range(2):
            run(train)
        run(train)
        stats = train.stats()
    assert stats.last is not None
    assert stats.last.cached == ROWS and stats.last.bytes < BATCH_BYTES
    assert stats.bytes > BATCHES * BATCH_BYTES


def test_training_and_validation_are_told_apart(near: h5feed.Dataset, far: Far) -> None:
    """A slow validation is none of training's waiting, nor is one of the same sequence."""
    train = near.sequence(batch_size=BATCH, verbose=False)
    val = far(delay=0.15).sequence(**ONE_BY_ONE, verbose=False)
    model = small_model()
    history = model.fit(
        train, validation_data=val, epochs=2, verbose=0, callbacks=[SlowSteps(0.1), WaitMonitor(train, verbose=False)]
    ).history
    stats, evaluated = train.stats(), val.stats()
    assert (stats.passes, stats.steps) == (2, 2 * BATCHES)
    assert (evaluated.passes, evaluated.steps) == (2, 2 * BATCHES) and val.stats("fit").steps == 0
    # The first batches of all are waited for; afterwards none is.
    assert history["feed_waited"][1] < 0.5 < history["feed_utilisation"][1]
    assert_mostly(evaluated, "waiting")
    assert val.waited == evaluated.waited
    model.evaluate(train, verbose=0)
    assert train.stats().steps == 2 * BATCHES and train.stats("evaluate").steps == BATCHES
    wrong: Any = "predict"
    with pytest.raises(BadParameter, match="of='predict' must be 'fit' or 'evaluate'"):
        train.stats(wrong)
    train.close()
    val.close()


@pytest.mark.parametrize(
    ("cause", "line", "seconds", "advice"),
    [
        ("waiting", {"delay": 0.1}, 0.0, "server"),
        ("transfer", {"rate": RATE}, 0.0, "link"),
        ("decode", {}, 0.2, "transform"),
    ],
)
def test_the_callback_tells_why(
    far: Far,
    cause: str,
    line: dict[str, float],
    seconds: float,
    advice: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """History, CSVLogger, TensorBoard and the printed line all have the shares, and the line says what to do."""

    def transform(x: Any, y: Any) -> Any:
        time.sleep(seconds)
        return x, y

    train = far(**line).sequence(**ONE_BY_ONE, shuffle=True, transform=transform, verbose=False)
    monitor = WaitMonitor(train, log_dir=tmp_path / "events")
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    model = small_model()
    model.fit(train, epochs=1, verbose=0)
    capsys.readouterr()
    history = model.fit(train, epochs=2, verbose=0, callbacks=[monitor, log]).history
    shares = {name: history[f"feed_{name}"] for name in (*PARTS, "waited", "utilisation")}
    for epoch in range(2):
        parts = {name: shares[name][epoch] for name in PARTS}
        assert max(parts, key=parts.__getitem__) == cause
        assert sum(parts.values()) == pytest.approx(shares["waited"][epoch])
        assert shares["waited"][epoch] > 0.5 > shares["utilisation"][epoch]
    with (tmp_path / "log.csv").open() as file:
        logged = [float(line["feed_waited"]) for line in csv.DictReader(file)]
    assert logged == pytest.approx(shares["waited"])
    written = scalars_in(tmp_path / "events")
    assert {name for name in written if name.startswith("feed/")} == {
        *(f"feed/{name}" for name in shares),
        "feed/bytes_per_second",
        "feed/longest",
    }
    for name, values in shares.items():
        assert written[f"feed/{name}"] == pytest.approx(dict(enumerate(values)), rel=1e-5)
    stats = train.stats()
    assert stats.last is not None
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [f"GPU waited {stats.last.summary()}; utilisation {stats.last.utilisation:.2f}", lines[1]]
    assert re.fullmatch(
        r"GPU waited [\d.]+% of the time \(waiting [\d.]+%, transfer [\d.]+%, decode [\d.]+%\); .*", lines[0]
    )
    assert advice in lines[1]
    train.close()


def scalars_in(folder: Path) -> dict[str, dict[int, float]]:
    """Step to value of each scalar, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(name)}
        for name in events.Tags()["tensors"]
    }


@pytest.mark.skipif(BACKEND != "tensorflow", reason="others take batches when they need them")
def test_tensorflow_waits_for_what_the_loop_needs(near: h5feed.Dataset) -> None:
    """What its threads prepare while the loop computes is no wait; without the callback that cannot be told."""

    def transform(x: Any, y: Any) -> Any:
        time.sleep(0.05)
        return x, y

    train = near.sequence(batch_size=4, transform=transform, verbose=False)
    model = small_model()
    model.fit(train, epochs=1, verbose=0)
    history = model.fit(train, epochs=1, verbose=0, callbacks=[SlowSteps(0.2), WaitMonitor(train, verbose=False)])
    stats = train.stats()
    assert stats.last is not None and stats.passes == 2
    assert stats.decode - stats.last.decode >= 0.05 * ROWS / 4
    assert stats.last.waited < stats.last.compute / 2
    assert history.history["feed_utilisation"][0] > 0.5
    train.close()


def test_epochs_cut_by_steps(near: h5feed.Dataset) -> None:
    """With ``steps_per_epoch`` each epoch of Keras is told by itself."""
    train = near.sequence(batch_size=4, shuffle=True, verbose=False)
    history = small_model().fit(
        train, epochs=4, steps_per_epoch=6, verbose=0, callbacks=[WaitMonitor(train, verbose=False)]
    )
    assert [0 <= share <= 1 for share in history.history["feed_waited"]] == [True] * 4
    assert train.stats().steps >= 24 and train.stats().passes >= 4
    train.close()


def test_another_sequence_than_the_one_that_is_trained_on(near: h5feed.Dataset, tmp_path: Path) -> None:
    """Nothing is told of an epoch in which the sequence was not used."""
    train, other = (near.sequence(batch_size=BATCH, verbose=False) for _ in range(2))
    history = small_model().fit(train, epochs=1, verbose=0, callbacks=[WaitMonitor(other, log_dir=tmp_path)])
    assert set(history.history) == {"loss"}
    train.close()
    other.close()


def test_no_tensorboard(near: h5feed.Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error says what to install; without log_dir none is needed."""
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    train = near.sequence(verbose=False)
    WaitMonitor(train)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'h5feed\[tensorboard\]'"):
        WaitMonitor(train, log_dir=tmp_path)


def test_batches_that_are_taken_ahead() -> None:
    """Only what is handed out after it was demanded was waited for, and no longer than since then."""

    def step(seconds: float) -> float:
        before = meter.stats().waited
        now = clock()
        meter.step(now - seconds, now, None, 1)
        return meter.stats().waited - before

    meter = Meter()
    meter.run_ahead(True)
    assert step(100) == pytest.approx(100, abs=50)  # nobody demands: it is a loop like others
    meter.begin_run()
    meter.demand(1)
    assert step(100) < 50  # demanded just now
    assert step(100) == 0  # taken ahead
    meter.demand(2)
    time.sleep(0.5)
    assert 0.5 <= step(100) < 50  # demanded half a second ago
    assert step(0) < 50 and step(100) == 0
    meter.run_ahead(False)
    assert step(100) == pytest.approx(100, abs=50)


def test_a_copy_measures_itself() -> None:
    """What a worker of another process is given has waited for nothing yet."""
    meter = Meter()
    meter.step(clock(), clock(), None, 1)
    assert pickle.loads(pickle.dumps(meter)).stats().steps == 0 and meter.stats().steps == 1


def trace_of(*entered: tuple[float, int]) -> Trace:
    trace = Trace()
    trace._entered.extend(entered)
    return trace


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0.0, 1.0, (1.0, 0.0, 0.0)),  # before anything came
        (0.0, 10.0, (4.0, 3.0, 3.0)),  # all of it
        (3.0, 4.5, (1.0, 0.5, 0.0)),  # across the first byte
        (7.5, 9.0, (0.0, 0.0, 1.5)),  # it had come, and was being decoded
        (5.0, 5.0, (0.0, 0.0, 0.0)),  # no time at all
    ],
)
def test_a_wait_is_split_by_phases(begin: float, end: float, expected: tuple[float, ...]) -> None:
    """Asked at 1, tried again at 3 after a first byte at 2, first byte at 4, all of it at 7."""
    trace = trace_of((1.0, WAITING), (2.0, TRANSFER), (2.0, WAITING), (4.0, TRANSFER), (7.0, DECODE))
    assert trace.split(begin, end) == pytest.approx(expected)


TIMES = st.floats(0, 1e6)


@given(st.lists(st.tuples(TIMES, st.sampled_from([WAITING, TRANSFER, DECODE]))), TIMES, TIMES)
def test_parts_add_up(entered: list[tuple[float, int]], one: float, other: float) -> None:
    """Whatever the phases, no part is negative and none of the time is lost."""
    begin, end = sorted((one, other))
    parts = trace_of(*sorted(entered)).split(begin, end)
    assert min(parts) >= 0 and sum(parts) == pytest.approx(end - begin)


def test_percentiles_of_waits() -> None:
    """The histogram's median and 95th percentile are those of the waits, within 5%."""
    meter = Meter()
    waits = np.random.default_rng(0).lognormal(-6, 2, 10_000)
    for wait in waits:
        now = clock()
        meter.step(now - wait, now, None, 1)
    stats = meter.stats()
    assert stats.median == pytest.approx(np.median(waits), rel=0.05)
    assert stats.p95 == pytest.approx(np.quantile(waits, 0.95), rel=0.05)
    assert stats.longest == pytest.approx(waits.max(), rel=0.01)
    assert stats.waited == pytest.approx(waits.sum(), rel=0.01)


def test_what_is_kept_does_not_grow() -> None:
    """A hundred times the steps and passes take no more memory."""

    def keep(meter: Meter, steps: int) -> int:
        for number in range(steps):
            if number % 50 == 0:
                meter.end_pass()
                meter.begin_pass()
            meter.step(clock(), clock(), Trace(), 1)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        meter = Meter()
        before = keep(meter, 1000)
        assert keep(meter, 100_000) < before + 100_000
    finally:
        tracemalloc.stop()
    assert (meter.stats().passes, meter.stats().steps) == (2020, 101_000)
    assert len(meter.stats().waits) == BINS


def test_how_it_is_shown(near: h5feed.Dataset) -> None:
    """A mapping of plain numbers, a table as text and as HTML; nothing is told before anything was done."""
    with near.loader(batch_size=BATCH) as train:
        assert dict(train.stats())["steps"] == 0 and math.isnan(train.stats()["utilisation"])
        assert repr(train.stats()) and not train.stats().advice()
        for _ in range(2):
            run(train)
        stats = train.stats()
    assert all(isinstance(value, (int, float)) for value in stats.values())
    assert set(stats) >= {"steps", "rows", "bytes", "seconds", "waited", *PARTS, "compute", "utilisation", "p95"}
    assert len(stats) == len(list(stats)) and "last" not in stats
    with pytest.raises(KeyError):
        stats["waits"]
    text, html = repr(stats), unescape(stats._repr_html_())
    assert "all" in text.splitlines()[0] and "last pass" in text.splitlines()[0]
    for line in text.splitlines()[1:]:
        assert line.split("  ")[0].strip() in html
    assert "192" in text and "<table>" in html
