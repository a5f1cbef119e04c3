"""Claim 7 [C]: noise put after batch normalization, which brings the shift back, hardly hurts: it still trains well.

After each BN every activation becomes s y + m, with s ~ N(sigma_j, 0.1^2) and m ~ N(mu_j, 0.1^2) for each example, and
for each unit j and each step anew sigma_j ~ U(1, 1.25), mu_j ~ U(-0.5, 0.5): mean not 0, variance not 1, and neither
the same twice.

Measured on the digits: the steps until the mean training loss of 20 steps is below 0.2, for a plain network of six
hidden layers of 64 units, with BN, and with noisy BN; gradient descent at rate 0.1. Agrees when noisy BN gets there in
every seed, on average in fewer steps than the plain network.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, Sgd, digits, fit, mlp

import fastnorm as fn
from fastnorm import nn

CLAIM = claim.Claim(7, "C", "noise after BN (mean not 0, variance not 1, new every step) still trains well")
TARGET = 0.2


class NoisyBatchNorm(nn.BatchNorm):
    """Batch normalization with the noise of the claim after it, in training."""

    def __init__(self, num_features: int, rng: np.random.Generator) -> None:
        super().__init__(num_features)
        self.rng = rng

    def forward(self, x: Any) -> Array:
        y = super().forward(x)
        if not self.training:
            return y
        sigma = np.broadcast_to(self.rng.uniform(1, 1.25, self.num_features).astype(np.float32), y.shape)
        mu = np.broadcast_to(self.rng.uniform(-0.5, 0.5, self.num_features).astype(np.float32), y.shape)
        self.s = fn.gaussian_noise(sigma, 0.1, rng=self.rng)
        return self.s * y + fn.gaussian_noise(mu, 0.1, rng=self.rng)

    def backward(self, dy: Any) -> Array:
        return super().backward(dy * self.s)


def losses(seed: int, kind: str, epochs: int) -> Array:
    """The training loss, as the mean of 20 steps, step by step."""
    x, labels, _, _ = digits()
    rng = np.random.default_rng(seed)
    norms = {"plain": None, "BN": nn.BatchNorm, "noisy BN": lambda n: NoisyBatchNorm(n, rng)}
    net = mlp([64] + 6 * [64] + [10], rng, norms[kind])
    found = fit(net, x, labels, Sgd(net, 0.1, momentum=0), rng, epochs=epochs)
    return np.convolve(found, np.full(20, 1 / 20), "valid")


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, epochs = claim.pick(size, (1, 12), (4, 25), (10, 60))
    with np.errstate(all="ignore"):
        curves = {
            kind: np.array([losses(s, kind, epochs) for s in claim.seeds(seed, count)])
            for kind in ("plain", "BN", "noisy BN")
        }
    reached = {kind: [bool((c < TARGET).any()) for c in each] for kind, each in curves.items()}
    # A run that does not get there counts with all its steps, which is the least that it would have taken.
    steps = {
        kind: [
            int(np.argmax(c < TARGET)) + 20 if ok else len(c) + 20 for c, ok in zip(each, reached[kind], strict=True)
        ]
        for kind, each in curves.items()
    }
    words = [
        f"{kind} {claim.spread(n)}" + ("" if all(reached[kind]) else f" (reached in {sum(reached[kind])} of {count})")
        for kind, n in steps.items()
    ]
    agrees = all(reached["noisy BN"]) and np.mean(steps["noisy BN"]) < np.mean(steps["plain"])
    ratio = float(np.mean(steps["noisy BN"]) / np.mean(steps["BN"]))
    return claim.Finding(
        f"steps to a training loss of {TARGET}: {', '.join(words)}",
        bool(agrees),
        {**{f"steps, {kind}": float(np.mean(n)) for kind, n in steps.items()}, "noisy BN over BN": ratio},
        f"noisy BN gets there in {sum(reached['noisy BN'])} of {count} runs, with {ratio:.1f} times the steps of BN "
        f"and {np.mean(steps['noisy BN']) / np.mean(steps['plain']):.2f} times those of the plain network",
        data=curves,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    for (kind, curves), colour in zip(finding.data.items(), (claim.PLAIN, claim.BATCH, claim.OTHER), strict=True):
        axes.semilogy(curves.mean(axis=0), color=colour, label=kind)
    axes.axhline(TARGET, color=claim.INK, linestyle=":")
    axes.set(xlabel="step", ylabel="training loss, mean of 20 steps")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
