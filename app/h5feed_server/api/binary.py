"""Binary responses: formats, caching headers, and bodies sent from the buffer they were read into."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from h5feed.errors import BadParameter, NotAcceptable
from h5feed.wire import MEDIA_TYPE, read_body, write_npz

from .preview import preview
from .response_models import Preview

Bytes = npt.NDArray[np.uint8]
Format = Literal["safetensors", "npz", "npy", "json"]

MEDIA_TYPES: dict[Format, str] = {
    "safetensors": MEDIA_TYPE,
    "npz": "application/x-npz",
    "npy": "application/x-npy",
    "json": "application/json",
}

_ANY_BYTES = "application/octet-stream"
"""What programs ask for that know no media type of ours, generated clients among them; they get safetensors."""

KEPT = 'attachment; filename="{}"'
"""Value of the header by which browsers keep what they cannot show, under this name."""

_ODD = re.compile(r"[^A-Za-z0-9_.-]+")
"""What a file name had better not contain."""

_OTHER_NAMES = {("text/html", "json"), (_ANY_BYTES, "safetensors")}
"""Formats by what is asked for. Browsers want HTML most: they are given JSON, which people can read."""


NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "The caller has it already"}}
"""OpenAPI response of endpoints that know ``If-None-Match``."""


def binary_response(*forms: Format) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of endpoints that return these formats, the default first: generated clients take that."""
    tensors = {"schema": {"type": "string", "format": "binary"}}
    kinds: dict[str, Any] = {}
    for form in forms:
        kinds[MEDIA_TYPES[form]] = {} if form == "json" else tensors
        if form == "safetensors":
            kinds[_ANY_BYTES] = tensors
    readable = {"model": Preview} if "json" in forms else {}
    return {
        200: {
            "description": "Tensors: the fields and `__rows__` (int64 row ids). As JSON: their first values",
            "content": kinds,
            **readable,
        },
        **NOT_MODIFIED,
    }


def negotiate(request: Request, wanted: Format | None, allowed: Sequence[Format]) -> Format:
    """The format requested by ``format=`` or the Accept header.

    Raises
    ------
    NotAcceptable
    """
    if wanted is not None:
        if wanted not in allowed:
            raise NotAcceptable(f"format={wanted} is not supported here: use {' or '.join(allowed)}")
        return wanted
    accepted = request.headers.get("accept", "*/*")
    ranges = []
    for item in accepted.split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            ranges.append((-float(quality), media.lower()))
        except ValueError:
            continue
    for quality_below_zero, media in sorted(ranges, key=lambda pair: pair[0]):
        for name in allowed:
            names_it = media in ("*/*", "application/*", MEDIA_TYPES[name]) or (media, name) in _OTHER_NAMES
            if quality_below_zero < 0 and names_it:
                return name
    raise NotAcceptable(
        f"Accept: {accepted[:200]} is not supported here: use {', '.join(MEDIA_TYPES[name] for name in allowed)}"
    )


def media_type(request: Request, form: Format) -> str:
    """The media type to send `form` as: what the caller has asked for, where that is another name of it."""
    accepted = request.headers.get("accept", "").strip().lower()
    return _ANY_BYTES if form == "safetensors" and accepted == _ANY_BYTES else MEDIA_TYPES[form]


def file_name(path: str, form: str) -> str:
    """Name under which browsers keep an answer: ``digits-batches-0.npz``."""
    place = path.removeprefix("/v1/datasets/").replace("/", "-")
    return f"{_ODD.sub('_', place)}.{form}"


def query_items(request: Request) -> list[str]:
    """The query as decoded ``name=value`` items."""
    return [f"{name}={value}" for name, value in request.query_params.multi_items()]


def cache_headers(request: Request, revision: str, form: Format, *, may_pin: bool = True) -> dict[str, str]:
    """ETag and Cache-Control of a response that depends only on its URL and the revision; `may_pin` as `url_headers`
    has it.
    """
    private = request.app.state.services.is_guarded
    return url_headers(request.scope["path"], query_items(request), revision, form, private=private, may_pin=may_pin)


def url_headers(
    path: str, items: Sequence[str], revision: str, form: str, *, private: bool, may_pin: bool = True
) -> dict[str, str]:
    """Same as `cache_headers`, from the path and the items of the query.

    Parameters
    ----------
    may_pin : bool
        Whether the response never changes if the query has a ``revision``.
    """
    query = sorted(items)
    digest = hashlib.blake2b(f"{revision} {path}?{'&'.join(query)} {form}".encode(), digest_size=16)
    pinned = may_pin and any(item.startswith("revision=") for item in query)
    return {
        "etag": f'"{digest.hexdigest()}"',
        "cache-control": f"{'private' if private else 'public'}, max-age=31536000, immutable" if pinned else "no-cache",
        "vary": "accept",
    }


def is_known(request: Request, headers: dict[str, str]) -> bool:
    """Whether the client already has this response."""
    return is_tagged(request.headers.get("if-none-match", ""), headers)


def is_tagged(if_none_match: str, headers: dict[str, str]) -> bool:
    """Same as `is_known`, from the header's value."""
    known = [item.strip().removeprefix("W/") for item in if_none_match.split(",")]
    return headers.get("etag") in known or known == ["*"]


def not_modified(headers: dict[str, str]) -> Response:
    return Response(status_code=304, headers=headers)


def binary(
    request: Request, buffer: Bytes, form: Format, headers: dict[str, str], texts: Collection[str] = ()
) -> Response:
    """The body in the requested format; safetensors is sent from `buffer` itself.

    Parameters
    ----------
    texts : collection of str
        Tensors that are strings, for those who read them as JSON.
    """
    if form == "json":
        tensors, metadata, _ = read_body(buffer)
        return JSONResponse(preview(tensors, metadata, texts), headers=headers)
    headers = {**headers, "content-disposition": KEPT.format(file_name(request.scope["path"], form))}
    if form == "safetensors":
        # The memoryview keeps the buffer from being recycled until the last byte is sent.
        return Response(memoryview(buffer), headers=headers, media_type=media_type(request, form))
    tensors, _, _ = read_body(buffer)
    stream = io.BytesIO()
    if form == "npz":
        write_npz(stream, tensors)
    else:
        names = [name for name in tensors if not name.startswith("__")]
        if len(names) != 1:
            raise BadParameter(
                f"format=npy holds one array, but {len(names)} fields are asked for: name one with fields="
            )
        np.lib.format.write_array(stream, tensors[names[0]], allow_pickle=False)
    answer = Response(memoryview(stream.getbuffer()), headers=headers, media_type=MEDIA_TYPES[form])
    # Leased as long as its copy lives: the bound on bytes in flight counts both as one.
    answer.leased = buffer  # type: ignore[attr-defined]
    return answer
