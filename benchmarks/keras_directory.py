"""A process that loads JPEGs as Keras does from a folder: ``python keras_directory.py FOLDER SIDE BATCH``.

It needs TensorFlow, and nothing of h5feed. Each line on standard input asks for one more epoch; what is answered is the
number of its images. ``tf.data`` reads, decodes and resizes in parallel on all cores.
"""

from __future__ import annotations

import os
import sys

os.environ.update({"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""})


def main(folder: str, side: int, batch: int) -> None:
    """Answer until standard input ends."""
    import keras

    images = keras.utils.image_dataset_from_directory(
        folder,
        image_size=(side, side),
        crop_to_aspect_ratio=True,
        batch_size=batch,
        shuffle=True,
        seed=0,
        verbose=False,
    )
    for _ in sys.stdin:
        print(sum(int(x.shape[0]) for x, _ in images), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
