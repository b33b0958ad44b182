"""A local cache folder: rows are fetched once and read from disk in later epochs."""

from .folder import RowCache

__all__ = ["RowCache"]
