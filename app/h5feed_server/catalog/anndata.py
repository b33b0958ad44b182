"""AnnData files (``.h5ad``): rows are the observations, which `X`, `obs`, `obsm` and `layers` describe.

The format is described at https://anndata.readthedocs.io/en/stable/fileformat-prose.html. Older files, without
``encoding-type``, store the categories of ``obs/NAME`` in ``obs/__categories/NAME``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from h5feed.stored.column import About, Segment

from .frame_columns import refused
from .pandas_frames import Read, texts_of
from .vocabulary import words_of

_ROWS = {
    "X": "",
    "obs": "a column of obs, which describes the observations: select it with x= or y=",
    "obsm": "one of obsm, in addition to X: select it with x=",
    "layers": "one of layers, in addition to X: select it with x=",
}
"""Groups whose arrays have one row for each observation, and why their arrays are not inputs."""

_ASIDE = {
    "var": "it describes the columns of X, not its rows",
    "varm": "it describes the columns of X, not its rows",
    "varp": "it describes the columns of X, not its rows",
    "obsp": "it is a table of pairs of observations",
    "raw": "it is AnnData's copy of X before columns were selected",
    "uns": "it is AnnData's unstructured metadata",
}
"""Groups whose arrays do not have one row for each observation, and why their arrays are not served."""

_TYPES = frozenset(
    ("type", "types", "celltype", "celltypes", "annotation", "annotations", "louvain", "leiden", "cluster")
)
"""Words in the names of categories that are the cell types, and so the label."""


def is_anndata(attributes: Mapping[str, Any], segments: Mapping[str, Segment]) -> bool:
    """Whether the file is an AnnData object, by its attributes or, for old files, by its arrays."""
    if attributes.get("encoding-type") == "anndata":
        return True
    tops = {path.split("/")[0] for path in segments}
    return {"X", "obs", "var"} <= tops and any(path in segments for path in ("obs/_index", "obs/index"))


def categorical(
    groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment], read: Read
) -> dict[str, Segment]:
    """The arrays of a file, with groups of ``codes`` and ``categories`` combined into one array."""
    fields = dict(segments)
    for path, about in groups.items():
        if str(about.get("encoding-type")).startswith("nullable-") and f"{path}/mask" in fields:
            values = fields.get(f"{path}/values")
            if values is not None:
                note = f"missing where {path.replace('/', '.')}.mask is true: the numbers stored there have no meaning"
                fields[f"{path}/values"] = replace(values, about=About(is_column=True, note=note))
        codes, categories = segments.get(f"{path}/codes"), segments.get(f"{path}/categories")
        if about.get("encoding-type") != "categorical" or codes is None or categories is None:
            continue
        fields = {name: segment for name, segment in fields.items() if not name.startswith(f"{path}/")}
        fields[path] = _coded(codes, categories, read)
    return fields


def observations(
    groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment], read: Read
) -> dict[str, Segment]:
    """The arrays of an AnnData file with their roles; arrays that are not rows are listed with the reason."""
    legacy = {path: segment for path, segment in segments.items() if path.startswith("obs/__categories/")}
    index = groups.get("obs", {}).get("_index", "_index")
    fields = {}
    for path, segment in segments.items():
        top, _, rest = path.partition("/")
        name = path.replace("/", ".") if top in _ROWS else path
        if path in legacy:
            continue
        if (names := legacy.get(f"obs/__categories/{rest}")) is not None and top == "obs":
            segment = _coded(segment, names, read)
        about = segment.about or About()
        if top in _ASIDE:
            segment = Segment(segment.source, refused(segment.array, segment.array.unreadable or _ASIDE[top]))
        elif top in _ROWS:
            role, reason = ("input", "the matrix X of AnnData") if top == "X" else ("other", _ROWS[top])
            if top == "obs" and rest in (index, "_index"):
                reason = "names of the observations"
            segment = replace(segment, about=replace(about, role=role, reason=reason, is_column=True))
        fields[name] = segment
    label = _label(fields)
    if label is not None:
        about = replace(fields[label].about or About(), role="label", reason="categories that name the types of cells")
        fields[label] = replace(fields[label], about=about)
    order = (*_ROWS, *_ASIDE)
    return dict(sorted(fields.items(), key=lambda one: _rank(one[0], order)))


def _rank(name: str, order: Sequence[str]) -> int:
    top = re.split(r"[./]", name, maxsplit=1)[0]
    return order.index(top) if top in order else len(order)


def _label(segments: Mapping[str, Segment]) -> str | None:
    """The categories to use as label: those named after types, or the only ones."""
    named = list(_categories(segments))
    typed = [path for path in named if _TYPES.intersection(words_of(path.partition(".")[2]))]
    return typed[0] if len(typed) == 1 else named[0] if len(named) == 1 else None


def _categories(segments: Mapping[str, Segment]) -> Iterator[str]:
    for path, segment in segments.items():
        about = segment.about
        if path.startswith("obs.") and segment.array.unreadable is None and about and about.class_names is not None:
            yield path


def _coded(codes: Segment, categories: Segment, read: Read) -> Segment:
    names = texts_of(categories, read)
    note = "codes of categories, which are its class names; -1 where a value is missing"
    return replace(codes, about=About(is_column=True, class_names=tuple(names) if names else None, note=note))
