"""The state from which a pass is resumed, and a readable description of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadParameter, RevisionChanged
from ..plan import Plan, conditions_text
from ..revisions import is_provisional
from ..samples import Samples

STATE_VERSION = 1


def described(dataset: Samples, plan: Plan) -> str:
    """A readable description of a plan: its rows and batches."""
    drawn = ", a new order each pass" if plan.is_drawn else ""
    shards = int(plan.params.get("shards", 1))
    shared = f", shard {plan.params.get('shard', 0)} of {shards}" if shards > 1 else ""
    batches = f"{plan.batches:,} batches of {plan.batch_size}{shared}{drawn}"
    where = conditions_text(plan.params.get("where", ()))
    rows = "rows" if plan.fill is None else f"packed rows, {100 * plan.fill:.1f}% full"
    return f"{plan.params['split']!r} of {dataset.name!r}{where}: {plan.rows:,} {rows}, {batches}"


def state_of(dataset: Samples, plan: Plan, epoch: int, delivered: int) -> dict[str, Any]:
    """The position in a pass, serialisable as JSON.

    Parameters
    ----------
    epoch : int
        Number of the pass.
    delivered : int
        Number of its batches that were delivered, by each shard.
    """
    if delivered >= plan.batches:
        epoch, delivered = epoch + 1, 0
    return {
        "version": STATE_VERSION,
        "dataset": dataset.name,
        "revision": dataset.revision,
        "spec": plan.order,
        "step_rows": _step_rows(plan),
        "epoch": epoch,
        "delivered": delivered,
    }


def position_in(state: Mapping[str, Any], dataset: Samples, plan: Plan) -> tuple[int, int]:
    """Number of the pass, and of its first batch that was not delivered.

    The number of shards may have changed if a step still has the same number of rows: the shards then divide the rest
    of the same global order.

    Raises
    ------
    RevisionChanged
        The state was saved with other data.
    BadParameter
        `state` is not a state, or belongs to another order.
    """
    try:
        version, revision = state["version"], state["revision"]
        spec, step_rows = dict(state["spec"]), int(state["step_rows"])
        epoch, delivered = int(state["epoch"]), int(state["delivered"])
    except (KeyError, TypeError, ValueError):
        raise BadParameter("not a state of a pass: expected a dict returned by state_dict()") from None
    if version != STATE_VERSION:
        raise BadParameter(f"the state has version {version!r}, but this h5feed reads version {STATE_VERSION}")
    if revision != dataset.revision:
        _check_same(dataset, str(state.get("dataset")), str(revision), epoch)
    here = plan.order
    for name in sorted(spec.keys() | here.keys()):
        if spec.get(name) != here.get(name):
            raise BadParameter(f"the state was saved with {name}={spec.get(name)}, but here {name}={here.get(name)}")
    if step_rows != _step_rows(plan):
        raise BadParameter(
            f"the state was saved with {step_rows} rows per step, but here a step has {_step_rows(plan)}: keep "
            "batch_size × shards the same"
        )
    if not 0 <= delivered <= plan.batches or epoch < 0:
        raise BadParameter(f"invalid state: {delivered} of {plan.batches} batches of epoch {epoch} were delivered")
    return (epoch, delivered) if delivered < plan.batches else (epoch + 1, 0)


def _check_same(dataset: Samples, name: str, revision: str, epoch: int) -> None:
    """Check that a state was saved with these data, under whatever name.

    Raises
    ------
    RevisionChanged
    """
    try:
        dataset.check_is(revision)
    except RevisionChanged as error:
        why = f" ({error.detail})" if is_provisional(revision) else ""
        raise RevisionChanged(
            f"the state was saved with {name!r}, revision {revision}, but this is {dataset.name!r}, "
            f"revision {dataset.revision}{why}: restart the pass with set_epoch({epoch}), or serve the original data"
        ) from None


def _step_rows(plan: Plan) -> int:
    return plan.batch_size * int(plan.params.get("shards", 1))
