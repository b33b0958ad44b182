"""Suggestions for misspelt names and options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from .errors import BadParameter, FieldNotFound

_MAX_CHARS, _MAX_NAMES = 200, 2000
"""Limits of the comparison, whose time grows with the square of the length and with the number of names."""


def did_you_mean(name: str, known: Iterable[str], rest: str | None = None) -> str:
    """``did you mean 'batch_size'? Choose from …`` if a known name is similar, else only `rest`.

    Parameters
    ----------
    rest : str, optional
        The valid names; default: ``choose from`` and all known names.
    """
    known = list(known)
    rest = rest or (f"choose from {', '.join(known)}" if known else "there are none")
    if len(name) > _MAX_CHARS:
        return rest
    alike = {_plain(candidate): candidate for candidate in islice(known, _MAX_NAMES)}
    nearest = get_close_matches(_plain(name), alike, 1)
    return f"did you mean {alike[nearest[0]]!r}? {rest[:1].upper()}{rest[1:]}" if nearest else rest


def no_field(name: object, known: Iterable[str], whose: str) -> FieldNotFound:
    """The error for an unknown field, with a suggestion and all known names."""
    return FieldNotFound(f"{whose} {name!r}: {did_you_mean(str(name), known)}")


def check_options(given: Iterable[str], takes: Callable[..., Any], *more: Mapping[str, Any] | Iterable[str]) -> None:
    """Raise `BadParameter` for an unknown option, with a suggestion and all valid options.

    Parameters
    ----------
    takes : callable
        The function that was called; its parameters with a default are valid options.
    more : iterables of str
        Valid options that it takes as ``**options``.
    """
    beyond = {name for names in more for name in names}
    unknown = sorted(set(given) - beyond)
    if not unknown:
        return
    own = {name for name, one in inspect.signature(takes).parameters.items() if one.default is not one.empty}
    known = sorted(own | beyond)
    name = unknown[0]
    said = did_you_mean(name, known, f"the options are {', '.join(known)}")
    raise BadParameter(f"unknown option {name!r}: {said}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
