"""Regularisers: each formula against plain NumPy or numeric gradients, early stopping's bookkeeping, bad input."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastnorm import regularization
from fastnorm.regularization import (
    EarlyStopping,
    fgsm_perturbation,
    l1_penalty,
    l2_penalty,
    label_smoothing,
    weight_decay_,
)

DTYPES = [np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_penalties_have_their_value_and_gradient(shape: tuple[int, ...], dtype: Any) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(dtype)
    rtol = 4 * np.finfo(dtype).eps
    for penalty, formula in (
        (l1_penalty, lambda w: 0.3 * np.abs(w).sum()),
        (l2_penalty, lambda w: 0.15 * np.square(w).sum()),
    ):
        exact = weight.astype(np.float64)
        value, gradient = penalty(weight, 0.3)
        assert type(value) is float
        assert value == pytest.approx(formula(exact), rel=1e-14)
        numeric = np.empty(shape)
        for place in np.ndindex(*shape):
            step = np.zeros(shape)
            step[place] = 1e-6
            numeric[place] = (formula(exact + step) - formula(exact - step)) / 2e-6
        assert isinstance(gradient, np.ndarray)
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, numeric, rtol=max(1e-7, rtol), atol=1e-9)


def test_l1_gradient_is_zero_at_zero_and_finite_values_do_not_overflow() -> None:
    assert l1_penalty(np.array([0.0, -0.0, 2, -3]), 0.5)[1].tolist() == [0, 0, 0.5, -0.5]
    assert l2_penalty(np.full(4, 1e30, np.float32), 1.0)[0] == pytest.approx(2e60, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_decay_is_in_place_and_equals_an_l2_step(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    memory = rng.normal(size=(6, 10)).astype(dtype)
    weight, start = memory[:, ::2], memory.copy()
    stepped = weight - dtype(0.1) * l2_penalty(weight, 0.05)[1]
    assert weight_decay_(weight, 0.05, 0.1) is weight
    np.testing.assert_allclose(weight, stepped, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(memory[:, 1::2], start[:, 1::2])
    assert weight_decay_(np.ones(3, dtype), 2.0, 0.5).tolist() == [0, 0, 0]
    assert weight_decay_(np.ones(3, dtype), 0.0, 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_smoothing_is_the_notes_form(dtype: Any) -> None:
    labels = np.array([[0, 3], [2, 2], [1, 0]], np.uint8)
    targets = label_smoothing(labels, 4, 0.3, dtype=dtype)
    assert targets.dtype == dtype
    assert targets.shape == (3, 2, 4)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, rtol=4 * np.finfo(dtype).eps)
    expected = np.where(np.arange(4) == labels[..., None], 0.7, 0.1)
    np.testing.assert_allclose(targets, expected, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(label_smoothing([1, 0], 2, 0.0), np.array([[0, 1], [1, 0]], np.float32))
    assert label_smoothing(1, 3, 1.0).tolist() == [0.5, 0, 0.5]
    assert label_smoothing(np.empty(0, int), 3).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fgsm_steps_along_the_sign(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    x, dx = rng.normal(size=(5, 7)).astype(dtype), rng.normal(size=(5, 7)).astype(dtype)
    dx[0, 0] = 0
    before = x.copy()
    y = fgsm_perturbation(x, dx, 0.25)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x + np.sign(dx) * dtype(0.25))
    np.testing.assert_array_equal(x, before)
    assert y[0, 0] == x[0, 0]


def test_fgsm_raises_a_linear_loss_as_much_as_any_change_of_that_size_can() -> None:
    rng = np.random.default_rng(3)
    x, dx = rng.normal(size=50), rng.normal(size=50)
    gain = dx @ (fgsm_perturbation(x, dx, 0.1) - x)
    assert gain == pytest.approx(0.1 * np.abs(dx).sum())
    assert gain > max(dx @ change for change in rng.uniform(-0.1, 0.1, (1000, 50)))


def test_early_stopping_waits_for_its_patience() -> None:
    stopping = EarlyStopping(patience=3)
    losses = [5, 4, 4.5, 4.4, 3, 3, 3.1, 2.999, 7, 8, 9, 1]
    decisions = [stopping.update(loss) for loss in losses]
    assert decisions == [False] * 10 + [True, False]
    assert (stopping.best_loss, stopping.best_observation, stopping.observations) == (1, 11, 12)
    assert not stopping.should_stop


def test_early_stopping_counts_only_falls_beyond_min_delta() -> None:
    stopping = EarlyStopping(2, 0.5)
    assert [stopping.update(loss) for loss in (3.0, 2.6, 2.5, 2.4)] == [False, False, True, False]
    assert (stopping.best_loss, stopping.waited) == (2.4, 0)


def test_early_stopping_keeps_a_copy_of_the_best_state() -> None:
    weights = {"w": np.zeros(3)}
    stopping = EarlyStopping(patience=5)
    for loss in (3.0, 1.0, 2.0):
        weights["w"] += 1
        stopping.update(np.float32(loss), weights)
    weights["w"][...] = -1
    assert stopping.best_state["w"].tolist() == [2, 2, 2]
    assert repr(stopping) == "EarlyStopping(patience=5, min_delta=0)"


def test_early_stopping_takes_nan_for_no_improvement() -> None:
    stopping = EarlyStopping(patience=2)
    assert [stopping.update(loss) for loss in (float("nan"), float("inf"), 2.0, float("nan"))] == [False] * 4
    assert stopping.best_loss == 2
    assert stopping.update(float("nan"))
    never = EarlyStopping(patience=1)
    assert never.update(float("nan"))
    with pytest.raises(ValueError, match="all 1 observations were NaN"):
        _ = never.best_state


@pytest.mark.parametrize("name", ["best_loss", "best_observation", "best_state"])
def test_early_stopping_without_an_observation_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not known, since there was no observation"):
        getattr(EarlyStopping(3), name)


def read_only() -> np.ndarray:
    weight = np.ones(3)
    weight.flags.writeable = False
    return weight


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: l1_penalty(np.ones(3, int), 1), TypeError, "weight has dtype int64"),
        (lambda: l1_penalty(np.ones(3), -1), ValueError, "strength is -1"),
        (lambda: l1_penalty(np.ones(3), np.nan), ValueError, "strength is nan"),
        (lambda: l2_penalty(np.ones(3), np.inf), ValueError, "strength is inf"),
        (lambda: l2_penalty(np.ones(3), "1"), TypeError, "strength is '1'"),
        (lambda: weight_decay_([1.0], 0.1, 0.1), TypeError, "weight is a list"),
        (lambda: weight_decay_(read_only(), 0.1, 0.1), ValueError, "weight is read-only"),
        (lambda: weight_decay_(np.ones(3), 3, 0.5), ValueError, "expected at most 1"),
        (lambda: weight_decay_(np.ones(3), 0.1, -0.5), ValueError, "learning_rate is -0.5"),
        (lambda: label_smoothing([0.0, 1.0], 2), TypeError, "labels has dtype float64; expected integers"),
        (lambda: label_smoothing([0, 4], 4), ValueError, "labels holds 4; expected 0 <= label < 4"),
        (lambda: label_smoothing([-1, 0], 4), ValueError, "labels holds -1"),
        (lambda: label_smoothing([0], 1), ValueError, "num_classes is 1"),
        (lambda: label_smoothing([0], 2.0), TypeError, "num_classes is 2.0"),
        (lambda: label_smoothing([0], 2, 1.1), ValueError, "eps is 1.1"),
        (lambda: label_smoothing([0], 2, dtype=np.float16), TypeError, "dtype is"),
        (lambda: label_smoothing([0], 2, dtype="single float"), TypeError, "dtype is 'single float'; expected"),
        (lambda: fgsm_perturbation(np.ones(3), np.ones(4), 0.1), ValueError, "dx has shape (4,); expected (3,)"),
        (lambda: fgsm_perturbation(np.ones(3), np.ones(3, np.float32), 0.1), TypeError, "dx has dtype float32"),
        (lambda: fgsm_perturbation(np.ones(3), np.ones(3), -0.1), ValueError, "eps is -0.1"),
        (lambda: EarlyStopping(0), ValueError, "patience is 0"),
        (lambda: EarlyStopping(1.5), TypeError, "patience is 1.5"),
        (lambda: EarlyStopping(3, -1), ValueError, "min_delta is -1"),
        (lambda: EarlyStopping(3).update(None), TypeError, "loss is None"),
        (lambda: EarlyStopping(3).update(np.ones(2)), TypeError, "loss is array"),
    ],
)
def test_what_is_refused_is_named(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_the_example_in_the_docstring_holds() -> None:
    result = doctest.testmod(regularization)
    assert result.attempted > 0
    assert result.failed == 0
