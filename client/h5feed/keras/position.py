"""The position of training: the pass, the batch, and where the next loop starts."""

from __future__ import annotations

from copy import copy


class Position:
    """The next training batch, and how it changes when a loop starts, ends or is left.

    Parameters
    ----------
    epoch : int
        Number of the first pass.
    batches : int
        Number of batches in a pass.

    Attributes
    ----------
    epoch, batch : int
        The next batch to deliver, and its pass.
    begun_at : tuple of int
        Both at the start of the last ``fit``, or when passes got another length after that.
    earliest : int
        Batches of this ``fit`` before `begun_at`.

    Not thread-safe.
    """

    def __init__(self, epoch: int, batches: int) -> None:
        self.epoch, self.batch = epoch, 0
        self._batches = batches
        self.begun_at = (epoch, 0)
        self.earliest = 0
        self._given = 0
        self._placed = self._resumed = False
        """Whether the next loop starts at a set position, and whether that is in the middle of a pass."""

    def copy(self) -> Position:
        """A copy whose next loop is the rest of the pass."""
        found = copy(self)
        if self.batch:
            found.go_to(self.epoch, self.batch)
        return found

    def go_to(self, epoch: int, batch: int) -> None:
        """Let the next loop start there."""
        self.epoch, self.batch = epoch, batch
        self._placed, self._resumed = True, batch > 0

    def resize(self, batches: int) -> None:
        """Let passes have so many batches from here on."""
        self._batches = batches
        self.begun_at, self.earliest = (self.epoch, self.batch), self._given

    def begin_loop(self) -> None:
        """Start a loop: over a new pass, or over the rest of a resumed one."""
        if self.batch and not self._resumed:
            self.end_pass()
        self._placed = self._resumed = False

    def begin_fit(self, initial_epoch: int, steps: int | None) -> None:
        """Start ``fit`` with epochs of `steps` steps."""
        if initial_epoch and not self._placed:
            # Keras ends an epoch with the run over the batches, even before steps_per_epoch is reached.
            batches = max(1, self._batches)
            steps = min(steps or batches, batches)
            self.epoch, cut = divmod(initial_epoch, -(-batches // steps))
            self.batch = cut * steps
            self._resumed = True
        self.begin_loop()
        self.begun_at = (self.epoch, self.batch)
        self.earliest = self._given = 0

    def advance(self) -> None:
        """A batch was delivered."""
        self.batch += 1
        self._given += 1
        if self.batch == self._batches:
            self.end_pass()

    def end_pass(self) -> None:
        """Move to the start of the next pass."""
        self.epoch, self.batch = self.epoch + 1, 0

    def after(self, batches: int) -> tuple[int, int]:
        """Pass and batch after `batches` batches of the current ``fit``, `earliest` or more."""
        epoch, position = self.begun_at
        passes, position = divmod(position + batches - self.earliest, max(1, self._batches))
        return epoch + passes, position
