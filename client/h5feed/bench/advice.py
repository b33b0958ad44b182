"""Advice on faster training input, each item backed by a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .findings import Findings, Rate, expected_utilisation

BETTER = 1.2
"""An option is recommended if it multiplies the rows per second by at least this factor."""

_DEAR = 2.0
"""Another file layout is recommended from this ratio of bytes decoded to bytes served."""

_FED = 0.97
"""From this utilisation on there is nothing to gain."""

_SLOWER_READS = 2.0
"""If reading a byte takes this many times longer under load, the server's CPUs or disk are saturated."""

_COMPRESSED = ("gzip", "lzf", "szip", "zstd", "blosc", "blosc2", "bzip2")


@dataclass(frozen=True)
class Advice:
    """One recommendation.

    Attributes
    ----------
    option : str
        The option to pass or the command to run.
    because : str
        The measurement that supports it.
    """

    option: str
    because: str


def advice_for(findings: Findings) -> list[Advice]:
    """Recommendations, largest gain and least work first; empty if training gets its batches fast enough."""
    if findings.default is None or is_fed(findings):
        return []
    all_advice = [
        *_of_streams(findings),
        *_of_bytes(findings),
        *(_of_server(findings) if findings.bound == "server" else ()),
        *(_of_sockets(findings) if findings.bound == "sockets" else ()),
    ]
    return list({advice.option: advice for advice in all_advice}.values())


def is_fed(findings: Findings) -> bool:
    """Whether an accelerator with the given step time is busy nearly all the time."""
    if findings.training is not None:
        return findings.training.utilisation >= _FED
    if findings.step is None or findings.batch_seconds is None:
        return False
    return expected_utilisation(findings.step, findings.batch_seconds) >= _FED


def times(factor: float) -> str:
    """1.4 times; 12 times."""
    return f"{factor:.{1 if factor < 9.5 else 0}f} times"


def _gain(findings: Findings, rate: Rate | None) -> float:
    assert findings.default is not None
    return rate.rows_per_second / findings.default.rows_per_second if rate else 0.0


def _of_streams(findings: Findings) -> Iterator[Advice]:
    """Options that were measured and are faster than the defaults."""
    default = findings.default
    assert default is not None
    now = f"{default.rows_per_second:,.0f}"
    here = findings.decoded_here
    if here is not None and _gain(findings, here) >= BETTER and findings.encoded_bytes:
        yield Advice(
            'decode="client"',
            f"{times(_gain(findings, here))} the rows ({here.rows_per_second:,.0f} instead of {now} per second): "
            f"{size_of(findings.encoded_bytes)} are sent per row instead of {size_of(findings.row_bytes)}",
        )
    best = findings.best_fixed
    if best is not None and best.confirmed and _gain(findings, best) >= BETTER:
        yield Advice(
            f"connections={best.connections}",
            f"{times(_gain(findings, best))} the rows ({best.rows_per_second:,.0f} per second instead of {now} with "
            "the number of connections that the read-ahead chose)",
        )
    more = findings.more_readahead
    if more is not None and more.confirmed and _gain(findings, more) >= BETTER:
        yield Advice(more.what, f"{times(_gain(findings, more))} the rows ({more.rows_per_second:,.0f} per second)")
    for rate in findings.batch_sizes:
        if rate.confirmed and _gain(findings, rate) >= BETTER:
            yield Advice(
                f"batch_size={rate.batch_size}",
                f"{times(_gain(findings, rate))} the rows with batches of {findings.batch_size} "
                f"({rate.rows_per_second:,.0f} per second), if this batch size suits your training",
            )


def _of_bytes(findings: Findings) -> Iterator[Advice]:
    """Fewer bytes to send."""
    default, bound = findings.default, findings.bound
    assert default is not None
    for wide in findings.wide if bound in ("link", "sockets", "server", "machine") else ():
        # A smaller dtype does not shorten the decoding by the same factor.
        if bound in ("server", "machine") and findings.filters:
            continue
        yield Advice(
            f"store {wide.name!r} as {wide.enough}",
            f"it is {wide.dtype}, and {wide.why}: a row would shrink from {size_of(findings.row_bytes)} by a factor of "
            f"{wide.factor:.2g}" + (" (use rescale=1/255)" if "255" in wide.why and "1/" in wide.why else ""),
        )
    cached = findings.cached
    if cached is not None:
        if _gain(findings, cached) >= BETTER:
            yield Advice(
                f"cache={findings.cache_folder!r}",
                f"{times(_gain(findings, cached))} the rows from the second epoch on "
                f"({cached.rows_per_second:,.0f} per second); all {findings.rows:,} rows take "
                f"{size_of(findings.rows * findings.row_bytes)} of disk space",
            )
    elif bound in ("link", "server", "round trips"):
        epoch = findings.rows / default.rows_per_second
        if epoch >= _LONG_EPOCH:
            yield Advice(
                'cache="FOLDER"',
                f"an epoch takes {duration(epoch)} now; {size_of(findings.rows * findings.row_bytes)} of local disk "
                "space would hold the rows for all later epochs (measure it with --cache FOLDER)",
            )


def _of_server(findings: Findings) -> Iterator[Advice]:
    """Reading and decoding on the server is slow."""
    share, again = findings.server_share, findings.speed_up_again
    reading = f"the server spent {share:.0%} of the request time reading" if share else ""
    if findings.amplification >= _DEAR:
        dear = f"a shuffled batch decodes up to {findings.amplification:,.0f} bytes per byte served"
        reasons = ", ".join(filter(None, (dear, reading)))
        yield Advice("h5feed-server inspect FILE", f"{reasons}: it prints the command that rewrites the file")
    elif any(name in _COMPRESSED for name in findings.filters):
        yield Advice(
            "h5feed-server build FILE.h5 -o NEW.h5",
            f"{reading + ', and ' if reading else ''}the rows are compressed with {', '.join(findings.filters)}: "
            "uncompressed or with --compression lz4, they are read faster",
        )
    if again is not None and findings.memory_helps:
        yield Advice(
            "H5FEED_CHUNK_CACHE_BYTES (server)" if _is_decoded(findings) else "more memory, or a faster disk (server)",
            f"rows in the server's memory arrive {times(again)} as fast; all rows take "
            f"{size_of(findings.rows * findings.row_bytes)}",
        )
    slower = _slower_reads(findings)
    if slower is not None and slower >= _SLOWER_READS and _is_decoded(findings):
        most = max(rate.connections or 0 for rate in findings.fixed)
        yield Advice(
            "h5feed-server serve --workers N",
            f"with {most} requests at a time, the server took {times(slower)} as long to read a byte as with one: add "
            "workers if it has idle cores, otherwise add cores, or store rows that need less decoding",
        )


def _of_sockets(findings: Findings) -> Iterator[Advice]:
    rate = max(each.bytes_per_second for each in (findings.default, *findings.fixed) if each)
    yield Advice(
        "h5feed-server serve --workers N",
        f"{rate / 1e6:,.0f} MB/s arrive, about what one worker can send: if the server has one worker and idle cores, "
        "a second worker may send more",
    )


def _is_decoded(findings: Findings) -> bool:
    return bool(findings.images) or bool(findings.filters)


def _slower_reads(findings: Findings) -> float | None:
    """How many times longer the server reads a byte with the most concurrent requests than with one."""
    alone, most = findings.fixed[:1], findings.fixed[1:][-1:]
    if not alone or not most or not alone[0].server_share or most[0].server_share is None:
        return None
    # Seconds of reading per byte: the share of the time of all connections, divided by the byte rate.
    each = [
        rate.server_share * (rate.connections or 1) / rate.bytes_per_second
        for rate in (*alone, *most)
        if rate.server_share is not None and rate.bytes_per_second
    ]
    return each[1] / each[0] if len(each) == 2 and each[0] else None


def size_of(nbytes: float) -> str:
    """196.6 kB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """50 µs, 4.2 ms, 12 s, 17 min, 3.5 h."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_LONG_EPOCH = 10.0
"""A cache is recommended if an epoch takes at least this many seconds."""
