"""Arrays of all kinds by chance, through the server: bit by bit what h5py reads, or refused with a true reason."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.hdf5_arrays import same
from tests.support.object_store import SOURCES, served_from
from tests.support.random_files import write_variety

TRUE_REASONS = re.compile(r"lists along more than one axis|more than one string per row|of >\w+ numbers")


def _stored(path: Path) -> dict[str, Any]:
    """All rows of each array, and of each member of records, by the names of their fields."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        for name, dataset in file.items():
            if dataset.dtype.names:
                found |= {f"{name}.{member}": dataset.fields(member)[()] for member in dataset.dtype.names}
            else:
                found[name] = dataset[()]
    return found


def _hold_against_h5py(feed: h5feed.Feed, folder: Path) -> tuple[int, Counter[str]]:
    compared, refused = 0, Counter[str]()
    random = np.random.default_rng(1)
    for path in sorted(folder.glob("*.h5")):
        dataset, expected = feed[path.stem], _stored(path)
        assert set(dataset.fields) == set(expected), path.name
        rows = np.concatenate([random.permutation(dataset.rows), [dataset.rows - 1, 0, 0]])
        readable = [name for name, field in dataset.fields.items() if field.readable]
        refused.update(str(field.reason) for field in dataset.fields.values() if not field.readable)
        batch = dataset.take(rows, fields=readable)
        differ = [name for name in readable if not same(batch, name, expected[name][rows])]
        assert not differ, f"{path.name}: {differ}"
        compared += len(readable)
    assert all(TRUE_REASONS.search(reason) for reason in refused), refused
    return compared, refused


@pytest.mark.parametrize(
    ("files", "arrays", "least"),
    [(8, 25, 180), pytest.param(70, 40, 2500, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("source", SOURCES)
def test_variety(tmp_path: Path, source: str, files: int, arrays: int, least: int) -> None:
    """Whatever HDF5 writes is served as h5py reads it; of what is refused, the reason is one that is documented."""
    folder = tmp_path / "data"
    folder.mkdir()
    for seed in range(files):
        write_variety(folder / f"v{seed:03d}.h5", seed, arrays)
    with served_from(source, folder, tmp_path) as server, h5feed.connect(server.url, deadline=300) as feed:
        compared, refused = _hold_against_h5py(feed, folder)
    assert compared >= least
    assert sum(refused.values()) < compared / 10
