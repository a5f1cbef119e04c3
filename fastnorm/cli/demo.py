"""`python -m fastnorm demo`: trains a small network on real digits, with the kernels, then with the NumPy references.

The same numbers go in (data, split, first weights, order of the batches, dropout masks), so the two loss curves show
whether the kernels compute what the references say. It writes nothing but the picture asked for with --plot.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import as_file, files
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastnorm.cli.network import Network
from fastnorm.cli.screen import Screen, UsageError, figure, require_plots

_TRAINING_IMAGES = 1437  # of 1,797: four fifths, the rest is held out
_SPLIT_SEED = 0
_BATCH = 64
_RATE = 0.05


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], (N, 8, 8), and their labels; the held-out part is never trained on."""

    images: NDArray[Any]
    labels: NDArray[np.intp]
    held_out_images: NDArray[Any]
    held_out_labels: NDArray[np.intp]


@dataclass(frozen=True)
class Training:
    """What a run leaves: the mean loss of each epoch, held-out accuracy after each, and seconds for the training."""

    losses: list[float]
    accuracies: list[float]
    seconds: float


def load_digits(dtype: DTypeLike = np.float32, split_seed: int = _SPLIT_SEED) -> Digits:
    """The digits that the package ships (fastnorm/data/README.md has source and licence), split at random."""
    with as_file(files("fastnorm") / "data" / "digits.npz") as path, np.load(path) as file:
        images, labels = file["images"].astype(dtype) / 16, file["labels"].astype(np.intp)
    order = np.random.default_rng(split_seed).permutation(len(images))
    train, held_out = order[:_TRAINING_IMAGES], order[_TRAINING_IMAGES:]
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def train(
    norms: ModuleType, digits: Digits, *, epochs: int, seed: int, screen: Screen | None = None, label: str = ""
) -> Training:
    """Train a fresh network through `norms` (fastnorm or fastnorm.reference), showing loss and accuracy as it goes."""
    network = Network(norms, np.random.default_rng([seed, 1]), digits.images.dtype.type)
    order = np.random.default_rng([seed, 2])
    losses: list[float] = []
    accuracies: list[float] = []
    seconds = 0.0
    screen = screen or Screen(plain=True)
    batches = len(digits.images) // _BATCH
    with screen.progress(label, epochs) as advance:
        for epoch in range(epochs):
            start = time.perf_counter()
            shuffled = order.permutation(len(digits.images))
            total = 0.0
            for batch in range(batches):
                chosen = shuffled[batch * _BATCH : (batch + 1) * _BATCH]
                # Half a cosine, from _RATE to 0 over the whole run.
                rate = _RATE * 0.5 * (1 + math.cos(math.pi * (epoch * batches + batch) / (epochs * batches)))
                total += network.step(digits.images[chosen], digits.labels[chosen], rate)
            seconds += time.perf_counter() - start
            losses.append(total / batches)
            guesses = network.scores(digits.held_out_images).argmax(axis=1)
            accuracies.append(float((guesses == digits.held_out_labels).mean()))
            advance(f"loss {losses[-1]:.4f}  held-out accuracy {accuracies[-1]:.1%}")
    return Training(losses, accuracies, seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="of first weights, batches and dropout (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of the whole training")
    parser.add_argument("--no-reference", action="store_true", help="only the run with the kernels")
    parser.add_argument("--plot", metavar="FILE", help="write both loss curves to FILE (.png, .svg or .pdf)")


def run(options: argparse.Namespace, screen: Screen) -> int:
    if options.epochs < 1:
        raise UsageError(f"--epochs must be 1 or more, not {options.epochs}")
    if options.seed < 0:
        raise UsageError(f"--seed must be 0 or more, not {options.seed}")
    require_plots(options.plot)
    digits = load_digits(options.dtype)
    screen.line(
        f"digits: {len(digits.images)} images of 8x8 to train on, {len(digits.held_out_images)} held out "
        "(UCI, E. Alpaydin and C. Kaynak, CC BY 4.0)"
    )
    runs = {}
    for label, name in (("kernels", "fastnorm"), ("references", "fastnorm.reference")):
        if name == "fastnorm" or not options.no_reference:
            module = import_module(name)
            runs[label] = train(
                module, digits, epochs=options.epochs, seed=options.seed, screen=screen, label=f"{label:<10}"
            )
    screen.line()
    _show(runs, screen)
    if options.plot:
        _plot(runs, options.plot)
        screen.line(f"picture: {options.plot}")
    return 0


def _show(runs: dict[str, Training], screen: Screen) -> None:
    kernels, reference = runs["kernels"], runs.get("references")
    if reference is not None:
        rows = [
            [str(epoch + 1), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}", f"{kernels.accuracies[epoch]:.1%}",
             f"{reference.accuracies[epoch]:.1%}"]
            for epoch, (a, b) in enumerate(zip(kernels.losses, reference.losses, strict=True))
        ]  # fmt: skip
        header = ["epoch", "loss, kernels", "loss, references", "difference", "accuracy, kernels", "references"]
        screen.table("Both loss curves", header, rows)
        gap = max(abs(a - b) for a, b in zip(kernels.losses, reference.losses, strict=True))
        screen.line(f"largest difference between the loss curves: {gap:.1e}")
    screen.line(f"held-out accuracy: {kernels.accuracies[-1]:.1%}")
    screen.line(f"training time: {kernels.seconds:.2f} s with the kernels")
    if reference is not None:
        ratio = reference.seconds / kernels.seconds
        screen.line(f"               {reference.seconds:.2f} s with the references ({ratio:.1f} times as long)")


def _plot(runs: dict[str, Training], file: str) -> None:
    picture = figure(9, 3.6)
    loss, accuracy = picture.subplots(1, 2)
    for (label, result), style in zip(runs.items(), ("-", "--"), strict=False):
        epochs = range(1, len(result.losses) + 1)
        loss.semilogy(epochs, result.losses, style, label=f"{label} ({result.seconds:.1f} s)")
        accuracy.plot(epochs, [100 * a for a in result.accuracies], style, label=label)
    loss.set(xlabel="epoch", ylabel="training loss")
    accuracy.set(xlabel="epoch", ylabel="held-out accuracy, %")
    loss.legend()
    accuracy.legend()
    picture.suptitle("Training on the UCI digits through fastnorm")
    picture.savefig(file, dpi=150)
