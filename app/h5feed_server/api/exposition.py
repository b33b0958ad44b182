"""The text formats of Prometheus and OpenMetrics."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

from .. import __version__
from ..sharing.metrics import BOUNDS, DATASETS, Everywhere, Labels, Metric
from ..sharing.trimming import resident_bytes

PREFIX = "h5feed_"

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_TYPE = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"

EXTRA = (
    Metric("build_info", "gauge", "Version of the server and of Python; always 1."),
    Metric("datasets", "gauge", "Datasets in the catalogue of the worker that was asked, by status."),
    Metric("workers", "gauge", "Running workers."),
    Metric("process_resident_memory_bytes", "gauge", "Memory of each process of the server, without readers."),
    Metric(
        "store_listed_timestamp_seconds",
        "gauge",
        "When the last listing of the object store began that succeeded, in seconds of Unix time.",
    ),
    Metric("store_cache_bytes", "gauge", "Disk space of the cache for ranges of objects."),
)
"""Metrics whose numbers are read when they are asked for."""


def exposition(found: Everywhere, datasets: Mapping[str, int], store: Mapping[str, float], *, openmetrics: bool) -> str:
    """All metrics as text.

    Parameters
    ----------
    found : Everywhere
    datasets : mapping of str to int
        Number of datasets by status.
    store : mapping of str to float
        Value of each metric of an object store that its processes have in common; empty for a folder.
    openmetrics : bool
        Whether to write OpenMetrics instead of Prometheus's older text format.
    """
    lines: list[str] = []
    for metric in found.catalogue.metrics:
        lines += _head(metric, openmetrics)
        for labels, numbers in found.series(metric):
            lines += _series(metric, labels, numbers)
    for metric, values in zip(EXTRA, _extra(found, datasets, store), strict=True):
        lines += _head(metric, openmetrics)
        for labels, value in values:
            lines += _series(metric, labels, [value])
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _extra(
    found: Everywhere, datasets: Mapping[str, int], store: Mapping[str, float]
) -> Iterator[list[tuple[Labels, float]]]:
    """Labels and value of each series of `EXTRA`."""
    yield [((("version", __version__), ("python", platform.python_version())), 1)]
    yield [((("status", status),), datasets.get(status, 0)) for status in DATASETS]
    yield [((), len(found.workers))]
    pids = {f"worker {place}": pid for place, (pid, _) in found.workers.items()}
    if found.supervisor:
        pids["supervisor"] = found.supervisor
    sizes = {name: resident_bytes(pid) for name, pid in pids.items()}
    yield [((("process", name),), size) for name, size in sizes.items() if size is not None]
    for name in ("store_listed_timestamp_seconds", "store_cache_bytes"):
        yield [((), store[name])] if name in store else []


def _head(metric: Metric, openmetrics: bool) -> list[str]:
    name = PREFIX + metric.name
    if openmetrics and metric.kind == "counter":
        # The name of the family, whose samples end with `_total`.
        name = name.removesuffix("_total")
    lines = [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
    unit = next((unit for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), None)
    return [*lines, f"# UNIT {name} {unit}"] if openmetrics and unit else lines


def _series(metric: Metric, labels: Labels, numbers: list[float]) -> Iterator[str]:
    name = PREFIX + metric.name
    if metric.kind != "histogram":
        yield f"{name}{_braces(labels)} {_number(numbers[0])}"
        return
    *counts, total = numbers
    below = 0.0
    for bound, count in zip((*map(_number, BOUNDS), "+Inf"), counts, strict=True):
        below += count
        yield f"{name}_bucket{_braces((*labels, ('le', bound)))} {_number(below)}"
    yield f"{name}_sum{_braces(labels)} {_number(total)}"
    yield f"{name}_count{_braces(labels)} {_number(below)}"


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    quoted = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in quoted) + "}"


def _number(value: float) -> str:
    # Canonical in OpenMetrics: bounds of buckets have a point. Whole numbers above 2**53 are not exact anyway.
    return str(int(value)) if value == int(value) and abs(value) >= 1e15 else repr(float(value))
