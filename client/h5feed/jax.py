"""Transfer batches to a JAX device ahead of the training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax

from .batch import Batch
from .errors import BadParameter


def to_device(batches: Iterable[Any], *, ahead: int = 2, device: Any = None) -> Iterator[Any]:
    """Move batches to the device ahead of the loop, so that transfers overlap with computation. ::

        for x, y in to_device(loader):
            state = step(state, x, y)

    Parameters
    ----------
    batches : iterable
        A `Loader`, the result of `Dataset.batches`, or any iterable of trees of numpy arrays. A `Batch` becomes a dict.
    ahead : int
        Number of batches on the device beyond the current one.
    device : jax.Device or jax.sharding.Sharding, optional
        Default: JAX's default device. A sharding distributes each batch over its devices. If these belong to several
        processes, each process passes its own shard (``shard=jax.process_index(), shards=jax.process_count()``), and
        the resulting arrays are global.

    Yields
    ------
    tree of jax.Array
        On the CPU, JAX uses the memory of arrays that are 64-byte aligned, as most large ones are, and copies others.
        The memory is recycled when the arrays are gone.

    Modelled on ``flax.jax_utils.prefetch_to_device``.
    """
    if ahead < 0:
        raise BadParameter(f"ahead={ahead} must be 0 or more")
    return _moved(batches, ahead, device)


def _moved(batches: Iterable[Any], ahead: int, device: Any) -> Iterator[Any]:
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(_put(dict(batch) if isinstance(batch, Batch) else batch, device))
        if len(waiting) > ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _put(tree: Any, device: Any) -> Any:
    if isinstance(device, jax.sharding.Sharding) and not device.is_fully_addressable:
        return jax.tree.map(partial(jax.make_array_from_process_local_data, device), tree)
    return jax.device_put(tree, device)
