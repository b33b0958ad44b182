"""Accelerate, Lightning and fastai over the batches of a feed: each row once in a pass, or words that say why not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import pytest

from tests.support.ranks import SECONDS, check_shares, free_port, run_ranks, write_ids
from tests.support.server_process import ServerProcess

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, BATCH = 53, 4
BATCHES = 14


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """Serves `ids`, where the target of a row is its id."""
    folder = tmp_path_factory.mktemp("ids")
    write_ids(folder / "ids.h5", ROWS)
    return serve_module(folder)


@pytest.fixture(scope="module")
def ids(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["ids"]


def need(package: str) -> None:
    """Skip the test where a package that its own processes import is not installed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


def golden(ids: h5feed.Dataset, epoch: int, shuffle: bool = True) -> list[int]:
    batches = ids.batches(batch_size=BATCH, shuffle=shuffle, epoch=epoch, fields=[])
    return [row for batch in batches for row in batch.rows.tolist()]


ACCELERATE = """
import json, sys
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
import h5feed

url, rank = sys.argv[1], int(sys.argv[2])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
ids = h5feed.connect(url, deadline=60)["ids"]
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-6))

def passes(batches):
    told = []
    for _ in range(2):
        told.append([])
        for x, y in batches:
            loss = ((model(x).reshape(-1) - y) ** 2).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            told[-1].append(y.tolist())
    return told

def refusal(loader):
    try:
        next(iter(loader))
    except h5feed.errors.BadParameter as error:
        return str(error)

train = ids.torch(batch_size=4, shuffle=True, shard="auto", last="drop")
told = {"as the guide says": passes(train), "with workers": passes(DataLoader(train, batch_size=None, num_workers=1))}
whole = ids.torch(batch_size=4, shuffle=True)
told["dispatched"] = passes(accelerator.prepare(DataLoader(whole, batch_size=None)))
refused = [refusal(accelerator.prepare(DataLoader(train, batch_size=None)))]
accelerator.dataloader_config.dispatch_batches = False
refused += [refusal(accelerator.prepare(DataLoader(data, batch_size=size)))
            for data in (train, whole) for size in (None, 1)]
torch.distributed.destroy_process_group()
print(json.dumps({"told": told, "refused": refused}))
"""


def ranks_of_accelerate() -> dict[str, str]:
    """Variables that Accelerate finds two ranks by."""
    return {
        "RANK": "{rank}",
        "LOCAL_RANK": "{rank}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }


def test_accelerate(server: ServerProcess) -> None:
    """Two ranks share each row of a pass as the guide says; what would lose rows is refused on every rank."""
    need("accelerate")
    ranks = run_ranks(ACCELERATE, server.url, **ranks_of_accelerate())
    for name in ("as the guide says", "with workers"):
        passes = [[rank["told"][name][number] for rank in ranks] for number in range(2)]
        for of_ranks in passes:
            check_shares(of_ranks, ROWS, BATCH, "drop")
        assert passes[0] != passes[1]
    for number in range(2):
        # Accelerate fills up the last step with rows of the first.
        rows = [row for rank in ranks for batch in rank["told"]["dispatched"][number] for row in batch]
        assert set(rows) == set(range(ROWS)) and len(rows) < ROWS + 2 * BATCH
    for rank in ranks:
        assert "is only one shard of 2: do not pass the DataLoader to accelerator.prepare" in rank["refused"][0]
        assert all("this dataset yields batches: do not pass the DataLoader" in said for said in rank["refused"][1:])


def test_accelerate_alone(ids: h5feed.Dataset) -> None:
    """One process prepares the loader as any other; its passes are those of the feed."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    train = ids.torch(batch_size=BATCH, shuffle=True, shard="auto")
    loader = accelerator.prepare(DataLoader(train, batch_size=None))
    assert len(loader) == BATCHES
    for epoch in range(2):
        assert [row for _, y in loader for row in y.tolist()] == golden(ids, epoch)


LIGHTNING = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning, torch
from torch.utils.data import DataLoader
import h5feed

url, devices, how, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]

class Data(lightning.LightningDataModule):
    def loader(self, **options):
        ids = h5feed.connect(url, deadline=60)["ids"]
        batches = ids.torch(batch_size=4, shard="auto", last="drop" if devices > 1 else "keep", **options)
        workers = {"workers": {"num_workers": 2}, "persistent": {"num_workers": 2, "persistent_workers": True}}
        return batches if how == "batches" else DataLoader(batches, batch_size=None, **workers.get(how, {}))
    def train_dataloader(self):
        return self.loader(shuffle=True)
    def val_dataloader(self):
        return self.loader(limit=20)

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.passes, self.seen = [], []
    def on_train_epoch_start(self):
        self.passes.append([])
    def training_step(self, batch, index):
        x, y = batch
        self.passes[-1].append(y.tolist())
        return ((self.linear(x).reshape(-1) - y) ** 2).mean()
    def on_validation_epoch_start(self):
        self.seen = []
    def validation_step(self, batch, index):
        self.seen += batch[1].tolist()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)

model = Model()
trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=True,
)
trainer.fit(model, datamodule=Data())
with open(f"{folder}/{trainer.global_rank}.json", "w") as file:
    json.dump({"passes": model.passes, "seen": model.seen}, file)
"""


def run_lightning(server: ServerProcess, folder: Path, devices: int, how: str) -> list[dict[str, Any]]:
    """What each rank was given; Lightning begins the second rank itself."""
    script = folder / "train.py"
    script.write_text(LIGHTNING)
    said = folder / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), server.url, str(devices), how, str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MASTER_PORT": str(free_port())},
            start_new_session=True,
        )
    try:
        assert process.wait(SECONDS) == 0, said.read_text()
    finally:
        # With it go the ranks that it has begun.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.parametrize("how", ["batches", "loader", "workers", "persistent"])
def test_lightning(server: ServerProcess, ids: h5feed.Dataset, tmp_path: Path, how: str) -> None:
    """What Lightning looks at before it trains costs no pass, and a validation that it begins as a check no rows."""
    need("lightning")
    (rank,) = run_lightning(server, tmp_path, 1, how)
    for epoch in range(2):
        assert [row for batch in rank["passes"][epoch] for row in batch] == golden(ids, epoch)
    assert rank["seen"] == golden(ids, 0, shuffle=False)[:20]


def test_lightning_on_two_ranks(server: ServerProcess, tmp_path: Path) -> None:
    """Loaders that a data module makes, once Lightning has begun the ranks, share each row of a pass."""
    need("lightning")
    ranks = run_lightning(server, tmp_path, 2, "workers")
    passes = [[rank["passes"][number] for rank in ranks] for number in range(2)]
    for of_ranks in passes:
        check_shares(of_ranks, ROWS, BATCH, "drop")
    assert passes[0] != passes[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_of_fastai(ids: h5feed.Dataset, workers: int) -> None:
    """`get_preds` gives predictions in the order of the feed: with torch's DataLoader, and with fastai's own when it
    is told not to reorder what has no indices."""
    learners = pytest.importorskip("fastai.learner")
    loaders = pytest.importorskip("fastai.data.load")
    core = pytest.importorskip("fastai.data.core")
    val = ids.torch(batch_size=BATCH)
    own = loaders.DataLoader(val, bs=None, num_workers=workers)
    learner = learners.Learner(
        core.DataLoaders(own, own, device=torch.device("cpu")), torch.nn.Linear(2, 1), loss_func=torch.nn.MSELoss()
    )
    inputs = torch.cat([x for x, _ in val])
    for options in ({"dl": DataLoader(val, batch_size=None, num_workers=workers)}, {"reorder": False}):
        predicted, targets = learner.get_preds(**options)
        assert targets.tolist() == list(range(ROWS))
        assert torch.allclose(predicted, learner.model(inputs), atol=1e-6)
