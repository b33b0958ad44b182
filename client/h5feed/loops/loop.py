"""The base class of all loops over a split: position, state, and statistics of waiting."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from ..cache import RowCache
from ..errors import BadParameter
from ..lineage import Source, source_of_plan
from ..plan import Plan
from ..remote_dataset import RemoteDataset
from ..revisions import is_provisional
from ..samples import Samples
from .meter import Meter
from .passes import described, position_in, state_of
from .wait_stats import LoopStats

logger = logging.getLogger("h5feed")

_TOLD: set[tuple[str, str, str]] = set()
"""Joined datasets, their revisions in loops, and later ones, of which a line was logged."""


def check_can_follow(samples: Samples, order: Mapping[str, Any], cache: Any = None) -> None:
    """Check that each pass of a loop can begin with the rows that there are then.

    Raises
    ------
    BadParameter
        These are the samples of several datasets, or one of several shards, or a cache is of one revision.
    """
    if not isinstance(samples, RemoteDataset):
        raise BadParameter(f"follow=True is for loops over one dataset, not over {samples.name!r}")
    if int(order.get("shards") or 1) > 1:
        raise BadParameter(
            f"follow=True with shards={order['shards']}: the processes would not agree on the rows of a pass. Let "
            "one of them choose a revision for each pass, and open it in all with feed.dataset(name, revision)"
        )
    if isinstance(cache, RowCache):
        raise BadParameter("follow=True: a RowCache is of one revision: pass the path of its folder")


class Loop(ABC):
    """A loop over the batches of a plan, pass after pass.

    Subclasses define `plan`, `_dataset`, `_meter`, `_where` and `_go_to`.
    """

    _dataset: Samples
    _meter: Meter
    _follow: bool = False
    """Whether each pass starts with the rows that the dataset has then."""

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """The rows and batches of one pass."""

    @abstractmethod
    def _where(self) -> tuple[int, int]:
        """Number of the pass of the next batch, and how many of its batches were delivered."""

    @abstractmethod
    def _go_to(self, epoch: int, delivered: int) -> None:
        """Let the next loop deliver the rest of pass `epoch`."""

    @abstractmethod
    def close(self) -> None:
        """Stop the read-ahead and its threads. The next batch restarts it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        epoch, delivered = self._where()
        where = f"at batch {delivered} of pass {epoch}"
        return f"<{type(self).__name__} of {described(self._dataset, self.plan)}; {where}>"

    def __len__(self) -> int:
        """Batches of a pass."""
        return self.plan.batches

    @property
    def samples(self) -> int:
        """Rows of a pass."""
        return self.plan.rows

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def epoch(self) -> int:
        """Number of the pass of the next batch, or of the pass that the next loop starts."""
        return self._where()[0]

    @property
    def waited(self) -> float:
        """Seconds the loop has waited for batches: see `stats`."""
        return self.stats().waited

    def stats(self) -> LoopStats:
        """Steps, rows and times so far: how long the loop waited for data, and why. Prints as a table."""
        return replace(self._meter.stats(), via=self._dataset.via, replicas=self._dataset.replicas)

    def source(self) -> Source:
        """The record of the data, to log with a training run: see `h5feed.lineage.Source`.

        It does not contain ``x=``, ``rescale=``, ``transform=`` and the like, which change batches that were fetched.

        Raises
        ------
        Preparing, ReadTimeout
        BadParameter
            The weights of a mixture are a function, which a record cannot have.
        """
        return source_of_plan(self._dataset, self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass that the next loop starts."""
        if epoch < 0:
            raise BadParameter(f"epoch={epoch} must be 0 or more")
        self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """The position of the loop, serialisable as JSON: see `h5feed.loops.passes.state_of`."""
        return state_of(self._dataset, self.plan, *self._where())

    def _take_from(self, dataset: Samples) -> None:
        """Take the batches from this dataset from now on; for loops that follow."""
        raise NotImplementedError

    def _catch_up(self) -> None:
        """Take the next pass from the dataset as it is now. Those that are joined to it stay as they were."""
        self._tell_of_joined()
        now = self._grown()
        if now.revision != self._dataset.revision:
            self._take_from(now)

    def _grown(self) -> RemoteDataset:
        """The dataset as it is now."""
        assert isinstance(self._dataset, RemoteDataset)
        now = self._dataset.at()
        # Of several servers, one may not know the last rows yet.
        return now if now.rows >= self._dataset.rows else self._dataset

    def _tell_of_joined(self) -> None:
        """Log once which joined datasets have changed since the loop was made."""
        assert isinstance(self._dataset, RemoteDataset)
        for name, revision, now in self._dataset.joined_that_changed():
            if (name, revision, now) not in _TOLD:
                _TOLD.add((name, revision, now))
                logger.warning(
                    "the dataset %r, which is joined to %r, has revision %s now: the passes go on with revision %s, "
                    "which it had when the loop was made. Make a new loop to read what it has now",
                    name,
                    self._dataset.name,
                    now,
                    revision,
                )

    def _return_to(self, state: Mapping[str, Any]) -> None:
        """Take the rest of a pass from the dataset as it was then."""
        assert isinstance(self._dataset, RemoteDataset)
        revision = state.get("revision") if isinstance(state, Mapping) else None
        if isinstance(revision, str) and not is_provisional(revision) and revision != self._dataset.revision:
            self._take_from(self._dataset.at(revision))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state: the next loop delivers exactly what the saved pass had not delivered yet.

        The number of shards may differ if ``batch_size × shards`` is the same. A loop with ``follow=True`` finishes the
        pass with the rows that it had.

        Raises
        ------
        RevisionChanged
        BadParameter
            The state belongs to another order.
        """
        if self._follow:
            self._return_to(state)
        self._go_to(*position_in(state, self._dataset, self.plan))
