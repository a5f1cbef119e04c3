"""What once crashed, hung or went wrong without a word: each test is a call that did."""

from __future__ import annotations

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
    import os, sys, threading
    import numpy as np, fastnorm as fn
    from fastnorm import _philox
    rng = fn.Philox(1)
    _philox._lock.acquire()  # as if another thread were between its two lines
    child = os.fork()
    if child == 0:
        fn.dropout(np.ones(8), 0.5, rng=rng)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert output_of(code, timeout=30) == "0"


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

    x = RNG.random((100_000, 4))
    _, cache = fn.layer_norm_forward(x)
    assert cache.mean is not None
    cache.mean.resize((1,), refcheck=False)
    with pytest.raises(ValueError, match="shape"):
        fn.layer_norm_backward(x.copy(), cache)


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
