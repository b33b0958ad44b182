"""The rows of a split as evaluating and predicting take them: their ids, classes and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadParameter
from ..plan import Plan
from ..prepare import Preparation
from ..prepare.labels import Labels
from ..remote_dataset import RemoteDataset

_ALIASES = {"valid": "val", "validation": "val", "dev": "val"}


class OrderedRows:
    """Each row of a split once, ascending; what is asked of a server is asked once.

    Parameters
    ----------
    dataset : RemoteDataset
    split : str
    options : mapping
        Options of `Dataset.batches`.
    split_options : mapping
        Those of them that `Dataset.splits` takes.
    prepare : Preparation
        Tells inputs and label.
    """

    def __init__(
        self,
        dataset: RemoteDataset,
        split: str,
        options: Mapping[str, Any],
        split_options: Mapping[str, Any],
        prepare: Preparation,
    ) -> None:
        self._dataset, self._split, self._prepare = dataset, split, prepare
        self._options, self._split_options = dict(options), dict(split_options)

    @cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """(rows,) int64; with a padded tail the repeated rows too."""
        batches = self._dataset.batches(self._split, **{**self._options, "fields": []})
        return np.concatenate([np.zeros(0, np.int64), *(batch.rows.copy() for batch in batches)])

    @cached_property
    def labels(self) -> Labels:
        """The label field, also where the model is given none.

        Raises
        ------
        BadParameter
            There is none, or several.
        """
        if self._prepare.labels is not None:
            return self._prepare.labels
        found = [field.name for field in self._dataset.fields.values() if field.role == "label" and field.readable]
        if len(found) != 1:
            raise BadParameter(f"{self._dataset.name!r} has {len(found)} label fields: name one with y=")
        return Labels(self._dataset, found[0], "int")

    @cached_property
    def classes(self) -> npt.NDArray[Any]:
        """The class of each row, (rows,) ints; where labels are no classes, what is stored."""
        batches = self._dataset.batches(self._split, **{**self._options, "fields": [self.labels.name]})
        parts = [self.labels.ids(batch).copy() for batch in batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @cached_property
    def class_weight(self) -> dict[int, float]:
        """Balanced weights: rows / (classes · rows of a class). Of all shards together."""
        if not self.labels.are_classes:
            raise BadParameter(f"{self.labels.name!r} holds no classes to be balanced")
        if "limit" in self._options:
            found, counts = np.unique(self.classes, return_counts=True)
            weights = counts.sum() / (len(found) * counts)
            return {int(index): float(weight) for index, weight in zip(found, weights, strict=True)}
        answer = self._dataset.splits(**self._split_options, classes=self.labels.name)
        split = answer["splits"][_ALIASES.get(self._split, self._split)]
        return {self.labels.index(entry["value"]): entry["weight"] for entry in split["classes"]}

    def found(self, plan: Plan) -> str:
        """What ``flow_from_directory`` prints, "Found 1257 images belonging to 10 classes", how the model is given
        these, and whether as stored."""
        fields = {entry["name"]: entry for entry in self._dataset.info["fields"]}
        inputs = [fields[name] for name in self._prepare.inputs]
        images = len(inputs) == 1 and bool(inputs[0].get("channels"))
        found = f"Found {plan.rows} {'images' if images else 'rows'}"
        with contextlib.suppress(BadParameter):
            if self.labels.are_classes:
                found += f" belonging to {len(self.labels.class_indices)} classes"
                found += "" if self._prepare.labels is None else f" ({self.labels.given})"
        if len(self._prepare.targets) > 1:
            names = ", ".join(map(repr, self._prepare.targets))
            found += f", with {len(self._prepare.targets)} labels ({names}): y=… names one"
        if plan.stored is not None and self._dataset.info["native_splits"]:
            found += f", {'as' if plan.stored else 'not as'} stored"
        if self._prepare.no_targets is not None:
            found += f", but {self._prepare.no_targets}"
        return f"{found}."
