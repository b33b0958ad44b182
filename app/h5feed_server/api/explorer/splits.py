"""Splits: how many rows of which classes each would have, whether they overlap, and the Python that trains on them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from h5feed.errors import BadParameter, FeedError, FieldNotFound, SplitImpossible, UnsupportedField

from ...catalog.dataset import Dataset
from ...row_bits import LISTED_ROWS, RowSet
from ...services import Services
from ...splits.compute import Splits
from ...splits.split_spec import FilteredSpec, SplitSpec
from ...stats.row_checks import compared
from ..dependencies import NamePath, ServicesDep, in_thread
from .charts import class_lines
from .filters import examples
from .kinds import kind_of
from .snippets import arguments, curl, inputs, python
from .web import Page, about, answer, link, pages, parsed, soon

router = pages()

_PARAMETERS = tuple(SplitSpec.model_fields)
_SIZES = ("test", "val", "folds", "fold")


@router.get("/datasets/{name}/splits")
async def splits_page(request: Request, services: ServicesDep, name: NamePath) -> Response:
    """The splits that the query describes; those that are stored where it describes none."""
    dataset = await in_thread(services, lambda: services.catalog.dataset(name))
    try:
        spec = parsed(FilteredSpec, request)
        page, status = await soon(services, lambda: _page(request, services, dataset, spec)), 200
    except (BadParameter, FieldNotFound, UnsupportedField, SplitImpossible) as error:
        # The form stays, to be put right.
        page, status = _refused(request, dataset, error), 400
    return answer(request, page, status)


def _page(request: Request, services: Services, dataset: Dataset, spec: FilteredSpec) -> Page:
    report = json.loads(services.batcher.split_jobs.report(dataset, spec))
    splits = services.batcher.split_jobs.splits(dataset, spec.split_spec)
    checks = services.checks.find(dataset)
    said = spec.model_dump(exclude_defaults=True)
    if spec.where:
        said["where"] = list(spec.where)
    names = [name for name in report["splits"] if name != "all"]
    data = {
        **about(dataset),
        "spec": said,
        "method": report["method"],
        "note": report["note"],
        "stratify": report["stratify"],
        "group": report["group"],
        "replaces": report["replaces"],
        "splits": report["splits"],
        "overlap": overlap(splits, dataset.rows),
        "repeated_across": None if checks is None or not names else checks.across(splits.rows, dataset.rows),
        "problem": None,
    }
    query = {key: str(value).lower() if isinstance(value, bool) else value for key, value in said.items()}
    view = {
        **_form(dataset, request),
        "names": names,
        "lines": {name: class_lines(one["classes"]) for name, one in report["splits"].items() if one.get("classes")},
        "rows_url": lambda split: link("datasets", dataset.name, "rows", split=split, **query),
        "python": _python(dataset, names, said),
        "compared": compared(dataset),
    }
    return Page(
        "splits.html",
        f"{dataset.name}: splits",
        data,
        view,
        dataset=dataset.name,
        tab="Splits",
        snippets=[
            python(request, dataset.name, *_python(dataset, names, said)),
            curl(request, link("v1", "datasets", dataset.name, "splits", **query)),
        ],
    )


def _refused(request: Request, dataset: Dataset, error: FeedError) -> Page:
    data = {**about(dataset), "spec": {}, "problem": error.detail, "code": error.code, "splits": {}}
    view = {**_form(dataset, request), "names": [], "lines": {}}
    return Page("splits.html", f"{dataset.name}: splits", data, view, dataset=dataset.name, tab="Splits")


def _form(dataset: Dataset, request: Request) -> dict[str, Any]:
    """What stands in the form, and what can be chosen."""
    chosen: dict[str, Any] = {name: request.query_params.get(name, "") for name in _PARAMETERS}
    chosen["where"] = [one for one in request.query_params.getlist("where") if one.strip()]
    readable = [field for field in dataset.fields if not field.unreadable]
    # They choose the sizes; everything else stays as it is.
    kept = {name: chosen[name] for name in chosen if name not in _SIZES and chosen[name]}
    single = [field.name for field in readable if kind_of(dataset, field) in ("class", "number", "text")]
    return {
        "chosen": chosen,
        "default_seed": SplitSpec.model_fields["split_seed"].default,
        "stratify": single + [f.name for f in readable if f.role == "label" and f.name not in single],
        "groups": single,
        "has_label": dataset.label is not None,
        "example": next(iter(examples(dataset)), ""),
        "presets": [
            (said, link("datasets", dataset.name, "splits", **query, **kept))
            for said, query in (
                ("80 / 10 / 10", {"test": 0.1, "val": 0.1}),
                ("70 / 15 / 15", {"test": 0.15, "val": 0.15}),
                ("5 folds", {"folds": 5}),
            )
        ],
        "stored_url": link("datasets", dataset.name, "splits") if dataset.native else None,
    }


def overlap(splits: Splits[RowSet], rows: int) -> dict[str, int]:
    """How many rows are in more than one split, and in none."""
    if rows > LISTED_ROWS and splits.method is not None:
        # Splits that are drawn have no row in common, and to look at all rows would take seconds.
        return {"in_several": 0, "in_none": 0}
    times = np.zeros(rows, np.uint8)
    for own in splits.rows.values():
        for block in [own] if isinstance(own, np.ndarray) else own.blocks():
            times[block] += 1
    return {"in_several": int(np.count_nonzero(times > 1)), "in_none": int(np.count_nonzero(times == 0))}


def _python(dataset: Dataset, names: list[str], said: dict[str, Any]) -> list[str]:
    """Lines that make a Keras sequence of each split."""
    if not names:
        return [f"train = ds.sequence({arguments(batch_size=32, shuffle=True, x=inputs(dataset))})"]
    said = {**said, **({"x": x} if (x := inputs(dataset)) is not None else {})}
    options = ", ".join(f"{name}={value!r}" for name, value in said.items())
    lines = [f"options = dict({options})"] if options else []
    rest = ", **options" if options else ""
    for name in names:
        shuffle = ", shuffle=True, seed=1" if name == "train" else ""
        variable = name if name.isidentifier() else f"split_{len(lines)}"
        lines.append(f"{variable} = ds.sequence({name!r}, batch_size=32{shuffle}{rest})")
    return lines
