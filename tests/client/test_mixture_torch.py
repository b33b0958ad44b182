"""Mixtures in torch's DataLoader, and in TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

ORDER: dict[str, Any] = {"batch_size": 8, "shuffle": True, "seed": 2}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Mixture]:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("photos", np.arange(150)), ("drawings", np.arange(1000, 1060))):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["images"], file["labels"] = rows[:, None].astype(np.float32), rows
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed.mix({"photos": 0.7, "drawings": 0.3})
    server.stop()


def expected(mixture: h5feed.Mixture, epoch: int, **options: Any) -> list[list[int]]:
    batches = mixture.batches(**{**ORDER, **options}, epoch=epoch, fields=["labels"])
    return [batch["labels"].tolist() for batch in batches]


def delivered(batches: Any) -> list[list[int]]:
    return [y.tolist() for _, y, *_ in batches]


@pytest.mark.parametrize("options", [{}, {"shard": 1, "shards": 2, "last": "pad"}], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_workers(mixture: h5feed.Mixture, workers: int, options: dict[str, Any]) -> None:
    """The same batches in the same order with any number of workers; resumed with another number."""
    batches = mixture.torch(**ORDER, **options)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    whole = expected(mixture, 0, **options)
    assert delivered(loader) == whole
    resumed = mixture.torch(**ORDER, **options)
    resumed.load_state_dict(json.loads(json.dumps(batches.state_after(5))))
    assert delivered(DataLoader(resumed, batch_size=None, num_workers=2 - workers)) == whole[5:]
    assert delivered(loader) == expected(mixture, 1, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader(mixture: h5feed.Mixture, workers: int) -> None:
    """torchdata takes a pass up in its middle."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    loader = stateful(mixture.torch(**ORDER), batch_size=None, num_workers=workers)
    passing = iter(loader)
    head = [next(passing)[1].tolist() for _ in range(7)]
    resumed = stateful(mixture.torch(**ORDER), batch_size=None, num_workers=workers)
    resumed.load_state_dict(loader.state_dict())
    assert head + delivered(resumed) == expected(mixture, 0)


def test_tf_data(mixture: h5feed.Mixture) -> None:
    """The same batches, with known shapes."""
    pytest.importorskip("tensorflow")
    batches = mixture.tf_data(**ORDER)
    assert len(batches) == len(expected(mixture, 0))
    assert [y.numpy().tolist() for _, y in batches] == expected(mixture, 0)
