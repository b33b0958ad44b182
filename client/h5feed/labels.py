"""A label field read as classes: which there are, and how targets are made of them.

The class modes are those of ``ImageDataGenerator.flow_from_directory`` and, for ``"raw"``, ``flow_from_dataframe``
(Keras, https://keras.io/2.15/api/preprocessing/image/).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .batch import Batch
from .errors import BadParameter

if TYPE_CHECKING:
    from .dataset import Dataset

ClassMode = Literal["int", "sparse", "categorical", "binary", "input", "raw"]

CLASS_MODES = get_args(ClassMode)

SCAN_BYTES = 4 << 20
"""Bytes of a label field in one batch when its classes must be looked for."""


class Labels:
    """How targets are made of one label field.

    Parameters
    ----------
    dataset : Dataset
    name : str
        The field.
    class_mode : str
        See `h5feed.prepare.Preparation`.

    Raises
    ------
    BadParameter
        The field cannot be given in that mode; the message says why. Only modes that must know the classes ask for
        them: of numbers with one value a row, ``"int"`` and ``"raw"`` ask for nothing.
    """

    def __init__(self, dataset: Dataset, name: str, class_mode: ClassMode) -> None:
        field = dataset.fields[name]
        self.name = name
        self._dataset = dataset
        self._mode = "int" if class_mode == "sparse" else class_mode
        self._is_text = field.dtype == "string"
        self._is_scalar = not self._is_text and np.prod(field.shape, dtype=int) == 1
        self._is_wide = not self._is_text and len(field.shape) == 1 and not self._is_scalar
        self._is_whole = field.dtype == "bool" or "int" in field.dtype
        if self._mode == "raw" and self._is_text:
            raise BadParameter(f"the field {name!r} is text, which no model takes as it is: use class_mode='int'")
        if self._mode == "categorical" and not self._is_wide:
            self._needs_classes()
            if not self._is_text and self.values[0] < 0:
                raise BadParameter(f"class_mode='categorical' counts from 0, but {name!r} holds {self.values[0]}")
        if self._mode == "binary" and not (self._is_scalar and not self._is_whole):
            self._needs_classes()
            if len(self.values) != 2:
                raise BadParameter(
                    f"class_mode='binary' is for two classes, but {name!r} has {len(self.values)}: use 'categorical'"
                )
        if self._mode == "int" and self._is_text:
            self._needs_classes()

    def _needs_classes(self) -> None:
        if not self.are_classes:
            field = self._dataset.fields[self.name]
            raise BadParameter(
                f"class_mode={self._mode!r} needs classes, but {self.name!r} ({field.dtype}{list(field.shape)}) holds "
                "none: ints, bools, text and one-hot rows do. Use class_mode='raw' to get it as it is."
            )

    @cached_property
    def are_classes(self) -> bool:
        """Whether each row has one class: one int, bool or text, or a one-hot row."""
        if self._is_scalar and self._is_whole:
            return True
        return (self._is_text or self._is_wide) and bool(self._found)

    @property
    def values(self) -> list[Any]:
        """What the field says of each class, ascending; of a one-hot field all positions."""
        return list(range(self._dataset.fields[self.name].shape[0])) if self._is_wide else self._found

    @property
    def count(self) -> int:
        """Classes, counted as `keras.utils.to_categorical` does: up to the highest where labels are ints."""
        if self._is_text or self._is_wide:
            return len(self.values)
        return max(len(self._names), 1 + int(self._found[-1]))

    @property
    def class_indices(self) -> dict[str, int]:
        """Name of each class, and the number that stands for it in targets."""
        if self._names:
            return {name: index for index, name in enumerate(self._names)}
        if self._is_text or self._mode == "binary":
            return {str(value): index for index, value in enumerate(self.values)}
        return {str(value): int(value) for value in self.values}

    @property
    def _names(self) -> list[str]:
        """Names that the server knows; they belong to the dataset's first label field."""
        return list(self._dataset.class_names or []) if self._first == self.name and not self._is_text else []

    @property
    def _first(self) -> str | None:
        return next((field.name for field in self._dataset.fields.values() if field.role == "label"), None)

    @cached_property
    def _found(self) -> list[Any]:
        """The classes that there are in all rows, ascending; empty where the field holds none."""
        answer = self._dataset.splits()
        if answer.get("classes_of") == self.name and answer["classes_are"] != "multi-label":
            return sorted(entry["value"] for entry in answer["splits"]["all"].get("classes", []))
        field = self._dataset.fields[self.name]
        if self._is_wide and self.name == self._first:
            return []
        # The server counts classes of one field only: of others we look through the rows.
        row_bytes = 64 if self._is_text else max(1, int(np.prod(field.shape))) * np.dtype(field.dtype).itemsize
        found: set[Any] = set()
        for batch in self._dataset.batches(batch_size=max(1, SCAN_BYTES // row_bytes), fields=[self.name]):
            if self._is_wide and not _are_one_hot(batch[self.name]):
                return []
            found |= self._seen(batch)
        return sorted(found)

    def _seen(self, batch: Batch) -> set[Any]:
        if self._is_text:
            return set(batch.text(self.name))
        stored = batch[self.name]
        return set(np.unique(stored.argmax(axis=1) if self._is_wide else stored).tolist())

    @cached_property
    def _index_of(self) -> dict[Any, int]:
        return {value: index for index, value in enumerate(self.values)}

    def ids(self, batch: Batch) -> npt.NDArray[Any]:
        """Numbers of the classes, (rows,) ints; what is stored where the field holds no classes."""
        if self._is_text:
            if not self.are_classes:
                raise BadParameter(f"the field {self.name!r} holds no classes")
            return np.array([self._index_of[text] for text in batch.text(self.name)], np.int64)
        stored = batch[self.name]
        if self._is_scalar and self._is_whole:
            return stored.reshape(-1)
        if self._is_wide and self.are_classes:
            if not _are_one_hot(stored):
                raise BadParameter(
                    f"rows of {self.name!r} are not one-hot: use class_mode='raw' to get them as they are"
                )
            ids: npt.NDArray[Any] = stored.argmax(axis=1)
            return ids
        return stored

    def targets(self, batch: Batch) -> npt.NDArray[Any]:
        """What the model is to learn of each row, as the class mode says."""
        if self._mode == "raw":
            return batch[self.name]
        if self._mode == "categorical":
            if self._is_wide:
                return batch[self.name].astype(np.float32, copy=False)
            ids = self.ids(batch)
            one_hot = np.zeros((len(ids), self.count), np.float32)
            one_hot[np.arange(len(ids)), ids.astype(np.intp)] = 1.0
            return one_hot
        if self._mode == "binary":
            if self._is_scalar and not self._is_whole:
                return batch[self.name].reshape(-1).astype(np.float32, copy=False)
            ids = self.ids(batch)
            if not (self._is_text or self._is_wide):
                ids = ids == self.values[1]
            return ids.astype(np.float32)
        return self.ids(batch)


def _are_one_hot(rows: npt.NDArray[Any]) -> bool:
    return bool(((rows == 0) | (rows == 1)).all() and (np.count_nonzero(rows, axis=1) == 1).all())
