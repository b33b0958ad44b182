"""No option is silent: one that would have no effect is refused, by the client and by the server, or listed here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadParameter, FeedError
from h5feed.options import OrderOptions, SequenceOptions, TorchOptions
from h5feed_server.api.queries import OneBatchQuery, RowsPostQuery, RowsQuery, StreamQuery

from tests.support.server_process import ServerProcess

ROWS = 120
_random = np.random.default_rng(0)
LENGTHS = _random.integers(1, 20, ROWS)
XY: dict[str, Any] = {"x": "images", "y": "labels"}

REFUSED_ALONE: dict[str, tuple[Any, str]] = {
    "sequence_stride": (2, "needs sequence_length or offsets"),
    "sampling_rate": (2, "sampling_rate needs sequence_length"),
    "ends": ("pad", "needs sequence_length or offsets"),
    "episode": ("ep", "needs sequence_length or offsets"),
    "stratify": ("labels", "stratify needs test, val or folds"),
    "split_seed": (3, "split_seed needs test, val or folds"),
    "split_shuffle": (False, "split_shuffle needs test, val or folds"),
    "group": ("ep", "group needs test, val or folds"),
    "test": (0.1, "split=all is every row"),
    "val": (0.1, "split=all is every row"),
    "folds": (3, "split=all is every row"),
    "fold": (0, "fold needs folds"),
    "window": (8, "window needs shuffle=true"),
    "max_length": (4, "max_length.* needs pad"),
    "truncate": ("start", "truncate.* needs (pad|max_length)"),
    "pad_to": (4, "pad_to= needs pad="),
    "pad_value": (1, "pad_value= needs pad="),
    "bucket_by": ("tokens", "bucket_by needs bucket"),
    "bucket_group": (2, "bucket_group needs bucket"),
    "pack_by": ("tokens", "pack_by needs pack"),
    "overlong": ("split", "overlong needs pack"),
    "epoch_rows": (3, "epoch_rows needs balance or weights"),
    "crop_fields": ("images", "crop_fields needs crop"),
    "crop_at": ("center", "crop_at needs crop"),
    "how": ("inner", "how=inner needs join"),
    "encoded": ("images", "rows of 'images' are not stored as the bytes of image files"),
    "decode_cf": (True, "none of the fields .* has attributes"),
    "shard": (1, "shard=1 must be from 0 to shards-1"),
}
"""Options of orders that do nothing by themselves: a value, and what is said."""

COUNT_ALONE = (
    *("sequence_length", "offsets", "where", "pad", "bucket", "pack", "balance", "weights", "crop", "limit", "join"),
    *("shuffle", "epoch", "shards", "last", "fields"),
)
"""Options of orders that have an effect by themselves: `tests.client.test_states` has the values."""

HARMLESS: dict[str, str] = {
    "seed": "the seed of an order that shuffles or draws nothing: scripts set it once, with shuffle=False to evaluate",
    "compress": "how rows are sent, not which: documented as ignored on the server's machine and for single batches",
    "decode": "where rows are decoded: the arrays are the same, and stats() says where",
    "sparse": "dense is what arrays are anyway; a loop refuses csr without sparse rows",
}
"""Options of orders that may have no effect, and why that surprises nobody.

Neither does a value that is the default, as ``ends="drop"`` without windows: it says what happens anyway. Nor does
sampling_rate= with sequence_length=1, so that lengths can be compared. An order does not depend on the fields that are
requested: offsets of a field, bucket_by= and join= also count in batches without it, as they decide which samples come.
"""

OF_LOOPS = {
    **dict.fromkeys(("x", "y", "sample_weight", "class_mode", "classes", "rescale", "mean", "std"), "see REFUSED"),
    "transform": "is called with each batch",
    "batch_size": "counts",
    **dict.fromkeys(("connections", "readahead", "cache"), "how rows are fetched, not which"),
    "follow": "looks for new rows before each pass, of any dataset",
    "pin_memory": "documented: only if CUDA is available",
    "verbose": "prints",
    "workers": "documented: above 1, it is connections=, which may not be given then",
    "max_queue_size": "documented: it is readahead=, which may not be given then",
    "use_multiprocessing": "documented: ignored, for scripts of older versions of Keras",
}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # Orders; the first word is the split.
    ("train", {"test": 0.1, "split_shuffle": False, "split_seed": 3}, "split_seed needs split_shuffle=true"),
    ("train", {"folds": 3, "split_shuffle": False, "split_seed": 3}, "split_seed needs split_shuffle=true"),
    ("train", {"test": 0.1, "split_shuffle": False, "stratify": "labels"}, "stratify needs split_shuffle=true"),
    ("train", {"test": 0.2, "group": "ep", "stratify": "labels"}, "stratify and group together need folds"),
    ("train", {"folds": 3, "val": 0.1}, "folds cannot be used with val"),
    ("train", {"test": 0.1, "sequence_length": 2, "episode": "none", "split_seed": 5}, "divided by position"),
    ("train", {"test": 0.1, "sequence_length": 2, "episode": "none", "stratify": "labels"}, "cannot be stratified"),
    ("all", {"stratify": "none", "balance": True}, "balance draws by the label, or by the field that stratify names"),
    ("all", {"sampling_rate": 2, "offsets": {"images": [0, 1]}}, "sampling_rate needs sequence_length"),
    ("all", {"weights": "w", "balance": True}, "two ways to draw rows"),
    ("all", {"weights": "w", "window": 8, "shuffle": True}, "window cannot be used with balance or weights"),
    ("all", {"join": "other", "how": "inner"}, "how=inner needs join=OTHER:key"),
    ("all", {"pack": 64, "pack_by": "tokens", "fields": ["tokens"], "bucket": 8}, "two ways to batch rows"),
    ("all", {"decode": "server", "compress": "zstd"}, "compress='zstd' needs decode="),
]

TOKENS: dict[str, Any] = {"fields": ["tokens", "labels"], "pad": "tokens"}

REFUSED_BATCHES: list[tuple[dict[str, Any], str]] = [
    ({**TOKENS, "max_length": 20, "bucket": 32, "bucket_by": "tokens"}, "bucket=32 has no effect on 'tokens'"),
    ({**TOKENS, "max_length": {"tokens": 20}, "bucket": 32, "bucket_by": "tokens"}, "bucket=32 has no effect"),
    ({**TOKENS, "max_length": 20, "pad_to": 32}, "pad_to=32 has no effect with max_length=20"),
    ({**TOKENS, "truncate": "start"}, "truncate= needs max_length="),
    ({**TOKENS, "max_length": {"marks": 3}}, "names 'marks', which is not padded"),
    ({**TOKENS, "pad_value": {"marks": 3}}, "names 'marks', which is not padded"),
    (
        {"fields": ["tokens"], "pack": 64, "pack_by": "tokens", "pad_value": {"marks": 3}},
        "'marks', which is not packed",
    ),
    ({"fields": ["images", "labels"], "crop": 4, "crop_fields": "act"}, "the samples have no field 'act'"),
]

REFUSED_LOOPS: list[tuple[dict[str, Any], str]] = [
    ({"rescale": {"labels": 2}}, "rescale= scales inputs, but 'labels' is not an input"),
    ({"mean": {"act": 2}}, "mean= scales inputs, but 'act' is not an input"),
    ({"x": "tokens.mask", "pad": "tokens", "rescale": 2.0}, "rescale= has no effect on 'tokens.mask'"),
    ({"x": ["images", "tokens.mask"], "pad": "tokens", "std": {"tokens.mask": 2.0}}, "has no effect on 'tokens.mask'"),
    ({"y": [], "class_mode": "categorical"}, "makes targets from labels, but there are none"),
    ({"x": "tokens", "y": "marks", "pad": True, "class_mode": "categorical"}, "makes targets from labels"),
    ({"class_mode": None}, "y='labels' has no effect: class_mode=None makes no targets"),
    ({"class_mode": "input"}, "y='labels' has no effect: class_mode='input' makes the inputs the targets"),
    ({"classes": ["cat"], "class_mode": "raw"}, "use one of the two"),
    ({"classes": ["cat"], "y": []}, "needs one label field"),
    ({"sparse": "csr"}, "sparse='csr' has no effect: none of 'images', 'labels' has sparse rows"),
    ({"join": "other:id"}, "join='other:id' has no effect: none of the fields 'images', 'labels' is of 'other'"),
    ({"join": ["other", "more"], "x": ["images", "other/x"]}, "join='more' has no effect"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "all.h5", "w") as file:
        file["images"] = _random.integers(0, 256, (ROWS, 8, 8, 3), np.uint8)
        file["labels"] = np.arange(ROWS) % 3
        file["labels"].attrs["class_names"] = ["cat", "dog", "bird"]
        file["w"], file["ep"], file["act"] = _random.random(ROWS), np.arange(ROWS) // 20, _random.random((ROWS, 4))
        for name in ("tokens", "marks"):
            file[name] = _random.integers(0, 9, LENGTHS.sum(), np.int32)
            file[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(LENGTHS)])
        file["id"] = np.arange(ROWS)[::-1]
    for name in ("other", "more"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"], file["id"] = _random.random((ROWS, 2)), np.arange(ROWS)
    return serve_module(folder)


@pytest.fixture(scope="module")
def ds(feed: h5feed.Feed) -> h5feed.Dataset:
    return feed["all"]


def ask(server: ServerProcess, path: str, **query: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{server.url}/v1/datasets/all/{path}", params=query, timeout=60).json()
    return answer


def test_every_option_is_listed() -> None:
    """A new option has to say what it does alone."""
    listed = [*REFUSED_ALONE, *COUNT_ALONE, *HARMLESS]
    assert sorted(listed) == sorted(OrderOptions.__annotations__)
    every = {*TorchOptions.__annotations__, *SequenceOptions.__annotations__}
    assert every - {*listed} == {*OF_LOOPS}
    # Parameters of the server that no option stands for.
    own = {"split", "batch_size", "revision", "format", "body", "from_row", "to_row", "start", "stop"}
    assert {*OneBatchQuery.model_fields, *StreamQuery.model_fields} - own <= {*listed}
    assert {*RowsQuery.model_fields, *RowsPostQuery.model_fields} - own == {
        *("step", "where", "key", "value", "duplicates", "fields", "encoded")
    }


@pytest.mark.parametrize("option", REFUSED_ALONE)
def test_an_option_alone_is_refused(server: ServerProcess, ds: h5feed.Dataset, option: str) -> None:
    value, said = REFUSED_ALONE[option]
    given: dict[str, Any] = {option: value}
    with pytest.raises(BadParameter, match=said):
        ds.batches(**given)
    with pytest.raises(BadParameter, match=said):
        ds.batch(0, fields=["images"], **given)
    with pytest.raises(BadParameter, match=said):
        ds.loader(**XY, **given)
    with pytest.raises(BadParameter):
        h5feed.mix({"one": ds, "two": ds}).loader(**XY, **given)
    if option in OneBatchQuery.model_fields:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        for path in ("plan", "batches/0"):
            problem = ask(server, path, **{option: text})
            assert problem["code"] == "bad_parameter" and option in problem["detail"], problem


@pytest.mark.parametrize(("split", "options", "said"), REFUSED, ids=str)
def test_options_that_exclude_each_other(ds: h5feed.Dataset, split: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        ds.batches(split, **{"fields": ["images", "labels"], **options})
    if "fields" not in options:
        for loop in (ds.loader, h5feed.mix({"one": ds, "two": ds}).loader):
            with pytest.raises(BadParameter, match=said):
                loop(split, **XY, **options)


@pytest.mark.parametrize(("options", "said"), REFUSED_BATCHES, ids=str)
def test_options_of_fields(ds: h5feed.Dataset, options: dict[str, Any], said: str) -> None:
    with pytest.raises(FeedError, match=said):
        ds.batches(**options)
    with pytest.raises(FeedError, match=said):
        ds.batch(0, **options)


@pytest.mark.parametrize(("options", "said"), REFUSED_LOOPS, ids=str)
def test_options_of_loops(ds: h5feed.Dataset, options: dict[str, Any], said: str) -> None:
    with pytest.raises(FeedError, match=said):
        ds.loader(**{**XY, **options})


def test_joins_of_which_only_offsets_count(ds: h5feed.Dataset) -> None:
    """They decide which samples there are: the last row has no next one."""
    loader = ds.loader(**XY, join="other:id", offsets={"other/x": [0, 1]}, batch_size=ROWS)
    assert len(next(iter(loader))[0]) == ROWS - 1


def test_buckets_of_a_length_that_is_fixed(server: ServerProcess, ds: h5feed.Dataset) -> None:
    """Of another list, or of bodies, which are not padded, it is not; nor with lengths to choose from."""
    cut: dict[str, Any] = {"pad": "tokens", "max_length": 20, "bucket": 32}
    assert ask(server, "plan", **cut, bucket_by="tokens")["bucket_rows"] == 32
    assert ds.plan(**cut, bucket_by="marks", fields=["tokens"]).bucket_rows == 32
    assert ds.plan(**cut, bucket_by="tokens", pad_to=8, fields=["tokens"]).bucket_rows == 32


def test_options_of_single_rows(server: ServerProcess, ds: h5feed.Dataset) -> None:
    with pytest.raises(BadParameter, match="duplicates= needs keys="):
        ds.take([0, 1], duplicates="all")
    with pytest.raises(BadParameter, match="duplicates='some' must be"):
        ds.take([0, 1], duplicates="some")  # type: ignore[arg-type]
    for query in ({"duplicates": "all"}, {"value": "1"}, {"key": "id"}, {"key": "id", "value": "1", "step": "2"}):
        assert ask(server, "rows", **query)["code"] == "bad_parameter"


def test_options_of_bodies(server: ServerProcess) -> None:
    for query in ({"compress": "zstd"}, {"body": "pieces", "from_row": "1"}):
        assert ask(server, "batches/0", **query)["code"] == "bad_parameter"
    for body in ("pieces", "rows"):
        assert ask(server, "batches/0", body=body, format="npz")["status"] == 406


def test_options_of_keras(ds: h5feed.Dataset) -> None:
    pytest.importorskip("keras")
    with pytest.raises(BadParameter, match="max_queue_size=3, in batches, and readahead=1000"):
        ds.sequence(**XY, readahead=1000, max_queue_size=3)
    with pytest.raises(BadParameter, match="workers=4 and connections=2"):
        ds.sequence(**XY, workers=4, connections=2)
    ds.sequence(**XY, workers=1, connections=2, verbose=False)


def test_options_of_torch(ds: h5feed.Dataset) -> None:
    pytest.importorskip("torch")
    with pytest.raises(BadParameter, match="split='all' is every row"):
        ds.torch_map(val=0.1, **XY)


def test_options_of_sources(ds: h5feed.Dataset) -> None:
    """Those of the mixture as a whole are not options of a source, nor are those that contradict each other."""
    two = {"one": ds, "two": ds}
    options = {"epoch": 3, "shard": 1, "shards": 2, "last": "drop", "fields": ["images"], "batch_size": 3}
    for name, value in options.items():
        with pytest.raises(BadParameter, match=f"the source 'one' has {name}=: give it to the loop"):
            h5feed.mix(two, options={"one": {name: value}})
    contradicting: list[dict[str, Any]] = [
        {"weights": [1, 2], "temperature": 2.0},
        {"weights": [1, 2], "round_robin": True},
        {"temperature": 2.0, "round_robin": True},
        {"stop": "all", "epoch_rows": 50},
    ]
    for one in contradicting:
        with pytest.raises(BadParameter, match="contradict each other"):
            h5feed.mix(two, **one)
    with pytest.raises(BadParameter, match="epoch_rows= is an option of mix"):
        h5feed.mix(two).loader(**XY, weights="w", epoch_rows=10)
