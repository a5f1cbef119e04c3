"""How random the masks and the noise are: the numbers behind the tests, each with what a perfect generator would give.

Prints z scores (normal with standard deviation 1 for a fair generator, so that beyond 4.9 is one in a million) and
returns 1 if any of them is beyond. Refuses other generators: what is shown is fastnorm's. Run it as

    python examples/dropout_statistics.py --seed 1 --elements 4000000
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

import numpy as np

import fastnorm as fn

LIMIT = 4.9
Row = tuple[str, float, str]


def keep_rates(n: int, seed: int) -> Iterator[Row]:
    for p in (1e-6, 0.001, 0.1, 0.5, 0.9, 1 - 1e-6):
        q = round((1 - p) * 2**32) / 2**32
        kept = np.count_nonzero(fn.dropout_mask(n, p, rng=seed))
        error = max(abs(kept - n * q) - 1, 0.0) * math.copysign(1, kept - n * q)  # - 1: for 1e-6 it is Poisson's
        yield f"keep rate, p = {p:g}", error / math.sqrt(n * q * (1 - q)), f"{kept / n:.8f} of {q:.8f}"


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((2 * np.count_nonzero(a == b) - a.size) / math.sqrt(a.size))


def chi_squared_z(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    ratio = float(np.sum((counts - expected) ** 2) / expected) / degrees
    return (ratio ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def correlations(n: int, seed: int) -> Iterator[Row]:
    keep = fn.dropout_mask(n, 0.5, rng=seed)
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 256, 1024):
        yield f"elements {lag} apart", agreement(keep[:-lag], keep[lag:]), ""
    for name, other in (
        ("next seed", fn.Philox(seed + 1)),
        ("seed + 2^32", fn.Philox(seed + 2**32)),
        ("next offset", fn.Philox(seed, 1)),
        ("offset + 2^32", fn.Philox(seed, 2**32)),
    ):
        yield f"same element, {name}", agreement(keep, fn.dropout_mask(n, 0.5, rng=other)), ""
    pairs = np.bincount(2 * keep[:-1:2] + keep[1::2], minlength=4)
    yield "pairs of neighbours", chi_squared_z(pairs), f"{pairs.tolist()}"
    octets = np.bincount(np.packbits(keep[: n // 8 * 8]), minlength=256)
    yield "the 256 patterns of eight", chi_squared_z(octets), f"{octets.min()} to {octets.max()}"
    p = 0.01
    drop = ~fn.dropout_mask(n, p, rng=seed)
    for lag in (1, 8):
        both = np.count_nonzero(drop[:-lag] & drop[lag:])
        yield f"both dropped, {lag} apart, p = 0.01", (both - n * p * p) / math.sqrt(n * p * p), f"{both}"


def normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * np.array([math.erfc(-v / math.sqrt(2)) for v in z.tolist()])


def noise(n: int, seed: int) -> Iterator[Row]:
    z = fn.gaussian_noise(np.zeros(n), 1.0, rng=seed)
    for k, exact, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        mean = float(np.mean(z**k))
        yield f"noise, mean of z^{k}", (mean - exact) / math.sqrt(variance / n), f"{mean:.5f} of {exact}"
    for edge in (1, 2, 3, 4):
        tail = math.erfc(edge / math.sqrt(2))
        beyond = np.count_nonzero(np.abs(z) > edge)
        yield f"noise, |z| > {edge}", (beyond - n * tail) / math.sqrt(n * tail * (1 - tail)), f"{beyond / n:.6f}"
    for lag in (1, 2, 64, 128):
        yield f"noise, product of z {lag} apart", float(np.mean(z[:-lag] * z[lag:])) * math.sqrt(n), ""
    some = np.sort(z[:200_000])
    cdf, steps = normal_cdf(some), np.arange(some.size + 1) / some.size
    distance = float(max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1])))
    tail = min(2 * math.exp(-2 * some.size * distance**2), 1.0)  # Kolmogorov's distribution, its first term
    z_score = math.sqrt(max(-2 * math.log(tail), 0.0)) if tail < 1 else 0.0
    yield (
        "noise, Kolmogorov-Smirnov",
        z_score,
        f"distance {distance:.6f}, {math.sqrt(some.size) * distance:.3f} / sqrt n",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--elements", type=int, default=4_000_000)
    options = parser.parse_args()
    worst = 0.0
    for part in (keep_rates, correlations, noise):
        for name, z, detail in part(options.elements, options.seed):
            worst = max(worst, abs(z))
            print(f"{name:36s} z = {z:6.2f}  {detail}".rstrip())
    print(f"worst |z| = {worst:.2f}, limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
