"""A remote dataset as a `tf.data.Dataset`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from .loops.loader import Loader
from .loops.tree import mapped
from .remote_dataset import RemoteDataset


def tf_data(dataset: RemoteDataset, split: str = "all", **options: Any) -> tf.data.Dataset:
    """Batches of a split for ``model.fit`` and loops over `tf.data`; made by `Dataset.tf_data`.

    Each iteration over it is one pass, in an order of its own where ``shuffle`` is set; ``repeat()`` begins the next
    one. It is batched and fetched ahead already. It ends in a generator in this process: replicas on other machines
    make one each, with ``shard=`` and ``shards=``, instead of having `tf.distribute` divide it.

    Parameters
    ----------
    dataset : RemoteDataset
    split : str
    **options
        As of `h5feed.loops.loader.Loader`.

    Returns
    -------
    tf.data.Dataset
        Of ``(x,)``, ``(x, y)`` or ``(x, y, weight)``, with known cardinality, dtypes and shapes; the number of rows is
        known where every batch is full (``last="drop"`` or ``"pad"``).
    """
    loader = Loader(dataset, split, **options)
    plan = loader.plan
    is_cut = plan.params.get("last", "keep") != "keep" or int(plan.params.get("shards", 1)) > 1
    rows = plan.batch_size if is_cut or plan.rows % plan.batch_size == 0 else None

    def spec(array: Any) -> tf.TensorSpec:
        return tf.TensorSpec((rows, *array.shape[1:]), tf.as_dtype(array.dtype))

    # Only a batch tells what class modes, statistics and a transform make of the fields.
    signature = mapped(spec, loader.example())
    made = tf.data.Dataset.from_generator(lambda: iter(loader), output_signature=signature)
    return made.apply(tf.data.experimental.assert_cardinality(len(loader)))
