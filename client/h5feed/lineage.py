"""The record of what a model was trained on: dataset, revision, split, order, and a digest of the row ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import BadAnswer, BadParameter
from .net import jobs
from .options import split_options
from .order import SPLIT_ALIASES
from .plan import Plan, conditions, conditions_text, plain
from .remote_dataset import RemoteDataset
from .samples import Samples

RECORD_VERSION = 1

_NO_RECORD = "not a record of h5feed: expected what Source.record() or Source.json() returned"

_OF_THIS_RUN = frozenset(("epoch", "decode", "compress", "sparse"))
"""Options that change neither the rows of a batch nor their order, and the epoch, which every pass has another of."""


@dataclass(frozen=True)
class Source:
    """What was trained on. Two sources that are equal but for `url` give the same batches.

    Attributes
    ----------
    url : str
        The server or servers, or the path that was opened. Of a mixture, those of its sources.
    dataset, revision : str
        The revision is the digest of the content. Of a mixture, those of its sources, joined with ``+``.
    split : str
    options : mapping of str to Any
        Split and order options, ``batch_size`` among them, that were set. Values that JSON has.
    rows : int
        Rows of the split, after ``where`` and before ``limit``; of a mixture, of all sources.
    digest : str
        Digest of their row ids; of a mixture, of the digests of its sources, and of how they are mixed.
    fields : mapping of str to mapping
        ``dtype`` and ``shape`` (of one row; None if rows differ in length) of each field of the dataset that is served.
    mixture : mapping of str to Any, optional
        Of a mixture: ``sources``, the record of each by name, and ``mix``, the other arguments of `h5feed.mix`.
    """

    url: str
    dataset: str
    revision: str
    split: str
    options: Mapping[str, Any]
    rows: int
    digest: str
    fields: Mapping[str, Mapping[str, Any]]
    mixture: Mapping[str, Any] | None = None

    @classmethod
    def of_record(cls, record: object) -> Source:
        """Read a record.

        Parameters
        ----------
        record : mapping of str to Any, or str
            From `record` or `json`.

        Raises
        ------
        BadParameter
        """
        if isinstance(record, str):
            try:
                record = json.loads(record)
            except ValueError:
                raise BadParameter(f"{_NO_RECORD}, not {str(record)[:80]!r}") from None
        if not isinstance(record, Mapping) or "h5feed" not in record:
            raise BadParameter(f"{_NO_RECORD}, not {str(record)[:80]}")
        if record["h5feed"] != RECORD_VERSION:
            raise BadParameter(f"the record has version {record['h5feed']}, but this h5feed reads {RECORD_VERSION}")
        try:
            texts = {name: record[name] for name in ("url", "dataset", "revision", "split", "digest")}
            options, fields, rows = dict(record["options"]), dict(record["fields"]), int(record["rows"])
            mixture = record.get("mixture")
            if mixture is not None:
                mixture = {"sources": dict(mixture["sources"]), "mix": dict(mixture["mix"])}
        except (KeyError, TypeError, ValueError) as error:
            raise BadParameter(f"{_NO_RECORD}: {error}") from None
        if not all(isinstance(text, str) for text in texts.values()):
            raise BadParameter(f"{_NO_RECORD}: {texts}")
        return cls(**texts, options=options, rows=rows, fields=fields, mixture=mixture)

    def record(self) -> dict[str, Any]:
        """Everything as a dict that JSON has, for `h5feed.reopen`."""
        found = {"h5feed": RECORD_VERSION, **asdict(self)}
        if self.mixture is None:
            del found["mixture"]
        return found

    def json(self) -> str:
        """`record` as JSON."""
        return json.dumps(self.record(), sort_keys=True)

    @property
    def short(self) -> str:
        """A digest of everything but URLs, 32 hexadecimal digits."""
        # Imported late: it is not needed to train.
        from hashlib import blake2b

        same = {name: value for name, value in self.record().items() if name != "url"}
        if self.mixture is not None:
            sources = self.mixture["sources"].items()
            same["mixture"] = {**self.mixture, "sources": {name: Source.of_record(one).short for name, one in sources}}
        return blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=16).hexdigest()

    def __str__(self) -> str:
        where = conditions_text(conditions(self.options.get("where")))
        return f"{self.split!r} of {self.dataset!r}{where}: {self.rows:,} rows, revision {self.revision}"


def source_of(dataset: RemoteDataset, split: str, options: Mapping[str, Any], timeout: float = jobs.TIMEOUT) -> Source:
    """The `Source` of a split or an order.

    Parameters
    ----------
    options : mapping of str to Any
        Split and order options.
    timeout : float
        Seconds to wait if the server has to hash files or compute splits first.

    Raises
    ------
    Preparing, ReadTimeout, RevisionChanged, SplitNotFound
    """
    revision = dataset.settle()
    splits = dataset.splits(timeout=timeout, **split_options(options))["splits"]
    found = splits.get(SPLIT_ALIASES.get(split, split), splits.get(split))
    if found is None:
        # The server says which splits there are.
        dataset.plan(split, batch_size=1, **split_options(options))
        raise BadAnswer(f"the server has a plan of {split!r}, but its report of the splits does not have it")
    return Source(
        url=dataset.url,
        dataset=dataset.name,
        revision=revision,
        split=split,
        options=recorded_options({**options, **_kept(dataset, options)}),
        rows=found["rows"],
        digest=found["digest"],
        fields=described_fields(dataset),
    )


def _kept(dataset: RemoteDataset, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are recorded: weights by their digest, joined datasets with their revisions."""
    weights = options.get("weights")
    return dataset.join_options | ({} if weights is None else {"weights": str(dataset.named_weights(weights))})


def source_of_plan(samples: Samples, plan: Plan, timeout: float = jobs.TIMEOUT) -> Source:
    """The `Source` of a loop over a plan."""
    options = {**plan.asked, "batch_size": plan.batch_size}
    if isinstance(samples, RemoteDataset):
        return source_of(samples, plan.params["split"], options, timeout)
    found: Source = samples.recorded(plan, options, timeout)
    return found


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a record has, of types that JSON has."""
    return {
        name: plain(name, value)
        for name, value in sorted(options.items())
        if value is not None and name not in _OF_THIS_RUN
    }


def described_fields(dataset: Samples) -> dict[str, dict[str, Any]]:
    """The fields of a dataset, as in `Source.fields`."""
    return {
        field.name: {"dtype": field.dtype, "shape": None if field.ragged else list(field.shape)}
        for field in dataset.fields.values()
        # Without those of joined datasets, which have revisions of their own.
        if field.readable and "/" not in field.name
    }


def differences(source: Source, dataset: RemoteDataset) -> Iterator[str]:
    """How a dataset differs from a record of it, as far as its description tells."""
    here = described_fields(dataset)
    for name in sorted(source.fields.keys() | here.keys()):
        before, now = source.fields.get(name), here.get(name)
        if before is None or now is None:
            yield f"field {name!r} {'is new' if before is None else 'is not there any more'}"
        elif dict(before) != now:
            yield f"field {name!r} was {_kind(before)} and is {_kind(now)}"


def _kind(field: Mapping[str, Any]) -> str:
    shape = field.get("shape")
    return f"{field.get('dtype')}{'[…]' if shape is None else shape}"
