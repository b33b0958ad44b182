"""The API's description of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from h5feed.revisions import is_provisional

from ..storage.objects.object_file import ObjectFile
from ..storage.transposed.copy_file import stored_in
from .dataset import Dataset, Field
from .discovery import shown

_DEAR = 2.0
"""A field gets advice if it decodes more than this many bytes for each byte served."""


def rows_of(native: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, int]:
    """Number of rows of each split."""
    return {name: sum(end - begin for begin, end in runs) for name, runs in native.items()}


def _advice(field: Field) -> str | None:
    """Advice for a field that is expensive to shuffle."""
    if field.read_amplification < _DEAR or field.unreadable:
        return None
    cost = (
        f"a shuffled batch decodes {field.read_amplification:.0f} bytes for each byte served, unless the chunks are "
        "cached"
    )
    if field.is_sparse:
        return f"{cost}: shuffle with window={64 * field.block_rows}, or write the file without compression"
    rows = field.array.chunk_shape[0] if field.array.chunk_shape else 1
    return (
        f"{cost}: shuffle with window={64 * rows}, or rewrite the file for fast shuffling: h5feed-server build "
        "OLD.h5 -o NEW.h5"
    )


def _describe_images(field: Field) -> dict[str, Any] | None:
    """What images are decoded to, and the fingerprint of this server's decoder."""
    if field.images is None or field.unreadable:
        return None
    # Imported late, because it loads OpenCV, which many servers do not need.
    from h5feed.decode import fingerprint

    return {**field.images.about(), "decoder": fingerprint()}


def _describe_sparse(field: Field) -> dict[str, Any] | None:
    """How sparse rows are sent; None if rows are not sparse."""
    indices = field.column.indices
    if indices is None or field.unreadable:
        return None
    values = sum(segment.array.rows for segment in field.column.segments)
    return {"format": "csr", "index_dtype": indices.dtype.name, "stored_values": values}


def _describe_packing(field: Field) -> list[dict[str, Any]] | None:
    """Each way in which its numbers are packed; None if they are not, or if they are served unpacked."""
    segments = field.column.segments
    packings = {segment.array.packing: segment for segment in segments}
    if field.unreadable or field.column.has_lists or segments[0].served_as is not None or packings.keys() == {None}:
        return None
    return [
        {
            "dtype": field.dtype.name if packing is None else np.dtype(packing.dtype).name,
            "scale_factor": None if packing is None else packing.scale,
            "add_offset": None if packing is None else packing.offset,
            "missing": [] if packing is None else list(packing.missing),
            "unsigned": packing is not None and packing.unsigned,
            "problem": None if packing is None else packing.problem,
        }
        for packing in packings
    ]


def _image_libraries(field: Field) -> str | None:
    if field.images is None or field.unreadable:
        return None
    from h5feed.decode import libraries

    return libraries()


def _image_bytes(field: Field) -> int | None:
    """Bytes of all image files of a field; None if only h5py knows."""
    offsets = [segment.offsets for segment in field.column.segments]
    if field.images is None or field.unreadable or any(each is None for each in offsets):
        return None
    return sum(max(0, int(each[-1] - each[0])) for each in offsets if each is not None)


def _covered(dataset: Dataset) -> str:
    """What a change must affect so that the dataset gets another revision."""
    if is_provisional(dataset.revision):
        return "size, times, inode and path of the files"
    sources = (stored_in(segment) for field in dataset.fields for segment in field.column.segments)
    if any(isinstance(source, ObjectFile) and not source.object.content for source in sources):
        return "store version"
    return "all bytes" if dataset.digest_in_full else "size, layout and sampled blocks"


def _hashing(dataset: Dataset) -> dict[str, int] | None:
    hashing = dataset.names.hashing
    return None if hashing is None else {"done": hashing[0], "total": hashing[1]}


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """The full description of a dataset."""
    fields = []
    for field in dataset.fields:
        array = field.array
        fields.append(
            {
                "name": field.name,
                "role": field.role,
                "role_reason": field.role_reason,
                "channels": field.channels,
                "shape": list(field.sample_shape),
                "spatial_axes": field.row_shape.axes,
                "dtype": field.type_name,
                "ragged": field.is_ragged and not field.is_sparse,
                "sparse": _describe_sparse(field),
                "cf": _describe_packing(field),
                "rows": field.column.rows,
                "readable": field.unreadable is None,
                "reason": field.unreadable,
                "note": field.note,
                "stored_dtype": array.dtype,
                "chunks": list(array.chunk_shape) if array.chunk_shape else None,
                "filters": [item.name for item in array.filters],
                "pieces": len(field.column.segments),
                "stored_bytes": sum(
                    segment.array.stored_bytes for part in field.parts for segment in part.column.segments
                ),
                "logical_bytes": field.column.nbytes,
                "enum": array.enum_names,
                "class_names": field.class_names,
                "attributes": array.attributes,
                "decode": _describe_images(field),
                "image_libraries": _image_libraries(field),
                "image_bytes": _image_bytes(field),
                "decoded_per_served_byte": round(field.read_amplification, 3),
                "advice": _advice(field),
            }
        )
    return {
        "name": dataset.name,
        "status": "ok",
        "reason": None,
        "revision": dataset.revision,
        "revision_covers": _covered(dataset),
        "provisional": is_provisional(dataset.revision),
        "content": dataset.names.content,
        "hashing": _hashing(dataset),
        "rows": dataset.rows,
        "fields": fields,
        "class_names": dataset.class_names,
        "native_splits": [{"name": split, "rows": rows} for split, rows in rows_of(dataset.native).items()],
        "splits_drawn": None if dataset.split_record is None else dataset.split_record.model_dump(),
        "files": [shown(file) for file in dataset.files],
        "notes": list(dataset.notes),
        "attributes": dataset.attributes,
        "card": dict(dataset.card),
    }
