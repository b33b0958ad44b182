"""Where training is: in which pass, at which of its batches, and where the next loop is to begin."""

from __future__ import annotations

from copy import copy


class Position:
    """The next batch of training, and what becomes of it when a loop begins, ends or is left.

    Parameters
    ----------
    epoch : int
        Number of the first pass.
    batches : int
        Of one pass.

    Attributes
    ----------
    epoch, batch : int
        The pass, and the batch of it, that is delivered next.
    begun_at : tuple of int
        Both, where the last ``fit`` began.

    Not safe for threads.
    """

    def __init__(self, epoch: int, batches: int) -> None:
        self.epoch, self.batch = epoch, 0
        self._batches = batches
        self.begun_at = (epoch, 0)
        self._placed = self._resumed = False
        """Whether the next loop begins where it was told to, and whether that is in the middle of a pass."""

    def copy(self) -> Position:
        """One that goes on from here: the next loop is the rest of the pass."""
        found = copy(self)
        if self.batch:
            found.go_to(self.epoch, self.batch)
        return found

    def go_to(self, epoch: int, batch: int) -> None:
        """The next loop begins there, and delivers nothing of what lies before."""
        self.epoch, self.batch = epoch, batch
        self._placed, self._resumed = True, batch > 0

    def begin_loop(self) -> None:
        """A loop begins: with a new pass, or with the rest of one that was resumed."""
        if self.batch and not self._resumed:
            self.end_pass()
        self._placed = self._resumed = False

    def begin_fit(self, initial_epoch: int, steps: int | None) -> None:
        """``fit`` begins, with epochs of so many steps."""
        if initial_epoch and not self._placed:
            # Keras ends an epoch where a run over the batches ends, also when steps_per_epoch would go on.
            batches = max(1, self._batches)
            steps = min(steps or batches, batches)
            self.epoch, cut = divmod(initial_epoch, -(-batches // steps))
            self.batch = cut * steps
            self._resumed = True
        self.begin_loop()
        self.begun_at = (self.epoch, self.batch)

    def advance(self) -> None:
        """A batch was delivered."""
        self.batch += 1
        if self.batch == self._batches:
            self.end_pass()

    def end_pass(self) -> None:
        """What is delivered next begins another pass."""
        self.epoch, self.batch = self.epoch + 1, 0

    def after(self, batches: int) -> tuple[int, int]:
        """Pass and batch after so many batches of the ``fit`` under way."""
        epoch, position = self.begun_at
        passes, position = divmod(position + batches, max(1, self._batches))
        return epoch + passes, position
