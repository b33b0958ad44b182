"""Rows of different lengths in loops of torch and TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import h5feed
import pytest

from tests.support.server_process import ServerProcess
from tests.support.texts import LENGTHS, ROWS, write_texts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return serve_module(folder, "--workers", "2")


@pytest.fixture(scope="module")
def texts(served: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(served.url, deadline=60) as feed:
        yield feed["texts"]


def test_torch_workers_share_buckets(texts: h5feed.Dataset) -> None:
    torch = pytest.importorskip("torch")
    options: dict[str, Any] = {"x": "tokens", "y": "number", "class_mode": "raw", "pad": "tokens", "bucket": 64}
    batches = texts.torch(**options, bucket_by="tokens", batch_size=8, shuffle=True)
    expected = [y.tolist() for _, y in batches]
    assert sorted(row for rows in expected for row in rows) == list(range(ROWS))
    for workers in (2, 3):
        batches.set_epoch(0)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
        assert [y.tolist() for _, y in loader] == expected


def test_packed_rows_for_torch(texts: h5feed.Dataset) -> None:
    torch = pytest.importorskip("torch")
    names = ["tokens", "segment_ids", "positions"]
    batches = texts.torch(x=names, pack=64, pack_by="tokens", batch_size=4, shuffle=True, last="drop")
    for (x,) in batches:
        assert all(tensor.shape == (4, 64) for tensor in x.values())
        # Attention within each row of the dataset alone.
        ids = x["segment_ids"]
        mask = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, None, :]
        assert torch.equal(mask.any(-1), ids > 0)


def test_signatures_for_tensorflow(texts: h5feed.Dataset) -> None:
    """The length is part of them if it is fixed."""
    tf = pytest.importorskip("tensorflow")
    fixed = texts.tf_data(x="tokens", pad="tokens", max_length=24, truncate="end", batch_size=16, last="drop")
    assert fixed.element_spec[0].shape.as_list() == [16, 24]
    packed = texts.tf_data(x=["tokens", "segment_ids"], pack=64, pack_by="tokens", batch_size=4, last="drop")
    assert [spec.shape.as_list() for spec in packed.element_spec[0].values()] == [[4, 64], [4, 64]]
    buckets: dict[str, Any] = {"bucket": 64, "bucket_by": "tokens", "shuffle": True}
    alike = texts.tf_data(x="tokens", pad="tokens", batch_size=16, **buckets)
    assert alike.element_spec[0].shape.as_list() == [None, None]
    assert sum(int(tf.math.count_nonzero(x)) for x, _ in alike) == LENGTHS.sum()
    assert sum(len(y) for _, y in alike) == ROWS
