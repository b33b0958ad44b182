"""A folder with a short path: that of a Unix socket has at most 107 bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def short_folder() -> Iterator[Path]:
    """Deleted in the end."""
    path = Path(tempfile.mkdtemp(prefix="h5"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
