"""h5feed: training batches from HDF5 files, over HTTP.

>>> import h5feed
>>> feed = h5feed.connect("http://gpu-box:8000")  # doctest: +SKIP
>>> train = feed["digits"].sequence("train", batch_size=64, shuffle=True, val=0.1, test=0.1)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AmbiguousKey,
    BadAnswer,
    BadParameter,
    BatchOutOfRange,
    ConnectionFailed,
    DatasetCorrupt,
    DatasetNotFound,
    FeedError,
    FieldNotFound,
    HostNotAllowed,
    InternalError,
    JobWanted,
    KeysNotFound,
    MethodNotAllowed,
    NotAcceptable,
    NotFound,
    Overloaded,
    PageNotFound,
    Preparing,
    ReaderCrashed,
    ReadTimeout,
    RevisionChanged,
    RowOutOfRange,
    SourceUnavailable,
    SplitImpossible,
    SplitNotFound,
    TooLarge,
    TooManyRequests,
    Transient,
    Unauthorized,
    Unreadable,
    UnsupportedField,
    WeightsUnknown,
)
from .version import __version__

if TYPE_CHECKING:
    from .batch import Batch
    from .dataset import Dataset
    from .feed import Feed, connect
    from .frames import Field
    from .lineage import Source
    from .loops.loader import Loader
    from .mixture import Mixture, mix
    from .reopening import reopen
    from .splits import Splits
    from .stats import Stats
    from .weights import class_balanced

_MODULES = {
    "Batch": "batch",
    "Dataset": "dataset",
    "Feed": "feed",
    "Field": "frames",
    "Loader": "loops.loader",
    "Mixture": "mixture",
    "Source": "lineage",
    "Splits": "splits",
    "Stats": "stats",
    "class_balanced": "weights",
    "connect": "feed",
    "mix": "mixture",
    "reopen": "reopening",
}
"""Modules that are imported on first use. They need httpx, which is slow to import, and a server starts many processes
that only need the wire format."""

__all__ = [
    "AmbiguousKey",
    "BadAnswer",
    "BadParameter",
    "Batch",
    "BatchOutOfRange",
    "ConnectionFailed",
    "Dataset",
    "DatasetCorrupt",
    "DatasetNotFound",
    "Feed",
    "FeedError",
    "Field",
    "FieldNotFound",
    "HostNotAllowed",
    "InternalError",
    "JobWanted",
    "KeysNotFound",
    "Loader",
    "MethodNotAllowed",
    "Mixture",
    "NotAcceptable",
    "NotFound",
    "Overloaded",
    "PageNotFound",
    "Preparing",
    "ReadTimeout",
    "ReaderCrashed",
    "RevisionChanged",
    "RowOutOfRange",
    "Source",
    "SourceUnavailable",
    "SplitImpossible",
    "SplitNotFound",
    "Splits",
    "Stats",
    "TooLarge",
    "TooManyRequests",
    "Transient",
    "Unauthorized",
    "Unreadable",
    "UnsupportedField",
    "WeightsUnknown",
    "__version__",
    "class_balanced",
    "connect",
    "mix",
    "reopen",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return list(__all__)
