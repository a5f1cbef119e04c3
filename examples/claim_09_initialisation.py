"""Claim 9 [D]: the scale of the first weights decides activations and gradients of a deep network; norms undo that.

Thirty layers of 64 units, weights N(0, s^2 2 / 64) for s = 0.5, 1, 2 (s = 1 is He's): without normalization the size of
the activations goes like s^depth, and that of the gradients as well. With layer or batch normalization every layer
starts afresh. And weights move little during training, so that it is the start that counts.

Measured on the digits: how many times larger or smaller the root mean square of the last layer's activations is than
the first's, and the same for the gradients that reach them; and ||W - W0|| / ||W0|| after training (median over layers,
s = 1, gradient descent with momentum at rate 0.01).

Agrees when, for s = 0.5 and 2, activations change more than 1000-fold without a norm and less than 10-fold with LN and
BN, gradients change less with LN and BN than without, and weights move by less than half their norm.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, Network, Relu, Sgd, cross_entropy, digits, fit, mlp

from fastnorm import nn

CLAIM = claim.Claim(9, "D", "without norms, activations and gradients depend on the first weights' scale to the depth")
DEPTH = 30
SCALES = (0.5, 1.0, 2.0)
NORMS = {"plain": None, "LN": nn.LayerNorm, "BN": nn.BatchNorm}


def sizes(net: Network, x: Array, labels: Array) -> tuple[Array, Array]:
    """Root mean square of each hidden layer's activations, and of the gradients that reach them."""
    activations, h = [], x
    for layer in net.layers:
        h = layer.forward(h)
        if isinstance(layer, Relu):
            activations.append(h)
    gradients, dh = [], cross_entropy(h, labels)[1]
    for layer in reversed(net.layers):
        if isinstance(layer, Relu):
            gradients.append(dh)
        dh = layer.backward(dh)

    def rms(arrays: list[Array]) -> Array:
        return np.array([np.sqrt(np.square(a, dtype=np.float64).mean()) for a in arrays])

    return rms(activations), rms(gradients[::-1])


def change(values: Array) -> float:
    """How many times the last is the first, or the other way round, as a power of ten."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = abs(np.log10(values[-1] / values[0]))
    return float(found) if np.isfinite(found) else 300.0


def movement(seed: int, norm: Any, epochs: int) -> float:
    x, labels, _, _ = digits()
    rng = np.random.default_rng(seed)
    net = mlp([64] * (DEPTH + 1) + [10], rng, norm)
    start = {name: p.copy() for name, p in net.parameters().items() if p.ndim == 2}
    fit(net, x, labels, Sgd(net, 0.01), rng, epochs=epochs)
    moves = [np.linalg.norm(net.parameters()[name] - p) / np.linalg.norm(p) for name, p in start.items()]
    return float(np.median(moves))


def measure(seed: int, size: claim.Size) -> claim.Finding:
    x, labels, _, _ = digits()
    count, epochs = claim.pick(size, (1, 1), (3, 6), (10, 30))
    curves: dict[tuple[str, float], tuple[Array, Array]] = {}
    for kind, norm in NORMS.items():
        for scale in SCALES:
            found = [
                sizes(
                    mlp([64] * (DEPTH + 1) + [10], np.random.default_rng(s), norm, scale=scale), x[:256], labels[:256]
                )
                for s in claim.seeds(seed, count)
            ]
            # Geometric means: sizes are compared by their ratios.
            curves[kind, scale] = tuple(
                np.exp(np.log(np.maximum(f, 1e-300)).mean(axis=0)) for f in zip(*found, strict=True)
            )
    a, g = ({key: change(c[k]) for key, c in curves.items()} for k in (0, 1))
    moves = {kind: [movement(s, norm, epochs) for s in claim.seeds(seed, count)] for kind, norm in NORMS.items()}
    worst = {kind: (max(a[kind, s] for s in SCALES), max(g[kind, s] for s in SCALES)) for kind in NORMS}
    agrees = (
        all(a["plain", s] > 3 for s in (0.5, 2.0))
        and all(a[kind, s] < 1 for kind in ("LN", "BN") for s in SCALES)
        and all(g[kind, s] < g["plain", s] for kind in ("LN", "BN") for s in (0.5, 2.0))
        and all(np.mean(m) < 0.5 for m in moves.values())
    )
    return claim.Finding(
        "powers of ten from first to last layer for s = 0.5, 1, 2: activations "
        + ", ".join(f"{kind} {' / '.join(f'{a[kind, s]:.1f}' for s in SCALES)}" for kind in NORMS)
        + "; gradients "
        + ", ".join(f"{kind} {' / '.join(f'{g[kind, s]:.1f}' for s in SCALES)}" for kind in NORMS)
        + "; weights move by "
        + ", ".join(f"{claim.percent(m)} ({kind})" for kind, m in moves.items()),
        bool(agrees),
        {
            **{f"activations, {kind}, {s}": v for (kind, s), v in a.items()},
            **{f"gradients, {kind}, {s}": v for (kind, s), v in g.items()},
            **{f"movement, {kind}": float(np.mean(m)) for kind, m in moves.items()},
        },
        f"at their worst scale gradients change by 10^{worst['LN'][1]:.1f} through 30 layers with LN and by "
        f"10^{worst['BN'][1]:.1f} with BN, at any scale of the weights",
        data=curves,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    left, right = figure.subplots(1, 2, sharex=True)
    colours = dict(zip(NORMS, (claim.PLAIN, claim.LAYER, claim.BATCH), strict=True))
    styles = dict(zip(SCALES, (":", "-", "--"), strict=True))
    for (kind, scale), curves in finding.data.items():
        for axes, values in zip((left, right), curves, strict=True):
            axes.semilogy(
                1 + np.arange(DEPTH), values, styles[scale], color=colours[kind], label=f"{kind}, s = {scale:g}"
            )
    left.set(xlabel="layer", ylabel="activations, rms")
    right.set(xlabel="layer", ylabel="gradients, rms")
    left.legend(fontsize=6)


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
