"""Dropout, DropConnect and gaussian noise from docs/dropout.md, in plain NumPy; the generator is written out below.

Promises the masks, and the results of masking, bit for bit; the noise from Box and Muller's formula in longdouble,
rounded once. ``EXACT`` gives the noise and the residual step before rounding with the error allowed. Refuses to be
fast: it holds every draw in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from .._philox import Rng, require, take
from .._results import Array
from . import _norm
from ._norm import WIDE, Exact

NOISE_UNITS = 6.0  # allowed error of the noise, in units of u * (|x| + std * radius)

# ---------------------------------------------------------------------------------------------------------------------
# The generator


def philox4x32(counters: Array, seed: int, rounds: int = 10) -> Array:
    """Philox4x32 of every row of ``counters``, (n, 4) words of 32 bits, under the key (seed mod 2^32, seed div 2^32).

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(rounds):
        # Two 32 x 32 -> 64 bit products; their halves change places and take up the key and the other words.
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0 = (product1 >> shift) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & mask, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    words: Array = np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)
    return words


def _blocks(block: Array, domain: int, seed: int, offset: int) -> Array:
    """The four words of each block number (uint64) in one of the four domains."""
    counters = np.empty((block.size, 4), np.uint32)
    counters[:, 0] = block & np.uint64(0xFFFFFFFF)
    counters[:, 1] = (block >> np.uint64(32)) | np.uint64(domain << 30)
    counters[:, 2] = offset % 2**32
    counters[:, 3] = offset // 2**32
    return philox4x32(counters, seed)


def _half(words: Array, row: Array, h: Array) -> Array:
    """Half h (0 to 7) of the four words in each row named, lower half first, as uint64."""
    # In memory order of the low byte first, whatever the machine's, the words are the halves.
    halves = words.astype("<u4").view("<u2")
    return cast(Array, halves[row, h.astype(np.intp)].astype(np.uint64))


# ---------------------------------------------------------------------------------------------------------------------
# Draws and what they decide


@dataclass(frozen=True)
class DropoutCache:
    """The numbers that the mask of a forward is a function of."""

    function: str
    seed: int
    offset: int
    p: float
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shared_axes: tuple[int, ...]
    scale: str


def threshold(p: float) -> int:
    """K: an element is kept when its 32-bit draw is below it, so P(keep) = K / 2^32."""
    return round((1.0 - p) * 2.0**32)


def factor(p: float, dtype: Any) -> Any:
    """2^32 / K rounded once to dtype; 0 where K is 0, since nothing is kept then."""
    k = threshold(p)
    if k == 0:
        return np.dtype(dtype).type(0)
    if np.dtype(dtype) == np.float64:
        return np.float64(2**32 / k)  # Python rounds the quotient of two integers once
    # Eight or more bits beyond float32's, the last one set where the division leaves a rest: float64 holds that
    # exactly, and so the conversion to dtype is the only rounding.
    shift = k.bit_length() + 8
    quotient, rest = divmod(2 ** (32 + shift), k)
    return np.dtype(dtype).type(math.ldexp(quotient | (rest > 0), -shift))


def _draw_index(shape: tuple[int, ...], shared: tuple[int, ...], start: int, stop: int) -> Array:
    """For elements start to stop in C order: the C-order index in the shape whose shared axes are 1."""
    rest = np.arange(start, stop, dtype=np.uint64)
    if not shared:
        return rest
    index = np.zeros_like(rest)
    stride = 1
    for axis in reversed(range(len(shape))):
        rest, position = np.divmod(rest, np.uint64(max(shape[axis], 1)))
        if axis not in shared:
            index += position * np.uint64(stride)
            stride *= shape[axis]
    return index


def _keep(index: Array, p: float, seed: int, offset: int) -> Array:
    k = threshold(p)
    block, h = np.divmod(index, np.uint64(8))
    blocks, row = block, np.arange(block.size)
    if block.size and block.max() - block.min() < block.size:  # each block once: it holds the draws of 8 elements
        blocks = np.arange(block.min(), block.max() + np.uint64(1), dtype=np.uint64)
        row = (block - blocks[0]).astype(np.intp)
    high, low = (_half(_blocks(blocks, domain, seed, offset), row, h) for domain in (0, 1))
    draw = (high << np.uint64(16)) | low
    return np.asarray(draw < np.uint64(k))


def _axes(shared_axes: Any, rank: int) -> tuple[int, ...]:
    given = shared_axes if isinstance(shared_axes, tuple) else (shared_axes,)
    if any(not -rank <= axis < rank for axis in given) or len({axis % rank for axis in given}) != len(given):
        raise ValueError(f"shared_axes is {shared_axes}; expected different axes of an array of rank {rank}")
    return tuple(sorted(axis % rank for axis in given))


def _probability(p: float) -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p is {p}; expected 0 <= p <= 1")
    return float(p)


def _mask_and_scale(x: Array, keep: Array, scale: Any, out: Array | None) -> Array:
    with np.errstate(all="ignore"):
        return _norm._filled(np.where(keep, x * scale, x.dtype.type(0)), x, out)


def _masked(cache: Any, x: Array, out: Array | None) -> Array:
    keep = _keep(_draw_index(x.shape, cache.shared_axes, 0, x.size), cache.p, cache.seed, cache.offset)
    scale = factor(cache.p, x.dtype) if cache.scale == "inverted" else x.dtype.type(1)
    return _mask_and_scale(x, keep.reshape(x.shape), scale, out)


def _start(function: str, x: Array, p: float, rng: Rng, shared_axes: Any = (), scale: str = "inverted") -> DropoutCache:
    axes = _axes(shared_axes, x.ndim)
    p = _probability(p)
    if scale not in ("inverted", "classic"):
        raise ValueError(f"scale is {scale!r}; expected 'inverted' or 'classic'")
    require(rng)
    seed, offset = take(rng)
    return DropoutCache(function, seed, offset, p, x.shape, x.dtype, axes, scale)


def _of(cache: Any, function: str) -> Any:
    if cache.function != function:
        raise ValueError(f"cache comes from {cache.function}_forward; expected one from {function}_forward")
    return cache


# ---------------------------------------------------------------------------------------------------------------------
# The public functions


def dropout(
    x: Array,
    p: float = 0.5,
    *,
    rng: Rng,
    shared_axes: int | tuple[int, ...] = (),
    scale: str = "inverted",
    out: Array | None = None,
) -> Array:
    """y = keep * x / P(keep), or keep * x for classic scaling; dropped elements are +0."""
    return _masked(_start("dropout", x, p, rng, shared_axes, scale), x, out)


def dropout_forward(
    x: Array,
    p: float = 0.5,
    *,
    rng: Rng,
    shared_axes: int | tuple[int, ...] = (),
    scale: str = "inverted",
    out: Array | None = None,
) -> tuple[Array, DropoutCache]:
    """`dropout`, and what its backward needs."""
    cache = _start("dropout", x, p, rng, shared_axes, scale)
    return _masked(cache, x, out), cache


def dropout_backward(dy: Array, cache: Any, *, out: Array | None = None) -> Array:
    """dx = keep * dy / P(keep): the forward again, on dy."""
    return _masked(_of(cache, "dropout"), dy, out)


def dropout_mask(
    shape: int | Sequence[int] | Array,
    p: float = 0.5,
    *,
    rng: Rng,
    shared_axes: int | tuple[int, ...] = (),
    index_range: tuple[int, int] | None = None,
    packed: bool = False,
) -> Array:
    """True where kept; with ``index_range`` only those elements of the flattened mask; ``packed``: `numpy.packbits`."""
    extents = tuple(int(n) for n in np.atleast_1d(np.asarray(shape, dtype=np.int64)))
    axes = _axes(shared_axes, len(extents))
    start, stop = index_range if index_range is not None else (0, math.prod(extents))
    p = _probability(p)
    require(rng)
    keep = _keep(_draw_index(extents, axes, start, stop), p, *take(rng))
    if packed:
        return np.packbits(keep)
    return keep if index_range is not None else keep.reshape(extents)


def apply_dropout_mask(x: Array, keep: Array, p: float, *, out: Array | None = None) -> Array:
    """y = keep * x / P(keep) with a given mask."""
    if keep.shape != x.shape or keep.dtype != np.bool_:
        raise ValueError(f"keep is {keep.dtype} {keep.shape}; expected bool {x.shape}")
    if threshold(_probability(p)) == 0:
        keep = np.zeros_like(keep)
    return _mask_and_scale(x, keep, factor(p, x.dtype), out)


def drop_connect(weight: Array, p: float, *, rng: Rng, out: Array | None = None) -> Array:
    """`dropout` of a weight matrix."""
    return _masked(_start("drop_connect", weight, p, rng), weight, out)


def drop_connect_forward(weight: Array, p: float, *, rng: Rng, out: Array | None = None) -> tuple[Array, DropoutCache]:
    """`drop_connect`, and what its backward needs."""
    cache = _start("drop_connect", weight, p, rng)
    return _masked(cache, weight, out), cache


def drop_connect_backward(dy: Array, cache: Any, *, out: Array | None = None) -> Array:
    """dweight = keep * dy / P(keep)."""
    return _masked(_of(cache, "drop_connect"), dy, out)


def dropout_inference(x: Array, p: float, *, out: Array | None = None) -> Array:
    """y = (1 - p) x; zeros for p = 1."""
    keep = np.full(x.shape, _probability(p) < 1.0)
    return _mask_and_scale(x, keep, x.dtype.type(1.0 - p), out)


def normals(count: int, seed: int, offset: int) -> tuple[Array, Array]:
    """Variates 0 to count, and the radius of the pair that each belongs to, in longdouble.

    Pair j is made of the words w of block j in domain 2: z[2j] = r cos(t), z[2j+1] = r sin(t), r = sqrt(-2 log(1 - a)),
    t = 2 pi b; a and b are the upper 52 bits of w0 w1 and of w2 w3, as fractions of 1.
    """
    words = _blocks(np.arange((count + 1) // 2, dtype=np.uint64), 2, seed, offset).astype(np.uint64)
    fraction = (words[:, 0::2] << np.uint64(20)) | (words[:, 1::2] >> np.uint64(12))
    uniform = fraction.astype(WIDE) * WIDE(2.0**-52)
    radius = np.sqrt(-2 * np.log(1 - uniform[:, 0]))
    # Whole quarter turns are taken out first, so that the angle is small where a sine or cosine is near 0.
    quarter = np.rint(4 * uniform[:, 1])
    angle = (4 * uniform[:, 1] - quarter) * (2 * np.arctan(WIDE(1)))
    sine, cosine, turn = np.sin(angle), np.cos(angle), quarter.astype(np.int64) % 4
    x = np.choose(turn, [cosine, -sine, -cosine, sine])
    y = np.choose(turn, [sine, cosine, -sine, -cosine])
    z = np.stack([radius * x, radius * y], axis=1).reshape(-1)
    return z[:count], np.repeat(radius, 2)[:count]


def _exact_gaussian_noise(x: Array, std: float, *, rng: Rng, out: Array | None = None) -> dict[str, Exact]:
    if not 0.0 <= std < math.inf:
        raise ValueError(f"std is {std}; expected 0 <= std < inf")
    require(rng)
    z, radius = (a.reshape(x.shape) for a in normals(x.size, *take(rng)))
    wide = x.astype(WIDE)
    with np.errstate(all="ignore"):
        return {"y": Exact(wide + WIDE(std) * z, np.abs(wide) + WIDE(std) * radius, _norm._unit(x.dtype), NOISE_UNITS)}


def gaussian_noise(x: Array, std: float, *, rng: Rng, out: Array | None = None) -> Array:
    """y = x + std * z."""
    return _norm._filled(_exact_gaussian_noise(x, std, rng=rng)["y"].value, x, out)


# ---------------------------------------------------------------------------------------------------------------------
# The residual step


class DropoutAddNormCache(NamedTuple):
    """What the backward of a residual step needs."""

    function: str
    norm: Any
    dropout: DropoutCache | None
    has_residual: bool


class DropoutAddNormGrads(NamedTuple):
    """Gradients in the order of the forward's arguments; None where the argument was None."""

    dx: Array
    dresidual: Array | None
    dweight: Array | None
    dbias: Array | None


def _sum(
    x: Array, residual: Array | None, p: float, rng: Rng | None, out: Array | None = None
) -> tuple[Array, DropoutCache | None]:
    """s = residual + dropout(x) in x's dtype."""
    if rng is None and _probability(p) > 0:
        raise TypeError(f"rng is None; expected a source of draws, since p is {p}")
    dropped, cache = (x.copy(order="K"), None) if rng is None else dropout_forward(x, p, rng=rng)
    with np.errstate(all="ignore"):
        s = dropped if residual is None else residual + dropped
    return s if residual is None and out is None else _norm._filled(s, x, out), cache


def _two(out: Array | tuple[Array | None, Array | None] | None) -> tuple[Array | None, Array | None]:
    return out if isinstance(out, tuple) else (out, None)


def dropout_add_layer_norm_forward(
    x: Array,
    residual: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[tuple[Array, Array], DropoutAddNormCache]:
    """s = residual + dropout(x), y = layer_norm(s), and what the backward needs."""
    s, dropped = _sum(x, residual, p, rng, _two(out)[1])
    y, norm = _norm.layer_norm_forward(s, weight, bias, axis=axis, eps=eps, out=_two(out)[0])
    return (y, s), DropoutAddNormCache("dropout_add_layer_norm", norm, dropped, residual is not None)


def dropout_add_rms_norm_forward(
    x: Array,
    residual: Array | None = None,
    weight: Array | None = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[tuple[Array, Array], DropoutAddNormCache]:
    """s = residual + dropout(x), y = rms_norm(s), and what the backward needs."""
    s, dropped = _sum(x, residual, p, rng, _two(out)[1])
    y, norm = _norm.rms_norm_forward(s, weight, axis=axis, eps=eps, out=_two(out)[0])
    return (y, s), DropoutAddNormCache("dropout_add_rms_norm", norm, dropped, residual is not None)


def dropout_add_layer_norm(
    x: Array,
    residual: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """s = residual + dropout(x), y = layer_norm(s); returns y and s."""
    s, _ = _sum(x, residual, p, rng, _two(out)[1])
    return _norm.layer_norm(s, weight, bias, axis=axis, eps=eps, out=_two(out)[0]), s


def dropout_add_rms_norm(
    x: Array,
    residual: Array | None = None,
    weight: Array | None = None,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """s = residual + dropout(x), y = rms_norm(s); returns y and s."""
    s, _ = _sum(x, residual, p, rng, _two(out)[1])
    return _norm.rms_norm(s, weight, axis=axis, eps=eps, out=_two(out)[0]), s


def _residual_backward(
    function: str,
    dy: Array,
    cache: Any,
    ds: Array | None,
    out: Array | tuple[Array | None, Array | None] | None,
) -> DropoutAddNormGrads:
    """The norm's gradient plus ds reaches residual as it is, and x through the mask."""
    backward: Callable[..., Any] = (
        _norm.rms_norm_backward if function == "dropout_add_rms_norm" else _norm.layer_norm_backward
    )
    total, dweight, dbias = backward(dy, _of(cache, function).norm)
    if ds is not None:
        with np.errstate(all="ignore"):
            total = total + ds
    dx = total.copy(order="K") if cache.dropout is None else dropout_backward(total, cache.dropout)
    out_x, out_residual = _two(out)
    dresidual = _norm._filled(total, dy, out_residual) if cache.has_residual else None
    return DropoutAddNormGrads(_norm._filled(dx, dy, out_x), dresidual, dweight, dbias)


def dropout_add_layer_norm_backward(
    dy: Array,
    cache: Any,
    *,
    ds: Array | None = None,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> DropoutAddNormGrads:
    """dresidual = g + ds, dx = keep * (g + ds) / P(keep), g being the layer norm's input gradient."""
    return _residual_backward("dropout_add_layer_norm", dy, cache, ds, out)


def dropout_add_rms_norm_backward(
    dy: Array,
    cache: Any,
    *,
    ds: Array | None = None,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> DropoutAddNormGrads:
    """dresidual = g + ds, dx = keep * (g + ds) / P(keep), g being the RMS norm's input gradient."""
    return _residual_backward("dropout_add_rms_norm", dy, cache, ds, out)


def _exact_residual(
    norm: str, x: Array, residual: Array | None = None, *parameters: Any, p: float = 0.0, rng: Rng | None = None,
    **named: Any,
) -> dict[str, Exact]:  # fmt: skip
    """s to the last bit, and of this s what the norm's contract says of y and the statistics."""
    s, _ = _sum(x, residual, p, rng)
    exact = _norm.EXACT[norm](s, *parameters, **named)
    return {"y": exact.pop("y"), "s": Exact(s.astype(WIDE), np.zeros(s.shape, WIDE), 0.0, 0.0), **exact}


@_norm._quiet
def _exact_residual_backward(norm: str, dy: Array, cache: Any, *, ds: Array | None = None) -> dict[str, Exact | None]:
    """What the norm's contract says of its gradient, with ds as one more term, also holds behind the mask."""
    cache = _of(cache, f"dropout_add_{norm}")
    exact = _norm.EXACT[f"{norm}_backward"](dy, cache.norm)
    total, scale = exact["dx"].value, exact["dx"].scale
    # Two roundings come before the mask multiplies, which can make much of what they lose: below the smallest normal
    # number that is more than u of the value, and what overflows then stays infinite, whatever ds is.
    scale = scale + np.finfo(dy.dtype).smallest_normal.astype(WIDE)
    rounded = total.astype(dy.dtype)
    total = np.where(np.isfinite(rounded), total, rounded)
    if ds is not None:
        total, scale = total + ds, scale + np.abs(ds)
    both = exact["dx"]._replace(value=total, scale=scale)
    dx = both
    if cache.dropout is not None:
        factor = dropout_backward(np.ones_like(dy), cache.dropout)
        # Not products with 0: dropped elements are 0 where the gradient is infinite, too.
        value, scale = (np.where(factor > 0, a * factor, WIDE(0)) for a in (total, scale))
        dx = both._replace(value=value, scale=scale)
    return {**exact, "dx": dx, "dresidual": both if cache.has_residual else None}


EXACT: dict[str, Callable[..., dict[str, Any]]] = {
    "gaussian_noise": _exact_gaussian_noise,
    "dropout_add_layer_norm": partial(_exact_residual, "layer_norm"),
    "dropout_add_layer_norm_forward": partial(_exact_residual, "layer_norm"),
    "dropout_add_layer_norm_backward": partial(_exact_residual_backward, "layer_norm"),
    "dropout_add_rms_norm": partial(_exact_residual, "rms_norm"),
    "dropout_add_rms_norm_forward": partial(_exact_residual, "rms_norm"),
    "dropout_add_rms_norm_backward": partial(_exact_residual_backward, "rms_norm"),
}
