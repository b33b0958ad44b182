"""Samples that are made of other rows than their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import h5feed.wire
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed_server.batches.pieces import PiecesPlan
from h5feed_server.batches.plan import BatchPlan
from h5feed_server.batches.sampled import RowMap, SampledField
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.splits.order_spec import OrderSpec

ROWS, BATCH = 23, 5
SHIFTS = np.array([-1, 0, 4])
EDGES = RowMap(
    lambda samples: np.clip(samples[:, None] + SHIFTS, 0, ROWS - 1),
    (len(SHIFTS),),
    lambda samples: (samples[:, None] + SHIFTS >= 0) & (samples[:, None] + SHIFTS < ROWS),
)
REVERSED = RowMap(lambda samples: ROWS - 1 - samples)


@pytest.fixture(params=["small", "large"])
def plan(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[BatchPlan]:
    """A plan of fields that are kept in memory, or read for each batch."""
    generator = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        width = 2 if request.param == "small" else 3000
        file["image"] = generator.integers(0, 255, (ROWS, width, 2), np.uint8)
        file.create_dataset("packed", data=generator.random((ROWS, width)), chunks=(4, width), compression="gzip")
        file["number"] = np.arange(ROWS)
        file["name"] = [f"row {row}" * (row % 3) for row in range(ROWS)]
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache"))
    try:
        services.catalog.dataset_within(60, "data")
        spec = OrderSpec(fields="image,packed,number,name", shuffle=True, last="pad")
        yield services.batcher.plan("data", spec, BATCH, None)
    finally:
        services.close()


def _truth(plan: BatchPlan) -> dict[str, npt.NDArray[np.generic]]:
    with h5py.File(plan.fields[0].column.segments[0].file.path) as file:
        return {name: file[name][:] for name in ("image", "packed", "number")}


def _lease(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.empty(nbytes, np.uint8)


@pytest.mark.parametrize("has_text", [False, True])
def test_rows_of_samples(plan: BatchPlan, has_text: bool) -> None:
    """Batches, runs of batches, parts of them and described pieces have the rows that the maps name, with masks."""
    truth = _truth(plan)
    image, packed, number, name = (one.field for one in plan.fields)
    fields = (SampledField(image, EDGES), SampledField(packed, EDGES), SampledField(number, REVERSED))
    plan = replace(plan, fields=(*fields, SampledField(name, REVERSED)) if has_text else fields)
    bodies = [plan.filled(index, index + 1, _lease) for index in range(plan.grid.batches)]
    assert plan.filled(0, plan.grid.batches, _lease).tobytes() == b"".join(body.tobytes() for body in bodies)
    bodies.append(plan.filled(1, 2, _lease, part=(1, 3)))
    bodies.append(PiecesPlan(plan, Path("/"), named=False, unnamed="", compresses=True).filled(2, 4, _lease))
    seen = []
    for body in bodies:
        tensors, _, _ = h5feed.wire.read_body(body)
        rows = tensors["__rows__"]
        wanted = rows[:, None] + SHIFTS
        for field in ("image", "packed"):
            # Pieces, which clients put together, may be sent instead.
            if field in tensors or body is not bodies[-1]:
                np.testing.assert_array_equal(tensors[field], truth[field][np.clip(wanted, 0, ROWS - 1)])
            np.testing.assert_array_equal(tensors[f"{field}.mask"], (wanted >= 0) & (wanted < ROWS))
        np.testing.assert_array_equal(tensors["number"], ROWS - 1 - rows)
        if has_text:
            begins = tensors["name.offsets"]
            texts = [tensors["name"][a:b].tobytes().decode() for a, b in pairwise(begins)]
            assert texts == [f"row {row}" * (row % 3) for row in (ROWS - 1 - rows).tolist()]
        seen += rows[tensors["__weight__"] > 0].tolist()
    assert set(seen[:ROWS]) == set(range(ROWS))


def test_rows_of_samples_count_as_read(plan: BatchPlan) -> None:
    """A sample of many rows has as many bytes."""
    image = plan.fields[0].field
    one, several = (replace(plan, fields=(SampledField(image, rows),)) for rows in (REVERSED, EDGES))
    row_bytes = image.row_bytes * BATCH
    assert several.full.nbytes - one.full.nbytes >= 2 * row_bytes
