"""A local folder in which rows are kept: fetched once, read from there in every later epoch."""

from .folder import RowCache

__all__ = ["RowCache"]
