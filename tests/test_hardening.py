"""What once crashed, hung or went wrong without a word: each test is a call that did."""

from __future__ import annotations

import copy
import pickle
import sys
import weakref
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from subprocess_python import output_of, run_python

RNG = np.random.default_rng(11)


def test_a_program_that_ends_while_a_thread_is_in_a_kernel() -> None:
    code = """
    import threading, time
    import numpy as np, fastnorm as fn
    x = np.ones((64, 1 << 18), np.float32)
    def work():
        out = np.empty_like(x)
        while True:
            fn.layer_norm(x, out=out)
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    """
    for _ in range(3):
        done = run_python(code)
        assert done.returncode == 0, done.stderr


def test_a_shared_stream_in_a_forked_child() -> None:
    code = """
    import os, threading
    import numpy as np, fastnorm as fn
    rng, stop = fn.Philox(1), threading.Event()
    fn.dropout([1.0, 2.0], 0.5, rng=rng)  # NumPy imports a part of itself here, which no fork may interrupt

    def draw():
        while not stop.is_set():
            fn.dropout(np.ones(8), 0.5, rng=rng)
            fn.dropout([1.0, 2.0], 0.5, rng=rng)  # by the Python layer

    thread = threading.Thread(target=draw)
    thread.start()
    statuses = set()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            offset = rng.offset
            fn.dropout(np.ones(8), 0.5, rng=rng)
            fn.dropout([1.0, 2.0], 0.5, rng=rng)
            os._exit(rng.offset != offset + 2)
        statuses.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    thread.join()
    print(sorted(statuses))
    """
    assert output_of(code, timeout=30) == "[0]"


def test_a_cache_is_made_by_a_forward_only() -> None:
    kind = fn.NormCache
    with pytest.raises(TypeError):
        kind()
    with pytest.raises(TypeError):
        kind.__new__(kind)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cache_whose_arrays_were_changed_is_refused() -> None:
    x = RNG.random((2, 4, 3))
    _, cache = fn.group_norm_forward(x, 2, np.ones(4), np.ones(4))
    dy = x.copy()
    x.shape = (2, 4, 3, *(1,) * 29)
    with pytest.raises(ValueError, match="shape"):
        fn.group_norm_backward(dy.reshape(x.shape), cache)

    x = RNG.random((2, 3, 4))
    _, cache = fn.batch_norm_forward(x)
    x.shape = (4, 3, 2)  # as many sets, as many values in each: others
    with pytest.raises(ValueError, match="shape"):
        fn.batch_norm_backward(x.copy(), cache)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_statistics_of_a_cache_cannot_be_changed() -> None:
    x = RNG.random((100_000, 4))
    _, cache = fn.layer_norm_forward(x)
    dy = RNG.random(x.shape)
    expected = fn.layer_norm_backward(dy, cache).dx
    for statistic in (cache.mean, cache.rstd):
        assert statistic is not None
        assert not isinstance(statistic.base, np.ndarray)
        with pytest.raises(ValueError, match="read-only"):
            statistic[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            statistic.flags.writeable = True
        with pytest.raises(ValueError, match="own"):
            statistic.resize((1,), refcheck=False)
        statistic.shape = (100, 1000)  # of this view alone
    np.testing.assert_array_equal(fn.layer_norm_backward(dy, cache).dx, expected)


def test_statistics_outlive_their_cache_and_keep_nothing_else() -> None:
    x = RNG.random((5, 4))
    references = sys.getrefcount(x)
    _, cache = fn.batch_norm_forward(x)
    mean, rstd, var = cache.mean, cache.rstd, cache.batch_var
    assert cache.mean is mean
    assert cache.rstd is rstd
    assert cache.batch_var is var
    assert mean is not None
    assert var is not None
    expected = mean.copy(), rstd.copy(), var.copy()
    alive = weakref.ref(cache)
    assert sys.getrefcount(x) == references + 1
    del cache
    assert alive() is None
    assert sys.getrefcount(x) == references
    for statistic, value in zip((mean, rstd, var), expected, strict=True):
        assert statistic.flags.aligned
        assert statistic.flags.c_contiguous
        assert not statistic.flags.writeable
        np.testing.assert_array_equal(statistic, value)


CACHED = [
    (name, make)
    for name, make in (
        ("layer_norm", lambda x, w: fn.layer_norm_forward(x, w, axis=1)),
        ("rms_norm", lambda x, w: fn.rms_norm_forward(x)),
        ("group_norm", lambda x, w: fn.group_norm_forward(x, 2, np.arange(1.0, 5.0, dtype=x.dtype), channel_axis=2)),
        ("instance_norm", lambda x, w: fn.instance_norm_forward(x)),
        ("batch_norm", lambda x, w: fn.batch_norm_forward(x)),
        (
            "batch_norm",
            lambda x, w: fn.batch_norm_forward(
                x, running_mean=np.zeros(3), running_var=np.full(3, 0.7), training=False
            ),
        ),
    )
]


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "make"), CACHED)
def test_a_cache_can_be_copied_and_pickled(name: str, make: Any, dtype: Any, clone: Any) -> None:
    x = (1e6 + RNG.random((6, 3, 4))).astype(dtype)
    _, cache = make(x, RNG.random((3, 4)).astype(dtype))
    twin = clone(cache)
    for attribute in ("x", "weight", "bias", "mean", "rstd", "batch_var"):
        before, after = getattr(cache, attribute), getattr(twin, attribute)
        assert (before is None) == (after is None)
        if before is not None:
            np.testing.assert_array_equal(after, before, strict=True)
    for attribute in ("function", "axis", "channel_axis", "num_groups", "eps", "count", "training", "intact"):
        assert getattr(twin, attribute) == getattr(cache, attribute)
    dy = RNG.random(x.shape).astype(dtype)
    backward = getattr(fn, f"{name}_backward")
    for got, expected in zip(backward(dy, twin), backward(dy, cache), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_pickle_that_does_not_fit_itself_is_refused() -> None:
    x = RNG.random((6, 3, 4))
    restore, parts = fn.group_norm_forward(x, 3, np.ones(3))[1].__reduce__()
    names = ("function", "axis", "num_groups", "eps", "training", "x", "weight", "bias", "sets", "statistics")
    good = dict(zip(names, parts, strict=True))
    assert restore(*good.values()).intact
    bad: dict[str, list[Any]] = {
        "function": ["nothing", "layer_norm"],
        "axis": [3, -4],
        "num_groups": [2, 0, -1],
        "eps": [-1.0, np.nan],
        "x": [None, x[:5], x.astype(np.float32), x.astype(int)],
        "weight": [np.ones(4), np.ones(3, np.float32)],
        "bias": [np.ones((3, 1))],
        "sets": [17],
        "statistics": [good["statistics"][:-8], b""],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match="do not fit"):
                restore(*(good | {name: value}).values())
    with pytest.raises(TypeError):
        restore(*(good | {"statistics": np.ones(54)}).values())


def test_an_empty_out() -> None:
    empty = np.empty((0, 4))
    for out in (np.empty((0, 4)), empty):
        assert fn.layer_norm(empty, out=out) is out
    out = np.empty((0, 4))
    assert fn.batch_norm_forward(empty, out=out)[0] is out


@pytest.mark.parametrize(
    ("value", "eps"), [(1e160, 1e-300), (1e155, 1e-310), (1.7e308, 1e-5), (1e6, 1e-300), (1e308, 0)]
)
def test_a_constant_set_under_any_eps(value: float, eps: float) -> None:
    rstd = 1 / np.sqrt(eps) if eps else 0.0
    for x, function in ((np.full((2, 5), value), "layer_norm"), (np.full((5, 2), value), "batch_norm")):
        y, cache = getattr(fn, f"{function}_forward")(x, eps=eps)
        np.testing.assert_array_equal(y, np.zeros_like(x))
        np.testing.assert_array_equal(cache.mean, value)
        np.testing.assert_allclose(cache.rstd, rstd, rtol=4e-16)


def test_group_norm_without_channels() -> None:
    for num_groups in (1, 2**62):
        with pytest.raises(ValueError, match=r"num_groups|shape"):
            fn.group_norm(np.empty((2, 0, 3)), num_groups)
    with pytest.raises(ValueError, match="31"):
        fn.group_norm(np.ones((2, 4) + (1,) * 30), 2)


def test_evaluation_of_nothing() -> None:
    empty = np.empty((2, 3, 0))
    y, _ = fn.batch_norm_forward(empty, running_mean=np.zeros(3), running_var=np.ones(3), training=False)
    assert y.shape == empty.shape


def test_sums_beyond_float64() -> None:
    y = fn.batch_norm(np.array([[1e300]]), np.zeros(1), np.array([1.7e308]), eps=1.7e308)
    np.testing.assert_allclose(y, 1e300 / (np.sqrt(1.7e308) * np.sqrt(2)))
    merged = fn.Moments.merge(fn.moments(np.full(2, 1.7e308)), fn.moments(np.full(2, -1.7e308)))
    assert (merged.mean, merged.m2) == (0.0, np.inf)
    nothing = fn.moments(np.empty((0, 0)), axis=0)
    assert fn.Moments.merge(nothing, nothing).count == 0


def test_a_weight_of_zero_leaves_no_trace_of_an_infinite_value() -> None:
    x = np.array([[1.0, np.inf], [2.0, 3.0]])
    running = np.array([5.0, 6.0])
    fn.batch_norm_forward(x, running_mean=running, momentum=0.0)
    np.testing.assert_array_equal(running, [5.0, 6.0])
    running[:] = np.nan
    fn.batch_norm_forward(x, running_mean=running, momentum=1.0)
    np.testing.assert_array_equal(running, [1.5, np.nan])


@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 33000), 2), ((3, 2, 65536), 1), ((1, 4, 16000), 1)])
def test_a_group_larger_than_a_batch_is_measured_whole(shape: tuple[int, ...], groups: int) -> None:
    """Sets of several segments around the sizes where they stop being measured in one go."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[:, 1] += 5
    exact = np.asarray(fn.reference.group_norm(x, groups))
    for threads in (1, 2):
        with fn.num_threads(threads):
            assert np.abs(fn.group_norm(x, groups) - exact).max() < 1e-5


@pytest.mark.parametrize("layout", ["channels first", "columns"])
def test_gradients_where_one_value_makes_up_the_variance(layout: str) -> None:
    """dweight is a difference of large sums there, which plain sums would lose."""
    n, columns = 1 << 20, 2 if layout == "columns" else 1
    for value in (60.37, 77.77, 91.7):
        single, gradient = np.full(n, value, np.float32), np.full(n, 0.7, np.float32)
        single[n // 3] += np.float32(value / 2**15.8 * 2**10)  # mean / std = 2^15.8
        gradient[n // 3] += np.float32(0.9)
        x, dy = (np.stack([a, a], axis=1) if columns > 1 else a.reshape(1, 1, n) for a in (single, gradient))
        weight = np.ones(columns, np.float32)
        _, cache = fn.batch_norm_forward(x, weight, eps=0.0)
        got = fn.batch_norm_backward(dy, cache).dweight
        wide = single.astype(np.longdouble)
        xhat = (wide - wide.mean()) / wide.std()
        error = np.abs(got - np.sum(gradient * xhat)).max() / (2.0**-24 * np.sum(np.abs(gradient * xhat)))
        print(f"{layout}, {value}: dweight {float(error):.2f} u, allowed 8 u")
        assert error <= 8


def test_an_infinite_gradient_gives_the_same_bits_at_every_thread_count() -> None:
    x, dy = np.random.default_rng(1).standard_normal((2, 1, 8, 40000)).astype(np.float32)
    dy[0, 2, 77] = np.inf
    weight = np.ones(8, np.float32)
    _, cache = fn.group_norm_forward(x, 2, weight, weight)
    results = []
    for threads in (1, 2, 4):
        with fn.num_threads(threads):
            results.append(fn.group_norm_backward(dy, cache))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert one.tobytes() == other.tobytes()
    assert np.isinf(results[0].dbias[2])


@pytest.mark.parametrize("strange", [0.0, np.nan, 1e30])
def test_a_weight_changes_no_other_group(strange: float) -> None:
    x, dy = np.random.default_rng(2).standard_normal((2, 6, 64)).astype(np.float32)
    results = []
    for first in (1.0, strange):
        weight = np.linspace(0.5, 1.5, 64).astype(np.float32)
        weight[0] = first
        _, cache = fn.group_norm_forward(x, 2, weight)
        results.append(fn.group_norm_backward(dy, cache).dx[:, 32:])
    assert results[0].tobytes() == results[1].tobytes()


def test_a_dtype_that_dlpack_cannot_carry_is_named() -> None:
    """NumPy's own error does not say which it was."""

    class Tensor:
        dtype = "other.bfloat16"

        def float(self) -> None: ...

        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("Unsupported dtype in DLTensor.")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    with pytest.raises(TypeError, match=r"Tensor .*\(x has dtype other\.bfloat16\); expected .* x\.float\(\)"):
        fn.layer_norm(Tensor())
    with pytest.raises(TypeError, match=r"keep .*bfloat16\)$"):  # nor any number that were better
        fn.apply_dropout_mask(np.ones(3), Tensor(), 0.5)
