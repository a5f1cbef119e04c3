"""The network of the demo: two convolutions, one hidden layer, batch norm after each, dropout before the output.

Plain NumPy, channels last, written to be read. Batch norm and dropout come from the module given to the constructor
(fastnorm or fastnorm.reference) and nothing else differs between the two. Refuses to be a framework.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm import Philox

Array = NDArray[Any]

_CONV1, _CONV2, _HIDDEN, _CLASSES = 8, 32, 128, 10
_DROP = 0.3
_WEIGHT_DECAY = 5e-4
_SGD_MOMENTUM = 0.9


def _patches(x: Array, step: int) -> Array:
    """(N, H, W, C) -> (N, H/step, W/step, 9 C): the 3x3 neighbourhood of every step-th pixel, zeros outside."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::step, ::step]
    return np.asarray(windows.transpose(0, 1, 2, 4, 5, 3).reshape(*windows.shape[:3], -1))


def _patches_backward(dpatches: Array, step: int, channels: int) -> Array:
    """The gradient of the input of _patches: every pixel collects from the neighbourhoods that it was part of."""
    n, height, width, _ = dpatches.shape
    parts = dpatches.reshape(n, height, width, 3, 3, channels)
    dx = np.zeros((n, height * step + 2, width * step + 2, channels), dpatches.dtype)
    for row in range(3):
        rows = slice(row, row + height * step, step)
        for column in range(3):
            dx[:, rows, column : column + width * step : step] += parts[:, :, :, row, column]
    return dx[:, 1:-1, 1:-1]


class Network:
    """Images (N, 8, 8) in, class scores (N, 10) out; trained by gradient descent with momentum."""

    def __init__(self, norms: ModuleType, rng: np.random.Generator, dtype: type = np.float32) -> None:
        self.norms = norms
        self.masks = Philox(int(rng.integers(2**63)))
        self.parameters: dict[str, Array] = {}
        self.running: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        sizes = {"conv1": (9, _CONV1), "conv2": (9 * _CONV1, _CONV2), "hidden": (16 * _CONV2, _HIDDEN)}
        for name, (inputs, outputs) in sizes.items():
            self.parameters[name] = (rng.standard_normal((inputs, outputs)) * (2 / inputs) ** 0.5).astype(dtype)
            self.parameters[name + ".weight"] = np.ones(outputs, dtype)
            self.parameters[name + ".bias"] = np.zeros(outputs, dtype)
            self.running[name] = np.zeros(outputs), np.ones(outputs)
        self.parameters["out"] = np.zeros((_HIDDEN, _CLASSES), dtype)
        self.parameters["out.bias"] = np.zeros(_CLASSES, dtype)
        self.velocity = {name: np.zeros_like(value) for name, value in self.parameters.items()}

    def scores(self, images: Array) -> Array:
        """Class scores for inference: running statistics, no dropout."""

        def block(name: str, z: Array) -> Array:
            mean, var = self.running[name]
            weight, bias = self.parameters[name + ".weight"], self.parameters[name + ".bias"]
            a: Array = self.norms.batch_norm(z, mean, var, weight, bias, channel_axis=-1)
            return np.asarray(np.maximum(a, 0))

        p = self.parameters
        h = block("conv1", _patches(images[..., None], 1) @ p["conv1"])
        h = block("conv2", _patches(h, 2) @ p["conv2"])
        h = block("hidden", h.reshape(len(h), -1) @ p["hidden"])
        return h @ p["out"] + p["out.bias"]

    def step(self, images: Array, labels: NDArray[np.intp], rate: float) -> float:
        """One step of gradient descent; returns the loss (mean cross-entropy) of the batch before the step."""
        p, g = self.parameters, {}
        caches: dict[str, tuple[Any, Array]] = {}

        def block(name: str, z: Array) -> Array:
            mean, var = self.running[name]
            a, cache = self.norms.batch_norm_forward(
                z, p[name + ".weight"], p[name + ".bias"], running_mean=mean, running_var=var, channel_axis=-1
            )
            caches[name] = cache, a
            return np.asarray(np.maximum(a, 0))

        def block_backward(name: str, dh: Array) -> Array:
            cache, a = caches[name]
            dz, g[name + ".weight"], g[name + ".bias"] = self.norms.batch_norm_backward(dh * (a > 0), cache)
            return np.asarray(dz)

        x1 = _patches(images[..., None], 1)
        x2 = _patches(block("conv1", x1 @ p["conv1"]), 2)
        h2 = block("conv2", x2 @ p["conv2"])
        x3 = h2.reshape(len(h2), -1)
        h3 = block("hidden", x3 @ p["hidden"])
        x4, mask = self.norms.dropout_forward(h3, _DROP, rng=self.masks)
        loss, dscores = cross_entropy(x4 @ p["out"] + p["out.bias"], labels)

        g["out"], g["out.bias"] = x4.T @ dscores, dscores.sum(axis=0)
        dh3 = self.norms.dropout_backward(dscores @ p["out"].T, mask)
        dz3 = block_backward("hidden", dh3)
        g["hidden"] = x3.T @ dz3
        dz2 = block_backward("conv2", (dz3 @ p["hidden"].T).reshape(h2.shape))
        g["conv2"] = x2.reshape(-1, x2.shape[-1]).T @ dz2.reshape(-1, _CONV2)
        dz1 = block_backward("conv1", _patches_backward(dz2 @ p["conv2"].T, 2, _CONV1))
        g["conv1"] = x1.reshape(-1, x1.shape[-1]).T @ dz1.reshape(-1, _CONV1)
        self._descend(g, rate)
        return loss

    def _descend(self, gradients: dict[str, Array], rate: float) -> None:
        for name, gradient in gradients.items():
            value, velocity = self.parameters[name], self.velocity[name]
            if value.ndim == 2:
                gradient = gradient + _WEIGHT_DECAY * value
            velocity *= _SGD_MOMENTUM
            velocity += gradient
            value -= rate * velocity


def cross_entropy(scores: Array, labels: NDArray[np.intp]) -> tuple[float, Array]:
    """Mean of -log softmax(scores)[label], and its gradient with respect to the scores."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    loss = float((log_sum[:, 0] - shifted[rows, labels]).mean(dtype=np.float64))
    dscores = np.exp(shifted - log_sum)
    dscores[rows, labels] -= 1
    return loss, dscores / len(labels)
