"""Threads: how many, how chosen, and that no result depends on it.

Bits are compared, not values: the contract is that the work is cut by shape alone. No test here measures time.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastnorm as fn
from operations import LAYOUTS, OPERATIONS, Call
from subprocess_python import output_of, run_python

# Large enough that every count below 8 is really used; odd, so that no cut is even.
SHAPES = [(7, 36, 1031), (2051, 130), (3, 10, 97, 89)]


def digest(call: Call) -> dict[str, str]:
    """The bits of every array of a call, in C order, NaN and the sign of zero included."""
    return {
        name: f"{a.dtype}{a.shape}{hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]}"
        for name, a in call.run().items()
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_bits_at_every_thread_count(name: str, dtype: type) -> None:
    operation = OPERATIONS[name]
    for shape in SHAPES:
        if len(shape) < operation.min_rank:
            continue
        call = operation.make(fn, shape, dtype)
        with fn.num_threads(1):
            expected = digest(call)
        for threads in (2, 3, 7, 64):
            with fn.num_threads(threads):
                assert digest(call) == expected, (shape, threads)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_bits_at_every_thread_count_in_other_layouts(name: str, layout: str) -> None:
    operation = OPERATIONS[name]
    for options in operation.variants:
        call = operation.make(fn, (5, 24, 33, 31), np.float32, layout=LAYOUTS[layout], **options)
        with fn.num_threads(1):
            expected = digest(call)
        for threads in (2, 7):
            with fn.num_threads(threads):
                assert digest(call) == expected, (options, threads)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_same_parameter_gradients_where_they_cancel(threads: int) -> None:
    """Channels last, sets of several work units, and terms that cancel over the batch: any other order shows."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 80, 80, 64))
    dy = rng.standard_normal((2, 80, 80, 64))
    dy = np.concatenate([dy, -dy])
    _, cache = fn.group_norm_forward(x, 1, np.ones(64), np.ones(64), channel_axis=-1)
    with fn.num_threads(1):
        expected = fn.group_norm_backward(dy, cache)
    with fn.num_threads(threads):
        for got, wanted in zip(fn.group_norm_backward(dy, cache), expected, strict=True):
            np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 2, 3, 0), (2, 0, 3, 1)])
def test_a_slice_has_the_bits_it_has_in_the_whole(order: tuple[int, ...]) -> None:
    """Whichever axis is nearest in memory: `order` lists the axes from the farthest to the nearest."""
    base = np.random.default_rng(4).standard_normal(tuple((5, 6, 7, 9)[axis] for axis in order))
    x = base.transpose(np.argsort(order))
    y = fn.instance_norm(x)
    for n in range(5):
        np.testing.assert_array_equal(fn.instance_norm(x[n : n + 1]), y[n : n + 1])
        np.testing.assert_array_equal(fn.instance_norm(x[n : n + 1, 2:3]), y[n : n + 1, 2:3])


def test_a_thread_with_a_small_stack() -> None:
    code = """
    import threading
    import numpy as np, fastnorm as fn
    def work():
        for x in (np.ones((40, 3000)), np.ones((4, 8, 50, 50)), np.ones((500, 200))[::2, ::2], np.ones((6, 9, 9, 8))):
            c = fn.layer_norm_forward(x)[1]; fn.layer_norm_backward(x, c)
            c = fn.batch_norm_forward(x, channel_axis=-1)[1]; fn.batch_norm_backward(x[::1, ::1], c)
            c = fn.group_norm_forward(x, 2, channel_axis=-1)[1]; fn.group_norm_backward(x, c)
        print("done")
    threading.stack_size(192 << 10)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    """
    assert output_of(code) == "done"


def rows_alone(name: str, shape: tuple[int, ...], count: int) -> None:
    """y and dx of the first `count` samples, computed without the others, have the bits that they have among them."""
    call = OPERATIONS[f"{name}_forward"].make(fn, shape)
    few = OPERATIONS[f"{name}_forward"].make(fn, shape, **call.arguments | {"x": call.arguments["x"][:count]})
    (y, cache), (y_few, cache_few) = call(), few()
    np.testing.assert_array_equal(y[:count], y_few, strict=True)
    dy = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    backward = getattr(fn, f"{name}_backward")
    np.testing.assert_array_equal(backward(dy, cache).dx[:count], backward(dy[:count], cache_few).dx, strict=True)


@pytest.mark.parametrize("shape", [(9, 515), (130, 33), (5, 6, 700), (65, 4, 5, 3)])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_a_set_alone_has_the_bits_it_has_in_a_batch(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) < OPERATIONS[name].min_rank:
        pytest.skip(f"{name} needs rank {OPERATIONS[name].min_rank}")
    for count in (1, 2, 5):
        rows_alone(name, shape, count)


def test_set_get_and_with() -> None:
    fn.set_num_threads(3)
    assert fn.get_num_threads() == 3
    with fn.num_threads(5):
        assert fn.get_num_threads() == 5
        with fn.num_threads(1):
            assert fn.get_num_threads() == 1
        assert fn.get_num_threads() == 5
    assert fn.get_num_threads() == 3
    with pytest.raises(KeyError), fn.num_threads(7):
        raise KeyError("an exception leaves the block too")
    assert fn.get_num_threads() == 3


@pytest.mark.parametrize("bad", [0, -1, 2.5, float("nan"), "2", None])
def test_bad_thread_counts(bad: object) -> None:
    fn.set_num_threads(3)
    with pytest.raises((ValueError, TypeError), match=r"\bn\b.*") as caught:
        fn.set_num_threads(bad)  # type: ignore[arg-type]
    assert str(bad) in str(caught.value) or type(bad).__name__ in str(caught.value)
    with pytest.raises((ValueError, TypeError)), fn.num_threads(bad):  # type: ignore[arg-type]
        pass
    assert fn.get_num_threads() == 3


def test_start_value_from_the_environment() -> None:
    code = "import fastnorm as fn; print(fn.get_num_threads())"
    assert output_of(code, FASTNORM_NUM_THREADS="3") == "3"
    assert output_of(code, FASTNORM_NUM_THREADS="1", OMP_NUM_THREADS="2") == "1"


def test_start_value_from_openmp() -> None:
    code = "import fastnorm as fn; print(fn.get_num_threads())"
    assert output_of(code, OMP_NUM_THREADS="5") == "5"
    assert output_of(code, OMP_NUM_THREADS="4,2") == "4"


@pytest.mark.parametrize("bad", ["0", "-2", "two", "1.5", "99999999999999999999"])
def test_bad_start_value_is_an_error_that_names_the_variable(bad: str) -> None:
    done = run_python("import fastnorm", FASTNORM_NUM_THREADS=bad)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError"), last
    assert "FASTNORM_NUM_THREADS" in last
    assert bad in last


def test_several_python_threads_at_once() -> None:
    calls = [
        operation.make(fn, (6, 12, 17, 19), dtype, seed=seed)
        for seed, dtype in enumerate([np.float32, np.float64])
        for operation in OPERATIONS.values()
    ]
    calls += [OPERATIONS[name].make(fn, (64, 33, 45)) for name in ("layer_norm", "batch_norm_forward", "dropout")]
    with fn.num_threads(2):
        expected = [digest(call) for call in calls]
        jobs = [i for _ in range(4) for i in range(len(calls))]
        np.random.default_rng(0).shuffle(jobs)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: digest(calls[i]), jobs))
    assert [expected[i] for i in jobs] == found


def others_ran_during(work: object) -> bool:
    """Whether another Python thread got to run while work() did.

    With a switch interval of minutes the interpreter never takes the GIL from a thread: the other thread, waiting at
    the gate, runs only if the work itself lets go.
    """
    gate, passed = threading.Lock(), []
    gate.acquire()
    other = threading.Thread(target=lambda: (gate.acquire(), passed.append(True)))
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(600.0)
    try:
        gate.release()
        work()  # type: ignore[operator]
        ran = bool(passed)
    finally:
        sys.setswitchinterval(interval)
        other.join()
    return ran


@pytest.mark.unverified("others run while the references compute, whatever the kernels do")
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_gil_is_released_for_large_work(name: str) -> None:
    call = OPERATIONS[name].make(fn, (256, 16, 48, 32))  # a millisecond or more: the other thread has to wake up in it
    # One success is proof; failures may be the scheduler's doing, hundreds of them where other programs have the cores.
    # One thread: the other one needs a core, too.
    patience = time.monotonic() + 30
    with fn.num_threads(1):
        assert any(others_ran_during(call) for _ in iter(lambda: time.monotonic() < patience, False))


def test_the_gil_test_can_fail() -> None:
    assert not any(others_ran_during(lambda: sum(range(100_000))) for _ in range(5))
