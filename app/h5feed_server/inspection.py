"""``h5feed-server inspect``: what is in a file, how it will be served, what a shuffled batch costs, what would mend it.

It asks the server's own catalogue and reads with its own reader, so that it says what serving will do.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FuturesTimeout
from pathlib import Path

import numpy as np
from h5feed.errors import FeedError, Unreadable
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .catalog.dataset import Dataset, Field
from .catalog.declared import NAME as DECLARATION
from .catalog.description import describe_dataset
from .catalog.discovery import leads_out
from .catalog.entry import Entry
from .catalog.inspections import NotYet
from .catalog.single_file import files_of_family
from .jobs.registry import InProgress
from .services import Services
from .settings import Settings
from .splits.order_spec import OrderSpec
from .storage.transposed.copy_file import TransposedFile

_BATCH_ROWS = 64
_BATCHES = 8
"""Shuffled batches that are read to time one."""

_DEAR = 2.0
"""Bytes decoded for each served above which a repack is proposed."""

_CHEAP = 64 << 10
"""Bytes decoded for one row up to which a repack gains nothing, as of small rows that share a chunk."""

_SMALL_ROW = 16 << 10
"""Bytes of a row up to which several share a compressed chunk, which is dear again."""

_SHOWN = 10

_DIGESTED = 1 << 20
"""Bytes of files that are hashed in full: nobody is told the revision."""


_ANY_SIZE = 1 << 62


def inspect_file(path: Path, console: Console) -> int:
    """Print what is known of one HDF5 file; returns the exit code.

    Raises
    ------
    Unreadable, FeedError
    """
    if not path.is_file():
        raise Unreadable(f"{path} {'is a folder: pass a file in it' if path.is_dir() else 'does not exist'}")
    root = path.parent.resolve()
    files = files_of_family(root, path.name)
    with contextlib.ExitStack() as opened:
        cache = opened.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-inspect-", ignore_cleanup_errors=True))
        settings = Settings.model_validate(
            {
                "data_dir": root,
                "cache_dir": Path(cache),
                "digest_limit": _DIGESTED,
                "provisional_bytes": _ANY_SIZE,
                "follow_links": True,
            }
        )
        services = Services.start(settings, only=files)
        # A file that is looked at for the second time still is: all that writes there ends before the folder goes.
        opened.callback(services.close, wait=True)
        entry = _entry(services, path.name, settings)
        if leads_out(str(root), str(root / path.name)):
            note = (
                "it is a link that leads out of its folder: if that is the data folder, serving it needs --follow-links"
            )
            console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
        _print_entry(entry, services, path, console)
    return 0


def _entry(services: Services, name: str, settings: Settings) -> Entry:
    """What the catalogue makes of the file, when it has looked at it."""
    entry = next((entry for entry in services.catalog.entries() if name in entry.files), None)
    if entry is None:
        raise Unreadable(f"{name} no longer exists")
    try:
        entry.outcome.result(4 * settings.inspect_timeout)
    except FuturesTimeout:
        raise Unreadable(f"{name} took more than {4 * settings.inspect_timeout:g} s to inspect") from None
    except Unreadable as error:
        raise Unreadable(f"{name} cannot be served: {error.detail}") from None
    return entry


def _print_entry(entry: Entry, services: Services, path: Path, console: Console) -> None:
    all_datasets = entry.outcome.result(0)
    # Files that look like parts of one dataset may turn out to be one each.
    datasets = [dataset for dataset in all_datasets if path.name in dataset.files]
    refused = {name: one.reason for name, one in entry.refused.items() if path.name in one.files}
    if not datasets:
        raise Unreadable(f"{path.name} cannot be served: {next(iter(refused.values()), 'it holds no dataset')}")
    for one in services.catalog.entries():
        if DECLARATION in one.files:
            console.print(f"note: {one.reason()}", soft_wrap=True, markup=False, highlight=False)
    for dataset in datasets:
        if len(dataset.files) > 1:
            console.print(f"{path.name} is one of {len(dataset.files)} files of dataset {dataset.name!r}")
        _print_dataset(dataset, console)
        chosen = f" --dataset {shlex.quote(dataset.name)}" if len(datasets) > 1 else ""
        for line in _costs(services, dataset, path, chosen):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    for name, reason in refused.items():
        console.print(f"{name} is not served: {reason}", soft_wrap=True, markup=False, highlight=False)


def _print_dataset(dataset: Dataset, console: Console) -> None:
    about = describe_dataset(dataset)
    console.print(f"[bold]{escape(dataset.name)}[/bold]: {dataset.rows:,} rows")
    table = Table("field", "role", "sample", "stored as", "bytes", "decoded/served")
    for said, field in zip(about["fields"], dataset.fields, strict=True):
        kind = "a list of" if said["ragged"] else "×".join(map(str, said["shape"])) or "one"
        sample = "text" if field.is_text else f"{kind} {said['dtype']}"
        if not said["readable"]:
            table.add_row(escape(field.name), "not served", escape(said["reason"] or ""), "", "", "")
            continue
        cost = said["decoded_per_served_byte"]
        style = "red" if _is_dear(field) else None
        table.add_row(
            escape(field.name),
            said["role"],
            f"{sample}{' ' + said['channels'] if said['channels'] else ''}",
            _stored(said["chunks"], said["filters"]),
            f"{said['stored_bytes']:,}",
            f"{cost:g}",
            style=style,
        )
    console.print(table)
    if about["native_splits"]:
        splits = ", ".join(f"{split['rows']:,} {split['name']}" for split in about["native_splits"])
        record = dataset.split_record
        how = "" if record is None else f" (drawn with {record.words()})"
        console.print(f"stored splits: {splits}{how}", soft_wrap=True)
    else:
        console.print("stored splits: none; clients that pass test=0.1, val=0.1 get the same splits as scikit-learn")
    if dataset.class_names:
        names = ", ".join(dataset.class_names[:_SHOWN])
        more = len(dataset.class_names) - _SHOWN
        console.print(f"classes: {escape(names)}{f' … and {more:,} more' if more > 0 else ''}", soft_wrap=True)
    for note in dataset.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _is_dear(field: Field) -> bool:
    """Whether a shuffled row costs much more than its own bytes."""
    amplification = field.read_amplification
    return amplification >= _DEAR and amplification * field.row_bytes > _CHEAP


def _is_by_columns(field: Field) -> bool:
    """Whether it is a sparse matrix whose rows are read from a copy."""
    return any(isinstance(segment.source, TransposedFile) for segment in field.column.segments)


def _stored(chunks: list[int] | None, filters: list[str]) -> str:
    if chunks is None:
        return "contiguous"
    return f"chunks of {'×'.join(map(str, chunks))}{', ' + ' + '.join(filters) if filters else ''}"


def _costs(services: Services, dataset: Dataset, path: Path, chosen: str) -> Iterator[str]:
    """What a shuffled batch costs, measured, and what would make it cheaper."""
    if not dataset.rows or not any(field.unreadable is None for field in dataset.fields):
        return
    rows = min(_BATCH_ROWS, dataset.rows)
    try:
        plan = services.batcher.plan(dataset.name, OrderSpec.model_validate({"shuffle": True}), rows, None)
        count = max(1, min(_BATCHES, plan.grid.batches - 1))
        seconds, nbytes = [], 0
        for index in range(count):
            began = time.perf_counter()
            body = plan.filled(index, index + 1, lambda size: np.empty(size, np.uint8))
            seconds.append(time.perf_counter() - began)
            nbytes = len(body)
    except InProgress:
        # The copy would take as long as reading all of the file, and goes with this process.
        turned = [field for field in dataset.fields if not field.unreadable and _is_by_columns(field)]
        names = ", ".join(field.name for field in turned)
        yield f"stored by columns: {names}. The server makes a copy by rows when rows are first requested"
        yield "This command writes a file by rows:"
        yield f"  {_repack(path, turned)}{chosen}"
        return
    except (FeedError, NotYet) as error:
        yield f"a shuffled batch cannot be read: {error}"
        return
    # The first one finds nothing in memory; those after it what it has left there.
    first, usual = seconds[0], float(np.median(seconds))
    yield (
        f"a shuffled batch of {rows} rows: {nbytes:,} bytes, {usual * 1e3:.1f} ms to read ({rows / usual:,.0f} rows/s)"
        f", {first * 1e3:.1f} ms the first time"
    )
    dear = [field for field in dataset.fields if not field.unreadable and _is_dear(field)]
    if not dear:
        yield "the layout is good for shuffled batches"
        return
    names = ", ".join(field.name for field in dear)
    yield f"slow to shuffle: {names}. This command writes a file with a faster layout:"
    yield f"  {_repack(path, dear)}{chosen}"


def _repack(path: Path, dear: list[Field]) -> str:
    """The command that writes the file anew: compressed where that has saved much, and rows are chunks of their own."""
    stored = sum(segment.array.stored_bytes for field in dear for segment in field.column.segments)
    saved = stored < 0.7 * sum(field.column.nbytes for field in dear)
    saved = saved and all(field.row_bytes > _SMALL_ROW for field in dear)
    new = path.with_name(f"{path.stem}-for-training.h5")
    command = f"h5feed-server build {shlex.quote(str(path))} -o {shlex.quote(str(new))}"
    return command + (" --compression zstd" if saved else "")
