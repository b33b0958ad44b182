"""Open what a record names, and make sure that it is the same data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .batch import Batch
from .dataset import Dataset
from .errors import DatasetNotFound, RevisionChanged
from .feed import Feed, connect
from .fetching.readahead import ReadAhead
from .lineage import Source, differences, source_of

if TYPE_CHECKING:
    from .keras import Sequence
    from .loops.loader import Loader
    from .torch import TorchBatches

logger = logging.getLogger("h5feed")


class Reopened:
    """The rows and the order of a record; made by `reopen`.

    Attributes
    ----------
    dataset : Dataset
    source : Source
        As it is now: equal to the record, but for the URL and the name of the dataset.
    """

    def __init__(self, dataset: Dataset, source: Source) -> None:
        self.dataset, self.source = dataset, source

    def __repr__(self) -> str:
        return f"<Reopened {self.source}>"

    def batches(self, **options: Any) -> ReadAhead[Batch]:
        """`Dataset.batches` with the options of the record; `options` are added to them, ``epoch`` for example."""
        return self.dataset.batches(self.source.split, **{**self.source.options, **options})

    def loader(self, **options: Any) -> Loader:
        """`Dataset.loader` with the options of the record and these, ``x`` and ``y`` for example."""
        return self.dataset.loader(self.source.split, **self._of_loops(options))

    def sequence(self, **options: Any) -> Sequence:
        """`Dataset.sequence` with the options of the record and these."""
        return self.dataset.sequence(self.source.split, **self._of_loops(options))

    def torch(self, **options: Any) -> TorchBatches:
        """`Dataset.torch` with the options of the record and these."""
        return self.dataset.torch(self.source.split, **self._of_loops(options))

    def tf_data(self, **options: Any) -> Any:
        """`Dataset.tf_data` with the options of the record and these."""
        return self.dataset.tf_data(self.source.split, **self._of_loops(options))

    def _of_loops(self, options: Mapping[str, Any]) -> dict[str, Any]:
        # Loops choose their fields with x= and y=.
        return {name: value for name, value in {**self.source.options, **options}.items() if name != "fields"}


def reopen(
    record: Source | Mapping[str, Any] | str, url: str | None = None, *, timeout: float = 600.0, **connection: Any
) -> Reopened:
    """Open what was trained on, from its record. The batches are exactly the same.

    Parameters
    ----------
    record : Source, mapping or str
        A `Source`, or what its `record` or `json` returned.
    url : str, optional
        Where the data are now; default: where they were.
    timeout : float
        Seconds to wait if the server has to hash files or compute splits first.
    **connection
        Other parameters of `connect`: ``token``, for example, which records do not contain.

    Raises
    ------
    RevisionChanged
        The data are not the same; the message says what changed.
    DatasetNotFound
        No dataset has this name or this revision.
    BadParameter
        It is not a record.
    """
    wanted = record if isinstance(record, Source) else Source.of_record(record)
    feed = connect(url or wanted.url, **connection)
    try:
        dataset = _dataset(feed, wanted)
        here = source_of(dataset, wanted.split, wanted.options, timeout)
        if (here.rows, here.digest) != (wanted.rows, wanted.digest):
            raise RevisionChanged(
                f"{wanted.split!r} of {wanted.dataset!r} had {wanted.rows:,} rows (digest {wanted.digest}), but has "
                f"{here.rows:,} (digest {here.digest}): the data are the same, but divided in another way"
            )
    except BaseException:
        feed.close()
        raise
    return Reopened(dataset, here)


def _dataset(feed: Feed, wanted: Source) -> Dataset:
    """The dataset with the recorded revision, under its name or another one.

    Raises
    ------
    RevisionChanged, DatasetNotFound
    """
    missing: DatasetNotFound | None = None
    dataset = None
    try:
        dataset = feed[wanted.dataset]
        if dataset.settle() == wanted.revision:
            return dataset
        # It may have grown since.
        with contextlib.suppress(RevisionChanged):
            return feed.dataset(wanted.dataset, wanted.revision)
    except DatasetNotFound as error:
        missing = error
    renamed = next((one["name"] for one in feed.datasets() if one["revision"] == wanted.revision), None)
    if renamed is not None:
        logger.warning(
            "the data that were recorded as %r are now %r: the batches are the same", wanted.dataset, renamed
        )
        return feed[renamed]
    if dataset is None:
        raise missing or DatasetNotFound(f"no dataset {wanted.dataset!r}")
    changes = list(differences(wanted, dataset)) or ["its fields are the same, but values, rows or h5feed.toml are not"]
    raise RevisionChanged(
        f"{wanted.dataset!r} was recorded with revision {wanted.revision}, but has revision {dataset.revision} now: "
        + "; ".join(changes)
    )
