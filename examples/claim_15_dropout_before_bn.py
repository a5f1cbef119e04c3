"""Claim 15 [E]: dropout before batch norm shifts the variance between training and test.

A unit h kept with probability p and divided by p has Var(h') = E[h^2] / p - mu^2 in training and E[h^2] - mu^2 at test,
where BN still divides by what it saw in training. Measured: the ratio test / training of the variance of BN's input,
for the 128 rectified units of a random layer on the digits, by dropout rate, simulated with many masks and from the
formula; and held-out accuracy of networks 64-128-128-10 with dropout 0.5, with BN, and with both (dropout before the
next layer's BN), trained on 400 images.

Agrees when the simulated ratios are those of the formula within four standard errors.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Adam, Array, Dense, accuracy, digits, fit, mlp

import fastnorm as fn
from fastnorm import nn

CLAIM = claim.Claim(15, "E", "dropout before BN shifts its input's variance: Var(h') = E[h^2] / p - mu^2 in training")
RATES = (0.1, 0.3, 0.5, 0.7)


def ratios(h: Array, rate: float, rounds: int, stream: fn.Philox) -> tuple[float, float, float]:
    """Variance at test over variance in training, summed over units: simulated, its standard error, by the formula."""
    at_test = fn.moments(h, axis=0)
    masked = [fn.moments(fn.dropout(h, rate, rng=stream), axis=0) for _ in range(rounds)]
    simulated = at_test.var().sum() / fn.Moments.merge(*masked).var().sum()
    each = [at_test.var().sum() / m.var().sum() for m in masked]
    formula = at_test.var().sum() / ((h**2).mean(axis=0) / (1 - rate) - at_test.mean**2).sum()
    return float(simulated), float(np.std(each, ddof=1) / rounds**0.5), float(formula)


def held_out_accuracy(seed: int, norm: Any, rate: float, epochs: int) -> float:
    x, labels, held_out, held_out_labels = digits()
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(x))[:400]
    net = mlp([64, 128, 128, 10], rng, norm, dropout=rate)
    fit(net, x[chosen], labels[chosen], Adam(net, 2e-3), rng, epochs=epochs, batch=50)
    return accuracy(net.predict(held_out), held_out_labels)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    rounds, count, epochs = claim.pick(size, (20, 1, 3), (60, 5, 40), (1000, 20, 100))
    x, _, _, _ = digits()
    h = np.maximum(Dense(64, 128, np.random.default_rng(seed)).forward(x), 0).astype(np.float64)
    stream = fn.Philox(seed)
    found = {rate: ratios(h, rate, rounds, stream) for rate in RATES}
    kinds = {"dropout": (None, 0.5), "BN": (nn.BatchNorm, 0.0), "both": (nn.BatchNorm, 0.5)}
    scores = {
        kind: [held_out_accuracy(s, *settings, epochs) for s in claim.seeds(seed, count)]
        for kind, settings in kinds.items()
    }
    off = max(abs(simulated - formula) / error for simulated, error, formula in found.values())
    best = max(("dropout", "BN"), key=lambda kind: np.mean(scores[kind]))
    gain = float(np.mean(scores["both"]) - np.mean(scores[best]))
    return claim.Finding(
        "variance at test / in training at dropout "
        + ", ".join(f"{rate:g}: {simulated:.3f} (formula {f:.3f})" for rate, (simulated, _, f) in found.items())
        + "; held-out accuracy: "
        + ", ".join(f"{kind} {claim.percent(s)}" for kind, s in scores.items()),
        bool(off < 4),
        {f"ratio at {rate:g}": f[0] for rate, f in found.items()}
        | {f"formula at {rate:g}": f[2] for rate, f in found.items()}
        | {"worst z": float(off)}
        | {f"accuracy, {kind}": float(np.mean(s)) for kind, s in scores.items()},
        f"the shift is there; in accuracy, both together differ by {100 * gain:+.1f} points from the better one alone "
        f"({best})",
        data=(found, scores),
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    found, scores = finding.data
    left, right = figure.subplots(1, 2)
    left.plot(RATES, [f[0] for f in found.values()], "o", color=claim.BATCH, label="simulated")
    left.plot(RATES, [f[2] for f in found.values()], ":", color=claim.INK, label="formula")
    left.set(xlabel="dropout rate", ylabel="BN's input: variance, test / training", ylim=(0, 1))
    left.legend()
    right.errorbar(
        list(scores),
        [100 * np.mean(s) for s in scores.values()],
        [100 * np.std(s) for s in scores.values()],
        fmt="o",
        color=claim.BATCH,
        capsize=3,
    )
    right.set(ylabel="held-out accuracy, %", xlim=(-0.5, 2.5))


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
