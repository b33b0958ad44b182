"""Sparse matrices as the groups that AnnData and others write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h5py


def write_sparse(file: h5py.File, path: str, matrix: Any, attributes: Mapping[str, Any], **options: Any) -> None:
    """Write the arrays of a compressed matrix of scipy; `options` are those of ``create_dataset``."""
    group = file.create_group(path)
    group.attrs.update(attributes)
    for name in ("data", "indices", "indptr"):
        group.create_dataset(name, data=getattr(matrix, name), **options)
