"""Open what a record names, and make sure that it is the same data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .batch import Batch
from .dataset import Dataset
from .errors import DatasetNotFound, RevisionChanged
from .feed import Feed, connect
from .fetching.readahead import ReadAhead
from .lineage import Source, differences, source_of
from .mixture import Mixture, mix

if TYPE_CHECKING:
    from .keras import Sequence
    from .loops.loader import Loader
    from .torch import TorchBatches

logger = logging.getLogger("h5feed")


class Reopened:
    """The rows and the order of a record; made by `reopen`.

    Attributes
    ----------
    dataset : Dataset or Mixture
    source : Source
        As it is now: equal to the record, but for the URL and the name of the dataset.
    """

    def __init__(self, dataset: Dataset | Mixture, source: Source) -> None:
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
    feeds: dict[str, Feed] = {}

    def opened(one: Source) -> tuple[Dataset, Source]:
        at = url or one.url
        if at not in feeds:
            feeds[at] = connect(at, **connection)
        return _opened(feeds[at], one, timeout)

    try:
        return Reopened(*(opened(wanted) if wanted.mixture is None else _mixed_again(wanted, opened, timeout)))
    except BaseException:
        for feed in feeds.values():
            feed.close()
        raise


def _opened(feed: Feed, wanted: Source, timeout: float) -> tuple[Dataset, Source]:
    """The dataset of a record, and the record as it is now."""
    dataset = _dataset(feed, wanted)
    here = source_of(dataset, wanted.split, wanted.options, timeout)
    if (here.rows, here.digest) != (wanted.rows, wanted.digest):
        raise RevisionChanged(
            f"{wanted.split!r} of {wanted.dataset!r} had {wanted.rows:,} rows (digest {wanted.digest}), but has "
            f"{here.rows:,} (digest {here.digest}): the data are the same, but divided in another way"
        )
    return dataset, here


def _mixed_again(
    wanted: Source, opened: Callable[[Source], tuple[Dataset, Source]], timeout: float
) -> tuple[Mixture, Source]:
    """The mixture of a record, and the record as it is now.

    Raises
    ------
    RevisionChanged
        A source is not what it was; the message says which.
    """
    assert wanted.mixture is not None
    datasets = {}
    for name, record in wanted.mixture["sources"].items():
        one = Source.of_record(record)
        try:
            dataset, _ = opened(one)
        except RevisionChanged as error:
            raise RevisionChanged(f"the source {name!r}: {error.detail}") from None
        joined = {option: one.options[option] for option in ("join", "how") if option in one.options}
        datasets[name] = dataset.joined_by(joined)
    given = dict(wanted.mixture["mix"])
    if isinstance(weights := given.get("weights"), Mapping):
        given["weights"] = {int(epoch): of_epoch for epoch, of_epoch in weights.items()}
    mixture = mix(datasets, **given)
    options = dict(wanted.options)
    here = mixture.source(wanted.split, timeout=timeout, **options)
    if (here.rows, here.digest) != (wanted.rows, wanted.digest):
        raise RevisionChanged(
            f"{wanted.dataset!r} was recorded with the digest {wanted.digest}, but has {here.digest}: the sources are "
            "the same, but mixed in another way"
        )
    return mixture, here


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
