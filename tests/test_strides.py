"""Any strides of x, dy and out; results in x's memory order; nothing of out's size allocated beside it.

Refuses accuracy at extremes (test_accuracy.py): values here are ordinary, their places in memory are not.
"""

from __future__ import annotations

import itertools
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from contract import SHAPES
from operations import LAYOUTS, OPERATIONS, Call
from subprocess_python import output_of
from ulps import assert_close, expected

STEMS = list(SHAPES)
FUNCTIONS = [f"{stem}{suffix}" for stem in STEMS for suffix in ("", "_forward", "_backward")]


@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_layout_of_x_into_every_layout_of_out(function: str, x_layout: str, out_layout: str) -> None:
    for dtype, shape in ((np.float32, (3, 6, 19)), (np.float64, (2, 4, 3, 5))):
        call = OPERATIONS[function].make(fn, shape, dtype, layout=LAYOUTS[x_layout])
        out = LAYOUTS[out_layout](call.empty_out())
        result = call(out=out)
        name = "dx" if function.endswith("_backward") else "y"
        returned = result[0] if isinstance(result, tuple) else result
        assert returned is out
        assert_close({name: out}, {name: expected(function, **call.arguments)[name]})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_have_the_memory_order_of_their_input(function: str) -> None:
    shape = (3, 4, 5, 7)
    name = "dx" if function.endswith("_backward") else "y"
    for order in itertools.permutations(range(4)):

        def layout(a: np.ndarray, order: tuple[int, ...] = order) -> np.ndarray:
            if a.ndim != 4:
                return a
            return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))

        call = OPERATIONS[function].make(fn, shape, np.float32, layout=layout)
        like = call.arguments[call.main]
        result = call.run()[name]
        assert result.strides == np.empty_like(like).strides
        assert_close({name: result}, {name: expected(function, **call.arguments)[name]}, str(order))


def repeated(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """Stride 0 along an axis: the first index repeated."""
    return lambda a: np.broadcast_to(np.take(a, [0], axis), a.shape) if a.ndim > 1 else a


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_stride_zero(function: str, axis: int) -> None:
    for shape in ((5, 6, 4), (2, 6, 33)):
        call = OPERATIONS[function].make(fn, shape, np.float32, layout=repeated(axis))
        assert_close(call.run(), expected(function, **call.arguments), f"{shape}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stem", STEMS)
def test_overlapping_windows_as_x(stem: str, dtype: Any) -> None:
    """Strides in the wrong order whose elements share memory: a sliding window."""
    series = np.random.default_rng(1).normal(size=90).astype(dtype)
    x = np.lib.stride_tricks.sliding_window_view(series, 31).reshape(60, 1, 31)[::10].transpose(2, 1, 0)
    x = np.lib.stride_tricks.as_strided(x, (31, 4, 6), (x.strides[0], 2 * x.strides[0], x.strides[2]))
    call = OPERATIONS[stem].make(fn, x.shape, dtype, x=x)
    assert_close(call.run(), expected(stem, **call.arguments))


BIG = (16, 32, 64, 64)  # 8 MB of float32
WHOLE_EXAMPLES = {"axis": 1}  # long rows, so that the cache's mean and rstd are small beside x


def big_call(function: str, layout: str) -> Call:
    options = WHOLE_EXAMPLES if function.startswith(("layer", "rms")) else {}
    return OPERATIONS[function].make(fn, BIG, np.float32, layout=LAYOUTS[layout], **options)


def traced_peak(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        kept = call()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept is not None
    return peak


unverified = pytest.mark.unverified("measures memory, of which the references need more")


@unverified
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed", "sliced", "fortran", "unaligned"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_of_the_size_of_out_is_allocated(function: str, layout: str) -> None:
    call = big_call(function, layout)
    out = np.empty_like(call.arguments[call.main])
    parameters = 4 * sum(a.nbytes for name, a in call.arguments.items() if name in ("weight", "bias"))
    if function.endswith("_backward") and function.startswith(("layer", "rms")):
        parameters = 4 * call.arguments["cache"].weight.nbytes
    assert traced_peak(lambda: call(out=out)) < out.nbytes / 16 + parameters


@unverified
@pytest.mark.parametrize("function", ["batch_norm", "batch_norm_forward", "batch_norm_backward", "group_norm_forward"])
def test_channels_last_costs_one_result_and_no_copy(function: str) -> None:
    call = big_call(function, "channels_last")
    assert traced_peak(call) < call.arguments[call.main].nbytes * 1.1


RESIDENT_PEAKS = """
    import numpy as np
    import fastnorm as fn
    from operations import LAYOUTS, OPERATIONS

    def status(key):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10

    for function in OPERATIONS:
        if "norm" not in function or "dropout" in function:
            continue
        for layout in ("contiguous", "channels_last", "sliced", "fortran"):
            options = {"axis": 1} if function.startswith(("layer", "rms")) else {}
            call = OPERATIONS[function].make(fn, (16, 32, 64, 64), np.float32, layout=LAYOUTS[layout], **options)
            out = call.empty_out()
            call(out=out)  # thread stacks and buffers that stay
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
            before = status("VmRSS")
            call(out=out)
            print(function, layout, status("VmHWM") - before, out.nbytes)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's peak memory"
)
def test_the_kernels_take_no_buffer_of_the_size_of_out_either() -> None:
    """Buffers of the compiled code, which Python's own account does not see."""
    # Buffers of 1 MB and more straight from the system and back, so that none is reused unseen.
    lines = output_of(RESIDENT_PEAKS, MALLOC_MMAP_THRESHOLD_="1000000").splitlines()
    assert len(lines) == 4 * len(FUNCTIONS)
    for line in lines:
        function, layout, peak, size = line.split()
        # The parameter gradients of layer and RMS norm have an eighth of the size of x here, in several partial sums.
        part = 1 if function in ("layer_norm_backward", "rms_norm_backward") else 8
        assert int(peak) < int(size) / part, f"{function} {layout}: {peak} bytes beside out's {size}"


PAGE_FAULTS = """
    import resource
    import numpy as np
    import fastnorm as fn
    from operations import LAYOUTS, OPERATIONS

    def faults_of(call, **changes):
        counts = []
        for _ in range(6):  # the least: threads that join later touch their stacks later
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            call(**changes)
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return min(counts)

    for function in OPERATIONS:
        if "norm" not in function or "dropout" in function:
            continue
        for dtype, layout in (("f4", "contiguous"), ("f8", "contiguous"), ("f4", "channels_last"), ("f4", "sliced")):
            options = {"axis": 2} if function.startswith(("layer", "rms")) else {}
            call = OPERATIONS[function].make(fn, (8, 32, 64, 64), np.dtype(dtype), layout=LAYOUTS[layout], **options)
            out = call.empty_out()
            for threads in (1, 2):
                with fn.num_threads(threads):
                    print(function, dtype, layout, threads, faults_of(call, out=out), faults_of(call))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_a_reused_out_causes_no_page_fault() -> None:
    """New memory of out's size, 4 or 8 MB, costs at least a fault for each huge page of 2 MB, as a new result shows."""
    # Blocks of 3 MB and more straight from the system and back; smaller ones (partial sums of the parameters' gradients
    # in float64 take an eighth of out) are kept for the next call.
    lines = output_of(
        PAGE_FAULTS, MALLOC_MMAP_THRESHOLD_="3000000", MALLOC_TRIM_THRESHOLD_=str(1 << 30), timeout=120
    ).splitlines()
    assert len(lines) == 8 * len(FUNCTIONS)
    for line in lines:
        *_, reused, fresh = line.split()
        assert int(reused) == 0 < int(fresh), f"{line}: page faults of a call with out and of one without"


@pytest.mark.unverified("compares the kernels with themselves")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stem", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"])
def test_large_results_are_the_same_past_the_cache(stem: str, layout: str) -> None:
    """Results of odd sizes at odd places, larger than what many machines' caches hold, against fresh arrays."""
    rng = np.random.default_rng(3)
    for dtype, shape in ((np.float32, (41, 67, 1031)), (np.float64, (23, 70, 1029))):
        x, dy = (LAYOUTS[layout](rng.standard_normal(shape).astype(dtype)) for _ in range(2))
        arguments = (1,) if stem == "group_norm" else ()
        forward, backward = getattr(fn, f"{stem}_forward"), getattr(fn, f"{stem}_backward")
        y, cache = forward(x, *arguments)
        dx = backward(dy, cache).dx
        for offset in (0, 4, 5):
            room = np.empty(x.size + 16, dtype)
            place = room[offset : offset + x.size]
            axes = np.argsort([-stride for stride in x.strides], kind="stable")
            out = place.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
            room[:offset] = room[offset + x.size :] = 7
            assert forward(x, *arguments, out=out)[0].tobytes() == y.tobytes()
            assert backward(dy, cache, out=out).dx.tobytes() == dx.tobytes()
            assert np.all(room[:offset] == 7)
            assert np.all(room[offset + x.size :] == 7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_calls_in_turn_do_not_see_each_other(dtype: type) -> None:
    """What a thread keeps from call to call never changes a result: each is that of a thread's first call."""
    rng = np.random.default_rng(5)
    size = np.dtype(dtype).itemsize

    def moved(a: np.ndarray, by: int) -> np.ndarray:
        """The same values `by` bytes from where an array begins."""
        memory = np.zeros(a.nbytes + 64, np.uint8)
        found = np.ndarray(a.shape, a.dtype, memory[by:])
        found[...] = a
        return found

    def forward(function: str, x: np.ndarray, axis: int) -> tuple[np.ndarray, Any]:
        weight = np.linspace(0.5, 2, int(np.prod(x.shape[axis:])), dtype=dtype).reshape(x.shape[axis:])
        if function == "group_norm":
            return fn.group_norm_forward(x, 2, channel_axis=axis)
        if function == "batch_norm":
            return fn.batch_norm_forward(x, channel_axis=axis)
        return getattr(fn, function + "_forward")(x, weight, axis=axis)

    for shape in [(4, 6, 8), (8, 6, 4)]:
        x, dy = rng.standard_normal((2, *shape)).astype(dtype)
        dys = itertools.cycle([dy, np.asfortranarray(dy), dy[::-1]])
        calls: list[Callable[[], Any]] = []
        for place in (x, moved(x, size), moved(x, 1), np.asfortranarray(x), x[:, ::-1]):
            for function, axis in [("layer", 1), ("layer", 2), ("rms", 1), ("batch", 1), ("batch", 0), ("group", 1)]:
                _, cache = forward(function + "_norm", place, axis)
                calls.append(partial(forward, function + "_norm", place, axis))
                calls.append(partial(getattr(fn, function + "_norm_backward"), next(dys), cache))
        expected = []
        for call in calls:
            with ThreadPoolExecutor(1) as pool:
                expected.append(pool.submit(call).result())
        for before, after in itertools.permutations(range(len(calls)), 2):
            calls[before]()
            for got, alone in zip(calls[after](), expected[after], strict=True):
                if isinstance(alone, np.ndarray):
                    np.testing.assert_array_equal(got, alone)
                elif alone is not None:
                    np.testing.assert_array_equal(got.rstd, alone.rstd)
