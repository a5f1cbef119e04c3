"""Claim 5 [B]: dropout is bagging: averaging many masks' predictions beats one mask and is near weight scaling.

A network trained with dropout is an ensemble of as many networks as there are masks. Measured on the digits: held-out
accuracy of one random mask, of the average of the probabilities of many masks, and of the weight-scaled network (no
mask). A network of 64-128-128-10 units, p = 0.5, trained on 400 images.

Agrees when, on average over seeds, the many beat the one, and differ from weight scaling by less than one percentage
point.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Adam, accuracy, digits, fit, mlp, softmax

CLAIM = claim.Claim(5, "B", "the average over many masks beats one mask and is near weight scaling")


def one_seed(seed: int, epochs: int, masks: int) -> list[float]:
    """Held-out accuracy of the average of the first 1, 2, ... masks, and last that of weight scaling."""
    x, labels, held_out, held_out_labels = digits()
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(x))[:400]
    net = mlp([64, 128, 128, 10], rng, dropout=0.5)
    fit(net, x[chosen], labels[chosen], Adam(net, 2e-3), rng, epochs=epochs, batch=50)
    total, found = np.zeros((len(held_out), 10)), []
    for _ in range(masks):
        total += softmax(net.forward(held_out))
        found.append(accuracy(total, held_out_labels))
    return [*found, accuracy(net.predict(held_out), held_out_labels)]


def measure(seed: int, size: claim.Size) -> claim.Finding:
    epochs, masks = claim.pick(size, (10, 20), (40, 100), (100, 1000))
    runs = np.array([one_seed(s, epochs, masks) for s in claim.seeds(seed, claim.pick(size, 2, 5, 20))])
    one, many, scaled = runs[:, 0], runs[:, -2], runs[:, -1]
    difference = float(many.mean() - scaled.mean())
    return claim.Finding(
        f"held-out accuracy: one mask {claim.percent(one)}, average of {masks} masks {claim.percent(many)}, "
        f"weight scaling {claim.percent(scaled)}",
        many.mean() > one.mean() and abs(difference) < 0.01,
        {"one mask": one.mean(), "many masks": many.mean(), "weight scaling": scaled.mean()},
        data=runs,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    mean, std = 100 * finding.data.mean(axis=0), 100 * finding.data.std(axis=0)
    count = np.arange(1, len(mean))
    axes.semilogx(count, mean[:-1], color=claim.BATCH, label="average of masks")
    axes.fill_between(count, (mean - std)[:-1], (mean + std)[:-1], color=claim.BATCH, alpha=0.2, linewidth=0)
    axes.plot(1, mean[0], "o", color=claim.PLAIN, label="one mask")
    axes.axhline(mean[-1], color=claim.INK, linestyle=":", label="weight scaling")
    axes.set(xlabel="masks averaged", ylabel="held-out accuracy, %")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
