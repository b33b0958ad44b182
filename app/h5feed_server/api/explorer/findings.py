"""What matters for training: values that spoil a loss, classes that are missing, rows that repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...catalog.dataset import Dataset, Field
from ...stats.row_checks import RowChecks, compared
from .charts import label_of
from .web import number, share

_SKEWED = 20
"""How many times as large as the smallest class the largest is, for it to be told."""

_NAMED = 8
"""Classes or rows that a sentence names."""


@dataclass(frozen=True)
class Finding:
    """Something to know before training.

    Attributes
    ----------
    level : str
        ``problem`` spoils a training; ``note`` may be as it should.
    rows : sequence of int
        Examples.
    """

    level: Literal["problem", "note"]
    text: str
    field: str | None = None
    rows: Sequence[int] = ()


def findings(
    dataset: Dataset,
    reports: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, Any] | None,
    checks: RowChecks | None,
    across: int | None,
) -> list[Finding]:
    """Everything that is worth telling, problems first.

    Parameters
    ----------
    reports : mapping
        Statistics of fields over all rows, as the API says them.
    splits : mapping or None
        Report of the stored splits, as the API says it.
    across : int or None
        Rows that repeat one of another split.
    """
    found: list[Finding] = []
    for field in dataset.fields:
        report = reports.get(field.name)
        if report is not None and report["rows"]:
            found += _of_values(field, report)
            if field is dataset.label:
                found += _of_label(field, report)
    if splits is not None:
        found += _of_splits(splits)
    if checks is not None:
        found += _of_rows(dataset, checks, across)
    return sorted(found, key=lambda one: one.level != "problem")


def _of_values(field: Field, report: Mapping[str, Any]) -> list[Finding]:
    found = []
    if report["nan"]:
        found.append(
            Finding("problem", f"{_counted(report['nan'], 'value')} NaN ({share(report['nan_share'])})", field.name)
        )
    if report["inf"]:
        found.append(Finding("problem", f"{_counted(report['inf'], 'value')} infinite", field.name))
    least, greatest = report["min"], report["max"]
    if report["rows"] > 1 and least is not None and least == greatest and not report["nan"]:
        found.append(
            Finding("problem", f"every value is {number(least)}: there is nothing to learn from it", field.name)
        )
    elif report["rows"] > 1 and field.is_text and report["distinct"] == 1:
        found.append(Finding("problem", "every row has the same text", field.name))
    elif field.channels is not None and field.dtype == "u1" and greatest is not None and 0 < greatest <= 1:
        found.append(
            Finding("note", "uint8 images with no value above 1: scaling by 1/255 makes them black", field.name)
        )
    return found


def _of_label(field: Field, report: Mapping[str, Any]) -> list[Finding]:
    found = []
    names, least, greatest = field.class_names, report["min"], report["max"]
    if field.dtype.kind in "iu" and least is not None and report["classes_kind"] in (None, "values"):
        if names and greatest >= len(names):
            known = f"{len(names)} class names, for 0 to {len(names) - 1}"
            found.append(Finding("problem", f"labels go up to {number(greatest)}, but there are {known}", field.name))
        if least < 0:
            text = f"the smallest label is {number(least)}, but losses expect labels from 0"
            found.append(Finding("problem", text, field.name))
    classes = [one for one in report["classes"] or () if one["rows"]]
    if len(classes) > 1:
        ordered = sorted(classes, key=lambda one: one["rows"])
        small, large = ordered[0], ordered[-1]
        if large["rows"] >= _SKEWED * small["rows"]:
            said = f"{label_of(large)} has {large['rows']:,} rows, but {label_of(small)} has only {small['rows']:,}"
            found.append(Finding("note", f"classes are far from balanced: {said}", field.name))
    return found


def _of_splits(splits: Mapping[str, Any]) -> list[Finding]:
    found = []
    there = {one["value"]: label_of(one) for one in splits["splits"].get("all", {}).get("classes") or ()}
    for name, split in splits["splits"].items():
        if name == "all" or split.get("classes") is None:
            continue
        missing = [there[value] for value in there.keys() - {one["value"] for one in split["classes"] if one["rows"]}]
        if missing:
            named = ", ".join(sorted(missing)[:_NAMED]) + (" …" if len(missing) > _NAMED else "")
            level: Literal["problem", "note"] = "problem" if name in ("train", "val", "test") else "note"
            found.append(Finding(level, f"split {name} lacks {len(missing)} of {len(there)} classes: {named}"))
    return found


def _of_rows(dataset: Dataset, checks: RowChecks, across: int | None) -> list[Finding]:
    found = []
    report = checks.report
    if report["repeated"]:
        examples = [row for pair in report["examples"][:_NAMED] for row in pair[::-1]]
        text = f"{_counted(report['repeated'], 'row', ' has', ' have')} the same {compared(dataset)} as an earlier row"
        found.append(Finding("note", text, rows=list(dict.fromkeys(examples))))
    if across:
        those = _counted(across, "row", " has", " have")
        text = f"{those} the same {compared(dataset)} as a row in another split, which inflates test scores"
        found.append(Finding("problem", text))
    for name, uniform in report["uniform"].items():
        text = f"{_counted(uniform['rows'], 'image', ' has', ' have')} a single colour"
        found.append(Finding("problem" if uniform["rows"] > 1 else "note", text, name, uniform["examples"][:_NAMED]))
    return found


def _counted(count: int, what: str, one: str = " is", several: str = " are") -> str:
    return f"1 {what}{one}" if count == 1 else f"{count:,} {what}s{several}"
