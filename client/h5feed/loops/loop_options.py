"""The options of all loops: order options and preparation options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import BadParameter
from ..offsets import masks_of, renamed
from ..options import OrderOptions, PreparationOptions, split_options
from ..plan import conditions
from ..prepare import Preparation
from ..prepare.labels import class_condition
from ..prepare.preparation import label_of, padded_names
from ..ragged import OPTIONS
from ..samples import Samples
from ..suggestions import check_options
from .sharding import shard_of

RAGGED = (*OPTIONS, "pack", "pack_by")
"""Order options that decide which arrays come of lists and text."""

PREPARING = tuple(PreparationOptions.__annotations__)


def check_loop_options(options: Mapping[str, Any], takes: Callable[..., Any]) -> None:
    """Raise `BadParameter` for an unknown option."""
    if "fields" in options:
        raise BadParameter("fields= is an option of batches(): use x=, y= and sample_weight= to name the fields")
    check_options(options, takes, set(OrderOptions.__annotations__) - {"fields"}, PREPARING)


def divided(dataset: Samples, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Order options and preparation options. `classes` is both: a condition on the rows, and the numbers of targets."""
    order = {name: value for name, value in options.items() if name not in PREPARING}
    order["sparse"] = order.get("sparse") or "dense"
    if order.get("weights") is not None:
        # Once for all passes: it copies and hashes an array.
        order["weights"] = dataset.named_weights(order["weights"])
    if order.get("shard") is not None or order.get("shards") is not None:
        order["shard"], order["shards"] = shard_of(order.get("shard") or 0, order.get("shards"))
    preparing = {name: value for name, value in options.items() if name in PREPARING}
    if preparing.get("classes") is not None:
        condition = class_condition(dataset, label_of(dataset, preparing), preparing["classes"])
        order["where"] = [*conditions(order.get("where")), condition]
    if order.get("pad") is True:
        # Said once, for the batches and for what a model gets of them.
        order["pad"] = padded_names(dataset, preparing)
    return order, preparing


def check_dense(order: Mapping[str, Any], loop: str) -> None:
    """Raise `BadParameter` for ``sparse="csr"`` in a loop that yields only dense arrays."""
    if order.get("sparse") == "csr":
        raise BadParameter(
            f"sparse='csr': {loop} takes dense arrays, sparse='dense'. For sparse ones, loop over loader() or torch()"
        )


def preparation_of(
    dataset: Samples, split: str, order: Mapping[str, Any], preparing: Mapping[str, Any], seed: int
) -> Preparation:
    """The `Preparation` of the batches of an order."""
    if order.get("decode_cf"):
        for option in ("mean", "std"):
            given = preparing.get(option)
            if "server" in [*(given.values() if isinstance(given, Mapping) else (given,))]:
                raise BadParameter(
                    f"{option}='server' are statistics of the stored numbers, which decode_cf unpacks: give numbers, "
                    'or let the server unpack them, with apply = "scale" in h5feed.toml'
                )
    shard = order.get("shard") or 0
    return Preparation(
        dataset,
        split,
        seed=seed,
        shard=shard,
        split_options=split_options(order),
        ragged={name: order[name] for name in RAGGED if order.get(name) is not None},
        sparse=order.get("sparse", "dense"),
        masks=masks_of(order, dataset.fields),
        renamed=renamed(order),
        cropping=order,
        **preparing,
    )
