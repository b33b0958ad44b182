"""Batches and rows from the server: the requests for them, and whether what came is what was asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..errors import BadAnswer
from ..frames import Frame
from ..images import ImageSpec
from ..net.client import Client
from ..net.trace import received, retried
from ..net.transport import BodyCut
from ..plan import Plan
from ..wire import ROWS, WEIGHT, read_body, read_runs
from .cached import Take
from .decoding import decoded


def fetcher(client: Client, path: str, plan: Plan) -> Fetch[Batch]:
    """A function that fetches one block of a plan; it refers to no `Dataset`, so that threads keep none alive."""

    def fetch(block: Block, cancelled: threading.Event) -> list[Batch]:
        query = {**plan.params, "epoch": str(block.epoch)}
        batches: list[Batch] = []
        start, alone = block.start, False
        while start < block.stop:
            if alone or block.stop - start == 1:
                # The first missing batch of a broken stream, asked for alone, answers with the reason.
                most = plan.frame.max_bytes(plan.batch_size, 1, plan.max_bytes)
                body = client.body(f"{path}/batches/{start}", query, max_bytes=most, cancelled=cancelled)
                batches += _asked_for([only_batch(body, plan.frame)], start, block.epoch, plan)
                alone = False
            else:
                window = {"start": str(start), "stop": str(block.stop)}
                most = plan.frame.max_bytes(plan.batch_size, block.stop - start, plan.max_bytes)
                try:
                    body = client.body(
                        f"{path}/batches", query | window, max_bytes=most, cancelled=cancelled, raise_cut=True
                    )
                except BodyCut as cut:
                    body, alone = cut.received, True
                    received(len(body))
                    retried()
                came = list(_whole_batches(body, plan.frame, cut=alone))
                if len(came) > block.stop - start:
                    raise BadAnswer(f"batches {start} … {block.stop - 1} were asked for, but {len(came)} came")
                batches += _asked_for(came, start, block.epoch, plan)
                # A stream without a whole batch is not asked for again and again.
                alone = alone or start == block.start + len(batches)
            start = block.start + len(batches)
        return batches

    return fetch


def taker(
    client: Client, path: str, revision: str, frame: Frame, decoding: Mapping[str, ImageSpec], pool: BufferPool
) -> Take:
    """A function that fetches rows by their ids, of fields of a frame."""

    def take(
        rows: npt.NDArray[np.int64], fields: Sequence[str], cancelled: threading.Event
    ) -> dict[str, npt.NDArray[Any]]:
        specs = {name: spec for name, spec in decoding.items() if name in fields}
        request = {"rows": rows.tolist(), "fields": list(fields)} | ({"encoded": list(specs)} if specs else {})
        batch = fetch_rows(client, path, revision, request, rows, frame.only(fields, weighted=False), cancelled)
        arrays = dict(batch)
        return decoded(arrays, rows, specs, pool, cancelled) if specs else arrays

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
    """The batch of those rows, as `request` asks for them.

    Raises
    ------
    BadAnswer
        Others came.
    """
    most = frame.max_bytes(len(rows))
    body = client.body(f"{path}/rows", {"revision": revision}, max_bytes=most, json=dict(request), cancelled=cancelled)
    batch = only_batch(body, frame)
    if batch.revision != revision or not np.array_equal(batch.rows, rows):
        raise BadAnswer(
            f"{len(rows)} rows of revision {revision} were asked for, but {len(batch.rows)} of revision "
            f"{batch.revision} came, or others: something between here and the server mixes answers up"
        )
    return batch


def only_tensor(
    body: npt.NDArray[np.uint8], name: str, dtype: str, revision: str
) -> tuple[npt.NDArray[Any], dict[str, str]]:
    """The tensor of a body that is no batch, and the body's metadata."""
    tensors, about, _ = read_body(body)
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != dtype or about.get("revision") != revision:
        raise BadAnswer(
            f"{name!r} of revision {revision} was asked for, but {', '.join(map(repr, tensors)) or 'nothing'} of "
            f"revision {about.get('revision')} came"
        )
    return tensor, about


def only_batch(body: npt.NDArray[np.uint8], frame: Frame) -> Batch:
    """The batch in a body of one."""
    batches = list(_whole_batches(body, frame))
    if len(batches) != 1:
        raise BadAnswer(f"the answer has {len(batches)} batches where one was asked for")
    return batches[0]


def _whole_batches(body: npt.NDArray[np.uint8], frame: Frame, *, cut: bool = False) -> Iterator[Batch]:
    """The batches in a body; with `cut`, those before its broken end."""
    try:
        for run in read_runs(body):
            frame.check(run.tensors)
            stacked = dict(run.tensors)
            rows, weights = stacked.pop(ROWS), stacked.pop(WEIGHT, None)
            try:
                epoch, revision = int(run.metadata["epoch"]), run.metadata["revision"]
            except (KeyError, ValueError) as error:
                raise BadAnswer(f"the answer is no batch: {error} is missing") from None
            for number, index in enumerate(run.indices):
                yield Batch(
                    {name: tensor[number] for name, tensor in stacked.items()},
                    rows[number],
                    None if weights is None else weights[number],
                    index=index,
                    epoch=epoch,
                    revision=revision,
                )
    except BadAnswer:
        if not cut:
            raise


def check_asked_for(batch: Batch, index: int, epoch: int, revision: str) -> None:
    """Raise `BadAnswer` where this is another batch: a proxy or a cache has mixed answers up."""
    if (batch.index, batch.epoch, batch.revision) != (index, epoch, revision):
        raise BadAnswer(
            f"batch {index} of epoch {epoch} was asked for, but batch {batch.index} of epoch {batch.epoch} came "
            f"(revision {batch.revision}, not {revision}): something between here and the server mixes answers up"
        )


def _asked_for(batches: list[Batch], first: int, epoch: int, plan: Plan) -> list[Batch]:
    """These batches, if they are `first` and its followers, of that epoch and revision, with all their rows.

    Raises
    ------
    BadAnswer
    """
    revision, final = plan.params["revision"], plan.batches - 1
    for index, batch in enumerate(batches, first):
        check_asked_for(batch, index, epoch, revision)
        if len(batch.rows) != (plan.batch_size if index < final else plan.last_rows):
            raise BadAnswer(f"batch {index} came with {len(batch.rows)} rows, which are not those of the plan")
    return batches
