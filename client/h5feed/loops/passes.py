"""Passes over an order, for people to read, and the state from which one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadParameter, RevisionChanged
from ..plan import Plan
from ..remote_dataset import RemoteDataset

STATE_VERSION = 1

_NOT_ORDER = ("revision", "epoch", "fields", "encoded", "batch_size", "shard", "shards")
"""Parameters that may differ between who left a pass and who takes it up; the rows of a step may not."""


def described(dataset: RemoteDataset, plan: Plan) -> str:
    """A plan for people to read: which rows, in how many batches."""
    drawn = ", a new order each pass" if plan.is_drawn else ""
    shards = int(plan.params.get("shards", 1))
    shared = f", shard {plan.params.get('shard', 0)} of {shards}" if shards > 1 else ""
    batches = f"{plan.batches:,} batches of {plan.batch_size}{shared}{drawn}"
    return f"{plan.params['split']!r} of {dataset.name!r}: {plan.rows:,} rows, {batches}"


def state_of(dataset: RemoteDataset, plan: Plan, epoch: int, delivered: int) -> dict[str, Any]:
    """Where a pass is left, as plain values that JSON can hold.

    Parameters
    ----------
    epoch : int
        Number of the pass.
    delivered : int
        Its batches that were delivered; of several shards, each has delivered as many.
    """
    if delivered >= plan.batches:
        epoch, delivered = epoch + 1, 0
    return {
        "version": STATE_VERSION,
        "dataset": dataset.name,
        "revision": dataset.revision,
        "spec": _spec(plan),
        "step_rows": _step_rows(plan),
        "epoch": epoch,
        "delivered": delivered,
    }


def position_in(state: Mapping[str, Any], dataset: RemoteDataset, plan: Plan) -> tuple[int, int]:
    """Number of the pass, and of its first batch that was not delivered.

    Shards may be more or fewer than they were, if a step has as many rows as before: then they share the rest of the
    same global order.

    Raises
    ------
    RevisionChanged
        The data are not those of the state.
    BadParameter
        It is the state of another order, or none at all.
    """
    try:
        version, revision = state["version"], state["revision"]
        spec, step_rows = dict(state["spec"]), int(state["step_rows"])
        epoch, delivered = int(state["epoch"]), int(state["delivered"])
    except (KeyError, TypeError, ValueError):
        raise BadParameter("this is no state of a pass: give what state_dict() returned") from None
    if version != STATE_VERSION:
        raise BadParameter(f"the state has version {version!r}, and this h5feed reads version {STATE_VERSION}")
    if revision != dataset.revision:
        raise RevisionChanged(
            f"the state is one of {state.get('dataset')!r}, revision {revision}, and this is {dataset.name!r}, "
            f"revision {dataset.revision}: begin anew, with set_epoch({epoch}), or serve the data that it was made with"
        )
    here = _spec(plan)
    for name in sorted(spec.keys() | here.keys()):
        if spec.get(name) != here.get(name):
            raise BadParameter(f"the state is one of {name}={spec.get(name)}, and here it is {name}={here.get(name)}")
    if step_rows != _step_rows(plan):
        raise BadParameter(
            f"the state is one of {step_rows} rows a step, and here it is {_step_rows(plan)}: keep batch_size × shards"
        )
    if not 0 <= delivered <= plan.batches or epoch < 0:
        raise BadParameter(f"the state says {delivered} of {plan.batches} batches of epoch {epoch}: it cannot be right")
    return (epoch, delivered) if delivered < plan.batches else (epoch + 1, 0)


def _spec(plan: Plan) -> dict[str, str]:
    return {name: value for name, value in sorted(plan.params.items()) if name not in _NOT_ORDER}


def _step_rows(plan: Plan) -> int:
    return plan.batch_size * int(plan.params.get("shards", 1))
