"""Errors as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from h5feed import errors
from h5feed.suggestions import did_you_mean
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ..sharing.logs import FIELDS
from ..sharing.request_id import REQUEST_ID, new_request_id
from .redaction import without_tokens

logger = logging.getLogger(__name__)

STATUS: Mapping[type[errors.FeedError], int] = {
    errors.BadParameter: 400,
    errors.Unauthorized: 401,
    errors.DatasetNotFound: 404,
    errors.FieldNotFound: 404,
    errors.SplitNotFound: 404,
    errors.BatchOutOfRange: 404,
    errors.RowOutOfRange: 404,
    errors.KeysNotFound: 404,
    errors.WeightsUnknown: 404,
    errors.PageNotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.NotAcceptable: 406,
    errors.RevisionChanged: 409,
    errors.JobWanted: 409,
    errors.TooLarge: 413,
    errors.HostNotAllowed: 421,
    errors.UnsupportedField: 422,
    errors.AmbiguousKey: 422,
    errors.SplitImpossible: 422,
    errors.Unreadable: 422,
    errors.TooManyRequests: 429,
    errors.DatasetCorrupt: 500,
    errors.InternalError: 500,
    errors.SourceUnavailable: 503,
    errors.Preparing: 503,
    errors.Overloaded: 503,
    errors.ReaderCrashed: 503,
    errors.ReadTimeout: 504,
}

_LEVELS: Mapping[type[errors.FeedError], int] = {
    errors.Preparing: logging.DEBUG,
    errors.Overloaded: logging.WARNING,
    errors.SourceUnavailable: logging.WARNING,
}
"""How loud the log is about an error of the server's: ``ERROR`` where it is not here."""

SENT: Counter[str] = Counter()
"""Problems that this process has sent, by code."""

LACKED: Counter[str] = Counter()
"""Those of them that are `Overloaded`, by what was lacking."""

_NO_NAMES: Mapping[str, Sequence[str]] = {}

_MAX_DETAIL = 4000
"""Characters. What stands before and behind a long value says what is wrong."""

_QUIET_SECONDS, _MOST_LOGGED = 10.0, 256
_logged: dict[str, float] = {}
"""What has been logged of errors that pass, and when, by the monotonic clock."""


def problem(
    error: errors.FeedError,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response for `error`.

    Parameters
    ----------
    status : int, optional
        Instead of the one from the table.
    more : mapping of str to str, optional
        Additional members of the problem.
    """
    status = status or STATUS[type(error)]
    request_id = REQUEST_ID.get() or new_request_id()
    detail = shown_detail(error)
    SENT[error.code] += 1
    if isinstance(error, errors.Overloaded):
        LACKED[error.lacking] += 1
    if status >= 500 and _is_news(error):
        # A caller that is told to come again is no fault of the server's, nor are files that it has just found.
        level = _LEVELS.get(type(error), logging.ERROR)
        logger.log(level, "%s: %s", error.code, detail, extra={FIELDS: {"code": error.code}})
    content = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        # A lone surrogate, from a caller's JSON, cannot be written.
        "detail": detail.encode("utf-8", "replace").decode(),
        "code": error.code,
        "request_id": request_id,
        **(more or {}),
    }
    headers = {"cache-control": "no-store", **(headers or {})}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(content, status, headers, "application/problem+json")


def shown_detail(error: errors.FeedError) -> str:
    """What is said of an error. It has values of the request: one may be very long, or a token in the wrong place."""
    detail = without_tokens(error.detail)
    if len(detail) > _MAX_DETAIL:
        detail = f"{detail[: _MAX_DETAIL // 2]} […] {detail[-_MAX_DETAIL // 2 :]}"
    return detail


def sent() -> dict[tuple[str, str | None], float]:
    """How many problems were sent, by the names of their metrics."""
    found: dict[tuple[str, str | None], float] = {("problems_total", code): count for code, count in SENT.items()}
    found |= {("overloads_total", lacking): count for lacking, count in LACKED.items()}
    return found


def _is_news(error: errors.FeedError) -> bool:
    """Whether it was not logged lately: of what passes, the first of many callers' is enough."""
    if not isinstance(error, errors.Transient):
        return True
    now, text = time.monotonic(), f"{error.code} {error.detail}"
    if now - _logged.get(text, -math.inf) < _QUIET_SECONDS:
        return False
    if len(_logged) >= _MOST_LOGGED:
        _logged.clear()
    _logged[text] = now
    return True


def install(app: FastAPI) -> None:
    """Make `app` return every error as problem+json."""

    @app.exception_handler(errors.FeedError)
    async def _feed_error(request: Request, error: errors.FeedError) -> Response:
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> Response:
        return problem(bad_parameters(error, _parameters(request)))

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = ", ".join(_allowed(request))
            refusal = errors.MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}: use {allowed}")
            return problem(refusal, headers={"allow": allowed})
        if error.status_code == 413:
            return problem(errors.TooLarge("the request body is too long"))
        if error.status_code == 404:
            return problem(errors.PageNotFound(f"nothing at {request.url.path}: see /docs for the API"))
        return problem(errors.BadParameter(str(error.detail)))

    @app.exception_handler(Exception)
    async def _internal_error(request: Request, error: Exception) -> Response:
        return problem(errors.InternalError("internal error; the server's log has the details under this request_id"))


def _allowed(request: Request) -> list[str]:
    """Methods of all routes to this path: the framework names those of the first one only."""
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _parameters(request: Request) -> Mapping[str, Sequence[str]]:
    """What the endpoint that was asked takes, as its description says: names in the query, and in the body."""
    description = request.app.openapi()
    operation = description["paths"][request.scope["route"].path_format][request.method.lower()]
    query = [parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]
    content = operation.get("requestBody", {}).get("content", {}).values()
    # A body that is no JSON has no names.
    models = [kind["schema"]["$ref"].rpartition("/")[2] for kind in content if "$ref" in kind["schema"]]
    schemas = [description["components"]["schemas"][model] for model in models]
    return {"query": query, "body": [name for schema in schemas for name in schema["properties"]]}


def bad_parameters(error: RequestValidationError, names: Mapping[str, Sequence[str]]) -> errors.BadParameter:
    """Convert a validation error; `names` are the valid parameters, by place (``query``, ``body``)."""
    return errors.BadParameter("; ".join(validation_sentence(item, names) for item in error.errors()[:5]))


def validation_sentence(item: Mapping[str, Any], names: Mapping[str, Sequence[str]] = _NO_NAMES) -> str:
    """One validation error as a sentence: the parameter, its value, and what would be valid."""
    where = [str(part) for part in item["loc"] if part not in ("query", "path", "body")]
    name = ".".join(where) or "the request"
    if item["type"] == "extra_forbidden":
        return f"there is no parameter {name!r}: {did_you_mean(name, names.get(str(item['loc'][0]), ()))}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if item["type"] == "missing":
        return f"{name} is missing"
    value = item.get("input")
    return f"{name}={value}: {message}" if isinstance(value, (str, int, float)) else f"{name}: {message}"
