"""The simulation of replicas holds to what bounds it: links, cores, and what training loops ask for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scale_sim import Deployment, simulate, simulate_loops

BATCH_BYTES = 4_000_000
LINK = 400e6
"""100 batches a second."""

PLAN = Deployment(
    replicas=1,
    clients=4,
    batch_bytes=BATCH_BYTES,
    cpu_seconds=0.001,
    step_seconds=0.001,
    cores=4,
    replica_rate=LINK,
    client_rate=1e12,
)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_links_of_replicas_add_up(replicas: int) -> None:
    found = simulate(replace(PLAN, replicas=replicas), 10)
    assert found.limit == "server links"
    assert found.rate == pytest.approx(replicas * LINK, rel=0.03)


def test_the_link_of_a_client_bounds_it() -> None:
    found = simulate(replace(PLAN, clients=1, replicas=4, client_rate=LINK), 10)
    assert found.limit == "client links"
    assert found.rate == pytest.approx(LINK, rel=0.03)


def test_cores_bound_what_they_serve() -> None:
    plan = replace(PLAN, cpu_seconds=0.05, cores=2, replica_rate=1e12, jitter=0.0)
    found = simulate(plan, 20)
    assert found.limit == "server cores"
    assert found.rate == pytest.approx(2 / 0.05 * BATCH_BYTES, rel=0.03)


def test_loops_that_ask_for_little_do_not_wait() -> None:
    """Half of what the link gives: after the start, each step finds its batch."""
    found = simulate(replace(PLAN, step_seconds=4 * 2 * BATCH_BYTES / LINK), 20)
    assert found.limit == "steps"
    assert found.rate == pytest.approx(LINK / 2, rel=0.03)
    assert found.utilisation > 0.98 and np.quantile(found.waits, 0.99) < 0.001


def test_a_saturated_link_is_shared_evenly() -> None:
    """The wait of a step is what is left of its share of the link."""
    found = simulate(replace(PLAN, step_seconds=0.01), 20)
    share = PLAN.clients * BATCH_BYTES / LINK
    assert np.mean(found.waits) == pytest.approx(share - 0.01, rel=0.05)
    assert found.utilisation == pytest.approx(0.01 / share, rel=0.05)


def test_the_same_plan_has_the_same_outcome() -> None:
    first, second = simulate(PLAN, 2), simulate(PLAN, 2)
    assert first.rate == second.rate and np.array_equal(first.waits, second.waits)


def test_loops_that_end() -> None:
    """What is under way at the end of a loop is lost, and a loop that is long enough hardly notices."""
    plan = replace(PLAN, clients=1)
    short, long = (simulate_loops(plan, batches, 2)[-1] / (batches * BATCH_BYTES / LINK) for batches in (20, 2000))
    assert 1.0 < long < 1.03 and long < short < 2.0
