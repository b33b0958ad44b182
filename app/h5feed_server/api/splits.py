"""Splits: how many rows of each class lie where, and which rows."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from h5feed.errors import TooLarge
from h5feed.wire import ROWS, Body, Tensor

from ..batching import check_divisible
from ..sampling.spec import SPLIT_ALIASES
from ..sampling.splits import class_shares, describe_split
from .bodies import BINARY_RESPONSE, binary, cache_headers, is_known, negotiate, not_modified
from .deps import NamePath, ServicesDep, in_thread
from .queries import SplitRowsQuery, SplitsQuery

router = APIRouter(prefix="/v1/datasets/{name}/splits", tags=["splits"])


@router.get("", summary="Rows and classes of each split")
async def get_splits(services: ServicesDep, name: NamePath, query: Annotated[SplitsQuery, Query()]) -> dict[str, Any]:
    """Per split: rows, rows and share per class, balanced class weights, and a digest of its row ids."""

    def work() -> dict[str, Any]:
        dataset = services.catalog.dataset(name, query.revision)
        check_divisible(dataset)
        splits = services.batcher.splits(dataset, query.spec)
        by = splits.stratify or (dataset.label.name if dataset.label else None)
        classes = services.batcher.classes(dataset, by)
        names = dict(enumerate(dataset.class_names or []))
        shares = {} if classes is None else class_shares(classes)
        whole = {"all": np.arange(dataset.rows, dtype=np.int64), **splits.rows}
        return {
            "dataset": dataset.name,
            "revision": dataset.revision,
            "stratify": splits.stratify,
            "classes_of": by if classes is not None else None,
            "note": splits.note,
            "splits": {split: describe_split(rows, classes, names, shares) for split, rows in whole.items()},
        }

    return await in_thread(services, work)


@router.get("/{split}/rows", summary="Row ids of a split", responses=BINARY_RESPONSE, response_class=Response)
async def get_split_rows(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    split: Annotated[str, Path(description="`train`, `val` or `test`; `all`.", examples=["train"])],
    query: Annotated[SplitRowsQuery, Query()],
) -> Response:
    """That split's row ids, ascending, int64, as the tensor `__rows__`."""
    form = negotiate(request, query.format, ("safetensors", "npz"))

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = cache_headers(request, dataset.revision, form)
        if is_known(request, headers):
            return not_modified(headers)
        wanted = SPLIT_ALIASES.get(split, split)
        check_divisible(dataset)
        if wanted == "all":
            rows = np.arange(dataset.rows, dtype=np.int64)
        else:
            rows = services.batcher.splits(dataset, query.spec).of(wanted)
        about = {"dataset": dataset.name, "revision": dataset.revision, "epoch": "0", "batches": "1"}
        body = Body([Tensor(ROWS, np.dtype("<i8"), rows.shape)], about)
        if body.nbytes > services.settings.max_body_bytes:
            raise TooLarge(f"{len(rows)} row ids are more than {services.settings.max_body_bytes} bytes")
        buffer = services.pool.lease(body.nbytes)
        body.place(buffer, 0)[ROWS][...] = rows
        return binary(buffer, form, headers)

    return await in_thread(services, work)
