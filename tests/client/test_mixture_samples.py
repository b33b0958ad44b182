"""Mixtures of samples that are not simply rows: windows, sparse and packed rows, joins, weights, and padded lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
import scipy.sparse
from h5feed.errors import BadParameter
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess

ROWS = {"photos": 60, "drawings": 37}
OFFSET = {"photos": 0, "drawings": 1000}
SCALE = 0.5


def labels_of(name: str) -> np.ndarray[Any, Any]:
    return OFFSET[name] + np.arange(ROWS[name])


def tokens_of(label: int) -> np.ndarray[Any, Any]:
    return label + np.arange(label % 5, dtype=np.int32)


def write(folder: Path, name: str) -> None:
    labels = labels_of(name)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["img" if name == "drawings" else "images"] = labels[:, None].astype(np.int32) * [1, 7]
        file["labels"] = labels
        file["temps"] = labels.astype(np.int16)
        file["temps"].attrs["scale_factor"] = np.float32(SCALE)
        file["episodes"] = labels // 20
        tokens = file.create_dataset("tokens", len(labels), h5py.vlen_dtype(np.int32))
        for row, label in enumerate(labels.tolist()):
            tokens[row] = tokens_of(label)
        sparse = scipy.sparse.csr_matrix(dense_of(labels))
        # Which integers the columns have does not matter: the rows are mixed as dense arrays.
        index = np.int32 if name == "photos" else np.int64
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "shape": sparse.shape})
        for part, values in (
            ("data", sparse.data),
            ("indices", sparse.indices.astype(index)),
            ("indptr", sparse.indptr.astype(index)),
        ):
            group[part] = values
    with h5py.File(folder / f"of_{name}.h5", "w") as file:
        file["captions"] = labels[::-1] + 0.5


def dense_of(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    dense = labels[:, None] * np.arange(1, 7, dtype=np.float32)
    return np.where((labels[:, None] + np.arange(6)) % 3 == 0, dense, 0).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, h5feed.Dataset]]:
    """Each source on a server of its own."""
    servers, feeds = [], []
    for name in ROWS:
        folder = tmp_path_factory.mktemp("data")
        write(folder, name)
        servers.append(ServerProcess(folder, tmp_path_factory.mktemp("cache")))
        feeds.append(h5feed.connect(servers[-1].url, deadline=60))
    yield {name: feed[name] for name, feed in zip(ROWS, feeds, strict=True)}
    for feed in feeds:
        feed.close()
    for server in servers:
        assert server.stop() == 0


def mixed(data: dict[str, h5feed.Dataset], **options: Any) -> h5feed.Mixture:
    return h5feed.mix(data, fields={"drawings": {"img": "images"}}, **options)


def labels_in(batch: h5feed.Batch) -> np.ndarray[Any, Any]:
    """The labels of the samples, from their sources and rows."""
    assert batch.source is not None
    return np.array([*OFFSET.values()])[batch.source] + batch.rows


# Without episodes, a window ends at the ends of its split.
ORDERS: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda *parts: {name: value for part in parts for name, value in part.items()},
    st.fixed_dictionaries({"seed": st.integers(0, 3)}, optional={"shuffle": st.just(True)}),
    st.sampled_from([{}, {"val": 0.25}, {"episode": "none"}]),
)


@settings(max_examples=8)
@given(order=ORDERS, batch_size=st.integers(1, 9), pad=st.booleans(), start=st.integers(0, 3))
def test_windows(
    data: dict[str, h5feed.Dataset], order: dict[str, Any], batch_size: int, pad: bool, start: int
) -> None:
    """Offsets name fields as the mixture does; every window is that of its source; shards and single batches agree."""
    if "episode" not in order:
        order = {**order, "episode": "episodes"}
    own: dict[str, Any] = {"offsets": {"images": [-1, 0, 2], "next": ("images", 1)}, **order}
    own |= {"ends": "pad"} if pad else {}
    split = "train" if "val" in order else "all"
    mixture = mixed(data, stop="all")
    fields = ["images", "labels", "next"]
    batches = list(mixture.batches(split, batch_size=batch_size, fields=fields, **own))
    seen = set()
    for batch in batches:
        labels = labels_in(batch)
        seen |= {*labels.tolist()}
        for name, offsets in (("images", np.array([-1, 0, 2])), ("next", np.array([1]))):
            wanted = labels[:, None] + offsets
            first, last = bounds(labels, order["episode"] == "none")
            real = (wanted >= first[:, None]) & (wanted <= last[:, None])
            assert pad or real.all()
            if pad:
                mask = batch[f"{name}.mask"]
                assert mask.dtype == bool and np.array_equal(mask, real if name == "images" else real[:, 0])
            values = np.clip(wanted, first[:, None], last[:, None])[:, :, None].astype(np.int32) * [1, 7]
            assert np.array_equal(batch[name], values if name == "images" else values[:, 0])
        assert np.array_equal(batch["labels"], labels)
    rows = {
        name: {
            OFFSET[name] + int(row)
            for batch in dataset.batches(split, fields=["labels"], **{**own, "offsets": offsets})
            for row in batch.rows
        }
        for (name, dataset), offsets in zip(data.items(), ({"images": [-1, 0, 2]}, {"img": [-1, 0, 2]}), strict=True)
    }
    assert seen == rows["photos"] | rows["drawings"]
    index = start % len(batches)
    again = mixture.batch(index, split=split, batch_size=batch_size, fields=fields, **own)
    assert again.keys() == batches[index].keys()
    for name, array in again.items():
        assert np.array_equal(array, batches[index][name])
    if batch_size % 2 == 0:
        shards = [
            list(mixture.batches(split, batch_size=batch_size // 2, shard=shard, shards=2, fields=fields, **own))
            for shard in range(2)
        ]
        for whole, *parts in zip(batches, *shards, strict=False):
            if len(whole.rows) == batch_size:
                assert np.array_equal(whole["images"], np.concatenate([part["images"] for part in parts]))


def bounds(labels: np.ndarray[Any, Any], whole: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The first and the last label of the episode of each label."""
    of = labels >= OFFSET["drawings"]
    begins, ends = np.where(of, 1000, 0), np.where(of, 1036, 59)
    return (
        (begins, ends) if whole else (np.maximum(begins, labels // 20 * 20), np.minimum(ends, labels // 20 * 20 + 19))
    )


def test_sparse_and_packed_rows(data: dict[str, h5feed.Dataset]) -> None:
    """Sparse rows come as dense arrays, and packed numbers unpacked, in batches and loops."""
    mixture = mixed(data)
    assert mixture.fields["X"].index_dtype == "int64"
    for batch in mixture.batches(batch_size=7, shuffle=True, seed=1, fields=["X", "temps"], decode_cf=True):
        labels = labels_in(batch)
        assert batch["X"].dtype == np.float32 and np.array_equal(batch["X"], dense_of(labels))
        assert batch["temps"].dtype == np.float32 and np.array_equal(batch["temps"], labels * np.float32(SCALE))
    stored = mixture.batch(0, fields=["temps"])
    assert stored["temps"].dtype == np.int16 and np.array_equal(stored["temps"], labels_in(stored))
    for x, y in mixture.loader(x="X", y="labels", batch_size=7):
        assert np.array_equal(x, dense_of(y))


def test_sparse_matrices(data: dict[str, h5feed.Dataset]) -> None:
    """With `sparse="csr"`, batches have the rows of all sources as one matrix, as loops over one dataset have."""
    mixture = mixed(data, stop="all")
    for batch in mixture.batches(batch_size=7, shuffle=True, seed=1, fields=["X", "labels", "tokens"], sparse="csr"):
        expected = scipy.sparse.csr_matrix(dense_of(labels_in(batch)))
        found = batch.sparse("X")
        assert found.shape == (len(batch.rows), 6) and found.dtype == np.float32
        assert batch["X.indices"].dtype == np.int64
        for part in ("data", "indices", "indptr"):
            assert np.array_equal(getattr(found, part), getattr(expected, part))
        assert np.array_equal(batch.dense("X"), expected.toarray())
        for row, label in zip(batch.lists("tokens"), labels_in(batch).tolist(), strict=True):
            assert np.array_equal(row, tokens_of(label))
    for padded in mixture.batches(batch_size=7, fields=["X", "labels", "tokens"], sparse="csr", pad="tokens"):
        assert (padded.sparse("X") != scipy.sparse.csr_matrix(dense_of(labels_in(padded)))).nnz == 0
        assert padded["tokens.lengths"].tolist() == [len(tokens_of(one)) for one in padded["labels"].tolist()]
    for x, y in mixture.loader(x="X", y="labels", batch_size=7, sparse="csr"):
        assert isinstance(x, scipy.sparse.csr_matrix) and np.array_equal(x.toarray(), dense_of(y))
    for wrong in ({"rescale": 2}, {"transform": lambda x: x}):
        with pytest.raises(BadParameter, match="sparse='csr' is only for inputs"):
            mixture.loader(x="X", y="labels", sparse="csr", **wrong)


def test_padded_lists(data: dict[str, h5feed.Dataset], tmp_path: Path) -> None:
    """Rows are padded when they are mixed: to the longest of the batch, whichever source it is of."""
    mixture = mixed(data)
    for options in ({"pad": True, "pad_to": 1}, {"pad": "tokens", "max_length": 6, "pad_value": -1}):
        for cache in (None, tmp_path / "cache"):
            found: Any = mixture.batches(batch_size=7, shuffle=True, fields=["tokens"], cache=cache, **options)
            for batch in found:
                rows = [tokens_of(label) for label in labels_in(batch).tolist()]
                width = 6 if "max_length" in options else max(1, *map(len, rows))
                value = options.get("pad_value", 0)
                expected = np.array([[*row, *[value] * (width - len(row))] for row in rows], np.int32)
                assert batch["tokens"].dtype == np.int32 and np.array_equal(batch["tokens"], expected)
                assert np.array_equal(batch["tokens.lengths"], [*map(len, rows)])
    for x, y in mixture.loader(x="tokens", y="labels", pad=True, max_length=3, truncate="end", batch_size=7):
        for row, label in zip(x, y.tolist(), strict=True):
            kept = tokens_of(label)[-3:]
            assert np.array_equal(row[: len(kept)], kept) and not row[len(kept) :].any()


def test_weights_and_joins(data: dict[str, h5feed.Dataset]) -> None:
    """Arrays of weights are those of a source; sources may be joined datasets."""
    weights = (np.arange(ROWS["photos"]) == 5).astype(np.float32)
    mixture = mixed(data, options={"photos": {"weights": weights}})
    drawn = [label for batch in mixture.batches(fields=["labels"]) for label in batch["labels"].tolist()]
    assert {label for label in drawn if label < 1000} == {5} and len({label for label in drawn if label >= 1000}) > 30
    joined = {name: dataset.join(f"of_{name}") for name, dataset in data.items()}
    names = {name: {f"of_{name}/captions": "captions"} for name in data}
    for captions, labels in h5feed.mix(joined, fields=names).loader(x="captions", y="labels", batch_size=7):
        of = labels >= 1000
        assert np.array_equal(captions, np.where(of, 1000 + 36, 59) - (labels - 1000 * of) + 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparse": "coo"}, "'dense' or 'csr'"),
        ({"how": "outer"}, "must be 'inner'"),
        ({"weights": np.ones(60)}, "options="),
        ({"bucket": 10}, "pad="),
        ({"pack": 10}, "pad="),
    ],
)
def test_what_is_refused(data: dict[str, h5feed.Dataset], options: dict[str, Any], said: str) -> None:
    mixture = mixed(data)
    for make in (mixture.batches, mixture.loader, mixture.plan):
        with pytest.raises(BadParameter, match=said):
            make(**options)


@pytest.mark.parametrize(
    "options", [{"join": "of_photos"}, {"sparse": "csr"}, {"pad": True}, {"pack": 10}, {"crop": 1}]
)
def test_what_single_sources_refuse(data: dict[str, h5feed.Dataset], options: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=r"'photos'|of a mixture"):
        mixed(data, options={"photos": options})


def test_options_that_do_not_match(data: dict[str, h5feed.Dataset]) -> None:
    """Samples of all sources have the same arrays; a name means one field."""
    for new, offsets in (("img", ("images", 1)), ("images", ("labels", 1))):
        with pytest.raises(BadParameter, match=f"'{new}' is a field of its own in the source"):
            mixed(data).plan(fields=["labels"], offsets={"labels": 1, new: offsets})
    with pytest.raises(BadParameter, match="'images' arrives as"):
        mixed(data, options={"photos": {"sequence_length": 2}}).plan(fields=["images"])
    with pytest.raises(BadParameter, match=r"'images\.mask' arrives as"):
        mixed(data, options={"photos": {"ends": "pad"}}).plan(fields=["images"], sequence_length=2)
    swapped = {"drawings": {"labels": "episodes", "episodes": "labels"}}
    with pytest.raises(BadParameter, match="where= names fields of the sources"):
        h5feed.mix(data, fields=swapped).plan(fields=["labels"], where="labels < 5")
    with pytest.raises(BadParameter, match="follow=True is for loops over one dataset"):
        mixed(data).loader(x="images", y="labels", follow=True)


def test_what_is_unpacked_under_other_names(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """A window under a second name, and a field of a joined dataset, are unpacked like the field itself."""
    for name in ("here", "there"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            packed = file.create_dataset("temps", data=np.arange(40, dtype=np.int16).reshape(20, 2))
            packed.attrs["scale_factor"], packed.attrs["add_offset"] = 0.5, 3.0
            file["number"] = np.arange(20)
    with h5feed.connect(serve(tmp_path).url) as feed:
        offsets: Any = {"temps": 0, "later": ("temps", 2)}
        batch = feed["here"].batch(0, batch_size=4, offsets=offsets, fields=["temps", "later"], decode_cf=True)
        expected = np.arange(40).reshape(20, 2) * 0.5 + 3
        np.testing.assert_array_equal(batch["temps"], expected[:4])
        np.testing.assert_array_equal(batch["later"], expected[2:6])
        joined = feed["here"].batches(batch_size=20, join="there", fields=["temps", "there/temps"], decode_cf=True)
        (batch,) = joined
        np.testing.assert_array_equal(batch["temps"], expected)
        np.testing.assert_array_equal(batch["there/temps"], expected)


@pytest.fixture
def pictures(tmp_path: Path, serve: Callable[..., ServerProcess]) -> Iterator[dict[str, h5feed.Dataset]]:
    """Two datasets of images and masks, whose images are named differently, and one to join them with."""
    random = np.random.default_rng(0)
    for name, rows in (("a", 40), ("b", 25)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            image = "image" if name == "a" else "img"
            file[image] = random.integers(0, 256, (rows, 8, 10, 3), dtype=np.uint8)
            file["mask"] = random.integers(0, 2, (rows, 8, 10), dtype=np.uint8)
            file["number"] = np.arange(rows) + (100 if name == "b" else 0)
    with h5py.File(tmp_path / "extra.h5", "w") as file:
        file["key"], file["value"] = np.arange(200)[::-1].copy(), np.arange(200) * 0.5
    with h5feed.connect(serve(tmp_path).url) as feed:
        yield {"a": feed["a"], "b": feed["b"]}


def check_interleaved(mixture: h5feed.Mixture, own: dict[str, str], fields: list[str], **options: Any) -> int:
    """The n-th sample of each source is the n-th of its own passes. Returns the number of samples."""
    passes = {}
    for number, (name, dataset) in enumerate(mixture.sources.items()):
        names = {one: own.get(one, one) if name == "b" else one for one in fields}
        renamed: dict[str, Any] = {
            key: [names[one] for one in value] if key == "crop_fields" else value for key, value in options.items()
        }
        read = [
            {one: batch[names.get(one, one)].copy() for one in (*fields, *(["__crop__"] if "crop" in options else []))}
            | {"rows": batch.rows.copy()}
            for epoch in range(4)
            for batch in dataset.batches(batch_size=6, epoch=epoch, fields=[*names.values()], **renamed)
        ]
        passes[number] = {one: np.concatenate([batch[one] for batch in read]) for one in read[0]}
    given = dict.fromkeys(passes, 0)
    for batch in mixture.batches(batch_size=7, fields=fields, **options):
        assert batch.source is not None
        for place, source in enumerate(batch.source.tolist()):
            for one, values in passes[source].items():
                found = batch.rows if one == "rows" else batch[one]
                assert np.array_equal(found[place], values[given[source]]), (one, source, given)
            given[source] += 1
    return sum(given.values())


@pytest.mark.parametrize("at", ["random", "center", "grid"])
def test_crops(pictures: dict[str, h5feed.Dataset], at: str) -> None:
    """Images and masks of all sources have the same crops as in loops over one source."""
    mixture = h5feed.mix(pictures, fields={"b": {"img": "image"}}, weights=[0.5, 0.5], stop="all")
    options: dict[str, Any] = {"crop": (4, 6), "crop_at": at, "shuffle": True, "seed": 4}
    count = check_interleaved(mixture, {"image": "img"}, ["image", "mask", "number"], **options)
    assert count >= 2 * 40 * (4 if at == "grid" else 1) - 1
    check_interleaved(mixture, {"image": "img"}, ["image", "mask"], **options, crop_fields=["image"])
    loader = mixture.loader(x="image", y="mask", batch_size=7, mean=[1.0, 2.0, 3.0], **options)
    for (x, y), batch in zip(loader, mixture.batches(batch_size=7, fields=["image", "mask"], **options), strict=True):
        assert np.array_equal(x, batch["image"] - np.array([1, 2, 3], np.float32)) and np.array_equal(y, batch["mask"])
    state = loader.state_dict()
    with pytest.raises(BadParameter, match="saved with"):
        mixture.loader(x="image", y="mask", batch_size=7, **{**options, "crop": (4, 4)}).load_state_dict(state)


def test_joins_of_all_sources(pictures: dict[str, h5feed.Dataset]) -> None:
    """`join` of a loop joins each source, and so it does for a record that is opened again."""
    mixture = h5feed.mix(pictures)
    order: dict[str, Any] = {"batch_size": 7, "join": "extra:number=key", "shuffle": True, "seed": 2}
    loader = mixture.loader(x="extra/value", y="number", **order)
    seen = []
    for value, number in loader:
        assert np.array_equal(value, (199 - number) * 0.5)
        seen += number.tolist()
    assert sorted(seen) == [*range(40), *range(100, 125)]
    batch = mixture.batch(2, fields=["extra/value", "number"], **order)
    assert np.array_equal(batch["extra/value"], (199 - batch["number"]) * 0.5)
    again = h5feed.reopen(loader.source()).loader(x="extra/value", y="number")
    loader.set_epoch(0)
    for (value, number), (value_again, number_again) in zip(loader, again, strict=True):
        assert np.array_equal(value, value_again) and np.array_equal(number, number_again)
    with pytest.raises(h5feed.FieldNotFound, match="has no field 'extra/value'"):
        mixture.loader(x="extra/value", y="number")


def test_sources_that_start_again(pictures: dict[str, h5feed.Dataset]) -> None:
    """With `stop="all"`, the source whose rows last longest for its weight comes once; each other one starts another
    pass of its own, in a new order, when its rows are used up."""
    mixture = h5feed.mix(pictures, weights=[0.5, 0.5], stop="all")
    read = [*mixture.batches(batch_size=5, shuffle=True, seed=1, fields=["number"])]
    numbers = np.concatenate([batch["number"] for batch in read])
    of_a, of_b = numbers[numbers < 100], numbers[numbers >= 100]
    assert sorted(of_a.tolist()) == [*range(40)] and abs(len(of_b) - 40) <= 1
    first, second = of_b[:25], of_b[25:]
    assert sorted(first.tolist()) == [*range(100, 125)]
    assert len({*second.tolist()}) == len(second) and not np.array_equal(second, first[: len(second)])
