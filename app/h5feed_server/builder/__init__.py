"""Builds HDF5 files for training from folders, archives, tables, arrays and other HDF5 files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import BuildOptions

if TYPE_CHECKING:
    from .dry_run import Preview, preview
    from .image_spec import Decoded, ImageSpec, decode_image
    from .progress import Progress
    from .report import Report
    from .run import build

__all__ = [
    "BuildOptions",
    "Decoded",
    "ImageSpec",
    "Preview",
    "Progress",
    "Report",
    "build",
    "decode_image",
    "preview",
]

_MODULES = {
    "Decoded": "image_spec",
    "ImageSpec": "image_spec",
    "Progress": "progress",
    "Report": "report",
    "decode_image": "image_spec",
}


def __getattr__(name: str) -> Any:
    # The command line is part of this package, and the server's processes must not load HDF5.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = _MODULES.get(name) or ("dry_run" if name.lower() == "preview" else "run")
    return getattr(import_module(f".{module}", __name__), name)
