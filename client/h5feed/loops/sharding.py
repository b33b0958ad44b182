"""The shard of this process in data-parallel training."""

from __future__ import annotations

import os
import sys
from typing import Literal

from ..errors import BadParameter


def shard_of(shard: int | Literal["auto"], shards: int | None) -> tuple[int, int]:
    """The shard of this process, and the number of shards.

    Parameters
    ----------
    shard : int or ``"auto"``
        ``"auto"``: the rank of this process, from the first of these that is set up: JAX (also used by
        `keras.distribution`), `torch.distributed`, the variables ``RANK`` and ``WORLD_SIZE`` (torchrun). Without any,
        there is one process. Processes that share one model replica in the current `keras.distribution` are one shard.
    shards : int, optional
        With ``"auto"``, it must equal the number found.

    Raises
    ------
    BadParameter
    """
    if shard == "auto":
        rank, found = _data_shard(*_found())
        if shards not in (None, found):
            raise BadParameter(f"shards={shards}, but shard='auto' found {found} processes: omit shards")
        return rank, found
    if not isinstance(shard, int):
        raise BadParameter(f"shard={shard!r} must be an integer or 'auto'")
    return shard, 1 if shards is None else shards


def _data_shard(rank: int, processes: int) -> tuple[int, int]:
    """The shard of a process. Processes that hold one model replica together must get the same rows."""
    distribution = sys.modules["keras"].distribution.distribution() if "keras" in sys.modules else None
    if processes == 1 or distribution is None or distribution.device_mesh is None:
        return rank, processes
    mesh, batch = distribution.device_mesh, distribution.batch_dim_name
    replicas = dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(batch, processes)
    if replicas >= processes:
        return rank, processes
    return rank // (processes // replicas), replicas


def _found() -> tuple[int, int]:
    # If JAX or torch is in use, it has already been imported.
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
        raise BadParameter(f"RANK={rank!r} and WORLD_SIZE={size!r} must both be integers") from None
    if not 0 <= number < count:
        raise BadParameter(f"RANK={number} must be from 0 to WORLD_SIZE-1 = {count - 1}")
    return number, count
