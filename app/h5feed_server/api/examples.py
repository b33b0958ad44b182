"""Examples of the OpenAPI description that are of the data: they run as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from h5feed.crops import MAX_AXES, crop_text, cropped_fields
from h5feed.errors import BadParameter

from ..catalog.dataset import Dataset, Field
from ..filters.grammar import Condition, Value
from .images import is_image

MAX_NAMES = 500
"""Datasets in the drop-down of the page; more are typed in."""

_ENOUGH_ROWS = 32
"""A dataset of fewer is shown where there is no better."""


def illustrate(schema: dict[str, Any], datasets: list[Dataset], names: list[str]) -> None:
    """Give the parameters of an OpenAPI description values of the datasets that are there.

    Dataset names are examples and not an ``enum``, so generated clients keep working when files change.

    Parameters
    ----------
    schema : dict
        Changed in place.
    datasets : list of Dataset
        The readable ones.
    names : list of str
        Of these, and of those that may be read later.
    """
    if not names:
        return
    shown = max(datasets, key=_suits, default=None)
    first = names[0] if shown is None else shown.name
    ordered = [first, *(name for name in names if name != first)]
    values = {} if shown is None else _values(shown)
    for path in schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                name = parameter["name"]
                if name == "name" and parameter["in"] == "path":
                    parameter["examples"] = {each: {"value": each} for each in ordered[:MAX_NAMES]}
                elif name == "stop" and shown is not None:
                    parameter["example"] = max(1, min(parameter["example"], shown.rows))
                elif name in values and parameter["in"] == "query":
                    if parameter["required"]:
                        parameter["example"] = values[name]
                    else:
                        parameter["schema"]["examples"] = [values[name]]


def _suits(dataset: Dataset) -> int:
    """How much of the API can be tried with a dataset."""
    has_images = any(_is_image(field) for field in dataset.fields)
    return 4 * (dataset.rows >= _ENOUGH_ROWS) + 2 * has_images + (dataset.label is not None)


def _values(dataset: Dataset) -> dict[str, Any]:
    """Values of the parameters that are about a dataset, by name; none where it has nothing that would do."""
    fields = [field for field in dataset.fields if not field.unreadable]
    numbers = [field for field in fields if not field.is_text]
    scalars = [field for field in numbers if not field.sample_shape and not field.is_ragged]
    label = dataset.label
    found = {
        "q": dataset.name,
        "split": next((split for split in ("train", "val", "test") if split in dataset.native), "all"),
        "revision": dataset.revision,
        "field": _named(_first([field for field in fields if _is_image(field)] or _inputs_first(numbers))),
        "fields": ",".join(_listed(field) for field in dataset.chosen(None)) or None,
        "encoded": _named(_first([field for field in fields if field.images is not None]), listed=True),
        "classes": _named(label),
        "stratify": _named(label) or "none",
        "group": _named(label or _first(scalars)),
        "offsets": _window(_first([*dataset.chosen(None)])),
        "crop": _crop(dataset.chosen(None)),
        "crop_fields": _named(_first([field for field in dataset.chosen(None) if field.row_shape.axes]), listed=True),
        "where": _condition(_first([label] if label in scalars else scalars)),
        "file": dataset.files[0],
        "join": quote(dataset.name, safe=""),
        "weights": _named(_first(sorted(filter(_is_weight, scalars), key=lambda field: field.role != "weight"))),
    }
    return {name: value for name, value in found.items() if value is not None}


def _is_image(field: Field) -> bool:
    return not field.unreadable and is_image(field)


def _is_weight(field: Field) -> bool:
    """Whether its numbers are likely to be ≥ 0: weights, flags, counts and the numbers of classes."""
    return field.role == "weight" or field.dtype.kind in "bu" or (field.role == "label" and field.dtype.kind == "i")


def _condition(field: Field | None) -> str | None:
    return None if field is None else str(Condition(field.name, ">=", (Value("0"),)))


def _crop(fields: Sequence[Field]) -> str | None:
    """Half of each axis of the first field that can be cropped together with the others."""
    rows = {field.name: field.row_shape for field in fields}
    for shape, axes in rows.values():
        lengths = tuple(max(1, extent // 2) for extent in shape[: min(axes, MAX_AXES)])
        with contextlib.suppress(BadParameter):
            if lengths:
                cropped_fields(lengths, None, rows)
                return crop_text(lengths)
    return None


def _window(field: Field | None) -> str | None:
    return None if field is None else f"{_listed(field)}:0,1"


def _inputs_first(fields: list[Field]) -> list[Field]:
    return sorted(fields, key=lambda field: field.role != "input")


def _first(fields: list[Field]) -> Field | None:
    return fields[0] if fields else None


def _named(field: Field | None, *, listed: bool = False) -> str | None:
    return None if field is None else _listed(field) if listed else field.name


def _listed(field: Field) -> str:
    """Its name in a comma-separated list."""
    return quote(field.name, safe="")
