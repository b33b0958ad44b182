"""Joins together with windows of rows, sparse rows, lists of different lengths, crops and statistics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse
from h5feed.errors import BadParameter, FieldNotFound, KeysNotFound
from h5feed.options import split_options
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess
from tests.support.windows import OFFSETS, Windows

ROWS, OTHERS = 60, 45
GENERATOR = np.random.default_rng(5)
TRIAL = np.repeat([7, 3, 7, 5], [20, 8, 15, 17])
IDS = GENERATOR.integers(0, OTHERS, ROWS)
"""Several rows have the same partner."""
DEEP_IDS = GENERATOR.permutation(OTHERS)
PART_IDS = np.setdiff1d(GENERATOR.permutation(OTHERS), IDS[[4, 24, 41]])
TARGET = np.arange(ROWS, dtype="i4")
X = GENERATOR.random((ROWS, 2)).astype("f4")
IMAGES = GENERATOR.integers(0, 256, (ROWS, 6, 6, 3), np.uint8)
DEPTH = GENERATOR.random((OTHERS, 6, 6)).astype("f4")
PHOTOS = GENERATOR.integers(0, 256, (OTHERS, 6, 6, 3), np.uint8)
PART = GENERATOR.random((len(PART_IDS), 3))
BESIDE = GENERATOR.integers(0, 99, (ROWS, 2))
COUNTS = scipy.sparse.random(OTHERS, 12, 0.3, "csr", np.float32, GENERATOR)


def tokens_of(number: int, length: int) -> npt.NDArray[np.int32]:
    return number * 10 + np.arange(length, dtype=np.int32)


def write_lists(file: h5py.File, name: str, lists: list[npt.NDArray[np.int32]]) -> None:
    values = file.create_dataset(name, len(lists), h5py.vlen_dtype(np.int32))
    for row, one in enumerate(lists):
        values[row] = one


def write_sparse(file: h5py.File, name: str, matrix: scipy.sparse.csr_matrix) -> None:
    group = file.create_group(name)
    group.attrs.update({"encoding-type": "csr_matrix", "shape": matrix.shape})
    group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "series.h5", "w") as file:
        file["x"], file["target"], file["trial"], file["id"], file["images"] = X, TARGET, TRIAL, IDS, IMAGES
        write_lists(file, "tokens", [tokens_of(row, one % 5) for row, one in enumerate(IDS.tolist())])
        write_sparse(file, "sparse", COUNTS[IDS])
    with h5py.File(folder / "deep.h5", "w") as file:
        file.create_dataset("depth", data=DEPTH, chunks=(8, 6, 6), compression="gzip")
        file["id"], file["words"] = DEEP_IDS, [f"word {number}" * (number % 3) for number in DEEP_IDS]
        write_lists(file, "tokens", [tokens_of(100 + number, number % 5) for number in DEEP_IDS.tolist()])
        write_lists(file, "others", [tokens_of(200 + number, number % 7) for number in DEEP_IDS.tolist()])
        write_sparse(file, "X", COUNTS)
        file["photos"] = PHOTOS
    with h5py.File(folder / "part.h5", "w") as file:
        file["y"], file["id"] = PART, PART_IDS
    with h5py.File(folder / "beside.h5", "w") as file:
        file["z"] = BESIDE
    return serve_module(folder, "--workers", "2")


@pytest.fixture(scope="module")
def ds(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["series"]


def place_of(ids: npt.NDArray[Any], among: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where each id is among others; -1: nowhere."""
    return np.array([next(iter(np.flatnonzero(among == one)), -1) for one in ids])


IN_DEEP, IN_PART = place_of(IDS, DEEP_IDS), place_of(IDS, PART_IDS)
VALUES: dict[str, npt.NDArray[Any]] = {
    "x": X,
    "target": TARGET,
    "deep/depth": DEPTH[IN_DEEP],
    "part/y": PART[IN_PART],
    "beside/z": BESIDE,
}
"""The value of each field for each row of the dataset."""


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """Options of orders whose samples are windows of rows of several datasets."""
    joins = draw(st.lists(st.sampled_from(["deep:id", "part:id", "beside"]), min_size=1, unique=True))
    fields = ["x", "target", *(name for name in VALUES if name.split("/")[0] in {one.split(":")[0] for one in joins})]
    options: dict[str, Any] = {"fields": fields, "join": joins}
    has_length = draw(st.booleans())
    if has_length:
        options |= {"sequence_length": draw(st.integers(1, 4)), "sampling_rate": draw(st.integers(1, 2))}
    if draw(st.booleans()) or not has_length:
        options["offsets"] = draw(st.dictionaries(st.sampled_from(fields), OFFSETS, min_size=1))
    if "part:id" in joins and draw(st.booleans()):
        options["how"] = "inner"
    options |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "sequence_stride": st.integers(1, 3),
                "ends": st.sampled_from(["drop", "pad", "pad_start", "pad_end"]),
                "episode": st.sampled_from(["trial", "none"]),
                "shuffle": st.just(True),
                "seed": st.integers(0, 3),
                "where": st.sampled_from(["target >= 11", "target < 40"]),
                "limit": st.integers(1, 20),
            },
        )
    )
    return options


def has_partners(reference: Windows, sample: int, options: dict[str, Any]) -> bool:
    """Whether `part` has all rows that its fields can be taken at."""
    if "part:id" not in options["join"]:
        return True
    rows = [reference.rows(sample, name)[0] for name in ("part/y", "")]
    return all((IN_PART[one] >= 0).all() for one in rows)


@given(options=orders(), batch_size=st.integers(1, 9), shards=st.integers(1, 3), split=st.sampled_from(["all", "val"]))
def test_equal_to_plain_loops(
    ds: h5feed.Dataset, options: dict[str, Any], batch_size: int, shards: int, split: str
) -> None:
    """The rows of each sample in all datasets, each sample once over all shards, and any batch alike alone."""
    rows = list(range(ROWS))
    if split == "val":
        options["val"] = 1 if options.get("episode") == "trial" else 0.4
        rows = ds.split_rows("val", **split_options({**options, "where": None})).tolist()
    reference = Windows(rows, TRIAL.tolist() if options.get("episode") == "trial" else [0] * ROWS, options)
    samples = reference.samples()
    if not samples:
        with pytest.raises(BadParameter, match="spans"):
            ds.plan(split, **options)
        return
    if condition := options.get("where"):
        samples = [row for row in samples if (row >= 11 if ">=" in condition else row < 40)]
    complete = [row for row in samples if has_partners(reference, row, options)]
    if "how" in options:
        samples = complete[: options.get("limit")]
    else:
        samples = samples[: options.get("limit")]
        if alone := [row for row in samples if row not in complete]:
            with pytest.raises(KeysNotFound, match=f"{len(alone)} of {len(samples)} samples have a row.*{alone[0]}"):
                ds.plan(split, **options)
            return
    seen = []
    for shard in range(shards):
        batches = list(ds.batches(split, batch_size=batch_size, shard=shard, shards=shards, **options))
        for batch in batches:
            for name in options["fields"]:
                found = [reference.rows(row, name) for row in batch.rows.tolist()]
                np.testing.assert_array_equal(batch[name], VALUES[name][np.array([rows for rows, _ in found])])
                if f"{name}.mask" in batch:
                    np.testing.assert_array_equal(batch[f"{name}.mask"], [real for _, real in found])
                else:
                    assert all(np.all(real) for _, real in found)
            real = batch.rows if batch.weight is None else batch.rows[batch.weight > 0]
            seen += real.tolist()
        if batches:
            again = ds.batch(
                len(batches) - 1, split=split, batch_size=batch_size, shard=shard, shards=shards, **options
            )
            for name in options["fields"]:
                np.testing.assert_array_equal(again[name], batches[-1][name])
    assert sorted(seen) == samples
    if not options.get("shuffle") and shards == 1:
        assert seen == samples


def test_loops_resume_and_are_recorded(ds: h5feed.Dataset, server: ServerProcess) -> None:
    """A loop of joined windows goes on where it was, and its record opens the same samples."""
    options: dict[str, Any] = {
        "x": ["x", "deep/depth", "later"],
        "y": "target",
        "join": ["deep:id", "part:id"],
        "how": "inner",
        "sequence_length": 3,
        "offsets": {"later": ("part/y", 4), "target": 0},
        "ends": "pad",
        "shuffle": True,
        "batch_size": 4,
        "val": 0.3,
    }
    loader = ds.loader("train", **options)
    steps, states = [], []
    for step in loader:
        steps.append(step)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert len(steps) > 3
    again = ds.loader("train", **options)
    again.load_state_dict(states[1])
    reopened = h5feed.reopen(loader.source().json(), server.url).loader(x=options["x"], y="target")
    for resumed, expected in ((again, steps[2:]), (reopened, steps)):
        for (x, y), (other_x, other_y) in zip(resumed, expected, strict=True):
            np.testing.assert_array_equal(y, other_y)
            for name in options["x"]:
                np.testing.assert_array_equal(x[name], other_x[name])
    train = ds.sequence("train", verbose=False, **options)
    rows = train.row_ids
    assert sum(len(y) for _, y in steps) == train.samples == len(rows)
    assert (IN_PART[np.minimum(rows + 2, 59)] >= 0).all()


@pytest.mark.parametrize("offset", [0, -1, 3])
def test_sparse_rows_at_an_offset(ds: h5feed.Dataset, offset: int) -> None:
    """Sparse rows of one offset, own and joined ones, as CSR and dense, with a mask for rows beyond an end."""
    options: dict[str, Any] = {
        "fields": ["x", "sparse", "deep/X", "deep/words"],
        "join": "deep:id",
        "sequence_length": 2,
        "offsets": {"sparse": offset, "deep/X": offset, "deep/words": offset},
        "ends": "pad",
        "shuffle": True,
        "batch_size": 7,
    }
    count = 0
    for batch, dense in zip(ds.batches(**options), ds.batches(sparse="dense", **options), strict=True):
        wanted = batch.rows + offset
        rows = np.clip(wanted, 0, ROWS - 1)
        for name in ("sparse", "deep/X"):
            assert (batch.sparse(name) != COUNTS[IDS[rows] if name == "sparse" else IN_DEEP[rows]]).nnz == 0
            np.testing.assert_array_equal(dense[name], batch.sparse(name).toarray())
            for one in (batch, dense):
                assert (f"{name}.mask" in one) == (offset != 0)
                if offset:
                    np.testing.assert_array_equal(one[f"{name}.mask"], rows == wanted)
        assert batch.text("deep/words") == [f"word {IDS[row]}" * (IDS[row] % 3) for row in rows]
        count += len(batch.rows)
    assert count == ROWS
    del options["fields"]
    x, y = next(iter(ds.loader(x="deep/X", y="target", **options)))
    assert x.shape == (7, 12) and y.shape == (7, 2)
    with pytest.raises(BadParameter, match=r"'sparse' are sparse, so several of them are no array.*sparse:0"):
        ds.plan(fields=["sparse"], sequence_length=2)
    with pytest.raises(BadParameter, match="'deep/X' are sparse"):
        ds.plan(join="deep:id", fields=["deep/X"], offsets={"deep/X": [0, 1]})


def test_sparse_rows_of_another_dataset(ds: h5feed.Dataset) -> None:
    """Two modalities of the same cells: sparse rows come by default, as CSR or dense, in all loops."""
    joined = ds.join("deep:id")
    batch = joined.batch(1, shuffle=True, batch_size=9)
    assert {"sparse.data", "deep/X.data", "deep/X.indptr", "x", "target"} <= {*batch}
    assert (batch.sparse("deep/X") != COUNTS[IN_DEEP[batch.rows]]).nnz == 0
    sequence = joined.sequence(x=["sparse", "deep/X"], y="target", batch_size=8, verbose=False)
    (inputs, y) = sequence[0]
    np.testing.assert_array_equal(inputs["deep/X"], COUNTS[IN_DEEP[:8]].toarray())
    np.testing.assert_array_equal(inputs["sparse"], COUNTS[IDS[:8]].toarray())
    np.testing.assert_array_equal(y, TARGET[:8])
    matrix, _ = next(iter(joined.loader(x="deep/X", y="target", sparse="csr", batch_size=8)))
    assert (matrix != COUNTS[IN_DEEP[:8]]).nnz == 0


def test_sparse_rows_beside_padded_lists(ds: h5feed.Dataset) -> None:
    """Whatever else is made of a batch, its sparse rows remain; also under another name, and in a batch alone."""
    options: dict[str, Any] = {"join": "deep:id", "fields": ["deep/X", "tokens", "later"], "pad": "tokens"}
    options |= {"offsets": {"later": ("deep/X", 1)}, "ends": "pad", "shuffle": True, "batch_size": 7}
    dense = list(ds.batches(sparse="dense", **options))
    for index, batch in enumerate(ds.batches(**options)):
        after = np.minimum(batch.rows + 1, ROWS - 1)
        for name, rows in (("deep/X", batch.rows), ("later", after)):
            for one in (batch, ds.batch(index, **options)):
                assert (one.sparse(name) != COUNTS[IN_DEEP[rows]]).nnz == 0
            for one in (dense[index], ds.batch(index, sparse="dense", **options)):
                np.testing.assert_array_equal(one[name], COUNTS[IN_DEEP[rows]].toarray())
                assert f"{name}.data" not in one
        assert batch["tokens.lengths"].tolist() == (IDS[batch.rows] % 5).tolist()
    assert len(dense) == 9


def lists_of(batch: h5feed.Batch, name: str) -> list[list[int]]:
    return [one.tolist() for one in batch.lists(name)]


@given(
    how=st.sampled_from([{}, {"join": ["deep:id", "part:id"], "how": "inner"}]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
    shards=st.sampled_from([1, 2]),
    batch_size=st.integers(1, 9),
    bucket=st.sampled_from([10, 30]),
    by=st.sampled_from(["tokens", "deep/others"]),
)
def test_buckets_by_joined_lists(
    ds: h5feed.Dataset,
    how: dict[str, Any],
    shuffle: bool,
    epoch: int,
    shards: int,
    batch_size: int,
    bucket: int,
    by: str,
) -> None:
    """Rows of alike lengths of a joined field come together, each row once, padded to the longest or cut."""
    options: dict[str, Any] = {
        "join": ["deep:id"],
        "fields": ["tokens", "deep/others"],
        "batch_size": batch_size,
        **how,
    }
    options |= {"shuffle": shuffle, "seed": 2, "epoch": epoch, "shards": shards}
    options |= {"bucket": bucket, "bucket_by": by, "pad": True}
    lengths = IDS % 5 if by == "tokens" else IDS % 7
    plain = [
        batch.rows[batch.weight > 0] if batch.weight is not None else batch.rows
        for batch in ds.batches(**{**options, "shards": 1, "bucket": None, "bucket_by": None, "pad": None})
    ]
    order = np.concatenate(plain)
    step = batch_size * shards
    size = -(-bucket // step) * step
    seen: list[int] = []
    for shard in range(shards):
        for batch in ds.batches(shard=shard, **options):
            for name, base, most in (("tokens", batch.rows, 5), ("deep/others", 200 + IDS[batch.rows], 7)):
                own = [tokens_of(number, IDS[row] % most) for number, row in zip(base, batch.rows, strict=True)]
                padded = np.zeros_like(batch[name])
                for place, one in enumerate(own):
                    padded[place, : len(one)] = one
                np.testing.assert_array_equal(batch[name], padded)
                assert batch[f"{name}.lengths"].tolist() == [len(one) for one in own]
            seen += (batch.rows if batch.weight is None else batch.rows[batch.weight > 0]).tolist()
    assert sorted(seen) == sorted(order.tolist())
    if shards == 1:
        for first in range(0, len(order), size):
            there = order[first : first + size]
            assert sorted(seen[first : first + size]) == sorted(there.tolist())
            if not shuffle:
                assert seen[first : first + size] == there[np.argsort(lengths[there], kind="stable")].tolist()


@pytest.mark.parametrize("truncate", ["start", "end"])
def test_joined_lists_are_cut(ds: h5feed.Dataset, truncate: Literal["start", "end"]) -> None:
    """The server cuts lists of a joined dataset; without `truncate`, a longer one is an error that names its row."""
    options: dict[str, Any] = {"join": "deep:id", "fields": ["tokens", "deep/others"], "pad": ["deep/others"]}
    for batch in ds.batches(max_length=4, truncate=truncate, shuffle=True, batch_size=16, **options):
        for place, row in enumerate(batch.rows.tolist()):
            whole = tokens_of(200 + IDS[row], IDS[row] % 7)
            kept = whole[:4] if truncate == "start" else whole[-4:]
            assert batch["deep/others"][place].tolist() == [*kept.tolist(), *[0] * (4 - len(kept))]
    longest = int((IDS % 7).max())
    first = int(np.argmax(IDS % 7 > 4))
    with pytest.raises(BadParameter, match=f"row {first} of 'deep/others' has .* longest row has {longest}"):
        ds.plan(max_length=4, **options)
    assert ds.plan(max_length=longest, **options).rows == ROWS


def test_packs_of_joined_lists(ds: h5feed.Dataset) -> None:
    """Lists of both datasets share packed rows if they have equal lengths, else they are refused."""
    options: dict[str, Any] = {"pack": 16, "batch_size": 3, "shuffle": True, "fields": ["tokens", "deep/tokens"]}
    for joins in ({"join": "deep:id"}, {"join": ["deep:id", "part:id"], "how": "inner"}):
        seen = []
        alone = ds.batch(1, pack_by="tokens", sparse="dense", **options, **joins)
        for batch in ds.batches(pack_by="tokens", **options, **joins):
            if batch.index == 1:
                np.testing.assert_array_equal(alone.row_offsets, batch.row_offsets)
            own, other = np.split(batch["tokens"].reshape(-1), 1)[0], batch["deep/tokens"].reshape(-1)
            real = batch["segment_ids"].reshape(-1) > 0
            rows = own[real] // 10
            assert (other[real] // 10 - 100 == IDS[rows]).all() and (own[real] % 10 == other[real] % 10).all()
            seen += np.unique(rows).tolist()
        kept = (IDS % 5 > 0) & ((IN_PART >= 0) | ("how" not in joins))
        assert sorted(seen) == np.flatnonzero(kept).tolist()
    differ = int(np.argmax(IDS % 5 != IDS % 7))
    with pytest.raises(BadParameter, match=f"row {differ} of 'deep/others' has another length than that of 'tokens'"):
        ds.plan(**options | {"fields": ["tokens", "deep/others"]}, pack_by="tokens", join="deep:id")
    with pytest.raises(BadParameter, match="'deep/depth' has one value per row"):
        ds._client.json(f"{ds._path}/plan", {"pack": "16", "join": "deep:id", "fields": "tokens,deep%2Fdepth"})


@pytest.mark.parametrize("at", ["random", "grid"])
def test_crops_of_joined_rows(ds: h5feed.Dataset, at: str) -> None:
    """The same part of the rows of both datasets; also of windows."""
    options: dict[str, Any] = {"join": "deep:id", "fields": ["images", "deep/depth"], "crop": (3, 4), "crop_at": at}
    windows: dict[str, Any] = {"offsets": {"deep/depth": [0, 1]}, "ends": "pad"}
    for more in ({}, windows):
        count = 0
        for batch in ds.batches(shuffle=True, batch_size=11, **options, **more):
            for place, (row, (top, left)) in enumerate(zip(batch.rows, batch["__crop__"], strict=True)):
                part = np.s_[..., top : top + 3, left : left + 4]
                np.testing.assert_array_equal(
                    batch["images"][place], np.moveaxis(np.moveaxis(IMAGES[row], -1, 0)[part], 0, -1)
                )
                rows = [row, min(row + 1, ROWS - 1)] if more else row
                np.testing.assert_array_equal(batch["deep/depth"][place], DEPTH[IN_DEEP[rows]][part])
            count += len(batch.rows)
        assert count == ROWS * (4 if at == "grid" else 1)


def test_statistics_of_joined_fields(ds: h5feed.Dataset, server: ServerProcess) -> None:
    """They are those of the partners of the rows of the split, each as often as it is one, without rows left out."""
    joined, whole = ds.join("deep:id", "part:id", how="inner"), ds.join("deep:id", "beside")
    train = ds.split_rows("train", val=0.3)
    kept = train[IN_PART[train] >= 0]
    assert len(np.unique(IN_DEEP[kept])) < len(kept) < len(train)
    sparse = COUNTS.toarray()[IN_DEEP]
    for names, rows in ((joined, kept), (whole, train)):
        values = {"deep/depth": DEPTH[IN_DEEP], "deep/X": sparse, "x": X, "deep/photos": PHOTOS[IN_DEEP]}
        values |= {"part/y": PART[IN_PART]} if names is joined else {"beside/z": BESIDE}
        for name, own in values.items():
            found = names.stats("train", field=name, val=0.3)
            assert found["rows"] == len(rows)
            np.testing.assert_allclose(found["mean"], own[rows].mean(dtype=np.float64), rtol=1e-5)
            np.testing.assert_allclose(found["std"], own[rows].std(dtype=np.float64), rtol=1e-5)
        image = names.mean_image("deep/photos", "train", val=0.3)
        np.testing.assert_allclose(image, PHOTOS[IN_DEEP[rows]].mean(axis=0), rtol=1e-5)
    assert {"deep/depth", "part/y", "x", "deep/words"} <= {*joined.stats("train", val=0.3)}
    assert joined.stats("train", field="deep/depth", val=0.3).plot().png.startswith(b"\x89PNG")
    options: dict[str, Any] = {"x": "deep/photos", "y": "target", "val": 0.3, "mean": "server", "std": "server"}
    for split in ("train", "val"):
        sequence = joined.sequence(split, verbose=False, batch_size=60, **options)
        mean, std = (getattr(PHOTOS[IN_DEEP[kept]], of)((0, 1, 2), np.float64) for of in ("mean", "std"))
        expected = (PHOTOS[IN_DEEP[sequence.row_ids]] - mean) / std
        np.testing.assert_allclose(sequence[0][0], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(KeysNotFound, match=r"of 60 rows have a 'id'"):
        ds.join("part:id").stats(field="part/y")
    with pytest.raises(FieldNotFound, match="did you mean 'depth'"):
        whole.stats(field="deep/dept")
    notes = [one.splits(val=0.3)["note"] or "" for one in (joined, whole)]
    assert ["that the join leaves out" in note for note in notes] == [True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"join": "deep:id", "offsets": {"deep/dept": 1}}, "did you mean 'depth'"),
        ({"offsets": {"deep/depth": 1}}, "deep/depth"),
        ({"join": "deep:id", "offsets": {"deep/words": ("deep/depth", 1)}}, "a field of its own"),
        ({"join": "deep:id", "sequence_length": 2, "fields": ["deep/words"]}, "'deep/words' differ in length"),
        ({"join": "deep:id", "bucket": 9, "bucket_by": "deep/depth"}, "'deep/depth' have the same shape"),
        ({"fields": ["images", "sparse"], "crop": (2, 2), "crop_fields": ["sparse"]}, "'sparse' .* 0 axes can be"),
        ({"join": "deep:id", "bucket": 9, "bucket_by": "deep/dept"}, "did you mean 'depth'"),
        ({"join": "part:id", "bucket": 9, "bucket_by": "tokens"}, "rows have a 'id' that no row"),
        ({"join": "part:id", "sequence_length": 2}, "samples have a row with a 'id' that no row of 'part'"),
    ],
)
def test_what_is_refused(ds: h5feed.Dataset, options: dict[str, Any], said: str) -> None:
    """The message names the value, and what would be right."""
    with pytest.raises((BadParameter, FieldNotFound, KeysNotFound), match=said):
        ds.plan(**({"fields": ["x"]} | options))
