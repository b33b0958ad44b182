"""The same from a program: what a page shows, in Python and on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from ..client_wheel import install_line, server_origin, server_url


@dataclass(frozen=True)
class Snippet:
    """Code to copy."""

    language: str
    code: str


def curl(request: Request, path: str) -> Snippet:
    """A request to the API; `path` is a `link`."""
    guarded = bool(request.app.state.services.settings.token_list)
    token = ' -H "Authorization: Bearer $H5FEED_TOKEN"' if guarded else ""
    return Snippet("Shell", f"curl -f{token} {shlex.quote(server_origin(request) + path)}")


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
    if request.app.state.services.settings.token_list:
        header = "{'Authorization': f'Bearer {os.environ[\"H5FEED_TOKEN\"]}'}"
        begin = [begin[0], "import os", *begin[1:], f"request = urllib.request.Request({asked}, headers={header})"]
        asked = "request"
    lines = [f"with urllib.request.urlopen({asked}) as response:", f"    {name} = json.load(response)"]
    return Snippet("Python", "\n".join([*begin, *lines]))


def arguments(*positional: object, **options: object) -> str:
    """Arguments of a call; options that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    return ", ".join([*(repr(one) for one in positional), *(f"{name}={value!r}" for name, value in given.items())])


def given(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are not as they are by default."""
    return {name: value for name, value in options.items() if value != defaults.get(name)}
