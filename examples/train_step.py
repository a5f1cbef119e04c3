"""A training step in ten lines of NumPy: one hidden layer with batch norm and dropout, on a spiral of two classes.

Refuses to be more than the step; `python -m fastnorm demo` trains a whole network on real data.
"""

from __future__ import annotations

import numpy as np

import fastnorm as fn

rng = np.random.default_rng(0)
label = np.repeat([0.0, 1.0], 200).astype(np.float32)[:, None]
angle = rng.uniform(0, 7, (400, 1)).astype(np.float32)
x = angle / 7 * np.hstack([np.cos(angle + np.pi * label), np.sin(angle + np.pi * label)])
w1, w2 = (rng.standard_normal((2, 64)) * 4).astype(np.float32), np.zeros((64, 1), np.float32)
weight, bias, masks = np.ones(64, np.float32), rng.standard_normal(64).astype(np.float32), fn.Philox(0)

for step in range(2001):
    z, norm = fn.batch_norm_forward(x @ w1, weight, bias)
    h, drop = fn.dropout_forward(np.maximum(z, 0), 0.1, rng=masks)
    guess = 1 / (1 + np.exp(-h @ w2))
    loss = -np.log(np.where(label == 1, guess, 1 - guess)).mean()
    dscore = (guess - label) / len(x)
    dh = fn.dropout_backward(dscore @ w2.T, drop)
    dz, dweight, dbias = fn.batch_norm_backward(dh * (z > 0), norm)
    for value, gradient in ((w1, x.T @ dz), (w2, h.T @ dscore), (weight, dweight), (bias, dbias)):
        value -= gradient
    if step % 500 == 0:
        print(f"step {step:4}  loss {loss:.4f}  accuracy {np.mean((guess > 0.5) == label):.1%}")
