"""Gradients of channels-first norms where float32 sums would overflow, underflow or lose the mean, set by set.

Float32 segments are summed in float32 trees, several segments folded together; a sum that does not vouch for itself is
taken again in double. Each kind below breaks one thing that the trees rely on, in some channels of a batch of good
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from ulps import assert_close, expected

NORMS = {
    "instance_norm": {},
    "group_norm": {"num_groups": 4},
    "batch_norm": {},
}
Change = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def _kinds() -> dict[str, Change]:
    def offset(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        x[:, 1] += 1e6

    def two_valued(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        x[:, 2] = np.where(x[:, 2] > 1, np.float32(1e7), np.float32(1e7 + 1))

    def outlier(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        x[:, 3, 0], dy[:, 3, 0] = 1e18, 1e-9

    def constant(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        x[:, 4:8] = 0.1

    def cancelling(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        half = x.shape[2] // 2
        x[:, 5, half : 2 * half], dy[:, 5, half : 2 * half] = x[:, 5, :half], -dy[:, 5, :half]

    def huge_x(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        x[:, 6] *= 1e37

    def tiny_x(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        x[:, 6] *= 1e-30

    def huge_dy(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        dy[:, 7] = np.where(dy[:, 7] > 0, 3e38, -3e38)

    def tiny_dy(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        dy[:, 8:12] *= 1e-33

    def tiny_product(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        x[:, 9] *= 1e-9
        dy[:, 9] *= 1e-31

    def no_dy(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        dy[:, 10] = 0

    def weights(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        weight[:12] = [0, 1, 1e-30, 1, 0, 0, 0, 0, 1e-42, 1e-41, 0, 1e-40]

    def large_weights(x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> None:
        weight[3:6] = [3e38, 1e20, 1]

    return {name: change for name, change in locals().items() if callable(change)}


KINDS = _kinds()


def _call(norm: str, kind: str, n: int) -> tuple[np.ndarray, Any]:
    rng = np.random.default_rng(n)
    x, dy = (rng.normal(size=(5, 16, n)).astype(np.float32) + np.float32(shift) for shift in (1.5, 0))
    weight = rng.normal(size=16).astype(np.float32)
    KINDS[kind](x, dy, weight)
    eps = 1e-45 if kind == "tiny_x" else 1e-5
    return dy, getattr(fn, f"{norm}_forward")(x, weight=weight, bias=weight, eps=eps, **NORMS[norm])[1]


@pytest.mark.parametrize("n", [3, 16, 49, 196, 221])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_within_the_contract(norm: str, kind: str, n: int) -> None:
    dy, cache = _call(norm, kind, n)
    got = getattr(fn, f"{norm}_backward")(dy, cache)
    assert_close(got._asdict(), expected(f"{norm}_backward", dy=dy, cache=cache), f"{norm} {kind} {n}")


def test_a_constant_set_gives_the_weight_nothing() -> None:
    for norm in NORMS:
        dy, cache = _call(norm, "constant", 49)
        assert np.all(getattr(fn, f"{norm}_backward")(dy, cache).dweight[4:8] == 0)


@pytest.mark.parametrize("n", [3, 49, 196])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(kind: str, n: int) -> None:
    for norm in ("instance_norm", "group_norm"):
        dy, cache = _call(norm, kind, n)
        backward, forward = getattr(fn, f"{norm}_backward"), getattr(fn, f"{norm}_forward")
        together = backward(dy, cache).dx
        for i in range(len(dy)):
            _, alone = forward(cache.x[i : i + 1], weight=cache.weight, bias=cache.weight, eps=cache.eps, **NORMS[norm])
            np.testing.assert_array_equal(backward(dy[i : i + 1], alone).dx, together[i : i + 1])
