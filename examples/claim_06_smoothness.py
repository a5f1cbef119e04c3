"""Claim 6 [C]: batch normalization makes optimisation smoother; it does not make the covariate shift smaller.

Along the gradient g of a step, theta(a) = theta - a g for a from 1/4 to 4 times the learning rate (same batch):
the range of the loss L(theta(a)), the range of the gradient's change ||grad(theta(a)) - g||, and the effective
beta-smoothness max_a ||grad(theta(a)) - g|| / ||a g||. Internal covariate shift: the gradient of a middle layer's
weight before (G) and after (G') the earlier layers alone have taken their step, ||G - G'|| / ||G||.

Measured on the digits with and without BN, a network of six hidden layers of 64 units, gradient descent at rate 0.1:
medians over the steps of training, mean over seeds. Agrees when the three ranges are smaller with BN, and the shift is
not.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Array, Network, Sgd, batches, cross_entropy, digits, mlp

from fastnorm import nn

CLAIM = claim.Claim(6, "C", "BN makes the loss and its gradient smoother along a step, not the covariate shift smaller")
RATE = 0.1
ALONG = RATE * np.geomspace(0.25, 4, 6)
NAMES = ("range of the loss", "range of the gradient's change", "beta-smoothness", "covariate shift")


def loss_and_gradients(net: Network, x: Array, labels: Array) -> tuple[float, dict[str, Array]]:
    loss, dscores = cross_entropy(net.forward(x), labels)
    net.backward(dscores)
    return loss, {name: g.astype(np.float64) for name, g in net.gradients().items()}


def moved(net: Network, start: dict[str, Array], gradients: dict[str, Array], a: float, names: list[str]) -> None:
    """Put the parameters at start - a * gradient, those in `names` alone."""
    for name, p in net.parameters().items():
        p[...] = start[name] - a * gradients[name] if name in names else start[name]


def distance(a: dict[str, Array], b: dict[str, Array]) -> float:
    return float(np.sqrt(sum(np.square(a[name] - b[name]).sum() for name in a)))


def look_around(net: Network, x: Array, labels: Array) -> list[float]:
    """The four numbers of NAMES at this point; the parameters are afterwards where they were."""
    start = {name: p.copy() for name, p in net.parameters().items()}
    everything = list(start)
    _, g = loss_and_gradients(net, x, labels)
    norm = distance(g, {name: np.zeros_like(v) for name, v in g.items()})
    losses, changes = [], []
    for a in ALONG:
        moved(net, start, g, a, everything)
        loss, there = loss_and_gradients(net, x, labels)
        losses.append(loss)
        changes.append(distance(there, g))
    weights = [name for name in everything if start[name].ndim == 2]
    middle = weights[len(weights) // 2]
    earlier = [name for name in everything if int(name.split(".")[0]) < int(middle.split(".")[0])]
    moved(net, start, g, RATE, earlier)
    _, after = loss_and_gradients(net, x, labels)
    moved(net, start, g, 0, everything)
    shift = np.linalg.norm(after[middle] - g[middle]) / np.linalg.norm(g[middle])
    return [
        float(np.ptp(losses)),
        float(np.ptp(changes)),
        float(np.max(np.array(changes) / (ALONG * norm))),
        float(shift),
    ]


def one_run(seed: int, norm: type[nn.BatchNorm] | None, epochs: int, every: int) -> Array:
    """NAMES by step; shape (looks, 4)."""
    x, labels, _, _ = digits()
    rng = np.random.default_rng(seed)
    net = mlp([64] + 6 * [64] + [10], rng, norm)
    optimiser, found, step = Sgd(net, RATE, momentum=0), [], 0
    for _ in range(epochs):
        for chosen in batches(len(x), 64, rng):
            if step % every == 0:
                found.append(look_around(net, x[chosen], labels[chosen]))
            loss_and_gradients(net, x[chosen], labels[chosen])
            optimiser.step()
            step += 1
    return np.array(found)


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, epochs, every = claim.pick(size, (1, 2, 8), (3, 8, 8), (10, 20, 8))
    with np.errstate(all="ignore"):
        runs = {
            label: np.array([one_run(s, norm, epochs, every) for s in claim.seeds(seed, count)])
            for label, norm in (("without", None), ("with", nn.BatchNorm))
        }
    medians = {label: np.median(r, axis=1).mean(axis=0) for label, r in runs.items()}
    smoother = [bool(medians["with"][k] < medians["without"][k]) for k in range(3)]
    shift_smaller = bool(medians["with"][3] < medians["without"][3])
    words = [f"{name} {medians['with'][k]:.3g} / {medians['without'][k]:.3g}" for k, name in enumerate(NAMES)]
    seen = ""
    if not (all(smoother) and not shift_smaller):
        larger = [name for name, s in zip(NAMES, smoother, strict=False) if not s]
        seen = "; ".join(
            ([f"not smaller with BN here: {', '.join(larger)}"] if larger else [])
            + (
                [
                    f"BN makes the shift smaller here as well: the middle layer's gradient changes by "
                    f"{medians['with'][3]:.2f} of its size with BN and by {medians['without'][3]:.2f} without"
                ]
                if shift_smaller
                else []
            )
        )
    return claim.Finding(
        f"with / without BN: {', '.join(words)}",
        all(smoother) and not shift_smaller,
        {f"{name}, {label}": float(m[k]) for label, m in medians.items() for k, name in enumerate(NAMES)},
        seen,
        data=(runs, every),
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    runs, every = finding.data
    for k, axes in enumerate(figure.subplots(2, 2, sharex=True).flat):
        for label, colour in (("without", claim.PLAIN), ("with", claim.BATCH)):
            values = np.median(runs[label][:, :, k], axis=0)
            axes.semilogy(every * np.arange(len(values)), values, color=colour, label=f"{label} BN")
        axes.set_title(NAMES[k], fontsize=9)
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel("step", fontsize=9)


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
