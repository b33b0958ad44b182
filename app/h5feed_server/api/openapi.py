"""The OpenAPI description of the endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from .problem_responses import problem_examples
from .queries import RowsRequest
from .response_models import Problem

TAGS = {
    "datasets": "What the server has: every dataset, with its fields, types, sizes and stored splits. Begin here.",
    "rows": "Rows by number: a few to look at, or a list of them.",
    "pictures": "Rows of image fields as pictures.",
    "splits": "Train, validation and test: how many rows of each class, and which rows.",
    "statistics": "Numbers about fields, over all rows or one split: ranges, means, histograms, class balance.",
    "batches": "What a training loop requests. A batch depends on nothing but its URL and the revision of the data.",
    "jobs": "Long work that the server does in the background.",
    "health": "Health checks for monitoring.",
    "local": "The Unix socket that clients on the same machine use instead of TCP.",
}
"""Groups of endpoints, in the order in which a person needs them."""

GROUPS = {
    "What": (
        *("q", "split", "where", "rows", "field", "fields", "encoded", "classes", "kind"),
        *("join", "how", "key", "value", "duplicates", "file", "path", "depth", "limit", "offset"),
    ),
    "Batches": ("batch_size", "from_row", "to_row", "start", "stop", "step", "last"),
    "Splits that are drawn": ("test", "val", "stratify", "split_seed", "split_shuffle", "group", "folds", "fold"),
    "Windows of rows": ("sequence_length", "sequence_stride", "sampling_rate", "offsets", "ends", "episode"),
    "Parts of rows": ("crop", "crop_fields", "crop_at"),
    "Order": ("shuffle", "seed", "epoch", "window"),
    "Rows by class or weight": ("balance", "weights", "epoch_rows"),
    "Rows of different lengths": (
        *("pad", "max_length", "truncate", "bucket", "bucket_by", "bucket_group", "pack", "pack_by", "overlong"),
    ),
    "Several readers": ("shard", "shards"),
    "Proof": ("ticket", "nonce"),
    "Answer": (
        *("format", "body", "compress", "dtype", "side", "per_class", "channel", "revision"),
        *("prefer", "cache-control"),
    ),
}
"""Headings of the page, and the parameters below each."""

EXAMPLES: dict[str, Any] = {
    "limit": 100,
    "offset": 0,
    "depth": 2,
    "rows": "0",
    "kind": "histogram",
    "batch_size": 32,
    "start": 0,
    "step": 2,
    "test": 0.2,
    "val": 0.1,
    "split_seed": 7,
    "split_shuffle": False,
    "folds": 5,
    "fold": 1,
    "sequence_length": 2,
    "sequence_stride": 2,
    "sampling_rate": 2,
    "ends": "pad",
    "episode": "none",
    "shuffle": True,
    "seed": 7,
    "epoch": 1,
    "from_row": 1,
    "to_row": 1,
    "window": 1024,
    "balance": True,
    "epoch_rows": 1000,
    "max_length": "128",
    "truncate": "start",
    "bucket": 8192,
    "bucket_group": 1,
    "pack": 4096,
    "overlong": "split",
    "shard": 1,
    "shards": 2,
    "compress": "zstd",
    "dtype": "float32",
    "side": 128,
    "per_class": 4,
    "prefer": "wait=5",
    "cache-control": "no-store",
    "ticket": "0123456789abcdef0123456789abcdef.1000",
    "nonce": "f00f00f00f00",
}
"""Values to try, of parameters that are about no data; those of the data are in `api.examples`."""


def operation_id(route: APIRoute) -> str:
    """The operation id of an endpoint: the name of its function, which generated clients use."""
    return route.name


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without anything that depends on the data."""
    if app.openapi_schema is None:
        whole = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=[{"name": name, "description": text} for name, text in TAGS.items()],
            license_info={"name": "MIT", "identifier": "MIT"},
        )
        for path in whole["paths"].values():
            for operation in path.values():
                operation["responses"] = _by_status(operation["responses"])
                for parameter in operation.get("parameters", ()):
                    _illustrate(parameter)
                if "parameters" in operation:
                    operation["parameters"] = _grouped(operation["parameters"])
        components = whole.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for model in (Problem, RowsRequest):
            schemas[model.__name__] = model.model_json_schema()
        components["examples"] = problem_examples()
        app.openapi_schema = whole
    return app.openapi_schema


def _by_status(responses: dict[str, Any]) -> dict[str, Any]:
    """Without what the framework says of invalid values; here they are problems with status 400."""
    return {status: each for status, each in sorted(responses.items()) if "HTTPValidationError" not in str(each)}


def _illustrate(parameter: dict[str, Any]) -> None:
    """What a page fills in is the parameter's own ``example``; what else may be tried, an example of its schema."""
    schema = parameter["schema"] = _without_null(parameter["schema"])
    if "examples" in schema:
        parameter["example"] = schema.pop("examples")[0]
    elif parameter["name"] in EXAMPLES:
        schema["examples"] = [EXAMPLES[parameter["name"]]]
    elif "enum" in schema:
        schema["examples"] = schema["enum"][:1]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """What a parameter may be when it is given: a query has no null, which is how one that is left out is written."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if not kinds:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    return {**kinds[0], **rest} if len(kinds) == 1 else {"anyOf": kinds, **rest}


def _grouped(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of `GROUPS`, those of the path first; the first of each group says its heading."""
    in_path = [parameter for parameter in parameters if parameter["in"] == "path"]
    left = {parameter["name"]: parameter for parameter in parameters if parameter["in"] != "path"}
    ordered = in_path
    for heading, names in GROUPS.items():
        group = [left.pop(name) for name in names if name in left]
        if group:
            group[0]["x-heading"] = heading
        ordered += group
    return ordered + list(left.values())
