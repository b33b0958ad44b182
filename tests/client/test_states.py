"""States of passes are taken up only in an order that gives the same batches: every option counts, or is harmless."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import BadParameter
from h5feed.loops.passes import position_in, state_of
from h5feed.options import OrderOptions
from h5feed.plan import HARMLESS

from tests.support.photographs import encoded
from tests.support.server_process import ServerProcess

ROWS = 60

PADDED: dict[str, Any] = {"pad": "tokens", "fields": ["tokens", "label"]}
CUT: dict[str, Any] = {**PADDED, "max_length": 3, "truncate": "end"}
BUCKETS: dict[str, Any] = {**PADDED, "bucket": 40, "bucket_by": "tokens"}
PACKED: dict[str, Any] = {"pack": 20, "pack_by": "tokens", "fields": ["tokens"]}
CROPPED: dict[str, Any] = {"crop": (4, 4), "fields": ["image"]}
SPLIT: dict[str, Any] = {"val": 10, "test": 10}
WINDOWS: dict[str, Any] = {"fields": ["number"], "sequence_length": 3, "episode": "patient"}
JOINED: dict[str, Any] = {"join": "other:number=key", "how": "inner", "fields": ["label", "other/value"]}

# Each option that counts: the other options, and two of its values, or that and its absence.
COUNTING: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "sequence_length": (WINDOWS, 3, 4),
    "sequence_stride": (WINDOWS, 2, None),
    "sampling_rate": (WINDOWS, 2, None),
    "offsets": ({"fields": ["number"], "episode": "patient"}, {"number": [-1, 0]}, {"number": [0, 1]}),
    "ends": (WINDOWS, "pad", None),
    "episode": ({"fields": ["number"], "sequence_length": 3}, "patient", "none"),
    "test": (SPLIT, 10, 12),
    "val": (SPLIT, 10, 12),
    "stratify": (SPLIT, "label", "none"),
    "split_seed": (SPLIT, 1, None),
    "split_shuffle": ({**SPLIT, "stratify": "none"}, False, True),
    "group": ({"test": 2, "stratify": "none"}, "patient", None),
    "folds": ({"fold": 0}, 3, 4),
    "fold": ({"folds": 3}, 0, 1),
    "where": ({}, "label == 1", None),
    "window": ({"shuffle": True}, 20, None),
    "pad": ({"fields": ["tokens", "words"]}, ["tokens"], ["tokens", "words"]),
    "max_length": (CUT, 3, {"tokens": 4}),
    "truncate": (CUT, "start", "end"),
    "pad_to": (PADDED, 4, [2, 8]),
    "pad_value": (PADDED, 1, {"tokens": 2}),
    "bucket": (BUCKETS, 40, 24),
    "bucket_by": ({"fields": ["tokens", "words"], "bucket": 40}, "tokens", "words"),
    "bucket_group": (BUCKETS, 2, None),
    "pack": (PACKED, 20, 24),
    "pack_by": ({"fields": [], "pack": 20}, "tokens", "words"),
    "overlong": ({**PACKED, "pack": 4}, "truncate", "split"),
    "balance": ({}, True, None),
    "weights": ({}, "strength", np.arange(ROWS)),
    "epoch_rows": ({"weights": "strength"}, 30, None),
    "crop": (CROPPED, (4, 4), (4, 6)),
    "crop_fields": ({"crop": (4, 4), "fields": ["image", "mask"]}, ["image"], None),
    "crop_at": (CROPPED, "center", "grid"),
    "limit": ({}, 30, None),
    "join": ({"fields": ["label", "other/value"]}, "other:number=key", "other"),
    "how": (JOINED, "inner", None),
    "encoded": ({"fields": ["photo"]}, ["photo"], None),
    "decode_cf": ({"fields": ["packed"]}, True, None),
    "sparse": ({"fields": ["counts"]}, "csr", "dense"),
    "shuffle": ({}, True, False),
    "seed": ({"shuffle": True}, 1, 2),
    "last": ({}, "drop", "pad"),
}

# Each option that does not: the other options, and two of its values.
NOT_COUNTING: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "epoch": ({"shuffle": True}, 0, 2),
    "fields": ({}, ["label"], ["number", "image"]),
    "shard": ({"shards": 2}, 0, 1),
    "shards": ({"last": "drop"}, None, 1),
    "decode": ({}, "server", "auto"),
    "compress": ({}, "zstd", None),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Dataset]:
    """A dataset with fields of every kind, and another one to join."""
    folder = tmp_path_factory.mktemp("states")
    random = np.random.default_rng(0)
    with h5py.File(folder / "all.h5", "w") as file:
        numbers = np.arange(ROWS)
        file["image"] = random.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
        file["mask"] = random.integers(0, 2, (ROWS, 8, 8), dtype=np.uint8)
        file["label"], file["number"], file["patient"] = numbers % 3, numbers, numbers // 10
        file["strength"] = 1.0 + numbers
        for name, most in (("tokens", 7), ("words", 5)):
            lists = file.create_dataset(name, (ROWS,), h5py.vlen_dtype(np.int32))
            for row in range(ROWS):
                lists[row] = random.integers(0, 99, 1 + row % most)
        photos = file.create_dataset("photo", (ROWS,), h5py.vlen_dtype(np.uint8))
        for row in range(ROWS):
            photos[row] = np.frombuffer(encoded(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)), np.uint8)
        file["packed"] = numbers.astype(np.int16)
        file["packed"].attrs["scale_factor"] = 0.5
        counts = file.create_group("counts")
        counts.attrs["h5sparse_format"], counts.attrs["h5sparse_shape"] = "csr", (ROWS, 4)
        counts["data"], counts["indices"] = np.ones(ROWS, np.float32), (numbers % 4).astype(np.int32)
        counts["indptr"] = np.arange(ROWS + 1)
    with h5py.File(folder / "other.h5", "w") as file:
        file["key"], file["value"] = np.arange(ROWS)[::-1].copy(), np.arange(ROWS) * 2.0
    toml = '[datasets.all]\nfiles = ["all.h5"]\ndecode = {photo = {shape = [8, 8, 3]}}\n'
    (folder / "h5feed.toml").write_text(toml)
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["all"]
    server.stop()


def planned(data: h5feed.Dataset, option: str, value: Any, others: dict[str, Any]) -> tuple[h5feed.Dataset, Any]:
    options = {**others, option: value}
    if value is None:
        del options[option]
    split = "train" if SPLIT.keys() & options.keys() or "folds" in options else "all"
    samples = data.joined_by(options)
    return samples, samples.plan(split, batch_size=4, **options)


def test_every_option_is_known() -> None:
    """A new option has to be tested here, and counts unless it is said to be harmless."""
    assert COUNTING.keys() | NOT_COUNTING.keys() == OrderOptions.__annotations__.keys()
    assert NOT_COUNTING.keys() | {"batch_size"} == set(HARMLESS)


@pytest.mark.parametrize("option", COUNTING)
def test_options_that_count(data: h5feed.Dataset, option: str) -> None:
    """A state is refused with another value of the option, and taken with the same."""
    others, one, other = COUNTING[option]
    samples, plan = planned(data, option, one, others)
    state = state_of(samples, plan, 3, 1)
    assert position_in(state, *planned(data, option, one, others)) == (3, 1)
    with pytest.raises(BadParameter, match=f"saved with .*{option}="):
        position_in(state, *planned(data, option, other, others))


@pytest.mark.parametrize("option", NOT_COUNTING)
def test_options_that_do_not_count(data: h5feed.Dataset, option: str) -> None:
    """What changes neither the samples nor their values may differ."""
    others, one, other = NOT_COUNTING[option]
    samples, plan = planned(data, option, one, others)
    state = state_of(samples, plan, 3, 1)
    assert position_in(state, *planned(data, option, other, others)) == (3, 1)


def test_buckets_of_other_shards(data: h5feed.Dataset) -> None:
    """What counts is the number of rows that are similar, however many shards divide them."""
    whole = data.plan(batch_size=8, **BUCKETS)
    state = state_of(data, whole, 0, 2)
    assert position_in(state, data, data.plan(batch_size=4, shards=2, **BUCKETS)) == (0, 2)
    with pytest.raises(BadParameter, match="bucket_group"):
        position_in(state, data, data.plan(batch_size=4, shards=2, bucket_group=4, **BUCKETS))
