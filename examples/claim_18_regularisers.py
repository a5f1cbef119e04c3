"""Claim 18 [B]: early stopping, label smoothing, input noise and adversarial training each lower the held-out (or
adversarial) error of a network that overfits.

Measured on the digits: a network 64-256-256-10 trained on 150 images, as it is and with each: early stopping on 150
other images (patience 5 epochs, the best weights kept), targets 1 - eps and eps / 9 with eps = 0.1, inputs x + N(0,
0.2^2), and training on x + 0.1 sign(dJ/dx) beside x. Held-out error of each, and the error on held-out images changed
by 0.1 sign(dJ/dx) against the network itself.

Agrees when the first three lower the mean held-out error over seeds, and adversarial training the adversarial error.
"""

from __future__ import annotations

from typing import Any

import claim
import numpy as np
from small_net import Adam, Array, Network, accuracy, cross_entropy, digits, fit, mlp, soft_cross_entropy

import fastnorm as fn
from fastnorm.regularization import EarlyStopping, fgsm_perturbation, label_smoothing

CLAIM = claim.Claim(18, "B", "early stopping, label smoothing, input noise, adversarial training lower held-out error")
KINDS = ("as it is", "early stopping", "label smoothing", "input noise", "adversarial")
IMAGES, STRENGTH = 150, 0.1


def attacked(net: Network, x: Array, labels: Array) -> Array:
    _, dscores = cross_entropy(net.forward(x), labels)
    return fgsm_perturbation(x, net.backward(dscores), STRENGTH)


def errors(seed: int, kind: str, epochs: int) -> tuple[float, float]:
    """Held-out error, and that under attack."""
    x, labels, held_out, held_out_labels = digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    chosen, validation = order[:IMAGES], order[IMAGES : 2 * IMAGES]
    net, stream = mlp([64, 256, 256, 10], rng), fn.Philox(seed)
    settings: dict[str, Any] = {"loss": cross_entropy}
    targets: Array = labels[chosen]
    stopping = EarlyStopping(patience=5)

    def check(epoch: int) -> bool:
        return stopping.update(cross_entropy(net.predict(x[validation]), labels[validation])[0], net.state_dict())

    if kind == "early stopping":
        settings["after_epoch"] = check
    elif kind == "label smoothing":
        targets, settings["loss"] = label_smoothing(targets, 10, 0.1), soft_cross_entropy
    elif kind == "input noise":
        settings["change_batch"] = lambda batch, _: fn.gaussian_noise(batch, 0.2, rng=stream)
    elif kind == "adversarial":
        # Half of each batch as it is, half attacked.
        settings["change_batch"] = lambda batch, wanted: np.concatenate(
            [batch[::2], attacked(net, batch[1::2], wanted[1::2])]
        )[np.argsort(np.r_[0 : len(batch) : 2, 1 : len(batch) : 2])]
    fit(net, x[chosen], targets, Adam(net), rng, epochs=epochs, batch=30, **settings)
    if kind == "early stopping":
        net.load_state_dict(stopping.best_state)
    under_attack = attacked(net.train(False), held_out, held_out_labels)
    return (
        1 - accuracy(net.predict(held_out), held_out_labels),
        1 - accuracy(net.predict(under_attack), held_out_labels),
    )


def measure(seed: int, size: claim.Size) -> claim.Finding:
    count, epochs = claim.pick(size, (1, 5), (5, 60), (20, 200))
    runs = {kind: np.array([errors(s, kind, epochs) for s in claim.seeds(seed, count)]) for kind in KINDS}
    plain = runs["as it is"]
    lower = {kind: plain[:, 0] - runs[kind][:, 0] for kind in KINDS[1:]}
    lower["adversarial"] = plain[:, 1] - runs["adversarial"][:, 1]
    failed = [kind for kind, d in lower.items() if d.mean() <= 0]

    def words(kind: str) -> str:
        column = 1 if kind == "adversarial" else 0
        return f"{kind} {claim.percent(runs[kind][:, column])}"

    return claim.Finding(
        f"held-out error: as it is {claim.percent(plain[:, 0])}, {', '.join(map(words, KINDS[1:4]))}; under attack: "
        f"as it is {claim.percent(plain[:, 1])}, {words('adversarial')}",
        not failed,
        {f"held-out error, {kind}": float(r[:, 0].mean()) for kind, r in runs.items()}
        | {f"error under attack, {kind}": float(r[:, 1].mean()) for kind, r in runs.items()},
        f"not lower here: {' and '.join(f'{k} ({0 - 100 * lower[k].mean():+.1f} points)' for k in failed)}"
        if failed
        else "",
        data=runs,
    )


def plot(finding: claim.Finding, figure: Any) -> None:
    for k, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        for position, (kind, r) in enumerate(finding.data.items()):
            colour = claim.PLAIN if kind == "as it is" else claim.BATCH
            axes.barh(position, 100 * r[:, k].mean(), xerr=100 * r[:, k].std(), color=colour, height=0.6, capsize=3)
        axes.set_yticks(range(len(KINDS)), KINDS)
        axes.set_xlabel(("held-out error, %", "error under attack, %")[k])
    figure.axes[0].invert_yaxis()


if __name__ == "__main__":
    claim.main(__doc__, CLAIM, measure, plot)
