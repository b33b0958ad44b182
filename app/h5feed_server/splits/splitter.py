"""Finds the classes and splits of datasets, and the tables for resampling. Computes each once and caches it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge, UnsupportedField, WeightsUnknown
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache, CacheUsage
from h5feed.weights import digest_in, named

from ..cache_folder.folder import CacheFolder
from ..catalog.dataset import Dataset, Field
from ..catalog.names import Key, key_of
from ..catalog.roles import is_dense
from ..filters.masks import Masks
from ..filters.predicates import bind
from ..jobs.registry import Progress
from ..row_bits import LISTED_ROWS, RowBits, RowSet, as_list, within
from ..settings import Settings
from ..storage.reader import Reader
from .classes import Classes, dump_classes, load_classes, read_classes
from .compute import Rows, Splits, dump_splits, load_splits, native_splits
from .describe import describe_splits
from .labels import (
    MAX_DISTINCT,
    Blocks,
    Classed,
    Labels,
    NoClasses,
    Strata,
    dump_strata,
    encode,
    load_strata,
    read_labels,
)
from .large import LargeSplits, wait_for_content
from .order_spec import OrderSpec
from .resampling import Balanced, Weighted
from .split_spec import AS_STORED, PIECES, FilteredSpec, SplitSpec
from .stored import divide, has_all
from .weights_folder import WeightsFolder
from .windows import Windows, runs_of, samples_in
from .windows_spec import NO_WINDOWS

T = TypeVar("T")

Select = Callable[[RowSet | None], RowSet | None]
"""From the rows of a split to some of them; None: all rows of the dataset."""

_MAX_LABEL_BYTES = 1 << 20
"""A field with larger rows, in bytes, is never treated as a label."""

_BLOCK = 1 << 18
"""Rows of a field read at a time."""

_REPORT_BYTES = 8 << 20
"""Limit on the reports cached in memory, in bytes."""

_PATIENCE = 10
"""How long a thread waits for a value that another thread is computing, in read timeouts. Only jobs wait this long:
requests receive a response earlier."""


class Splitter:
    """Finds splits and classes; one per process.

    Results are cached in memory, within limits, and most of them also in the cache folder, where one process computes
    them for all. Keys contain the revision of the dataset, so results are never out of date.
    """

    def __init__(self, settings: Settings, reader: Reader, folder: CacheFolder) -> None:
        self._reader = reader
        self._folder = folder
        self._max_bytes = settings.order_cache_bytes
        self.given = WeightsFolder(
            folder.path / "weights", settings.weights_bytes, settings.weights_arrays, settings.weights_seconds
        )
        timeout = _PATIENCE * settings.read_timeout
        self.masks = Masks(reader, folder, timeout)
        self._large = LargeSplits(folder, self._max_bytes, timeout)
        self._splits: ByteCache[Splits[RowSet]] = ByteCache(self._max_bytes, timeout)
        self._classes: ByteCache[Strata[Classes]] = ByteCache(_REPORT_BYTES, timeout)
        self._strata: ByteCache[Strata[Labels]] = ByteCache(self._max_bytes, timeout)
        self._resampled: ByteCache[Balanced | Weighted] = ByteCache(self._max_bytes, timeout)
        self._windows: ByteCache[Windows] = ByteCache(self._max_bytes, timeout)
        self._reports: ByteCache[bytes] = ByteCache(_REPORT_BYTES, timeout)

    def drop_old(self, seconds: float) -> None:
        """Drop everything from memory that was not used for this many seconds. The cache folder has most of it."""
        for kept in (
            self.masks,
            self._large,
            self._splits,
            self._classes,
            self._strata,
            self._resampled,
            self._windows,
            self._reports,
        ):
            kept.drop_old(seconds)

    def cache_usage(self) -> CacheUsage:
        """Of the caches of row lists and classes together."""
        caches = (self._large, self._splits, self._classes, self._strata, self._resampled, self._windows)
        return CacheUsage(*map(sum, zip(*(cache.usage for cache in caches), strict=True)))

    def has_splits(self, dataset: Dataset, spec: SplitSpec) -> bool:
        """Whether splits are available without computing them: stored in the files, or cached."""
        spec = drawn_spec(dataset, spec)
        if is_large(dataset):
            return not spec.splits_rows or self._large.has(dataset, spec)
        name = _splits_name(dataset, spec)
        return not spec.splits_rows or name.here in self._splits or name.kept in self._folder

    def has_report(self, dataset: Dataset, spec: FilteredSpec, classes: str | None = None) -> bool:
        """Whether a report is cached."""
        name = _report_name(dataset, spec, classes)
        return (name.here, dataset.revision) in self._reports or name.kept in self._folder

    def has_strata(self, dataset: Dataset, name: str, *, bins: bool = False) -> bool:
        """Whether the classes of a field are cached."""
        file = _strata_name(dataset, name, bins)
        return file.here in self._strata or file.kept in self._folder

    def has_episodes(self, dataset: Dataset, name: str) -> bool:
        """Whether the episodes that a field tells are cached."""
        file = _groups_name(dataset, name)
        return file.here in self._strata or file.kept in self._folder

    def prepare(self, dataset: Dataset, spec: FilteredSpec, progress: Progress, classes: str | None = None) -> None:
        """Compute and cache the results of `splits` and `report`, reporting rows read and divided to `progress`."""
        drawn = drawn_spec(dataset, spec.split_spec)
        read = classes_of(dataset, drawn, classes)
        if is_large(dataset):
            self._prepare_large(dataset, spec, drawn, read, progress, classes)
            return
        groups = grouped_by(dataset, spec)
        progress.expect(dataset.rows * (len(read) + len(groups) + 2 * drawn.splits_rows))
        for name, bins in read.items():
            self.strata(dataset, name, bins=bins, progress=progress)
        for name in groups:
            self._groups(dataset, name, progress)
        self.splits(dataset, drawn, progress)
        self.report(dataset, spec, classes)

    def _prepare_large(
        self,
        dataset: Dataset,
        spec: FilteredSpec,
        drawn: SplitSpec,
        read: Mapping[str, bool],
        progress: Progress,
        classes: str | None,
    ) -> None:
        names = 1 + (3 if drawn.splits_rows else len(dataset.native))
        progress.expect(dataset.rows * (len(read) + 3 * drawn.splits_rows + names))
        wait_for_content(dataset, progress)
        for name in read:
            self.classes(dataset, name, progress)
        if drawn.splits_rows and not self._large.has(dataset, drawn):
            by = self._stratified_by(dataset, drawn)
            strata = None if by is None else self.classes(dataset, by)
            self._large.divide(dataset, drawn, strata, progress.advance)
        self.report(dataset, spec, classes, progress.advance)

    def splits(self, dataset: Dataset, spec: SplitSpec, progress: Progress | None = None) -> Splits[RowSet]:
        """The splits of a dataset: those stored in the files, or else from a cache or computed.

        Raises
        ------
        FieldNotFound, UnsupportedField, SplitImpossible, TooLarge
        Overloaded
            The splits of a large dataset are no longer cached: a job must find them again.
        """
        self.check_divisible(dataset, spec)
        asked, spec = spec, drawn_spec(dataset, spec)
        if note := _note_of_windows(asked, spec):
            found = self.splits(dataset, spec, progress)
            return replace(found, note="; ".join(filter(None, [note, found.note])))
        if is_large(dataset):
            return self._large.splits(dataset, spec)
        if not spec.splits_rows:
            # h5feed.toml can declare stored splits. The revision covers that; the identity of the files does not.
            return self._splits.get(
                (dataset.name, dataset.names.key, dataset.identity),
                lambda: native_splits(dataset.native),
                lambda splits: splits.nbytes,
            )
        name = _splits_name(dataset, spec)
        return self._splits.get(
            name.here,
            lambda: self._kept(name, load_splits, lambda: dump_splits(self._compute(dataset, spec, progress))),
            lambda splits: splits.nbytes,
        )

    def rows(self, dataset: Dataset, split: str, spec: FilteredSpec) -> RowSet | None:
        """Ascending rows of a split that meet ``where``. None: all rows of the dataset.

        Raises
        ------
        SplitNotFound, BadParameter
        FieldNotFound, UnsupportedField, SplitImpossible, TooLarge
        """
        predicates = bind(dataset, spec.where)
        if not predicates:
            return None if split == "all" else self.splits(dataset, spec.split_spec).of(split)
        self.check_divisible(dataset)
        drawn = AS_STORED if split == "all" else drawn_spec(dataset, spec.split_spec)

        def compute() -> Splits[RowSet]:
            if is_large(dataset):
                bits = self.masks.bits(dataset, predicates)
                return Splits(
                    {split: RowBits(bits) if split == "all" else self.splits(dataset, drawn).of(split) & bits}
                )
            if split == "all":
                return Splits({split: self.masks.rows(dataset, predicates)})
            # All rows are divided, then filtered: a row is in the same split with every filter.
            mask, rows = self.masks.mask(dataset, predicates), as_list(self.splits(dataset, drawn).of(split))
            return Splits({split: rows[mask[rows]]})

        key = (dataset.name, dataset.names.key, dataset.identity, split, drawn, *(one.text for one in predicates))
        return self._splits.get(key, compute, lambda splits: splits.nbytes).rows[split]

    def samples(self, dataset: Dataset, spec: OrderSpec) -> RowSet | None:
        """Ascending ids of the samples of an order, which are rows of the split. None: all rows of the dataset.

        Raises
        ------
        The errors of `rows` and `windows`.
        """
        return self.windows(dataset, spec).samples if spec.has_windows else self.rows(dataset, spec.split, spec)

    def windows(self, dataset: Dataset, spec: OrderSpec) -> Windows:
        """The samples of an order whose samples are windows of rows: see `samples_in`.

        All rows of a sample are in the same episode and in the same split. Only its own row has to meet ``where``.

        Raises
        ------
        SplitNotFound, BadParameter
        FieldNotFound, UnsupportedField, SplitImpossible, TooLarge
        """
        predicates = bind(dataset, spec.where)
        self.check_divisible(dataset)
        drawn = AS_STORED if spec.split == "all" else drawn_spec(dataset, spec.split_spec)

        def compute() -> Windows:
            rows = None if spec.split == "all" else self.splits(dataset, drawn).of(spec.split)
            starts, ends = runs_of(rows, self._bounds(dataset, spec.episode))
            what = "episode" if spec.split == "all" else f"run of rows of one episode in {spec.split!r}"
            samples = samples_in(starts, ends, spec, dataset.rows, what)
            if predicates and is_large(dataset):
                samples = within(samples, self.masks.bits(dataset, predicates))
            elif predicates:
                listed = as_list(samples)
                samples = listed[self.masks.mask(dataset, predicates)[listed]]
            return Windows(starts, ends, samples)

        way = (spec.span, spec.sequence_stride, spec.ends, spec.episode, *(one.text for one in predicates))
        key = (dataset.name, dataset.names.key, dataset.identity, spec.split, drawn, way)
        return self._windows.get(key, compute, lambda windows: windows.nbytes)

    def _bounds(self, dataset: Dataset, episode: str | None) -> npt.NDArray[np.int64]:
        """First row of each episode, and the number of rows, (episodes + 1,) int64."""
        if episode is None:
            return dataset.bounds
        if episode == "none":
            return np.array([0, dataset.rows], np.int64)
        self.check_listed(dataset, "episode=")
        changes = np.flatnonzero(np.diff(self._groups(dataset, episode).codes)) + 1
        return np.concatenate([[0], changes, [dataset.rows]]).astype(np.int64)

    def report(
        self,
        dataset: Dataset,
        spec: FilteredSpec,
        classes: str | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> bytes:
        """The API's description of the splits, as JSON.

        Parameters
        ----------
        classes : str, optional
            The field whose classes are counted. Default: the field that rows are stratified by, or the label.
        advance : callable
            Called with the rows of the dataset after each split that is described.
        """

        def load(data: bytes) -> bytes:
            # It may have been computed under another name of the same data.
            return json.dumps(load_arrays(data)[0] | {"revision": dataset.revision}).encode()

        name = _report_name(dataset, spec, classes)
        return self._reports.get(
            (name.here, dataset.revision),
            lambda: self._kept(name, load, lambda: dump_arrays(self._describe(dataset, spec, classes, advance), {})),
            len,
        )

    def resampled(
        self, dataset: Dataset, spec: OrderSpec, select: Select | None = None, selected_by: Hashable = None
    ) -> Balanced | Weighted:
        """The table from which epochs with ``balance`` or ``weights`` are drawn.

        Parameters
        ----------
        select : callable, optional
            Takes the rows of the split and returns those that may be drawn.
        selected_by : hashable
            Identifies `select`.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter, SplitImpossible, TooLarge, WeightsUnknown
        """
        if spec.weights is None:
            self.check_listed(dataset, "balance=")
        else:
            self.check_weighable(dataset)
        digest = _given_digest(dataset, spec)
        if digest is not None:
            self.given.note_use(dataset.name, digest)
        windows = tuple(getattr(spec, name) for name in NO_WINDOWS)
        way = (spec.split_spec, spec.split, spec.where, spec.limit, spec.weights, spec.stratify, windows, selected_by)
        draw = self._balanced if spec.weights is None else self._weighted
        return self._resampled.get(
            (dataset.name, dataset.names.key, dataset.identity, way),
            lambda: draw(dataset, spec, select),
            lambda value: value.nbytes,
        )

    def classes(self, dataset: Dataset, name: str, progress: Progress | None = None) -> Strata[Classes]:
        """The classes of a field of a large dataset, and how many rows each has.

        Raises
        ------
        FieldNotFound, UnsupportedField
        """
        field = dataset.field(name)
        again = self._blocks(field)

        def compute() -> bytes:
            try:
                _check_holds_classes(field)
                found = read_classes(self._blocks(field, progress), field.dtype, field.sample_shape)
                return dump_classes(Strata(name, found))
            except NoClasses as error:
                return dump_classes(Strata(name, None, str(error)))

        file = _name("large-classes/1", dataset, name)
        return self._classes.get(
            file.here,
            lambda: self._kept(file, lambda data: load_classes(data, again), compute),
            lambda strata: strata.nbytes,
        )

    def strata(
        self, dataset: Dataset, name: str, *, bins: bool = False, progress: Progress | None = None
    ) -> Strata[Labels]:
        """The classes of a field. With `bins`, continuous values are put into quantile bins.

        Raises
        ------
        FieldNotFound, UnsupportedField
        TooLarge
            The dataset is too large for a list of the class of each row.
        """
        self.check_listed(dataset, f"the class of each row, by {name!r}")
        field = dataset.field(name)

        def compute() -> bytes:
            try:
                return dump_strata(Strata(name, self._labels(field, bins, progress)))
            except NoClasses as error:
                return dump_strata(Strata(name, None, str(error)))

        file = _strata_name(dataset, name, bins)
        return self._strata.get(file.here, lambda: self._kept(file, load_strata, compute), lambda strata: strata.nbytes)

    def check_divisible(self, dataset: Dataset, spec: SplitSpec = AS_STORED) -> None:
        """Refuse a dataset with too many rows for sets of rows in memory, and what large datasets cannot be asked.

        Raises
        ------
        TooLarge
        """
        if not is_large(dataset):
            self._check_fits(4 * dataset.rows, f"lists of the {dataset.rows} rows of {dataset.name!r}")
            return
        # A bit for each row, and where to look for it.
        self._check_fits(
            dataset.rows // 8 + dataset.rows // 256, f"bits of the {dataset.rows} rows of {dataset.name!r}"
        )
        if spec.group is not None:
            self.check_listed(dataset, "group=")
        if drawn_spec(dataset, spec).splits_rows and dataset.native:
            self.check_listed(dataset, "other splits than the stored ones: leave out test, val and folds")

    def check_listed(self, dataset: Dataset, what: str) -> None:
        """Refuse a dataset with too many rows for what needs a list of all rows.

        Raises
        ------
        TooLarge
        """
        if is_large(dataset):
            raise TooLarge(
                f"dataset {dataset.name!r} has {dataset.rows} rows, more than the limit of {LISTED_ROWS} for {what}"
            )
        self.check_divisible(dataset)

    def check_weighable(self, dataset: Dataset) -> None:
        """Refuse a dataset with too many rows for a list of their weights.

        Raises
        ------
        TooLarge
        """
        self.check_listed(dataset, "weights=")
        self._check_fits(12 * dataset.rows, f"the weights of the {dataset.rows} rows of {dataset.name!r}")

    def _kept(self, name: Key, load: Callable[[bytes], T], compute: Callable[[], bytes]) -> T:
        """The content of the file `name` in the cache folder; if it is missing, one process computes it."""
        return load(self._folder.get(name.kept, compute))

    def _check_fits(self, nbytes: int, what: str) -> None:
        if nbytes > self._max_bytes:
            raise TooLarge(f"{what} take {nbytes} bytes, more than H5FEED_ORDER_CACHE_BYTES = {self._max_bytes}")

    def _stratified_by(self, dataset: Dataset, spec: SplitSpec) -> str | None:
        """The field that rows are to be stratified by."""
        label = dataset.label.name if dataset.label else None
        by = label if spec.stratify is None else spec.stratify
        return by if by != "none" and (spec.split_shuffle or spec.folds is not None) else None

    def _compute(self, dataset: Dataset, spec: SplitSpec, progress: Progress | None) -> Splits[Rows]:
        strata = groups = None
        by = self._stratified_by(dataset, spec)
        if by is not None:
            strata = self.strata(dataset, by, bins=by == spec.stratify)
        if spec.group is not None:
            groups = self._groups(dataset, spec.group)
        return divide(
            dataset.rows,
            native_splits(dataset.native).rows,
            dataset.split_record,
            spec,
            strata,
            groups,
            has_label=dataset.label is not None,
            advance=(lambda rows: None) if progress is None else progress.advance,
        )

    def _describe(
        self, dataset: Dataset, filtered: FilteredSpec, classes: str | None, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        spec = drawn_spec(dataset, filtered.split_spec)
        splits = self.splits(dataset, filtered.split_spec)
        label = dataset.label.name if dataset.label else None
        by = classes or splits.stratify or label
        labels: Classed | None = None
        digests: Mapping[str, str] = {}
        if is_large(dataset):
            digests = self._large.digests(dataset, spec)
            labels = None if by is None else self.classes(dataset, by).labels
        elif by is not None:
            labels = self.strata(dataset, by, bins=by == spec.stratify).labels
        groups = None if splits.group is None else self._groups(dataset, splits.group)
        names = {} if by is None else dict(enumerate(dataset.field(by).class_names or ()))
        return {
            "dataset": dataset.name,
            "revision": dataset.revision,
            "method": splits.method,
            "stratify": splits.stratify,
            "group": splits.group,
            "classes_of": by if labels is not None else None,
            "classes_are": labels.kind if labels is not None else None,
            "note": splits.note,
            "replaces": splits.replaces,
            "where": filtered.where,
            "splits": describe_splits(
                splits,
                dataset.rows,
                labels,
                groups,
                names,
                self.rows(dataset, "all", filtered),
                digests,
                advance,
            ),
        }

    def pool(self, dataset: Dataset, spec: OrderSpec, select: Select | None = None) -> Rows | None:
        """Samples of the split that meet ``where`` and that `select` keeps, cut to `limit`. None: all rows."""
        rows = self.samples(dataset, spec)
        if select is not None:
            rows = select(rows)
        if rows is not None:
            return as_list(rows)[: spec.limit]
        return None if spec.limit is None else np.arange(min(spec.limit, dataset.rows), dtype=np.int32)

    def _balanced(self, dataset: Dataset, spec: OrderSpec, select: Select | None) -> Balanced:
        by, bins = balanced_by(dataset, spec)
        strata = self.strata(dataset, by, bins=bins)
        if strata.labels is None:
            raise BadParameter(f"balance=true: {by!r} {strata.reason}")
        if not strata.labels.single:
            raise BadParameter(f"balance=true: rows of {by!r} have several labels each; use weights=FIELD")
        pool = self.pool(dataset, spec, select)
        codes = strata.labels.codes
        return Balanced.of(pool, codes if pool is None else codes[pool])

    def _weighted(self, dataset: Dataset, spec: OrderSpec, select: Select | None) -> Weighted:
        digest = _given_digest(dataset, spec)
        weights = self._stored_weights(dataset, spec) if digest is None else self._given_weights(dataset, digest)
        pool = self.pool(dataset, spec, select)
        # A filter may leave out the rows that have no weight.
        checked = None if not spec.where and select is None else pool
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        bad = bad if checked is None else np.intersect1d(bad, checked)
        if len(bad):
            raise UnsupportedField(
                f"weights={spec.weights}: row {bad[0]} has {weights[bad[0]]}, but weights must be numbers ≥ 0"
            )
        with np.errstate(over="ignore"):
            ends = np.cumsum(weights if pool is None else weights[pool])
        if len(ends) and not 0 < ends[-1] < np.inf:
            raise UnsupportedField(
                f"weights={spec.weights}: weights of the split add up to {ends[-1]}: "
                + ("nothing to draw" if not ends[-1] else "divide them by their largest")
            )
        return Weighted(pool, ends)

    def _stored_weights(self, dataset: Dataset, spec: OrderSpec) -> npt.NDArray[np.float64]:
        """The weights of all rows from a field, (rows,); they may be invalid."""
        assert spec.weights is not None
        field = dataset.field(spec.weights)
        if math.prod(field.sample_shape) != 1 or field.dtype.kind not in "biuf" or field.is_ragged:
            raise UnsupportedField(f"weights={field.name}: it must have one number per row, not {_sample(field)}")
        blocks = [block.reshape(-1).astype(np.float64) for block in self._blocks(field)()]
        return np.concatenate(blocks) if blocks else np.zeros(0)

    def _given_weights(self, dataset: Dataset, digest: str) -> npt.NDArray[np.float64]:
        """The weights of all rows that a client has given, (rows,)."""
        weights = self.given.find(dataset.name, digest)
        if weights is None:
            raise WeightsUnknown(
                f"weights={named(digest)}: this server lacks these weights of dataset {dataset.name!r}. Give them with "
                f"POST /v1/datasets/{quote(dataset.name, safe='')}/weights, and repeat the request"
            )
        if len(weights) != dataset.rows:
            raise BadParameter(
                f"weights={named(digest)}: there are {len(weights)} weights, but dataset {dataset.name!r} has "
                f"{dataset.rows} rows now"
            )
        return weights.astype(np.float64, copy=False)

    def _groups(self, dataset: Dataset, name: str, progress: Progress | None = None) -> Labels:
        if name == PIECES:
            sizes = np.diff(dataset.bounds)
            pieces = np.arange(len(sizes))
            return Labels("classes", tuple(pieces.tolist()), np.repeat(pieces.astype(np.uint32), sizes))
        field = dataset.field(name)

        def compute() -> bytes:
            if math.prod(field.sample_shape) != 1 or (field.is_ragged and not field.is_text):
                raise UnsupportedField(f"group={name}: it must have one value per row, not {_sample(field)}")
            try:
                values, codes = encode(self._blocks(field, progress), dataset.rows)
                return dump_strata(Strata(name, Labels("classes", values, codes)))
            except NoClasses:
                raise UnsupportedField(
                    f"group={name}: it has more than {MAX_DISTINCT} different values, the limit for groups"
                ) from None

        file = _groups_name(dataset, name)
        strata = self._strata.get(
            file.here, lambda: self._kept(file, load_strata, compute), lambda strata: strata.nbytes
        )
        assert strata.labels is not None
        return strata.labels

    def _labels(self, field: Field, bins: bool, progress: Progress | None) -> Labels:
        _check_holds_classes(field)
        blocks = self._blocks(field, progress)
        return read_labels(blocks, field.column.rows, field.dtype, field.sample_shape, bins=bins)

    def _blocks(self, field: Field, progress: Progress | None = None) -> Blocks:
        """Return a function that reads the field in blocks, without the cache of small fields, which it would fill.

        The caller has told `progress` to expect the rows once. Each further pass over the field adds them again.
        """
        column = field.column
        whole_chunks = max(1, min(_BLOCK, _BLOCK * 64 // max(1, column.row_bytes)) // field.block_rows)
        step = whole_chunks * field.block_rows

        passes = itertools.count()

        def blocks() -> Iterator[npt.NDArray[Any]]:
            if next(passes) and progress is not None:
                progress.expect(column.rows)
            for start in range(0, column.rows, step):
                stop = min(start + step, column.rows)
                yield self._reader.read_block(column, start, stop)
                if progress is not None:
                    progress.advance(stop - start)

        return blocks


def is_large(dataset: Dataset) -> bool:
    """Whether sets of rows of the dataset are bits, not lists."""
    return dataset.rows > LISTED_ROWS


def _check_holds_classes(field: Field) -> None:
    """Refuse a field that holds no classes, as far as this is known without reading it.

    Raises
    ------
    NoClasses
    """
    if field.is_ragged and not field.is_text:
        raise NoClasses("holds no classes: a row is a list of any length")
    if not field.is_text and is_dense(field.name, field.sample_shape):
        raise NoClasses("holds no classes: by its name, a row is a mask, boxes or similar")
    if field.row_bytes > _MAX_LABEL_BYTES:
        raise NoClasses(f"holds no classes: a row has {field.row_bytes} bytes")


def drawn_spec(dataset: Dataset, spec: SplitSpec) -> SplitSpec:
    """The spec to draw by: `AS_STORED` if the requested splits are those stored in the files, else `spec`.

    If samples are windows of rows, rows next to each other stay together: episodes, if there are any, else the rows are
    divided by position. The result has no windows any more.

    Raises
    ------
    BadParameter
    """
    if spec.has_windows:
        together: dict[str, Any] = {}
        if spec.splits_rows and spec.group is None:
            episode = PIECES if spec.episode is None and dataset.has_episodes else spec.episode
            in_episodes = episode not in (None, "none")
            if spec.stratify not in (None, "none") and not (in_episodes and spec.folds is not None):
                raise BadParameter(
                    f"stratify={spec.stratify}: samples are windows of rows, so "
                    + (
                        "episodes are divided, which can be stratified in folds= only"
                        if in_episodes
                        else "rows are divided by position, and cannot be stratified"
                    )
                    + ": leave stratify out"
                )
            if not in_episodes and spec.split_seed != AS_STORED.split_seed:
                raise BadParameter(
                    f"split_seed={spec.split_seed}: samples are windows of rows, so rows are divided by position, with "
                    "val and test at the end: leave split_seed out, or name an episode= field"
                )
            together = {"group": episode} if in_episodes else {"split_shuffle": False, "stratify": "none"}
        spec = SplitSpec.model_validate(spec.model_dump() | NO_WINDOWS | together)
    return AS_STORED if has_all(dataset.split_record, spec, dataset.label is not None) else spec


def grouped_by(dataset: Dataset, spec: SplitSpec) -> list[str]:
    """The fields to read to know groups and episodes."""
    names = (drawn_spec(dataset, spec.split_spec if isinstance(spec, FilteredSpec) else spec).group, spec.episode)
    return [name for name in dict.fromkeys(names) if name not in (None, "none", PIECES)]


def _note_of_windows(asked: SplitSpec, drawn: SplitSpec) -> str:
    """What the windows that samples are change about splits."""
    if not asked.has_windows or not drawn.splits_rows:
        return ""
    if drawn.group is not None:
        return "" if asked.group is not None else "samples are windows of rows: episodes are divided, as with group="
    return "samples are windows of rows: rows are divided by position, with val and test at the end"


def classes_of(dataset: Dataset, spec: SplitSpec, counted: str | None = None) -> dict[str, bool]:
    """The fields whose classes are needed to draw and describe splits, each with whether it may be put into bins.

    Parameters
    ----------
    counted : str, optional
        The field whose classes are counted in each split.
    """
    label = dataset.label.name if dataset.label else None
    by = spec.stratify if spec.splits_rows and spec.stratify not in (None, "none") else label
    return {name: name == spec.stratify for name in (by, counted) if name is not None}


def balanced_by(dataset: Dataset, spec: OrderSpec) -> tuple[str, bool]:
    """The field whose classes ``balance`` draws equally often, and whether continuous values are put into bins.

    Raises
    ------
    BadParameter
        No field is named, and the dataset has no label.
    """
    by = spec.stratify if spec.stratify not in (None, "none") else dataset.label.name if dataset.label else None
    if by is None:
        raise BadParameter(f"balance=true: dataset {dataset.name!r} has no label field; name one with stratify=")
    return by, by == spec.stratify


def _given_digest(dataset: Dataset, spec: OrderSpec) -> str | None:
    """The digest of weights that a client has given; None if the weights are a field."""
    if spec.weights is None or spec.weights in (field.name for field in dataset.fields):
        return None
    return digest_in(spec.weights)


def _splits_name(dataset: Dataset, spec: SplitSpec) -> Key:
    return _name("splits/5", dataset, spec.model_dump_json())


def _report_name(dataset: Dataset, spec: FilteredSpec, classes: str | None) -> Key:
    return _name("reports/4", dataset, f"{spec.model_dump_json()} {classes}")


def _strata_name(dataset: Dataset, name: str, bins: bool) -> Key:
    return _name("classes/3", dataset, f"{name} {bins}")


def _groups_name(dataset: Dataset, name: str) -> Key:
    return _name("groups/2", dataset, name)


def _name(folder: str, dataset: Dataset, request: str) -> Key:
    return key_of(folder, dataset.name, dataset.names, request)


def _sample(field: Field) -> str:
    """What a row of the field is, for messages."""
    return "lists" if field.is_ragged else f"{list(field.sample_shape)} of {field.dtype.name}"
