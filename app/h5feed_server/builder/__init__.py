"""Builds HDF5 files for training from folders, archives, tables, arrays and other HDF5 files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dry_run import Preview, preview
    from .image_spec import Decoded, ImageSpec, decode_image
    from .options import BuildOptions
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
    "BuildOptions": "options",
    "Decoded": "image_spec",
    "ImageSpec": "image_spec",
    "Preview": "dry_run",
    "Progress": "progress",
    "Report": "report",
    "build": "run",
    "decode_image": "image_spec",
    "preview": "dry_run",
}


def __getattr__(name: str) -> Any:
    # The command line is part of this package: it needs neither numpy nor HDF5 to say which options there are.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
