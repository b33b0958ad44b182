"""The rows of a split in the order of ``evaluate`` and ``predict``: ids, classes and class weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..errors import BadParameter
from ..order import SPLIT_ALIASES
from ..plan import Plan
from ..prepare import Preparation
from ..prepare.labels import Labels
from ..ragged import OPTIONS
from ..remote_dataset import RemoteDataset
from ..samples import Samples

_OF_INPUTS = ("decode_cf", "encoded")
"""Options of fields other than labels."""

_OF_CROPS = ("crop", "crop_fields", "crop_at")


class OrderedRows:
    """The rows of a split in ascending order. Each property is requested from the server once.

    Parameters
    ----------
    dataset : Samples
    split : str
    options : mapping
        Options of `Dataset.batches`.
    split_options : mapping
        Those that `Dataset.splits` takes.
    prepare : Preparation
        Determines inputs and labels.
    """

    def __init__(
        self,
        dataset: Samples,
        split: str,
        options: Mapping[str, Any],
        split_options: Mapping[str, Any],
        prepare: Preparation,
    ) -> None:
        self._dataset, self._split, self._prepare = dataset, split, prepare
        # Only row ids and labels are requested: there is nothing to pad or to unpack.
        self._options = {name: value for name, value in options.items() if name not in (*OPTIONS, *_OF_INPUTS)}
        self._split_options = dict(split_options)

    def _batches(self, *fields: str) -> Iterator[Batch]:
        """The batches with these fields."""
        options = {**self._options, "fields": list(fields)}
        crops = self._dataset.crops({**options, "fields": self._prepare.fields})
        if crops is not None:
            options = {name: value for name, value in options.items() if name not in _OF_CROPS}
            if crops.samples_of_row > 1:
                # A row comes once for each cell of a grid, which one of the cropped fields is enough for.
                name = crops.fields[0]
                options |= {option: self._options[option] for option in ("crop", "crop_at")}
                options |= {"crop_fields": [name], "fields": list(dict.fromkeys([*fields, name]))}
        return self._dataset.batches(self._split, **options)

    @cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """Row ids, (rows,) int64, including the repeated rows of a padded tail."""
        batches = self._batches()
        return np.concatenate([np.zeros(0, np.int64), *(batch.rows.copy() for batch in batches)])

    @cached_property
    def labels(self) -> Labels:
        """The label field, even if the model gets no labels.

        Raises
        ------
        BadParameter
            There is no label field, or more than one.
        """
        if self._prepare.labels is not None:
            return self._prepare.labels
        found = [field.name for field in self._dataset.fields.values() if field.role == "label" and field.readable]
        if len(found) != 1:
            raise BadParameter(f"{self._dataset.name!r} has {len(found)} label fields: choose one with y=")
        return Labels(self._dataset, found[0], "int", self._prepare.classes)

    @cached_property
    def classes(self) -> npt.NDArray[Any]:
        """The class of each row, (rows,) ints; the stored values if the labels are not classes."""
        batches = self._batches(self.labels.name)
        parts = [self.labels.ids(batch).copy() for batch in batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @cached_property
    def class_weight(self) -> dict[int, float]:
        """Balanced weights over all shards: rows / (classes · rows of a class)."""
        if not self.labels.are_classes:
            raise BadParameter(f"{self.labels.name!r} does not hold classes: there is no class_weight")
        dataset = self._dataset
        if "limit" in self._options or not isinstance(dataset, RemoteDataset) or dataset.join_options:
            found, counts = np.unique(self.classes, return_counts=True)
            weights = counts.sum() / (len(found) * counts)
            return {int(index): float(weight) for index, weight in zip(found, weights, strict=True)}
        answer = self._dataset.splits(**self._split_options, classes=self.labels.name)
        split = answer["splits"][SPLIT_ALIASES.get(self._split, self._split)]
        return {self.labels.index(entry["value"]): entry["weight"] for entry in split["classes"]}

    def found(self, plan: Plan) -> str:
        """The line that ``flow_from_directory`` prints, "Found 1257 images belonging to 10 classes", with the form of
        the targets and whether the split is stored in the file."""
        fields = {entry["name"]: entry for entry in self._dataset.info["fields"]}
        inputs = [fields.get(name, {}) for name in self._prepare.inputs]
        images = len(inputs) == 1 and bool(inputs[0].get("channels"))
        what = "packed rows" if plan.is_packed else "images" if images else "rows"
        found = f"Found {plan.rows} {what}"
        with contextlib.suppress(BadParameter):
            if not plan.is_packed and self.labels.are_classes:
                found += f" belonging to {len(self.labels.class_indices)} classes"
                found += "" if self._prepare.labels is None else f" ({self.labels.given})"
        if len(self._prepare.targets) > 1:
            names = ", ".join(map(repr, self._prepare.targets))
            found += f", with {len(self._prepare.targets)} labels ({names}): choose one with y=…"
        if plan.stored is not None and self._dataset.info["native_splits"]:
            found += f", {'as' if plan.stored else 'not as'} stored"
        if self._prepare.no_targets is not None:
            found += f", but {self._prepare.no_targets}"
        return f"{found}."
