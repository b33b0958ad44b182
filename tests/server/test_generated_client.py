"""openapi-python-client makes a client of the description that works as it comes."""

from __future__ import annotations

import compileall
import subprocess
import sys
from pathlib import Path

import h5py
import httpx
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

_FETCH = """
import sys
from h5feed_client import Client
from h5feed_client.api.batches import get_batch, get_plan
from h5feed_client.api.datasets import get_dataset, list_datasets
from h5feed_client.api.rows import post_rows
from h5feed_client.api.statistics import get_stats
from h5feed_client.models import DatasetDescription, Plan, Problem, RowsRequest

client = Client(base_url=sys.argv[1])
names = [dataset.name for dataset in list_datasets.sync(client=client).datasets]
assert "mixed" in names, names
dataset = get_dataset.sync("mixed", client=client)
assert isinstance(dataset, DatasetDescription) and dataset.rows == 1000
order = dict(split="train", val=0.2, shuffle=True, seed=3, batch_size=16, fields="images,labels")
plan = get_plan.sync("mixed", client=client, **order)
assert isinstance(plan, Plan) and plan.batches == 50, plan
batch = get_batch.sync("mixed", 7, client=client, revision=dataset.revision, **order)
sys.stdout.buffer.write(batch.payload.read())
rows = post_rows.sync("mixed", client=client, body=RowsRequest(rows=[3, 1]))
assert rows.payload.read(), rows
stats = get_stats.sync("mixed", client=client, field="labels", prefer="wait=30")
assert stats.fields["labels"].count == 1000
problem = get_batch.sync("nothing", 0, client=client)
assert isinstance(problem, Problem) and problem.code == "dataset_not_found", problem
"""


@pytest.fixture(scope="module")
def package(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the generated package lies in."""
    folder = tmp_path_factory.mktemp("generated")
    description = folder / "openapi.json"
    description.write_bytes(httpx.get(f"{server.url}/openapi.json", timeout=60).content)
    config = folder / "config.yml"
    config.write_text("package_name_override: h5feed_client\npost_hooks: []\n")
    command = [str(Path(sys.executable).with_name("openapi-python-client")), "generate", "--meta=none"]
    command += [f"--path={description}", f"--config={config}", f"--output-path={folder / 'h5feed_client'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_compiles(package: Path) -> None:
    """All of it, with a module for each endpoint in the package of its group."""
    assert compileall.compile_dir(package / "h5feed_client", quiet=2)
    modules = {str(file.relative_to(package / "h5feed_client/api")) for file in package.rglob("api/*/[a-z]*.py")}
    for name in ("batches/get_batch.py", "batches/get_plan.py", "rows/post_rows.py", "statistics/get_mean_image.py"):
        assert name in modules


def test_it_fetches_a_batch(package: Path, server: ServerProcess, folder: Path) -> None:
    """With the rows of the file; JSON comes as models, tensors as bytes, and errors as problems."""
    from safetensors.numpy import load

    done = subprocess.run([sys.executable, "-c", _FETCH, server.url], cwd=package, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    batch = load(done.stdout)
    assert batch["__rows__"].shape == (16,)
    order = np.argsort(batch["__rows__"])
    with h5py.File(folder / "mixed.h5") as file:
        for name in ("images", "labels"):
            np.testing.assert_array_equal(batch[name][order], file[name][batch["__rows__"][order]])
