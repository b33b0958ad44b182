"""Trees of arrays: the structure of a batch, possibly after a transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same dicts, tuples and lists, with `change` applied to every leaf."""
    if isinstance(tree, Mapping):
        return {name: mapped(change, part) for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [mapped(change, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [mapped(change, part) for part in tree]
    return change(tree)
