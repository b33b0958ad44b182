"""h5feed-server: serves training batches from HDF5 files over HTTP."""

__version__ = "0.1.0"
