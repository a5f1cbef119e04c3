"""Claim 14 [D]: under BN the prediction for one example depends on its batch; running statistics remove that.

Measured on a network 64-64-64-10 with BN, trained on the digits for a few epochs: 50 held-out images, each put into
many random batches of 32. The standard deviation of the probability of its class over the batches (mean over the
images), and the share of images whose predicted class changes; with the statistics of the batch (training mode) and
with the running ones (evaluation).

Agrees when both are exactly 0 in evaluation and the standard deviation is not 0 in training.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Adam, Array, Network, digits, fit, mlp, softmax

from fastnorm import nn

CLAIM = claim.Claim(14, "D", "one example's prediction depends on its batch under BN, not with running statistics")
IMAGES, BATCH = 50, 32


def in_many_batches(net: Network, images: Array, others: Array, count: int, rng: np.random.Generator) -> Array:
    """The probabilities of each image, first of its batch, in `count` batches: shape (images, count, 10)."""
    found = np.empty((len(images), count, 10))
    for k in range(count):
        company = others[rng.integers(0, len(others), BATCH - 1)]
        for i, image in enumerate(images):
            found[i, k] = softmax(net.forward(np.concatenate([image[None], company])))[0]
    return found


def measure(seed: int, size: claim.Size) -> claim.Finding:
    x, labels, held_out, held_out_labels = digits()
    images, count = claim.pick(size, (10, 20), (IMAGES, 60), (IMAGES, 1000))
    rng = np.random.default_rng(seed)
    net = mlp([64, 64, 64, 10], rng, nn.BatchNorm)
    fit(net, x, labels, Adam(net), rng, epochs=4)
    spreads, changed, data = {}, {}, {}
    for mode in ("evaluation", "training"):  # training last: it moves the running statistics
        net.train(mode == "training")
        p = in_many_batches(net, held_out[:images], x, count, rng)
        own = p[np.arange(images), :, held_out_labels[:images]]
        spreads[mode] = float(own.std(axis=1).mean()) if np.ptp(own, axis=1).any() else 0.0
        classes = p.argmax(axis=2)
        changed[mode] = float((classes != classes[:, :1]).any(axis=1).mean())
        data[mode] = own
    return claim.Finding(
        f"standard deviation of an example's probability over batches: {spreads['training']:.4f} in training mode, "
        f"{spreads['evaluation']:g} in evaluation; predicted class changes for {100 * changed['training']:.0f} % and "
        f"{100 * changed['evaluation']:.0f} % of the examples",
        spreads["evaluation"] == 0 and changed["evaluation"] == 0 and spreads["training"] > 0,
        {f"spread, {mode}": v for mode, v in spreads.items()} | {f"changed, {mode}": v for mode, v in changed.items()},
        data=data,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    order = np.argsort(finding.data["evaluation"][:, 0])
    own = finding.data["training"][order]
    where = np.arange(len(own))
    axes.plot(where, own, ".", color=claim.BATCH, alpha=0.15, markersize=4)
    axes.plot(where, finding.data["evaluation"][order, 0], "_", color=claim.INK, markersize=7)
    axes.plot([], [], ".", color=claim.BATCH, label="statistics of its batch")
    axes.plot([], [], "_", color=claim.INK, label="running statistics")
    axes.set(xlabel="held-out example", ylabel="probability of its class")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
