"""Claim 10 [B, C]: batch normalization allows larger learning rates and forgives the initialisation.

Measured on the digits: held-out accuracy of a network of four hidden layers of 64 units after a fixed number of epochs
of plain gradient descent, over a grid of learning rates (0.001 ... 10) and of scales of the first weights (0.3, 1 and 3
times He's), with and without BN.

Agrees when with BN the largest rate that reaches 90 % (at scale 1, mean over seeds) is larger, and more cells of the
grid reach 90 %.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, Sgd, accuracy, digits, fit, mlp

from fastnorm import nn

CLAIM = claim.Claim(10, "B, C", "BN allows larger learning rates and forgives the initialisation")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SCALES = (0.3, 1.0, 3.0)
ENOUGH = 0.9


def held_out_accuracy(seed: int, norm: Any, rate: float, scale: float, epochs: int) -> float:
    x, labels, held_out, held_out_labels = digits()
    rng = np.random.default_rng(seed)
    net = mlp([64] + 4 * [64] + [10], rng, norm, scale=scale)
    fit(net, x, labels, Sgd(net, rate, momentum=0), rng, epochs=epochs)
    return accuracy(np.nan_to_num(net.predict(held_out)), held_out_labels)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, epochs = claim.pick(size, (1, 1), (2, 6), (5, 20))
    grids: dict[str, Array] = {}
    with np.errstate(all="ignore"):
        for kind, norm in (("without", None), ("with", nn.BatchNorm)):
            grids[kind] = np.array(
                [
                    [
                        np.mean([held_out_accuracy(s, norm, rate, scale, epochs) for s in claim.seeds(seed, count)])
                        for rate in RATES
                    ]
                    for scale in SCALES
                ]
            )
    largest = {
        kind: max((r for r, a in zip(RATES, g[1], strict=True) if a >= ENOUGH), default=0.0)
        for kind, g in grids.items()
    }
    cells = {kind: int((g >= ENOUGH).sum()) for kind, g in grids.items()}
    return claim.Finding(
        f"largest rate with 90 % held-out accuracy: {largest['with']:g} with BN, {largest['without']:g} without; cells "
        f"of the grid with 90 %: {cells['with']} of {len(RATES) * len(SCALES)} with, {cells['without']} without",
        largest["with"] > largest["without"] and cells["with"] > cells["without"],
        {f"largest rate, {k}": v for k, v in largest.items()} | {f"cells, {k}": float(v) for k, v in cells.items()},
        data=grids,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    for (kind, grid), colour in zip(finding.data.items(), (claim.PLAIN, claim.BATCH), strict=True):
        for scale, row, style in zip(SCALES, grid, (":", "-", "--"), strict=True):
            axes.semilogx(RATES, 100 * row, style, color=colour, label=f"{kind} BN, {scale:g} x He")
    axes.set(xlabel="learning rate", ylabel="held-out accuracy, %")
    axes.legend(fontsize=7)


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
