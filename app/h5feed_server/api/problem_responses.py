"""Which errors an endpoint can give, for the OpenAPI description: by status, with every code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from h5feed import errors

from .problems import STATUS

MEDIA_TYPE = "application/problem+json"

MEANINGS: Mapping[type[errors.FeedError], str] = {
    errors.BadParameter: "a value is invalid, or a parameter is unknown or has no effect",
    errors.Unauthorized: "the server needs a token, and yours is missing, wrong or has expired",
    errors.DatasetNotFound: "no such dataset",
    errors.FieldNotFound: "no such field",
    errors.SplitNotFound: "the file stores no such split: ask for one with `test`, `val` or `folds`",
    errors.BatchOutOfRange: "the epoch has fewer batches",
    errors.RowOutOfRange: "the dataset has fewer rows, or the split has none",
    errors.KeysNotFound: "no row has one of the keys",
    errors.WeightsUnknown: "the server lacks these weights: give them with `POST …/weights`, and ask again",
    errors.PageNotFound: "no such job: jobs are forgotten after a day",
    errors.NotAcceptable: "the `Accept` header or `format` names no format that is served here",
    errors.RevisionChanged: "the data are not `revision` any more",
    errors.JobWanted: "somebody else has asked for this job",
    errors.TooLarge: "the response would exceed a limit; nothing was read",
    errors.HostNotAllowed: "the request used a host name that is not the server's",
    errors.UnsupportedField: "the field cannot be served at all, or not in this way",
    errors.AmbiguousKey: "several rows have one of the keys: ask for all of them with `duplicates=all`",
    errors.SplitImpossible: "the rows cannot be divided like this",
    errors.Unreadable: "the dataset is listed but cannot be served",
    errors.TooManyRequests: "too many bytes of posted bodies are in progress: try again",
    errors.DatasetCorrupt: "stored data are damaged",
    errors.InternalError: "the server failed; its log has the reason under `request_id`",
    errors.SourceUnavailable: "the files cannot be read at the moment: try again",
    errors.Preparing: "the files are being inspected for the first time: try again",
    errors.Overloaded: "no memory or thread is free, or a job is not done yet: try again",
    errors.ReaderCrashed: "a process that reads with h5py crashed and was replaced: try again",
    errors.ReadTimeout: "reading took too long: ask for less at once",
}

ANYWHERE = (errors.BadParameter, errors.InternalError)
"""Of every endpoint."""

GUARDED = (*ANYWHERE, errors.Unauthorized, errors.HostNotAllowed, errors.Overloaded, errors.ReadTimeout)
"""Of every endpoint that wants a token, or a host name that is known, and a thread."""

DATASET = (
    errors.DatasetNotFound,
    errors.RevisionChanged,
    errors.Unreadable,
    errors.DatasetCorrupt,
    errors.SourceUnavailable,
    errors.Preparing,
    errors.ReaderCrashed,
)
"""Of every endpoint below a dataset."""

FIELDS = (errors.FieldNotFound, errors.UnsupportedField, errors.TooLarge)
"""Of those that read fields."""

SPLITS = (errors.SplitNotFound, errors.SplitImpossible)
"""Of those that divide the rows."""

JOINS = (errors.KeysNotFound, errors.AmbiguousKey)

ORDERS = (*JOINS, *DATASET, *FIELDS, *SPLITS, errors.WeightsUnknown)
"""Of those that put rows in an order."""


def problems(
    *classes: type[errors.FeedError], base: Sequence[type[errors.FeedError]] = GUARDED
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these errors and those in `base`: one for each status, which names its codes."""
    wanted = {*base, *classes}
    codes: dict[int | str, list[type[errors.FeedError]]] = {}
    for cls, status in STATUS.items():
        if cls in wanted:
            codes.setdefault(status, []).append(cls)
    return {**{status: _response(found) for status, found in codes.items()}, **_LONG_HEAD}


def problem_examples() -> dict[str, Any]:
    """The components that `problems` refers to: an example for each code."""
    return {cls.code: {"value": _example(cls)} for cls in MEANINGS}


def _response(classes: Sequence[type[errors.FeedError]]) -> dict[str, Any]:
    said = [f"`{cls.code}`: {MEANINGS[cls]}" for cls in classes]
    return {
        "description": said[0] if len(said) == 1 else "\n".join(f"- {each}" for each in said),
        "content": {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {cls.code: {"$ref": f"#/components/examples/{cls.code}"} for cls in classes},
            }
        },
    }


def _example(cls: type[errors.FeedError]) -> dict[str, Any]:
    status = STATUS[cls]
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": MEANINGS[cls],
        "code": cls.code,
        "request_id": "4f1c2a9d0b7e",
    }


_LONG_HEAD_MEANS = "the URL and headers together are longer than 32 KiB"

_LONG_HEAD: dict[int | str, dict[str, Any]] = {
    431: {
        "description": f"`{errors.TooLarge.code}`: {_LONG_HEAD_MEANS}",
        "content": {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {
                    errors.TooLarge.code: {
                        "value": {
                            **_example(errors.TooLarge),
                            "title": HTTPStatus(431).phrase,
                            "status": 431,
                            "detail": _LONG_HEAD_MEANS,
                        }
                    }
                },
            }
        },
    }
}
"""Of every endpoint: the server refuses such a request before it knows which one is meant."""
