"""What a training loop reads: the samples of a dataset, or of a mixture of datasets."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self, Unpack

import numpy.typing as npt

from .batch import Batch
from .buffers import BufferPool
from .cache import RowCache
from .crops import Crops
from .fetching.readahead import DEFAULT_READAHEAD, ReadAhead
from .frames import Field
from .net.balancing import ReplicaStats
from .options import OrderOptions, SplitOptions
from .plan import Plan
from .suggestions import check_options

DEFAULT_CONNECTIONS: int | None = None
"""Maximum number of concurrent requests; None: as many as the link needs, up to `pace.MAX_WIDTH`."""


class Samples(ABC):
    """Samples with named fields, whose passes are read in batches.

    Attributes
    ----------
    name : str
    rows : int
    fields : dict of str to Field
    class_names : list of str or None
    info : dict
        The server's description; of a mixture, what its sources have in common.
    """

    name: str
    rows: int
    fields: Mapping[str, Field]
    class_names: list[str] | None
    info: dict[str, Any]

    @property
    @abstractmethod
    def revision(self) -> str:
        """The revision of the data."""

    @abstractmethod
    def check_is(self, revision: str) -> None:
        """Raise `RevisionChanged` if a revision does not stand for these data."""

    @property
    @abstractmethod
    def via(self) -> str:
        """How the servers are reached."""

    @property
    @abstractmethod
    def replicas(self) -> tuple[ReplicaStats, ...]:
        """What each server has done so far, and which are left out."""

    @abstractmethod
    def joined_by(self, options: dict[str, Any]) -> Self:
        """`Dataset.join` by the options ``join`` and ``how``, which are taken from `options`."""

    @abstractmethod
    def named_weights(self, weights: str | npt.ArrayLike) -> str:
        """The value of the option `weights`: the name of a field, or an array, copied and named by its digest.

        Raises
        ------
        BadParameter
        """

    def owner_of(self, field: str) -> tuple[Samples, str]:
        """The dataset that a field is of, and its name there."""
        return self, field

    def crops(self, asked: Mapping[str, Any]) -> Crops | None:
        """Which fields of an order are cropped, and how; None if nothing is."""
        return None

    @abstractmethod
    def plan(self, split: str = "all", *, batch_size: int = 32, **options: Unpack[OrderOptions]) -> Plan:
        """The rows and batches of an epoch, known before fetching."""

    @abstractmethod
    def read_passes(
        self,
        plan: Plan,
        epoch: int,
        start: int,
        stop: int | None = None,
        *,
        connections: int | None = None,
        readahead: int | None = None,
        cache: Any = None,
        waits: Callable[[], str | None] = lambda: None,
        pool: BufferPool | None = None,
    ) -> ReadAhead[Batch]:
        """Iterate over pass `epoch` of a plan from batch `start` to `stop`, or endlessly into the following passes.

        `cache` is a path, or what `cache` returns.
        """

    @abstractmethod
    def cache(self, folder: str | os.PathLike[str], cache_bytes: int | None = None) -> Any:
        """A local cache folder, to pass as ``cache=``."""

    @abstractmethod
    def splits(self, *, classes: str | None = None, **options: Unpack[SplitOptions]) -> Mapping[str, Any]:
        """Rows and classes of each split."""

    @abstractmethod
    def stats(self, split: str = "all", *, field: str, **options: Unpack[SplitOptions]) -> Mapping[str, Any]:
        """Statistics of a field."""

    def recorded(self, plan: Plan, options: Mapping[str, Any], timeout: float) -> Any:
        """The record of a loop over a plan, for samples of several datasets: see `h5feed.lineage.source_of_plan`."""
        raise NotImplementedError

    def __bool__(self) -> bool:
        # A dataset without rows is still true.
        return True

    def __iter__(self) -> NoReturn:
        # Python would request one row at a time.
        raise TypeError("a Dataset is not iterable: loop over ds.batches() or ds.loader(), or index rows with ds[0:3]")

    def fields_of_role(self, role: str) -> list[str]:
        """Names of the readable fields of a role with rows of equal shape."""
        found = [field for field in self.fields.values() if field.role == role and field.readable]
        return [field.name for field in found if not field.ragged]

    def batches(
        self,
        split: str = "all",
        *,
        batch_size: int = 32,
        connections: int | None = DEFAULT_CONNECTIONS,
        readahead: int = DEFAULT_READAHEAD,
        cache: str | os.PathLike[str] | RowCache | None = None,
        **options: Unpack[OrderOptions],
    ) -> ReadAhead[Batch]:
        """All batches of one epoch, in order, fetched ahead.

        Parameters
        ----------
        connections : int, optional
            Maximum number of concurrent requests. Default: as many as the link needs, measured while running.
        readahead : int
            Maximum number of bytes fetched ahead.
        cache : path or RowCache, optional
            A local folder that keeps fetched rows: see `cache`.

        Returns
        -------
        iterator of Batch
            With ``waited`` (seconds spent waiting for data) and ``close()``.
        """
        check_options(options, self.batches, OrderOptions.__annotations__)
        given: dict[str, Any] = dict(options)
        samples = self.joined_by(given)
        plan = samples.plan(split, batch_size=batch_size, **given)
        return samples.read_passes(
            plan,
            options.get("epoch", 0),
            0,
            plan.batches,
            connections=connections,
            readahead=readahead,
            cache=cache,
        )
