"""Keeps one actor on each node of a Ray cluster, while nodes join, fail and leave."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_LIST_SECONDS = 1.0
"""Interval between look-ups of the nodes."""

SILENT_SECONDS = 60.0
"""An actor that has not answered for this long is replaced."""

START_SECONDS = 300.0
"""The same for its first answer: Ray waits for free CPUs, and Python is slow to start on a busy file system."""

_FIRST_REST, _LONGEST_REST = 1.0, 30.0
"""Seconds until an actor is replaced: after its n-th failure in a row, min(longest, first · 2ⁿ)."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes
    ----------
    address, name : str
        Its IP address, and its host name.
    cpus : int
        Those that it lends to tasks.
    """

    id: str
    address: str
    name: str
    cpus: int


@dataclass(frozen=True)
class Lost:
    """Why an actor was lost.

    Attributes
    ----------
    has_left : bool
        Whether its node has left the cluster.
    """

    why: str
    has_left: bool = False


@dataclass
class _Place:
    """A node, and its actor if there is one."""

    node: Node
    actor: Any = None
    asked: Any = None
    """What the pending answer is waited for with."""
    asked_at: float = 0.0
    has_answered: bool = False
    failures: int = 0
    rests_until: float = 0.0


@dataclass
class NodeActors:
    """The actors.

    Parameters
    ----------
    ray : module
    make : callable
        Given a node, returns the class of its actor, the CPUs that it takes from other tasks, and its arguments; None
        if the node is to have none. Its method ``report`` is called again and again.
    order : callable
        Given a node, returns the arguments of the next call of ``report``.
    """

    ray: Any
    make: Callable[[Node], tuple[type, int, tuple[Any, ...]] | None]
    order: Callable[[Node], tuple[Any, ...]] = lambda node: ()
    _places: dict[str, _Place] = field(default_factory=dict)
    _listed_at: float = float("-inf")

    @property
    def nodes(self) -> list[Node]:
        """Those that have, or are to have, an actor."""
        return [place.node for place in self._places.values()]

    def actor(self, node: Node) -> Any:
        """The actor on a node; None if there is none at present."""
        place = self._places.get(node.id)
        return None if place is None else place.actor

    def reports(self, seconds: float) -> Iterator[tuple[Node, Any]]:
        """Ask all actors for their reports, and yield those that arrive within this time; `Lost` for lost actors."""
        yield from self._list()
        for place in list(self._places.values()):
            self._begin(place)
        pending = {place.asked: place for place in self._places.values() if place.asked is not None}
        if not pending:
            time.sleep(seconds)
            return
        deadline = time.monotonic() + seconds
        waiting = list(pending)
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            arrived, waiting = self.ray.wait(waiting, num_returns=1, timeout=left)
            if not arrived:
                break
            for reference in arrived:
                place = pending[reference]
                yield place.node, self._take(place)
        time.sleep(max(0.0, deadline - time.monotonic()))
        for place in list(self._places.values()):
            if place.asked is not None and time.monotonic() - place.asked_at > SILENT_SECONDS:
                what = (
                    "has not responded" if place.has_answered else "was not started, for lack of free CPUs or memory,"
                )
                yield place.node, self._lose(place, f"it {what} for {SILENT_SECONDS:.0f} s")

    def close(self) -> None:
        """End all actors."""
        for place in self._places.values():
            self._kill(place)
        self._places.clear()

    def _list(self) -> Iterator[tuple[Node, Lost]]:
        """Look the nodes up, if it is time to."""
        now = time.monotonic()
        if now - self._listed_at < _LIST_SECONDS:
            return
        self._listed_at = now
        alive = {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}
        for place in [place for id, place in self._places.items() if id not in alive]:
            self._kill(place)
            del self._places[place.node.id]
            yield place.node, Lost("the node has left the cluster", has_left=True)
        for id, found in alive.items():
            if id not in self._places:
                cpus = int(found["Resources"].get("CPU", 0))
                node = Node(id, found["NodeManagerAddress"], found["NodeManagerHostname"], cpus)
                if self.make(node) is not None:
                    self._places[id] = _Place(node)

    def _begin(self, place: _Place) -> None:
        """Create the actor of a node if it has none, and ask it if it is not asked yet."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if place.actor is None and time.monotonic() >= place.rests_until and (made := self.make(place.node)):
            kind, cpus, arguments = made
            strategy = NodeAffinitySchedulingStrategy(place.node.id, soft=False)
            place.actor = self.ray.remote(num_cpus=cpus, scheduling_strategy=strategy)(kind).remote(*arguments)
        if place.actor is not None and place.asked is None:
            place.asked, place.asked_at = place.actor.report.remote(*self.order(place.node)), time.monotonic()

    def _take(self, place: _Place) -> Any:
        reference, place.asked = place.asked, None
        try:
            report = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return self._lose(place, _reason(error))
        place.failures, place.has_answered = 0, True
        return report

    def _lose(self, place: _Place, why: str) -> Lost:
        self._kill(place)
        place.failures += 1
        rest = min(_LONGEST_REST, _FIRST_REST * 2 ** min(place.failures, 16))
        place.rests_until = time.monotonic() + rest
        return Lost(why)

    def _kill(self, place: _Place) -> None:
        actor, place.actor, place.asked, place.has_answered = place.actor, None, None, False
        if actor is not None:
            # It may have ended already.
            with contextlib.suppress(Exception):
                self.ray.kill(actor)


def _reason(error: Exception) -> str:
    """The message of an error of Ray in one line: that of what was raised on the node, without its traceback."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).strip().splitlines() if line.strip()]
    if cause is None and "Traceback" in str(error):
        return lines[-1][:500]
    return " ".join(lines)[:500]
