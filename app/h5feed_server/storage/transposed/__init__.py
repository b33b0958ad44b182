"""Sparse matrices that are stored by columns (CSC), and their copies by rows (CSR) in the cache folder.

A copy has the values of all rows, then their column indices. Both begin at a multiple of `BLOCK` bytes. A table beside
it has the offsets of the rows and a checksum of each block, so nothing that is damaged is used.

The order of the values of a row is that of the columns, as scipy's ``tocsr`` gives it, also where rows of a column are
in no order or occur several times.
"""
