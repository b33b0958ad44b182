"""One row, large: every field of it, its neighbours, and links to download it."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import Path, Request
from fastapi.responses import Response
from h5feed.errors import FeedError
from pydantic import Field as Param

from ...catalog.dataset import Dataset, Field
from ...row_bits import RowSet
from ...services import Services
from ..dependencies import NamePath, ServicesDep
from .cells import single
from .kinds import DRAWN, SINGLE, Kind, by_role, kind_of
from .rows import type_of
from .samples import sample, signal_of, strip_field, text_at
from .selection import Selection, place_of, selected
from .snippets import Snippet, in_list, named_fields, python, short_curl, texts
from .web import Page, about, answer, link, number, pages, parsed, soon

router = pages()

TEXT_CHARS = 20_000
"""Characters of a text that are shown."""

MAX_VALUES = 256
"""Numbers of a vector or list that are shown."""

NEIGHBOURS = 3
"""Rows before and after that are shown."""

_LARGE, _NARROW = 448, 180
_ZOOM = 2


class RowQuery(Selection):
    """A row, and the rows that it stands among."""

    field: str | None = Param(None, description="Signal or volume that `begin`, `end` and `at` are about.")
    begin: int = Param(0, ge=0, le=2**62)
    end: int | None = Param(None, ge=1, le=2**62)
    at: int | None = Param(None, ge=0, le=2**62)


@router.get("/datasets/{name}/rows/{row}")
async def row_page(
    request: Request, services: ServicesDep, name: NamePath, row: Annotated[int, Path(ge=0, le=2**62)]
) -> Response:
    """One row of a dataset."""
    query = parsed(RowQuery, request)

    def work() -> Page:
        dataset = services.catalog.dataset(name)
        dataset.check_rows([row])
        found = selected(services, dataset, query)
        place = place_of(found, row)
        total = dataset.rows if found is None else len(found)
        shown = [_shown(services, dataset, field, row, query) for field in by_role(dataset.fields)]
        around = _around(found, dataset.rows, row, place)
        data = {
            **about(dataset),
            "row": row,
            "place": place,
            "selected": total,
            "selection": query.query(),
            "values": {one["name"]: one["value"] for one in shown},
        }
        selection = {key: value for key, value in query.query().items() if key in Selection.model_fields}
        picture = strip_field(dataset)
        view = {
            "fields": shown,
            "row_url": lambda other: link("datasets", dataset.name, "rows", other, **selection),
            "all_url": link(
                "datasets",
                dataset.name,
                "rows",
                **selection,
                offset=None if place is None else place // 50 * 50 or None,
            ),
            "before": around[0],
            "after": around[1],
            "thumbnail": None
            if picture is None
            else lambda other: link(
                "datasets",
                dataset.name,
                "rows",
                other,
                "view",
                field=picture.name,
                side=64,
                revision=dataset.revision,
            ),
            "downloads": [
                (form, link("v1", "datasets", dataset.name, "rows", start=row, stop=row + 1, format=form))
                for form in ("npz", "safetensors")
            ],
        }
        return Page(
            "row.html",
            f"{dataset.name}: row {row:,}",
            data,
            view,
            dataset=dataset.name,
            tab="Rows",
            snippets=_snippets(request, dataset, row),
        )

    return answer(request, await soon(services, work))


def _snippets(request: Request, dataset: Dataset, row: int) -> list[Snippet]:
    names = named_fields(dataset, dataset.fields)
    which = "" if names is None else f", fields={names!r}"
    path = link(
        "v1", "datasets", dataset.name, "rows", start=row, stop=row + 1, fields=in_list(names), format="json"
    )  # fmt: skip
    lines = [f"batch = ds.take([{row}]{which})", *texts(dataset.fields)]
    return [python(request, dataset.name, *lines), *short_curl(request, path)]


def _around(rows: RowSet | None, total: int, row: int, place: int | None) -> tuple[list[int], list[int]]:
    """Rows before and after this one among the selected ones; in the file, where it is none of them."""
    if rows is None or place is None:
        return list(range(max(0, row - NEIGHBOURS), row)), list(range(row + 1, min(total, row + 1 + NEIGHBOURS)))
    return rows[max(0, place - NEIGHBOURS) : place].tolist(), rows[place + 1 : place + 1 + NEIGHBOURS].tolist()


def _shown(services: Services, dataset: Dataset, field: Field, row: int, query: RowQuery) -> dict[str, Any]:
    """A field of the row: its value as JSON has it, and how it is drawn."""
    kind = kind_of(dataset, field)
    shown: dict[str, Any] = {
        "name": field.name,
        "kind": kind,
        "role": field.role,
        "type": type_of(field),
        "value": None,
        "text": None,
        "picture": None,
        "narrow": None,
        "problem": None,
        "zoom": [],
        "numbers": None,
        "download": None
        if field.unreadable
        else link(
            "v1", "datasets", dataset.name, "rows",
            start=row, stop=row + 1, fields=in_list([field.name]), format="npz" if field.is_ragged else "npy",
        ),
    }  # fmt: skip
    try:
        shown |= _value(services, dataset, field, row, kind, query)
    except FeedError as error:
        shown["problem"] = error.detail
    return shown


def _value(services: Services, dataset: Dataset, field: Field, row: int, kind: Kind, query: RowQuery) -> dict[str, Any]:
    if kind == "none":
        return {"problem": field.unreadable}
    if kind in DRAWN:
        return _drawn(services, dataset, field, row, kind, query)
    if kind == "text":
        items, offsets = services.batcher.reader.read_ragged(field.column, np.array([row], np.int64))
        text = text_at(items, offsets, TEXT_CHARS)[0]
        return {"text": text, "value": text}
    values = sample(services, field, row).reshape(-1)
    if kind in SINGLE:
        value = values.tolist()[0]
        return {"text": single(field, value, kind).text, "value": value}
    names = field.class_names if field.class_names and len(field.class_names) == len(values) else None
    numbers = [
        {"name": names[place] if names else place, "text": number(value)}
        for place, value in enumerate(values[:MAX_VALUES].tolist())
    ]
    return {"numbers": numbers, "count": len(values), "value": values[:MAX_VALUES].tolist()}


def _drawn(services: Services, dataset: Dataset, field: Field, row: int, kind: Kind, query: RowQuery) -> dict[str, Any]:
    own = query if query.field == field.name else RowQuery()
    url = link(
        "datasets", dataset.name, "rows", row, "view",
        field=field.name, side=_LARGE, begin=own.begin or None, end=own.end, at=own.at, revision=dataset.revision,
    )  # fmt: skip
    drawn: dict[str, Any] = {"picture": url, "value": {"picture": url}}
    if kind == "signal":
        # On a phone, the words of the large one would be too small.
        drawn["narrow"] = url.replace(f"side={_LARGE}", f"side={_NARROW}")

    number_of_field = [one.name for one in dataset.fields].index(field.name)

    def to(**changes: Any) -> str:
        here = {"field": field.name, "begin": None, "end": None, "at": None} | changes
        return f"{link('datasets', dataset.name, 'rows', row, **query.query(**here))}#field-{number_of_field}"

    if kind == "signal":
        length = len(signal_of(sample(services, field, row)))
        begin, end = min(own.begin, max(0, length - 1)), min(own.end or length, length)
        drawn["zoom"] = _zooms(begin, max(begin + 1, end), length, to)
        drawn["value"] |= {"samples": length}
    if kind == "volume" and len(field.sample_shape) == 3:
        depth = field.sample_shape[0]
        at = min(depth // 2 if own.at is None else own.at, depth - 1)
        steps = [("first", 0), ("previous", at - 1), ("next", at + 1), ("last", depth - 1)]
        drawn["zoom"] = [(f"{name} slice", to(at=str(to_))) for name, to_ in steps if 0 <= to_ < depth and to_ != at]
        drawn["caption"] = f"slice {at} (of 0–{depth - 1}), and two perpendicular slices"
    return drawn


def _zooms(begin: int, end: int, length: int, to: Any) -> list[tuple[str, str]]:
    """Links that look at less of a signal, at more of it, and at what is beside."""
    width, middle = end - begin, (begin + end) // 2
    near, far = max(8, width // _ZOOM), min(length, width * _ZOOM)
    links = []
    if near < width:
        links.append(("zoom in", to(begin=middle - near // 2, end=middle - near // 2 + near)))
    if width < length:
        start = max(0, min(middle - far // 2, length - far))
        links.append(("zoom out", to(begin=start or None, end=start + far)))
        if begin > 0:
            links.append(("left", to(begin=max(0, begin - width) or None, end=max(width, begin))))
        if end < length:
            links.append(("right", to(begin=min(end, length - width), end=min(end + width, length))))
        links.append(("all", to()))
    return links
