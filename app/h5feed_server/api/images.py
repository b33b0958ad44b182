"""Endpoints for images: a single sample, or a contact sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from h5feed.errors import BadParameter, RowOutOfRange, TooLarge, UnsupportedField
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic import Field as Param

from ..batches.joins import Joined
from ..catalog.dataset import Dataset, Field
from ..row_bits import RowSet, as_list
from ..services import Services
from ..sharing.slots import Slots
from ..splits.labels import Labels
from ..splits.splitter import is_large
from ..stats import figures, pictures
from .binary import NOT_MODIFIED, file_name, is_known, not_modified
from .dependencies import NamePath, ServicesDep, in_thread
from .problem_responses import DATASET, FIELDS, SPLITS, problems
from .queries import SplitsQuery
from .stats import StatsQuery, stats_headers

T = TypeVar("T")

router = APIRouter(prefix="/v1/datasets/{name}", tags=["pictures"])

Form = Literal["png", "svg", "txt"]
Line = tuple[str | None, npt.NDArray[np.int64]]
"""Name of a line of a contact sheet, if it has one, and its rows."""

MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml", "txt": "text/plain; charset=utf-8"}

PICTURE_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A picture, or the text that says what is on it",
        "content": {
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/svg+xml": {"schema": {"type": "string"}},
            "text/plain": {"schema": {"type": "string"}},
        },
    },
    **NOT_MODIFIED,
}

_PROBLEMS = (*DATASET, *FIELDS, RowOutOfRange)

FORMAT = "`png`, `svg`, or `txt`: the text for those who do not see the picture, which is in the other two as well."
_FIELD = "Field of images; default: the first input that holds some."

MAX_SAMPLE_BYTES = 64 << 20
"""Bytes of a sample that is made a picture."""

MAX_LINES = 32
"""Classes of a contact sheet."""

MAX_ROWS = 1024
"""Rows of a contact sheet that are named one by one."""

_ROW_IDS = re.compile(r"[0-9]{1,18}(?:,[0-9]{1,18})*", re.ASCII)

_COLUMNS = 8
"""Pictures of a line where rows are named, or as many as make the sheet square."""

_ROWS_TOLD = 32
"""Row ids that the text about a contact sheet lists."""


_READ_BYTES = 8 << 20
"""Bytes of samples of a contact sheet that are read at once."""

_SLOTS = Slots(2, 20.0, "the threads that draw images")


class ImageQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str | None = Param(None, description=_FIELD)
    format: Form = Param("png", description=FORMAT)
    side: int | None = Param(
        None, ge=1, le=pictures.MAX_SIDE, description="Pixels of the longer side at most; default: as it is stored."
    )
    revision: str | None = Param(None, description="Answer 409 instead of other data than this revision's.")


class PreviewQuery(StatsQuery):
    rows: str | None = Param(
        None,
        description=f"Row ids, separated by commas, at most {MAX_ROWS}: these rows are shown, in this order. Default: "
        "some rows of each class.",
    )
    field: str | None = Param(None, description=_FIELD)
    format: Form = Param("png", description=FORMAT)
    per_class: int = Param(8, ge=1, le=32, description="Images of a line.")
    side: int = Param(
        96, ge=8, le=512, description="Pixels of an image's longer side at most; fewer where there are many images."
    )

    @model_validator(mode="after")
    def _rows_or_split(self) -> PreviewQuery:
        fields = type(self).model_fields
        # Older versions of FastAPI count defaults as given, too.
        besides = sorted(
            name
            for name in {"split", "per_class", *SplitsQuery.model_fields} - {"revision"}
            if getattr(self, name) != fields[name].default
        )
        if self.rows is not None and besides:
            raise ValueError(f"rows= names the rows themselves: leave out {', '.join(besides)}")
        return self

    @property
    def row_ids(self) -> npt.NDArray[np.int64] | None:
        """The row ids, if they are named.

        Raises
        ------
        BadParameter, TooLarge
        """
        if self.rows is None:
            return None
        if not _ROW_IDS.fullmatch(self.rows):
            raise BadParameter(f"rows={self.rows:.80}: list row ids, separated by commas, such as 0,5,9")
        ids = [int(item) for item in self.rows.split(",")]
        if len(ids) > MAX_ROWS:
            raise TooLarge(f"{len(ids)} rows are more than a contact sheet shows (limit {MAX_ROWS})")
        return np.array(ids, np.int64)


@router.get(
    "/rows/{row}/image",
    summary="One row as a picture",
    responses={**PICTURE_RESPONSE, **problems(*_PROBLEMS)},
    response_class=Response,
)
async def get_image(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    row: Annotated[int, Path(ge=0, le=2**62, description="Row id.", examples=[0])],
    query: Annotated[ImageQuery, Query()],
) -> Response:
    """One sample as an image. Colours follow the field's `channels`; values that are not uint8 are scaled to the
    display range.
    """

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = picture_headers(request, dataset, query.format)
        if is_known(request, headers):
            return not_modified(headers)
        dataset.check_rows([row])
        field = image_field(dataset, query.field)
        values = _read(services, field, np.array([row], np.int64))
        side = query.side or pictures.MAX_SIDE
        if max(values.shape[1:3]) > side:
            values = pictures.fit(values, side)
        pixels = pictures.to_pixels(values, field.dtype)[0]
        alt = f"Row {row} of {field.name} of {dataset.name}, {pixels.shape[1]} × {pixels.shape[0]} pixels."
        if query.format == "png":
            return picture(pictures.png(pixels), query.format, alt, headers)
        return picture(pictures.svg(pixels, alt) if query.format == "svg" else b"", query.format, alt, headers)

    return await in_thread(services, partial(in_slot, work))


@router.get(
    "/preview",
    summary="Contact sheet: some rows of each class",
    responses={**PICTURE_RESPONSE, **problems(*_PROBLEMS, *SPLITS)},
    response_class=Response,
)
async def get_preview(
    request: Request, services: ServicesDep, name: NamePath, query: Annotated[PreviewQuery, Query()]
) -> Response:
    """A contact sheet of a split: one line per class, with images spread evenly over its rows. With `rows`, a contact
    sheet of these rows.
    """

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = picture_headers(request, dataset, query.format)
        if is_known(request, headers):
            return not_modified(headers)
        field = image_field(dataset, query.field)
        lines, which, described = _chosen(services, dataset, query)
        side = pictures.side_in_sheet(query.side, sum(len(wanted) for _, wanted in lines))
        values = [_thumbnails(services, field, wanted, side) for _, wanted in lines]
        pixels = pictures.to_pixels(np.concatenate(values), field.dtype)
        bounds = np.cumsum([len(line) for line in values])[:-1]
        canvas = pictures.sheet(np.split(pixels, bounds), max(map(len, values)))
        names = [label for label, _ in lines if label is not None]
        title = f"{dataset.name}: {field.name}, {which}"
        alt = f"Contact sheet of {field.name} of {dataset.name}, {described}."
        form = None if query.format == "txt" else query.format
        return picture(figures.draw_picture(title, canvas, alt, form, names), query.format, alt, headers)

    return await in_thread(services, partial(in_slot, work))


def image_field(dataset: Dataset, name: str | None) -> Field:
    """The image field of that name; by default the first input that holds images.

    Raises
    ------
    FieldNotFound, UnsupportedField, TooLarge
    """
    if name is None:
        suitable = [field for field in dataset.fields if not field.unreadable and is_image(field)]
        suitable.sort(key=lambda field: field.role != "input")
        if not suitable:
            raise UnsupportedField(f"dataset {dataset.name!r} has no image field")
        field = suitable[0]
    else:
        field = dataset.field(name)
    if not is_image(field):
        raise UnsupportedField(
            f"field {field.name!r} holds no images: a sample is {field.type_name}{list(field.sample_shape)}; images "
            "are height × width, with 1, 3 or 4 channels last"
        )
    if field.row_bytes > MAX_SAMPLE_BYTES:
        raise TooLarge(f"images of {field.row_bytes} bytes are too large to show (limit {MAX_SAMPLE_BYTES})")
    return field


def is_image(field: Field) -> bool:
    """Whether its rows can be shown as pictures."""
    shape = field.sample_shape
    if field.channels is None or field.is_ragged or field.dtype.kind not in "biuf" or min(shape, default=0) < 1:
        return False
    if field.channels == "grey":
        return len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)
    return len(shape) == 3 and (shape[2] in (3, 4) or shape[0] in (3, 4))


def _read(services: Services, field: Field, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Samples, (n, height, width, depth), red first."""
    out = np.empty((len(rows), *field.sample_shape), field.dtype)
    services.batcher.reader.read(field.column, rows, out)
    assert field.channels is not None
    return pictures.arranged(out, field.channels)


def _thumbnails(services: Services, field: Field, rows: npt.NDArray[np.int64], side: int) -> npt.NDArray[Any]:
    """Samples as `_read` gives them, made to fit; a few at a time, for they may be great."""
    step = max(1, _READ_BYTES // max(1, field.row_bytes))
    parts = [rows[begin : begin + step] for begin in range(0, len(rows), step)]
    return np.concatenate([pictures.fit(_read(services, field, part), side) for part in parts])


def in_slot(work: Callable[[], T]) -> T:
    """Do what takes several times the memory of its pictures, which few may at a time."""
    with _SLOTS.acquire():
        return work()


def _chosen(services: Services, dataset: Dataset, query: PreviewQuery) -> tuple[list[Line], str, str]:
    """Name and rows of each line of a contact sheet, and what they are, in short and in full.

    Raises
    ------
    RowOutOfRange
    """
    named = query.row_ids
    if named is not None:
        dataset.check_rows(named.tolist())
        columns = max(_COLUMNS, math.isqrt(len(named) - 1) + 1)
        lines: list[Line] = [(None, part) for part in np.split(named, range(columns, len(named), columns))]
        more = f" and {len(named) - _ROWS_TOLD} more" if len(named) > _ROWS_TOLD else ""
        told = ", ".join(map(str, named[:_ROWS_TOLD].tolist()))
        s = "" if len(named) == 1 else "s"
        return lines, f"{len(named)} row{s}", f"{len(named)} image{s}, row{s} {told}{more}"
    rows = services.statistics.rows(dataset, query.split, query.spec)
    count = dataset.rows if rows is None else len(rows)
    lines, note = _lines(services, dataset, rows, count, query.per_class)
    where = query.spec.where_text
    if not lines:
        raise RowOutOfRange(f"split {query.split!r} of {dataset.name!r} has no rows to show{where}")
    names = [name for name, _ in lines if name is not None]
    which = f"one line per class: {', '.join(names)}" if len(names) > 1 else f"of {''.join(names)}"
    what = which if names else "evenly spread over the rows"
    images = sum(len(wanted) for _, wanted in lines)
    split = f"split {query.split}"
    return (
        lines,
        f"{split}{figures.cut(where, 60)}{note}",
        f"{split}{where}, {images} image{'' if images == 1 else 's'}, {what}{note}",
    )


def _lines(
    services: Services, dataset: Dataset, rows: RowSet | None, count: int, per_class: int
) -> tuple[list[Line], str]:
    """Name and rows of each line of a contact sheet, and what is left out."""
    labels: Labels | None = None
    if dataset.label is not None and not is_large(dataset):
        labels = services.batcher.split_jobs.strata(dataset, dataset.label.name).labels
    if labels is None:
        wanted = _spread(count, per_class * 4)
        parts = np.split(wanted, range(per_class, len(wanted), per_class))
        return [(None, _ids(rows, part)) for part in parts if len(part)], ""
    codes = labels.codes if rows is None else labels.codes[as_list(rows)]
    lines: list[Line] = []
    left = 0
    for code, value in enumerate(labels.values):
        places = np.flatnonzero(codes == code if labels.single else codes[:, code])
        if not len(places):
            continue
        if len(lines) == MAX_LINES:
            left += 1
            continue
        lines.append((_class_name(dataset, value), _ids(rows, places[_spread(len(places), per_class)])))
    return lines, f" ({left} more classes are not shown)" if left else ""


def _class_name(dataset: Dataset, value: Any) -> str:
    names = dataset.class_names
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(value)


def _spread(places: int, count: int) -> npt.NDArray[np.int64]:
    """At most so many of 0 … `places` - 1, evenly spaced."""
    return np.unique(np.linspace(0, places - 1, min(count, places)).astype(np.int64))


def _ids(rows: RowSet | None, places: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.asarray(places if rows is None else rows[places], np.int64)


def picture_headers(request: Request, dataset: Dataset, form: Form, joined: Joined | None = None) -> dict[str, str]:
    """As `stats_headers`, with the name under which browsers keep the picture."""
    name = file_name(request.scope["path"], form)
    return {**stats_headers(request, dataset, joined), "content-disposition": f'inline; filename="{name}"'}


def picture(content: bytes, form: Form, alt: str, headers: dict[str, str]) -> Response:
    if form == "txt":
        return Response(alt, headers=headers, media_type=MEDIA_TYPES["txt"])
    # An SVG that is opened by itself could run scripts, had anybody smuggled one into a name.
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}
    return Response(content, headers=headers | policy, media_type=MEDIA_TYPES[form])
