"""Rows as a table with a small chart above each column, or as a contact sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import Response
from h5feed.errors import (
    BadParameter,
    FeedError,
    FieldNotFound,
    Overloaded,
    RowOutOfRange,
    SplitImpossible,
    SplitNotFound,
    UnsupportedField,
)
from pydantic import Field as Param

from ...catalog.dataset import Dataset, Field
from ...filters.grammar import MAX_CONDITIONS
from ...filters.predicates import bind
from ...services import Services
from ...stats.row_search import text_fields
from ..dependencies import NamePath, ServicesDep, attempted, in_thread, wait_for
from ..problems import STATUS
from .cells import Cell, cells
from .charts import MAX_BARS, Chart, class_chart, histogram
from .filters import examples, is_value, is_within
from .kinds import DRAWN, SINGLE, Kind, by_role, in_table, kind_of
from .samples import strip_field
from .selection import EVERYTHING, Selection, page_of, selected
from .snippets import Snippet, arguments, given, in_list, named_fields, python, short_curl, texts
from .web import Page, about, answer, counted, link, pages, parsed, soon, wants_json

router = pages()

ROWS_PER_PAGE, TILES_PER_PAGE = 50, 100
MAX_PER_PAGE = 200

CHART_SECONDS = 0.5
"""How long a page waits for the charts above its columns; without them it is shown anyhow."""

CHART_BYTES = 1 << 30
"""Bytes of the columns of single values up to which charts are made unasked."""

_THUMBNAIL, _TILE = 64, 112

_MOST_FIELDS = 100
"""Columns of the table; of more, the first ones."""


class RowsPageQuery(Selection):
    """What a page of rows shows."""

    view: Literal["table", "grid"] = "table"
    offset: int = Param(0, ge=0, le=2**62)
    limit: int | None = Param(None, ge=1, le=MAX_PER_PAGE)


@router.get("/datasets/{name}/rows")
async def rows_page(request: Request, services: ServicesDep, name: NamePath) -> Response:
    """Rows of a dataset, as many as a page has."""
    dataset = await in_thread(services, lambda: services.catalog.dataset(name))
    try:
        return await _rows_page(request, services, dataset)
    except (BadParameter, FieldNotFound, UnsupportedField, SplitNotFound, SplitImpossible, RowOutOfRange) as error:
        if wants_json(request):
            raise
        # The form stays, to be put right.
        refused = await in_thread(services, partial(_refused, request, dataset, error))
        return answer(request, refused, STATUS[type(error)])


async def _rows_page(request: Request, services: Services, dataset: Dataset) -> Response:
    query = parsed(RowsPageQuery, request)
    limit = query.limit or (TILES_PER_PAGE if query.view == "grid" else ROWS_PER_PAGE)
    charts = await _charts(services, dataset) if query.view == "table" else {}

    def work() -> Page:
        found = selected(services, dataset, query)
        total = dataset.rows if found is None else len(found)
        if query.offset and query.offset >= total:
            raise RowOutOfRange(_out_of_range(query.offset, total))
        ids = page_of(found, total, query.offset, limit)
        fields = in_table(dataset)[:_MOST_FIELDS] if query.view == "table" else _tile_fields(dataset)
        columns = cells(services, dataset, fields, ids, _THUMBNAIL if query.view == "table" else _TILE)
        lines = [(row, [columns[field.name][place] for field in fields]) for place, row in enumerate(ids.tolist())]
        data = {
            **about(dataset),
            "selected": total,
            "offset": query.offset,
            "limit": limit,
            "selection": query.query(),
            "fields": [field.name for field in fields],
            "more_fields": len(dataset.fields) - len(fields) if query.view == "table" else 0,
            "problem": None,
            "items": [
                {"row": row, "values": {f.name: _said(cell) for f, cell in zip(fields, line, strict=True)}}
                for row, line in lines
            ],
        }
        drawn = [_column(dataset, field, query, charts) for field in fields]
        view = {
            **_toolbar(dataset, query),
            "lines": lines,
            "columns": drawn,
            "charts_of_all": query.selects and any(column["chart"] for column in drawn),
            "row_url": lambda row: link("datasets", dataset.name, "rows", row, **query.query()),
            "page_url": lambda offset: _url(dataset, query, offset=offset or None),
            "last_offset": max(0, total - 1) // limit * limit,
        }
        return Page(
            "grid.html" if query.view == "grid" else "rows.html",
            f"{dataset.name}: rows",
            data,
            view,
            dataset=dataset.name,
            tab="Rows",
            snippets=_snippets(request, dataset, query, ids.tolist(), fields),
        )

    return answer(request, await soon(services, work))


def _out_of_range(offset: int, total: int) -> str:
    valid = f"valid: 0 to {total - 1}" if total else "valid: 0"
    return f"offset={offset} is out of range: {counted(total, 'row is', 'rows are')} selected ({valid})"


def _toolbar(dataset: Dataset, query: RowsPageQuery, typed: str = "") -> dict[str, Any]:
    """What the form above the rows needs; `typed` is a condition to put right."""
    return {
        "query": query,
        "typed": typed,
        "example": ": ".join(filter(None, ["Filter", " · ".join(examples(dataset))])),
        # A contact sheet without pictures would be two numbers in each place.
        "views": [
            (one, _url(dataset, query, view=one, offset=None))
            for one in ("table", "grid")
            if one == "table" or any(kind_of(dataset, field) in DRAWN for field in dataset.fields)
        ],
        "splits": split_names(dataset, query),
        "can_search": bool(text_fields(dataset)),
        "filters": [(one, _url(dataset, query, where=_without(query.where, one), offset=None)) for one in query.where],
        "everything_url": None if query.is_everything and not typed else link("datasets", dataset.name, "rows"),
        "keep": {key: value for key, value in query.query().items() if key not in ("split", "q", "where")},
    }


def _refused(request: Request, dataset: Dataset, error: FeedError) -> Page:
    """The form with what is right of the query, and the first condition that is not."""
    good: list[str] = []
    wrong: list[str] = []
    for condition in request.query_params.getlist("where"):
        try:
            bind(dataset, [condition])
            good.append(condition)
        except BadParameter:
            wrong.append(condition)
    query = RowsPageQuery(where=tuple(good[:MAX_CONDITIONS]))
    data = {
        **about(dataset),
        "problem": error.detail,
        "code": error.code,
        "selected": dataset.rows,
        "offset": 0,
        "items": [],
        "more_fields": 0,
    }
    view = {**_toolbar(dataset, query, next(iter(wrong), "")), "lines": [], "charts_of_all": False}
    return Page("rows.html", f"{dataset.name}: rows", data, view, dataset=dataset.name, tab="Rows")


def split_names(dataset: Dataset, query: Selection) -> list[str]:
    """Splits that a page can show."""
    drawn = ["train"] if query.splits_rows else []
    drawn += [name for name, share in (("val", query.val or query.folds), ("test", query.test)) if share]
    return list(dict.fromkeys(["all", *dataset.native, *drawn, query.canonical_split]))


async def _charts(services: Services, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Statistics of the columns of single values and text, by field, as far as they are known in a moment."""
    fields = [
        field
        for field in in_table(dataset)[:_MOST_FIELDS]
        if not field.unreadable and (kind_of(dataset, field) in SINGLE or field.is_text)
    ]

    def look() -> dict[str, dict[str, Any]]:
        known = services.statistics.known(dataset, fields, "all", EVERYTHING)
        found = {name: stats.report for name, stats in known.items()}
        if len(found) < len(fields) and sum(field.column.stored_nbytes for field in fields) <= CHART_BYTES:
            # One job for all, also when it has done some: of other fields, it would be another job.
            with contextlib.suppress(Overloaded):
                started.append(services.statistics.start(dataset, fields, "all", EVERYTHING, ""))
        return found

    started: list[Any] = []
    found = await attempted(services, look)
    if started:
        with contextlib.suppress(Overloaded):
            await wait_for(services, started[0], CHART_SECONDS)
        found = await attempted(services, look)
    return found


def _column(dataset: Dataset, field: Field, query: RowsPageQuery, charts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kind = kind_of(dataset, field)
    report = charts.get(field.name)
    drawn = None if report is None else _chart(dataset, field, kind, query, report)
    sortable = (kind in SINGLE or field.is_text) and not field.unreadable
    return {
        "name": field.name,
        "kind": kind,
        "role": field.role,
        "type": type_of(field),
        "chart": drawn,
        "is_lengths": drawn is not None and field.is_text and not any(bar.url for bar in drawn.bars),
        "distinct": None if report is None else report["distinct"],
        "sorted": query.order if query.sort == field.name else None,
        "sort_urls": {
            order: _url(dataset, query, sort=field.name, order=None if order == "asc" else order, offset=None)
            for order in ("asc", "desc")
        }
        if sortable
        else None,
        "is_numeric": kind == "number",
        "is_picture": kind in DRAWN,
    }


def _chart(dataset: Dataset, field: Field, kind: Kind, query: RowsPageQuery, report: dict[str, Any]) -> Chart | None:
    def to(*conditions: str) -> str:
        others = tuple(one for one in query.where if one not in conditions)
        return _url(dataset, query, where=(*others, *conditions), offset=None)

    if report["classes"]:
        return class_chart(field.name, report["classes"], lambda value: to(is_value(field, value)))
    if kind == "class" and report["values"]:
        return class_chart(field.name, report["values"], lambda value: to(is_value(field, value)))
    if field.is_text:
        values = report["values"] or ()
        if values and len(values) == report["distinct"] <= MAX_BARS < report["rows"]:
            return class_chart(field.name, values, lambda value: to(is_value(field, value)))
        return histogram(f"lengths of {field.name}", report["lengths"]) if report["lengths"] else None
    if not report["histogram"]:
        return None
    return histogram(
        field.name, report, url=lambda low, high, is_last: to(*is_within(field, low, high, closed=is_last))
    )


def type_of(field: Field) -> str:
    """Item type and shape of a row, as numpy writes them."""
    shape = " × ".join(map(str, field.sample_shape))
    if field.is_sparse:
        return f"{field.type_name} {shape}, sparse"
    return f"{field.type_name} list" if field.is_ragged and not field.is_text else f"{field.type_name} {shape}".strip()


def _tile_fields(dataset: Dataset) -> list[Field]:
    """What a tile shows: a picture, and the label below it."""
    picture = strip_field(dataset) or next((f for f in dataset.fields if kind_of(dataset, f) in DRAWN), None)
    fields = [field for field in (picture, dataset.label) if field is not None]
    return list({field.name: field for field in fields}.values()) or by_role(dataset.fields)[:3]


def _said(cell: Cell) -> Any:
    return {"picture": cell.picture} if cell.picture else {"problem": cell.text} if cell.problem else cell.value


def _url(dataset: Dataset, query: RowsPageQuery, **changes: Any) -> str:
    own = {"view": None if query.view == "table" else query.view, "offset": query.offset or None, "limit": query.limit}
    return link("datasets", dataset.name, "rows", **query.query(**(own | changes)))


def _without(conditions: Sequence[str], one: str) -> tuple[str, ...]:
    return tuple(condition for condition in conditions if condition != one)


def _snippets(
    request: Request, dataset: Dataset, query: RowsPageQuery, ids: list[int], fields: Sequence[Field]
) -> list[Snippet]:
    names = named_fields(dataset, fields)
    which = "" if names is None else f", fields={names!r}"
    options = given({**query.spec.model_dump(), "where": list(query.where)}, {**EVERYTHING.model_dump(), "where": []})
    lines = []
    if query.canonical_split != "all" or query.where:
        split = arguments(query.canonical_split, **options)
        lines.append(f"rows = ds.split_rows({split})")
    if query.sort is None and query.q is None and lines:
        stop = query.offset + len(ids)
        lines.append(f"batch = ds.take(rows[{query.offset}:{stop}]{which})")
    else:
        rows = range(ids[0], ids[-1] + 1) if ids[1:] else range(0)
        lines = [f"batch = ds.take({rows if ids == [*rows] else ids!r}{which})"]
    shell = []
    # The API counts rows that meet conditions, but neither those of a split nor in another order.
    if ids and query.canonical_split == "all" and query.q is None and query.sort is None:
        path = link(
            "v1", "datasets", dataset.name, "rows",
            start=query.offset, stop=query.offset + len(ids), where=query.where, fields=in_list(names), format="json",
        )  # fmt: skip
        shell = short_curl(request, path)
    return [python(request, dataset.name, *lines, *texts(fields)), *shell]
