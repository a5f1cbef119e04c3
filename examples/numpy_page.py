"""A page of NumPy with fastnorm in it: norms, dropout, odd shapes, layouts, `out=`, and wrong arguments.

Run it: every line that prints shows what it is about. Nothing here needs more than NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastnorm as fn

rng = np.random.default_rng(0)


def heading(text: str) -> None:
    print(f"\n{text}")


def refused(call: Callable[[], Any]) -> None:
    """Print the message of a call that must not work."""
    try:
        call()
    except (TypeError, ValueError) as error:
        print(f"  {type(error).__name__}: {error}")
    else:
        raise SystemExit("that should have been refused")


heading("Layer norm: every row gets mean 0 and variance 1, then weight and bias")
x = rng.normal(5.0, 3.0, (4, 10)).astype(np.float32)
weight, bias = np.full(10, 2, np.float32), np.full(10, 1, np.float32)
y = fn.layer_norm(x, weight, bias)
print("  mean of the rows:", y.mean(axis=1).round(5), " std:", y.std(axis=1).round(4))

heading("The same with its backward: the gradient of sum(y * dy)")
y, cache = fn.layer_norm_forward(x, weight, bias)
dy = rng.standard_normal(x.shape, dtype=np.float32)
dx, dweight, dbias = fn.layer_norm_backward(dy, cache)
print("  shapes:", dx.shape, dweight.shape, dbias.shape, " statistics kept:", cache.mean.dtype, cache.mean.shape)
print("  a row's gradient sums to 0:", bool(np.allclose(dx.sum(axis=1), 0, atol=1e-5)))

heading("Odd shapes: a video (batch, channels, time, height, width), normalised over the last three axes")
video = rng.standard_normal((2, 3, 5, 7, 9))
print("  layer_norm from axis 2:", fn.layer_norm(video, axis=2).shape)
print("  rms_norm of a vector:", fn.rms_norm(np.array([3.0, 4.0])).round(4))
print("  group_norm in 3 groups:", fn.group_norm(video, 3).shape)
print("  instance_norm:", fn.instance_norm(video).shape)
print("  an empty batch:", fn.layer_norm(np.empty((0, 8))).shape)

heading("Batch norm: trains on the batch, remembers running statistics, uses them later")
running_mean, running_var = np.zeros(3), np.ones(3)
images = rng.normal(10.0, 2.0, (16, 3, 8, 8)).astype(np.float32)
for _ in range(50):
    y, cache = fn.batch_norm_forward(images, running_mean=running_mean, running_var=running_var)
print("  running mean:", running_mean.round(2), " running variance:", running_var.round(2))
later = fn.batch_norm(images[:1], running_mean, running_var)
print("  one image at inference, mean:", round(float(later.mean()), 2))

heading("Channels last: say where the channels are, or pass the transposed view; nothing is copied or reordered")
nhwc = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
last, _ = fn.batch_norm_forward(nhwc, channel_axis=-1)
view, _ = fn.batch_norm_forward(nhwc.transpose(0, 3, 1, 2))
print("  same numbers:", np.array_equal(last.transpose(0, 3, 1, 2), view), " memory order kept:", view.strides[1] == 4)

heading("Every other row, backwards: any strides will do")
print("  equal to a copy's result:", np.array_equal(fn.layer_norm(x[::-2]), fn.layer_norm(x[::-2].copy())))

heading("out= fills an array of yours, also a part of a larger one, also x itself")
buffer = np.zeros((4, 20), np.float32)
fn.layer_norm(x, out=buffer[:, ::2])
work = x.copy()
fn.layer_norm(work, out=work)
print("  both equal:", np.array_equal(buffer[:, ::2], work))

heading("Dropout: a seed names the mask; the backward makes the same mask again and stores nothing")
y, cache = fn.dropout_forward(np.ones((2, 12)), p=0.5, rng=42)
print("  ", y.astype(int).tolist())
print("  gradient through the same mask:", np.array_equal(fn.dropout_backward(np.ones((2, 12)), cache), y))
stream = fn.Philox(7)
first, second = fn.dropout_mask((1000,), 0.2, rng=stream), fn.dropout_mask((1000,), 0.2, rng=stream)
print("  a stream moves on:", not np.array_equal(first, second), " kept:", int(first.sum()), int(second.sum()))
whole = fn.dropout(images, 0.5, rng=1, shared_axes=(2, 3))
print("  whole channels at once:", np.unique((whole != 0).mean(axis=(2, 3))).tolist())

heading("Statistics that can be merged across blocks")
parts = [fn.moments(block) for block in np.array_split(images, 5)]
merged, at_once = fn.Moments.merge(*parts), fn.moments(images)
print("  mean and standard deviation agree:", bool(np.isclose(merged.mean, at_once.mean, rtol=1e-12)),
      bool(np.isclose(merged.std(), at_once.std(), rtol=1e-12)))  # fmt: skip

heading("Checked against plain NumPy, call by call")
with fn.verify():
    fn.layer_norm(x, weight, bias)
print("  within the contract")

heading("Wrong arguments say what was received and what was expected")
refused(lambda: fn.layer_norm(np.arange(12).reshape(3, 4)))
refused(lambda: fn.layer_norm(x, weight[:5]))
refused(lambda: fn.layer_norm(x, weight.astype(np.float64)))
refused(lambda: fn.layer_norm(x, axis=2))
refused(lambda: fn.layer_norm(x, eps=-1.0))
refused(lambda: fn.group_norm(images, 2))
refused(lambda: fn.batch_norm_forward(x[:1]))
refused(lambda: fn.layer_norm(x, out=np.empty((4, 9), np.float32)))
refused(lambda: fn.layer_norm_backward(dy[:2], fn.layer_norm_forward(x)[1]))
refused(lambda: fn.rms_norm_backward(dy, fn.layer_norm_forward(x)[1]))
refused(lambda: fn.dropout(x, 1.5, rng=0))
refused(lambda: fn.dropout(x, 0.5))  # type: ignore[call-arg]
