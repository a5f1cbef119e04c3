"""What the examples train: dense and convolution layers, losses, optimisers and the loop around them, in plain NumPy.

Norms, dropout and noise come from `fastnorm.nn` and stand in the same list of layers. Everything is float32, random
numbers come from the generators that the caller passes, and each part is as short as its formula allows. Refuses to be
a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from fastnorm import nn
from fastnorm.cli.demo import load_digits
from fastnorm.cli.network import _patches, _patches_backward, cross_entropy
from fastnorm.regularization import weight_decay_

Array = np.ndarray[Any, Any]
Loss = Callable[[Array, Array], tuple[float, Array]]

__all__ = [
    "Adam", "Conv3x3", "Dense", "Flatten", "Network", "Relu", "Sgd", "accuracy", "batches", "cross_entropy", "digits",
    "fit", "mlp", "soft_cross_entropy", "softmax", "squared_error",
]  # fmt: skip


def digits() -> tuple[Array, Array, Array, Array]:
    """Training images (1437, 64) in [0, 1] and their labels, then the 360 held out: the digits that fastnorm ships."""
    data = load_digits()
    return (
        data.images.reshape(-1, 64),
        data.labels,
        data.held_out_images.reshape(-1, 64),
        data.held_out_labels,
    )


class Dense(nn.Layer):
    """y = x weight + bias, (N, inputs) -> (N, outputs); the weight starts as scale * N(0, 2 / inputs) (He)."""

    _parameter_names = ("weight", "bias")

    def __init__(
        self, inputs: int, outputs: int, rng: np.random.Generator, *, scale: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        std = scale * (2 / inputs) ** 0.5
        self.weight = (rng.standard_normal((inputs, outputs)) * std).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def forward(self, x: Array) -> Array:
        self._cache = x
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array:
        self._gradients = {"weight": self._cache.T @ dy, "bias": dy.sum(axis=0)}
        return dy @ self.weight.T


class Conv3x3(Dense):
    """A 3x3 convolution with zeros outside, channels last: (N, H, W, inputs) -> (N, H / step, W / step, outputs)."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, *, step: int = 1) -> None:
        super().__init__(9 * inputs, outputs, rng, bias=False)
        self.step, self.channels = step, inputs

    def forward(self, x: Array) -> Array:
        patches = _patches(x, self.step)
        y = super().forward(patches.reshape(-1, patches.shape[-1]))
        return y.reshape(*patches.shape[:-1], -1)

    def backward(self, dy: Array) -> Array:
        dpatches = super().backward(dy.reshape(-1, dy.shape[-1]))
        return _patches_backward(dpatches.reshape(*dy.shape[:-1], -1), self.step, self.channels)


class Relu(nn.Layer):
    """y = max(x, 0)."""

    def forward(self, x: Array) -> Array:
        self._cache = x > 0
        return x * self._cache

    def backward(self, dy: Array) -> Array:
        return dy * self._cache


class Flatten(nn.Layer):
    """(N, ...) -> (N, the product of the others)."""

    def forward(self, x: Array) -> Array:
        self._cache = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self._cache)


class Network:
    """Layers one after another."""

    def __init__(self, *layers: nn.Layer) -> None:
        self.layers = layers

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def train(self, mode: bool = True) -> Network:
        for layer in self.layers:
            layer.train(mode)
        return self

    def predict(self, x: Array) -> Array:
        """The output in evaluation mode; the mode is training afterwards."""
        y = self.train(False).forward(x)
        self.train()
        return y

    def parameters(self) -> dict[str, Array]:
        return {f"{i}.{name}": p for i, layer in enumerate(self.layers) for name, p in layer.parameters().items()}

    def gradients(self) -> dict[str, Array]:
        return {f"{i}.{name}": g for i, layer in enumerate(self.layers) for name, g in layer.gradients().items()}

    def state_dict(self) -> dict[str, Array]:
        return {f"{i}.{name}": v for i, layer in enumerate(self.layers) for name, v in layer.state_dict().items()}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        for i, layer in enumerate(self.layers):
            head = f"{i}."
            layer.load_state_dict({k.removeprefix(head): v for k, v in state.items() if k.startswith(head)})


def mlp(
    sizes: list[int],
    rng: np.random.Generator,
    norm: Callable[[int], nn.Layer] | None = None,
    *,
    dropout: float = 0.0,
    scale: float = 1.0,
) -> Network:
    """Dense, norm, rectifier, dropout for each hidden size, then a dense layer to the last."""
    layers: list[nn.Layer] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers.append(Dense(inputs, outputs, rng, scale=scale))
        if norm is not None:
            layers.append(norm(outputs))
        layers.append(Relu())
        if dropout:
            layers.append(nn.Dropout(dropout, rng=int(rng.integers(2**63))))
    return Network(*layers, Dense(sizes[-2], sizes[-1], rng, scale=scale))


def softmax(scores: Array) -> Array:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def soft_cross_entropy(scores: Array, targets: Array) -> tuple[float, Array]:
    """Mean of -sum(target * log softmax(scores)), and its gradient; `cross_entropy` is this for plain labels."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-(targets * log_p).sum(dtype=np.float64)) / len(scores), (np.exp(log_p) - targets) / len(scores)


def squared_error(outputs: Array, targets: Array) -> tuple[float, Array]:
    """Mean of (output - target)^2, and its gradient."""
    error = outputs - targets
    return float(np.square(error, dtype=np.float64).mean()), error * np.float32(2 / error.size)


def accuracy(scores: Array, labels: Array) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


class Sgd:
    """Gradient descent: v <- momentum v + g, p <- p - rate v; with decoupled decay of matrices before it."""

    def __init__(self, net: Network, rate: float, *, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        self.net, self.rate, self.momentum, self.weight_decay = net, rate, momentum, weight_decay
        self.velocity = {name: np.zeros_like(p) for name, p in net.parameters().items()}

    def step(self) -> None:
        gradients = self.net.gradients()
        for name, p in self.net.parameters().items():
            if self.weight_decay and p.ndim > 1:
                weight_decay_(p, self.weight_decay, self.rate)
            v = self.velocity[name]
            v *= self.momentum
            v += gradients[name]
            p -= np.float32(self.rate) * v


class Adam:
    """Adam with decoupled weight decay: p <- p - rate * m / (sqrt(v) + eps), m and v corrected for their start at 0."""

    def __init__(
        self, net: Network, rate: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ) -> None:
        self.net, self.rate, self.betas, self.weight_decay, self.steps = net, rate, betas, weight_decay, 0
        self.moments = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in net.parameters().items()}

    def step(self) -> None:
        self.steps += 1
        (b1, b2), gradients = self.betas, self.net.gradients()
        for name, p in self.net.parameters().items():
            if self.weight_decay and p.ndim > 1:
                weight_decay_(p, self.weight_decay, self.rate)
            (m, v), g = self.moments[name], gradients[name]
            m += np.float32(1 - b1) * (g - m)
            v += np.float32(1 - b2) * (g * g - v)
            m_hat, v_hat = m / np.float32(1 - b1**self.steps), v / np.float32(1 - b2**self.steps)
            p -= np.float32(self.rate) * m_hat / (np.sqrt(v_hat) + np.float32(1e-8))


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[Array]:
    """The indices of one epoch, shuffled, in batches of `size`; an incomplete one is left out."""
    order = rng.permutation(count)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def fit(
    net: Network,
    x: Array,
    targets: Array,
    optimiser: Sgd | Adam,
    rng: np.random.Generator,
    *,
    epochs: int,
    batch: int = 64,
    loss: Loss = cross_entropy,
    change_batch: Callable[[Array, Array], Array] | None = None,
    after_epoch: Callable[[int], bool | None] | None = None,
) -> list[float]:
    """Train; returns the loss of every step, taken before the step.

    `change_batch(x, targets)` gives the inputs to train on instead (noise, adversarial examples); `after_epoch(epoch)`
    may return True to stop.
    """
    losses = []
    for epoch in range(epochs):
        for chosen in batches(len(x), batch, rng):
            inputs, wanted = x[chosen], targets[chosen]
            if change_batch is not None:
                inputs = change_batch(inputs, wanted)
            value, dscores = loss(net.forward(inputs), wanted)
            net.backward(dscores)
            optimiser.step()
            losses.append(value)
        if after_epoch is not None and after_epoch(epoch):
            break
    return losses
