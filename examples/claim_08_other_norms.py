"""Claim 8 [C]: normalising by the L1, L2 or L-infinity norm trains about as well as batch normalization.

xhat = (x - mean) / (c_p ||x - mean||_p) column by column, with c_p such that Gaussian data get variance 1: the mean
absolute deviation times sqrt(pi / 2) for p = 1, the standard deviation for p = 2 (batch norm itself), the largest
deviation over its expectation in a Gaussian batch for p = infinity; then weight and bias.

Measured on the digits: the training loss (mean over the last epoch) of a network of four hidden layers of 64 units,
gradient descent at rate 0.1, without a norm and with each. Agrees when L1 and L-infinity end within a factor of 2 of
BN (L2) on average over seeds.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, Sgd, digits, fit, mlp

from fastnorm import nn

CLAIM = claim.Claim(8, "C", "L1, L2 and L-infinity normalisation train about as well as one another")
EPS = 1e-5


class LpNorm(nn.Layer):
    """Columns of mean 0, divided by their mean absolute (p = 1) or largest (p = inf) deviation, in Gaussian units."""

    _parameter_names = ("weight", "bias")

    def __init__(self, features: int, p: float, batch: int) -> None:
        super().__init__()
        self.p = p
        self.weight, self.bias = np.ones(features, np.float32), np.zeros(features, np.float32)
        # What a batch of Gaussian values has, so that xhat comes out with variance 1.
        gaussian = np.random.default_rng(0).standard_normal((4000, batch))
        self.unit = np.float32((2 / np.pi) ** 0.5 if p == 1 else np.abs(gaussian).max(axis=1).mean())

    def forward(self, x: Array) -> Array:
        d = x - x.mean(axis=0)
        if self.p == 1:
            size, self.dsize = np.abs(d).mean(axis=0), np.sign(d) / np.float32(len(x))
        else:
            size, top = np.abs(d).max(axis=0), np.abs(d).argmax(axis=0)
            self.dsize = np.zeros_like(d)
            columns = np.arange(d.shape[1])
            self.dsize[top, columns] = np.sign(d[top, columns])
        self.scale = self.unit / (size + np.float32(EPS))
        self.xhat = d * self.scale
        return self.xhat * self.weight + self.bias

    def backward(self, dy: Array) -> Array:
        self._gradients = {"weight": (dy * self.xhat).sum(axis=0), "bias": dy.sum(axis=0)}
        g = dy * self.weight
        dd = self.scale * g - (g * self.xhat).sum(axis=0) * (self.scale / self.unit) * self.dsize
        return dd - dd.mean(axis=0)


def one_run(seed: int, kind: str, epochs: int) -> Array:
    """Mean loss of each epoch."""
    x, labels, _, _ = digits()
    rng = np.random.default_rng(seed)
    norms = {
        "plain": None,
        "L1": lambda n: LpNorm(n, 1, 64),
        "L2": nn.BatchNorm,
        "L∞": lambda n: LpNorm(n, np.inf, 64),
    }
    net = mlp([64] + 4 * [64] + [10], rng, norms[kind])
    losses = fit(net, x, labels, Sgd(net, 0.1, momentum=0), rng, epochs=epochs)
    return np.reshape(losses, (epochs, -1)).mean(axis=1)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, epochs = claim.pick(size, (1, 4), (4, 15), (10, 40))
    with np.errstate(all="ignore"):
        curves = {
            kind: np.array([one_run(s, kind, epochs) for s in claim.seeds(seed, count)])
            for kind in ("plain", "L1", "L2", "L∞")
        }
    final = {kind: each[:, -1] for kind, each in curves.items()}
    ratios = {kind: float(final[kind].mean() / final["L2"].mean()) for kind in final}
    agrees = all(0.5 < ratios[kind] < 2 for kind in ("L1", "L∞"))
    return claim.Finding(
        "final training loss: " + ", ".join(f"{kind} {claim.spread(list(v))}" for kind, v in final.items()),
        agrees,
        {f"final loss, {kind}": float(v.mean()) for kind, v in final.items()},
        f"L1 ends at {ratios['L1']:.2f} times the loss of L2 (batch norm), L∞ at {ratios['L∞']:.2f}, "
        f"the plain network at {ratios['plain']:.2f}",
        data=curves,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    colours = (claim.PLAIN, claim.LAYER, claim.BATCH, claim.OTHER)
    for (kind, curves), colour in zip(finding.data.items(), colours, strict=True):
        axes.semilogy(1 + np.arange(curves.shape[1]), curves.mean(axis=0), color=colour, label=kind)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
