"""What iterates over a dataset of batches in the place of its user: torch's DataLoader, and that of Accelerate."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch.utils.data import default_collate, get_worker_info

from ..errors import BadParameter


class Loaded(tuple[Any, ...]):
    """A batch on its way through a DataLoader, which is not to make batches of it."""


def is_data_loader(caller: FrameType) -> bool:
    """Whether it is a DataLoader that asks for an iterator, here or in a worker of it."""
    return get_worker_info() is not None or str(caller.f_globals.get("__name__")).startswith("torch.utils.data.")


def _refuse(batches: list[Any], **options: Any) -> Any:
    raise BadParameter(
        "these are batches already, and this DataLoader would make batches of them: give it batch_size=None, and "
        "batch_size= to the dataset"
    )


# How torch has types added to `default_collate`; a collate_fn of the user's own may make of batches what it likes.
getattr(sys.modules[default_collate.__module__], "default_collate_fn_map", {})[Loaded] = _refuse


def check_accelerate(caller: FrameType, shards: int) -> None:
    """Refuse what Accelerate's ``prepare(loader)`` would lose rows with. It calls ``set_epoch`` before each pass.

    Raises
    ------
    BadParameter
        Its first process is to read for all, but reads one shard; or each process is to take rows out of batches.
    """
    accelerate = sys.modules.get("accelerate.data_loader")
    if accelerate is None:
        return
    owner = caller.f_locals.get("self")
    instead = "leave the DataLoader out of accelerator.prepare(…), and give the dataset shard='auto'"
    if isinstance(owner, accelerate.DataLoaderDispatcher) and owner.state.num_processes > 1 and shards > 1:
        raise BadParameter(
            "Accelerate has its first process read for all of them, and that process has one shard "
            f"of {shards}: {instead} (or prepare it, without shard=)"
        )
    if isinstance(owner, accelerate.IterableDatasetShard):
        raise BadParameter(f"Accelerate divides single rows among processes, and these are batches: {instead}")
