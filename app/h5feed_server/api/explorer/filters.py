"""Conditions that links of the pages carry, in the words of the API's ``where=``."""

from __future__ import annotations

from typing import Any

from ...catalog.dataset import Dataset, Field
from ...filters.grammar import Condition, Operator, Value
from ...filters.intervals import Number, Scale
from ...filters.predicates import scale_of
from .kinds import Kind, kind_of

_EXAMPLE_CHARS = 40

_EXAMPLES: dict[Kind, tuple[Operator, Value]] = {
    "class": ("=", Value("1")),
    "number": (">=", Value("0")),
    "text": ("startswith", Value("A")),
}


def examples(dataset: Dataset) -> list[str]:
    """At most two conditions on fields of the dataset, which show how one is written: on a class, a number, a text."""
    found: dict[str, str] = {}
    # Names that need no quotes come first.
    for field in sorted(dataset.fields, key=lambda field: str(Condition(field.name, "=", ())).startswith('"')):
        kind = kind_of(dataset, field)
        if kind not in _EXAMPLES:
            continue
        operator, value = _EXAMPLES[kind]
        condition = _condition(field, operator, value)
        if kind == "class" and field.class_names:
            # "0" of the class 0 needs no quotes: the number 0 is the same class.
            names = [Value(name, name != str(value)) for value, name in enumerate(field.class_names[:2])]
            condition = _condition(field, "in" if names[1:] else "=", *names)
        if len(condition) <= _EXAMPLE_CHARS:
            found.setdefault(kind, condition)
    return [found[kind] for kind in _EXAMPLES if kind in found][:2]


def is_value(field: Field, value: Any) -> str:
    """The field has this value; its class's name says it where it has one."""
    names = field.class_names
    if names and isinstance(value, int) and 0 <= value < len(names):
        # Of two classes of the same name, the condition would mean the first.
        name = names[value]
        return _condition(field, "=", Value(name, quoted=True) if names.index(name) == value else _number(value))
    return _condition(field, "=", Value(value, quoted=True) if isinstance(value, str) else _number(value))


def is_within(field: Field, low: float, high: float, *, closed: bool) -> tuple[str, str]:
    """The field's number is from `low` to `high`, which belongs to it where that is `closed`.

    The bounds are written as numbers that the field can hold: of others, a condition would round them, perhaps past a
    value of the field, or to infinity.
    """
    scale = scale_of(field)
    first = _first_from(scale, low)
    if closed:
        last = scale.down(high)
        last = scale.below(last) if last > high else last
        return _condition(field, ">=", _number(first)), _condition(field, "<=", _number(last))
    return _condition(field, ">=", _number(first)), _condition(field, "<", _number(_first_from(scale, high)))


def _first_from(scale: Scale, bound: float) -> Number:
    """The least number of the field from `bound` on."""
    first = scale.up(bound)
    return scale.above(first) if first < bound else first


def _condition(field: Field, operator: Operator, *values: Value) -> str:
    return str(Condition(field.name, operator, values))


def _number(value: Any) -> Value:
    return Value(str(value).lower() if isinstance(value, bool) else repr(value))
