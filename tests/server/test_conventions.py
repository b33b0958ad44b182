"""Files of other programs in an object store: the same descriptions and rows as from a folder, and as h5py reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5feed
import h5py
import netCDF4
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from tests.support.object_store import SOURCES, served_from
from tests.support.served_rows import described, lines_of
from tests.support.server_process import ServerProcess
from tests.support.sparse_groups import write_sparse

ROWS = 60
MATRIX = np.random.default_rng(0).poisson(0.5, (ROWS, 30)).astype("f4")
TYPES = np.array(["B", "NK", "T"])[np.arange(ROWS) % 3]


def _anndata(folder: Path) -> None:
    cells = anndata.AnnData(MATRIX, pd.DataFrame({"type": pd.Categorical(TYPES)}, [f"c{row}" for row in range(ROWS)]))
    cells.layers["by_rows"] = scipy.sparse.csr_matrix(MATRIX)
    cells.layers["by_columns"] = scipy.sparse.csc_matrix(MATRIX)
    cells.obsm["X_pca"] = MATRIX[:, :3]
    cells.write_h5ad(folder / "cells.h5ad", compression="gzip")


def _loom(folder: Path) -> None:
    with h5py.File(folder / "cells.loom", "w") as file:
        file["attrs/LOOM_SPEC_VERSION"] = "3.0.0"
        file["row_attrs/Gene"], file["col_attrs/CellID"] = np.arange(30).astype("S"), np.arange(ROWS).astype("S")
        file["col_attrs/ClusterName"] = TYPES.astype(object)
        file["col_attrs/Clusters"] = np.arange(ROWS) % 3
        file.create_dataset("matrix", data=MATRIX.T, chunks=(16, 16), compression="gzip")


def _tenx(folder: Path) -> None:
    matrix = scipy.sparse.csr_matrix(MATRIX)
    with h5py.File(folder / "tenx.h5", "w") as file:
        write_sparse(file, "matrix", matrix, {})
        file["matrix/shape"], file["matrix/barcodes"] = np.array([30, ROWS]), np.arange(ROWS).astype("S")


def _nwb(folder: Path) -> None:
    with h5py.File(folder / "session.nwb", "w") as file:
        file.attrs["nwb_version"] = "2.8.0"
        for path, values in (("a", MATRIX), ("b", MATRIX[:, 0]), ("later", MATRIX[:, 1])):
            file[f"acquisition/{path}/data"] = values
            file[f"acquisition/{path}/starting_time"] = float(path == "later")
            file[f"acquisition/{path}/starting_time"].attrs.update(rate=np.float32(30), unit="seconds")
        file["acquisition/timed/data"] = MATRIX[:, 2]
        file["acquisition/timed/timestamps"] = np.arange(ROWS) / 7
        file["units/id"], file["units/spike_times"] = np.arange(ROWS), np.arange(ROWS * 2.0)
        file["units/spike_times_index"] = np.arange(2, 2 * ROWS + 2, 2).astype("u1")
        file["units/spike_times_index"].attrs["neurodata_type"] = "VectorIndex"


def _nexus(folder: Path) -> None:
    with h5py.File(folder / "detector.h5", "w") as file:
        file.create_dataset("entry/frames", data=MATRIX.reshape(ROWS, 5, 6), chunks=(1, 5, 6), compression="gzip")
    with h5py.File(folder / "scan.nxs", "w") as file:
        data = file.create_group("entry/data")
        data.attrs.update(NX_class="NXdata", signal="frames", axes=["omega", "y", "x"])
        data["frames"], data["omega"] = h5py.ExternalLink("detector.h5", "/entry/frames"), np.arange(ROWS)
        data["y"], data["x"] = np.arange(5), np.arange(6)


def _matlab(folder: Path) -> None:
    with h5py.File(folder / "cells.mat", "w", userblock_size=512) as file:

        def array(path: str, values: Any, kind: str) -> h5py.Dataset:
            file[path] = values
            file[path].attrs["MATLAB_class"] = np.bytes_(kind)
            return file[path]

        array("images", MATRIX.T, "single")
        for name, entries, kind in (
            ("signals", [MATRIX[:1, : 5 + row % 20].T for row in range(ROWS)], "single"),
            ("label", [np.frombuffer(name.encode("utf-16-le"), "u2")[:, None] for name in TYPES], "char"),
        ):
            refs = [array(f"#refs#/{name}{row}", entry, kind).ref for row, entry in enumerate(entries)]
            array(name, np.array([refs], h5py.ref_dtype), "cell")
        matrix = scipy.sparse.csc_matrix(MATRIX.astype("f8"))
        group = file.create_group("S")
        group.attrs["MATLAB_class"], group.attrs["MATLAB_sparse"] = np.bytes_("double"), np.uint64(ROWS)
        group["data"], group["ir"], group["jc"] = matrix.data, matrix.indices.astype("u8"), matrix.indptr.astype("u8")


def _netcdf(folder: Path) -> None:
    with netCDF4.Dataset(folder / "weather.nc", "w") as file:
        for name, size in (("lat", 5), ("time", None), ("lon", 6)):
            file.createDimension(name, size)
            file.createVariable(name, "f8", (name,))[:] = np.arange(size or ROWS)
        file["time"].units = "hours since 1900-01-01"
        packed = file.createVariable("t2m", "i2", ("lat", "time", "lon"), zlib=True, chunksizes=(5, 1, 6))
        packed.scale_factor, packed.add_offset = 0.01, 273.15
        packed.set_auto_scale(False)
        packed[:] = MATRIX.reshape(5, ROWS, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for write in (_anndata, _loom, _tenx, _nwb, _nexus, _matlab, _netcdf):
        write(path)
    return path


@pytest.fixture(scope="module")
def servers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    scratch = tmp_path_factory.mktemp("served")
    with (
        served_from(SOURCES[0], folder, scratch / "here") as here,
        served_from(SOURCES[1], folder, scratch / "there") as there,
    ):
        yield {SOURCES[0]: here, SOURCES[1]: there}


NAMES = {"cells.h5ad", "cells.loom", "cells.mat", "detector", "scan", "tenx", "weather"} | {
    f"session.{name}" for name in ("acquisition", "acquisition.later", "acquisition.timed", "units")
}

OF_THE_SOURCE = {"revision", "revision_covers", "content"}
"""What is told of a dataset that depends on where it is."""


def test_descriptions_are_those_of_a_folder(servers: dict[str, ServerProcess]) -> None:
    listings = [lines_of(servers[source]) for source in SOURCES]
    assert listings[0].keys() == listings[1].keys() == NAMES
    for name in NAMES:
        for here, there in (
            [listing[name] for listing in listings],
            [described(servers[source], name) for source in SOURCES],
        ):
            assert here["status"] == "ok" if "status" in here else here["fields"]
            told = [{key: one[key] for key in one.keys() - OF_THE_SOURCE} for one in (here, there)]
            assert told[0] == told[1]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_rows_are_those_of_a_folder(servers: dict[str, ServerProcess], name: str) -> None:
    """All fields in a shuffled epoch: arrays, texts, lists and sparse rows."""
    here, there = (h5feed.connect(servers[source].url, deadline=120) for source in SOURCES)
    with here, there:
        fields = [field["name"] for field in here[name].info["fields"] if field["readable"]]
        options: dict[str, Any] = {"batch_size": 16, "shuffle": True, "seed": 3, "fields": fields}
        rows = 0
        for mine, theirs in zip(there[name].batches(**options), here[name].batches(**options), strict=True):
            assert mine.keys() == theirs.keys() and len(mine) >= len(fields) > 0
            for key in theirs:
                np.testing.assert_array_equal(mine[key], theirs[key], key)
            rows += len(mine.rows)
        assert rows == ROWS
