"""Arrays as the torch backend takes them."""

from __future__ import annotations

from typing import Any

import numpy as np


def torch_tensor(array: Any) -> Any:
    """A tensor of the same memory; pinned where there is a CUDA device to copy it to."""
    import torch

    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        return array
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
