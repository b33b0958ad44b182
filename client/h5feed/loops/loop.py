"""What all loops over a split have in common: where they are, how they go on from there, and what they waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ..errors import BadParameter
from ..plan import Plan
from ..remote_dataset import RemoteDataset
from .meter import Meter
from .passes import described, position_in, state_of
from .wait_stats import LoopStats


class Loop(ABC):
    """A loop over the batches of a plan, pass after pass.

    Subclasses have `plan`, `_dataset` and `_meter`, and say by `_where` and `_go_to` where they are.
    """

    _dataset: RemoteDataset
    _meter: Meter

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """Which rows come, in how many batches."""

    @abstractmethod
    def _where(self) -> tuple[int, int]:
        """Number of the pass that the next batch belongs to, and how many of its batches were delivered."""

    @abstractmethod
    def _go_to(self, epoch: int, delivered: int) -> None:
        """Have the next loop deliver what such a pass has left."""

    @abstractmethod
    def close(self) -> None:
        """End the read-ahead and its threads; the next batch asked for begins it anew."""

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
        """Number of the pass that the next batch belongs to, or that the next loop begins."""
        return self._where()[0]

    @property
    def waited(self) -> float:
        """Seconds that the loop has waited for batches: see `stats`."""
        return self.stats().waited

    def stats(self) -> LoopStats:
        """What the loop has done so far, how long it has waited for data, and what for; a table when printed."""
        return self._meter.stats()

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the number of the pass that the next loop begins."""
        if epoch < 0:
            raise BadParameter(f"epoch={epoch} must be 0 or more")
        self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is, as plain values that JSON can hold: see `h5feed.loops.passes.state_of`."""
        return state_of(self._dataset, self.plan, *self._where())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next loop delivers exactly what that pass had not delivered yet.

        It may be taken up by more or fewer shards, if ``batch_size × shards`` is the same.

        Raises
        ------
        RevisionChanged
        BadParameter
            It is the state of another order.
        """
        self._go_to(*position_in(state, self._dataset, self.plan))
