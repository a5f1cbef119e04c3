"""Claim 2 [A, E]: dropout is a regulariser.

A linear unit with dropout, S = sum_i d_i w_i I_i with d_i = 1 with probability p_i, and the unit without dropout but
with the weights w' = p w have the losses E_D = (t - S)^2 / 2 and E_N = (t - sum_i p_i w_i I_i)^2 / 2. Then

    E[dE_D / dw_i] = dE_N / dw_i + w_i p_i (1 - p_i) I_i^2,

the gradient of an L2 penalty with a factor of its own for each weight. Measured: the extra term from many masks against
its closed form, relative difference (of the whole vector). Agrees when no component is further off than 4.5 standard
errors of its simulation.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np

import fastnorm as fn

CLAIM = claim.Claim(2, "A, E", "dropout adds w p (1 - p) I^2 to a linear unit's expected gradient: an L2 penalty")
UNITS = 12


def measure(seed: int, size: claim.Size) -> claim.Finding:
    rng = np.random.default_rng(seed)
    masks = claim.pick(size, 100_000, 400_000, 10_000_000)
    w, inputs, target = rng.standard_normal(UNITS), rng.standard_normal(UNITS), 1.0
    keep = rng.uniform(0.3, 0.9, UNITS)
    stream = fn.Philox(seed)
    total, squares, block = np.zeros(UNITS), np.zeros(UNITS), 50_000
    for _ in range(masks // block):
        kept = np.stack([fn.dropout_mask((block,), 1 - p, rng=stream) for p in keep], axis=1)
        gradient = -(target - kept @ (w * inputs))[:, None] * kept * inputs
        total += gradient.sum(axis=0)
        squares += np.square(gradient).sum(axis=0)
    mean = total / masks
    error = np.sqrt((squares / masks - mean**2) / masks)
    without_dropout = -(target - np.sum(keep * w * inputs)) * keep * inputs
    closed = w * keep * (1 - keep) * inputs**2
    simulated = mean - without_dropout
    difference = float(np.linalg.norm(simulated - closed) / np.linalg.norm(closed))
    expected = float(np.linalg.norm(error) / np.linalg.norm(closed))
    worst = float(np.max(np.abs(simulated - closed) / error))
    return claim.Finding(
        f"relative difference {difference:.4f} (standard error of the {masks:,} masks: {expected:.4f}), "
        f"worst component {worst:.1f} standard errors off",
        worst < 4.5,
        {"relative difference": difference, "standard error": expected, "worst z": worst},
        data=(closed, simulated, error),
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    closed, simulated, error = finding.data
    axes = figure.subplots()
    axes.errorbar(
        closed, simulated, 3 * error, fmt="o", color=claim.BATCH, markersize=4, label="units, ± 3 standard errors"
    )
    ends = [closed.min(), closed.max()]
    axes.plot(ends, ends, ":", color=claim.INK, label="equal")
    axes.set(xlabel="w p (1 - p) I²", ylabel="E[dE_D/dw] - dE_N/dw, simulated")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
