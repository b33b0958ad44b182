"""The endpoint that takes weights of rows from a client."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from h5feed.errors import BadParameter, TooManyRequests
from h5feed.weights import DTYPES, named

from ..services import Services
from ..sharing.caller import CALLER
from .dependencies import NamePath, ServicesDep, in_thread
from .problem_responses import DATASET, FIELDS, problems
from .queries import WeightsQuery
from .response_models import WeightsKept, answers
from .uploads import Uploads, check_content_type, pieces_of

router = APIRouter(prefix="/v1/datasets/{name}/weights", tags=["batches"])

_WRITE_BYTES = 1 << 20
"""Bytes of an array that are checked and written at a time."""

_MEDIA_TYPE = "application/octet-stream"

_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


@router.post(
    "",
    summary="Give weights",
    openapi_extra=_BODY,
    **answers(WeightsKept, problems(*DATASET, *FIELDS, TooManyRequests)),
)
async def give_weights(
    request: Request, services: ServicesDep, name: NamePath, query: Annotated[WeightsQuery, Query()]
) -> dict[str, Any]:
    """Keep an array with a weight for each row of the dataset, by which batches can be drawn.

    The body is the array, little-endian, in the order of the rows. Weights are finite numbers ≥ 0, not all 0. The
    `weights` of the response is the value of the parameter of this name in the URLs of batches. An array is forgotten
    `expires_in` seconds after its last use, or earlier if there are too many; requests that need it then fail with
    `weights_unknown`, and it can be given again.
    """
    check_content_type(request, _MEDIA_TYPE)
    dtype = DTYPES[query.dtype]
    rows = await in_thread(services, partial(_rows_of, services, name, query, dtype.itemsize))
    expected = rows * dtype.itemsize
    uploads: Uploads = request.app.state.uploads_of_weights
    folder = services.batcher.splitter.given
    with uploads.of(CALLER.get()) as upload:
        arriving = await in_thread(services, partial(folder.receive, name, CALLER.get(), dtype))
        try:
            received, piece = 0, bytearray()
            wrong = _wrong_length(rows, query, expected)
            if request.headers.get("content-length", str(expected)) != str(expected):
                raise wrong
            async for more in pieces_of(request, upload, expected, wrong):
                piece += more
                if len(piece) >= _WRITE_BYTES:
                    whole = len(piece) - len(piece) % dtype.itemsize
                    await in_thread(services, partial(arriving.write, bytes(piece[:whole])))
                    received += whole
                    del piece[:whole]
            if received + len(piece) != expected:
                raise wrong
            await in_thread(services, partial(arriving.write, bytes(piece)))
            digest = await in_thread(services, arriving.finish)
        finally:
            # Not waited for: a disk may hang.
            services.threads.submit(partial(arriving.__exit__, None, None, None))
    return {
        "dataset": name,
        "weights": named(digest),
        "digest": digest,
        "dtype": query.dtype,
        "rows": rows,
        "expires_in": folder.seconds,
    }


def _rows_of(services: Services, name: str, query: WeightsQuery, itemsize: int) -> int:
    """Rows of the dataset, if it can be drawn from by weights."""
    dataset = services.catalog.dataset(name, query.revision)
    services.batcher.splitter.check_weighable(dataset)
    services.batcher.splitter.given.check_size(itemsize * dataset.rows)
    return dataset.rows


def _wrong_length(rows: int, query: WeightsQuery, expected: int) -> BadParameter:
    return BadParameter(
        f"the body must have {expected} bytes: a weight of dtype={query.dtype} for each of the {rows} rows of the "
        "dataset"
    )
