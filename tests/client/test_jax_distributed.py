"""Data-parallel training with JAX and `keras.distribution`, in two real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import check_passes, free_port, run_ranks, write_ids
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow

pytest.importorskip("jax")

ROWS, BATCH = 53, 4

TRAIN = """
import json, sys
import h5feed

url, address, how, rank = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if how == "jax":
    import jax
    jax.distributed.initialize(address, 2, rank)
    import keras
else:
    import keras
    keras.distribution.initialize(address, 2, rank)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
ids = h5feed.connect(url, deadline=30)["ids"]
told, weights = {}, []
for kind in ("loader", "sequence"):
    for last in ("pad", "drop"):
        quiet = {"verbose": False} if kind == "sequence" else {}
        train = getattr(ids, kind)(batch_size=4, shuffle=True, shard="auto", last=last, **quiet)
        passes = []
        for _ in range(2):
            passes.append([])
            for x, y, *weight in train:
                passes[-1].append((y[weight[0] > 0] if weight else y).tolist())
        told[f"{kind} {last}"] = passes
        train.close()
if how == "keras":
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-6), "mse")
    train = ids.sequence(batch_size=4, shuffle=True, shard="auto", verbose=False)
    # Each step is one computation over both: ranks of unequal length would hang here.
    model.fit(train, epochs=2, verbose=0)
    weights = [weight.tolist() for weight in model.get_weights()]
print(json.dumps({"weights": weights, "told": told}))
"""


@pytest.mark.parametrize("how", ["keras", pytest.param("jax", marks=pytest.mark.slow)])
def test_ranks_share_each_step(serve: Callable[..., ServerProcess], tmp_path: Path, how: str) -> None:
    """With ``shard="auto"`` every rank has as many batches, of other rows, and ``fit`` under DataParallel ends."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_ids(folder / "ids.h5", ROWS)
    address = f"127.0.0.1:{free_port()}"
    ranks = run_ranks(TRAIN, serve(folder).url, address, how, KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
    assert ranks[0]["weights"] == ranks[1]["weights"] and bool(ranks[0]["weights"]) == (how == "keras")
    assert len(ranks[0]["told"]) == 4
    check_passes(ranks, ROWS, BATCH)
