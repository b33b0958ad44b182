"""The same from a program: what a page shows, in Python and on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from ...catalog.dataset import Dataset, Field
from ..client_wheel import install_line, server_origin, server_url

_MOST_CHARS = 8000
"""Characters of a URL that proxies take."""


@dataclass(frozen=True)
class Snippet:
    """Code to copy."""

    language: str
    code: str


def curl(request: Request, path: str) -> Snippet:
    """A request to the API; `path` is a `link`."""
    guarded = request.app.state.services.is_guarded
    token = ' -H "Authorization: Bearer $H5FEED_TOKEN"' if guarded else ""
    return Snippet("Shell", f"curl -f{token} {shlex.quote(server_origin(request) + path)}")


def short_curl(request: Request, path: str) -> list[Snippet]:
    """`curl`; none where the names of many fields make the URL longer than servers and proxies take."""
    return [curl(request, path)] if len(path) <= _MOST_CHARS else []


def named_fields(dataset: Dataset, fields: Sequence[Field]) -> list[str] | None:
    """Names for the option ``fields`` to fetch these fields, those that can be; None: they are fetched by default."""
    names = [field.name for field in fields if not field.unreadable]
    return None if {*names} == {field.name for field in dataset.chosen(None)} else names


def in_list(names: Sequence[str] | None) -> str | None:
    """Names as the comma-separated list of a query."""
    return None if names is None else ",".join(name.replace("%", "%25").replace(",", "%2C") for name in names)


def python(request: Request, dataset: str | None, *lines: str) -> Snippet:
    """Python that connects, takes the dataset as ``ds``, and goes on with `lines`."""
    install = install_line(request)
    begin = [] if install is None else [f"# {install}"]
    begin += ["import h5feed", "", f"feed = h5feed.connect({server_url(request)!r})"]
    if dataset is not None:
        begin.append(f"ds = feed[{dataset!r}]")
    return Snippet("Python", "\n".join([*begin, *lines]))


def python_json(request: Request, path: str, name: str) -> Snippet:
    """Python that fetches the JSON of the API at `path` as `name`. It needs the standard library only."""
    begin, asked = ["import json", "import urllib.request", ""], repr(server_origin(request) + path)
    if request.app.state.services.is_guarded:
        header = "{'Authorization': f'Bearer {os.environ[\"H5FEED_TOKEN\"]}'}"
        begin = [begin[0], "import os", *begin[1:], f"request = urllib.request.Request({asked}, headers={header})"]
        asked = "request"
    lines = [f"with urllib.request.urlopen({asked}) as response:", f"    {name} = json.load(response)"]
    return Snippet("Python", "\n".join([*begin, *lines]))


def arguments(*positional: object, **options: object) -> str:
    """Arguments of a call; options that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    return ", ".join([*(repr(one) for one in positional), *(f"{name}={value!r}" for name, value in given.items())])


def inputs(dataset: Dataset) -> list[str] | None:
    """The fields to name with ``x=``, for a dataset of which no field is known to be an input; None otherwise.

    As in a table: its numbers, but for the label.
    """
    readable = [field for field in dataset.fields if not field.unreadable]
    if any(field.role == "input" for field in readable):
        return None
    alike = [field for field in readable if field.is_sparse or not field.is_ragged]
    numbers = [field.name for field in alike if not field.is_text and field.role != "label"]
    return numbers or None


def texts(fields: Sequence[Field]) -> list[str]:
    """A line for each field of text in ``batch``, which has it as bytes."""
    readable = [field for field in fields if field.is_text and not field.unreadable]
    return [f"batch.text({field.name!r})  # as strings" for field in readable]


def given(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are not as they are by default."""
    return {name: value for name, value in options.items() if value != defaults.get(name)}
