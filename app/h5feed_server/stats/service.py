"""Statistics of fields, per split: from memory, from the cache folder, or from a job that reads the rows once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from h5feed.errors import TooLarge
from h5feed.stored.byte_cache import ByteCache

from ..batches.batcher import Batcher
from ..batches.joins import Joined
from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, state_of
from ..catalog.names import Key, key_of
from ..catalog.roles import is_dense
from ..filters.predicates import bind
from ..jobs.registry import WAIT_SECONDS, Jobs, JobState, Progress, Request
from ..row_bits import RowSet
from ..splits.joins_spec import JoinsSpec
from ..splits.split_spec import FilteredSpec
from ..storage.reader import Reader
from ..storage.written import WrittenRows
from .field_stats import FieldStats, report_of
from .mean_image import MeanImage
from .scan import Subject, scan
from .value_counts import MAX_INDICATORS

_VERSION = 3
"""Version of the files in the cache folder. Raise it if a report changes."""

MAX_FEATURES = 256
"""Maximum length of a flat sample for which statistics are computed per position."""

_KEPT_BYTES = 24 << 20
"""Limit on results cached in memory, in bytes. The largest result, a mean image of 4 million numbers, must fit, in case
the cache folder cannot be used."""

_SMALL_BYTES = 1 << 20
_FEWEST_SMALL, _PACKED = 16, 256
"""If a dataset has many fields of at most `_SMALL_BYTES`, the results of so many of them share a file: to write a file
takes longer than to compute such a result. They do if all of them are requested, as of a table with many columns."""

_KIND = "stats"

_COLOURS = {"rgb": "RGBA", "bgr": "BGRA"}


class Statistics:
    """Computes and caches statistics of fields; one per process.

    Parameters
    ----------
    folder : CacheFolder
        Stores the results.
    jobs : Jobs
        Runs the computations.
    max_job_bytes : int
        Maximum number of bytes that one job may read.
    """

    def __init__(self, catalog: Catalog, batcher: Batcher, folder: CacheFolder, jobs: Jobs, max_job_bytes: int) -> None:
        self._catalog = catalog
        self._batcher = batcher
        self._folder = folder
        self._kept: ByteCache[bytes] = ByteCache(_KEPT_BYTES, WAIT_SECONDS)
        # Leave half of the CPUs to batches, which training loops wait for.
        self._threads = max(1, len(os.sched_getaffinity(0)) // 2)
        self._jobs = jobs
        self._max_job_bytes = max_job_bytes
        jobs.register(_KIND, "bytes", self._work)

    def fields(self, joined: Joined, name: str | None) -> tuple[Field, ...]:
        """The field of this name. With None, all fields of all joined datasets that can be read.

        Raises
        ------
        FieldNotFound, UnsupportedField
        """
        return tuple(joined.source(one).field for one in (joined.names if name is None else [name]))

    def rows(self, dataset: Dataset, split: str, spec: FilteredSpec) -> RowSet | None:
        """Ascending rows of a split that meet ``where``; None stands for all rows.

        Raises
        ------
        SplitNotFound, SplitImpossible, BadParameter, TooLarge
        InProgress
            A job computes the split.
        """
        return self._batcher.split_jobs.rows(dataset, split, spec)

    def find(
        self,
        dataset: Dataset,
        fields: Sequence[Field],
        split: str,
        spec: FilteredSpec,
        joined: Joined | None = None,
    ) -> dict[str, FieldStats] | None:
        """Cached statistics by field name; None if those of any field are missing.

        Parameters
        ----------
        joined : Joined, optional
            Datasets that are joined. Statistics of their fields are those of the partners of the rows of the split. If
            the join is inner, rows without partners are left out.
        """
        known = self.known(dataset, fields, split, spec, joined)
        return known if len(known) == len(fields) else None

    def known(
        self,
        dataset: Dataset,
        fields: Sequence[Field],
        split: str,
        spec: FilteredSpec,
        joined: Joined | None = None,
    ) -> dict[str, FieldStats]:
        """Cached statistics by field name, of those fields that have some. `joined` is as in `find`."""
        keys = _Keys(dataset, split, spec, joined)
        found = {field.name: self._kept.find(keys.of(field.name).here) for field in fields}
        for pack in _packs(dataset, joined):
            missing = [name for name in pack if name in found and found[name] is None]
            if not missing:
                continue
            data = self._folder.find(keys.of_pack(pack).kept)
            if data is not None:
                packed = self._unpacked(keys, pack, data)
                found |= {name: packed[name] for name in missing}
            elif all(name in found for name in pack):
                # Only together: a look for the file of each would take longer than to compute them.
                for name in missing:
                    del found[name]
        for name in [name for name, data in found.items() if data is None]:
            found[name] = self._stored(keys, name)
        return {name: FieldStats.load(data) for name, data in found.items() if data is not None}

    def start(
        self,
        dataset: Dataset,
        fields: Sequence[Field],
        split: str,
        spec: FilteredSpec,
        result: str,
        joined: Joined | None = None,
    ) -> JobState:
        """Start a job that computes the missing statistics; see `Jobs.start`. `joined` is as in `find`."""
        request = {
            **state_of(dataset),
            "fields": [field.name for field in fields],
            "split": split,
            "spec": _of_split(split, spec).model_dump(mode="json", exclude_defaults=True),
        }
        if joined is not None:
            request["joins"] = joined.pinned.model_dump(mode="json", exclude_defaults=True)
        return self._jobs.start(_KIND, request, result, dataset.names.key)

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        split, spec = request["split"], FilteredSpec(**request["spec"])
        joined = self._batcher.joined(dataset, JoinsSpec(**request.get("joins", {})))
        sources = {name: joined.source(name) for name in request["fields"]}
        own = self._batcher.splitter.rows(dataset, split, spec)
        if joined.inner:
            own = joined.with_partners(own)
        joined.check_complete(own)
        rows = {name: joined.rows_of(source, own) for name, source in sources.items()}
        reader = self._batcher.reader
        row_bytes = {name: _row_bytes(reader, source.field) for name, source in sources.items()}
        # Rows that were never written are not read, so they do not count.
        counts = {name: WrittenRows(source.field.column, rows[name]).count for name, source in sources.items()}
        total = sum(counts[name] * each for name, each in row_bytes.items())
        if total > self._max_job_bytes:
            raise TooLarge(
                f"statistics of {', '.join(map(repr, counts))} would read {total:,} bytes, more than the "
                f"{self._max_job_bytes:,} that one job may read (H5FEED_MAX_JOB_BYTES): request fewer fields or rows"
            )
        progress.expect(total)
        others = joined if joined.others else None
        keys = _Keys(dataset, split, spec, others)
        for source in sources.values():
            # Progress is that of the statistics alone.
            self._batcher.transposing.ensure(source.field, lambda _: progress.advance(0))
        computed: set[str] = set()

        def compute(name: str) -> bytes:
            computed.add(name)
            field, each = sources[name].field, row_bytes[name]
            accumulated = scan(
                reader,
                subject_of(field),
                rows[name],
                self._threads,
                lambda done: progress.advance(done * each),
                progress.cancelled,
            )
            report = {
                "field": name,
                "split": split,
                "role": field.role,
                "dtype": field.type_name,
                "shape": list(field.sample_shape),
                **report_of(accumulated, channel_names(field), field.class_names, _is_label(field)),
            }
            return FieldStats(report, None if accumulated.mean_image is None else accumulated.mean_image.mean()).dump()

        whole = [pack for pack in _packs(dataset, others) if all(name in counts for name in pack)]
        for pack in whole:
            data = self._folder.get(keys.of_pack(pack).kept, partial(_packed, pack, compute))
            self._unpacked(keys, pack, data)
        together = {name for pack in whole for name in pack}
        for name in (name for name in counts if name not in together):
            self._kept.put(keys.of(name).here, *_sized(self._folder.get(keys.of(name).kept, partial(compute, name))))
        for name in counts.keys() - computed:
            progress.advance(counts[name] * row_bytes[name])

    def _stored(self, keys: _Keys, name: str) -> bytes | None:
        """The result of a field that has a file of its own."""
        data = self._folder.find(keys.of(name).kept)
        if data is not None:
            self._kept.put(keys.of(name).here, *_sized(data))
        return data

    def _unpacked(self, keys: _Keys, pack: Sequence[str], data: bytes) -> dict[str, bytes]:
        """The results of fields that share a file."""
        ends = np.cumsum(np.frombuffer(data, "<u4", len(pack))) + 4 * len(pack)
        starts = [4 * len(pack), *ends[:-1].tolist()]
        results = {name: data[start:end] for name, start, end in zip(pack, starts, ends.tolist(), strict=True)}
        for name, result in results.items():
            self._kept.put(keys.of(name).here, *_sized(result))
        return results


def _packed(pack: Sequence[str], compute: Callable[[str], bytes]) -> bytes:
    results = [compute(name) for name in pack]
    return b"".join([np.array([len(result) for result in results], "<u4").tobytes(), *results])


def _sized(data: bytes) -> tuple[bytes, int]:
    return data, len(data)


def _packs(dataset: Dataset, joined: Joined | None) -> list[tuple[str, ...]]:
    """Names of the fields whose results share a file, for each such file. They depend on the dataset alone."""
    if joined is not None:
        return []
    small = [
        field.name
        for field in dataset.fields
        if not field.unreadable and not field.is_ragged and field.column.rows * field.row_bytes <= _SMALL_BYTES
    ]
    if len(small) < _FEWEST_SMALL:
        return []
    return [tuple(small[start : start + _PACKED]) for start in range(0, len(small), _PACKED)]


def subject_of(field: Field) -> Subject:
    """What to compute for a field, depending on its type, shape and role."""
    shape, kind = field.sample_shape, field.dtype.kind
    single = math.prod(shape) == 1
    names = channel_names(field)
    return Subject(
        field.column,
        channels=1 if names is None else len(names),
        channels_first=names is not None and len(shape) > 1 and shape[-1] != len(names),
        mean_image=field.channels is not None and not field.is_ragged and MeanImage.suits(shape),
        values=field.is_text or (single and kind in "biu" and not field.is_ragged and not field.column.is_bfloat16),
        indicators=_is_label(field)
        and not is_dense(field.name, shape)
        and not field.is_ragged
        and len(shape) == 1
        and 1 < shape[0] <= MAX_INDICATORS
        and not field.column.is_bfloat16,
    )


def channel_names(field: Field) -> list[str] | None:
    """Names of a field's channels in stored order: colours, or the positions of a flat sample. None if it has none."""
    shape = field.sample_shape
    if field.is_ragged:
        return None
    if field.channels in _COLOURS and len(shape) == 3:
        channels = shape[-1] if shape[-1] in (3, 4) else shape[0]
        return list(_COLOURS[field.channels][:channels]) if channels in (3, 4) else None
    holds_classes = _is_label(field) and not is_dense(field.name, shape)
    if len(shape) == 1 and 1 < shape[0] <= MAX_FEATURES and not holds_classes:
        return [str(number) for number in range(shape[0])]
    return None


def _is_label(field: Field) -> bool:
    return field.role == "label"


def _row_bytes(reader: Reader, field: Field) -> int:
    """Bytes read per row; an estimate for ragged fields."""
    if not field.is_ragged:
        return max(1, field.row_bytes)
    return max(1, reader.typical_items(field.column) * field.dtype.itemsize)


def _of_split(split: str, spec: FilteredSpec) -> FilteredSpec:
    """The part of `spec` that decides which rows a split has."""
    return FilteredSpec(where=spec.where) if split == "all" else spec


class _Keys:
    """Names of results: equal if they are computed from the same rows."""

    def __init__(self, dataset: Dataset, split: str, spec: FilteredSpec, joined: Joined | None) -> None:
        drawn = "" if split == "all" else spec.split_spec.model_dump_json()
        # As the fields understand the filter: one way to write it finds what another one has computed.
        kept = "".join(f" {one.text}" for one in bind(dataset, spec.where))
        self._dataset, self._after = dataset, f" {split} {drawn}{kept}"
        self._joined = joined

    def of(self, field: str) -> Key:
        """Of the result of a field."""
        after, joined = self._after, self._joined
        # Without partners, a row is left out of an inner join. Else, rows of the dataset itself are the same.
        if joined is not None and (joined.inner or joined.source(field).partners is not None):
            after += f" {joined.pinned.model_dump_json()}"
        key = key_of(f"stats/{_VERSION}", self._dataset.name, self._dataset.names, field + after)
        # Nothing on disk has a provisional name.
        return key if joined is None or joined.is_settled else Key(key.here, lambda: None)

    def of_pack(self, pack: Sequence[str]) -> Key:
        """Of the file that the results of some fields share."""
        return self.of(json.dumps(pack))
