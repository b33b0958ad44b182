"""The public dataset class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy.typing as npt

from .errors import UnsupportedField
from .extras import needing
from .lineage import Source, source_of
from .net import jobs
from .options import OrderOptions, SplitOptions, TorchRowsOptions
from .pictures import PNG, Picture
from .remote_dataset import RemoteDataset
from .row_selection import row_ids
from .row_table import RowTable, row_table
from .suggestions import check_options
from .trainable import Trainable

if TYPE_CHECKING:
    from .torch import TorchRows


class Dataset(RemoteDataset, Trainable):
    """A dataset on a server, at a fixed revision.

    Every request names the revision. If the data changes, requests fail with `RevisionChanged`; data of two revisions
    is never mixed.

    Attributes
    ----------
    name, revision : str
    rows : int
    fields : dict of str to Field
    class_names : list of str or None
        Of the first label field; each field also has its own.
    info : dict
        The server's full description of the dataset.
    """

    def show(
        self,
        split: str = "all",
        *,
        field: str | None = None,
        rows: npt.ArrayLike | None = None,
        per_class: int | None = None,
        side: int | None = None,
        **options: Unpack[SplitOptions],
    ) -> Picture | RowTable:
        """Look at rows: a contact sheet of images, or a table if there are none. Notebooks display both.

        Parameters
        ----------
        split : str
            A contact sheet has a line of images for each class, spread evenly over the split. A table has ten rows.
        field : str, optional
            Default: the first input that holds images; else all fields.
        rows : sequence of int, optional
            These rows, in this order, instead of some of a split: ``batch.rows``, for example. A contact sheet shows
            1,024, a table 100.
        per_class, side : int, optional
            Of a contact sheet: images of a line (8), and pixels of an image's longer side (96).

        Raises
        ------
        FieldNotFound, SplitNotFound, RowOutOfRange, TooLarge
        """
        wanted = None if rows is None else row_ids(rows)
        besides = {
            "field": field,
            "rows": None if wanted is None else ",".join(map(str, wanted.tolist())),
            "per_class": per_class,
            "side": side,
        }
        params = self._params(
            None if wanted is not None and split == "all" else split, options, SplitOptions, self.show
        )
        params |= {name: str(value) for name, value in besides.items() if value is not None}
        try:
            return Picture(self._client.content(f"{self._path}/preview", params, PNG))
        except UnsupportedField:
            if per_class is not None or side is not None:
                raise
        return row_table(self, split, field, wanted, options)

    def croissant(self) -> dict[str, Any]:
        """The dataset in the vocabulary of MLCommons (Croissant 1.1), which dataset search engines read."""
        document: dict[str, Any] = self._client.json(f"{self._path}/croissant", {"revision": self.revision})
        return document

    def source(
        self,
        split: str = "all",
        *,
        batch_size: int | None = None,
        timeout: float = jobs.TIMEOUT,
        **options: Unpack[OrderOptions],
    ) -> Source:
        """The record of a split or an order, to log with a training run; `h5feed.reopen` gives the same batches.

        Loops have a method of the same name.

        Parameters
        ----------
        batch_size : int, optional
        timeout : float
            Seconds to wait if the server has to hash files or compute splits first.

        Raises
        ------
        Preparing, ReadTimeout, SplitNotFound
        """
        check_options(options, self.source, OrderOptions.__annotations__)
        given: dict[str, Any] = dict(options) | ({} if batch_size is None else {"batch_size": batch_size})
        dataset = self.joined_by(given)
        return source_of(dataset, split, given, timeout)

    def torch_map(self, split: str = "all", **options: Unpack[TorchRowsOptions]) -> TorchRows:
        """A `torch.utils.data.Dataset` of single rows; see `h5feed.torch.TorchRows` for the options."""
        with needing("torch_map()", "PyTorch", "`pip install torch`"):
            from .torch import TorchRows

        return TorchRows(self, split, **options)
