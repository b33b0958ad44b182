"""Has jobs transpose sparse matrices that are stored by columns, before their rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, state_of
from ..jobs.registry import WAIT_SECONDS, InProgress, Jobs, Progress, Request
from ..storage.reader import Reader
from ..storage.transposed.copy_file import TransposedFile
from ..storage.transposed.making import transpose
from ..storage.transposed.sorting import work_bytes

_KIND = "transpose"


class Transposing:
    """Makes copies by rows; one per process.

    Parameters
    ----------
    max_bytes : int
        Maximum size of all copies.
    """

    def __init__(self, catalog: Catalog, reader: Reader, jobs: Jobs, max_bytes: int) -> None:
        self._catalog = catalog
        self._reader = reader
        self._jobs = jobs
        self._max_bytes = max_bytes
        jobs.register(_KIND, "bytes", self._work)

    def check(self, datasets: Sequence[Dataset], fields: Iterable[Field]) -> None:
        """Check that the rows of these fields of some datasets, or of parts of fields, can be read now. The fields may
        have other names than there.

        Raises
        ------
        InProgress
            A job makes the copies that they are read from.
        """
        for field in fields:
            copies = list(_copies(field))
            if all(file.is_there() for file in copies):
                continue
            dataset, whole = next(
                (dataset, one)
                for dataset in datasets
                for one in dataset.fields
                # By name: since a plan was made, they may have been inspected again.
                if any(own.name == file.name for part in one.parts for own in _copies(part) for file in copies)
            )
            request = {**state_of(dataset), "field": whole.name}
            raise InProgress(self._jobs.start(_KIND, request, "", dataset.names.key))

    def ensure(self, field: Field, advance: Callable[[int], None]) -> None:
        """Make the copies that the rows of a field are read from, unless they are there. Only for jobs: it may take
        long. `advance` is called with the bytes that are done. The errors are those of `transpose`."""
        for file in _copies(field):
            transpose(file, self._reader, self._max_bytes, advance)

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        field = dataset.field(request["field"])
        progress.expect(sum(work_bytes(file.matrix) for file in _copies(field)))
        self.ensure(field, progress.advance)


def _copies(field: Field) -> Iterator[TransposedFile]:
    """The copies that the rows of a field are read from."""
    return (one.source for one in field.column.segments if isinstance(one.source, TransposedFile))
