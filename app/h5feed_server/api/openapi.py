"""The OpenAPI description of the endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from .response_models import Problem

GROUPS = {
    "What": ("q", "split", "where", "field", "fields", "encoded", "classes", "kind", "limit", "offset"),
    "Batches": ("batch_size", "start", "stop", "step", "last"),
    "Splits that are drawn": ("test", "val", "stratify", "split_seed", "split_shuffle", "group", "folds", "fold"),
    "Order": ("shuffle", "seed", "epoch", "window"),
    "Rows by class or weight": ("balance", "weights", "epoch_rows"),
    "Several readers": ("shard", "shards"),
    "Answer": ("format", "side", "per_class", "channel", "revision", "prefer"),
}
"""Headings of the page, and the parameters below each."""

PROBLEM_RESPONSE = {"$ref": "#/components/responses/Problem", "description": "What is wrong"}
"""For all endpoints: the answer to what cannot be, or failed."""


def operation_id(route: APIRoute) -> str:
    """The operation id of an endpoint: the name of its function, which generated clients use."""
    return route.name


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without anything that depends on the data."""
    if app.openapi_schema is None:
        whole = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        for path in whole["paths"].values():
            for operation in path.values():
                for parameter in operation.get("parameters", ()):
                    schema = parameter["schema"] = _without_null(parameter["schema"])
                    if "examples" in schema:
                        # Where pages look for what they fill in.
                        parameter["example"] = schema.pop("examples")[0]
                if "parameters" in operation:
                    operation["parameters"] = _grouped(operation["parameters"])
        components = whole.setdefault("components", {})
        problem = Problem.model_json_schema()
        components.setdefault("schemas", {})["Problem"] = problem
        components["responses"] = {
            "Problem": {
                "description": problem["description"],
                "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }
        }
        app.openapi_schema = whole
    return app.openapi_schema


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
