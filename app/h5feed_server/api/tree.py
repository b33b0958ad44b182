"""Endpoint that lists the objects in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response
from h5feed.errors import PageNotFound, TooLarge

from ..catalog.discovery import shown
from ..catalog.served_files import fields_by_array, file_of, served_file
from ..services import Services
from .dependencies import NamePath, ServicesDep, in_thread
from .problem_responses import DATASET, problems
from .queries import TreeQuery
from .response_models import Tree, answers

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


@router.get("/{name}/tree", summary="A file as it is", **answers(Tree, problems(*DATASET, PageNotFound, TooLarge)))
async def get_tree(services: ServicesDep, name: NamePath, query: Annotated[TreeQuery, Query()]) -> Response:
    """All groups, arrays, types and links of a file, with attributes, chunks and filters, not only the fields.

    `limit` and `offset` page through the members of the group at `path`. Datasets with the status `unreadable` have a
    tree, too.
    """

    def work() -> Response:
        content, _ = tree_of(services, name, query)
        return Response(orjson.dumps(content), media_type="application/json", headers={"cache-control": "no-cache"})

    return await in_thread(services, work)


def tree_of(services: Services, name: str, query: TreeQuery) -> tuple[dict[str, Any], Sequence[str]]:
    """Return what the endpoint returns, and the names of all files of the dataset.

    Raises
    ------
    DatasetNotFound, PageNotFound, BadParameter, RevisionChanged, Unreadable, TooLarge, SourceUnavailable, NotYet
    ReaderCrashed, ReadTimeout, Overloaded
    """
    dataset, file, files = file_of(services.catalog, name, query.file, query.revision)
    served = served_file(services.catalog, file)
    options = query.model_dump(include={"path", "depth", "limit", "offset"})
    node = orjson.loads(services.browser.ask("tree", served.files, services.pool.lease, **options))
    _add_fields(node, {} if dataset is None else fields_by_array(dataset, served.path))
    content = {
        "dataset": name,
        "revision": None if dataset is None else dataset.revision,
        "file": shown(file),
        "files": len(files),
        "depth": query.depth,
        "limit": query.limit,
        "offset": query.offset,
        "node": node,
    }
    return content, [shown(one) for one in files]


def _add_fields(node: dict[str, Any], fields: dict[str, list[dict[str, Any]]]) -> None:
    """Add the fields that are read from each array."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        node["fields"] = fields.get(node["path"], [])
        waiting += node["children"] or ()
