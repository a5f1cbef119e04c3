"""Claim 16 [E]: dropout hurts regression more than classification.

A classifier's answer survives when all scores are scaled alike or a little noisy; a regression's answer is the output
itself. Measured on the digits: a network 64-128-128 with and without dropout 0.5 on two tasks with the same inputs, the
class (cross-entropy, accuracy) and three numbers (the image's ink and its centre across and down, standardised; squared
error). Held-out loss of each.

Agrees when, on average over seeds, dropout raises the regression's loss, and by a larger factor than it changes the
classification's.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Adam, Array, accuracy, cross_entropy, digits, fit, mlp, squared_error

from fastnorm.preprocessing import StandardScaler

CLAIM = claim.Claim(16, "E", "dropout hurts regression more than classification")


def ink_and_centre(x: Array) -> Array:
    images = x.reshape(-1, 8, 8)
    ink, place = images.sum(axis=(1, 2)), np.arange(8)
    return np.stack([ink, images.sum(axis=1) @ place / ink, images.sum(axis=2) @ place / ink], axis=1).astype(
        np.float32
    )


def held_out_losses(seed: int, rate: float, epochs: int) -> tuple[float, float, float]:
    """Classification loss and accuracy, regression loss."""
    x, labels, held_out, held_out_labels = digits()
    scaler = StandardScaler().fit(ink_and_centre(x))
    targets, held_out_targets = (scaler.transform(ink_and_centre(each)) for each in (x, held_out))
    rng = np.random.default_rng(seed)
    classifier = mlp([64, 128, 128, 10], rng, dropout=rate)
    fit(classifier, x, labels, Adam(classifier), rng, epochs=epochs)
    regression = mlp([64, 128, 128, 3], rng, dropout=rate)
    fit(regression, x, targets, Adam(regression), rng, epochs=epochs, loss=squared_error)
    scores = classifier.predict(held_out)
    return (
        cross_entropy(scores, held_out_labels)[0],
        accuracy(scores, held_out_labels),
        squared_error(regression.predict(held_out), held_out_targets)[0],
    )


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, epochs = claim.pick(size, (1, 3), (4, 20), (10, 100))
    runs = {rate: np.array([held_out_losses(s, rate, epochs) for s in claim.seeds(seed, count)]) for rate in (0.0, 0.5)}
    mean = {rate: r.mean(axis=0) for rate, r in runs.items()}
    classification, regression = float(mean[0.5][0] / mean[0.0][0]), float(mean[0.5][2] / mean[0.0][2])
    agrees = regression > 1 and regression > classification
    words = [claim.spread(list(runs[rate][:, k])) for k in (0, 2) for rate in (0.0, 0.5)]
    return claim.Finding(
        f"held-out loss without / with dropout: regression {words[2]} / {words[3]} (x {regression:.2f}), "
        f"classification {words[0]} / {words[1]} (x {classification:.2f}); "
        f"accuracy {claim.percent(list(runs[0.0][:, 1]))} / {claim.percent(list(runs[0.5][:, 1]))}",
        bool(agrees),
        {
            "regression, factor": regression,
            "classification, factor": classification,
            "accuracy without": float(mean[0.0][1]),
            "accuracy with": float(mean[0.5][1]),
        },
        data=runs,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    titles = {0: "classification, held-out loss", 2: "regression, held-out loss"}
    for axes, k in zip(figure.subplots(1, 2), titles, strict=True):
        for position, (rate, colour) in enumerate(((0.0, claim.PLAIN), (0.5, claim.OTHER))):
            values = finding.data[rate][:, k]
            axes.bar(position, values.mean(), yerr=values.std(), color=colour, width=0.6, capsize=3)
        axes.set_xticks([0, 1], ["without", "dropout 0.5"])
        axes.set_title(titles[k], fontsize=9)


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
