"""Where training is: in which pass, at which of its batches, and where the next loop is to begin."""

from __future__ import annotations

from copy import copy


class Course:
    """The next batch of training, and what becomes of it when a loop begins, ends or is left.

    Parameters
    ----------
    epoch : int
        Number of the first pass.
    batches : int
        Of one pass.

    Attributes
    ----------
    epoch, position : int
        The pass, and the batch of it, that is delivered next.
    begun_at : tuple of int
        Both, where the last ``fit`` began.

    Not safe for threads.
    """

    def __init__(self, epoch: int, batches: int) -> None:
        self.epoch, self.position = epoch, 0
        self._batches = batches
        self.begun_at = (epoch, 0)
        self._counted = False
        """Whether the pass under way is one of training, or a loop that only looked at a batch."""
        self._placed = self._resumed = False
        """Whether the next loop begins where it was told to, and whether that is in the middle of a pass."""
        self._tickets: dict[int, int] = {}

    def copy(self) -> Course:
        """One that goes on from here: the next loop is the rest of the pass, if that is one of training."""
        found = copy(self)
        if self._counted:
            found.go_to(self.epoch, self.position)
        else:
            found.end_pass()
        return found

    def go_to(self, epoch: int, position: int) -> None:
        """The next loop begins there, and delivers nothing of what lies before."""
        self.epoch, self.position = epoch, position
        self._tickets = {index: index for index in range(position)}
        self._counted = self._resumed = position > 0
        self._placed = True

    def begin_loop(self) -> None:
        """A loop begins: with a new pass, or with the rest of one that was resumed."""
        if self.position and not self._resumed:
            self.end_pass()
        self._placed = self._resumed = False
        self._tickets.clear()

    def begin_fit(self, initial_epoch: int, steps: int | None) -> None:
        """``fit`` begins, with epochs of so many steps."""
        if initial_epoch and not self._placed:
            # Keras ends an epoch where a run over the batches ends, also when steps_per_epoch would go on.
            batches = max(1, self._batches)
            steps = min(steps or batches, batches)
            self.epoch, cut = divmod(initial_epoch, -(-batches // steps))
            self.position = cut * steps
            self._resumed = True
        self.begin_loop()
        self.begun_at = (self.epoch, self.position)

    def count(self) -> None:
        """The pass under way is one of training: the next has another number, however this one ends."""
        self._counted, self._placed, self._resumed = True, False, False

    def advance(self) -> None:
        """A batch was delivered."""
        self.position += 1
        if self.position == self._batches:
            # A look at a few batches outside of fit does not make a training pass; all of them do.
            self._counted = True
            self.end_pass()

    def end_pass(self) -> None:
        """What is delivered next begins a pass; it has a new number where this one was for training."""
        self.epoch += self._counted
        self.position = 0
        self._tickets.clear()
        self._counted = False

    def ticket(self, index: int) -> int | None:
        """Which batch of this pass was given for `index`, in a loop of the user's own."""
        return self._tickets.get(index)

    def keep_ticket(self, index: int, position: int) -> None:
        """`index` is given batch `position` for as long as the pass lasts."""
        if self.position:
            self._tickets[index] = position

    def after(self, batches: int) -> tuple[int, int]:
        """Pass and batch after so many batches of the ``fit`` under way."""
        epoch, position = self.begun_at
        passes, position = divmod(position + batches, max(1, self._batches))
        return epoch + passes, position
