"""Claim 17 [B]: L1 gives sparse weights, L2 small ones; noise on the weights is like a penalty on the gradient.

For a linear unit with orthonormal inputs, whose best weights are w*, the penalised ones are sign(w*) max(|w*| - lambda,
0) with L1 and w* / (1 + lambda) with L2. Noise N(0, eta) on the weights adds eta ||grad_w yhat||^2 to the expected
squared error of a model whose error has mean 0.

Measured: the largest difference between trained weights and those formulas (gradient descent; a weight that the L1
step would carry across 0 stays at 0); the share of weights at exactly 0 and the norm, for softmax regression on the
digits with no penalty, L1 and L2; and the simulated rise of E[(yhat - y)^2] over eta ||grad_w yhat||^2, for y = the
output of a network of 16 tanh units on digits, eta = 1e-4.

Agrees when the differences are below 1e-6, more than a fifth of the weights are 0 with L1 and fewer than 1 % with L2,
L2's norm is below that without, and the noise's ratio is 1 within 0.02 + 3 standard errors.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, cross_entropy, digits

import fastnorm as fn
from fastnorm.regularization import l1_penalty, l2_penalty

CLAIM = claim.Claim(17, "B", "L1 gives sparse weights, L2 small ones; weight noise is a penalty on the gradient")
ETA = 1e-4


def step(w: Array, gradient: Array, rate: float, l1: float, l2: float) -> Array:
    """theta - rate (gradient + the penalties' gradients), the L1 part stopping at 0."""
    w = w - rate * (gradient + l2_penalty(w, l2)[1])
    shrunk = w - rate * l1_penalty(w, l1)[1]
    return np.where(shrunk * w < 0, 0, shrunk)


def distance_from_formulas(rng: np.random.Generator, strength: float = 0.5) -> float:
    inputs, _ = np.linalg.qr(rng.standard_normal((60, 32)))
    best = rng.standard_normal(32)
    target = inputs @ best
    worst = 0.0
    for l1, l2, formula in (
        (strength, 0.0, np.sign(best) * np.maximum(np.abs(best) - strength, 0)),
        (0.0, strength, best / (1 + strength)),
    ):
        w = 0.1 * rng.standard_normal(32)
        for _ in range(300):
            w = step(w, inputs.T @ (inputs @ w - target), 0.2, l1, l2)
        worst = max(worst, float(np.abs(w - formula).max()))
    return worst


def softmax_regression(rng: np.random.Generator, l1: float, l2: float, steps: int) -> Array:
    x, labels, _, _ = digits()
    x, w = x.astype(np.float64), 0.1 * rng.standard_normal((64, 10))
    for _ in range(steps):
        w = step(w, x.T @ cross_entropy(x @ w, labels)[1], 0.5, l1, l2)
    return w


def weight_noise(rng: np.random.Generator, rounds: int, stream: fn.Philox) -> tuple[float, float]:
    """Simulated rise of the squared error over eta ||grad||^2, and its standard error."""
    x = digits()[0][:200].astype(np.float64)
    w, v = rng.standard_normal((64, 16)) / 4, rng.standard_normal(16) / 4
    h = np.tanh(x @ w)
    y = h @ v
    # grad_v = h, grad_w = x (1 - h^2) v
    squared = (h**2).sum(axis=1) + (x**2).sum(axis=1) * ((1 - h**2) ** 2 @ v**2)
    closed = ETA * squared.mean()
    rises = []
    for _ in range(rounds):
        noisy_w, noisy_v = (fn.gaussian_noise(each, ETA**0.5, rng=stream) for each in (w, v))
        rises.append(np.square(np.tanh(x @ noisy_w) @ noisy_v - y).mean() / closed)
    return float(np.mean(rises)), float(np.std(rises, ddof=1) / rounds**0.5)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    rng = np.random.default_rng(seed)
    off = distance_from_formulas(rng)
    steps, rounds = claim.pick(size, (300, 2000), (500, 5000), (5000, 50_000))
    weights = {
        "none": softmax_regression(rng, 0.0, 0.0, steps),
        "L1": softmax_regression(rng, 1e-3, 0.0, steps),
        "L2": softmax_regression(rng, 0.0, 1e-2, steps),
    }
    zeros = {kind: float((w == 0).mean()) for kind, w in weights.items()}
    norms = {kind: float(np.linalg.norm(w)) for kind, w in weights.items()}
    ratio, error = weight_noise(rng, rounds, fn.Philox(seed))
    agrees = (
        off < 1e-6
        and zeros["L1"] > 0.2
        and zeros["L2"] < 0.01
        and norms["L2"] < norms["none"]
        and abs(ratio - 1) < 0.02 + 3 * error
    )
    return claim.Finding(
        f"trained weights are off the formulas by {off:.0e}; digits, weights at zero and norm: "
        + ", ".join(f"{kind} {100 * zeros[kind]:.1f} % and {norms[kind]:.2f}" for kind in weights)
        + f"; weight noise, simulated over closed form {ratio:.3f} (standard error {error:.3f})",
        bool(agrees),
        {"off the formulas": off, "noise ratio": ratio, "noise standard error": error}
        | {f"zeros, {kind}": z for kind, z in zeros.items()}
        | {f"norm, {kind}": n for kind, n in norms.items()},
        data=weights,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    for (kind, w), colour in zip(finding.data.items(), (claim.PLAIN, claim.BATCH, claim.OTHER), strict=True):
        axes.plot(np.sort(np.abs(w), axis=None)[::-1], color=colour, label="no penalty" if kind == "none" else kind)
    axes.set(xlabel="weights, largest first", ylabel="|weight|")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
