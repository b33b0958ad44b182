"""Previews a build from a sample of its rows: size, time, and the effect of compression."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable

from .hdf5_writer import Packing
from .options import BuildOptions, Compression
from .plan import column_bytes, counts_per_class, make_plan
from .report import lost_classes
from .run import wanted_rows
from .source import Block, FieldSpec, Source
from .workplace import Workplace

_SAMPLE_ROWS = 64
_SAMPLE_BYTES = 64 << 20
_WORTH = 0.7
"""Compression is advised where the fields become less than this share of their size."""


@dataclass(frozen=True)
class Tried:
    """One way to store the sample.

    Attributes
    ----------
    share : float
        Stored bytes for each of the field's.
    decode_seconds : float
        Of one row, on one core: what every row that is served costs more than in a contiguous field.
    """

    compression: Compression
    share: float
    decode_seconds: float


@dataclass(frozen=True)
class Preview:
    """What a build would produce.

    Attributes
    ----------
    classes : dict of str to dict of str to int
        Split to rows of each class; empty without classes.
    nbytes : int
        Of the files, with the compression that is asked for.
    seconds : float
        That it would take, from the sample.
    tried : tuple of Tried
    urls : tuple of str
        Of the objects, if the output is in an object store.
    """

    rows: dict[str, int]
    classes: dict[str, dict[str, int]]
    fields: tuple[FieldSpec, ...]
    files: tuple[Path, ...]
    nbytes: int
    seconds: float
    tried: tuple[Tried, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    method: str | None
    urls: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """Advice, in one sentence."""
        best = min(self.tried, key=lambda one: one.share, default=None)
        fast = min(self.tried, key=lambda one: one.decode_seconds / max(1e-9, 1 - one.share), default=None)
        if best is None or fast is None or best.share > _WORTH:
            most = "" if best is None else f" ({best.compression} saves {1 - best.share:.0%} of a sample of your rows)"
            return f"store it uncompressed{most}: contiguous rows are the fastest to serve"
        return (
            f"--compression {fast.compression} saves {1 - fast.share:.0%} of the space; reading a row then takes "
            f"{fast.decode_seconds * 1e3:.2f} ms longer. Uncompressed files are the fastest to serve if they fit into "
            "memory"
        )


def preview(source: str | Path, output: str | Path, options: BuildOptions | None = None) -> Preview:
    """Inspect a source and build a sample of it in memory; nothing is written.

    Raises
    ------
    BadParameter, SplitImpossible, Unreadable
    """
    options = options or BuildOptions()
    with (
        Workplace(source, output, options, lambda progress: None, is_preview=True) as place,
        closing(place.open_source(options)) as opened,
    ):
        where = place.output
        wanted = wanted_rows(opened, options)
        plan = make_plan(opened, options, where, wanted)
        blocks, seconds = _sample(opened, np.flatnonzero(wanted), options)
        broken_rows = {row: reason for block in blocks for row, reason in block.broken.items()}
        broken = {opened.name(row): reason for row, reason in broken_rows.items()}
        if broken_rows:
            wanted[list(broken_rows)] = False
            plan = make_plan(opened, options, where, wanted)
        tried = _try_compressions(opened.fields, blocks, options)
        share = next((one.share for one in tried if one.compression == options.compression), 1.0)
        raw = plan.rows * sum(spec.row_bytes for spec in opened.fields)
        sampled = sum(len(block.rows) for block in blocks)
        notes = [*map(place.in_words, opened.notes), *plan.notes, *lost_classes(opened, plan)]
        if opened.may_break and sampled < int(wanted.sum()) + len(broken_rows):
            notes.append(f"{sampled:,} rows were tried: some of the others may be broken, and would be left out")
        classes = {}
        if opened.label is not None and opened.columns[opened.label].values.ndim == 1:
            column = opened.columns[opened.label]
            classes = {split: dict(counts_per_class(column, plan.rows_of(split))) for split in plan.splits}
        return Preview(
            {split: len(plan.rows_of(split)) for split in plan.splits},
            classes,
            opened.fields,
            tuple(plan.files),
            int(raw * share) + column_bytes(opened.columns, plan.rows),
            seconds / max(1, sampled) * plan.rows,
            tried,
            {**opened.left_out, **broken},
            tuple(notes),
            plan.method,
            () if place.store is None else tuple(map(place.store.url, plan.files)),
        )


def _sample(source: Source, wanted: npt.NDArray[np.int64], options: BuildOptions) -> tuple[list[Block], float]:
    """Some blocks of rows, and the seconds that all cores took for them."""
    nbytes = max(1, sum(spec.row_bytes for spec in source.fields))
    count = max(1, min(_SAMPLE_ROWS, _SAMPLE_BYTES // nbytes, len(wanted)))
    # Far apart where that is cheap; from a stream the first ones.
    chosen = wanted[:: max(1, len(wanted) // count)][:count] if source.images else wanted[:count]
    done = np.ones(source.rows, np.bool_)
    done[chosen] = False
    began = time.perf_counter()
    with ThreadPoolExecutor(options.workers, "h5feed-build") as threads:
        blocks = [future.result() for future in [threads.submit(work) for work in source.work(done)]]
    return blocks, time.perf_counter() - began


def _try_compressions(fields: Sequence[FieldSpec], blocks: Sequence[Block], options: BuildOptions) -> tuple[Tried, ...]:
    main = fields[0]
    if main.lengths is not None:
        # What JPEG has left of an image, nothing makes smaller.
        return ()
    whole = [np.asarray(block.arrays[main.name])[block.details["broken"] == 0] for block in blocks]
    rows = np.concatenate(whole) if whole else np.zeros((0, *main.shape), main.dtype)
    if not len(rows):
        raise Unreadable("no row of the sample can be read")
    tried = []
    for compression in ("lz4", "zstd", "gzip"):
        level = options.level if compression == options.compression else None
        packing = Packing(compression, level, options.chunk_rows)
        step = min(packing.chunk_rows(main), len(rows))
        chunks = [rows[start : start + step] for start in range(0, len(rows) - step + 1, step)]
        packed = [packing.encode(chunk) for chunk in chunks]
        began = time.process_time()
        for chunk, data in zip(chunks, packed, strict=True):
            _decode(compression, data, chunk.nbytes)
        seconds = time.process_time() - began
        share = sum(map(len, packed)) / sum(chunk.nbytes for chunk in chunks)
        tried.append(Tried(compression, share, seconds / len(chunks)))
    return tuple(tried)


def _decode(compression: str, data: bytes, nbytes: int) -> Any:
    if compression == "gzip":
        return imagecodecs.zlib_decode(data, out=nbytes)
    if compression == "zstd":
        return imagecodecs.zstd_decode(data, out=nbytes)
    return imagecodecs.lz4h5_decode(data, out=nbytes)
