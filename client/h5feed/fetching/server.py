"""Request batches and rows from the server, and check that the response matches the request."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..errors import BadAnswer, TooLarge
from ..frames import MAX_BODY_BYTES, Frame
from ..images import ImageSpec
from ..net.client import Client
from ..net.exchange import BodyCut
from ..net.names import Names
from ..net.trace import decoded_images, received, retried
from ..plan import Plan
from ..wire import OFFSETS, ROWS, WEIGHT, read_body, read_runs
from .cached import Take
from .decoding import decoded
from .parts import PartFetcher
from .pieces import PieceFetcher
from .placed import PlacedFetcher

_LEAST_ALIGNED_BYTES = 1 << 20
"""Receiving a smaller batch tensor by tensor takes as long as the copy that it saves a framework."""


def fetcher(client: Client, path: str, plan: Plan) -> Fetch[Batch]:
    """The function that fetches a block of a plan. It does not refer to a `Dataset`: threads must not keep it alive."""

    parts = PartFetcher(client, path, plan)
    pieces = PieceFetcher(client, path, plan)
    placed = None
    if client.placement is not None and plan.frame.names:
        placed = PlacedFetcher(client, path, plan, fetcher(client, path, plan.of_fields([])))

    def fetch_one(index: int, query: Mapping[str, Any], epoch: int, cancelled: threading.Event) -> Batch:
        rows = plan.rows_of(index)
        if plan.part_rows and rows > plan.part_rows:
            return parts.fetch(index, epoch, cancelled)
        if plan.batch_bytes >= _LEAST_ALIGNED_BYTES and not plan.frame.is_aligned(rows):
            # Received tensor by tensor, each to an aligned place: else a framework would have to copy the batch.
            return parts.fetch(index, epoch, cancelled)
        most = plan.frame.max_bytes(plan.batch_size, 1, plan.max_bytes)
        try:
            body = client.body(f"{path}/batches/{index}", query, max_bytes=most, cancelled=cancelled)
        except TooLarge:
            # Known only when it is read: rows differ in length, or this server has a lower limit.
            if rows == 1:
                raise
            return parts.fetch(index, epoch, cancelled, rows // 2)
        return only_batch(body, plan.frame)

    def fetch(block: Block, cancelled: threading.Event) -> list[Batch]:
        if placed is not None and (whole := placed.fetch(block, cancelled)) is not None:
            return whole
        if (read := pieces.fetch(block, cancelled)) is not None:
            return read
        query = {**plan.params, "epoch": str(block.epoch)}
        batches: list[Batch] = []
        start, alone = block.start, False
        while start < block.stop:
            if alone or block.stop - start == 1 or plan.part_rows:
                # After a broken stream, the request for the first missing batch returns the reason.
                one = fetch_one(start, query, block.epoch, cancelled)
                batches += _asked_for([one], start, block.epoch, plan, client.names)
                alone = False
            else:
                window = {"start": str(start), "stop": str(block.stop)}
                most = plan.frame.max_bytes(plan.batch_size, block.stop - start, plan.max_bytes)
                try:
                    body = client.body(
                        f"{path}/batches", query | window, max_bytes=most, cancelled=cancelled, raise_cut=True
                    )
                except TooLarge:
                    alone = True
                    continue
                except BodyCut as cut:
                    body, alone = cut.received, True
                    received(len(body))
                    retried()
                came = list(_whole_batches(body, plan.frame, cut=alone))
                if len(came) > block.stop - start:
                    raise BadAnswer(f"requested batches {start} … {block.stop - 1}, but received {len(came)} batches")
                batches += _asked_for(came, start, block.epoch, plan, client.names)
                # Do not repeat a stream that gave no complete batch.
                alone = alone or start == block.start + len(batches)
            start = block.start + len(batches)
        return batches

    spans = client.spans
    if spans is None:
        return fetch

    def traced(block: Block, cancelled: threading.Event) -> list[Batch]:
        with spans.block(
            dataset=unquote(path.rpartition("/")[2]), epoch=block.epoch, start=block.start, stop=block.stop
        ):
            return fetch(block, cancelled)

    return traced


def taker(
    client: Client,
    path: str,
    revision: str,
    frame: Frame,
    decoding: Mapping[str, ImageSpec],
    pool: BufferPool,
    *,
    as_stored: Collection[str] = (),
    only_plain: bool = False,
) -> Take:
    """The function that fetches rows by id, for some fields of a frame, of which some are image files `as_stored`.
    `only_plain` is that of `decoded`."""

    def take(
        rows: npt.NDArray[np.int64], fields: Sequence[str], cancelled: threading.Event
    ) -> dict[str, npt.NDArray[Any]]:
        specs = {name: spec for name, spec in decoding.items() if name in fields}
        encoded = [name for name in fields if name in specs or name in as_stored]
        request = {"rows": rows.tolist(), "fields": list(fields)} | ({"encoded": encoded} if encoded else {})
        batch = fetch_rows(client, path, revision, request, rows, frame.only(fields, weighted=False), cancelled)
        arrays = dict(batch)
        if not specs:
            return arrays
        arrays = decoded(arrays, rows, specs, pool, cancelled, only_plain=only_plain)
        decoded_images(len(rows))
        return arrays

    return take


def fetch_rows(
    client: Client,
    path: str,
    revision: str,
    request: Mapping[str, Any],
    rows: npt.NDArray[Any],
    frame: Frame,
    cancelled: threading.Event | None = None,
) -> Batch:
    """Send `request` and return the batch of `rows`.

    Raises
    ------
    BadAnswer
        The response contains other rows.
    """
    most = frame.max_bytes(len(rows))
    body = client.body(f"{path}/rows", {"revision": revision}, max_bytes=most, json=dict(request), cancelled=cancelled)
    batch = only_batch(body, frame)
    if not client.names.are_same(batch.revision, revision) or not np.array_equal(batch.rows, rows):
        raise BadAnswer(
            f"requested {len(rows)} rows of revision {revision}, but received {len(batch.rows)} of revision "
            f"{batch.revision}, or other rows: a proxy or cache between client and server mixes up responses"
        )
    return batch


def fetch_by_key(
    client: Client, path: str, revision: str, request: Mapping[str, Any], frame: Frame, *, several: bool
) -> Batch:
    """Send `request` for rows with the keys in it and return their batch; with `several`, a key may have several rows.

    Raises
    ------
    BadAnswer
        The response has another number of rows.
    """
    count = len(request["keys"])
    most = MAX_BODY_BYTES if several else frame.max_bytes(count)
    body = client.body(f"{path}/rows", {"revision": revision}, max_bytes=most, json=dict(request))
    batch = only_batch(body, frame)
    rows = len(batch.rows)
    if not client.names.are_same(batch.revision, revision) or (rows < count if several else rows != count):
        raise BadAnswer(
            f"requested {count} keys of revision {revision}, but received {rows} rows of revision {batch.revision}: a "
            "proxy or cache between client and server mixes up responses"
        )
    return batch


def only_tensor(
    body: npt.NDArray[np.uint8], name: str, dtype: str, revision: str, names: Names
) -> tuple[npt.NDArray[Any], dict[str, str]]:
    """The single tensor of a body that is not a batch, and the metadata of the body."""
    tensors, about, _ = read_body(body)
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != dtype or not names.are_same(about.get("revision", ""), revision):
        raise BadAnswer(
            f"requested {name!r} of revision {revision}, but received {', '.join(map(repr, tensors)) or 'nothing'} of "
            f"revision {about.get('revision')}"
        )
    return tensor, about


def only_batch(body: npt.NDArray[np.uint8], frame: Frame) -> Batch:
    """The batch in a body that contains a single batch."""
    batches = list(_whole_batches(body, frame))
    if len(batches) != 1:
        raise BadAnswer(f"requested one batch, but received {len(batches)}")
    return batches[0]


def _whole_batches(body: npt.NDArray[np.uint8], frame: Frame, *, cut: bool = False) -> Iterator[Batch]:
    """The batches in a body; with `cut`, the complete ones before its broken end."""
    try:
        for run in read_runs(body):
            frame.check(run.tensors)
            stacked = dict(run.tensors)
            rows, weights = stacked.pop(ROWS), stacked.pop(WEIGHT, None)
            try:
                epoch, revision = int(run.metadata["epoch"]), run.metadata["revision"]
            except (KeyError, ValueError) as error:
                raise BadAnswer(f"the response is not a batch: {error} is missing") from None
            for number, index in enumerate(run.indices):
                yield Batch(
                    {name: tensor[number] for name, tensor in stacked.items()},
                    rows[number],
                    None if weights is None else weights[number],
                    index=index,
                    epoch=epoch,
                    revision=revision,
                    sparse=frame.sparse,
                )
    except BadAnswer:
        if not cut:
            raise


def check_asked_for(batch: Batch, index: int, epoch: int, revision: str, names: Names) -> None:
    """Raise `BadAnswer` if this is another batch: a proxy or cache has mixed up responses."""
    is_same = batch.revision == revision or names.are_same(batch.revision, revision)
    if (batch.index, batch.epoch) != (index, epoch) or not is_same:
        raise BadAnswer(
            f"requested batch {index} of epoch {epoch}, revision {revision}, but received batch {batch.index} of epoch "
            f"{batch.epoch}, revision {batch.revision}: a proxy or cache between client and server mixes up responses"
        )


def rows_in(batch: Batch, frame: Frame) -> int:
    """Rows of a batch as it arrived: packed rows, or rows of the dataset."""
    return len(batch[ROWS + OFFSETS]) - 1 if frame.packed else len(batch.rows)


def _asked_for(batches: list[Batch], first: int, epoch: int, plan: Plan, names: Names) -> list[Batch]:
    """Check that the batches start at `first`, belong to the epoch and revision, and have all their rows.

    Raises
    ------
    BadAnswer
    """
    revision = plan.params["revision"]
    for index, batch in enumerate(batches, first):
        check_asked_for(batch, index, epoch, revision, names)
        count = rows_in(batch, plan.frame)
        if count != plan.rows_of(index):
            raise BadAnswer(f"batch {index} has {count} rows, which does not match the plan")
    return batches
