"""``python -m benchmarks.on_card``: how much of its time a CUDA card computes while h5feed feeds it.

The same model takes the same number of steps over three sources: one batch that lies on the card already, which is as
fast as it can compute; arrays in memory, which is Keras at its best without h5feed; and a `Sequence` that a real server
on this machine feeds, by one worker and by two. The ratio of the last to the first is the accelerator utilisation of
MLPerf Storage: the time that computing takes, of the time that training takes. Its ResNet-50 asks for 0.9.

With torch, a loop of its own takes the same steps twice more: with `h5feed.torch.to_device`, which copies from
page-locked memory beside the computation, and with ``tensor.to(device)``, which copies from ordinary memory and waits.
Where nvidia-smi is, it is asked how busy the card is with each source.

The backend is the one that KERAS_BACKEND names, or else torch or JAX, whichever is installed. On a machine that has
nothing but Python and the card's driver, from the root of the repository::

    python3 -m venv venv
    venv/bin/pip install -r requirements/server.txt keras "torch==2.13.0"     # or "jax[cuda12]" in the place of torch
    PYTHONPATH=app:client venv/bin/python -m benchmarks.on_card

Without a card, ``--model tiny`` measures on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np

from . import report
from .measure import Figure, Turn, compare, count, take_turns
from .served import WORKERS
from .servers import h5feed_server

CLASSES = 1000

SIDES = {"tiny": 32, "resnet50": 224}
"""Height and width of the images of each model; they are uint8 of three channels."""

_BACKENDS = ("torch", "jax")

_AHEAD, _PLAIN = "copied ahead", "copied in turn"

PINNED = Figure("on_card_pinned_vs_pageable", {"2 workers": _AHEAD}, {"2 workers": _PLAIN}, 1.0)
"""Of a loop of torch alone."""

FIGURES = (
    Figure("on_card_utilisation", {name: name for name in WORKERS}, dict.fromkeys(WORKERS, "on the card"), 0.9),
    Figure("on_card_vs_memory", {name: name for name in WORKERS}, dict.fromkeys(WORKERS, "in memory"), 1.0),
    Figure("on_card_memory_utilisation", {"no server": "in memory"}, {"no server": "on the card"}, 0.9),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    backend = os.environ.setdefault("KERAS_BACKEND", _installed())
    if backend not in _BACKENDS:
        print(f"Keras cannot keep a batch on the GPU with the backend {backend!r}: set KERAS_BACKEND to torch or jax")
        return 1
    card = _card(backend)
    if card is None and options.model != "tiny":
        again = "python -m benchmarks.on_card --model tiny --batch-size 32 --rows 1024 --steps 32"
        print(f"{backend} {version(backend)} finds no CUDA GPU. To run on the CPU: `{again}`")
        return 1
    # Only now: it reads the variable above.
    import keras

    keras.utils.set_random_seed(0)
    if options.precision != "float32":
        keras.mixed_precision.set_global_policy(options.precision)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    batch = options.batch_size
    rows = max(1, options.rows // batch) * batch
    passes = -(-options.steps * batch // rows)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        images, labels = _make_file(folder / "images.h5", rows, SIDES[options.model])
        say(f"{rows:,} images of {SIDES[options.model]}×{SIDES[options.model]}×3 bytes, {images.nbytes / 1e6:,.0f} MB")
        model = _model(options.model)
        sources: dict[str, Any] = {"on the card": _constant(images[:batch], labels[:batch], rows // batch)}
        turns = {"on the card": _turn(model, sources["on the card"], passes, rows)}
        turns["in memory"] = _turn(model, (images, labels), passes, rows, batch_size=batch)
        for variant, workers in WORKERS.items():
            server = stack.enter_context(h5feed_server(folder, workers))
            dataset = stack.enter_context(h5feed.connect(server.url))["images"]
            first = dataset.batch(0, batch_size=batch, shuffle=True)
            np.testing.assert_array_equal(first["images"], images[first.rows])
            sources[variant] = dataset.sequence(batch_size=batch, shuffle=True, verbose=False)
            turns[variant] = _turn(model, sources[variant], passes, rows)
        figures: tuple[Figure, ...] = FIGURES
        if backend == "torch":
            turns |= _turns_of_torch(model, dataset, passes, rows, batch)
            figures = (*FIGURES, PINNED)
        say(f"training {options.model} on {card or 'the CPU'}")
        rates = take_turns(turns, options.rounds)
        measured = [one for figure in figures for one in compare(figure, rates)]
        if card is not None:
            for name, turn in turns.items():
                busy = _busy(turn)
                if busy is not None:
                    say(f"{name}: the card is busy {busy:.0f}% of the time, says nvidia-smi")
        for variant in WORKERS:
            say(f"{variant}: {sources[variant].waited:.2f} s spent waiting for batches, including the warm-up")
            sources[variant].close()
    print()
    print(f"{card or 'CPU, no CUDA GPU'}; Keras {version('keras')} on {backend} {version(backend)}")
    print(f"{options.model}, {options.precision}, batch size {batch}, {passes * rows // batch} steps per round")
    report.print_table(measured, {}, options.rounds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_card",
        description="Measures the share of time that a CUDA GPU computes while h5feed feeds it.",
    )
    parser.add_argument("--model", choices=SIDES, default="resnet50")
    parser.add_argument("--batch-size", type=count, default=256)
    parser.add_argument(
        "--rows",
        type=count,
        default=8192,
        help="number of images, rounded down to whole batches (default 8192: 1.2 GB)",
    )
    parser.add_argument(
        "--steps", type=count, default=64, help="training steps per round, rounded up to whole passes (default 64)"
    )
    parser.add_argument(
        "--rounds", type=count, default=5, help="rounds of each source (default 5); the results are medians"
    )
    parser.add_argument("--precision", choices=["mixed_bfloat16", "mixed_float16", "float32"], default="mixed_bfloat16")
    return parser


def _installed() -> str:
    return next((name for name in _BACKENDS if importlib.util.find_spec(name) is not None), "none")


def _card(backend: str) -> str | None:
    """The name of the card that the backend computes on, with its driver; None where there is none."""
    if backend == "torch":
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    else:
        import jax

        device = jax.devices()[0]
        name = device.device_kind if device.platform == "gpu" else None
    if name is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return f"{name}, driver {asked.stdout.split()[0]}"
    return f"{name}, driver unknown"


def _make_file(path: Path, rows: int, side: int) -> tuple[Any, Any]:
    """Write images of noise and their labels; returns them too."""
    random = np.random.default_rng(0)
    images = np.frombuffer(random.bytes(rows * side * side * 3), np.uint8).reshape(rows, side, side, 3)
    labels = random.integers(0, CLASSES, rows)
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images, labels
    return images, labels


def _model(name: str) -> Any:
    """Takes bytes, which are scaled on the card: a quarter of what floats would take on the way there."""
    import keras

    inputs = keras.Input((SIDES[name], SIDES[name], 3), dtype="uint8")
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    if name == "resnet50":
        features = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg")(scaled)
    else:
        features = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(scaled)
        features = keras.layers.GlobalAveragePooling2D()(features)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, dtype="float32")(features))
    model.compile(keras.optimizers.SGD(1e-4), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _constant(images: Any, labels: Any, batches: int) -> Any:
    """A `keras.utils.PyDataset` of so many times the same batch, which lies where the model computes."""
    import keras

    batch = keras.ops.convert_to_tensor(images), keras.ops.convert_to_tensor(labels)

    class Constant(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return batches

        def __getitem__(self, index: int) -> Any:
            return batch

    return Constant()


def _turn(model: Any, source: Any, passes: int, rows: int, **options: Any) -> Turn:
    """Turns that train so many passes, and end when the card has done so."""
    x, y = source if isinstance(source, tuple) else (source, None)

    def turn() -> int:
        model.fit(x, y, epochs=passes, verbose=0, **options)
        _finish(model)
        return passes * rows

    return turn


def _turns_of_torch(model: Any, dataset: h5feed.Dataset, passes: int, rows: int, batch: int) -> dict[str, Turn]:
    """Turns of a loop of torch, which copies batches ahead or in turn."""
    import torch
    from h5feed.torch import to_device

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    options: dict[str, Any] = {"batch_size": batch, "shuffle": True}
    sources = {_AHEAD: dataset.torch(**options), _PLAIN: dataset.torch(**options)}

    def train(batches: Any) -> None:
        for images, labels in batches:
            scores = model(images, training=True)
            loss = torch.nn.functional.cross_entropy(scores.float(), labels.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def turn(name: str) -> int:
        for _ in range(passes):
            source = sources[name]
            train(to_device(source, device) if name == _AHEAD else (_moved(batch, device) for batch in source))
        _finish(model)
        return passes * rows

    return {name: partial(turn, name) for name in sources}


def _moved(batch: Any, device: Any) -> Any:
    return tuple(tensor.to(device) for tensor in batch)


def _busy(turn: Turn) -> float | None:
    """The mean of what nvidia-smi says of the first card during a turn, in percent; None if it says nothing."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={card}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        asking = subprocess.Popen([*command, "--loop-ms=200"], stdout=subprocess.PIPE, text=True)
    except OSError:
        return None
    try:
        turn()
    finally:
        asking.terminate()
    said, _ = asking.communicate(timeout=30)
    # The last line may have been cut off.
    numbers = [float(line) for line in said.splitlines()[:-1] if line.strip().isdigit()]
    return sum(numbers) / len(numbers) if numbers else None


def _finish(model: Any) -> None:
    """Wait until the device has done what it was given: it works behind the loop's back."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.block_until_ready(
            [  # type: ignore[no-untyped-call]
                variable.value for variable in model.variables
            ]
        )
    else:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
