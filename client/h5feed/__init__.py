"""h5feed: training batches from HDF5 files, over HTTP.

>>> import h5feed
>>> feed = h5feed.connect("http://gpu-box:8000")  # doctest: +SKIP
>>> train = feed["digits"].sequence("train", batch_size=64, shuffle=True, val=0.1, test=0.1)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import FeedError

if TYPE_CHECKING:
    from .batch import Batch
    from .dataset import Dataset
    from .feed import Feed, connect

__version__ = "0.1.0"

__all__ = ["Batch", "Dataset", "Feed", "FeedError", "__version__", "connect"]

_MODULES = {"Batch": "batch", "Dataset": "dataset", "Feed": "feed", "connect": "feed"}
"""Where the rest is. It brings httpx, which takes longer to import than everything else together: processes that only
need the wire format, of which a server starts many, do without."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
