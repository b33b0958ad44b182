"""Which share of each step this process takes in data-parallel training."""

from __future__ import annotations

import os
import sys
from typing import Literal

from ..errors import BadParameter


def shard_of(shard: int | Literal["auto"], shards: int | None) -> tuple[int, int]:
    """This process's shard, and how many there are.

    Parameters
    ----------
    shard : int or ``"auto"``
        ``"auto"``: the rank of this process, as JAX (which `keras.distribution` builds on), an initialised
        `torch.distributed`, or the variables ``RANK`` and ``WORLD_SIZE`` (torchrun) tell, in this order; where none
        does, there is one process. Processes that share one replica of a model, as the current `keras.distribution`
        has it, are one shard.
    shards : int, optional
        With ``"auto"`` it must be what was found.

    Raises
    ------
    BadParameter
    """
    if shard == "auto":
        rank, found = _data_shard(*_found())
        if shards not in (None, found):
            raise BadParameter(f"shards={shards}, but shard='auto' found {found} processes: leave shards away")
        return rank, found
    if not isinstance(shard, int):
        raise BadParameter(f"shard={shard!r} must be a number or 'auto'")
    return shard, 1 if shards is None else shards


def _data_shard(rank: int, processes: int) -> tuple[int, int]:
    """The share of a process: where a replica of a model takes several, they must be given the same rows."""
    distribution = sys.modules["keras"].distribution.distribution() if "keras" in sys.modules else None
    if processes == 1 or distribution is None or distribution.device_mesh is None:
        return rank, processes
    mesh, batch = distribution.device_mesh, distribution.batch_dim_name
    replicas = dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(batch, processes)
    if replicas >= processes:
        return rank, processes
    return rank // (processes // replicas), replicas


def _found() -> tuple[int, int]:
    # Whoever uses them has imported them: they are not imported here.
    jax = sys.modules.get("jax")
    if jax is not None and jax.process_count() > 1:
        return jax.process_index(), jax.process_count()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and size is None:
        return 0, 1
    try:
        number, count = int(rank or ""), int(size or "")
    except ValueError:
        raise BadParameter(f"RANK={rank!r} and WORLD_SIZE={size!r} must both be numbers") from None
    if not 0 <= number < count:
        raise BadParameter(f"RANK={number} must be in 0 … WORLD_SIZE-1 = {count - 1}")
    return number, count
