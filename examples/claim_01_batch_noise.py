"""Claim 1 [A]: batch normalization injects noise of mean 0 and variance O(1/m), into activations and into gradients.

A batch of m samples of a population gives every one of them xhat = (x - mu_B) / sigma_B instead of (x - mu) / sigma,
and in the backward (1 / sigma_B) (g - mean(g) - xhat mean(g xhat)) instead of the same with expectations. The
difference is noise. Measured: one fixed sample in thousands of batches of x ~ N(0, 1), g = 0.5 + 0.8 x + N(0, 1), in
float64; the slope of log variance against log m over m = 8 ... 4096 (exact for large m: -1).

Agrees when both slopes over m >= 64 are within 0.02 + 3 standard errors of -1 (0.02 bounds what terms in 1/m^2 do to
them), those over all m are within 0.1, and no mean is further from 0 than 2/m + 4 standard errors.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np

import fastnorm as fn

CLAIM = claim.Claim(1, "A", "BN injects noise of mean 0 and variance O(1/m), into activations and gradients")
X0, G0 = 1.0, 1.5
BATCHES = [8 << k for k in range(10)]


def noise(m: int, repetitions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What BN adds to sample 0's activation and gradient, in `repetitions` batches of m: one batch in each column."""
    activations, gradients = [], []
    for columns in np.array_split(np.arange(repetitions), -(-repetitions * m // 2**21)):
        x = rng.standard_normal((m, len(columns)))
        g = 0.5 + 0.8 * x + rng.standard_normal(x.shape)
        x[0], g[0] = X0, G0
        xhat, cache = fn.batch_norm_forward(x, eps=0.0)
        activations.append(xhat[0] - X0)
        gradients.append(fn.batch_norm_backward(g, cache).dx[0] - (G0 - 0.5 - X0 * 0.8))
    return np.concatenate(activations), np.concatenate(gradients)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    rng = np.random.default_rng(seed)
    repetitions = claim.pick(size, 1000, 4000, 40000)
    found = [noise(m, repetitions, rng) for m in BATCHES]
    variances = {name: [float(f[k].var()) for f in found] for k, name in enumerate(("activation", "gradient"))}
    late = BATCHES.index(64)
    # The log of a variance from n samples has a standard deviation of sqrt(2 / n), or a little more (heavy tails).
    x = np.log(BATCHES[late:])
    error = float(np.sqrt(2.5 / repetitions) / np.sqrt(np.sum((x - x.mean()) ** 2)))
    slopes = {name: claim.slope(BATCHES, v) for name, v in variances.items()}
    late_slopes = {name: claim.slope(BATCHES[late:], v[late:]) for name, v in variances.items()}
    means_fit = all(
        abs(f[k].mean()) < 2 / m + 4 * f[k].std() / repetitions**0.5
        for m, f in zip(BATCHES, found, strict=True)
        for k in (0, 1)
    )
    agrees = (
        means_fit
        and all(abs(s + 1) < 0.1 for s in slopes.values())
        and all(abs(s + 1) < 0.02 + 3 * error for s in late_slopes.values())
    )
    return claim.Finding(
        f"slopes {slopes['activation']:.3f} (activations), {slopes['gradient']:.3f} (gradients) over m = 8 ... 4096; "
        f"{late_slopes['activation']:.3f}, {late_slopes['gradient']:.3f} from m = 64 on (standard error {error:.3f})",
        agrees,
        {
            "slope, activations": slopes["activation"],
            "slope, gradients": slopes["gradient"],
            "slope from 64 on, activations": late_slopes["activation"],
            "slope from 64 on, gradients": late_slopes["gradient"],
            "standard error": error,
        },
        data=variances,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    axes = figure.subplots()
    for (name, values), colour in zip(finding.data.items(), (claim.BATCH, claim.OTHER), strict=True):
        axes.loglog(BATCHES, values, "o-", color=colour, label=f"{name}s", markersize=4)
    axes.loglog(
        BATCHES, [finding.data["activation"][-1] * 4096 / m for m in BATCHES], ":", color=claim.INK, label="slope -1"
    )
    axes.set(xlabel="batch size m", ylabel="variance of the noise")
    axes.legend()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
