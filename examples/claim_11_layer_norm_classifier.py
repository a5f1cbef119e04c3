"""Claim 11 [D]: layer norm makes a fully connected classifier harder to fit than batch norm does, when the norm of an
example carries information.

Layer norm gives every example the same norm, so what the norm said must come in by the bias alone; batch norm treats
all examples of a batch alike and keeps their differences. Measured on digits brought to norm 1 and then multiplied by
0.5, 1, 2 or 4 at random, where the class is that factor: the training loss (mean over the last epoch) of a network
64-128-128-4 with LN and with BN, Adam at rate 0.001.

Agrees when LN's loss is higher, by more than two standard errors of the difference over seeds.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Adam, Array, digits, fit, mlp

from fastnorm import nn

CLAIM = claim.Claim(11, "D", "LN fits a classifier worse than BN when the norm of an example carries information")
FACTORS = np.array([0.5, 1, 2, 4], np.float32)
EARLY = 0.1
NORMS = {"plain": None, "LN": nn.LayerNorm, "BN": nn.BatchNorm}


def losses(seed: int, norm: Any, epochs: int) -> Array:
    """Mean training loss of each epoch."""
    x, _, _, _ = digits()
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, len(FACTORS), len(x))
    x = x / np.linalg.norm(x, axis=1, keepdims=True) * FACTORS[classes][:, None]
    net = mlp([64, 128, 128, len(FACTORS)], rng, norm)
    found = fit(net, x, classes, Adam(net), rng, epochs=epochs)
    return np.reshape(found, (epochs, -1)).mean(axis=1)


def epochs_until(curve: Array) -> str:
    below = np.flatnonzero(curve < EARLY)
    return str(1 + below[0]) if len(below) else f"more than {len(curve)}"


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, epochs = claim.pick(size, (2, 2), (5, 10), (10, 40))
    curves = {
        kind: np.array([losses(s, norm, epochs) for s in claim.seeds(seed, count)]) for kind, norm in NORMS.items()
    }
    final = {kind: each[:, -1] for kind, each in curves.items()}
    difference = final["LN"] - final["BN"]
    error = float(difference.std(ddof=1) / len(difference) ** 0.5)
    agrees = bool(difference.mean() > 2 * error)
    return claim.Finding(
        "final training loss: " + ", ".join(f"{kind} {claim.spread(list(v))}" for kind, v in final.items()),
        agrees,
        {f"final loss, {kind}": float(v.mean()) for kind, v in final.items()}
        | {"difference": float(difference.mean()), "standard error": error},
        f"LN minus BN is {difference.mean():.3g}, with a standard error of {error:.2g}; epochs until the loss is below "
        f"{EARLY}: " + ", ".join(f"{kind} {epochs_until(each.mean(axis=0))}" for kind, each in curves.items()),
        data=curves,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    for (kind, curves), colour in zip(finding.data.items(), (claim.PLAIN, claim.LAYER, claim.BATCH), strict=True):
        axes.semilogy(1 + np.arange(curves.shape[1]), curves.mean(axis=0), color=colour, label=kind)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
