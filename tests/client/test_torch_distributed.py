"""Data-parallel training with `torch.distributed`, in two real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import check_passes, run_ranks, write_ids
from tests.support.server_process import ServerProcess

pytest.importorskip("torch.distributed")

ROWS, BATCH = 53, 4

TRAIN = """
import json, sys
from datetime import timedelta
import torch, torch.distributed as dist
import h5feed

url, rendezvous, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group(
    "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
ids = h5feed.connect(url, deadline=30)["ids"]
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), 1e-6)
told = {}
for kind in ("loader", "torch", "sequence"):
    for last in ("pad", "drop"):
        quiet = {"verbose": False} if kind == "sequence" else {}
        train = getattr(ids, kind)(batch_size=4, shuffle=True, shard="auto", last=last, **quiet)
        passes = []
        for _ in range(2):
            passes.append([])
            for x, y, *weight in train:
                y = torch.as_tensor(y)
                weight = torch.as_tensor(weight[0]) if weight else torch.ones(len(y))
                # Gradients are summed over both: ranks of unequal length would hang here.
                loss = (weight * (model(torch.as_tensor(x)).reshape(-1) - y) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                passes[-1].append(y[weight > 0].tolist())
        told[f"{kind} {last}"] = passes
weights = [parameter.detach().reshape(-1).tolist() for parameter in model.parameters()]
dist.destroy_process_group()
print(json.dumps({"weights": weights, "told": told}))
"""


def test_ranks_share_each_step(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """With ``shard="auto"`` DistributedDataParallel runs through: every rank has as many batches, of other rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_ids(folder / "ids.h5", ROWS)
    ranks = run_ranks(TRAIN, serve(folder).url, str(tmp_path / "rendezvous"), KERAS_BACKEND="torch")
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert len(ranks[0]["told"]) == 6
    check_passes(ranks, ROWS, BATCH)
