"""Loom files, as loompy 3 writes them: rows are the cells, although these are the columns of the matrix."""

from __future__ import annotations

from collections.abc import Callable

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

GENES, CELLS = 150, 90
random = np.random.default_rng(0)
MATRIX = random.poisson(1.0, (GENES, CELLS)).astype("f4")
LAYERS = {"spliced": MATRIX / 2, "counts": MATRIX.astype("u2")}
NAMES = np.array(["B", "NK", "T"])[np.arange(CELLS) % 3]
COORDINATES = random.normal(size=CELLS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("loom") / "data"
    folder.mkdir()
    with h5py.File(folder / "cells.loom", "w") as file:
        for name in ("attrs", "col_graphs", "row_graphs"):
            file.create_group(name)
        file["attrs/LOOM_SPEC_VERSION"], file["attrs/CreationDate"] = "3.0.0", "20260101T000000.000000Z"
        file["row_attrs/Gene"] = np.array([f"gene{number}" for number in range(GENES)], object)
        file["col_attrs/CellID"] = np.array([f"cell{number}" for number in range(CELLS)], object)
        file["col_attrs/ClusterName"] = NAMES.astype(object)
        file["col_attrs/Clusters"] = np.arange(CELLS) % 3
        file["col_attrs/_X"] = COORDINATES
        file["col_graphs/KNN/a"] = np.zeros(CELLS, "i4")
        for name, values in {"matrix": MATRIX, **{f"layers/{name}": values for name, values in LAYERS.items()}}.items():
            file.create_dataset(
                name, data=values, chunks=(64, 64), compression="gzip", compression_opts=2, shuffle=False
            )
        file["layers/odd"] = np.zeros((3, CELLS))
    return serve_module(folder)


def test_rows_are_cells(feed: h5feed.Feed) -> None:
    """Values are those of the columns of the matrix, in any order, beside those of col_attrs."""
    dataset, rows = feed["cells"], np.random.default_rng(1).permutation(CELLS)
    assert dataset.rows == CELLS
    names = ["matrix", "layers.spliced", "layers.counts", "col_attrs.Clusters", "col_attrs._X"]
    found = dataset.take(rows, fields=names)
    expected = [MATRIX.T, LAYERS["spliced"].T, LAYERS["counts"].T, np.arange(CELLS) % 3, COORDINATES]
    for name, values in zip(names, expected, strict=True):
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values[rows], name)
    assert dataset.take([5], fields=["col_attrs.ClusterName"]).text("col_attrs.ClusterName") == [NAMES[5]]
    seen = []
    for x, y in dataset.loader(batch_size=32, shuffle=True, seed=2):
        assert x.shape[1:] == (GENES,)
        np.testing.assert_array_equal(y, np.array([np.flatnonzero((row == MATRIX.T).all(1))[0] % 3 for row in x]))
        seen.append(len(y))
    assert sum(seen) == CELLS


def test_roles_and_what_is_no_row(feed: h5feed.Feed) -> None:
    """The matrix is the input, the clusters are the label, and genes and graphs are listed with the reason."""
    fields = {field["name"]: field for field in feed["cells"].info["fields"]}
    roles = {name: field["role"] for name, field in fields.items() if field["readable"]}
    others = {"layers.spliced", "layers.counts", "col_attrs.CellID", "col_attrs.ClusterName", "col_attrs._X"}
    assert roles == {"matrix": "input", "col_attrs.Clusters": "label", **dict.fromkeys(others, "other")}
    assert "describes the genes" in fields["row_attrs.Gene"]["reason"]
    assert "graph of cells" in fields["col_graphs.KNN.a"]["reason"]
    assert "shape [3, 90] is not that of matrix, [150, 90]" in fields["layers.odd"]["reason"]
