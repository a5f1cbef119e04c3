"""Claim 12 [B]: batch norm degrades at small batches, group norm does not.

BN's statistics come from the batch, so that a small one gives noise in training and running statistics that do not fit
at test time; GN's come from one example. Measured on the digits: held-out error of a small convolutional network
(convolutions to 8 and 16 channels, a norm after each, one dense layer) after training with batches of 32, 16, 8, 4 and
2 for the same number of epochs, rate 0.05 * batch / 32 with momentum 0.9; GN in groups of 4 channels.

Agrees when, on average over seeds, BN's error at batch 2 is above its error at batch 32 by more than two standard
errors, and by more than GN's is.

Added after the first run, to see why it does not: the same for a network 64-64-64-10 of dense layers, where BN has as
many values as the batch has examples and no more (GN in groups of 16 units). The rule does not look at it.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, Conv3x3, Dense, Flatten, Network, Relu, Sgd, accuracy, digits, fit, mlp

from fastnorm import nn

CLAIM = claim.Claim(12, "B", "BN degrades at small batches, GN does not")
BATCHES = (32, 16, 8, 4, 2)
NORMS = {
    "BN": lambda channels: nn.BatchNorm(channels, channel_axis=-1),
    "GN": lambda channels: nn.GroupNorm(4 if channels == 64 else channels // 4, channels, channel_axis=-1),
}


def convolutional(norm: Any, rng: np.random.Generator) -> Network:
    convolutions = [Conv3x3(1, 8, rng), norm(8), Relu(), Conv3x3(8, 16, rng, step=2), norm(16), Relu()]
    return Network(*convolutions, Flatten(), Dense(256, 10, rng))


def held_out_error(seed: int, kind: str, batch: int, images: int, epochs: int, *, dense: bool) -> float:
    x, labels, held_out, held_out_labels = digits()
    rng = np.random.default_rng(seed)
    if dense:
        net = mlp([64, 64, 64, 10], rng, NORMS[kind])
    else:
        x, held_out = x.reshape(-1, 8, 8, 1), held_out.reshape(-1, 8, 8, 1)
        net = convolutional(NORMS[kind], rng)
    fit(net, x[:images], labels[:images], Sgd(net, 0.05 * batch / 32), rng, epochs=epochs, batch=batch)
    return 1 - accuracy(net.predict(held_out), held_out_labels)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, images, epochs = claim.pick(size, (1, 256, 1), (3, 1437, 2), (8, 1437, 10))
    both: dict[bool, dict[str, Array]] = {
        dense: {
            kind: np.array(
                [
                    [held_out_error(s, kind, batch, images, epochs, dense=dense) for batch in BATCHES]
                    for s in claim.seeds(seed, count)
                ]
            )
            for kind in NORMS
        }
        for dense in (False, True)
    }
    errors = both[False]
    rises = {kind: e[:, -1] - e[:, 0] for kind, e in errors.items()}
    mean = {kind: float(r.mean()) for kind, r in rises.items()}
    error = float(rises["BN"].std(ddof=1) / count**0.5) if count > 1 else 0.0
    agrees = mean["BN"] > 2 * error and mean["BN"] > mean["GN"]

    def words(dense: bool) -> str:
        return ", ".join(
            f"{kind} {' / '.join(f'{100 * value:.1f}' for value in e.mean(axis=0))}" for kind, e in both[dense].items()
        )

    return claim.Finding(
        f"held-out error in % at batch 32 / 16 / 8 / 4 / 2: {words(False)}; from 32 to 2 BN "
        f"{100 * mean['BN']:+.1f} (standard error {100 * error:.1f}), GN {100 * mean['GN']:+.1f} points",
        bool(agrees),
        {
            f"error, {'dense, ' if dense else ''}{kind}, batch {batch}": float(value)
            for dense, each in both.items()
            for kind, e in each.items()
            for batch, value in zip(BATCHES, e.mean(axis=0), strict=True)
        },
        "with convolutions BN has 32 values or more per channel even at batch 2; with dense layers, where it has 2, "
        f"the errors are {words(True)}",
        data=both,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    for axes, dense in zip(figure.subplots(1, 2), (False, True), strict=True):
        for (kind, errors), colour in zip(finding.data[dense].items(), (claim.BATCH, claim.OTHER), strict=True):
            mean, std = 100 * errors.mean(axis=0), 100 * errors.std(axis=0)
            axes.errorbar(BATCHES, mean, std, fmt="o-", color=colour, label=kind, capsize=3, markersize=4)
        axes.set_xscale("log", base=2)
        axes.invert_xaxis()
        axes.set_xticks(BATCHES, BATCHES)
        axes.set_title("dense layers" if dense else "convolutions", fontsize=9)
        axes.set(xlabel="batch size", ylabel="held-out error, %", ylim=(0, None))
        axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
