"""What was trained on, for MLflow. ::

    train = ds.sequence("train", batch_size=64, shuffle=True, val=0.1)
    mlflow.log_input(h5feed.mlflow.dataset(train.source()), context="training")

The source of a logged dataset is the record for `h5feed.reopen`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.schema import TensorDatasetSchema
from mlflow.types.schema import Schema, TensorSpec

from .errors import BadParameter
from .lineage import Source
from .reopening import Reopened, reopen


class H5feedSource(DatasetSource):
    """Where a dataset of MLflow comes from: a record of h5feed. MLflow finds this class by its entry point.

    Parameters
    ----------
    source : Source
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @staticmethod
    def _get_source_type() -> str:
        return "h5feed"

    def load(self, **connection: Any) -> Reopened:
        """`h5feed.reopen` of the record; `connection` are its other parameters."""
        return reopen(self.source, **connection)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        try:
            return bool(Source.of_record(raw_source))
        except BadParameter:
            return False

    @classmethod
    def _resolve(cls, raw_source: Any) -> H5feedSource:
        return cls(Source.of_record(raw_source))

    def to_dict(self) -> dict[str, Any]:
        """The record."""
        return self.source.record()

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> H5feedSource:
        """From a record."""
        return cls(Source.of_record(source_dict))


class H5feedDataset(Dataset):
    """A dataset of MLflow; made by `dataset`."""

    def __init__(self, source: H5feedSource, name: str) -> None:
        self._record = source.source
        super().__init__(source, name)

    def _compute_digest(self) -> str:
        return self._record.short

    @property
    def profile(self) -> dict[str, Any]:
        """Number of rows, their digest, and the revision."""
        return {"rows": self._record.rows, "digest": self._record.digest, "revision": self._record.revision}

    @property
    def schema(self) -> TensorDatasetSchema:
        """The fields, with -1 for the number of rows. The items of rows that differ in length have no own axis."""
        return TensorDatasetSchema(
            features=Schema(
                [
                    TensorSpec(_dtype(field["dtype"]), (-1, *(field["shape"] or ())), name)
                    for name, field in self._record.fields.items()
                ]
            )
        )

    def to_dict(self) -> dict[str, str]:
        """As MLflow stores it."""
        return {
            **super().to_dict(),
            "schema": json.dumps(self.schema.to_dict()),
            "profile": json.dumps(self.profile),
        }


def dataset(source: Source, name: str | None = None) -> H5feedDataset:
    """A dataset for ``mlflow.log_input``.

    Parameters
    ----------
    source : Source
        Of a loop (``train.source()``) or a dataset (``ds.source("train")``).
    name : str, optional
        Default: the name of the dataset and of the split.
    """
    return H5feedDataset(H5feedSource(source), name or f"{source.dataset}.{source.split}")


def _dtype(name: str) -> np.dtype[Any]:
    """The nearest dtype that NumPy has by itself."""
    return np.dtype({"string": "str", "bfloat16": "float32"}.get(name, name))
