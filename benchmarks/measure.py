"""Ratios of contestants that take turns: a noisy machine slows both, and the ratio stays."""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Turn = Callable[[], int]
"""One turn of a contestant: does some work, returns how many units (rows or bytes) it delivered."""


@dataclass(frozen=True)
class Figure:
    """One ratio: how many times as fast as `theirs` the `ours` is.

    Attributes
    ----------
    name : str
    ours : dict of str to str
        Variant shown in the table, to the name of the contestant that measures it; the best is the figure.
    theirs : dict of str to str
        Variant to contestant, same variants.
    target : float
        The ratio that we want to reach.
    smaller : bool
        Smaller is better.
    highest : float
        What a ratio that must not be far from 1 may be at most.
    """

    name: str
    ours: Mapping[str, str]
    theirs: Mapping[str, str]
    target: float
    smaller: bool = False
    highest: float = math.inf


@dataclass(frozen=True)
class Measured:
    """What came out for one variant of a figure: the median over all rounds, and the range.

    Attributes
    ----------
    ours, theirs : float
        Units per second.
    """

    figure: Figure
    variant: str
    ratio: float
    low: float
    high: float
    ours: float
    theirs: float

    @property
    def is_reached(self) -> bool:
        """Whether the ratio is at the target, or better."""
        if self.figure.smaller:
            return self.ratio <= self.figure.target
        return self.figure.target <= self.ratio <= self.figure.highest


Rates = Mapping[str, Sequence[float]]
"""Contestant to units per second, one for each round."""


def take_turns(contestants: Mapping[str, Turn], rounds: int) -> Rates:
    """Let all contestants work in turn, once to warm up and then `rounds` times."""
    for turn in contestants.values():
        turn()
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        # Every second round backwards, so that nobody always follows the same neighbour.
        order = list(contestants.items())
        for name, turn in order if number % 2 == 0 else reversed(order):
            began = time.perf_counter()
            units = turn()
            rates[name].append(units / (time.perf_counter() - began))
    return rates


def compare(figure: Figure, rates: Rates) -> list[Measured]:
    """The figure's variants, from the ratios within each round."""
    found = []
    for variant, ours in figure.ours.items():
        theirs = figure.theirs[variant]
        ratios = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
        found.append(
            Measured(
                figure,
                variant,
                median(ratios),
                min(ratios),
                max(ratios),
                median(rates[ours]),
                median(rates[theirs]),
            )
        )
    return found


def best(measured: Sequence[Measured]) -> Measured:
    """The best variant of a figure."""
    return max(measured, key=lambda one: -one.ratio if one.figure.smaller else one.ratio)


def in_threads(work: Callable[[int], int], threads: int) -> int:
    """Sum of ``work(0) … work(threads-1)``, run at the same time; the first error is raised."""
    units = [0] * threads
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            units[number] = work(number)
        except BaseException as error:  # raised below, in the caller's thread
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    return sum(units)


def count(text: str) -> int:
    """An option that says how many.

    Raises
    ------
    argparse.ArgumentTypeError
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be 1 or more")
    return number


def seconds(text: str) -> float:
    """An option that says how long.

    Raises
    ------
    argparse.ArgumentTypeError
    """
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return number
