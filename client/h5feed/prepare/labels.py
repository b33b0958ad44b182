"""A label field read as classes: which there are, and how targets are made of them.

The class modes are those of ``ImageDataGenerator.flow_from_directory`` and, for ``"raw"``, ``flow_from_dataframe``
(Keras, https://keras.io/2.15/api/preprocessing/image/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..errors import BadParameter
from ..options import ClassMode
from ..remote_dataset import RemoteDataset

CLASS_MODES = get_args(ClassMode)

MOST_CLASSES = 1 << 20
"""Numbers in a one-hot row."""


class Labels:
    """How targets are made of one label field.

    Parameters
    ----------
    dataset : RemoteDataset
    name : str
        The field.
    class_mode : str
        See `h5feed.prepare.Preparation`.

    Raises
    ------
    BadParameter
        The field cannot be given in that mode; the message says why.

    Classes are asked for, once, by those modes only that must know them: ``"auto"``, ``"int"`` and ``"raw"`` take
    numbers with one value a row as they come.
    """

    def __init__(self, dataset: RemoteDataset, name: str, class_mode: ClassMode) -> None:
        field = dataset.fields[name]
        self.name = name
        self._dataset = dataset
        self._mode = "int" if class_mode == "sparse" else class_mode
        self._is_text = field.dtype == "string"
        self._is_scalar = not self._is_text and np.prod(field.shape, dtype=int) == 1
        self._is_wide = not self._is_text and len(field.shape) == 1 and not self._is_scalar
        self._is_whole = self._is_scalar and (field.dtype == "bool" or "int" in field.dtype)
        if self._mode == "raw" and self._is_text:
            raise BadParameter(f"the field {name!r} is text, which no model takes as it is: use class_mode='int'")
        if (self._mode == "categorical" and not self._is_wide) or (self._mode in ("auto", "int") and self._is_text):
            self._check_classes()
            if not self._is_text and self.values[0] < 0:
                raise BadParameter(f"class_mode='categorical' counts from 0, but {name!r} holds {self.values[0]}")
            if self._mode == "categorical" and self.count > MOST_CLASSES:
                raise BadParameter(
                    f"class_mode='categorical' would make rows of {self.count:,} numbers of {name!r}: leave it at "
                    "'auto', which gives the numbers of the classes"
                )
        if self._mode == "binary":
            self._check_classes()
            if len(self.values) != 2:
                raise BadParameter(
                    f"class_mode='binary' is for two classes, but {name!r} has {len(self.values)}: use 'categorical'"
                )

    def _check_classes(self) -> None:
        field = self._dataset.fields[self.name]
        if not self.are_classes:
            raise BadParameter(
                f"class_mode={self._mode!r} needs classes, but {self.name!r} ({field.dtype}{list(field.shape)}) holds "
                "none: whole numbers, bools, text and one-hot rows do. Use class_mode='raw' to get it as it is."
            )
        if not self.values:
            raise BadParameter(f"class_mode={self._mode!r}: {self.name!r} has more classes than the server counts")

    @cached_property
    def _counted(self) -> Mapping[str, Any]:
        """What the server says of this field's classes, over all rows."""
        answer = self._dataset.splits(classes=self.name)
        return answer if answer.get("classes_of") == self.name else {}

    @property
    def are_classes(self) -> bool:
        """Whether each row has one class: a whole number, a bool, a text, or a one-hot row."""
        return self._is_whole or self._counted.get("classes_are") in ("classes", "one-hot")

    @cached_property
    def values(self) -> list[Any]:
        """What the field says of each class, ascending; of a one-hot field all positions."""
        if self._is_wide:
            return list(range(self._dataset.fields[self.name].shape[0]))
        everything = self._counted["splits"]["all"] if self._counted else {}
        return sorted(entry["value"] for entry in everything.get("classes", []))

    @property
    def count(self) -> int:
        """Classes, counted as `keras.utils.to_categorical` does: up to the highest where labels are numbers."""
        return len(self.values) if self._is_text else max(len(self._names), 1 + int(self.values[-1]))

    @property
    def class_indices(self) -> dict[str, int]:
        """Name of each class, and the number that stands for it in targets."""
        if self._names:
            return {name: index for index, name in enumerate(self._names)}
        return {str(value): self.index(value) for value in self.values}

    @property
    def _names(self) -> list[str]:
        """Names of the classes, by number, where the file says them."""
        return [] if self._is_text else list(self._dataset.fields[self.name].class_names or ())

    @cached_property
    def _index_of(self) -> dict[Any, int]:
        return {value: index for index, value in enumerate(self.values)}

    def index(self, value: Any) -> int:
        """The number that stands for a class in targets."""
        return self._index_of[value] if self._is_text or self._mode == "binary" else int(value)

    def ids(self, batch: Batch) -> npt.NDArray[Any]:
        """Numbers of the classes, (rows,) ints; what is stored where the field holds no classes."""
        if self._is_text:
            return np.array([self._index_of[text] for text in batch.text(self.name)], np.int64)
        stored = batch[self.name]
        if self._is_scalar and self._mode == "binary":
            is_second: npt.NDArray[Any] = stored.reshape(-1) == self.values[1]
            return is_second.astype(np.int64)
        if self._is_whole:
            return stored.reshape(-1)
        if self._is_wide and self.are_classes:
            positions: npt.NDArray[Any] = stored.argmax(axis=1)
            return positions
        return stored

    @property
    def given(self) -> str:
        """What the targets of classes are, in words."""
        if self._mode == "binary":
            return "as 0.0 and 1.0"
        if self._mode == "categorical" or (self._mode in ("auto", "raw") and self._is_wide):
            return "as one-hot rows"
        if not self._is_text and self.values and not 0 <= self.values[0] <= self.values[-1] < len(self.class_indices):
            # Of 5, 6 and 7, three outputs would make a loss of nothing, or of NaN.
            outputs = "" if self.values[0] < 0 else f": a model needs {self.count} outputs"
            return f"as numbers from {self.values[0]} to {self.values[-1]}{outputs}"
        return "as numbers"

    def targets(self, batch: Batch) -> npt.NDArray[Any]:
        """What the model is to learn of each row, as the class mode says."""
        if self._mode == "raw" or (self._mode == "auto" and self._is_wide):
            return batch[self.name]
        if self._mode == "binary":
            return self.ids(batch).astype(np.float32)
        if self._mode != "categorical":
            return self.ids(batch)
        if self._is_wide:
            return batch[self.name].astype(np.float32, copy=False)
        ids = self.ids(batch).reshape(-1).astype(np.intp)
        one_hot = np.zeros((len(ids), self.count), np.float32)
        one_hot[np.arange(len(ids)), ids] = 1.0
        return one_hot


_SHOWN = 8
"""Fields that are proposed as labels."""


def no_label(dataset: RemoteDataset, inputs: Sequence[str]) -> str:
    """What to say where no field is the label: that there are no targets, and how to name some."""
    fields = [field for field in dataset.fields.values() if field.readable and not field.ragged]
    others = [field.name for field in fields if field.role not in ("input", "weight")]
    # What is an input by default may be what is to be learnt.
    others += [name for name in inputs if name not in others and len(inputs) > 1]
    shown = ", ".join(f"y={name!r}" for name in others[:_SHOWN]) + (" …" if len(others) > _SHOWN else "")
    how = f"name one with {shown}" if others else "there is no other field to name with y="
    lasting = f', or for good in h5feed.toml: roles = {{ "{others[0]}" = "label" }}' if others else ""
    refused = unserved(dataset, "label")
    why = refused or f"no field of {dataset.name!r} says that it is the label"
    return f"{why}, so that batches are inputs alone: {how}{lasting}. y=[] says that none is wanted"


def unserved(dataset: RemoteDataset, role: str) -> str:
    """Which fields of a role there are that cannot be served, and why; empty where there are none."""
    unreadable = [field for field in dataset.fields.values() if field.role == role and not field.readable]
    shown = "; ".join(f"{field.name!r}: {field.reason}" for field in unreadable[:_SHOWN])
    more = f"; and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
    return f"the {role} of {dataset.name!r} cannot be served ({shown}{more})" if unreadable else ""
