"""Claim 13 [A, B]: weight and bias (gamma and beta) can undo the normalization and so restore expressive power.

With gamma = sqrt(var + eps) and beta = mean of the batch, y = xhat gamma + beta = x: whatever the layer could express
without BN it can express with it. Measured: the largest |y - x| over random batches of all kinds of scale and offset,
in units of round-off of the largest |x| of the channel (u = 2^-24 for float32, 2^-53 for float64), and in evaluation as
well as in training.

Agrees when it is at most 8 u.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np

import fastnorm as fn
from fastnorm import nn

CLAIM = claim.Claim(13, "A, B", "gamma = sigma and beta = mu make BN the identity")
EPS = 1e-5


def measure(seed: int, size: claim.Size) -> claim.Finding:
    rng = np.random.default_rng(seed)
    worst, pairs = {}, []
    for dtype in (np.float32, np.float64):
        found = []
        for _ in range(claim.pick(size, 20, 200, 2000)):
            shape = (int(rng.integers(2, 65)), 5, int(rng.integers(1, 10)))
            scale, offset = 10.0 ** rng.uniform(-2, 3, (5, 1)), rng.normal(0, 10, (5, 1))
            x = (offset + scale * rng.standard_normal(shape)).astype(dtype)
            m = fn.moments(x, axis=(0, 2))
            layer = nn.BatchNorm(5, eps=EPS, dtype=dtype)
            layer.weight[...], layer.bias[...] = np.sqrt(m.var() + EPS), m.mean
            layer.running_mean[...], layer.running_var[...] = m.mean, m.var()
            in_evaluation = layer.eval()(x)
            in_training = layer.train()(x)
            unit = np.abs(x).max(axis=(0, 2), keepdims=True) * np.finfo(dtype).eps / 2
            found.append(max(float((np.abs(y - x) / unit).max()) for y in (in_training, in_evaluation)))
        worst[np.dtype(dtype).name] = max(found)
        pairs.append(found)
    return claim.Finding(
        "largest |y - x|: " + ", ".join(f"{value:.1f} u in {name}" for name, value in worst.items()),
        all(value <= 8 for value in worst.values()),
        {f"largest difference in u, {name}": value for name, value in worst.items()},
        data=pairs,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    axes.hist(finding.data, bins=20, color=[claim.BATCH, claim.OTHER], label=["float32", "float64"])
    axes.set(xlabel="largest |y - x| of a batch, in u of the largest |x|", ylabel="batches")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
