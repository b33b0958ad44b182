"""Recognises files with the weights of a Keras model, which are not data to train on."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_VARIABLE = re.compile(r"(?:^|/)vars/\d+$")


def reason_for(attributes: Mapping[str, Any], paths: Collection[str]) -> str | None:
    """Return the reason for not serving a file if it holds model weights; else None.

    Parameters
    ----------
    attributes : mapping
        Attributes of the root group.
    paths : collection of str
        Paths of the arrays.
    """
    if "keras_version" in attributes and ("layer_names" in attributes or "model_config" in attributes):
        return "it holds the weights of a Keras model (keras_version in its attributes), not data"
    if paths and all(_VARIABLE.search(path) for path in paths):
        return "it holds the weights of a Keras model (vars/0, vars/1 … of its layers), not data"
    return None
