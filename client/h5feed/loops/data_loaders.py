"""Recognise torch's DataLoader and Accelerate's, and refuse settings under which they would give wrong batches."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch.utils.data import default_collate, get_worker_info

from ..errors import BadParameter


class Loaded(tuple[Any, ...]):
    """A batch handed to a DataLoader, which must not collate it again."""


def is_data_loader(caller: FrameType) -> bool:
    """Whether `caller` is a DataLoader, or runs in one of its workers."""
    return get_worker_info() is not None or str(caller.f_globals.get("__name__")).startswith("torch.utils.data.")


def _refuse(batches: list[Any], **options: Any) -> Any:
    raise BadParameter(
        "this dataset already yields batches, and the DataLoader would batch them again: pass batch_size=None to the "
        "DataLoader and batch_size= to the dataset"
    )


# torch's way to register a type for `default_collate`. A collate_fn of the user's own is not affected.
getattr(sys.modules[default_collate.__module__], "default_collate_fn_map", {})[Loaded] = _refuse


def check_accelerate(caller: FrameType, shards: int) -> None:
    """Refuse settings with which Accelerate's ``prepare(loader)`` would lose rows; called from `set_epoch`.

    Raises
    ------
    BadParameter
        The main process reads for all processes but has only one shard, or each process takes single rows.
    """
    accelerate = sys.modules.get("accelerate.data_loader")
    if accelerate is None:
        return
    owner = caller.f_locals.get("self")
    instead = "do not pass the DataLoader to accelerator.prepare(…), and create the dataset with shard='auto'"
    if isinstance(owner, accelerate.DataLoaderDispatcher) and owner.state.num_processes > 1 and shards > 1:
        raise BadParameter(
            "Accelerate's main process reads the batches for all processes, but its dataset is only one shard "
            f"of {shards}: {instead} (or prepare it, without shard=)"
        )
    if isinstance(owner, accelerate.IterableDatasetShard):
        raise BadParameter(f"Accelerate distributes single rows, but this dataset yields batches: {instead}")
