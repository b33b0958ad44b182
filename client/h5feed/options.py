"""Names that users type: which there are, and which one was meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from .errors import BadParameter


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question such as ``did you mean 'batch_size'? ``; empty where nothing is like it."""
    alike = {_plain(candidate): candidate for candidate in known}
    found = get_close_matches(_plain(name), alike, 1)
    return f"did you mean {alike[found[0]]!r}? " if found else ""


def check_options(given: Iterable[str], takes: Callable[..., Any], *more: Mapping[str, Any] | Iterable[str]) -> None:
    """Raise `BadParameter` where an option is none: it names the one that was meant, and all there are.

    Parameters
    ----------
    takes : callable
        What the options were given to: those of its parameters that have a default are options too.
    more : iterables of str
        Options that it takes as ``**options``.
    """
    beyond = {name for names in more for name in names}
    unknown = sorted(set(given) - beyond)
    if not unknown:
        return
    own = {name for name, one in inspect.signature(takes).parameters.items() if one.default is not one.empty}
    known = sorted(own | beyond)
    name = unknown[0]
    raise BadParameter(f"unknown option {name!r}: {did_you_mean(name, known)}The options are {', '.join(known)}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
