"""Reads arrays as HDF5 stores them: from byte ranges of a file, or from bytes that were received."""
