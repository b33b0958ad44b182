"""File name extensions of HDF5 files."""

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")

KINDRED_SUFFIXES = (".mat", ".nc", ".nc4", ".nxs", ".nwb", ".h5ad", ".h5mu", ".loom", ".jld2")
"""Those of formats that are based on HDF5, at least in their newer versions."""

ALL_SUFFIXES = (*SUFFIXES, *KINDRED_SUFFIXES)
