"""Endpoint that passes descriptors of data files over the Unix socket, so that clients on this machine read the rows
themselves."""

from __future__ import annotations

import logging
import os
import stat
from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from h5feed.errors import NotAcceptable, PageNotFound, RevisionChanged
from h5feed.stored.local_file import FileSource, Identity, changed, refused
from starlette.types import Receive, Scope, Send

from ..catalog.served_files import file_of
from ..services import Services
from ..storage.transposed.copy_file import TransposedFile
from .dependencies import NamePath, ServicesDep, in_thread
from .peer import NO_DESCRIPTORS, Writer, peer_of, refusal
from .problem_responses import DATASET, problems
from .queries import DescriptorQuery
from .response_models import PassedFile, answers

router = APIRouter(prefix="/v1/datasets/{name}", tags=["batches"])

logger = logging.getLogger(__name__)

_MEDIA_TYPE = "application/json"


@router.get(
    "/descriptor",
    summary="A file descriptor",
    response_class=Response,
    **answers(PassedFile, problems(*DATASET, PageNotFound, NotAcceptable)),
)
async def get_descriptor(
    request: Request, services: ServicesDep, name: NamePath, query: Annotated[DescriptorQuery, Query()]
) -> Response:
    """Opens a data file for a client on the Unix socket. The response carries the descriptor, as SCM_RIGHTS.

    The client may then read the whole file, as long as it keeps the descriptor, so the token must cover every dataset
    in the file. `size` and the other numbers identify the state that was inspected.
    """
    peer = peer_of(request.scope)
    if services.settings.descriptors == "off":
        raise NotAcceptable(NO_DESCRIPTORS)
    if (why := refusal(peer)) is not None:
        raise NotAcceptable(why)
    return _Passed(services, name, query)


class _Passed(Response):
    """A response with a descriptor."""

    def __init__(self, services: Services, name: str, query: DescriptorQuery) -> None:
        self.background = None
        self._services = services
        self._name = name
        self._query = query

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = peer_of(scope)
        writer = peer.direct() if peer is not None else None
        if writer is None:
            raise NotAcceptable("descriptors are passed only with responses on connections that stay open")
        try:
            body = await in_thread(self._services, partial(self._pass, writer))
        except BaseException:
            writer.revoke()
            raise
        head = writer.take_back()
        await send({"type": "http.response.body", "body": head + body, "more_body": False})

    def _pass(self, writer: Writer) -> bytes:
        """Send the response with the descriptor; returns what is left to be sent."""
        source = _source(self._services, self._name, self._query)
        try:
            # Not a duplicate of our own: it would share its flags and locks with the client's.
            descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise refused(error) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or Identity.of(status) != source.identity:
                raise changed(source.identity, Identity.of(status))
            content = orjson.dumps({"file": self._query.file, **source.identity._asdict()})
            headers = [
                (b"content-type", _MEDIA_TYPE.encode()),
                (b"content-length", b"%d" % len(content)),
                (b"cache-control", b"no-store"),
            ]
            writer.start(headers, len(content))
            sent = writer.write(memoryview(content), descriptor)
        finally:
            os.close(descriptor)
            writer.close()
        self._services.metrics.add("descriptors_passed_total")
        logger.info("passed a descriptor of %s", self._query.file)
        return content[sent:]


def _source(services: Services, name: str, query: DescriptorQuery) -> FileSource:
    """The file to open.

    Raises
    ------
    DatasetNotFound, BadParameter, RevisionChanged, Unreadable, SourceUnavailable, NotYet
    PageNotFound
        The token does not cover all that is in the file.
    """
    catalog = services.catalog
    dataset, file, _ = file_of(catalog, name, query.file, query.revision)
    if dataset is None:
        raise NotAcceptable(f"dataset {name!r} cannot be read")
    # Not shown as a whole: it, or a file that it refers to, has datasets that are out of scope.
    catalog.entry_of(file)
    path = catalog.path_of(file)
    where = None
    for field in dataset.fields:
        for segment in () if field.unreadable else field.column.segments:
            file_source = segment.file
            if file_source.path != path:
                continue
            if file_source.is_lent:
                return file_source
            if isinstance(file_source, TransposedFile):
                where = "has only a sparse matrix that is stored by columns"
            else:
                where = "is in an object store" if file_source.remote_bytes is not None else "grows"
    if where is not None:
        raise NotAcceptable(f"file {file!r} {where}, so there is no descriptor of it")
    raise RevisionChanged(f"no rows of dataset {name!r} are in {file!r} any more")
