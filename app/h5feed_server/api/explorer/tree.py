"""A file as it is: groups, arrays, attributes, links, chunks and filters, whether they are fields or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from h5feed.errors import FeedError
from pydantic import BaseModel, ConfigDict
from pydantic import Field as Param

from ...services import Services
from ..dependencies import NamePath, ServicesDep, in_thread
from ..queries import TreeQuery
from ..tree import tree_of
from .snippets import curl, python_json
from .web import Page, answer, counted, link, number, pages, parsed, size

router = pages()

MEMBERS_PER_PAGE = 100

MAX_OPEN = 16
"""Maximum number of open groups: each is one more request to the processes that read files."""

_MOST_FILES = 200
"""Maximum number of files to choose from. The names of others can be typed."""

_SHORT, _LONG = 300, 4000
"""Characters of an attribute's value: of members, and of the object that the page is about."""


class TreePageQuery(BaseModel):
    """What the page shows of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str | None = None
    path: str = "/"
    offset: int = Param(0, ge=0, le=2**62)
    limit: int = Param(MEMBERS_PER_PAGE, ge=1, le=500)
    open: tuple[str, ...] = Param((), max_length=MAX_OPEN, description="Paths of groups that list their members.")

    def url(self, name: str, **changes: Any) -> str:
        """A link to the same page, but for some parameters."""
        own = {
            "file": self.file,
            "path": self.path,
            "offset": self.offset or None,
            "limit": None if self.limit == MEMBERS_PER_PAGE else self.limit,
            "open": self.open,
        } | changes
        own["path"] = None if own["path"] == "/" else own["path"]
        return link("datasets", name, "tree", **own)


@router.get("/datasets/{name}/tree")
async def tree_page(request: Request, services: ServicesDep, name: NamePath) -> Response:
    """The object at a path, and its members."""
    query = parsed(TreePageQuery, request)
    asked = TreeQuery(file=query.file, path=query.path, depth=1, limit=query.limit, offset=query.offset)
    content, files = await in_thread(services, partial(tree_of, services, name, asked))
    await _open_groups(services, name, query, content)
    node = content["node"]
    data = {**content, "file_names": list(files[:_MOST_FILES])}
    view = {
        "object": _object(node, name, query, _LONG),
        "lines": [_line(child, name, query) for child in node["children"] or ()],
        "above": _above(name, query),
        "open_all": _open_all(node, name, query),
        "close_all": query.url(name, open=()) if query.open else None,
        "page_url": lambda offset: query.url(name, offset=offset or None),
        "last_offset": max(0, (node["members"] or 0) - 1) // query.limit * query.limit,
    }
    path = link(
        "v1", "datasets", name, "tree",
        file=query.file, path=None if query.path == "/" else query.path, offset=query.offset or None,
        limit=None if query.limit == MEMBERS_PER_PAGE else query.limit,
    )  # fmt: skip
    snippets = [python_json(request, path, "tree"), curl(request, path)]
    page = Page("tree.html", f"{name}: tree", data, view, dataset=name, tab="Tree", snippets=snippets)
    return answer(request, page)


async def _open_groups(services: Services, name: str, query: TreePageQuery, content: dict[str, Any]) -> None:
    """List the members of the groups that are open and in sight."""
    nodes = {node["path"]: node for node in _descendants(content["node"])}
    for path in sorted(query.open, key=len):
        node = nodes.get(path)
        if node is None or node["kind"] != "group" or node["children"] is not None:
            continue
        asked = TreeQuery(file=query.file, path=path, depth=1, limit=query.limit, revision=content["revision"])
        try:
            inside, _ = await in_thread(services, partial(tree_of, services, name, asked))
        except FeedError as error:
            node["note"] = error.detail
            continue
        node["children"], node["note"] = inside["node"]["children"], inside["node"]["note"]
        nodes |= {one["path"]: one for one in _descendants(node)}


def _descendants(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for child in node["children"] or ():
        yield child
        yield from _descendants(child)


def _open_all(node: dict[str, Any], name: str, query: TreePageQuery) -> str | None:
    """A link that opens the closed groups in sight, as many as may be open."""
    closed = [one["path"] for one in _descendants(node) if _can_open(one) and one["children"] is None]
    more = [path for path in closed if path not in query.open][: MAX_OPEN - len(query.open)]
    return query.url(name, open=(*query.open, *more)) if more else None


def _can_open(node: dict[str, Any]) -> bool:
    return bool(node["kind"] == "group" and node["path"] and node["members"] and not node["same_as"])


def _above(name: str, query: TreePageQuery) -> list[tuple[str, str]]:
    """The groups above the object, with links: from the root, whose name is the file's."""
    parts = [part for part in query.path.split("/") if part]
    if not parts:
        return []
    to = partial(query.url, name, offset=None, open=())
    return [("", to(path="/")), *((part, to(path="/" + "/".join(parts[: n + 1]))) for n, part in enumerate(parts[:-1]))]


def _line(node: dict[str, Any], name: str, query: TreePageQuery) -> dict[str, Any]:
    """A member of a group, and the members of that."""
    line = _object(node, name, query, _SHORT)
    path, children = node["path"], node["children"]
    others = tuple(one for one in query.open if one != path and not one.startswith(f"{path}/"))
    is_open = children is not None
    line["is_open"] = is_open
    if not _can_open(node):
        line["toggle"] = None
    elif is_open:
        line["toggle"] = query.url(name, open=others)
    elif len(query.open) < MAX_OPEN:
        line["toggle"] = query.url(name, open=(*query.open, path))
    else:
        line["toggle"] = line["url"]
    line["children"] = [_line(child, name, query) for child in children or ()]
    line["more"] = node["members"] - len(children) if is_open else 0
    return line


def _object(node: dict[str, Any], name: str, query: TreePageQuery, most: int) -> dict[str, Any]:
    """What is said of one object."""
    to = partial(query.url, name, offset=None, open=())
    left_out = (node["attributes_total"] or 0) - len(node["attributes"])
    return {
        "name": node["name"],
        "kind": node["kind"],
        "url": None if node["path"] is None else to(path=node["path"]),
        "facts": _facts(node),
        "leads": _leads(node["link"]),
        "same_as": None if node["same_as"] is None else (node["same_as"], to(path=node["same_as"])),
        "note": node["note"],
        "fields": node["fields"],
        "details": _details(node),
        "attributes": [(one["name"], _value(one, most)) for one in node["attributes"]],
        "attributes_left_out": left_out,
    }


def _facts(node: dict[str, Any]) -> list[str]:
    """An object in a few words."""
    array, type_ = node["array"], node["type"]
    if node["kind"] == "group":
        members = node["members"]
        return ["– members" if members is None else counted(members, "member")]
    said = [] if type_ is None else [type_["dtype"]]
    if array is not None:
        said.append(_shape(array["shape"]))
        if array["logical_bytes"] is not None:
            said.append(size(array["logical_bytes"]))
    return said


def _leads(where: dict[str, Any]) -> str | None:
    """Where a link leads that is no hard one."""
    if where["kind"] == "hard":
        return None
    if where["kind"] == "user-defined":
        return "user-defined link"
    target = where["path"] if where["file"] is None else f"{where['path']} in {where['file']}"
    return f"{where['kind']} link to {target}"


def _details(node: dict[str, Any]) -> list[tuple[str, str]]:
    """How an array or a type is stored."""
    said: list[tuple[str, str]] = []
    array, type_ = node["array"], node["type"]
    if array is not None:
        said.append(("Shape", _shape(array["shape"])))
        if array["max_shape"] != array["shape"]:
            said.append(("Maximum shape", _shape(array["max_shape"])))
        said.append(("Layout", array["layout"]))
        if array["chunks"]:
            said.append(("Chunks", _shape(array["chunks"])))
        if array["filters"]:
            said.append(("Filters", ", ".join(map(_filter, array["filters"]))))
        if array["logical_bytes"] is not None:
            stored = array["stored_bytes"]
            said.append(("Size", size(array["logical_bytes"])))
            said.append(("Stored", "not counted: too many chunks" if stored is None else size(stored)))
    if type_ is not None:
        nbytes = "" if type_["bytes"] is None else f", {counted(type_['bytes'], 'byte')}"
        said.append(("Type", f"{type_['dtype']}{nbytes}"))
        if type_["members"]:
            said.append(("Members", ", ".join(f"{one['name']} {one['dtype']}" for one in type_["members"])))
        if type_["enum"]:
            said.append(("Names", ", ".join(f"{value} = {key}" for key, value in type_["enum"].items())))
    if (node["hard_links"] or 1) > 1:
        said.append(("Hard links", number(node["hard_links"])))
    return said


def _filter(one: dict[str, Any]) -> str:
    options = f" ({', '.join(map(str, one['options']))})" if one["options"] else ""
    return (one["name"] or f"filter {one['id']}") + options


def _shape(shape: list[int | None] | None) -> str:
    if shape is None:
        return "no value"
    return " × ".join("unlimited" if extent is None else number(extent) for extent in shape) or "one value"


def _value(attribute: dict[str, Any], most: int) -> str:
    value = attribute["value"]
    if value is None and attribute["note"]:
        return f"({attribute['note']})"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"
