"""Claim 4 [B]: weight scaling is exact for softmax regression, and for the mean of a linear unit.

The geometric mean of softmax(W (d x) + b) over all masks d, renormalised, is softmax(W (1 - p) x + b); a unit with two
inputs and p = 1/2 has E[a] = (w1 x + w2 y) / 2. Without scaling, test activations are 1 / (1 - p) times too large.

Measured: the largest difference over random inputs and classes between the renormalised geometric mean over all 2^12
masks of n = 12 inputs (each with its probability, p = 0.5 and 0.2, in float64) and the scaled network; the same for
E[a]; and the ratio of activations without scaling to their mean over the masks. Agrees when the differences are below
1e-13 and the ratios are 1 / (1 - p) within 1e-12.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, softmax

import fastnorm as fn

CLAIM = claim.Claim(4, "B", "weight scaling equals the geometric mean over all masks of softmax regression")
INPUTS, CLASSES = 12, 5
MASKS = (np.arange(2**INPUTS)[:, None] >> np.arange(INPUTS)) & 1


def over_all_masks(x: Array, w: Array, b: Array, p: float) -> tuple[Array, Array]:
    """Renormalised geometric mean of the predictions, and mean of the activations x d w, over every mask."""
    kept = MASKS.sum(axis=1)
    probability = (1 - p) ** kept * p ** (INPUTS - kept)
    log_mean = probability @ np.log(softmax(x * MASKS @ w + b))
    return softmax(log_mean), probability @ (x * MASKS @ w)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    rng = np.random.default_rng(seed)
    worst, ratios, pairs = 0.0, {}, []
    for p in (0.5, 0.2):
        without = []
        for _ in range(claim.pick(size, 5, 40, 400)):
            x, w, b = rng.standard_normal(INPUTS), rng.standard_normal((INPUTS, CLASSES)), rng.standard_normal(CLASSES)
            geometric, mean = over_all_masks(x, w, b, p)
            scaled = fn.dropout_inference(x, p)
            prediction = softmax(scaled @ w + b)
            worst = max(worst, float(np.abs(geometric - prediction).max()), float(np.abs(mean - scaled @ w).max()))
            without.append(x @ w / mean)
            pairs.append((geometric, prediction, softmax(x @ w + b)))
        ratios[p] = np.concatenate(without)
    # Two inputs, four masks, written out.
    (w1, w2), (x, y) = rng.standard_normal((2, 2))
    two = abs((0 + w1 * x + w2 * y + (w1 * x + w2 * y)) / 4 - (w1 * x + w2 * y) / 2)
    worst = max(worst, float(two))
    off = max(float(np.max(np.abs(r * (1 - p) - 1))) for p, r in ratios.items())
    return claim.Finding(
        f"largest difference over all 4,096 masks {worst:.1e}; without scaling, activations are "
        f"{np.median(ratios[0.5]):.4f} (p = 0.5) and {np.median(ratios[0.2]):.4f} (p = 0.2) times too large",
        worst < 1e-13 and off < 1e-12,
        {
            "largest difference": worst,
            "ratio without scaling, p = 0.5": float(np.median(ratios[0.5])),
            "ratio without scaling, p = 0.2": float(np.median(ratios[0.2])),
            "ratio off by": off,
        },
        data=pairs,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    geometric, scaled, unscaled = (np.concatenate(each) for each in zip(*finding.data, strict=True))
    axes = figure.subplots()
    axes.plot(geometric, unscaled, ".", color=claim.PLAIN, alpha=0.5, label="without scaling")
    axes.plot(geometric, scaled, ".", color=claim.INK, label="with weight scaling")
    axes.set(xlabel="geometric mean over all 4,096 masks", ylabel="one prediction")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
