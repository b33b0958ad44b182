"""Every readable field, read every way, equals what h5py reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextvars import copy_context
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import FieldNotFound, RowOutOfRange, SourceUnavailable, UnsupportedField
from h5feed_server.api.batch_stream import filled
from h5feed_server.catalog.hanging import ATTEMPT, MOST_OF_ONE, Attempt
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.splits.order_spec import OrderSpec

from tests.support.data_folder import ROWS
from tests.support.object_store import SOURCES, served_from
from tests.support.waiting import wait_until

MIXED = ["images", "labels", "big_endian", "flags", "half", "never_written", "by_row", "shuffled", "swapped"]
MIXED += ["plain_chunks", "plain_pieces", "sparse", "colour"]
CASES = [("mixed", name) for name in MIXED] + [("tall", name) for name in "xyzw"]


@pytest.fixture(scope="module", params=SOURCES)
def feed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[h5feed.Feed]:
    with (
        served_from(request.param, folder, tmp_path_factory.mktemp("read"), "--workers", "2") as server,
        h5feed.connect(server.url, deadline=60) as connected,
    ):
        yield connected


@pytest.mark.parametrize(("name", "field"), CASES)
def test_rows_equal_h5py(feed: h5feed.Feed, folder: Path, name: str, field: str) -> None:
    """Scattered rows, duplicates, reversed rows and runs come bit for bit as h5py has them."""
    with h5py.File(folder / f"{name}.h5") as file:
        truth = file[field][:]
    count = len(truth)
    for rows in ([count - 1, 0, 0, 3, 2, 2], list(range(count)), list(range(count))[::-1], [7]):
        batch = feed[name].take(rows, fields=[field])
        assert batch.rows.tolist() == rows
        assert batch[field].dtype == truth.dtype.newbyteorder("<")
        np.testing.assert_array_equal(batch[field], truth[rows])


def test_complex_numbers_have_a_last_axis_of_two(feed: h5feed.Feed, folder: Path) -> None:
    """Complex values travel as pairs of floats."""
    with h5py.File(folder / "mixed.h5") as file:
        truth = file["waves"][:][[4, 1]]
    got = feed["mixed"].take([4, 1], fields=["waves"])["waves"]
    np.testing.assert_array_equal(got[..., 0] + 1j * got[..., 1], truth)


def test_shuffled_batches_equal_h5py(feed: h5feed.Feed, folder: Path) -> None:
    """A shuffled epoch over two connections gives each row once, with its own values, in every field."""
    with h5py.File(folder / "tall.h5") as file:
        truth = {name: file[name][:] for name in "xyzw"}
    seen: list[int] = []
    for batch in feed["tall"].batches(batch_size=3, shuffle=True, seed=5, fields=list("xyzw")):
        for name in "xyzw":
            np.testing.assert_array_equal(batch[name], truth[name][batch.rows])
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(40)) != seen


def test_no_rows(feed: h5feed.Feed) -> None:
    """An empty list of rows is an empty batch."""
    batch = feed["mixed"].take([], fields=["images"])
    assert batch["images"].shape == (0, 12, 10, 3)


@pytest.mark.parametrize(("field", "word"), [("meta", "3 rows")])
def test_what_cannot_be_read_says_why(feed: h5feed.Feed, field: str, word: str) -> None:
    """An unreadable field is listed with the reason, and asking for it is an error that names it."""
    dataset = feed["mixed"]
    assert not dataset.fields[field].readable
    assert word in str(dataset.fields[field].reason)
    with pytest.raises(UnsupportedField, match=word):
        dataset.batch(0, fields=[field])


def test_unknown_field_and_row(feed: h5feed.Feed) -> None:
    """A name or number that is not there is named, with what is."""
    with pytest.raises(FieldNotFound, match="images"):
        feed["mixed"].batch(0, fields=["pictures"])
    with pytest.raises(RowOutOfRange, match="999"):
        feed["mixed"].take([1000])


def test_text(feed: h5feed.Feed) -> None:
    """Text comes where it is asked for: flat bytes and offsets, single and streamed, with numbers beside it."""
    dataset = feed["mixed"]
    assert dataset.fields["text"].dtype == "string"
    assert "text" not in dataset.batch(0)
    expected = ["one", "two"] * (ROWS // 2)
    taken = dataset.take([3, 0, 0], fields=["text", "labels"])
    assert taken.text("text") == ["two", "one", "one"]
    assert taken["text.offsets"].tolist() == [0, 3, 6, 9]
    for batch_size in (7, 1000):
        options: dict[str, Any] = {"batch_size": batch_size, "shuffle": True, "fields": ["text", "labels"]}
        seen = 0
        for batch in dataset.batches(**options):
            assert batch.text("text") == [expected[row] for row in batch.rows]
            assert len(batch["labels"]) == len(batch.rows)
            seen += len(batch.rows)
        assert seen == ROWS
    padded = list(dataset.batches(batch_size=300, last="pad", fields=["text"]))
    assert padded[-1].weight is not None and padded[-1].weight.sum() == ROWS - 900
    assert padded[-1].text("text")[:2] == expected[900:902]


def test_the_next_chunks_are_decoded_ahead(tmp_path: Path) -> None:
    """Who asks for batches at an even pace finds the chunks of the next one decoded."""
    with h5py.File(tmp_path / "tall.h5", "w") as file:
        file.create_dataset("x", data=np.ones((96, 300, 300), np.uint8), chunks=(8, 300, 300), compression="gzip")
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache", chunk_cache_bytes=16 << 20)
    services = Services.start(settings)
    try:
        services.catalog.dataset_within(60, "tall")
        plan = services.batcher.plan("tall", OrderSpec(), 8, None)
        reader = services.batcher.reader
        for index in (0, 2, 4):
            plan.filled(index, index + 1, lambda nbytes: np.empty(nbytes, np.uint8))
        wait_until(lambda: reader.decoded_bytes == 4 * 8 * 300 * 300)
        plan.filled(6, 7, lambda nbytes: np.empty(nbytes, np.uint8))
        wait_until(lambda: reader.decoded_bytes == 5 * 8 * 300 * 300)
        plan.filled(1, 2, lambda nbytes: np.empty(nbytes, np.uint8))
        assert reader.decoded_bytes == 6 * 8 * 300 * 300
    finally:
        services.close()


def test_blocks_of_a_stream_on_a_disk_that_hangs(tmp_path: Path) -> None:
    """Each block counts for its dataset when it hangs, and is refused where too many do."""
    with h5py.File(tmp_path / "tall.h5", "w") as file:
        file["x"] = np.arange(96)
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache"))
    try:
        services.catalog.dataset_within(60, "tall")
        plan = services.batcher.plan("tall", OrderSpec(), 8, None)
        attempt = Attempt()
        context = copy_context()
        context.run(ATTEMPT.set, attempt)
        assert len(context.run(filled, services, plan, 0, 1)) and attempt.dataset == "tall"
        late = [Future[None]() for _ in range(MOST_OF_ONE)]
        for work in late:
            services.catalog.hanging.add("tall", work, time.monotonic())
        with pytest.raises(SourceUnavailable, match="have been waiting for its disk"):
            filled(services, plan, 0, 1)
        late[0].set_result(None)
        assert len(filled(services, plan, 0, 1))
    finally:
        services.close()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">u2", "<f4", "<f8"])
def test_channels_in_chunks_of_their_own(tmp_path: Path, channels: int, dtype: str) -> None:
    """As h5py lays images out by itself: also where chunks hang over the edge, or were never written."""
    random = np.random.default_rng(channels)
    shape = (40, 21, 19, channels)
    # Every pattern of bits, those of no number too.
    values = np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    with h5py.File(tmp_path / "auto.h5", "w") as file:
        images = file.create_dataset(
            "x", shape, dtype, chunks=(16, 8, 8, 1), compression="gzip", fillvalue=np.array(7, dtype)
        )
        images[:16] = values[:16]
        images[16:, :, :, channels - 1] = values[16:, :, :, channels - 1]
    with h5py.File(tmp_path / "auto.h5") as file:
        truth = file["x"][:]
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache"))
    try:
        column = services.catalog.dataset_within(60, "auto", None).field("x").column
        rows = random.integers(0, 40, 64)
        out = np.empty((64, *column.sample_shape), column.dtype)
        services.batcher.reader.read(column, rows, out)
        wanted = truth[rows].astype(np.dtype(dtype).newbyteorder("<"))
        assert out.tobytes() == wanted.tobytes()
    finally:
        services.close()


def test_what_was_never_written(tmp_path: Path) -> None:
    """It holds the fill value, of whatever type: big-endian, complex, text, and each member of a record."""
    kinds = h5py.enum_dtype({"cat": 1, "dog": 2}, "i1")
    record = np.dtype([("a", "<i4"), ("b", ">f8"), ("s", "S5"), ("v", "<f4", (3,)), ("c", "c8"), ("e", kinds)])
    fills: dict[str, tuple[Any, Any]] = {
        "complex": (np.dtype(">c8"), 1 - 3j),
        "text": (np.dtype("S7"), b"none"),
        "flag": (np.dtype("?"), True),
        "kind": (kinds, 2),
        "half": (np.dtype("f2"), 1.5),
        "record": (record, np.array((3, 2.5, b"hey", (1, 2, 3), 1 + 2j, 2), record)),
    }
    with h5py.File(tmp_path / "unwritten.h5", "w") as file:
        for name, (dtype, fill) in fills.items():
            file.create_dataset(name, (50,), dtype, fillvalue=fill)
            written = file.create_dataset(
                f"{name}_chunks", (50,), dtype, fillvalue=fill, chunks=(8,), compression="gzip"
            )
            written[3] = np.zeros((), dtype)
        truth = {name: file[name][:] for name in file}
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache"))
    try:
        dataset = services.catalog.dataset_within(60, "unwritten", None)
        for name, values in truth.items():
            for member in values.dtype.names or (None,):
                column = dataset.field(f"{name}.{member}" if member else name).column
                out = np.empty((50, *column.sample_shape), column.dtype)
                services.batcher.reader.read(column, np.arange(50), out)
                wanted = values[member] if member else values
                if wanted.dtype.kind == "c":
                    out = out.view(wanted.dtype.newbyteorder("<"))[..., 0]
                np.testing.assert_array_equal(out, wanted)
    finally:
        services.close()


def test_elements_that_are_arrays(tmp_path: Path) -> None:
    """Rows of a field whose type is an array, plain, filtered and never written."""
    kind = np.dtype((">i2", (3, 2)))
    values = np.arange(120, dtype="i2").reshape(20, 3, 2)
    with h5py.File(tmp_path / "arrays.h5", "w") as file:
        for name, options in {"plain": {}, "chunks": {"chunks": (8,), "shuffle": True, "compression": "gzip"}}.items():
            file.create_dataset(name, (20,), kind, **options)[...] = values
        file.create_dataset("unwritten", (20,), kind)
        file.create_dataset("grid", (20, 2), kind)[...] = np.stack([values, values + 1], 1)
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache"))
    try:
        dataset = services.catalog.dataset_within(60, "arrays", None)
        for name, wanted in {"plain": values, "chunks": values, "unwritten": np.zeros_like(values)}.items():
            column = dataset.field(name).column
            out = np.empty((20, *column.sample_shape), column.dtype)
            services.batcher.reader.read(column, np.arange(20), out)
            np.testing.assert_array_equal(out, wanted)
        # h5py reads it.
        grid = services.batcher.reader.read_all(dataset.field("grid").column)
        np.testing.assert_array_equal(grid, np.stack([values, values + 1], 1))
    finally:
        services.close()


def test_a_fill_value_of_records_served_in_part(tmp_path: Path) -> None:
    """Of records that are served in part, h5py knows what was never written."""
    kind = np.dtype([("a", "<i4"), ("inner", [("b", "<f4")])])
    with h5py.File(tmp_path / "parts.h5", "w") as file:
        for name, written in {"some": 8, "all": 20}.items():
            table = file.create_dataset(name, (20,), kind, chunks=(8,), fillvalue=np.array((7, (1.5,)), kind))
            table[:written] = np.zeros(written, kind)
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache"))
    try:
        dataset = services.catalog.dataset_within(60, "parts", None)
        assert not services.batcher.reader.read_all(dataset.field("all.a").column).any()
        assert services.batcher.reader.read_all(dataset.field("some.a").column).tolist() == [0] * 8 + [7] * 12
    finally:
        services.close()
