"""A remote dataset as a `tf.data.Dataset`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from .loops.loader import Loader
from .loops.loop_options import check_dense
from .loops.tree import mapped
from .samples import Samples


def tf_data(dataset: Samples, split: str = "all", **options: Any) -> tf.data.Dataset:
    """Batches of a split for ``model.fit`` and `tf.data` loops; made by `Dataset.tf_data`.

    Each iteration is one pass, in a new order if ``shuffle`` is set; ``repeat()`` starts the next one. The dataset is
    already batched and prefetched. It reads from a generator in this process: with several machines, create one on each
    with ``shard=`` and ``shards=`` instead of letting `tf.distribute` shard it.

    TensorFlow uses the memory of arrays that are 64-byte aligned, as most are, and copies others. The memory is
    recycled when the tensors are gone. It copies tensors to a GPU itself.

    Parameters
    ----------
    dataset : Samples
    split : str
    **options
        See `h5feed.loops.loader.Loader`.

    Returns
    -------
    tf.data.Dataset
        Of ``(x,)``, ``(x, y)`` or ``(x, y, weight)``, with known dtypes and shapes, and known cardinality, unless
        ``follow=True``. The batch dimension is
        known if every batch is full (``last="drop"`` or ``"pad"``). With ``pad=`` and no ``max_length=``, the second
        dimension is not known.
    """
    check_dense(options, "tf.data")
    follow = bool(options.get("follow"))
    loader = Loader(dataset, split, **options)
    plan = loader.plan
    is_cut = plan.params.get("last", "keep") != "keep" or int(plan.params.get("shards", 1)) > 1
    rows = plan.batch_size if is_cut or (plan.rows % plan.batch_size == 0 and not follow) else None
    differs = plan.layout is not None and not plan.layout.is_fixed

    def spec(array: Any) -> tf.TensorSpec:
        sample = (None, *array.shape[2:]) if differs and array.ndim > 1 else array.shape[1:]
        return tf.TensorSpec((rows, *sample), tf.as_dtype(array.dtype))

    # Class modes, statistics and a transform change dtypes and shapes: look at a batch.
    example = loader.example()
    if len(example) == 3 and example[1] is None:
        # A signature cannot contain the None that stands for targets before the weights of padded rows.
        signature = mapped(spec, (example[0], example[2]))
        pairs = tf.data.Dataset.from_generator(
            lambda: ((x, weight) for x, _, weight in loader), output_signature=signature
        )
        made = pairs.map(lambda x, weight: (x, None, weight))
    else:
        made = tf.data.Dataset.from_generator(lambda: iter(loader), output_signature=mapped(spec, example))
    return made if follow else made.apply(tf.data.experimental.assert_cardinality(len(loader)))
