"""NeXus files (``.nxs``): the signal of each group `NXdata` is the input, and frames are along its first axis.

See https://manual.nexusformat.org/classes/base_classes/NXdata.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from h5feed.stored.column import About, Segment

from .frame_columns import refused


def with_signals(groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment]) -> dict[str, Segment]:
    """The arrays of a file, with the roles that the attributes of each `NXdata` tell."""
    fields = dict(segments)
    for path, about in groups.items():
        if about.get("NX_class") != "NXdata":
            continue
        members = {
            name.removeprefix(f"{path}/"): name
            for name in segments
            if name.startswith(f"{path}/") and "/" not in name.removeprefix(f"{path}/")
        }
        signal = _signal(about, {name: segments[member] for name, member in members.items()})
        if signal is None or segments[members[signal]].array.unreadable is not None:
            continue
        shape = segments[members[signal]].array.shape
        told = {signal: About("input", "the signal of NXdata")}
        for name in _texts(about.get("auxiliary_signals")):
            told[name] = About("other", "an auxiliary signal of NXdata: select it with x= or y=")
        for axis, name in enumerate(_texts(about.get("axes"))):
            if name not in members or name in told:
                continue
            along = segments[members[name]]
            if axis == 0:
                told[name] = About("other", "the positions of the rows")
            elif axis < len(shape) and len(along.array.shape) == 1 and along.array.unreadable is None:
                # It may be as long as the axis of the rows, or have a name such as `y`, by chance.
                reason = f"it holds the positions along axis {axis} of {signal!r}, which is not that of the rows"
                fields[members[name]] = replace(along, array=refused(along.array, reason))
        for name, said in told.items():
            if name in members:
                fields[members[name]] = replace(segments[members[name]], about=said)
    return fields


def _signal(about: Mapping[str, Any], members: Mapping[str, Segment]) -> str | None:
    """The name of the signal: by the attribute of the group or, in old files, of the array."""
    said = about.get("signal")
    if isinstance(said, str):
        return said if said in members else None
    old = [name for name, segment in members.items() if str(segment.array.attributes.get("signal")) == "1"]
    return old[0] if len(old) == 1 else None


def _texts(value: Any) -> Iterator[str]:
    """The texts of an attribute: one or several."""
    yield from [value] if isinstance(value, str) else value if isinstance(value, list) else []
