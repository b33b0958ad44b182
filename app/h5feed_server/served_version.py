"""The version of all that is served: raised whenever the same files would give other bytes, roles, rows or splits."""

SERVED_VERSION = 4
"""Part of every dataset's revision, and so of every ETag, of the names of jobs and splits, and of the folder in which a
client keeps rows; and of the path of everything in the server's cache folder. Whatever an older server has left there,
or has told anybody, is never taken for what this one serves."""
