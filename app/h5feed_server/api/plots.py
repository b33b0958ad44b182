"""Endpoint for plots of statistics."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from h5feed.errors import BadParameter, UnsupportedField
from pydantic import Field as Param

from ..catalog.dataset import Dataset, Field
from ..services import Services
from ..stats import figures, pictures
from ..stats.field_stats import FieldStats
from .binary import is_known, not_modified
from .dependencies import NamePath, ServicesDep, in_thread
from .images import FORMAT, PICTURE_RESPONSE, Form, image_field, picture, picture_headers
from .jobs import Prefer
from .stats import STATS_RESPONSES, JoinedStatsQuery, found_stats, mean_image_of

router = APIRouter(prefix="/v1/datasets/{name}", tags=["statistics"])

Plot = Literal["classes", "histogram", "mean_image"]


class PlotQuery(JoinedStatsQuery):
    field: str | None = Param(None, description="Default: the label for `classes`, else the first input that suits.")
    kind: Plot | None = Param(
        None,
        description="`classes`: share of each class in every split, or in `split`; `histogram`: of a field, per "
        "channel; `mean_image`. Default: `classes` where the label has some.",
    )
    format: Form = Param("png", description=FORMAT)


@router.get(
    "/stats/plot",
    summary="Plot of a class balance, a histogram or a mean image",
    responses={**PICTURE_RESPONSE, **STATS_RESPONSES},
    response_class=Response,
)
async def get_plot(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    query: Annotated[PlotQuery, Query()],
    prefer: Prefer = None,
) -> Response:
    """Class balance per split, a histogram, or the mean image. Each is computed only from the rows asked for."""

    def choose() -> tuple[Dataset, Plot, Field, Response | None]:
        dataset = services.catalog.dataset(name, query.revision)
        joined = services.batcher.joined(dataset, query)
        has_classes = query.field is None and dataset.label is not None and not joined.inner
        kind: Plot = query.kind or ("classes" if has_classes else "histogram")
        if joined.inner and kind == "classes":
            raise BadParameter("kind=classes: rows of classes are counted without joins: leave out join and how=inner")
        named = None if query.field is None else joined.source(query.field).field
        field = _plotted(dataset, kind) if named is None else named
        headers = picture_headers(request, dataset, query.format, joined)
        if is_known(request, headers):
            return dataset, kind, field, not_modified(headers)
        if kind == "classes":
            try:
                return dataset, kind, field, _balance(services, dataset, field, query, headers)
            except UnsupportedField:
                if query.kind is not None:
                    raise
                # The label is a number, such as a temperature.
                kind, field = "histogram", _plotted(dataset, "histogram")
        return dataset, kind, field, None

    dataset, kind, field, answer = await in_thread(services, choose)
    if answer is not None:
        return answer
    asked = {key: getattr(query, key) for key in JoinedStatsQuery.model_fields}
    wanted = JoinedStatsQuery(**asked | {"field": field.name})
    result = await found_stats(request, services, name, wanted, prefer)
    if isinstance(result, Response):
        return result
    stats = result[1][field.name]
    headers = picture_headers(request, dataset, query.format, result[0])
    draw = _histogram if kind == "histogram" else _mean_image
    return await in_thread(services, lambda: draw(dataset, field, stats, query, headers))


def _plotted(dataset: Dataset, kind: Plot) -> Field:
    """The field that a plot is of, if none is named."""
    if kind == "mean_image":
        return image_field(dataset, None)
    if kind == "classes":
        if dataset.label is None:
            raise UnsupportedField(f"dataset {dataset.name!r} has no label: name a field with classes, with field=")
        return dataset.label
    numbers = [field for field in dataset.fields if not field.unreadable and not field.is_text]
    numbers.sort(key=lambda field: field.role != "input")
    if not numbers:
        raise UnsupportedField(f"dataset {dataset.name!r} has no numeric field")
    return numbers[0]


def _balance(services: Services, dataset: Dataset, field: Field, query: PlotQuery, headers: dict[str, str]) -> Response:
    spec = query.spec
    if field is not dataset.label:
        raise BadParameter(f"field={field.name}: class balance is that of the label, {_label_name(dataset)}")
    # Says so where there is no such split.
    services.statistics.rows(dataset, query.split, spec)
    splits = json.loads(services.batcher.split_jobs.report(dataset, spec))["splits"]
    wanted = [query.split] if query.split != "all" else [split for split in splits if split != "all"] or ["all"]
    shown = {split: splits[split] for split in wanted if splits[split].get("classes")}
    if not shown:
        raise UnsupportedField(f"field {field.name!r} holds no classes")
    drawn, alt = figures.draw_classes(
        dataset.name, shown, query.spec.where_text, None if query.format == "txt" else query.format
    )
    return picture(drawn, query.format, alt, headers)


def _label_name(dataset: Dataset) -> str:
    return "of which this dataset has none" if dataset.label is None else repr(dataset.label.name)


def _histogram(
    dataset: Dataset, field: Field, stats: FieldStats, query: PlotQuery, headers: dict[str, str]
) -> Response:
    if field.is_text:
        raise UnsupportedField(f"field {field.name!r} holds text: a histogram needs numbers")
    if not stats.report["histogram"]:
        raise UnsupportedField(
            f"field {field.name!r} has no finite numbers in split {query.split!r}{query.spec.where_text}"
        )
    form = None if query.format == "txt" else query.format
    drawn, alt = figures.draw_histogram(dataset.name, stats.report, query.spec.where_text, form)
    return picture(drawn, query.format, alt, headers)


def _mean_image(
    dataset: Dataset, field: Field, stats: FieldStats, query: PlotQuery, headers: dict[str, str]
) -> Response:
    image = mean_image_of(dataset, field.name, stats, query)
    # Only images have one.
    assert field.channels is not None
    values = pictures.fit(pictures.arranged(image[None], field.channels), 320)
    pixels = pictures.sheet([pictures.to_pixels(values, field.dtype)], 1)
    means = stats.report["channel_means"] or {"grey": stats.report["mean"]}
    colours = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if value is not None)
    rows = stats.report["rows"]
    where = query.spec.where_text
    alt = f"Mean of the {rows:,} {field.name} of {dataset.name} in split {query.split}{where}; mean colour: {colours}."
    title = f"{dataset.name}: mean of {rows:,} {field.name}, split {query.split}{figures.cut(where, 60)}"
    form = None if query.format == "txt" else query.format
    return picture(figures.draw_picture(title, pixels, alt, form), query.format, alt, headers)
