"""Creates the training loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from .extras import needing
from .options import LoaderOptions, SequenceOptions, TorchOptions
from .samples import Samples

if TYPE_CHECKING:
    from .keras import Sequence
    from .loops.loader import Loader
    from .torch import TorchBatches


class Trainable(Samples):
    """Samples that training loops are made of."""

    def sequence(self, split: str = "all", **options: Unpack[SequenceOptions]) -> Sequence:
        """A `keras.utils.PyDataset` of this dataset; see `h5feed.keras.Sequence` for the options."""
        how = "`pip install keras jax` and set KERAS_BACKEND=jax, or use tensorflow or torch"
        with needing("a Sequence", "Keras 3 and a backend", how):
            from .keras import Sequence

        return Sequence(self, split, **options)

    def loader(self, split: str = "all", **options: Unpack[LoaderOptions]) -> Loader:
        """Batches of ``(x, y)`` for your own training loop; see `h5feed.loops.loader.Loader` for the options."""
        from .loops.loader import Loader

        return Loader(self, split, **options)

    def torch(self, split: str = "all", **options: Unpack[TorchOptions]) -> TorchBatches:
        """A `torch.utils.data.IterableDataset` of batches; see `h5feed.torch.TorchBatches` for the options."""
        with needing("torch()", "PyTorch", "`pip install torch`"):
            from .torch import TorchBatches

        return TorchBatches(self, split, **options)

    def tf_data(self, split: str = "all", **options: Unpack[LoaderOptions]) -> Any:
        """A `tf.data.Dataset` of batches; see `h5feed.tf.tf_data` for the options."""
        with needing("tf_data()", "TensorFlow", "`pip install tensorflow`"):
            from .tf import tf_data

        return tf_data(self, split, **options)
