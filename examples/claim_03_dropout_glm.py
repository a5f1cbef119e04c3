"""Claim 3 [B]: dropout in a generalised linear model is, to second order, a penalty that adapts to the data.

For logistic regression with inputs x_i, dropping each input with probability delta (inverted form) adds to the expected
loss R(beta) = 1/2 delta / (1 - delta) sum_ij x_ij^2 beta_j^2 p_i (1 - p_i), p_i being the model's probability. It
favours confident predictions (p (1 - p) is small) and small beta.

Measured on the shipped digits 3 and 8, standardised, with a fitted beta of logits of standard deviation 1: the
simulated penalty E[A(x~ beta)] - A(x beta), A(z) = log(1 + e^z), over R, by delta; the simulated penalty per unit of
noise variance in the most confident third of the images over that in the least confident; and R as beta grows.

R leaves out what is of third and higher order in x_ij beta_j, which one dropped input already has: a smaller delta does
not take it away, a smaller beta does. So the ratio is also taken for beta / 4 (added after the first run, without a
part in the rule).

Agrees when the ratio at delta = 0.01 is 1 within 0.03 + 3 standard errors, the confident third pays less, and doubling
a small beta multiplies R by 4 within 10 %.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, digits

import fastnorm as fn
from fastnorm.preprocessing import StandardScaler

CLAIM = claim.Claim(
    3, "B", "dropout in logistic regression is the penalty R(beta), which favours confidence and small beta"
)
DELTAS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def fitted_beta(x: Array, y: Array) -> Array:
    """Logistic regression by gradient descent, scaled to logits of standard deviation 1."""
    beta = np.zeros(x.shape[1])
    for _ in range(200):
        beta -= 0.5 * (x.T @ (sigmoid(x @ beta) - y) / len(y) + 0.01 * beta)
    return beta / (x @ beta).std()


def closed_form(x: Array, beta: Array, delta: float) -> Array:
    """R(beta), the term of each example."""
    p = sigmoid(x @ beta)
    return 0.5 * delta / (1 - delta) * (x**2 @ beta**2) * p * (1 - p)


def simulated(x: Array, beta: Array, delta: float, rounds: int, stream: fn.Philox) -> tuple[Array, float]:
    """The penalty of each example, and the standard error of their sum.

    The first-order term has mean 0, so subtracting it changes no expectation and takes most of the variance away.
    """
    z = x @ beta
    sums = []
    per_example = np.zeros(len(x))
    for _ in range(rounds):
        noisy = fn.dropout(x, delta, rng=stream) @ beta
        penalty = np.logaddexp(0, noisy) - np.logaddexp(0, z) - sigmoid(z) * (noisy - z)
        per_example += penalty / rounds
        sums.append(penalty.sum())
    return per_example, float(np.std(sums, ddof=1) / rounds**0.5)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    images, labels, _, _ = digits()
    chosen = (labels == 3) | (labels == 8)
    x = StandardScaler().fit_transform(images[chosen].astype(np.float64))
    beta = fitted_beta(x, labels[chosen] == 8)
    stream, rounds = fn.Philox(seed), claim.pick(size, 200, 1000, 10_000)
    ratios, errors = [], []
    for delta in DELTAS:
        penalty, error = simulated(x, beta, delta, rounds, stream)
        closed = closed_form(x, beta, delta).sum()
        ratios.append(float(penalty.sum() / closed))
        errors.append(error / closed)
    quarter = beta / 4
    penalty, _ = simulated(x, quarter, 0.01, rounds, stream)
    ratio_of_quarter = float(penalty.sum() / closed_form(x, quarter, 0.01).sum())
    penalty, _ = simulated(x, beta, 0.05, rounds, stream)
    confidence = np.abs(x @ beta)
    order = np.argsort(confidence)
    third = len(order) // 3
    noise = x**2 @ beta**2
    paid = [float(penalty[part].sum() / noise[part].sum()) for part in (order[:third], order[-third:])]
    scales = np.array([0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32])
    sizes = [float(closed_form(x, c * beta, 0.05).sum()) for c in scales]
    doubled = sizes[1] / sizes[0]
    return claim.Finding(
        f"ratio simulated / closed {ratios[0]:.3f} at delta = 0.01 (standard error {errors[0]:.3f}), "
        f"{ratios[2]:.3f} at 0.05, {ratios[-1]:.3f} at 0.5; "
        f"confident third pays {paid[1] / paid[0]:.2f} of what the unsure third pays; "
        f"beta doubled: R x {doubled:.2f}",
        abs(ratios[0] - 1) < 0.03 + 3 * errors[0] and paid[1] < paid[0] and abs(doubled / 4 - 1) < 0.1,
        {
            "ratio at 0.01": ratios[0],
            "standard error at 0.01": errors[0],
            "ratio at 0.05": ratios[2],
            "ratio at 0.5": ratios[-1],
            "confident over unsure": paid[1] / paid[0],
            "R, beta doubled": doubled,
            "ratio at 0.01, beta / 4": ratio_of_quarter,
        },
        "what the ratio at small delta differs from 1 by is of higher order in beta: for beta / 4 it is "
        f"{ratio_of_quarter:.3f}",
        data=(ratios, errors, scales, sizes),
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    ratios, errors, scales, sizes = finding.data
    left, right = figure.subplots(1, 2)
    left.errorbar(DELTAS, ratios, 3 * np.array(errors), fmt="o-", color=claim.BATCH, markersize=4)
    left.axhline(1, color=claim.INK, linestyle=":")
    left.set(xscale="log", xlabel="dropout rate δ", ylabel="simulated penalty / R(β)")
    right.loglog(scales, sizes, "o-", color=claim.OTHER, markersize=4)
    right.set(xlabel="β, as a multiple of the fitted one", ylabel="R(β)")


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
