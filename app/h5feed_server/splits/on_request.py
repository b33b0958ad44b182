"""Splits for requests: within the request if they are cached or quick to compute, else by a job with progress."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, state_of
from ..filters.masks import is_quick
from ..filters.predicates import bind
from ..jobs.registry import WAIT_SECONDS, InProgress, Jobs, JobState, Progress, Request
from ..row_bits import RowSet
from .compute import Splits
from .labels import Labels, Strata
from .order_spec import OrderSpec
from .split_spec import FilteredSpec, SplitSpec
from .splitter import Splitter, classes_of, drawn_spec, grouped_by
from .windows_spec import NO_WINDOWS

_KIND, _FILTER_KIND = "splits", "filters"

QUICK_ROWS = 1 << 18
"""Up to this many rows are divided within the request: it takes a tenth of a second, and a job would not be faster."""

QUICK_BYTES = 32 << 20
"""Up to this many stored bytes of a label or group field are read and decoded within the request."""


class SplitJobs:
    """A `Splitter` for requests; one per process.

    Long computations run as jobs and raise `InProgress`, so they do not occupy the threads that serve requests.
    """

    def __init__(self, catalog: Catalog, splitter: Splitter, jobs: Jobs) -> None:
        self._catalog = catalog
        self._splitter = splitter
        self._jobs = jobs
        jobs.register(_KIND, "rows", self._work)
        jobs.register(_FILTER_KIND, "rows", self._filter)

    def splits(self, dataset: Dataset, spec: SplitSpec) -> Splits[RowSet]:
        """See `Splitter.splits`.

        Raises
        ------
        InProgress
            A job computes them.
        """
        self._splitter.check_divisible(dataset, spec)
        if not self._splitter.has_splits(dataset, spec) and not _is_quick(dataset, spec):
            raise InProgress(self._start(dataset, spec))
        return self._splitter.splits(dataset, spec)

    def rows(self, dataset: Dataset, split: str, spec: FilteredSpec) -> RowSet | None:
        """See `Splitter.rows`.

        Raises
        ------
        InProgress
        """
        self._check_filtered(dataset, spec)
        if split != "all":
            self.splits(dataset, spec.split_spec).of(split)
        return self._splitter.rows(dataset, split, spec)

    def samples(self, dataset: Dataset, spec: OrderSpec) -> RowSet | None:
        """See `Splitter.samples`.

        Raises
        ------
        InProgress
        """
        if not spec.has_windows:
            return self.rows(dataset, spec.split, spec)
        self._check_filtered(dataset, spec)
        self._splitter.check_divisible(dataset, spec.split_spec)
        unread = [name for name in grouped_by(dataset, spec) if not self._splitter.has_episodes(dataset, name)]
        if not all(_reads_little(dataset, name) for name in unread):
            windows = SplitSpec(**{name: getattr(spec, name) for name in NO_WINDOWS})
            raise InProgress(self._start(dataset, spec.split_spec if spec.splits_rows else windows))
        if spec.split != "all":
            self.splits(dataset, spec.split_spec).of(spec.split)
        return self._splitter.samples(dataset, spec)

    def report(self, dataset: Dataset, spec: FilteredSpec, classes: str | None = None) -> bytes:
        """See `Splitter.report`.

        Raises
        ------
        InProgress
            A job computes it.
        """
        self._splitter.check_divisible(dataset, spec.split_spec)
        self._check_filtered(dataset, spec)
        if not self._splitter.has_report(dataset, spec, classes) and not _is_quick(dataset, spec, classes):
            raise InProgress(self._start(dataset, spec, counted=classes))
        return self._splitter.report(dataset, spec, classes)

    def strata(self, dataset: Dataset, name: str, *, bins: bool = False) -> Strata[Labels]:
        """See `Splitter.strata`.

        Raises
        ------
        InProgress
            A job reads the field.
        """
        self._splitter.check_listed(dataset, "balance= and examples of each class")
        if not self._splitter.has_strata(dataset, name, bins=bins) and not _reads_little(dataset, name):
            raise InProgress(self._start(dataset, None, (name, bins)))
        return self._splitter.strata(dataset, name, bins=bins)

    def _check_filtered(self, dataset: Dataset, spec: FilteredSpec) -> None:
        """Have it found out which rows meet ``where``, if it takes long.

        Raises
        ------
        BadParameter, TooLarge
        InProgress
        """
        predicates = bind(dataset, spec.where)
        if not predicates:
            return
        self._splitter.check_divisible(dataset)
        missing = self._splitter.masks.missing(dataset, predicates)
        if missing and not is_quick(missing):
            request = {**state_of(dataset), "where": spec.where}
            query = urlencode({"where": spec.where, "revision": dataset.revision}, doseq=True)
            result = f"/v1/datasets/{quote(dataset.name, safe='')}/splits/all/rows?{query}"
            raise InProgress(self._jobs.start(_FILTER_KIND, request, result, dataset.names.key))

    def _start(
        self,
        dataset: Dataset,
        spec: SplitSpec | None,
        classes: tuple[str, bool] | None = None,
        counted: str | None = None,
    ) -> JobState:
        chosen = {} if spec is None else spec.model_dump(mode="json", exclude_defaults=True)
        request = {
            **state_of(dataset),
            "spec": chosen,
            "classes": classes,
            "counted": counted,
        }
        query = urlencode(
            {**chosen, **({"classes": counted} if counted else {}), "revision": dataset.revision}, doseq=True
        )
        result = f"/v1/datasets/{quote(dataset.name, safe='')}/splits?{query}"
        return self._jobs.start(_KIND, request, result, dataset.names.key)

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        if request["classes"] is not None:
            name, bins = request["classes"]
            progress.expect(dataset.rows)
            self._splitter.strata(dataset, name, bins=bins, progress=progress)
        else:
            self._splitter.prepare(dataset, FilteredSpec(**request["spec"]), progress, request["counted"])

    def _filter(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        masks, predicates = self._splitter.masks, bind(dataset, request["where"])
        progress.expect(dataset.rows * len(masks.missing(dataset, predicates)))
        masks.bits(dataset, predicates, progress)


def _is_quick(dataset: Dataset, spec: SplitSpec, classes: str | None = None) -> bool:
    drawn = drawn_spec(dataset, spec.split_spec if isinstance(spec, FilteredSpec) else spec)
    read = [*classes_of(dataset, drawn, classes), *grouped_by(dataset, spec)]
    return dataset.rows <= QUICK_ROWS and all(_reads_little(dataset, name) for name in read)


def _reads_little(dataset: Dataset, name: str) -> bool:
    """Whether the classes of a field can be read quickly.

    Raises
    ------
    FieldNotFound, UnsupportedField
    """
    column = dataset.field(name).column
    return column.rows <= QUICK_ROWS and column.stored_nbytes <= QUICK_BYTES
