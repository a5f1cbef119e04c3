"""verify: right results pass, every kind of wrong result is caught and named, and off means off.

Refuses to judge accuracy: a wrong result here is wrong on purpose.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core, _dropout_add_norm, _verify, reference
from fastnorm.nn import LayerNorm
from operations import LAYOUTS, OPERATIONS, results
from subprocess_python import output_of, run_python

NORMS = [name for name in OPERATIONS if "norm" in name]
RESIDUAL_STEPS = [name for name in NORMS if name.startswith("dropout_add")]
UNITS = {np.float32: 2.0**-24, np.float64: 2.0**-53}


@pytest.fixture(autouse=True)
def _off_at_the_start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """FASTNORM_VERIFY may be set for the whole run; these tests count what is entered."""
    entered = list(_verify._entered)
    _verify._entered.clear()
    _core.set_verifying(False)
    yield
    _verify._entered[:] = entered
    _core.set_verifying(bool(entered))


@pytest.mark.parametrize("name", OPERATIONS)
def test_right_results_pass_and_have_the_same_bits(name: str) -> None:
    for options in OPERATIONS[name].variants:
        for layout in ("contiguous", "channels_last", "reversed"):
            call = OPERATIONS[name].make(fn, (3, 6, 5), np.float32, layout=LAYOUTS[layout], **options)
            plain = call.run()
            with fn.verify():
                verified = call.run()
            assert plain.keys() == verified.keys()
            for key in plain:
                np.testing.assert_array_equal(plain[key], verified[key])


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.in_place])
def test_in_place(name: str) -> None:
    operation = OPERATIONS[name]
    call = operation.make(fn, (3, 6, 5), np.float64)
    want = call()
    target = call.arguments[operation.in_place or ""].copy()
    with fn.verify():
        got = call(**{operation.in_place or "": target, "out": target})
    np.testing.assert_array_equal(*(r[0] if isinstance(r, tuple) else r for r in (got, want)))
    assert (got[0] if isinstance(got, tuple) else got) is target


def damaged(name: str, output: str, dtype: Any, damage: Callable[[np.ndarray], None]) -> _verify.VerificationError:
    """What verify says of a reference whose ``output`` was changed afterwards."""
    call = OPERATIONS[name].make(reference, (3, 6, 5), dtype)

    def kernel() -> Any:
        result = call()
        arrays = call.arguments | results(result)
        damage(arrays["y1" if output == "s" else output])
        return result

    with fn.verify(), pytest.raises(fn.VerificationError) as caught:
        _verify.run(name, kernel, (), call.arguments)
    return caught.value


OUTPUTS = [
    *((name, "dx" if name.endswith("_backward") else "y") for name in NORMS if name != "moments"),
    *((name, output) for name in NORMS if name.endswith("_backward") for output in ("dweight", "dbias")),
    *((name, output) for name in NORMS if name.endswith("_forward") for output in ("mean", "rstd")),
    *((name, "dresidual" if name.endswith("_backward") else "s") for name in RESIDUAL_STEPS),
    ("batch_norm_forward", "batch_var"),
    ("batch_norm_forward", "running_mean"),
    ("batch_norm_forward", "running_var"),
]
NOT_THERE = {("rms_norm_backward", "dbias"), ("rms_norm_forward", "mean")}
OUTPUTS = [(name, output) for name, output in OUTPUTS if (name.removeprefix("dropout_add_"), output) not in NOT_THERE]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "output"), OUTPUTS)
def test_every_output_is_compared(name: str, output: str, dtype: Any) -> None:
    def damage(a: np.ndarray) -> None:
        a.flat[-1] += 200 * UNITS[dtype] * max(1.0, abs(a.flat[-1]))

    error = damaged(name, output, dtype, damage)
    assert [(miss.function, miss.output) for miss in error.misses] == [(name, output)]
    assert error.misses[0].error > error.misses[0].bound


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_call_is_compared_once_under_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is made of others is compared as a whole; its parts are not compared again."""
    call = OPERATIONS[name].make(fn, (3, 6, 5), np.float32)
    expected, compared = _verify._expected, []

    def record(function: str, args: Any, kwargs: Any) -> Any:
        compared.append(function)
        return expected(function, args, kwargs)

    monkeypatch.setattr(_verify, "_expected", record)
    with fn.verify():
        call.run()
        call.run()
    assert compared == [name, name]


@pytest.mark.parametrize("name", RESIDUAL_STEPS)
def test_a_wrong_sum_names_the_residual_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parts that are all right by themselves."""
    call = OPERATIONS[name].make(fn, (3, 6, 5), np.float32)
    wrong = SimpleNamespace(**{**vars(np), "add": np.subtract})
    monkeypatch.setattr(_dropout_add_norm, "np", wrong)
    with fn.verify(), pytest.raises(fn.VerificationError) as caught:
        call()
    assert {miss.function for miss in caught.value.misses} == {name}
    wanted = {"dx", "dresidual"} if name.endswith("_backward") else {"y", "s"}
    assert wanted <= {miss.output for miss in caught.value.misses}
    call_alone = OPERATIONS["layer_norm"].make(fn, (3, 6, 5), np.float32)
    with fn.verify(), pytest.raises(fn.VerificationError):  # after an error, calls are compared as before
        _verify.run("layer_norm", lambda: -call_alone(), (), call_alone.arguments)


@pytest.mark.parametrize("name", [name for name in RESIDUAL_STEPS if not name.endswith("_backward")])
def test_a_residual_step_advances_its_stream_once(name: str) -> None:
    call = OPERATIONS[name].make(fn, (3, 6, 5), np.float32)
    streams = [fn.Philox(3, 4), fn.Philox(3, 4), np.random.default_rng(3), np.random.default_rng(3)]
    for plain, verified in (streams[:2], streams[2:]):
        want = call.run(rng=plain)
        with fn.verify():
            got = call.run(rng=verified)
        for key in want:
            np.testing.assert_array_equal(got[key], want[key])
    assert streams[0] == streams[1] == fn.Philox(3, 5)
    assert streams[2].random() == streams[3].random()


def test_residual_gradients_that_overflow_or_vanish_are_right() -> None:
    """The kernels round between the norm, the sum and the mask; that is no miss, and dropped elements are 0."""
    x, slope = np.random.default_rng(8).normal(size=(2, 40, 50)).astype(np.float32)
    x *= np.float32(0.1)  # gradients are some ten times dy
    _, cache = fn.dropout_add_rms_norm_forward(x, x, p=0.99, rng=1)
    with fn.verify():
        for size in (1e-44, 1e-40, 1e37, 3e37, np.inf):
            for ds in (None, np.float32(-3e38) * np.sign(slope)):
                grads = fn.dropout_add_rms_norm_backward(np.float32(size) * slope, cache, ds=ds)
                assert np.count_nonzero(grads.dx == 0) > x.size // 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_must_be_so_in_both(value: float) -> None:
    def damage(a: np.ndarray) -> None:
        a[1, 2, 3] = value

    error = damaged("layer_norm", "y", np.float32, damage)
    assert error.misses[0].index == (1, 2, 3)
    x = np.ones((3, 5))
    x[1, 2] = value
    with fn.verify():
        assert np.isnan(fn.layer_norm(x)[1]).any()
        with pytest.raises(fn.VerificationError):
            _verify.run("layer_norm", lambda: np.zeros_like(x), (x,), {})


def test_the_error_says_all_that_a_report_needs() -> None:
    x = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32)
    right = reference.layer_norm(x)
    wrong = right.copy()
    wrong[2, 5] += np.float32(1e-3)
    wrong[3, 1] += np.float32(1e-4)
    with fn.verify(), pytest.raises(fn.VerificationError) as caught:
        _verify.run("layer_norm", lambda: wrong, (x,), {"out": None})
    (miss,) = caught.value.misses
    assert isinstance(caught.value, AssertionError)
    assert (miss.function, miss.output, miss.dtype, miss.shape) == ("layer_norm", "y", np.float32, (4, 7))
    assert (miss.index, miss.got, miss.expected, miss.bound) == ((2, 5), wrong[2, 5], right[2, 5], 4.0)
    scale = max(1.0, abs(float(right[2, 5])))
    assert miss.error == pytest.approx(1e-3 / (2.0**-24 * scale), rel=1e-2)
    for word in ("layer_norm", "y[2, 5]", "float32", "(4, 7)", repr(wrong[2, 5]), repr(right[2, 5]), " u", "4 u"):
        assert word in str(caught.value)


def test_missing_surplus_and_misshapen_outputs() -> None:
    x, weight = np.random.default_rng(2).normal(size=(4, 7)), np.ones(7)
    _, cache = reference.layer_norm_forward(x, weight)
    dx, dweight, _ = reference.layer_norm_backward(x, cache)
    for wrong, output in (
        (fn.NormGrads(dx, None, None), "dweight"),
        (fn.NormGrads(dx, dweight, dweight), "dbias"),
        (fn.NormGrads(dx[:3], dweight, None), "dx"),
    ):
        with fn.verify(), pytest.raises(fn.VerificationError, match=output):
            _verify.run("layer_norm_backward", lambda wrong=wrong: wrong, (x, cache), {})


def test_functions_without_an_allowed_error_agree_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_positive(x: np.ndarray, *, out: Any = None) -> np.ndarray:
        return np.where(x > 0, x, 0.0)

    monkeypatch.setattr(reference, "keep_positive", keep_positive, raising=False)
    x = np.array([-1.0, 2.0, 3.0])
    with fn.verify():
        _verify.run("keep_positive", lambda: np.array([0.0, 2.0, 3.0]), (x,), {"out": None})
        for wrong in ([-0.0, 2.0, 3.0], [0.0, np.nextafter(2.0, 3.0), 3.0], [0.0, np.nan, 3.0]):
            with pytest.raises(fn.VerificationError):
                _verify.run("keep_positive", lambda wrong=wrong: np.array(wrong), (x,), {"out": None})


def test_a_generator_is_advanced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "draw", lambda *, rng: rng.random(3), raising=False)
    ours, alone = np.random.default_rng(3), np.random.default_rng(3)
    with fn.verify():
        _verify.run("draw", lambda: ours.random(3), (), {"rng": ours})
    alone.random(3)
    assert ours.random() == alone.random()


def test_running_statistics_are_updated_once() -> None:
    x = np.random.default_rng(4).normal(size=(5, 3))
    verified, plain = ({"running_mean": np.zeros(3), "running_var": np.ones(3)} for _ in range(2))
    with fn.verify():
        fn.batch_norm_forward(x, **verified)
    fn.batch_norm_forward(x, **plain)
    for name in plain:
        np.testing.assert_array_equal(plain[name], verified[name])


def wrong_call() -> Any:
    return _verify.run("layer_norm", lambda: np.ones((2, 3)), (np.eye(2, 3),), {})


def test_warn_returns_the_result() -> None:
    with fn.verify("warn"), pytest.warns(fn.VerificationWarning, match=r"layer_norm: y\["):
        np.testing.assert_array_equal(wrong_call(), np.ones((2, 3)))


def test_a_warning_is_about_the_line_that_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_compare", lambda *_: "a miss")
    x = np.ones((2, 3), np.float32)
    for call in (lambda: fn.layer_norm(x), lambda: LayerNorm(3)(x)):
        with fn.verify("warn"), pytest.warns(fn.VerificationWarning) as caught:
            call()
        line = inspect.getsourcelines(call)[1]
        assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)]


def test_nested_blocks_restore_the_state_before_them() -> None:
    assert not _verify.active()
    with fn.verify("warn"):
        with fn.verify(), pytest.raises(fn.VerificationError):
            wrong_call()
        with pytest.warns(fn.VerificationWarning):
            wrong_call()
    assert not _verify.active()
    with pytest.raises(ZeroDivisionError), fn.verify():
        raise ZeroDivisionError
    assert not _verify.active()
    wrong_call()


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'shout'"):
        fn.verify("shout")
    assert not _verify.active()


def test_the_switch_is_the_whole_process() -> None:
    caught: list[str] = []

    def work() -> None:
        try:
            wrong_call()
        except fn.VerificationError:
            caught.append("caught")

    for block in (fn.verify(), None):
        thread = threading.Thread(target=work)
        if block is None:
            thread.start()
            thread.join()
        else:
            with block:
                thread.start()
                thread.join()
    assert caught == ["caught"]


def test_threads_that_enter_and_leave_in_any_order() -> None:
    rng, x = np.random.default_rng(5), np.random.default_rng(5).normal(size=(4, 9))
    want, wrong = fn.layer_norm(x), []

    def work(seed: int) -> None:
        for _ in range(20):
            with fn.verify():
                if not (_verify.active() and np.array_equal(fn.layer_norm(x), want)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(int(rng.integers(100)),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not _verify.active()


def test_off_means_that_no_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a reference ran")

    monkeypatch.setitem(reference._EXACT, "layer_norm", never)
    x = np.ones((2, 3))
    fn.layer_norm(x)
    fn.layer_norm(x.tolist())
    with fn.verify(), pytest.raises(AssertionError, match="a reference ran"):
        fn.layer_norm(x)


ENVIRONMENT = """
    import warnings
    import numpy as np
    warnings.simplefilter("always")
    import fastnorm as fn
    from fastnorm import _verify
    fn.layer_norm(np.ones((2, 3)))
    print(_verify.active())
    try:
        _verify.run("layer_norm", lambda: np.ones((2, 3)), (np.eye(2, 3),), {})
    except fn.VerificationError:
        print("error")
"""


@pytest.mark.parametrize(("value", "printed"), [("", "False"), ("0", "False"), ("1", "True\nerror"), ("warn", "True")])
def test_environment(value: str, printed: str) -> None:
    assert output_of(ENVIRONMENT, FASTNORM_VERIFY=value) == printed


def test_environment_warns() -> None:
    assert "VerificationWarning: layer_norm: y[" in run_python(ENVIRONMENT, FASTNORM_VERIFY="warn").stderr


def test_another_value_in_the_environment_is_refused() -> None:
    done = run_python("import fastnorm", FASTNORM_VERIFY="yes")
    assert done.returncode != 0
    assert "ValueError: FASTNORM_VERIFY is 'yes'" in done.stderr


def test_verified_calls_warn_of_nothing_else() -> None:
    """Overflow, NaN and Inf are results, not warnings."""
    x = np.array([[np.inf, 1.0], [np.nan, 2.0], [3e38, -3e38]], np.float32)
    with fn.verify():
        for function in (fn.layer_norm, fn.rms_norm):
            function(x)
        fn.moments(x, axis=0)
        fn.batch_norm_backward(x, fn.batch_norm_forward(x)[1])
