"""Threads and room are shared out among callers."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from h5feed.buffers import PoolExhausted
from h5feed_server.sharing.body_pool import BodyPool
from h5feed_server.sharing.caller import CALLER, KEEPS_UP
from h5feed_server.sharing.fair_threads import MAX_LOST, SPARE, FairThreads

from tests.support.no_threads import no_more_threads
from tests.support.waiting import wait_until

MIB = 1 << 20


@contextmanager
def calling(name: str, *, keeps_up: bool = False) -> Iterator[None]:
    tokens = CALLER.set(name), KEEPS_UP.set(keeps_up)
    yield
    CALLER.reset(tokens[0])
    KEEPS_UP.reset(tokens[1])


def test_one_caller_has_all_threads_but_those_for_others() -> None:
    """Work of one that takes for ever holds up its own, and nobody else's."""
    threads = FairThreads(4, "test")
    go_on, lock, running = threading.Event(), threading.Lock(), [0, 0]

    def take_long() -> None:
        with lock:
            running[0] += 1
            running[1] = max(running)
        go_on.wait(60)
        with lock:
            running[0] -= 1

    with calling("a"):
        long = [threads.submit(take_long) for _ in range(20)]
    wait_until(lambda: running[0] == 4)
    for _ in range(3):
        with calling("b"):
            assert threads.submit(lambda: CALLER.get()).result(60) == "b"
    go_on.set()
    for future in long:
        future.result(60)
    assert running == [0, 4]
    threads.shutdown(wait=True)
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(print)


def test_callers_take_turns() -> None:
    """One that comes late does not wait for all that another has waiting."""
    threads = FairThreads(1, "test")
    gate, order = threading.Event(), list[str]()
    held: list[Future[Any]] = []
    for name in ["x", "y", "z"][: 1 + SPARE]:
        with calling(name):
            held.append(threads.submit(gate.wait, 60))
    with calling("a"):
        many = [threads.submit(order.append, "a") for _ in range(50)]
    with calling("b"):
        few = [threads.submit(order.append, "b") for _ in range(2)]
    gate.set()
    for future in (*held, *many, *few):
        future.result(60)
    assert order.index("b") <= 4 and len(order) == 52
    threads.shutdown(wait=True)


def test_whoever_waits_for_what_raises_stop_iteration_is_told() -> None:
    """The futures of asyncio refuse that error."""
    threads = FairThreads(1, "test")

    async def ask() -> None:
        with calling("a"):
            await asyncio.wait_for(asyncio.wrap_future(threads.submit(next, iter(()))), 60)

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(ask())
    threads.shutdown(wait=True)


def test_what_waits_is_cancelled_at_the_end() -> None:
    """What runs ends, what has not begun never does, and waiting for the threads ends too."""
    threads = FairThreads(2, "test")
    gate = threading.Event()
    with calling("a"):
        begun = [threads.submit(gate.wait, 60) for _ in range(2)]
        late = [threads.submit(gate.wait, 60) for _ in range(5)]
    wait_until(lambda: all(future.running() for future in begun))
    threads.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in late)
    gate.set()
    threads.shutdown(wait=True)
    assert all(future.result() for future in begun)


def test_threads_that_hang_are_replaced() -> None:
    """Work that was given up holds up nobody, not even its own caller; threads that are not needed end."""
    threads = FairThreads(2, "hanging", idle_seconds=0.1)
    gate = threading.Event()
    with calling("a"):
        hanging = [threads.submit(gate.wait, 60) for _ in range(2)]
        waiting = [threads.submit(lambda: CALLER.get()) for _ in range(3)]
        wait_until(lambda: all(work.running() for work in hanging))
        assert not any(work.done() for work in waiting)
        for work in (*hanging, *hanging):
            threads.give_up(work)
        assert [work.result(60) for work in waiting] == ["a"] * 3
        again = [threads.submit(gate.wait, 60) for _ in range(2)]
        wait_until(lambda: all(work.running() for work in again))
        assert threads.busy == 2
    gate.set()
    assert all(work.result(60) for work in (*hanging, *again))
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("hanging-")])
    assert threads.busy == 0 and threads.submit(lambda: 1).result(60) == 1
    threads.shutdown(wait=True)


@pytest.mark.parametrize("ends", ["when all is done", "in the middle", "in the middle, without what waits"])
def test_a_storm_of_work(ends: str) -> None:
    """From many callers, with threads that end at any moment and work that is given up as it ends: none is lost or done
    twice, and no caller has more than its threads."""
    most, callers, each = 3, 8, 1500
    threads = FairThreads(most, "storm", idle_seconds=0.0005)
    done: list[tuple[int, int]] = []
    submitted: list[list[Future[None]]] = [[] for _ in range(callers)]
    running, highest, lock = Counter[str](), Counter[str](), threading.Lock()
    seen: list[int] = []

    def work(caller: int, number: int) -> None:
        name = CALLER.get()
        assert name == f"{caller % 5}"
        with lock:
            running[name] += 1
            highest[name] = max(highest[name], running[name])
        if number % 11 == 0:
            time.sleep(0.0003)
        with lock:
            running[name] -= 1
        done.append((caller, number))

    def call(caller: int) -> None:
        dice = random.Random(caller)
        with calling(f"{caller % 5}"):
            for number in range(each):
                try:
                    submitted[caller].append(threads.submit(work, caller, number))
                except RuntimeError:
                    return
                if ends != "in the middle" and dice.random() < 0.1:
                    # Mostly what runs, or has just ended.
                    threads.give_up(submitted[caller][dice.randrange(max(0, number - 8), number + 1)])
                if dice.random() < 0.02:
                    time.sleep(0.001)
                if number % 100 == 0:
                    seen.append(sum(thread.name.startswith("storm-") for thread in threading.enumerate()))

    crowd = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for one in crowd:
        one.start()
    if ends != "when all is done":
        wait_until(lambda: len(done) > callers * each // 4)
        threads.shutdown(wait=False, cancel_futures="without" in ends)
    for one in crowd:
        one.join(60)
    cancelled = 0
    for futures in submitted:
        for future in futures:
            try:
                future.result(60)
            except CancelledError:
                cancelled += 1
    threads.shutdown(wait=True)
    assert len(done) == len(set(done)) == sum(map(len, submitted)) - cancelled
    assert "without" in ends or not cancelled
    assert ends != "when all is done" or len(done) == callers * each
    assert threads.busy == 0
    assert ends != "in the middle" or max(highest.values()) <= most
    # What was given up counts no more, though it goes on for a moment.
    assert max(seen) <= most + SPARE + MAX_LOST
    if ends == "when all is done":
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("storm-")])


def test_a_system_that_starts_no_threads() -> None:
    """Work waits for the threads that there are; without any, it is refused, and later nothing is missing."""
    threads = FairThreads(2, "scarce", idle_seconds=0.1)
    gate = threading.Event()
    first = threads.submit(gate.wait, 60)
    wait_until(first.running)
    with no_more_threads():
        second = threads.submit(lambda: 2)
        gate.set()
        assert first.result(60) and second.result(60) == 2
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("scarce-")])
        with pytest.raises(MemoryError, match="no thread"):
            threads.submit(lambda: 3)
    assert threads.submit(lambda: 4).result(60) == 4
    threads.shutdown(wait=True)
    assert threads.busy == 0


def test_an_error_is_the_future_s() -> None:
    """Work that fails leaves its thread to the next."""
    threads = FairThreads(1, "test")
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(60)
    assert threads.submit(lambda: 1).result(60) == 1
    threads.shutdown(wait=True)


def test_room_goes_to_who_has_the_least() -> None:
    """One caller alone has all; when it is let go, another that waits comes first, and then who keeps up."""

    async def ask(pool: BodyPool, name: str, keeps_up: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
        with calling(name, keeps_up=keeps_up):
            loop = asyncio.get_running_loop()
            assert await pool.turn(3 * MIB, loop.time(), loop.time() + 60)
            order.append(f"{name}{'+' if keeps_up else ''}")
            return pool.called(lambda: pool.lease(3 * MIB))()

    async def scene() -> None:
        pool = BodyPool(8 * MIB)
        with calling("a"):
            held = [pool.lease(3 * MIB), pool.lease(3 * MIB)]
            with pytest.raises(PoolExhausted) as refusal:
                pool.lease(3 * MIB)
        assert refusal.value.nbytes == 3 * MIB
        assert pool.held()["a"] >= 6 * MIB
        asked = [asyncio.create_task(ask(pool, *one)) for one in [("a", False), ("a", True), ("b", False)]]
        await asyncio.sleep(0.1)
        assert pool.wanted(asyncio.get_running_loop().time()) == {"a": 6 * MIB, "b": 3 * MIB}
        with calling("c"), pytest.raises(PoolExhausted):
            # Small enough, but others were first.
            pool.lease(MIB)
        for _ in range(2):
            held.pop()
            await asyncio.sleep(0.1)
        held.append(await asked[2])
        held.append(await asked[1])
        held.clear()
        asked[1:] = []
        await asked[0]

    order: list[str] = []
    asyncio.run(scene())
    assert order == ["b", "a+", "a"]


def test_memory_that_only_cycles_hold_is_freed_for_those_who_wait() -> None:
    """Errors of requests that were given up are in such cycles, which the collector may not look for by itself."""

    async def scene() -> None:
        pool = BodyPool(4 * MIB)
        cycle: list[Any] = [pool.lease(3 * MIB)]
        cycle.append(cycle)
        del cycle
        now = asyncio.get_running_loop().time()
        assert await pool.turn(3 * MIB, now, now + 60)
        assert len(pool.called(lambda: pool.lease(3 * MIB))()) == 3 * MIB

    gc.disable()
    try:
        asyncio.run(scene())
    finally:
        gc.enable()


def test_nobody_waits_beyond_the_deadline() -> None:
    """Whose turn does not come is told so, and waits no more."""

    async def scene() -> None:
        pool = BodyPool(4 * MIB)
        held = pool.lease(3 * MIB)
        now = asyncio.get_running_loop().time()
        assert not await pool.turn(3 * MIB, now, now + 0.1)
        assert pool.wanted(now) == {}
        del held
        assert len(pool.lease(3 * MIB)) == 3 * MIB

    asyncio.run(scene())
