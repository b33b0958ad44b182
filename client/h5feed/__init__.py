"""h5feed: training batches from HDF5 files, over HTTP.

>>> import h5feed
>>> feed = h5feed.connect("http://gpu-box:8000")  # doctest: +SKIP
>>> train = feed["digits"].sequence("train", batch_size=64, shuffle=True, val=0.1, test=0.1)  # doctest: +SKIP
"""

__version__ = "0.1.0"

from .batch import Batch
from .dataset import Dataset
from .errors import FeedError
from .feed import Feed, connect

__all__ = ["Batch", "Dataset", "Feed", "FeedError", "__version__", "connect"]
