"""Shuffled batches of cells from an AnnData file in CSR, against anndata in backed mode with the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata
import h5feed
import numpy as np
import scipy.sparse

from .data import Files
from .measure import Figure, Rates, take_turns
from .servers import h5feed_server

CELLS, GENES = 100_000, 2_000
DENSITY = 0.05
"""Share of the values that are not zero: 10 million, 80 MB with their column indices."""

BATCH = 256
_OURS, _THEIRS = 100, 4
"""Batches of a turn. Those of anndata take much longer."""

FIGURES = (Figure("csr_vs_anndata", {"1 worker": "h5feed"}, {"1 worker": "anndata"}, 10.0),)


def write_cells(path: Path, cells: int, genes: int) -> None:
    """Write an AnnData file of random counts, as ``AnnData.write_h5ad`` does by default."""
    random = np.random.default_rng(0)
    lengths = random.binomial(genes, DENSITY, cells)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([np.sort(random.choice(genes, length, replace=False)) for length in lengths])
    data = random.integers(1, 50, len(indices)).astype(np.float32)
    anndata.AnnData(scipy.sparse.csr_matrix((data, indices.astype(np.int32), indptr), (cells, genes))).write_h5ad(path)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Cells per second, dense from h5feed and as a view in CSR from anndata."""
    with TemporaryDirectory(prefix="h5feed-bench-", dir=files.folder.parent) as name:
        path = Path(name) / "cells.h5ad"
        write_cells(path, CELLS, GENES)
        backed = anndata.read_h5ad(path, backed="r")
        with h5feed_server(Path(name), 1) as server, h5feed.connect(server.url, deadline=60) as feed:
            dataset = feed["cells"]
            wanted = dataset.batch(0, fields=["X"], batch_size=BATCH, shuffle=True)
            np.testing.assert_array_equal(wanted.dense("X"), backed[wanted.rows].X.toarray())
            epochs = iter(range(1_000_000))

            def ours() -> int:
                batches = dataset.batches(
                    fields=["X"], sparse="dense", epoch=next(epochs), batch_size=BATCH, shuffle=True
                )
                rows = sum(len(batch["X"]) for batch in islice(batches, _OURS))
                batches.close()
                return rows

            def orders() -> Iterator[np.ndarray]:
                for epoch in range(1_000_000):
                    with_rows = dataset.batches(fields=[], epoch=epoch, batch_size=BATCH, shuffle=True)
                    yield from (batch.rows for batch in with_rows)

            rows_of = orders()

            def theirs() -> int:
                return sum(backed[rows].X.shape[0] for rows in islice(rows_of, _THEIRS))

            return take_turns({"h5feed": ours, "anndata": theirs}, rounds)
