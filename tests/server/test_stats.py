"""Statistics equal numpy's, for any dtype and shape, and are computed once for everybody."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import FieldNotFound, ReadTimeout, RevisionChanged, SplitNotFound, UnsupportedField
from h5feed.options import SplitOptions
from h5feed_server.stats.accumulators import accumulator_for
from h5feed_server.stats.histogram import BINS
from h5feed_server.stats.mean_image import MeanImage
from h5feed_server.stats.summary import Summary
from h5feed_server.stats.value_counts import Indicators, Values
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.model_selection import train_test_split

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

DTYPES = ["?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"]

GREATEST: dict[int, tuple[float, Literal[16, 32, 64]]] = {2: (60000.0, 16), 4: (2.0**100, 32), 8: (2.0**300, 64)}
"""By bytes of a float, with its bits: above, squares are beyond float64, for numpy as well."""


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """(n, channels) of any dtype."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 6)))
    elements = None
    if dtype.kind == "f":
        limit, width = GREATEST[dtype.itemsize]
        odd = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf])
        elements = st.one_of(st.floats(-limit, limit, width=width), odd)
    return draw(hnp.arrays(dtype, shape, elements=elements))


@given(table=tables(), cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_equal_to_numpy(table: np.ndarray, cuts: tuple[float, float]) -> None:
    """Whatever the dtype, the number of channels and the blocks, all numbers are those of numpy in float64; of
    integers they are exact."""
    first, second = sorted(int(cut * len(table)) for cut in cuts)
    accumulator, rest = accumulator_for(table.dtype, table.shape[1]), accumulator_for(table.dtype, table.shape[1])
    for target, part in ((accumulator, table[:first]), (accumulator, table[first:second]), (rest, table[second:])):
        if len(part):
            target.add(np.ascontiguousarray(part))
    accumulator.merge(rest)
    for channel, summary in enumerate(accumulator.summaries()):
        check(summary, table[:, channel])
    check(accumulator.overall(), table.reshape(-1))
    # Asking changes nothing.
    check(accumulator.overall(), table.reshape(-1))


def check(summary: Summary, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    assert summary.count == values.size
    assert (summary.nan, summary.inf) == (np.isnan(values).sum(), np.isinf(values).sum())
    if not finite.size:
        assert summary.mean is summary.std is summary.minimum is None and summary.histogram is None
        return
    assert summary.zeros == (finite == 0).sum()
    assert (summary.minimum, summary.maximum) == (finite.min(), finite.max())
    reference = finite.astype(np.float64)
    scale = float(np.abs(reference).max())
    assert summary.mean == pytest.approx(reference.mean(), rel=1e-12, abs=1e-14 * scale)
    # Below 1e-150, squares vanish.
    assert summary.std == pytest.approx(reference.std(), rel=1e-9, abs=1e-14 * scale + 1e-150)
    if values.dtype.kind != "f":
        whole = [int(value) for value in finite]
        mean = Fraction(sum(whole), len(whole))
        assert summary.mean == float(mean)
        assert summary.std == math.sqrt(sum((value - mean) ** 2 for value in whole) / len(whole))
    histogram = summary.histogram
    assert histogram is not None and len(histogram.counts) <= BINS and len(histogram.edges) == len(histogram.counts) + 1
    counts = [0] * len(histogram.counts)
    for value in finite.tolist():
        # The last edge of all may be the greatest float, and belongs to its bin.
        counts[min(bisect_right(histogram.edges, value) - 1, len(counts) - 1)] += 1
    assert histogram.counts == counts


@given(values=hnp.arrays(np.float64, st.integers(1, 200), elements=st.floats(-1e6, 1e6)), seed=st.integers(0, 9))
def test_histograms_do_not_depend_on_order(values: np.ndarray, seed: int) -> None:
    """Bins grow by doubling: whatever comes first, the edges and counts are the same."""
    shuffled = np.random.default_rng(seed).permutation(values)
    found = []
    for order in (values, shuffled):
        accumulator = accumulator_for(np.dtype("<f8"), 1)
        for value in order:
            accumulator.add(value.reshape(1, 1))
        found.append(accumulator.overall().histogram)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", "<f4"])
def test_mean_image(dtype: str) -> None:
    """Place by place the mean of the samples; NaN are left out."""
    samples = (np.random.default_rng(0).random((600, 5, 4)) * 200).astype(dtype)
    if dtype == "<f4":
        samples[3, 2, 1] = np.nan
        samples[:, 0, 0] = np.inf
    image, rest = MeanImage((5, 4), samples.dtype, len(samples)), MeanImage((5, 4), samples.dtype, len(samples))
    image.add(samples[:500])
    rest.add(samples[500:])
    image.merge(rest)
    finite = np.isfinite(samples)
    with np.errstate(invalid="ignore"):
        reference = np.where(finite, samples, 0).sum(axis=0, dtype=np.float64) / finite.sum(axis=0)
    np.testing.assert_allclose(image.mean(), reference, rtol=1e-6)


def test_very_many_values_are_bounded() -> None:
    """Of very many distinct values the most frequent ones are kept, and it is said that others are not."""
    values = Values()
    values.add(np.concatenate([np.arange(200_000), np.full(1000, 7)]))
    assert not values.complete and values.counts.most_common(1) == [(7, 1001)] and len(values.counts) <= 1 << 16


def test_indicators() -> None:
    """One-hot rows, several labels a row, and other numbers are told apart."""
    for rows, kind in (([[0, 1], [1, 0]], "one_hot"), ([[1, 1], [0, 0]], "multi_label"), ([[2, 0], [0, 1]], None)):
        indicators = Indicators(2)
        indicators.add(np.array(rows, np.float32))
        assert indicators.kind == kind


ROWS = 3000
GZIP = {"compression": "gzip", "compression_opts": 1}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    floats = random.normal(size=(ROWS, 7)).astype("<f4")
    floats[5, 2], floats[9, 1], floats[:40, 0] = np.nan, -np.inf, 0
    return {
        "images": random.integers(0, 256, (ROWS, 8, 6, 3), np.uint8),
        "grey": random.integers(0, 256, (ROWS, 9, 9), np.uint8),
        "planes": random.integers(0, 256, (ROWS, 3, 8, 8), np.uint8),
        "floats": floats,
        "halves": random.normal(size=(ROWS, 5)).astype("<f2"),
        "big_endian": random.integers(-(2**40), 2**40, (ROWS, 2)).astype(">i8"),
        "greatest": random.integers(2**63, 2**64, ROWS, np.uint64),
        "volumes": random.normal(size=(ROWS, 5, 4, 5)).astype("<f8"),
        "flags": random.random(ROWS) < 0.25,
        "labels": random.choice(4, ROWS, p=[0.7, 0.2, 0.07, 0.03]),
    }


@pytest.fixture(scope="module")
def stats_server(
    arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, Path]]:
    folder, cache = tmp_path_factory.mktemp("stats"), tmp_path_factory.mktemp("cache")
    with h5py.File(folder / "many.h5", "w") as file:
        for name, array in arrays.items():
            chunked = {"chunks": (17, *array.shape[1:]), **GZIP} if name in ("grey", "volumes") else {}
            file.create_dataset(name, data=array, **chunked)
        file["labels"].attrs["class_names"] = ["cat", "dog", "bird", "fish"]
        file["planes"].attrs["channels"] = "bgr"
        file.create_dataset("cv2", data=arrays["images"][..., ::-1]).attrs["channels"] = "bgr"
        file["captions"] = [f"caption {row % 5}" for row in range(ROWS)]
        file["codes"] = np.array([f"c{row % 3}".encode() for row in range(ROWS)])
        tags = file.create_dataset("tags", (ROWS,), h5py.vlen_dtype(np.int32))
        tags[:] = np.array([np.arange(row % 4) for row in range(ROWS)], dtype=object)
    with h5py.File(folder / "onehot.h5", "w") as file:
        file["x"], file["y"] = arrays["floats"], np.eye(4, dtype="f4")[arrays["labels"]]
    server = ServerProcess(folder, cache, "--workers", "2")
    yield server, cache
    assert server.stop() == 0


@pytest.fixture(scope="module")
def served(stats_server: tuple[ServerProcess, Path]) -> Iterator[h5feed.Feed]:
    with h5feed.connect(stats_server[0].url, deadline=60) as feed:
        yield feed


SPLIT: SplitOptions = {"test": 0.2, "val": 100, "split_seed": 7}


@pytest.mark.parametrize("split", ["all", "train", "val", "test"])
def test_every_field_of_a_split(served: h5feed.Feed, arrays: dict[str, np.ndarray], split: str) -> None:
    """Over HTTP, whatever the dtype, the layout and the filter: the numbers of those rows and of no others."""
    dataset = served["many"]
    rows = np.arange(ROWS) if split == "all" else dataset.split_rows(split, **SPLIT)
    stats = dataset.stats(split, **SPLIT)
    assert stats.rows == len(rows) and stats.split == split
    for name, array in arrays.items():
        found, values = stats[name], array[rows].astype(np.float64)
        finite = values[np.isfinite(values)]
        assert found["count"] == values.size and found["nan"] == np.isnan(values).sum()
        assert found["inf"] == np.isinf(values).sum() and found["zeros"] == (finite == 0).sum()
        assert found["min"] == array[rows][np.isfinite(values)].min()
        assert found["mean"] == pytest.approx(finite.mean(), rel=1e-12, abs=1e-13)
        assert found["std"] == pytest.approx(finite.std(), rel=1e-11)
        assert sum(found["histogram"]["counts"]) == finite.size
    for number, channel in enumerate(stats["images"]["channels"]):
        values = arrays["images"][rows][..., number]
        assert (channel["name"], channel["mean"]) == ("RGB"[number], pytest.approx(values.mean(), rel=1e-14))
        assert channel["std"] == pytest.approx(values.astype(np.float64).std(), rel=1e-12)
        edges, counts = channel["histogram"]["edges"], channel["histogram"]["counts"]
        assert counts == np.histogram(values, edges)[0].tolist()
    floats = arrays["floats"][rows].astype(np.float64)
    floats[~np.isfinite(floats)] = np.nan
    np.testing.assert_allclose(stats["floats"].mean, np.nanmean(floats, axis=0), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(stats["floats"].std, np.nanstd(floats, axis=0), rtol=1e-11)


def test_channel_order(served: h5feed.Feed, arrays: dict[str, np.ndarray]) -> None:
    """Images that cv2 wrote are blue first: the same colours have the same numbers; so do channels that come first."""
    stats = served["many"].stats()
    assert stats["cv2"]["channel_means"] == stats["images"]["channel_means"]
    assert list(stats["cv2"]["channel_means"]) == ["R", "G", "B"]
    assert [channel["name"] for channel in stats["cv2"]["channels"]] == ["B", "G", "R"]
    means = arrays["planes"].mean(axis=(0, 2, 3))
    assert stats["planes"]["channel_means"] == {name: pytest.approx(means["BGR".index(name)]) for name in "RGB"}
    assert stats["grey"]["channels"] is None and stats["volumes"]["channels"] is None


def test_labels_and_texts(served: h5feed.Feed, arrays: dict[str, np.ndarray]) -> None:
    """Labels have their classes with balanced weights, texts and other integers their most frequent values."""
    stats = served["many"].stats("train", test=0.2)
    labels = arrays["labels"][served["many"].split_rows("train", test=0.2)]
    counts = np.bincount(labels)
    found = stats["labels"]["classes"]
    assert [(entry["value"], entry["name"], entry["rows"]) for entry in found] == [
        (0, "cat", counts[0]), (1, "dog", counts[1]), (2, "bird", counts[2]), (3, "fish", counts[3])
    ]  # fmt: skip
    assert stats["labels"].class_weight == {k: pytest.approx(len(labels) / (4 * counts[k])) for k in range(4)}
    everything = served["many"].stats()
    assert everything["captions"]["distinct"] == 5 and everything["captions"]["values"][0]["rows"] == ROWS // 5
    assert {entry["value"] for entry in everything["codes"]["values"]} == {"c0", "c1", "c2"}
    assert everything["captions"]["lengths"]["mean"] == 9.0
    assert everything["tags"]["lengths"]["max"] == 3 and everything["tags"]["max"] == 2
    assert everything["flags"]["values"][0] == {"value": 0, "rows": 3000 - arrays["flags"].sum(), "share": 1 - arrays["flags"].mean()}  # fmt: skip  # noqa: E501
    one_hot = served["onehot"].stats(field="y")
    assert one_hot["classes_kind"] == "one_hot"
    assert [entry["rows"] for entry in one_hot["classes"]] == np.bincount(arrays["labels"]).tolist()


def test_numbers_go_straight_into_keras(served: h5feed.Feed, arrays: dict[str, np.ndarray]) -> None:
    """`keras.layers.Normalization` takes them as they are."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    stats = served["many"].stats(field="images")
    layer = keras.layers.Normalization(mean=stats.mean, variance=stats.variance)
    images = arrays["images"].astype(np.float32)
    expected = (images - images.mean(axis=(0, 1, 2))) / images.std(axis=(0, 1, 2))
    np.testing.assert_allclose(np.asarray(layer(images)), expected, atol=1e-4)


def test_mean_image_of_a_split(served: h5feed.Feed, arrays: dict[str, np.ndarray]) -> None:
    """The mean of the images of those rows, as an array of the samples' shape."""
    dataset = served["many"]
    rows = dataset.split_rows("train", test=0.2)
    for name in ("images", "grey"):
        found = dataset.mean_image(name, "train", test=0.2)
        np.testing.assert_allclose(found, arrays[name][rows].mean(axis=0), rtol=1e-6)
        assert found.dtype == np.float32
    with pytest.raises(UnsupportedField, match="no mean image"):
        dataset.mean_image("floats")


def test_readable(served: h5feed.Feed) -> None:
    """Statistics print themselves as text and as HTML, with bars."""
    stats = served["many"].stats()
    text, page = repr(stats), stats._repr_html_()
    assert "images  uint8[8, 6, 3], input, split all, 3,000 rows" in text and "0 cat" in text and "█" in text
    assert page.count("<table>") >= 10 and "<svg" in page and "cat" in page
    assert set(stats) == {field.name for field in served["many"].fields.values() if field.readable}


def test_errors(served: h5feed.Feed) -> None:
    """What is wrong is said at once, not by a job."""
    with pytest.raises(FieldNotFound, match="images"):
        served["many"].stats(field="nix")
    with pytest.raises(SplitNotFound, match="all"):
        served["many"].stats("test")
    dataset = served["many"]
    dataset._revision = "other"
    with pytest.raises(RevisionChanged):
        dataset.stats()


def test_cached_by_revision(stats_server: tuple[ServerProcess, Path]) -> None:
    """The second answer is the first one's bytes, from any worker; a caller that has it is told so."""
    url = f"{stats_server[0].url}/v1/datasets/many/stats"
    first = httpx.get(url, headers={"prefer": "wait=30"}, timeout=60)
    assert first.status_code == 200
    for _ in range(6):
        # A connection of its own each time, so that both workers are met.
        assert httpx.get(url, timeout=60).content == first.content
    assert httpx.get(url, headers={"if-none-match": first.headers["etag"]}, timeout=60).status_code == 304
    revision = first.json()["revision"]
    assert "immutable" in httpx.get(url, params={"revision": revision}, timeout=60).headers["cache-control"]


def test_dogs_vs_cats(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """25,000 images, 2,500 each for test and val, stratified, seed 42: the channel means are those of *train* only."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 12_500)
    images = random.integers(0, 256, (25_000, 8, 8, 3), np.uint8)
    images[labels == 1, ..., 0] //= 2
    with h5py.File(tmp_path / "pets.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    rows = np.arange(25_000)
    rest, _test = train_test_split(rows, test_size=2500, stratify=labels, random_state=42)
    train, _val = train_test_split(rest, test_size=2500, stratify=labels[rest], random_state=42)
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        stats = feed["pets"].stats("train", test=2500, val=2500, split_seed=42, stratify="labels", field="images")
        everything = feed["pets"].stats(field="images")
    means = images[train].mean(axis=(0, 1, 2))
    assert stats["channel_means"] == {name: pytest.approx(mean, rel=1e-14) for name, mean in zip("RGB", means, strict=True)}  # fmt: skip  # noqa: E501
    assert stats["channel_means"] != everything["channel_means"]
    assert stats.rows == 20_000


BIG_ROWS, BIG_IMAGE = 6400, (256, 256, 3)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A folder with 1.26 GB of images, of which next to nothing is on the disk."""
    return sparse(tmp_path / "big", BIG_ROWS)


def sparse(folder: Path, rows: int) -> Path:
    """A folder with a file of images that are all black but one."""
    folder.mkdir()
    with h5py.File(folder / "big.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((rows, *BIG_IMAGE))
        h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_UINT8, space, plist)
        file["images"][17] = 255
        file["labels"] = np.arange(rows) % 2
    return folder


BIG_MEAN = 255 / BIG_ROWS


def test_a_job_that_all_share(big: Path, serve: Callable[..., ServerProcess]) -> None:
    """What takes long is 202 with the URL of a job; all workers tell of its progress, and of the one result."""
    server = serve(big, "--workers", "2", H5FEED_DIGEST_LIMIT="1000")
    url = f"{server.url}/v1/datasets/big/stats"
    params = {"field": "images", "split": "all"}
    with h5feed.connect(server.url, deadline=60) as feed:
        assert feed["big"].rows == BIG_ROWS
    before = memory(server, "VmRSS")
    seen: list[dict[str, Any]] = []
    # Connections that stay open: one to each worker, at no cost but the question.
    with httpx.Client(timeout=60) as one, httpx.Client(timeout=60) as two:
        assert one.get(f"{server.url}/healthz").status_code == two.get(f"{server.url}/healthz").status_code == 200
        answer = one.get(url, params=params, headers={"prefer": "wait=0"})
        assert answer.status_code == 202 and int(answer.headers["retry-after"]) >= 1
        job = f"{server.url}{answer.headers['location']}"

        def over() -> bool:
            seen.extend(client.get(job).json() for client in (one, two))
            assert all(state["status"] in ("queued", "running", "done") for state in seen)
            return bool(seen[-1]["status"] == "done")

        wait_until(over, 150)
    assert any(0 < state["done"] < state["total"] for state in seen), "no progress was told"
    assert seen[-1]["total"] == BIG_ROWS * math.prod(BIG_IMAGE) and "/v1/datasets/big/stats?" in seen[-1]["result"]
    result = httpx.get(server.url + seen[-1]["result"], timeout=60)
    assert result.status_code == 200
    assert result.json()["fields"]["images"]["channel_means"]["R"] == pytest.approx(BIG_MEAN, rel=1e-14)
    peak = memory(server, "VmHWM")
    assert all(peak[pid] - before[pid] < 150 << 20 for pid in before), "statistics took too much memory"
    assert httpx.get(f"{server.url}/v1/jobs/0123", timeout=60).json()["code"] == "not_found"


def memory(server: ServerProcess, key: str) -> dict[int, int]:
    """Bytes of each worker."""
    found = {}
    for pid in server.worker_pids():
        state = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert state is not None
        found[pid] = int(state[1]) << 10
    return found


def test_a_job_outlives_its_worker(big: Path, serve: Callable[..., ServerProcess]) -> None:
    """SIGKILL to the worker at work: the next one that is asked takes the job up, and the caller notices nothing."""
    server = serve(big, "--workers", "2", H5FEED_DIGEST_LIMIT="1000")
    with h5feed.connect(server.url, deadline=60) as feed, ThreadPoolExecutor(1) as threads:
        told: list[int] = []
        waiting = threads.submit(feed["big"].stats, field="images", progress=lambda done, total: told.append(done))
        wait_until(lambda: bool(server.working_pids()))
        killed = server.working_pids()[0]
        os.kill(killed, signal.SIGKILL)
        assert waiting.result(150)["mean"] == pytest.approx(BIG_MEAN, rel=1e-14)
        assert killed not in server.worker_pids()


def test_waiting_has_an_end(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """A client that waits no longer is told how far the server is; a server that is stopped does not finish first."""
    options = {"H5FEED_DIGEST_LIMIT": "1000", "H5FEED_PROVISIONAL_BYTES": str(1 << 62)}
    server = serve(sparse(tmp_path / "big", 20 * BIG_ROWS), **options)
    with h5feed.connect(server.url) as feed, pytest.raises(ReadTimeout, match=r"% done\)\. .* try again later"):
        feed["big"].stats(field="images", timeout=1)
    assert server.stop() == 0
    assert server.unfinished_jobs() == ["stats"]


def test_no_cache_folder(tmp_path: Path, arrays: dict[str, np.ndarray], serve: Callable[..., ServerProcess]) -> None:
    """Where nothing can be kept, statistics are computed and answered all the same."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "plain.h5", "w") as file:
        file["x"] = arrays["floats"]
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    server = serve(folder, "--cache-dir", str(blocked / "below"))
    with h5feed.connect(server.url, deadline=60) as feed:
        assert feed["plain"].stats()["x"]["count"] == arrays["floats"].size


def test_many_columns_share_a_file(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Of a table with many columns, the results of all share a file of the cache folder, and one column finds its own
    there, also after a restart. A damaged file is computed again; a field that is large has a file of its own."""
    rng = np.random.default_rng(3)
    columns = {f"column{number:02d}": rng.normal(size=50) for number in range(300)}
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "table.h5", "w") as file:
        for name, values in columns.items():
            file[name] = values
        file["large"] = rng.integers(0, 256, (50, 160, 160, 3), np.uint8)
    cache = tmp_path / "cache"

    def stored() -> list[Path]:
        return [file for file in cache.glob("served-*/stats/*") if not file.name.startswith(".")]

    server = serve(tmp_path / "data", "--cache-dir", str(cache))
    with h5feed.connect(server.url, deadline=60) as feed:
        alone = feed["table"].stats(field="column07")
        assert len(stored()) == 1
        everything = feed["table"].stats()
        # 256 columns, the other 44, the large field, and the column that was asked for alone.
        assert len(stored()) == 4
        for name, values in columns.items():
            assert everything[name]["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert alone["mean"] == everything["column07"]["mean"]
        page = httpx.get(f"{server.url}/datasets/table", timeout=60)
        assert page.status_code == 200 and len(stored()) == 4
    assert server.stop() == 0
    server = serve(tmp_path / "data", "--cache-dir", str(cache))
    with h5feed.connect(server.url, deadline=60) as feed:
        before = stored()
        assert feed["table"].stats(field="column08")["mean"] == everything["column08"]["mean"]
        assert stored() == before
    assert server.stop() == 0
    for file in stored():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    server = serve(tmp_path / "data", "--cache-dir", str(cache))
    with h5feed.connect(server.url, deadline=60) as feed:
        again = feed["table"].stats()
        assert {name: again[name]["mean"] for name in columns} == {name: everything[name]["mean"] for name in columns}
        assert len(stored()) <= 4
    assert server.stop() == 0


def test_layers() -> None:
    """What adds up knows no HTTP, no libhdf5, no catalogue; no plotting library is loaded before the first plot."""
    banned = ("fastapi", "starlette", "h5py", "matplotlib", "h5feed_server.catalog", "h5feed_server.splits")
    for module, names in (("h5feed_server.stats.scan", banned), ("h5feed_server.main", ("matplotlib", "h5py"))):
        code = f"import sys, {module}\nprint([name for name in {names!r} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
        assert done.stdout.strip() == "[]", done.stdout + done.stderr
