"""Bad input: a ValueError or TypeError that names the argument, what was received and what was expected.

Nothing is written before it: no out, no running statistics, no argument at all.

One table: each row makes one argument of a good call bad. The same rows run for the plain function, the forward and the
backward, so that their checks cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from operations import OPERATIONS, Call

SHAPE = (4, 6, 5)
SWAPPED = np.dtype(np.float32).newbyteorder()


@dataclass(frozen=True)
class Bad:
    """What to change in a good call, and what the refusal must say: every word, whatever stands between them."""

    label: str
    error: type[Exception] | tuple[type[Exception], ...]
    changes: Callable[[Call], dict[str, Any]]
    words: tuple[str, ...]


def is_norm(name: str) -> bool:
    return "norm" in name


def has(name: str, argument: str) -> bool:
    return argument in OPERATIONS[name].make(fn, SHAPE).arguments


def main_of(name: str) -> str:
    return OPERATIONS[name].make(fn, SHAPE).main


def refused_dtypes(argument: str) -> list[Bad]:
    """Every dtype that must be converted by the user, with the call that converts it."""
    dtypes = ["int64", "uint8", "bool", "complex64", "object", "S4", "longdouble"]

    def cast(dtype: Any) -> Callable[[Call], dict[str, Any]]:
        return lambda call: {argument: np.asarray(call.arguments[argument]).astype(dtype)}

    rows = [
        Bad(
            f"{argument} of {dtype}",
            TypeError,
            cast(dtype),
            (argument, f"{np.dtype(dtype).name}|{dtype}", "real.astype" if dtype == "complex64" else "astype", "float"),
        )
        for dtype in dtypes
        if np.dtype(dtype) not in (np.float32, np.float64)
    ]
    rows.append(Bad(f"{argument} byte-swapped", TypeError, cast(SWAPPED), (argument, "byte", "astype")))
    rows.append(Bad(f"{argument} None", TypeError, lambda _: {argument: None}, (argument, "None")))
    rows.append(Bad(f"{argument} text", TypeError, lambda _: {argument: "text"}, (argument,)))
    return rows


def wrong_parameter(argument: str, *, length: str) -> list[Bad]:
    """weight, bias and the statistics: shape, rank, dtype."""

    def longer(call: Call) -> dict[str, Any]:
        return {argument: np.ones(call.arguments[argument].size + 1, np.float32)}

    return [
        Bad(f"{argument} too long", ValueError, longer, (argument, "shape", length)),
        Bad(
            f"{argument} of rank 2", ValueError, lambda _: {argument: np.ones((2, 3), np.float32)}, (argument, "(2, 3)")
        ),
        Bad(f"{argument} a scalar", ValueError, lambda _: {argument: np.float32(1)}, (argument, "()")),
        Bad(
            f"{argument} of int64",
            TypeError,
            lambda call: {argument: np.ones(call.arguments[argument].shape, np.int64)},
            (argument, "int64"),
        ),
    ]


def other_float(argument: str) -> Bad:
    return Bad(
        f"{argument} of float64 where x has float32",
        TypeError,
        lambda call: {argument: call.arguments[argument].astype(np.float64)},
        (argument, "float64", "float32"),
    )


def out_of_range(argument: str, *values: Any) -> list[Bad]:
    def given(value: Any) -> Callable[[Call], dict[str, Any]]:
        return lambda _: {argument: value}

    rows = [Bad(f"{argument}={value!r}", ValueError, given(value), (argument, str(value))) for value in values]
    rows.append(Bad(f"{argument}='text'", (TypeError, ValueError), given("text"), (argument, "text")))
    rows.append(Bad(f"{argument}=1j", (TypeError, ValueError), given(1j), (argument,)))
    return rows


def bad_out(call_shape: tuple[int, ...] = SHAPE) -> list[Bad]:
    def read_only(call: Call) -> dict[str, Any]:
        out = np.zeros(call_shape, np.float32)
        out.flags.writeable = False
        return {"out": out}

    # Two elements of a broadcast array are one place in memory: a result cannot be stored there.
    def broadcast(call: Call) -> dict[str, Any]:
        out = np.lib.stride_tricks.as_strided(np.zeros(SHAPE[1:], np.float32), SHAPE, (0, 20, 4))
        return {"out": out}

    return [
        Bad("out read-only", ValueError, read_only, ("out", "read-only|writeable|writable")),
        Bad("out broadcast", ValueError, broadcast, ("out",)),
        Bad(
            "out too short",
            ValueError,
            lambda _: {"out": np.zeros((4, 6, 4), np.float32)},
            ("out", "(4, 6, 4)", "(4, 6, 5)"),
        ),
        Bad("out flat", ValueError, lambda _: {"out": np.zeros(120, np.float32)}, ("out", "(120,)", "(4, 6, 5)")),
        Bad(
            "out of float64", (TypeError, ValueError), lambda _: {"out": np.zeros(SHAPE)}, ("out", "float64", "float32")
        ),
        Bad(
            "out of int32",
            (TypeError, ValueError),
            lambda _: {"out": np.zeros(SHAPE, np.int32)},
            ("out", "int32", "float32"),
        ),
        Bad(
            "out byte-swapped",
            (TypeError, ValueError),
            lambda _: {"out": np.zeros(SHAPE, SWAPPED)},
            ("out", "float32"),
        ),
        Bad("out a list", TypeError, lambda _: {"out": [0.0] * 120}, ("out", "list")),
    ]


def bad_rng() -> list[Bad]:
    return [
        Bad("rng None", TypeError, lambda _: {"rng": None}, ("rng",)),
        Bad("rng text", TypeError, lambda _: {"rng": "seed"}, ("rng", "str|seed")),
        Bad("rng float", TypeError, lambda _: {"rng": 1.5}, ("rng", "float|1.5")),
        Bad("rng negative", ValueError, lambda _: {"rng": -1}, ("rng|seed", "-1")),
        Bad("rng too large", ValueError, lambda _: {"rng": 2**64}, ("rng|seed", str(2**64))),
    ]


def bad_cache(name: str) -> list[Bad]:
    """Nothing, something else, and the cache of every kind of other function."""
    stem = name.removesuffix("_backward")
    others = [other for other in ("layer_norm", "rms_norm", "batch_norm", "group_norm", "dropout") if other != stem]

    def cache_of(other: str) -> Callable[[Call], dict[str, Any]]:
        return lambda _: {"cache": OPERATIONS[f"{other}_forward"].make(fn, SHAPE)()[1]}

    rows = [
        Bad(f"cache of {other}", (TypeError, ValueError), cache_of(other), ("cache", f"{other}_forward|{other}", stem))
        for other in others
    ]
    rows.append(Bad("cache None", TypeError, lambda _: {"cache": None}, ("cache", "None")))
    rows.append(Bad("cache a tuple", TypeError, lambda _: {"cache": (1, 2)}, ("cache", "tuple")))
    return rows


def bad_dy(shape: tuple[int, ...] = SHAPE) -> list[Bad]:
    return [
        *refused_dtypes("dy"),
        Bad(
            "dy too short",
            ValueError,
            lambda _: {"dy": np.ones((3, 6, 5), np.float32)},
            ("dy", "(3, 6, 5)", str(shape)),
        ),
        Bad("dy flat", ValueError, lambda _: {"dy": np.ones(120, np.float32)}, ("dy", "(120,)", str(shape))),
        Bad("dy a scalar", ValueError, lambda _: {"dy": np.float32(1)}, ("dy", "()", str(shape))),
        Bad(
            "dy broadcastable",
            ValueError,
            lambda _: {"dy": np.ones((1, 6, 5), np.float32)},
            ("dy", "(1, 6, 5)", str(shape)),
        ),
        Bad("dy of float64", TypeError, lambda _: {"dy": np.ones(shape)}, ("dy", "float64", "float32")),
    ]


def same_shape(argument: str) -> list[Bad]:
    return [
        Bad(
            f"{argument} of another shape",
            ValueError,
            lambda _: {argument: np.ones((4, 5, 6), np.float32)},
            (argument, "(4, 5, 6)", "(4, 6, 5)"),
        ),
        Bad(
            f"{argument} of float64", TypeError, lambda _: {argument: np.ones(SHAPE)}, (argument, "float64", "float32")
        ),
        Bad(f"{argument} of int32", TypeError, lambda _: {argument: np.ones(SHAPE, np.int32)}, (argument, "int32")),
    ]


def channel_axis_rows() -> list[Bad]:
    return [
        Bad("channel_axis=3", ValueError, lambda _: {"channel_axis": 3}, ("channel_axis", "3")),
        Bad("channel_axis=-4", ValueError, lambda _: {"channel_axis": -4}, ("channel_axis", "-4")),
        Bad("channel_axis=1.5", TypeError, lambda _: {"channel_axis": 1.5}, ("channel_axis", "1.5|float")),
        Bad("channel_axis=None", TypeError, lambda _: {"channel_axis": None}, ("channel_axis", "None")),
    ]


def batch_forward_rows() -> list[Bad]:
    def read_only(call: Call) -> dict[str, Any]:
        fixed = call.arguments["running_var"].copy()
        fixed.flags.writeable = False
        return {"running_var": fixed}

    def shared(call: Call) -> dict[str, Any]:
        return {"running_var": call.arguments["running_mean"]}

    def one_value(call: Call) -> dict[str, Any]:
        return {"x": np.ones((1, 6, 1), np.float32)}

    return [
        *out_of_range("momentum", 1.5, -0.1, float("nan"), float("inf")),
        Bad("running_var read-only", ValueError, read_only, ("running_var", "read-only|writeable|writable")),
        Bad("running_var is running_mean", ValueError, shared, ("running_mean", "running_var")),
        Bad(
            "one value per channel",
            ValueError,
            one_value,
            ("x", "(1, 6, 1)", "one value|1 value", "training=False|eval|batch"),
        ),
        Bad(
            "training=False without statistics",
            ValueError,
            lambda _: {"training": False, "running_mean": None, "running_var": None},
            ("running_mean", "training"),
        ),
    ]


def rows_for(name: str) -> list[Bad]:
    """Every bad input that the function can be given."""
    operation = OPERATIONS[name]
    arguments = operation.make(fn, SHAPE).arguments
    rows: list[Bad] = []
    if name.endswith("_backward"):
        rows += bad_dy() + bad_cache(name)
        if "ds" in arguments:
            rows += same_shape("ds")
    elif main_of(name) in ("x", "weight"):
        rows += refused_dtypes(main_of(name))
    if operation.out:
        rows += bad_out()
    if operation.min_rank > 1 and "x" in arguments:
        low = (6,) if operation.min_rank == 2 else (4, 6)
        rows.append(Bad("x of too low a rank", ValueError, lambda _: {"x": np.ones(low, np.float32)}, ("x", str(low))))
    if is_norm(name) and "x" in arguments:
        rows += out_of_range("eps", -1e-5, float("nan"))
        rows += wrong_parameter("weight", length="6" if operation.min_rank > 1 else "5")
        rows.append(other_float("weight"))
        if "bias" in arguments:
            rows += wrong_parameter("bias", length="6" if operation.min_rank > 1 else "5")
            rows.append(other_float("bias"))
        if operation.min_rank > 1:
            rows += channel_axis_rows()
        else:
            rows.append(Bad("axis=3", ValueError, lambda _: {"axis": 3}, ("axis", "3")))
            rows.append(Bad("axis=-4", ValueError, lambda _: {"axis": -4}, ("axis", "-4")))
            rows.append(Bad("axis=1.5", TypeError, lambda _: {"axis": 1.5}, ("axis", "1.5|float")))
            rows.append(Bad("x a scalar", ValueError, lambda _: {"x": np.float32(1)}, ("x", "()")))
    if "num_groups" in arguments:
        rows += out_of_range("num_groups", 4, 0, -2)
        rows.append(Bad("num_groups=2.0", TypeError, lambda _: {"num_groups": 2.0}, ("num_groups", "2.0|float")))
    for statistic in ("mean", "var", "running_mean", "running_var"):
        if statistic in arguments:
            rows += wrong_parameter(statistic, length="6")
    if "var" in arguments:
        negative = np.array([1, 1, -1, 1, 1, 1], np.float32)
        rows.append(Bad("negative var", ValueError, lambda _: {"var": negative}, ("var", "-1")))
    if "running_mean" in arguments:
        rows += batch_forward_rows()
    if "p" in arguments:
        rows += out_of_range("p", 1.5, -0.1, float("nan"), float("inf"))
    if "rng" in arguments:
        rows += bad_rng()
    if "residual" in arguments:
        rows += same_shape("residual")
    if name in ("dropout", "dropout_forward"):
        rows += out_of_range("shared_axes", (3,), (-4,), (1, 1), (1, -2))
        rows.append(
            Bad("scale unknown", ValueError, lambda _: {"scale": "keras"}, ("scale", "keras", "inverted", "classic"))
        )
    if name == "dropout_mask":
        rows += out_of_range("shared_axes", (3,), (-4,), (1, 1))
        rows.append(Bad("shape negative", ValueError, lambda _: {"shape": (2, -3)}, ("shape", "-3")))
    if "std" in arguments:
        rows += out_of_range("std", -1.0, float("nan"), float("inf"))
    if "keep" in arguments:
        rows += [
            Bad(
                "keep too short",
                ValueError,
                lambda _: {"keep": np.ones((4, 6, 4), bool)},
                ("keep", "(4, 6, 4)", "(4, 6, 5)"),
            ),
            Bad(
                "keep of float32",
                TypeError,
                lambda _: {"keep": np.ones(SHAPE, np.float32)},
                ("keep", "float32", "bool"),
            ),
        ]
    if name == "moments":
        rows += out_of_range("axis", 3, -4, (0, 0), (0, 3))
    return rows


CASES = [(name, row) for name in OPERATIONS for row in rows_for(name)]


@pytest.mark.parametrize(("name", "bad"), [pytest.param(n, row, id=f"{n}: {row.label}") for n, row in CASES])
def test_bad_input(name: str, bad: Bad) -> None:
    operation = OPERATIONS[name]
    good = operation.make(fn, SHAPE)
    changes = bad.changes(good)
    given = {**good.arguments, **changes}
    if operation.out:
        given.setdefault("out", np.full(SHAPE, 77.0, np.float32))
    arrays = {key: value for key, value in given.items() if isinstance(value, np.ndarray)}
    before = {key: value.copy() for key, value in arrays.items()}
    with pytest.raises(bad.error) as caught:
        good.function(**given)
    message = str(caught.value)
    for word in bad.words:
        assert any(choice in message for choice in word.split("|")), f"{word!r} is missing from: {message}"
    for key, value in arrays.items():
        assert value.tobytes() == before[key].tobytes(), f"{key} was written before the refusal"


@pytest.mark.parametrize("name", [n for n in OPERATIONS if has(n, "rng") and "add" not in n])
def test_leaving_rng_out_is_a_type_error(name: str) -> None:
    call = OPERATIONS[name].make(fn, SHAPE)
    without = {key: value for key, value in call.arguments.items() if key != "rng"}
    with pytest.raises(TypeError, match="rng"):
        call.function(**without)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if has(n, "rng")])
def test_a_refused_call_does_not_advance_its_stream(name: str) -> None:
    stream = fn.Philox(7)
    call = OPERATIONS[name].make(fn, SHAPE, rng=stream)
    with pytest.raises(ValueError, match=r"\bp\b|std"):
        call(**({"std": -1.0} if "std" in call.arguments else {"p": 1.5}))
    found, expected = call.run(), call.run(rng=fn.Philox(7))
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
    # The stream that served a call has moved on.
    assert any((value != found[key]).any() for key, value in call.run().items())


@pytest.mark.parametrize("name", [n for n in OPERATIONS if main_of(n) == "x"])
def test_lists_of_numbers_are_converted_or_refused_by_dtype(name: str) -> None:
    """numpy.asarray makes float64 of a list of floats, which is accepted, and int64 of integers, which is not."""
    call = OPERATIONS[name].make(fn, SHAPE, np.float64)
    expected = call.run()
    for key, value in call.run(x=call.arguments["x"].tolist()).items():
        np.testing.assert_array_equal(value, expected[key], strict=True)
    with pytest.raises(TypeError, match=r"\bx\b.*int"):
        call(x=np.ones(SHAPE, int).tolist())


def test_the_reference_refuses_what_the_functions_refuse() -> None:
    """The shapes and ranges at least: a reference that accepts more would hide a missing check in verify mode."""
    for name, change in [("layer_norm", {"eps": -1.0}), ("group_norm", {"num_groups": 4}), ("dropout", {"p": 1.5})]:
        with pytest.raises(ValueError, match=next(iter(change))):
            OPERATIONS[name].make(fn.reference, SHAPE)(**change)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_to_convert_to_is_the_dtype_of_x(dtype: type) -> None:
    x = np.ones((4, 3), dtype)
    _, cache = fn.layer_norm_forward(x)
    calls = [
        lambda: fn.layer_norm(x, np.ones(3, int)),
        lambda: fn.layer_norm(x, None, [1, 1, 1]),
        lambda: fn.layer_norm(x, np.ones(3, np.float16)),
        lambda: fn.batch_norm(x, np.zeros(3, int), np.ones(3)),
        lambda: fn.layer_norm_backward(np.ones((4, 3), int), cache),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"np\.{np.dtype(dtype)}\)$"):
            call()
