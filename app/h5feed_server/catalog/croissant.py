"""A dataset as a Croissant document, the JSON-LD vocabulary of MLCommons that dataset search engines read.

The format is described at https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import numpy as np

from .dataset import Dataset, Field

CONFORMS_TO = "http://mlcommons.org/croissant/1.1"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "annotation": "cr:annotation",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification recommends, with the terms of version 1.1."""

_ROWS, _FIELDS, _SPLITS = "rows", "fields", "splits"


def croissant(dataset: Dataset, base_url: str) -> dict[str, Any]:
    """The document.

    Parameters
    ----------
    dataset : Dataset
    base_url : str
        URL of the server, as the reader reaches it.
    """
    path = f"{base_url.rstrip('/')}/v1/datasets/{quote(dataset.name, safe='')}"
    card = dataset.card
    served = [field for field in dataset.fields if not field.unreadable]
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": card.get("title") or dataset.name,
        "identifier": dataset.revision,
        "alternateName": dataset.name,
        "description": card.get("description") or f"{dataset.rows} rows, served by h5feed as {dataset.name!r}.",
        "url": card.get("source") or path,
        "license": card.get("licence"),
        "citeAs": card.get("citation"),
        # Whoever serves the data may replace them. The URL below names the revision, and is refused from then on.
        "isLiveDataset": True,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": _ROWS,
                "name": _ROWS,
                "description": "All rows and fields, as arrays of NumPy. Pages of it: start=, stop=, fields=.",
                "contentUrl": f"{path}/rows?format=npz&revision={quote(dataset.revision, safe='')}"
                f"&fields={','.join(quote(quote(field.name, safe=''), safe='') for field in served)}",
                "encodingFormat": "application/x-npz",
            }
        ],
        "recordSet": [_records(served), *_splits(dataset)],
    }
    return {name: value for name, value in document.items() if value is not None}


def _records(fields: list[Field]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": _FIELDS,
        "name": _FIELDS,
        "description": "One record for each row.",
        "field": [_field(field) for field in fields],
    }


def _field(field: Field) -> dict[str, Any]:
    name = f"{_FIELDS}/{quote(field.name, safe='')}"
    described: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": name,
        "name": field.name,
        "description": field.note or f"{field.role}: {field.role_reason}",
        "dataType": _type_of(field),
        "source": {"fileObject": {"@id": _ROWS}, "extract": {"column": field.name}},
    }
    if field.is_ragged and not field.is_text:
        described |= {"isArray": True, "arrayShape": "-1"}
    elif field.sample_shape:
        described |= {"isArray": True, "arrayShape": ",".join(map(str, field.sample_shape))}
    return described


def _type_of(field: Field) -> str:
    dtype = field.dtype
    if field.is_text:
        return "sc:Text"
    if field.column.is_bfloat16:
        return "sc:Float"
    if dtype == np.bool_:
        return "sc:Boolean"
    name = {"u": "UInt", "i": "Int", "f": "Float"}.get(dtype.kind)
    return f"cr:{name}{8 * dtype.itemsize}" if name else "sc:Float"


def _splits(dataset: Dataset) -> list[dict[str, Any]]:
    """The stored splits."""
    if not dataset.native:
        return []
    return [
        {
            "@type": "cr:RecordSet",
            "@id": _SPLITS,
            "name": _SPLITS,
            "description": "The splits that the files have.",
            "dataType": "cr:Split",
            "key": {"@id": f"{_SPLITS}/name"},
            "field": [{"@type": "cr:Field", "@id": f"{_SPLITS}/name", "name": "name", "dataType": "sc:Text"}],
            "data": [{f"{_SPLITS}/name": split} for split in dataset.native],
        }
    ]
