"""Rows of different lengths as arrays of few shapes: padded, bucketed and packed, in all loops."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import numpy as np
import pytest
from h5feed.errors import BadParameter, FeedError, FieldNotFound
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess
from tests.support.texts import FIELDS, LENGTHS, ROWS, TOKENS, write_texts


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return serve_module(folder, "--workers", "2")


@pytest.fixture(scope="module")
def texts(served: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(served.url, deadline=60) as feed:
        yield feed["texts"]


def kept(batches: Any) -> list[tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]]:
    return [(batch.rows.copy(), {name: array.copy() for name, array in batch.items()}) for batch in batches]


def assert_same(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for (rows, fields), (those, theirs) in zip(one, other, strict=True):
        assert rows.tolist() == those.tolist() and list(fields) == list(theirs)
        for name, array in fields.items():
            assert array.dtype == theirs[name].dtype
            np.testing.assert_array_equal(array, theirs[name])


def assert_padded(
    batch: Any,
    name: str,
    most: int | None = None,
    truncate: str = "start",
    value: float = 0,
    to: int | list[int] | None = None,
) -> None:
    """The arrays of a padded field are those of a loop over rows."""
    lists = [FIELDS[name][row] for row in batch.rows]
    if most is not None:
        lists = [one[:most] if truncate == "start" else one[max(0, len(one) - most) :] for one in lists]
    longest = max(map(len, lists))
    if most is not None and to is None:
        width = most
    elif isinstance(to, list):
        width = min([bound for bound in [*to, most] if bound is not None and bound >= longest])
    else:
        multiple = to or 8
        width = min(max(1, -(-longest // multiple)) * multiple, most or 1000)
    assert batch[name].shape == batch[name + ".mask"].shape == (len(lists), width)
    assert batch[name + ".lengths"].dtype == np.int32
    for place, one in enumerate(lists):
        assert batch[name][place].tolist() == [*one.tolist(), *[value] * (width - len(one))]
        assert batch[name + ".lengths"][place] == len(one)
        assert batch[name + ".mask"][place].tolist() == [True] * len(one) + [False] * (width - len(one))


ORDERS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 40),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 3),
        "epoch": st.integers(0, 2),
        "limit": st.sampled_from([None, 1, 50]),
        "bucket": st.sampled_from([None, 1, 64, 1000]),
    }
)


@given(
    order=ORDERS,
    names=st.sets(st.sampled_from(list(FIELDS)), min_size=1),
    most=st.sampled_from([None, 1, 5, 70]),
    truncate=st.sampled_from(["start", "end"]),
    value=st.sampled_from([0, 7]),
    to=st.sampled_from([None, 4, [2, 9, 1000]]),
)
def test_padded_batches_are_those_of_a_loop_over_rows(
    texts: h5feed.Dataset,
    order: dict[str, Any],
    names: set[str],
    most: int | None,
    truncate: str,
    value: int,
    to: int | list[int] | None,
) -> None:
    cut: dict[str, Any] = {} if most is None else {"max_length": most, "truncate": truncate}
    least = to[0] if isinstance(to, list) else to
    if most is not None and least is not None and least >= most:
        # Refused, because it has no effect.
        to = None
    cut |= {} if to is None else {"pad_to": to}
    # A list whose length is fixed cannot be bucketed by.
    alike = next((name for name in FIELDS if most is None or to is not None or name not in names), None)
    order = {**order, "bucket": order["bucket"] if alike else None}
    by: dict[str, Any] = {"bucket_by": alike} if order["bucket"] else {}
    rows: list[int] = []
    for index, batch in enumerate(texts.batches(**order, **by, **cut, pad=sorted(names), pad_value=value)):
        for name in names:
            assert_padded(batch, name, most, truncate, value, to)
        np.testing.assert_array_equal(batch["labels"], LENGTHS[batch.rows] % 3)
        if index == 1:
            alone = texts.batch(1, **order, **by, **cut, pad=sorted(names), pad_value=value)
            assert alone.rows.tolist() == batch.rows.tolist()
            assert all(np.array_equal(alone[name], batch[name]) for name in batch)
        rows += batch.rows.tolist()
    assert sorted(rows) == list(range(order["limit"] or ROWS))


@settings(max_examples=15)
@given(
    order=st.fixed_dictionaries(
        {"batch_size": st.integers(1, 9), "shuffle": st.booleans(), "epoch": st.integers(0, 2)}
    ),
    split=st.sampled_from(["all", "train", "val"]),
    pack=st.sampled_from([5, 60, 64, 300]),
    overlong=st.sampled_from(["truncate", "split"]),
    last=st.sampled_from(["keep", "pad"]),
)
def test_packed_batches_are_those_of_a_loop_over_rows(
    texts: h5feed.Dataset, order: dict[str, Any], split: str, pack: int, overlong: str, last: str
) -> None:
    options = {**order, "pack": pack, "pack_by": "tokens", "overlong": overlong, "last": last}
    options |= {} if split == "all" else {"val": 0.2}
    plan = texts.plan(split, fields=["tokens", "marks"], **options)
    items = dict.fromkeys(range(ROWS), 0)
    places = filled = packed_rows = 0
    for batch in texts.batches(split, fields=["tokens", "marks"], pad_value=-1, **options):
        assert batch.row_offsets is not None
        size = len(batch.row_offsets) - 1
        assert {array.shape for array in batch.values()} == {(size, pack)}
        assert batch["segment_ids"].dtype == batch["positions"].dtype == np.int32
        real = np.ones(size, bool) if batch.weight is None else batch.weight == 1
        for place, (begin, end) in enumerate(pairwise(batch.row_offsets.tolist())):
            ids, own = batch["segment_ids"][place], batch.rows[begin:end]
            used = int((ids > 0).sum())
            assert (ids[used:] == 0).all() and (batch["tokens"][place, used:] == -1).all()
            assert (batch["positions"][place, used:] == 0).all()
            assert sorted(set(ids[:used].tolist())) == list(range(1, len(own) + 1))
            for number, row in enumerate(own.tolist(), 1):
                there = ids == number
                length = int(there.sum())
                assert batch["positions"][place][there].tolist() == list(range(length))
                came = batch["tokens"][place][there].tolist()
                # A piece of the row.
                starts = range(0, max(1, len(TOKENS[row])), pack) if overlong == "split" else [0]
                assert any(TOKENS[row][start : start + pack].tolist() == came for start in starts)
                assert batch["marks"][place][there].tolist() == [token % 3 for token in came]
                items[row] += length if real[place] else 0
            places, filled = places + (pack if real[place] else 0), filled + (used if real[place] else 0)
        packed_rows += int(real.sum())
    of_split = range(ROWS) if split == "all" else texts.split_rows(split, val=0.2).tolist()
    expected = {row: min(pack, len(TOKENS[row])) if overlong == "truncate" else len(TOKENS[row]) for row in of_split}
    assert {row: count for row, count in items.items() if count} == {row: n for row, n in expected.items() if n}
    assert packed_rows == plan.rows and plan.fill == pytest.approx(filled / places)


CASES: list[dict[str, Any]] = [
    {"fields": ["tokens", "labels"], "pad": "tokens", "max_length": 16, "truncate": "end"},
    {"fields": ["scores", "text"], "pad": True, "bucket": 64, "bucket_by": "text"},
    {"fields": ["tokens", "marks"], "pack": 64, "pack_by": "tokens"},
    {"fields": [], "pack": 64, "pack_by": "tokens"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_another_server_answers_the_same(texts: h5feed.Dataset, tmp_path: Path, served: Any, case: Any) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(served.folder / "texts.h5", tmp_path / "data")
    server = ServerProcess(tmp_path / "data", tmp_path / "cache")
    try:
        with h5feed.connect(server.url, deadline=60) as feed:
            order = {"batch_size": 8, "shuffle": True, "seed": 1, **case}
            assert_same(kept(texts.batches(**order)), kept(feed["texts"].batches(**order)))
        # A failure of one of two servers is not noticed.
        with h5feed.connect(f"{texts._client.url},{server.url}", deadline=60) as feed:
            batches = feed["texts"].batches(**order, connections=1, readahead=1)
            first = kept([next(batches)])
            server.stop()
            assert_same(first + kept(batches), kept(texts.batches(**order)))
    finally:
        server.stop()


@pytest.mark.parametrize("case", [*CASES[:2], CASES[2]], ids=str)
def test_shards_are_disjoint_and_complete(texts: h5feed.Dataset, case: dict[str, Any]) -> None:
    order = {"batch_size": 4, "shuffle": True, "last": "pad", **case}
    found: list[tuple[int, ...]] = []
    for shard in range(3):
        for batch in texts.batches(**order, shard=shard, shards=3):
            bounds = range(len(batch.rows) + 1) if batch.row_offsets is None else batch.row_offsets
            assert batch.weight is not None
            parts = [tuple(batch.rows[a:b].tolist()) for a, b in pairwise(bounds)]
            found += [part for part, weight in zip(parts, batch.weight, strict=True) if weight]
    rows = [row for part in found for row in part]
    expected = np.flatnonzero(LENGTHS) if "pack" in case else np.arange(ROWS)
    assert sorted(rows) == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {
            **{"x": ["tokens", "tokens.mask"], "pad": True, "max_length": 20, "truncate": "start"},
            **{"bucket": 64, "bucket_by": "marks"},
        },
        {"x": ["tokens", "segment_ids", "positions"], "pack": 64, "pack_by": "tokens"},
        {"x": ["tokens"], "pad": True, "pad_to": [16, 64], "bucket": 50, "bucket_by": "marks"},
    ],
    ids=str,
)
def test_a_loader_resumes_anywhere(texts: h5feed.Dataset, options: dict[str, Any]) -> None:
    options = {"batch_size": 6, "shuffle": True, "bucket_by": "tokens", **options}
    if "pack" in options:
        del options["bucket_by"]

    def arrays(loader: Any) -> list[Any]:
        return [(np.array(batch[0] if isinstance(batch[0], np.ndarray) else batch[0]["tokens"])) for batch in loader]

    whole = arrays(texts.loader(**options))
    for count in (1, len(whole) // 2, len(whole) - 1):
        loader = texts.loader(**options)
        for number, _ in enumerate(loader, 1):
            if number == count:
                state = json.loads(json.dumps(loader.state_dict()))
                break
        other = texts.loader(**options)
        other.load_state_dict(state)
        rest = arrays(other)
        assert len(rest) == len(whole) - count
        assert all(np.array_equal(a, b) for a, b in zip(rest, whole[count:], strict=True))
    with pytest.raises(BadParameter, match="the state was saved with"):
        texts.loader(**{**options, "seed": 9}).load_state_dict(state)
    if "max_length" in options:
        # Two shards of half as many rows each take the same steps.
        halves = []
        for shard in range(2):
            half = texts.loader(**{**options, "batch_size": 3}, shard=shard, shards=2)
            half.load_state_dict(state)
            halves.append(arrays(half))
        for one, other, step in zip(*halves, whole[-len(halves[0]) : -1], strict=False):
            np.testing.assert_array_equal(np.concatenate([one, other]), step)


def test_lengths_are_alike_in_buckets_and_stats_say_so(texts: h5feed.Dataset) -> None:
    fills = []
    buckets: list[dict[str, Any]] = [{}, {"bucket": ROWS, "bucket_by": "tokens"}]
    for bucket in buckets:
        loader = texts.loader(x="tokens", pad="tokens", pad_to=1, batch_size=8, shuffle=True, **bucket)
        for _ in loader:
            pass
        stats = loader.stats()
        assert stats.filled == LENGTHS.sum() and stats["fill"] == stats.filled / stats.places
        fills.append(stats.fill)
    assert fills[1] > 0.9 > 1.3 * fills[0]


def test_a_field_is_padded_to_its_own_length(texts: h5feed.Dataset) -> None:
    batch = texts.batch(0, pad=["tokens", "text"], max_length={"tokens": 5, "text": 4}, truncate="end", batch_size=50)
    assert_padded(batch, "tokens", 5, "end")
    assert_padded(batch, "text", 4, "end")
    batch = texts.batch(0, pad=["tokens", "text"], max_length={"text": 4}, truncate="start", batch_size=50)
    assert_padded(batch, "tokens")
    assert_padded(batch, "text", 4)


def test_truncated_items_are_not_sent(texts: h5feed.Dataset) -> None:
    sizes = []
    cuts: list[dict[str, Any]] = [{}, {"max_length": 2, "truncate": "start"}]
    for cut in cuts:
        loader = texts.loader(x="tokens", y=[], pad="tokens", batch_size=ROWS, **cut)
        next(iter(loader))
        sizes.append(loader.stats().bytes)
    assert sizes[0] - sizes[1] >= 4 * np.maximum(0, LENGTHS - 2).sum() - 400


def test_through_a_cache(texts: h5feed.Dataset, tmp_path: Path) -> None:
    """Its rows are whole; they are cut when a batch is padded."""
    options: dict[str, Any] = {"batch_size": 16, "fields": ["number", "tokens"], "pad": "tokens", "max_length": 8}
    for _ in range(2):
        for batch in texts.batches(**options, truncate="end", cache=tmp_path):
            assert_padded(batch, "tokens", 8, "end")
            assert batch["number"].tolist() == batch.rows.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pad": "tokens", "max_length": 8}, r"max_length=8: row \d+ of 'tokens' has .* use truncate=start"),
        ({"pad": "text", "max_length": 8}, r"max_length=8: row \d+ of 'text' has"),
        ({"max_length": 8}, "max_length= needs pad="),
        ({"pad": "tokens", "truncate": "start"}, "truncate= needs max_length="),
        ({"pad": "labels"}, "all rows of 'labels' have the same shape already"),
        ({"pad": "tokens", "max_length": 0}, "max_length=0 must be a number of items"),
        ({"pad": "tokens", "max_length": {"text": 4}}, "max_length= names 'text', which is not padded"),
        ({"pad": "text", "pad_value": -100}, "pad_value=-100 is not a value of 'text', which has uint8 items"),
        ({"pad": "tokens", "pad_value": 0.5}, "pad_value=0.5 is not a value of 'tokens'"),
        ({"pad": "tokens", "pad_to": [8, 4]}, "lengths in ascending order"),
        ({"pad": "tokens", "pad_to": 60, "max_length": 60}, "pad_to=60 has no effect with max_length=60"),
        (
            {"pad": "tokens", "pad_to": [64, 90], "max_length": 60},
            "has no effect with max_length=60, which is not longer",
        ),
        ({"pad": "tokens", "max_length": 60, "truncate": "middle"}, "truncate='middle' must be 'start' or 'end'"),
        ({"pad": "tokens", "fields": ["labels"]}, "pad='tokens': this field is not among the requested ones"),
        ({"pad": True, "fields": ["labels"]}, "pad=True: there are no lists or text"),
        ({"bucket": 64}, "has several fields of lists or text, .*: name one with bucket_by="),
        ({"bucket": 64, "bucket_by": "labels"}, "all rows of 'labels' have the same shape"),
        (
            {"bucket": 64, "bucket_by": "tokens", "pad": "tokens", "max_length": 60},
            "bucket=64 has no effect on 'tokens', whose rows max_length=60 makes equally long: also give .* pad_to=",
        ),
        ({"pad": "tokens", "pad_value": {"token": 1}}, "pad_value= names 'token', which is not padded"),
        (
            {"bucket": 9, "bucket_by": "tokens", "bucket_group": 40_000, "batch_size": 33},
            "1320000 rows together, more than 1048576",
        ),
        ({"pack": 64}, "name the fields to pack with fields="),
        ({"pack": 16, "pack_by": "tokens"}, r"row \d+ of 'tokens' has \d+ items, more than pack=16"),
        ({"pack": 64, "fields": ["labels"]}, "pack=: 'labels' are no lists or text: choose from"),
        ({"pack": 64, "fields": ["tokens", "labels"], "pack_by": "tokens"}, "'labels' has one value per row"),
        ({"pack": 64, "fields": ["tokens", "scores"], "pack_by": "tokens"}, r"row \d+ of 'scores' has another length"),
        ({"pack": 64, "pack_by": "tokens", "pad": "tokens"}, "pad= cannot be used with pack="),
        ({"pack": 64, "pack_by": "tokens", "balance": True}, "pack cannot be used with balance"),
        ({"pack": 64, "pack_by": "tokens", "overlong": "drop"}, "overlong"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(texts: h5feed.Dataset, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        texts.batches(**options)


def test_windows_of_buckets_are_whole_batches(texts: h5feed.Dataset) -> None:
    """They are rounded up, or down at their limit; the plan says how many rows they have."""
    for bucket, expected in ((64, 66), (66, 66), (1 << 20, (1 << 20) // 33 * 33)):
        plan = texts.plan(bucket=bucket, bucket_by="tokens", batch_size=33)
        assert plan.bucket_rows == expected
    assert texts.plan().bucket_rows is None
    rows = [batch.rows for batch in texts.batches(bucket=1 << 20, bucket_by="tokens", batch_size=33, fields=["labels"])]
    assert sorted(np.concatenate(rows).tolist()) == list(range(texts.rows))


def test_loops_do_not_get_flat_lists(texts: h5feed.Dataset) -> None:
    """One array of all items of a batch is neither the inputs nor the targets of its rows."""
    for options in ({"x": "tokens", "y": []}, {"x": "labels", "y": "tokens"}):
        with pytest.raises(BadParameter, match="pad='tokens' makes arrays of equal shape"):
            texts.loader(**options)


def test_loops_pack_lists_or_text_only(texts: h5feed.Dataset) -> None:
    for x in ("labels", "segment_ids"):
        with pytest.raises(BadParameter, match="lists or text"):
            texts.loader(pack=64, x=x)
    with pytest.raises(FieldNotFound, match="did you mean 'tokens'"):
        texts.loader(pack=64, x="tokns")


def test_padded_rows_are_not_scaled(texts: h5feed.Dataset) -> None:
    """An option of scaling that would have no effect is an error, and so is one for a field that does not exist."""
    for layout in ({"pad": "tokens"}, {"pack": 64, "pack_by": "tokens", "overlong": "split"}):
        for scaling in ({"rescale": 0.5}, {"mean": "server"}, {"std": {"tokens": 2.0}}):
            with pytest.raises(BadParameter, match="cannot scale 'tokens', whose rows are padded or packed"):
                texts.loader(x="tokens", y=[], **layout, **scaling)
        assert len(list(texts.loader(x="tokens", y=[], rescale={}, **layout)))
    with pytest.raises(FieldNotFound, match=r"rescale=.*did you mean 'tokens'"):
        texts.loader(x="tokens", y=[], pad="tokens", rescale={"token": 0.5})


def test_unknown_fields_are_suggested(texts: h5feed.Dataset) -> None:
    with pytest.raises(FieldNotFound, match="did you mean 'tokens'"):
        texts.batches(pad="token")
    with pytest.raises(FieldNotFound, match="did you mean 'tokens'"):
        texts.batches(bucket=64, bucket_by="tokns")


def test_parts_and_pieces_of_packed_batches_are_refused(served: ServerProcess) -> None:
    import httpx

    base = f"{served.url}/v1/datasets/texts"
    query = {"pack": "64", "pack_by": "tokens", "fields": "tokens", "batch_size": "4"}
    plan = httpx.get(f"{base}/plan", params=query).json()
    assert plan["packed"]["by"] == "tokens" and plan["packed"]["rows"] + plan["packed"]["empty"] == ROWS
    assert plan["packed"]["items"] == LENGTHS.sum()
    for more in ({"from_row": "1"}, {"body": "pieces"}):
        answer = httpx.get(f"{base}/batches/0", params=query | more)
        assert answer.status_code == 400 and "pack" in answer.json()["detail"]
    first = httpx.get(f"{base}/batches/0", params=query)
    again = httpx.get(f"{base}/batches/0", params=query, headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304


def test_shapes_stay_the_same_for_jax(texts: h5feed.Dataset) -> None:
    """A function is compiled once for an epoch, and for the next."""
    jax = pytest.importorskip("jax")
    from h5feed.jax import to_device

    fixed: list[dict[str, Any]] = [
        {"x": ["tokens", "tokens.mask"], "pad": "tokens", "max_length": 24, "truncate": "start"},
        {"x": ["tokens", "segment_ids", "positions"], "pack": 64, "pack_by": "tokens"},
    ]
    for options in fixed:
        compiled: list[Any] = []

        def sum_of(x: Any, compiled: list[Any] = compiled) -> Any:
            compiled.append(jax.tree.map(lambda leaf: leaf.shape, x))
            return x["tokens"].sum()

        summed = jax.jit(sum_of)
        loader = texts.loader(**options, y=[], batch_size=8, shuffle=True, last="pad")
        for _ in range(2):
            for x, *_ in to_device(loader):
                summed(x)
        assert len(compiled) == 1


def test_a_keras_model_learns_from_padded_rows(texts: h5feed.Dataset) -> None:
    keras = pytest.importorskip("keras")
    train = texts.sequence(
        x="tokens",
        pad="tokens",
        max_length=24,
        truncate="start",
        batch_size=16,
        shuffle=True,
    )
    inputs = keras.Input((24,), dtype="int32")
    embedded = keras.layers.Embedding(500, 4, mask_zero=True)(inputs)
    outputs = keras.layers.Dense(3, activation="softmax")(keras.layers.GlobalAveragePooling1D()(embedded))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "sparse_categorical_crossentropy")
    history = model.fit(train, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    assert model.predict(train, verbose=0).shape == (ROWS, 3)
    assert train.row_ids.tolist() == list(range(ROWS))


def test_a_keras_model_learns_from_packed_rows(texts: h5feed.Dataset) -> None:
    keras = pytest.importorskip("keras")

    def next_token(x: Any) -> Any:
        """The token after each, with weight 0 where it is of another row."""
        ids = x["segment_ids"]
        target = np.roll(x["tokens"], -1, axis=1)
        weight = ((np.roll(ids, -1, axis=1) == ids) & (ids > 0)).astype(np.float32)
        weight[:, -1] = 0
        return x, target, weight

    train = texts.sequence(
        x=["tokens", "segment_ids", "positions"],
        y=[],
        pack=64,
        pack_by="tokens",
        batch_size=4,
        shuffle=True,
        transform=lambda x, y: next_token(x),
    )
    tokens, ids, places = (
        keras.Input((64,), dtype="int32", name=name) for name in ("tokens", "segment_ids", "positions")
    )
    embedded = keras.layers.Embedding(500, 8)(tokens) + keras.layers.Embedding(64, 8)(places)
    same = keras.ops.cast(keras.ops.equal(ids[:, :, None], ids[:, None, :]), "float32")
    # The mean of the tokens of the same row of the dataset.
    hidden = keras.ops.matmul(same, embedded) / keras.ops.sum(same, axis=2, keepdims=True)
    model = keras.Model(
        {"tokens": tokens, "segment_ids": ids, "positions": places},
        keras.layers.Dense(500, activation="softmax")(hidden),
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    assert np.isfinite(model.fit(train, epochs=1, verbose=0).history["loss"]).all()


def test_text_targets_stay_classes(texts: h5feed.Dataset) -> None:
    """`pad=True` pads what a model gets as numbers."""
    x, y = next(iter(texts.loader(x=["tokens", "tokens.lengths"], y="code", pad=True, batch_size=8)))
    assert x["tokens"].ndim == 2 and y.shape == (8,)
    x, y = next(iter(texts.loader(x="tokens", y="marks", pad=True, batch_size=8)))
    assert x.shape == y.shape and y.dtype == np.int8
    with pytest.raises(FeedError, match="pad='text' gives its bytes as numbers"):
        texts.loader(x="text")
