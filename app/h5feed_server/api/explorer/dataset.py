"""A dataset at a glance: what it is, its fields with their distributions, its classes, and what is wrong with it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from h5feed.errors import Overloaded
from pydantic import BaseModel, ConfigDict

from ...catalog.dataset import Dataset, Field
from ...catalog.description import describe_dataset
from ...jobs.registry import InProgress, JobState
from ...services import Services
from ...stats.row_checks import MAX_ROWS, RowChecks
from ..dependencies import NamePath, ServicesDep, attempted, in_thread, wait_for
from .charts import class_chart, class_lines, histogram
from .filters import is_value
from .findings import findings
from .kinds import by_role, kind_of
from .rows import type_of
from .samples import STRIP_SAMPLES, strip_field
from .selection import EVERYTHING
from .snippets import arguments, curl, inputs, python
from .web import REFRESH_SECONDS, Page, about, answer, counted, link, pages, parsed

router = pages()

UNASKED_BYTES = 256 << 20
"""Stored bytes of a dataset up to which it is looked at unasked: that takes seconds."""

_WAIT_SECONDS = 0.4
"""How long the page waits for what is computed; it is shown anyhow."""

_MOST_FIELDS = 200
_MOST_SPLITS = 12


class DatasetQuery(BaseModel):
    """What is computed for the page, of what is not computed unasked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compute: Literal["statistics", "checks"] | None = None


@router.get("/datasets/{name}")
async def dataset_page(request: Request, services: ServicesDep, name: NamePath) -> Response:
    """One dataset."""
    query = parsed(DatasetQuery, request)
    running: dict[str, JobState] = {}

    def look() -> tuple[Dataset, dict[str, Any], dict[str, Any] | None, RowChecks | None]:
        dataset = services.catalog.dataset(name)
        running.clear()
        return dataset, *_known(services, dataset, query, running)

    found = await attempted(services, look)
    for job in list(running.values()):
        with contextlib.suppress(Overloaded):
            if (await wait_for(services, job, _WAIT_SECONDS / len(running))).is_over:
                found = await attempted(services, look)
                break

    def work() -> Page:
        return _page(request, services, *found, running)

    return answer(request, await in_thread(services, work))


def _known(
    services: Services, dataset: Dataset, query: DatasetQuery, running: dict[str, JobState]
) -> tuple[dict[str, Any], dict[str, Any] | None, RowChecks | None]:
    """Statistics by field, the report of stored splits, and checks of rows: what is there, and jobs for the rest."""
    fields = [field for field in dataset.fields if not field.unreadable]
    known = services.statistics.known(dataset, fields, "all", EVERYTHING)
    reports = {name: stats.report for name, stats in known.items()}
    is_small = sum(field.column.stored_nbytes for field in fields) <= UNASKED_BYTES
    if len(reports) < len(fields) and (is_small or query.compute == "statistics"):
        # One job for all, also when it has done some: of other fields, it would be another job.
        with contextlib.suppress(Overloaded):
            running["statistics"] = services.statistics.start(dataset, fields, "all", EVERYTHING, "")
    splits = None
    if dataset.native and dataset.label is not None:
        try:
            splits = json.loads(services.batcher.split_jobs.report(dataset, EVERYTHING))
        except InProgress as progress:
            running["splits"] = progress.state
    checks = services.checks.find(dataset)
    if checks is None and dataset.rows <= MAX_ROWS and (is_small or query.compute == "checks"):
        with contextlib.suppress(Overloaded):
            running["checks"] = services.checks.start(dataset)
    return reports, splits, checks


def _page(
    request: Request,
    services: Services,
    dataset: Dataset,
    reports: dict[str, Any],
    splits: dict[str, Any] | None,
    checks: RowChecks | None,
    running: dict[str, JobState],
) -> Page:
    across = None
    if checks is not None and dataset.native:
        across = checks.across(services.batcher.splitter.splits(dataset, EVERYTHING).rows, dataset.rows)
    found = findings(dataset, reports, splits, checks, across)
    whole = describe_dataset(dataset)
    data = {
        **about(dataset),
        "summary": summary(dataset, _classes_found(dataset, reports)),
        "card": whole["card"],
        "files": whole["files"],
        "bytes": dataset.stored_bytes,
        "native_splits": whole["native_splits"],
        "hashing": whole["hashing"],
        "notes": whole["notes"],
        "fields": [
            {key: field[key] for key in ("name", "role", "role_reason", "shape", "dtype", "readable", "reason", "note")}
            for field in whole["fields"]
        ],
        "findings": [
            {"level": one.level, "text": one.text, "field": one.field, "rows": list(one.rows)} for one in found
        ],
        "statistics": reports,
        "splits": splits,
        "checks": None if checks is None else checks.report,
        "running": {kind: {"done": job.done, "total": job.total, "unit": job.unit} for kind, job in running.items()},
    }
    described_fields = {field["name"]: field for field in whole["fields"]}
    fields = [(field, described_fields[field.name]) for field in by_role(dataset.fields)]
    failed = {kind: job.detail for kind, job in running.items() if job.status == "failed"}
    view = {
        "fields": [
            _field(dataset, field, described, reports.get(field.name)) for field, described in fields[:_MOST_FIELDS]
        ],
        "more_fields": max(0, len(dataset.fields) - _MOST_FIELDS),
        "attributes": _attributes(whole["attributes"]),
        "balance": _balance(dataset, reports, splits),
        "strip": None
        if strip_field(dataset) is None
        else link("datasets", dataset.name, "strip", side=96, revision=dataset.revision),
        "strip_samples": STRIP_SAMPLES,
        "rows_url": link("datasets", dataset.name, "rows"),
        "row_url": lambda row: link("datasets", dataset.name, "rows", row),
        "jobs": running,
        "failed": failed,
        "compute": [
            (what, link("datasets", dataset.name, compute=what))
            for what, missing in (("statistics", not reports), ("checks", checks is None and dataset.rows <= MAX_ROWS))
            if missing and what not in running
        ],
    }
    loaded = arguments("train" if "train" in dataset.native else "all", batch_size=32, x=inputs(dataset))
    lines = [
        f"ds.splits({_stored_or_drawn(dataset)})",
        "ds.stats()",
        f"for {'(x,)' if dataset.label is None else 'x, y'} in ds.loader({loaded}): ...",
    ]
    return Page(
        "dataset.html",
        dataset.name,
        data,
        view,
        dataset=dataset.name,
        tab="Overview",
        snippets=[python(request, dataset.name, *lines), curl(request, link("v1", "datasets", dataset.name))],
        reload=REFRESH_SECONDS if running.keys() - failed.keys() else None,
    )


def summary(dataset: Dataset, classes: int | None = None) -> str:
    """What a dataset is, in one line: the fields that are served, and how many classes the label has.

    Parameters
    ----------
    classes : int, optional
        Classes that rows have, where they are counted; else the names are.
    """
    served = [field for field in dataset.fields if not field.unreadable]
    inputs = [field for field in served if field.role == "input"][:3]
    said = ", ".join(f"{field.name} {type_of(field)}" for field in inputs) or counted(len(served), "field")
    label = dataset.label
    if label is None:
        return said
    if classes is not None:
        said_of_label = f", {counted(classes, 'class', 'classes')}"
    else:
        said_of_label = f", {counted(len(label.class_names), 'class name')}" if label.class_names else ""
    return f"{said} → {label.name}{said_of_label}"


def _classes_found(dataset: Dataset, reports: dict[str, Any]) -> int | None:
    """How many classes rows have; None where that is not known, or the label has none."""
    report = None if dataset.label is None else reports.get(dataset.label.name)
    return sum(one["rows"] > 0 for one in report["classes"]) if report and report["classes"] else None


def stored_as(field: Field) -> str | None:
    """The type of a field in the file, in words; None of an array whose type may be one that numpy does not have."""
    array = field.array
    if array.unreadable:
        return None
    dtype = np.dtype(array.dtype)
    if dtype.kind == "S":
        return "variable-length text" if array.ragged else f"text of {counted(dtype.itemsize, 'byte')}"
    name = "bfloat16" if array.is_bfloat16 else f"{dtype.name}{', big-endian' if dtype.str[0] == '>' else ''}"
    return f"lists of {name}" if array.ragged else name


def _stored_or_drawn(dataset: Dataset) -> str:
    return "" if dataset.native else "test=0.1, val=0.1"


def _attributes(attributes: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of attributes, cut to what a page has room for."""
    shown = [
        (name, value if isinstance(value, str) else json.dumps(value, default=str))
        for name, value in attributes.items()
    ]
    return [(name, value if len(value) <= 300 else f"{value[:300]}…") for name, value in shown[:50]]


def _field(dataset: Dataset, field: Field, described: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    kind = kind_of(dataset, field)
    charts = []
    lengths = None
    if report is not None:
        parts: Sequence[dict[str, Any]] = report["channels"] if _are_colours(report["channels"]) else [report]
        for part in parts:
            chart = histogram(part.get("name", field.name), part, 48)
            if chart is not None and not report["classes"]:
                charts.append((part.get("name"), chart))
        if report["classes"]:
            charts.append((None, class_chart(field.name, report["classes"])))
        if report["lengths"]:
            lengths = histogram(f"lengths of {field.name}", report["lengths"], 32)
    has_mean = report is not None and bool(report["mean_image"]) and field.channels is not None
    return {
        "name": field.name,
        "kind": kind,
        "type": type_of(field),
        "stored_as": stored_as(field),
        "described": described,
        "attributes": _attributes(described["attributes"]),
        "report": report,
        "charts": charts,
        "lengths": lengths,
        "mean": link("datasets", dataset.name, "mean", field=field.name, revision=dataset.revision)
        if has_mean
        else None,
        "frequent": _frequent(field, report),
    }


def _frequent(field: Field, report: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The most frequent texts, where some are more frequent than others."""
    if report is None or report["classes"] or not field.is_text:
        return []
    return [one for one in report["values"] or () if one["rows"] > 1]


def _are_colours(channels: Sequence[dict[str, Any]] | None) -> bool:
    return bool(channels) and len(channels or ()) <= 4 and {one["name"] for one in channels or ()} >= set("RGB")


def _balance(dataset: Dataset, reports: dict[str, Any], splits: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Classes of each split, or of all rows."""
    label = dataset.label
    if label is None:
        return []

    def url(split: str, value: Any) -> str:
        condition = is_value(label, value)
        chosen = None if split == "all" else split
        return link("datasets", dataset.name, "rows", split=chosen, where=condition)

    if splits is not None:
        named = {name: one for name, one in splits["splits"].items() if one.get("classes")}
        if len(named) > 1:
            named.pop("all", None)
        by_split = {name: (one["rows"], one["classes"]) for name, one in list(named.items())[:_MOST_SPLITS]}
    else:
        report = reports.get(label.name)
        by_split = {"all": (report["rows"], report["classes"])} if report and report["classes"] else {}
    return [
        {
            "split": split,
            "rows": rows,
            "classes": len(classes),
            "lines": class_lines(classes, lambda value, split=split: url(split, value)),  # type: ignore[misc]
        }
        for split, (rows, classes) in by_split.items()
    ]
