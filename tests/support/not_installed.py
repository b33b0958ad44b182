"""Packages that are installed, as if they were not."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import h5feed
import pytest


def no_image_libraries(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """`h5feed.decode` is imported again, and cannot import `missing`."""
    real = builtins.__import__

    def without(name: str, *about: Any, **more: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *about, **more)

    monkeypatch.delitem(sys.modules, "h5feed.decode")
    monkeypatch.delattr(h5feed, "decode")
    monkeypatch.setattr(builtins, "__import__", without)
