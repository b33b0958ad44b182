"""Read-ahead: in order, bounded, errors in their place, as many requests as the link needs, no thread left."""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from h5feed.blocks import Block, Fetch, blocks_of
from h5feed.fetching.readahead import BYTES_PER_BLOCK, FEW_BLOCKS, ReadAhead
from h5feed.net.concurrency import FIRST_BYTES, MAX_WIDTH, NEAR_WIDTH, Link, Pace
from h5feed.net.transport import FeedTransport

from tests.support.waiting import wait_until


def numbers(block: Block, cancelled: threading.Event) -> list[int]:
    time.sleep(random.random() * 0.003)
    return list(range(block.start, block.stop))


def ahead(fetch: Fetch[int], batches: int, max_bytes: int = 10_000, connections: int = 4) -> ReadAhead[int]:
    blocks = blocks_of(0, batches, 100, 300)
    pace = Pace(max_bytes, connections, Link(connections))
    return ReadAhead(fetch, blocks, max_bytes=max_bytes, deadline=100, pace=pace)


def readahead_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("h5feed-readahead")}


def test_delivered_in_order() -> None:
    """Whatever comes first, batches are delivered in order, each once."""
    assert list(ahead(numbers, 100)) == list(range(100))
    assert list(ahead(numbers, 0)) == []


def test_small_batches_share_a_block() -> None:
    """Small batches are asked for together, big ones alone, and none is left out."""
    assert [(b.start, b.stop) for b in blocks_of(0, 7, 100, 300)] == [(0, 3), (3, 6), (6, 7)]
    assert [(b.start, b.stop) for b in blocks_of(0, 2, 1000, 300)] == [(0, 1), (1, 2)]
    assert [(b.start, b.stop) for b in blocks_of(0, 4, 1, 300, start=2)] == [(2, 4)]


@pytest.mark.parametrize("nbytes", [1, 99, 100, 250, 300, 699, 700, 10_000])
def test_blocks_are_cut_between_batches(nbytes: int) -> None:
    """A block is cut into parts of whole batches, and its bytes with it, at least one batch each."""
    rest: Block | None = Block(3, 5, 12, 700)
    parts = []
    while rest is not None:
        part, rest = rest.cut(nbytes)
        assert part.epoch == 3 and (part.nbytes <= nbytes or part.stop - part.start == 1)
        parts.append(part)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(5, 12))
    assert sum(part.nbytes for part in parts) == 700


@pytest.mark.parametrize("bound", [1, 100, 250, 900, 10_000])
def test_bounded_in_bytes(bound: int) -> None:
    """Blocks that are fetched and not passed by never exceed the bound; one batch always is fetched."""
    lock = threading.Lock()
    fetched: list[Block] = []

    def fetch(block: Block, cancelled: threading.Event) -> list[int]:
        with lock:
            fetched.append(block)
        return numbers(block, cancelled)

    stream = ahead(fetch, 100, bound)
    for expected in range(100):
        # What batches before this one held has been given back by now.
        with lock:
            held = sum(block.nbytes for block in fetched if block.stop > expected)
        assert held <= max(bound, 100)
        assert next(stream) == expected
    stream.close()


def test_an_error_comes_in_its_place() -> None:
    """Batches before a failed block are delivered, then its error is raised."""

    def fetch(block: Block, cancelled: threading.Event) -> list[int]:
        if block.start <= 9 < block.stop:
            raise OSError("batch 9")
        return numbers(block, cancelled)

    stream: ReadAhead[int] = ahead(fetch, 100, 400)
    seen: list[int] = []
    with pytest.raises(OSError, match="batch 9"):
        deque(map(seen.append, stream))
    assert seen == list(range(9))


def test_an_error_of_the_blocks_comes_behind_them() -> None:
    """Where it cannot be said what comes next, what came before is delivered, then the error is raised."""

    def blocks() -> Iterator[Block]:
        yield from blocks_of(0, 6, 100, 300)
        raise OSError("no more blocks")

    stream: ReadAhead[int] = ReadAhead(numbers, blocks(), max_bytes=10_000, deadline=100)
    seen: list[int] = []
    with pytest.raises(OSError, match="no more blocks"):
        deque(map(seen.append, stream))
    assert seen == list(range(6))


def test_a_batch_that_does_not_come_is_an_error() -> None:
    """Waiting has a deadline, whatever the threads do."""
    told = threading.Event()

    def never(block: Block, cancelled: threading.Event) -> list[int]:
        told.wait(100)
        return []

    stream = ReadAhead(never, blocks_of(0, 3, 100, 300), max_bytes=1000, deadline=0.2)
    with pytest.raises(ConnectionError, match="deadline"):
        next(stream)
    told.set()
    stream.close()


@pytest.mark.parametrize("end", ["close", "drop", "exhaust"])
def test_threads_end(end: str) -> None:
    """Closing, dropping and exhausting it ends its threads, and tells a fetch under way."""
    told = threading.Event()

    def slow(block: Block, cancelled: threading.Event) -> list[int]:
        if block.start and cancelled.wait(100):
            told.set()
        return list(range(block.start, block.stop))

    before = readahead_threads()
    stream = ahead(numbers if end == "exhaust" else slow, 100, 400)
    assert next(stream) == 0
    if end == "close":
        stream.close()
    elif end == "exhaust":
        assert len(list(stream)) == 99
    del stream
    gc.collect()
    assert end == "exhaust" or told.wait(60)
    wait_until(lambda: readahead_threads() <= before)


def test_no_more_threads_than_work() -> None:
    """However many requests there may be, one block makes no crowd of threads."""
    release = threading.Event()
    begun: list[Block] = []

    def fetch(block: Block, cancelled: threading.Event) -> list[int]:
        begun.append(block)
        release.wait(100)
        return list(range(block.start, block.stop))

    before = readahead_threads()
    stream = ReadAhead(fetch, blocks_of(0, 2, 100, 100), max_bytes=1000, deadline=100, pace=Pace(1000, 32, Link(32)))
    wait_until(lambda: len(begun) == 2)
    # More would come soon after.
    time.sleep(0.1)
    assert len(readahead_threads() - before) <= 3
    release.set()
    assert list(stream) == [0, 1]


def test_a_fork_begins_anew() -> None:
    """In the child the stream says that its threads are elsewhere; dropping it there leaves the parent's alone."""
    stream = ahead(numbers, 100, 400)
    assert next(stream) == 0
    pid = os.fork()
    if pid == 0:
        told = False
        try:
            deque(stream, maxlen=0)
        except RuntimeError:
            told = True
        stream.close()
        os._exit(0 if told else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert list(stream) == list(range(1, 100))


class SimulatedLink:
    """A link of so many bytes per second, shared by all requests, each of which carries so much at most."""

    def __init__(self, bandwidth: float, round_trip: float, each: float, cost: float = 0.0) -> None:
        self.bandwidth, self.round_trip, self.each, self.cost = bandwidth, round_trip, each, cost

    def rate(self, width: int, block_bytes: int) -> float:
        """Bytes per second with that many requests under way."""
        share = min(self.each, self.bandwidth / width)
        alone = width * block_bytes / (self.round_trip + block_bytes / share)
        return min(self.bandwidth, alone) * math.pow(1 - self.cost, max(0.0, math.log2(width / NEAR_WIDTH)))

    def feed(self, pace: Pace, seconds: float, seed: int) -> float:
        """Bytes per second over that time. How busy the machine is with other work changes every 250 ms."""
        chance = random.Random(seed)
        now = changed = nbytes = 0.0
        free = 1.0
        while now < seconds:
            while changed <= now:
                free, changed = math.exp(0.8 * math.log(free) + chance.gauss(0, 0.2)), changed + 0.25
            block = min(pace.block_bytes(now), 8 << 20)
            now += block / (self.rate(pace.width, block) * free)
            nbytes += block
            pace.arrived(block, now, now)
        return nbytes / now

    def drive(self, pace: Pace, blocks: int, noise: float = 0.0, demand: float = 1e12) -> list[int]:
        """The widths that `pace` goes through."""
        chance = random.Random(0)
        now = waited = 0.0
        widths = []
        for _ in range(blocks):
            nbytes = min(pace.block_bytes(now), 8 << 20)
            rate = self.rate(pace.width, nbytes) * (1 + chance.uniform(-noise, noise))
            now += nbytes / min(rate, demand)
            waited += nbytes / min(rate, demand) if rate < demand else 0.0
            pace.arrived(nbytes, now, waited)
            widths.append(pace.width)
        return widths


BUDGET = 64 << 20


def test_width_grows_where_requests_wait_for_the_link() -> None:
    """At 100 ms, where a connection carries 5 MB/s, many requests fill a link of 100 MB/s; on the loopback two do."""
    far = SimulatedLink(100e6, 0.1, 5e6)
    pace = Pace(BUDGET)
    assert far.drive(pace, 600)[-1] >= 16
    near = SimulatedLink(1e9, 0.0001, 1e9)
    for noise in (0.0, 0.1):
        widths = near.drive(Pace(BUDGET), 3000, noise)
        assert sum(widths) / len(widths) < 4


@pytest.mark.parametrize("seed", range(4))
def test_what_it_finds_is_as_fast_as_the_best(seed: int) -> None:
    """On a busy machine with few processors, where twice the requests cost a tenth; and on one with many."""
    few = SimulatedLink(1.5e9, 0.0001, 1.5e9, cost=0.1)
    assert few.feed(Pace(BUDGET), 20, seed) > 0.99 * few.feed(Pace(BUDGET, 2), 20, seed)
    many = SimulatedLink(6e9, 0.0001, 1e9)
    best = many.feed(Pace(BUDGET, 8, Link(8, 8)), 60, seed)
    assert many.feed(Pace(BUDGET), 60, seed) > 0.97 * best


def test_streams_that_are_short_find_it_too() -> None:
    """What looked better while other work paused is given up by one of the next streams."""
    few, link = SimulatedLink(1.5e9, 0.0001, 1.5e9, cost=0.1), Link()
    rates = [few.feed(Pace(BUDGET, link=link), 2, seed) / few.feed(Pace(BUDGET, 2), 2, seed) for seed in range(30)]
    assert sum(rates) / len(rates) > 0.97


def test_a_slow_name_server_makes_no_distant_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a connection takes 20 ms here, but the round trip of the loopback is what counts."""
    real = socket.create_connection

    def slowly(*about: Any, **more: Any) -> socket.socket:
        time.sleep(0.02)
        return real(*about, **more)

    monkeypatch.setattr(socket, "create_connection", slowly)
    transport = FeedTransport()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        transport._connect(("http", "127.0.0.1", listening.getsockname()[1]), 10).close()
    assert transport.round_trip < 0.02
    assert Link.of(0.001, 1).width == NEAR_WIDTH < Link.of(0.02, 1).width


def test_width_stays_where_training_does_not_wait() -> None:
    """As soon as the link feeds what training takes, nothing more is tried."""
    link = SimulatedLink(100e6, 0.1, 20e6)
    widths = link.drive(Pace(BUDGET), 500, demand=30e6)
    assert widths[-1] <= 8 and len(set(widths[100:])) == 1


def test_the_bound_holds_and_what_was_learned_is_kept() -> None:
    """No more requests than the user allows; the next stream begins where this one was."""
    far = SimulatedLink(1e9, 0.1, 5e6)
    assert max(far.drive(Pace(BUDGET, connections=3), 500)) == 3
    link = Link()
    assert max(far.drive(Pace(BUDGET, link=link), 2000)) == MAX_WIDTH
    assert Pace(BUDGET, link=link).width == MAX_WIDTH
    far.drive(Pace(BUDGET, connections=3, link=link), 500)
    assert link.width == MAX_WIDTH


def test_blocks_begin_small() -> None:
    """The first ones are little; with each that arrives they double, and all that may be under way fits the budget."""
    pace = Pace(BUDGET, link=Link(4))
    sizes = [pace.block_bytes(0.0) for _ in range(4)]
    for number in range(10):
        pace.arrived(sizes[number], 0.001 * (number + 1), 0.0)
        sizes.append(pace.block_bytes(0.001 * (number + 1)))
    assert sizes[:7] == [FIRST_BYTES] * 4 + [2 * FIRST_BYTES, 4 * FIRST_BYTES, 8 * FIRST_BYTES]
    assert sizes[-1] * pace.width * 2 <= BUDGET
    assert Pace(1000).block_bytes(0.0) <= 250


def test_slow_links_are_not_choked_at_the_start() -> None:
    """Of 1 MB/s, shared by eight requests, no more is asked for than comes within seconds."""
    pace = Pace(BUDGET, link=Link(8))
    asked = [pace.block_bytes(0.0) for _ in range(8)]
    for number in range(24):
        # They come one after the other where the link is full.
        now = sum(asked[: number + 1]) / 1e6
        pace.arrived(asked[number], now, now)
        asked.append(pace.block_bytes(now))
    assert max(asked) == FIRST_BYTES


def test_many_requests_hide_the_round_trip() -> None:
    """Of a stream of big batches, with 50 ms for each request, more and more are under way at the same time."""
    lock = threading.Lock()
    under_way = 0
    most = 0

    def fetch(block: Block, cancelled: threading.Event) -> list[int]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        cancelled.wait(0.05)
        with lock:
            under_way -= 1
        return list(range(block.start, block.stop))

    stream = ReadAhead(fetch, blocks_of(0, 300, FIRST_BYTES, FIRST_BYTES), max_bytes=BUDGET, deadline=100)
    assert list(stream) == list(range(300))
    assert most >= 4 * NEAR_WIDTH


def test_tiny_passes_are_not_fetched_by_the_thousand() -> None:
    """Of passes over a few bytes, which no bound in bytes would ever end, only some are fetched ahead."""
    asked: list[int] = []

    def fetch(block: Block, cancelled: threading.Event) -> list[int]:
        asked.append(block.epoch)
        return [block.epoch]

    endless = (Block(epoch, 0, 1, 1) for epoch in itertools.count())
    reading = ReadAhead(fetch, endless, max_bytes=64 << 20, deadline=100, pace=Pace(64 << 20, 4, Link(4)))
    assert [next(reading) for _ in range(500)] == list(range(500))
    time.sleep(0.2)
    ahead_of = FEW_BLOCKS + (64 << 20) // BYTES_PER_BLOCK
    assert len(asked) <= 500 + ahead_of
    reading.close()


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_no_more_than_the_next_pass_is_read_ahead(batches: int) -> None:
    """However small passes are, those after the next one are not asked for."""
    asked: list[int] = []

    def fetch(block: Block, cancelled: threading.Event) -> list[tuple[int, int]]:
        asked.append(block.lap)
        return [(block.lap, index) for index in range(block.start, block.stop)]

    endless = (Block(0, index, index + 1, 10, lap=lap) for lap in itertools.count() for index in range(batches))
    reading = ReadAhead(fetch, endless, max_bytes=64 << 20, deadline=100, pace=Pace(64 << 20, 4, Link(4)))
    for lap in range(20):
        for index in range(batches):
            assert next(reading) == (lap, index)
            assert max(asked) <= lap + 1
    wait_until(lambda: asked.count(20) == batches)
    time.sleep(0.2)
    assert max(asked) == 20
    reading.close()
