"""Pictures of single samples, whatever they are, and strips of a few: what pages show beside text and numbers."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import Path, Query, Request
from fastapi.responses import Response
from h5feed.errors import TooLarge, UnsupportedField
from pydantic import BaseModel, ConfigDict
from pydantic import Field as Param

from ...catalog.dataset import Dataset, Field
from ...services import Services
from ...stats import pictures, sketches
from ...stats.pictures import Pixels
from ..binary import is_known, not_modified
from ..dependencies import NamePath, ServicesDep, in_thread
from ..images import MAX_SAMPLE_BYTES, in_slot, is_image, picture
from ..stats import stats_headers
from .kinds import DRAWN, Kind, kind_of
from .selection import EVERYTHING
from .web import pages

router = pages()

STRIP_SAMPLES = 8
"""Samples of a strip, evenly spread over the rows."""

MAX_FRAMES = 12
"""Frames of a sequence that are shown."""

_STANDS: tuple[Kind, ...] = ("image", "frames", "map", "volume", "points", "signal")
"""Kinds that stand for a dataset, the best first."""

THUMBNAIL = 128
"""Pixels of the longer side up to which one slice, or one frame, stands for all."""

_SMALL_BYTES = 1 << 20
"""Bytes of a sample up to which pictures are made without waiting for a slot."""


class ViewQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str
    side: int = Param(256, ge=16, le=2048)
    begin: int = Param(0, ge=0, le=2**62, description="First sample of a signal that is drawn.")
    end: int | None = Param(None, ge=0, le=2**62, description="One past the last.")
    at: int | None = Param(None, ge=0, le=2**62, description="Slice of a volume, along its first axis.")
    revision: str | None = None


class StripQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    side: int = Param(48, ge=16, le=256)
    revision: str | None = None


class MeanQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str
    side: int = Param(160, ge=16, le=512)
    revision: str | None = None


@router.get("/datasets/{name}/rows/{row}/view")
async def get_view(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    row: Annotated[int, Path(ge=0, le=2**62)],
    query: Annotated[ViewQuery, Query()],
) -> Response:
    """One field of one row as a picture; one sample is read."""

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = stats_headers(request, dataset)
        if is_known(request, headers):
            return not_modified(headers)
        dataset.check_rows([row])
        field = dataset.field(query.field)
        alt = f"{field.name} of row {row}"
        draw = partial(_drawn, services, dataset, field, row, query, alt)
        content = draw() if field.row_bytes <= _SMALL_BYTES else in_slot(draw)
        return picture(content, "svg" if content.startswith(b"<svg") else "png", alt, headers)

    return await in_thread(services, work)


@router.get("/datasets/{name}/strip")
async def get_strip(
    request: Request, services: ServicesDep, name: NamePath, query: Annotated[StripQuery, Query()]
) -> Response:
    """A few samples side by side, for the catalogue."""

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = stats_headers(request, dataset)
        if is_known(request, headers):
            return not_modified(headers)
        field = strip_field(dataset)
        if field is None:
            raise UnsupportedField(f"dataset {dataset.name!r} has nothing that is shown as a picture")
        kind = kind_of(dataset, field)
        is_short = field.row_bytes > _SMALL_BYTES or kind == "signal"
        count = STRIP_SAMPLES // 2 if is_short else STRIP_SAMPLES
        rows = np.unique(np.linspace(0, dataset.rows - 1, min(count, dataset.rows)).astype(np.int64))
        wanted = ViewQuery(field=field.name, side=query.side)

        def draw() -> bytes:
            if kind in ("signal", "points"):
                return sketches.in_a_line([_drawn(services, dataset, field, row, wanted, "") for row in rows.tolist()])
            parts = [_pixels(services, dataset, field, kind, row, wanted) for row in rows.tolist()]
            return pictures.png(sketches.side_by_side(parts))

        content = draw() if field.row_bytes <= _SMALL_BYTES else in_slot(draw)
        return picture(content, "svg" if kind in ("signal", "points") else "png", "", headers)

    return await in_thread(services, work)


@router.get("/datasets/{name}/mean")
async def get_mean(
    request: Request, services: ServicesDep, name: NamePath, query: Annotated[MeanQuery, Query()]
) -> Response:
    """The mean of all images of a field, where its statistics are known already."""

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = stats_headers(request, dataset)
        if is_known(request, headers):
            return not_modified(headers)
        field = dataset.field(query.field)
        found = services.statistics.find(dataset, [field], "all", EVERYTHING)
        mean = None if found is None else found[field.name].mean_image
        if mean is None or field.channels is None:
            raise UnsupportedField(f"field {field.name!r} has no mean image, or none yet")
        values = pictures.fit(pictures.arranged(mean[None], field.channels), query.side)
        content = pictures.png(pictures.to_pixels(values, field.dtype)[0])
        return picture(content, "png", "", headers)

    return await in_thread(services, work)


def strip_field(dataset: Dataset) -> Field | None:
    """The field that stands for a dataset in the catalogue; None where nothing of it is a picture."""
    if not dataset.rows:
        return None
    suitable = [
        field for field in dataset.fields if field.row_bytes <= MAX_SAMPLE_BYTES and kind_of(dataset, field) in _STANDS
    ]
    return min(
        suitable, key=lambda field: (field.role != "input", _STANDS.index(kind_of(dataset, field))), default=None
    )


def sample(services: Services, field: Field, row: int) -> npt.NDArray[Any]:
    """One sample of a field that is no text, (*sample), with its numbers as numpy knows them.

    Raises
    ------
    TooLarge
    """
    rows = np.array([row], np.int64)
    reader = services.batcher.reader
    if field.is_ragged and not field.is_sparse:
        values, _ = reader.read_ragged(field.column, rows)
    else:
        if field.row_bytes > MAX_SAMPLE_BYTES:
            raise TooLarge(f"a row of {field.name!r} has {field.row_bytes:,} bytes: too many to show")
        if field.is_sparse:
            dense: npt.NDArray[Any] = reader.read_sparse(field.column, rows).dense()[0]
            return dense
        values = np.empty((1, *field.sample_shape), field.dtype)
        reader.read(field.column, rows, values)
        values = values[0]
    return field.column.widened(values)


def signal_of(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A signal as (time, channels), whichever way it lies."""
    if values.ndim == 1:
        return values[:, None]
    return values.T if values.shape[0] < values.shape[1] else values


def _drawn(services: Services, dataset: Dataset, field: Field, row: int, query: ViewQuery, alt: str) -> bytes:
    """PNG or SVG."""
    kind = kind_of(dataset, field)
    if kind not in DRAWN:
        raise UnsupportedField(f"field {field.name!r} is no picture: its values are shown on the row's page")
    small = query.side <= THUMBNAIL
    if kind == "signal":
        values = signal_of(sample(services, field, row))
        end = len(values) if query.end is None else min(query.end, len(values))
        begin = min(query.begin, max(0, end - 1))
        width, height = (query.side * 2, query.side) if small else (query.side * 2, query.side // 2 + 40)
        return sketches.lines(values[begin:end], width, height, alt, begin, labelled=not small)
    if kind == "points":
        return sketches.scatter(sample(services, field, row), query.side, alt)
    return pictures.png(_pixels(services, dataset, field, kind, row, query))


def _pixels(services: Services, dataset: Dataset, field: Field, kind: Kind, row: int, query: ViewQuery) -> Pixels:
    """A sample as (height, width, depth)."""
    values, side = sample(services, field, row), query.side
    small = side <= THUMBNAIL
    if kind == "image":
        pixels: Pixels = _as_image(field, pictures.arranged(values[None], field.channels or "rgb"), side)[0]
        return pixels
    if kind == "mask":
        return _masked(services, dataset, values.reshape(values.shape[:2]), row, side)
    if kind == "map":
        table = values.reshape(values.shape[:2]).astype(np.float32)
        return sketches.coloured(pictures.fit(table[None, ..., None], side)[0, ..., 0])
    if kind == "volume":
        volume = _one_channel(values)
        cuts = sketches.slices(volume, (query.at, None, None))[: 1 if small else 3]
        low, high = _range(volume)
        return sketches.side_by_side([_grey(cut, low, high, side) for cut in cuts])
    frames = _in_frames(values)
    picked = np.unique(np.linspace(0, len(frames) - 1, min(1 if small else MAX_FRAMES, len(frames))).astype(np.int64))
    return sketches.side_by_side(list(_as_image(field, frames[picked], side if small else max(64, side // 4))))


def _as_image(field: Field, images: npt.NDArray[Any], side: int) -> Pixels:
    """(n, height, width, depth) as pixels, made to fit."""
    return pictures.to_pixels(pictures.fit(images, side), field.dtype)


def _masked(services: Services, dataset: Dataset, mask: npt.NDArray[Any], row: int, side: int) -> Pixels:
    """A mask over the first image of its size; by itself where there is none."""
    step = -(-max(mask.shape) // side)
    thinned = mask[::step, ::step]
    beside = next(
        (
            field
            for field in dataset.fields
            if not field.unreadable and is_image(field) and kind_of(dataset, field) == "image"
            and field.sample_shape[:2] == mask.shape
        ),
        None,
    )  # fmt: skip
    if beside is None:
        pixels = sketches.by_class(thinned)
    else:
        image = pictures.arranged(sample(services, beside, row)[None], beside.channels or "rgb")[:, ::step, ::step]
        pixels = sketches.overlaid(pictures.to_pixels(image, beside.dtype)[0], thinned)
    factor = max(1, side // max(pixels.shape[:2]))
    enlarged: Pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return enlarged


def _one_channel(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A volume, (depth, height, width), of what may have channels, or more axes."""
    while values.ndim > 3:
        values = values[..., 0] if values.shape[-1] in (1, 3, 4) else values[0]
    # Bands of an image lie along its last axis.
    return np.moveaxis(values, -1, 0) if values.shape[-1] < min(values.shape[:2]) / 2 else values


def _in_frames(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(frames, height, width, depth)."""
    if values.ndim == 3:
        return values[..., None]
    return values if values.shape[-1] in (1, 3, 4) else np.moveaxis(values, 1, -1)


def _range(values: npt.NDArray[Any]) -> tuple[float, float]:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _grey(cut: npt.NDArray[Any], low: float, high: float, side: int) -> Pixels:
    fitted = pictures.fit(cut[None, ..., None].astype(np.float32), side)[0]
    scaled = (np.nan_to_num(fitted, nan=low, posinf=high, neginf=low) - low) * (255 / ((high - low) or 1))
    pixels: Pixels = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return pixels


def text_at(data: npt.NDArray[Any], offsets: npt.NDArray[np.int64], most: int) -> list[str]:
    """Texts, each cut to so many characters."""
    texts = []
    for begin, end in pairwise(offsets.tolist()):
        # Four bytes are one character at most.
        text = data[begin : min(end, begin + 4 * most + 4)].tobytes().decode("utf-8", "replace")
        texts.append(text if len(text) <= most else f"{text[:most]}…")
    return texts
