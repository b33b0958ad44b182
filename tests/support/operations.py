"""Every parameter of every operation: of the OpenAPI description, and of the pages and viewers that it leaves out."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

UNKNOWN = "no_such_parameter"

_BEYOND_MODELS = {
    "/datasets/{name}/splits": ("format",),
    "/sign-in": ("next",),
    "/simple/h5feed/": ("format",),
}
"""Parameters that pages read without declaring them."""


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes
    ----------
    query, headers, body : sequence of str
        Names of parameters, by where they are sent.
    required : dict of str to str
        Values of those without which nothing else is looked at.
    """

    method: str
    path: str
    query: Sequence[str] = ()
    headers: Sequence[str] = ()
    body: Sequence[str] = ()
    required: Mapping[str, str] = field(default_factory=dict)

    @property
    def path_parameters(self) -> list[str]:
        return re.findall(r"\{(\w+)(?::\w+)?\}", self.path)

    def filled(self, values: Mapping[str, str]) -> str:
        """The path with values for its parameters, as they are."""
        return re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: values[found[1]], self.path)


def described(document: Mapping[str, Any], required: Mapping[str, str]) -> list[Operation]:
    """The operations of an OpenAPI document."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parameters = operation.get("parameters", ())
            names = {
                place: [one["name"] for one in parameters if one["in"] == place]
                for place in ("query", "header", "path")
            }
            needed = {
                one["name"]: required[one["name"]] for one in parameters if one["required"] and one["in"] == "query"
            }
            body: list[str] = []
            for kind in operation.get("requestBody", {}).get("content", {}).values():
                # A body that is no JSON has no parameters.
                if "$ref" in kind["schema"]:
                    schema = document["components"]["schemas"][kind["schema"]["$ref"].rpartition("/")[2]]
                    body += schema["properties"]
            found.append(Operation(method.upper(), path, names["query"], names["header"], body, needed))
    return found


def undescribed(
    http: httpx.Client,
    routes: Sequence[tuple[str, str]],
    values: Mapping[str, str],
    needed: Mapping[str, Mapping[str, str]],
) -> list[Operation]:
    """Operations of routes that no document describes: each says what it takes when it is sent something else."""
    found = []
    for method, path in routes:
        operation = Operation(method, path, required=needed.get(path, {}))
        names: list[str] = [*operation.required, *_BEYOND_MODELS.get(path, ())]
        if method == "GET":
            answer = http.get(operation.filled(values), params={UNKNOWN: "1"}, headers={"accept": "text/html"})
            for listed in re.findall(rf"'{UNKNOWN}': choose from ([\w, ]+)", html.unescape(answer.text)):
                names += listed.split(", ")
        found.append(Operation(method, path, sorted(set(names)), required=operation.required))
    return found
