"""Classes of a label field, and the targets made from them.

The class modes are those of ``ImageDataGenerator.flow_from_directory`` and, for ``"raw"``, ``flow_from_dataframe``
(Keras, https://keras.io/2.15/api/preprocessing/image/).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..errors import BadAnswer, BadParameter
from ..options import ClassMode
from ..samples import Samples
from ..suggestions import did_you_mean

CLASS_MODES = get_args(ClassMode)

MOST_CLASSES = 1 << 20
"""Maximum length of a one-hot row."""


class Labels:
    """Makes targets from one label field.

    Parameters
    ----------
    dataset : Samples
    name : str
        Name of the field.
    class_mode : str
    classes : sequence of str or number, optional
        See `h5feed.prepare.Preparation`.
    source : str, optional
        The field, if batches have it under another name.

    Raises
    ------
    BadParameter
        The field does not support this mode; the message says why.

    Classes are requested from the server once, and only if the mode needs them: ``"auto"``, ``"int"`` and ``"raw"`` use
    numeric labels with one value per row as they are.
    """

    def __init__(
        self,
        dataset: Samples,
        name: str,
        class_mode: ClassMode,
        classes: Sequence[str | float] | None = None,
        source: str | None = None,
    ) -> None:
        self._source = name if source is None else source
        field = dataset.fields[self._source]
        self.name = name
        self._dataset = dataset
        self._mode = "int" if class_mode == "sparse" else class_mode
        self._is_text = field.dtype == "string"
        self._is_scalar = not self._is_text and np.prod(field.shape, dtype=int) == 1
        self._is_wide = not self._is_text and len(field.shape) == 1 and not self._is_scalar
        self._is_whole = self._is_scalar and (field.dtype == "bool" or "int" in field.dtype)
        self._chosen = None if classes is None else chosen_classes(dataset, self._source, classes)
        self._is_renumbered = self._is_text or self._chosen is not None
        if self._mode == "raw" and self._chosen is not None:
            raise BadParameter("class_mode='raw' gives stored values, but classes= numbers them: use one of the two")
        if self._mode == "raw" and self._is_text:
            raise BadParameter(f"the field {name!r} is text, but a model needs numbers: use class_mode='int'")
        if (self._mode == "categorical" and not self._is_wide) or (self._mode in ("auto", "int") and self._is_text):
            self._check_classes()
            if not self._is_renumbered and self.values[0] < 0:
                raise BadParameter(f"class_mode='categorical' needs classes >= 0, but {name!r} holds {self.values[0]}")
            if self._mode == "categorical" and self.count > MOST_CLASSES:
                raise BadParameter(
                    f"class_mode='categorical' would make one-hot rows of {self.count:,} numbers from {name!r}: use "
                    "'auto', which gives class numbers"
                )
        if self._mode == "binary":
            self._check_classes()
            if len(self.values) != 2:
                raise BadParameter(
                    f"class_mode='binary' needs two classes, but {name!r} has {len(self.values)}: use 'categorical'"
                )

    def _check_classes(self) -> None:
        field = self._dataset.fields[self._source]
        if not self.are_classes:
            raise BadParameter(
                f"class_mode={self._mode!r} needs classes: integers, bools, text or one-hot rows, not {self.name!r} "
                f"({field.dtype}{list(field.shape)}). Use class_mode='raw' to get the stored values."
            )
        if not self.values:
            raise BadParameter(f"class_mode={self._mode!r}: {self.name!r} has too many classes for the server to count")

    @cached_property
    def _counted(self) -> Mapping[str, Any]:
        """The server's answer about the classes of this field, over all rows."""
        dataset, name = self._dataset.owner_of(self._source)
        answer = dataset.splits(classes=name)
        return answer if answer.get("classes_of") == name else {}

    @property
    def are_classes(self) -> bool:
        """Whether each row has one class: an integer, a bool, a text, or a one-hot row."""
        return self._chosen is not None or self._is_whole or self._counted.get("classes_are") in ("classes", "one-hot")

    @cached_property
    def values(self) -> list[Any]:
        """The stored value of each class, ascending or as chosen; for a one-hot field, all positions."""
        if self._chosen is not None:
            return list(self._chosen.values())
        if self._is_wide:
            return list(range(self._dataset.fields[self._source].shape[0]))
        everything = self._counted["splits"]["all"] if self._counted else {}
        return sorted(entry["value"] for entry in everything.get("classes", []))

    @property
    def count(self) -> int:
        """Number of classes as in `keras.utils.to_categorical`: for numeric labels, the highest label plus one."""
        return len(self.values) if self._is_renumbered else max(len(self._names), 1 + int(self.values[-1]))

    @property
    def class_indices(self) -> dict[str, int]:
        """The number of each class in the targets, by class name."""
        if self._chosen is not None:
            return {name: index for index, name in enumerate(self._chosen)}
        if self._names:
            return {name: index for index, name in enumerate(self._names)}
        return {str(value): self.index(value) for value in self.values}

    @property
    def _names(self) -> list[str]:
        """Class names in order of their numbers, if the file has them."""
        return [] if self._is_text else list(self._dataset.fields[self._source].class_names or ())

    @cached_property
    def _index_of(self) -> dict[Any, int]:
        return {value: index for index, value in enumerate(self.values)}

    def index(self, value: Any) -> int:
        """The number of a class in the targets."""
        return self._index_of[value] if self._is_renumbered or self._mode == "binary" else int(value)

    def ids(self, batch: Batch) -> npt.NDArray[Any]:
        """Class numbers, (rows,) ints, or (rows, several) if samples have several rows; the stored values if the field
        does not hold classes."""
        if self._is_text:
            return np.array([self._index_of[text] for text in batch.text(self.name)], np.int64)
        stored = batch[self.name]
        # Samples of several rows have axes between those of the batch and of a row.
        axes = stored.ndim - len(self._dataset.fields[self._source].shape)
        if self._chosen is not None:
            return self._renumbered(stored.reshape(stored.shape[:axes]))
        if self._is_scalar and self._mode == "binary":
            is_second: npt.NDArray[Any] = stored.reshape(stored.shape[:axes]) == self.values[1]
            return is_second.astype(np.int64)
        if self._is_whole:
            return stored.reshape(stored.shape[:axes])
        if self._is_wide and self.are_classes:
            positions: npt.NDArray[Any] = stored.argmax(axis=-1)
            return positions
        return stored

    def _renumbered(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The numbers of the chosen classes, int64, from stored values of the same shape."""
        values, numbers = self._sorted
        places = np.minimum(np.searchsorted(values, stored), len(values) - 1)
        others = np.flatnonzero(values[places] != stored)
        if len(others):
            raise BadAnswer(f"received a row of class {stored.reshape(-1)[others[0]]}, which is not one of classes=")
        return numbers[places]

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Stored values of the chosen classes, ascending, and their numbers."""
        values = np.array(self.values)
        order = np.argsort(values).astype(np.int64)
        return values[order], order

    def check_numbered_as(self, before: Labels) -> None:
        """Check that added rows have not changed what targets mean.

        Raises
        ------
        BadParameter
            A class has another number than `before`, or one-hot rows another length.
        """
        if self._chosen is not None or self._mode == "raw":
            return
        what = ""
        if self._is_text or self._mode == "binary":
            pairs = enumerate(zip(before.values, self.values, strict=False))
            what = next(
                (f"class {number} was {one!r} and is {now!r}" for number, (one, now) in pairs if one != now), ""
            )
        if not what and self._mode == "categorical" and not self._is_wide and before.count != self.count:
            what = f"one-hot rows had {before.count} numbers and have {self.count}"
        if what:
            raise BadParameter(
                f"the dataset has other rows than before, with other classes of {self.name!r}: {what}. Give classes=, "
                "which numbers them once and for all, or make a new loop"
            )

    @property
    def given(self) -> str:
        """Description of the targets of classes."""
        if self._mode == "binary":
            return "as 0.0 and 1.0"
        if self._mode == "categorical" or (self._mode in ("auto", "raw") and self._is_wide):
            return "as one-hot rows"
        if (
            not self._is_renumbered
            and self.values
            and not 0 <= self.values[0] <= self.values[-1] < len(self.class_indices)
        ):
            # With classes 5, 6 and 7, a model with three outputs would have a loss of 0 or NaN.
            outputs = "" if self.values[0] < 0 else f": the model needs {self.count} outputs"
            return f"as numbers from {self.values[0]} to {self.values[-1]}{outputs}"
        return "as numbers"

    def targets(self, batch: Batch) -> npt.NDArray[Any]:
        """The targets of a batch, according to the class mode."""
        if self._mode == "raw" or (self._mode == "auto" and self._is_wide):
            return batch[self.name]
        if self._mode == "binary":
            return self.ids(batch).astype(np.float32)
        if self._mode != "categorical":
            return self.ids(batch)
        if self._is_wide:
            return batch[self.name].astype(np.float32, copy=False)
        ids = self.ids(batch)
        places = ids.reshape(-1).astype(np.intp)
        one_hot = np.zeros((len(places), self.count), np.float32)
        one_hot[np.arange(len(places)), places] = 1.0
        return one_hot.reshape(*ids.shape, self.count)


_SHOWN = 8
"""Maximum number of fields listed in a message."""

_CLASSES_SHOWN = 20
"""Maximum number of classes listed in a message."""


def chosen_classes(dataset: Samples, name: str, classes: Sequence[str | float]) -> dict[str, Any]:
    """The stored value of each class that is chosen, by class name, in the order given.

    Raises
    ------
    BadParameter
        Rows of the field do not have one class each, or a class is given twice, or is not one of those that the server
        lists. It lists none of fractions, and of more than 10,000 classes.
    """
    field = dataset.fields[name]
    if isinstance(classes, str) or not len(classes):
        raise BadParameter(f"classes={classes!r} must be a list of classes, such as ['cat', 'dog']")
    if field.dtype != "string" and np.prod(field.shape, dtype=int) != 1:
        raise BadParameter(
            f"classes= needs a label with one number or text per row, but {name!r} is {field.dtype}{list(field.shape)}"
        )
    names = field.class_names or ()
    chosen: dict[str, Any] = {}
    for given in classes:
        if field.dtype == "string":
            value: Any = str(given)
            key = value
        elif isinstance(given, str):
            if given not in names:
                rest = f"the classes are {', '.join(names[:_CLASSES_SHOWN])}{' …' * (len(names) > _CLASSES_SHOWN)}"
                said = did_you_mean(given, names, rest) if names else f"{name!r} holds numbers without names"
                raise BadParameter(f"{name!r} has no class {given!r}: {said}")
            key, value = given, names.index(given)
        else:
            value = given.item() if isinstance(given, np.generic) else given
            if not isinstance(value, (int, float)):
                raise BadParameter(f"classes={list(classes)!r}: {given!r} is neither the name of a class nor a number")
            named = 0 <= value < len(names) and int(value) == value
            key = names[int(value)] if named else str(value)
        if key in chosen or value in chosen.values():
            raise BadParameter(f"classes={list(classes)!r} has {key!r} twice")
        chosen[key] = value
    if any(key not in names for key in chosen):
        _check_there(dataset, name, chosen)
    return chosen


def _check_there(dataset: Samples, name: str, chosen: Mapping[str, Any]) -> None:
    """Raise `BadParameter` if no row of the dataset has one of these classes, which have no names in the file."""
    counted = dataset.splits(classes=name)
    listed = counted["splits"]["all"].get("classes") if counted.get("classes_of") == name else None
    if listed is None:
        # Too many classes to list, or values such as prices.
        return
    there = [entry["value"] for entry in listed]
    for key, value in chosen.items():
        if value not in there and key not in (dataset.fields[name].class_names or ()):
            rest = (
                f"the classes are {', '.join(map(str, there[:_CLASSES_SHOWN]))}{' …' * (len(there) > _CLASSES_SHOWN)}"
            )
            raise BadParameter(f"{name!r} has no class {key!r}: {did_you_mean(key, list(map(str, there)), rest)}")


def class_condition(dataset: Samples, name: str, classes: Sequence[str | float]) -> str:
    """The condition that a row is of one of these classes, for ``where``.

    Raises
    ------
    BadParameter
    """
    values = chosen_classes(dataset, name, classes).values()
    # JSON writes numbers, true and false as conditions do.
    items = ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
    return f"{json.dumps(name, ensure_ascii=False)} in {items}"


def no_label(dataset: Samples, inputs: Sequence[str]) -> str:
    """The message for a dataset without a label field: how to choose one."""
    fields = [field for field in dataset.fields.values() if field.readable and not field.ragged]
    others = [field.name for field in fields if field.role not in ("input", "weight")]
    # An input may be the target, unless it is the only one.
    others += [field.name for field in fields if field.role == "input" and [field.name] != [*inputs]]
    shown = ", ".join(f"y={name!r}" for name in others[:_SHOWN]) + (" …" if len(others) > _SHOWN else "")
    how = f"choose one with {shown}" if others else "there is no other field to choose with y="
    lasting = f', or permanently in h5feed.toml: roles = {{ "{others[0]}" = "label" }}' if others else ""
    refused = unserved(dataset, "label")
    why = refused or f"{dataset.name!r} has no label field"
    return f"{why}, so batches have no targets: {how}{lasting}. Use y=[] if this is intended"


def unserved(dataset: Samples, role: str) -> str:
    """Which fields of a role cannot be served, and why; empty if there are none."""
    unreadable = [field for field in dataset.fields.values() if field.role == role and not field.readable]
    shown = "; ".join(f"{field.name!r}: {field.reason}" for field in unreadable[:_SHOWN])
    more = f"; and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
    return f"the {role} field of {dataset.name!r} cannot be served ({shown}{more})" if unreadable else ""
