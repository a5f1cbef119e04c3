"""Layers: the functions' numbers, PyTorch's state and meanings, and what they refuse.

PyTorch (where installed) is the oracle of what state, modes and momentum mean; the functions are the oracle of numbers.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import nn
from subprocess_python import output_of

DTYPES = [np.float32, np.float64]


def load_torch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch")


# name: ours, theirs (given torch), shape of x
PAIRS: dict[str, tuple[Callable[[Any], nn.Layer], Callable[[Any], Any], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda d: nn.BatchNorm(5, dtype=d), lambda t: t.nn.BatchNorm1d(5), (9, 5)),
    "BatchNorm1d-3d": (
        lambda d: nn.BatchNorm(5, 0.1, 0.3, dtype=d),
        lambda t: t.nn.BatchNorm1d(5, 0.1, 0.3),
        (4, 5, 7),
    ),
    "BatchNorm2d": (lambda d: nn.BatchNorm(3, dtype=d), lambda t: t.nn.BatchNorm2d(3), (4, 3, 5, 7)),
    "BatchNorm2d-average": (
        lambda d: nn.BatchNorm(3, momentum=None, dtype=d),
        lambda t: t.nn.BatchNorm2d(3, momentum=None),
        (4, 3, 5, 7),
    ),
    "BatchNorm2d-no-tracking": (
        lambda d: nn.BatchNorm(3, track_running_stats=False, dtype=d),
        lambda t: t.nn.BatchNorm2d(3, track_running_stats=False),
        (4, 3, 5, 7),
    ),
    "BatchNorm3d-plain": (
        lambda d: nn.BatchNorm(2, affine=False, dtype=d),
        lambda t: t.nn.BatchNorm3d(2, affine=False),
        (3, 2, 3, 4, 5),
    ),
    "LayerNorm": (lambda d: nn.LayerNorm(33, dtype=d), lambda t: t.nn.LayerNorm(33), (5, 33)),
    "LayerNorm-2": (
        lambda d: nn.LayerNorm((3, 7), 0.1, bias=False, dtype=d),
        lambda t: t.nn.LayerNorm((3, 7), 0.1, bias=False),
        (5, 3, 7),
    ),
    "LayerNorm-plain": (
        lambda d: nn.LayerNorm([33], elementwise_affine=False, dtype=d),
        lambda t: t.nn.LayerNorm([33], elementwise_affine=False),
        (2, 3, 33),
    ),
    "RMSNorm": (lambda d: nn.RMSNorm(33, dtype=d), lambda t: t.nn.RMSNorm(33, 1e-5), (5, 33)),
    "RMSNorm-plain": (
        lambda d: nn.RMSNorm((3, 7), 0.1, False, dtype=d),
        lambda t: t.nn.RMSNorm((3, 7), 0.1, False),
        (5, 3, 7),
    ),
    "GroupNorm": (lambda d: nn.GroupNorm(3, 6, dtype=d), lambda t: t.nn.GroupNorm(3, 6), (4, 6, 5, 7)),
    "GroupNorm-plain": (
        lambda d: nn.GroupNorm(2, 6, 0.1, False, dtype=d),
        lambda t: t.nn.GroupNorm(2, 6, 0.1, False),
        (4, 6, 7),
    ),
    "InstanceNorm1d": (lambda d: nn.InstanceNorm(5, dtype=d), lambda t: t.nn.InstanceNorm1d(5), (4, 5, 7)),
    "InstanceNorm2d": (
        lambda d: nn.InstanceNorm(3, affine=True, track_running_stats=True, dtype=d),
        lambda t: t.nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (4, 3, 5, 7),
    ),
    "InstanceNorm3d": (
        lambda d: nn.InstanceNorm(2, 0.1, 0.4, True, dtype=d),
        lambda t: t.nn.InstanceNorm3d(2, 0.1, 0.4, True),
        (3, 2, 3, 4, 5),
    ),
}


def close(ours: Any, theirs: Any, dtype: Any, what: str) -> None:
    theirs = np.asarray(theirs)
    # Both sides round their sums of up to a few hundred terms; 64 u was calibrated at 9 u at most.
    bound = 64 * np.finfo(dtype).eps
    np.testing.assert_allclose(ours, theirs, rtol=bound, atol=bound * max(1.0, np.abs(theirs).max()), err_msg=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_trained_state_moves_to_torch_and_back(name: str, dtype: Any) -> None:
    """Random parameters, three training steps on either side, then evaluation: everything agrees throughout."""
    torch = load_torch()
    make, make_theirs, shape = PAIRS[name]
    rng = np.random.default_rng(len(name))
    ours, theirs = make(dtype), make_theirs(torch).to(torch.from_numpy(np.zeros(1, dtype)).dtype)
    for value in ours.parameters().values():
        value[...] = rng.normal(1, 0.5, value.shape)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    assert list(ours.state_dict()) == list(theirs.state_dict())

    for training in (True, True, True, False):
        ours.train(training), theirs.train(training)
        x, dy = rng.normal(2, 3, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
        tx = torch.from_numpy(x.copy()).requires_grad_()
        theirs.zero_grad()
        ty = theirs(tx)
        ty.backward(torch.from_numpy(dy))
        close(ours(x), ty.detach(), dtype, "y")
        close(ours.backward(dy), tx.grad, dtype, "dx")
        for key, parameter in theirs.named_parameters():
            close(ours.gradients()[key], parameter.grad, dtype, f"gradient of {key}")
        for key, value in theirs.state_dict().items():
            close(ours.state_dict()[key], value, dtype, key)

    fresh = make(dtype)
    assert fresh.load_state_dict(theirs.state_dict()) == ([], [])
    x = rng.normal(2, 3, shape).astype(dtype)
    close(fresh.eval()(x), theirs(torch.from_numpy(x)).detach(), dtype, "y of the state loaded")
    assert {k: v.dtype for k, v in fresh.state_dict().items()} == {k: v.dtype for k, v in ours.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_survives_a_safetensors_file(tmp_path: Path, dtype: Any) -> None:
    files = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    layer = nn.BatchNorm(3, dtype=dtype)
    for _ in range(5):
        layer(rng.normal(4, 2, (6, 3, 2)).astype(dtype))
    layer.bias[...] = [1, 2, 3]
    files.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = nn.BatchNorm(3, dtype=dtype)
    loaded.load_state_dict(files.load_file(tmp_path / "layer.safetensors"))
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[key], value)
        assert loaded.state_dict()[key].dtype == value.dtype
    assert loaded.num_batches_tracked == 5


def test_torch_reads_and_writes_the_same_safetensors_file(tmp_path: Path) -> None:
    torch = load_torch()
    ours_files, theirs_files = (pytest.importorskip(f"safetensors.{kind}") for kind in ("numpy", "torch"))
    layer, module = nn.BatchNorm(3), torch.nn.BatchNorm2d(3)
    layer(np.random.default_rng(0).normal(4, 2, (6, 3, 2)).astype(np.float32))
    ours_files.save_file(layer.state_dict(), tmp_path / "ours")
    module.load_state_dict(theirs_files.load_file(tmp_path / "ours"))
    assert int(module.num_batches_tracked) == 1
    np.testing.assert_array_equal(module.running_var, layer.running_var)
    theirs_files.save_file(module.state_dict(), tmp_path / "theirs")
    back = nn.BatchNorm(3)
    back.load_state_dict(ours_files.load_file(tmp_path / "theirs"))
    np.testing.assert_array_equal(back.running_mean, layer.running_mean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_give_the_bits_of_the_functions(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    x, dy = rng.normal(2, 3, (5, 6, 7)).astype(dtype), rng.normal(size=(5, 6, 7)).astype(dtype)
    w6, b6, w7, b7 = (rng.normal(size=n).astype(dtype) for n in (6, 6, 7, 7))
    cases: list[tuple[nn.Layer, str, tuple[Any, ...]]] = [
        (nn.BatchNorm(6, dtype=dtype), "batch_norm", (w6, b6)),
        (nn.LayerNorm(7, dtype=dtype), "layer_norm", (w7, b7)),
        (nn.RMSNorm(7, dtype=dtype), "rms_norm", (w7,)),
        (nn.GroupNorm(2, 6, dtype=dtype), "group_norm", (2, w6, b6)),
        (nn.InstanceNorm(6, affine=True, dtype=dtype), "instance_norm", (w6, b6)),
    ]
    for layer, stem, arguments in cases:
        given = [a for a in arguments if isinstance(a, np.ndarray)]
        for value, wanted in zip(layer.parameters().values(), given, strict=True):
            value[...] = wanted
        assert set(layer.gradients().values()) == {None}
        y, cache = getattr(fn, f"{stem}_forward")(x, *arguments)
        grads = getattr(fn, f"{stem}_backward")(dy, cache)
        np.testing.assert_array_equal(layer.forward(x), y)
        np.testing.assert_array_equal(layer.backward(dy), grads.dx)
        found = layer.gradients()
        assert list(found) == list(layer.parameters())
        np.testing.assert_array_equal(found["weight"], grads.dweight)
        if "bias" in found:
            np.testing.assert_array_equal(found["bias"], grads.dbias)
        layer.backward(2 * dy)  # overwrites, does not add
        np.testing.assert_allclose(layer.gradients()["weight"], 2 * grads.dweight, rtol=1e-5)


@pytest.mark.parametrize("channel_axis", [0, 1, -1])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_follow_their_definition(channel_axis: int, momentum: float | None) -> None:
    """Against plain NumPy, on each channel axis; None is the plain average over the batches seen."""
    rng = np.random.default_rng(4)
    batches = [rng.normal(k, 1 + k, (4, 3, 5, 6)) for k in range(4)]
    batch_norm = nn.BatchNorm(3, momentum=momentum, channel_axis=channel_axis, dtype=np.float64)
    instance_norm = nn.InstanceNorm(3, 1e-5, momentum, False, True, channel_axis=channel_axis, dtype=np.float64)
    expected = {name: (np.zeros(3), np.ones(3)) for name in ("batch", "instance")}
    for k, x in enumerate(batches, 1):
        for layer in (batch_norm, instance_norm):
            # With the channels first, the samples come second.
            layer(np.moveaxis(x, 1, channel_axis))
        m = 1 / k if momentum is None else momentum
        found = {
            "batch": (x.mean((0, 2, 3)), x.var((0, 2, 3), ddof=1)),
            "instance": (x.mean((2, 3)).mean(0), x.var((2, 3), ddof=1).mean(0)),
        }
        expected = {
            name: tuple((1 - m) * old + m * new for old, new in zip(expected[name], found[name], strict=True))
            for name in expected
        }
    for layer, name in ((batch_norm, "batch"), (instance_norm, "instance")):
        np.testing.assert_allclose(layer.running_mean, expected[name][0], rtol=1e-13)
        np.testing.assert_allclose(layer.running_var, expected[name][1], rtol=1e-13)
    assert batch_norm.num_batches_tracked == 4
    # PyTorch's instance norm does not count; only an average has to.
    assert instance_norm.num_batches_tracked == (4 if momentum is None else 0)
    x = np.moveaxis(batches[0], 1, channel_axis)
    y = instance_norm.eval()(x)
    np.testing.assert_array_equal(
        y, fn.batch_norm(x, instance_norm.running_mean, instance_norm.running_var, channel_axis=channel_axis)
    )
    batch_norm.reset_running_stats()
    assert batch_norm.num_batches_tracked == 0
    assert batch_norm.running_mean.tolist() == [0, 0, 0]
    assert batch_norm.running_var.tolist() == [1, 1, 1]


def test_an_empty_batch_moves_nothing() -> None:
    layer, instance = nn.BatchNorm(3, momentum=None), nn.InstanceNorm(3, momentum=None, track_running_stats=True)
    for each, shape in ((layer, (0, 3)), (instance, (0, 3, 4))):
        assert each(np.zeros(shape, np.float32)).shape == shape
        assert each.num_batches_tracked == 0
        assert each.running_var.tolist() == [1, 1, 1]


def test_dropout_draws_anew_in_training_and_copies_in_evaluation() -> None:
    x = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    layer = nn.Dropout(0.3, rng=7)
    stream = fn.Philox(7)
    for _ in range(3):
        np.testing.assert_array_equal(layer(x), fn.dropout(x, 0.3, rng=stream))
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    np.testing.assert_array_equal(layer.backward(dy), fn.dropout(dy, 0.3, rng=fn.Philox(7, 2)))
    y = layer.eval()(x)
    np.testing.assert_array_equal(y, x)
    assert not np.shares_memory(x, y)
    np.testing.assert_array_equal(layer.backward(dy), dy)
    assert layer.rng == fn.Philox(7, 3)
    channels = nn.Dropout(0.5, rng=np.random.default_rng(2), shared_axes=(2,))
    kept = channels(np.ones((8, 9, 5))) != 0
    assert (kept == kept[:, :, :1]).all()
    assert 0 < kept.mean() < 1
    assert layer.parameters() == layer.gradients() == layer.state_dict() == {}


def test_drop_connect_masks_weights_and_their_gradient_alike() -> None:
    weight = np.random.default_rng(0).normal(size=(30, 20))
    layer = nn.DropConnect(0.4, rng=fn.Philox(5, 9))
    first, second = layer(weight), layer(weight)
    np.testing.assert_array_equal(first, fn.drop_connect(weight, 0.4, rng=fn.Philox(5, 9)))
    assert (first != second).any()
    dy = np.random.default_rng(1).normal(size=weight.shape)
    np.testing.assert_array_equal(layer.backward(dy) != 0, second != 0)
    np.testing.assert_array_equal(layer.eval()(weight), weight)


def test_two_layers_may_share_a_stream() -> None:
    stream = fn.Philox(0)
    x = np.ones((20, 20))
    a, b = nn.Dropout(0.5, rng=stream), nn.Dropout(0.5, rng=stream)
    assert (a(x) != b(x)).any()
    assert stream.offset == 2


def test_state_is_a_copy_and_loading_keeps_the_arrays() -> None:
    layer = nn.BatchNorm(3)
    weight, state = layer.weight, layer.state_dict()
    layer.weight[...] = 5
    layer(np.random.default_rng(0).normal(3, 1, (8, 3)).astype(np.float32))
    assert state["weight"].tolist() == [1, 1, 1]
    assert state["num_batches_tracked"] == 0
    layer.load_state_dict(state)
    assert layer.weight is weight
    assert weight.tolist() == [1, 1, 1]
    assert layer.num_batches_tracked == 0


def test_a_state_may_hold_the_layers_own_arrays() -> None:
    layer = nn.LayerNorm(3)
    layer.load_state_dict({"weight": layer.bias, "bias": layer.weight})
    assert layer.weight.tolist() == [0, 0, 0]
    assert layer.bias.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": None}, ValueError, ["weight is missing (shape (3,))"]),
        ({"gamma": np.ones(3, np.float32)}, ValueError, ["gamma is unexpected"]),
        ({"bias": np.zeros(4, np.float32)}, ValueError, ["bias has shape (4,), expected (3,)"]),
        (
            {"weight": None, "gamma": np.ones(3, np.float32), "running_var": np.ones((3, 1), np.float32)},
            ValueError,
            ["weight is missing", "gamma is unexpected", "running_var has shape (3, 1), expected (3,)"],
        ),
        ({"bias": np.zeros(3)}, TypeError, ["bias has dtype float64, expected float32"]),
        ({"num_batches_tracked": np.array(1.5)}, TypeError, ["num_batches_tracked has dtype float64, expected an int"]),
        ({"num_batches_tracked": np.array(-1)}, ValueError, ["num_batches_tracked holds", "-1"]),
        ({"running_var": np.array([1, -2, 3], np.float32)}, ValueError, ["running_var holds", "-2"]),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(
    changes: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    source = nn.BatchNorm(3)
    for name, value in source.parameters().items():
        value[...] = 7 if name == "weight" else 8
    state = {k: v for k, v in (source.state_dict() | changes).items() if v is not None}
    layer = nn.BatchNorm(3)
    before = layer.state_dict()
    with pytest.raises(error) as caught:
        layer.load_state_dict(state)
    assert all(word in str(caught.value) for word in ["BatchNorm", *words])
    assert all(np.array_equal(before[k], v) for k, v in layer.state_dict().items())


def test_a_state_may_be_loaded_in_part() -> None:
    layer = nn.BatchNorm(3)
    found = layer.load_state_dict({"weight": np.full(3, 2, np.float32), "gamma": 1}, strict=False)
    assert found.missing_keys == ["bias", "running_mean", "running_var", "num_batches_tracked"]
    assert found.unexpected_keys == ["gamma"]
    assert layer.weight.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="weight has shape"):
        layer.load_state_dict({"weight": np.ones(4, np.float32)}, strict=False)
    with pytest.raises(TypeError, match="mapping"):
        layer.load_state_dict([("weight", np.ones(3))])  # type: ignore[arg-type]


def message(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm(6),
        nn.BatchNorm(6, affine=False),
        nn.InstanceNorm(6, affine=True),
        nn.InstanceNorm(6, track_running_stats=True),
        nn.GroupNorm(2, 6),
        nn.LayerNorm((6, 5)),
        nn.RMSNorm((6, 5)),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{'weight' if layer.weight is not None else 'statistics'}",
)
def test_x_that_does_not_fit_the_layer_is_blamed_itself(layer: nn.Layer) -> None:
    """Not the weight, which the caller has never seen."""
    kind, told = message(lambda: layer(np.ones((4, 7, 5), np.float32)))
    assert kind is ValueError
    assert all(word in told for word in ("x has shape (4, 7, 5)", "expected", "6", "of the layer"))
    kind, told = message(lambda: layer(np.ones((4, 6, 5))))
    assert kind is TypeError
    assert all(word in told for word in ("x has dtype float64; expected float32", "x.astype(np.float32)", "dtype="))
    _, told = message(lambda: layer(np.ones((4, 6, 5)).tolist()))
    assert "np.asarray(x, dtype=np.float32)" in told  # a list has no astype
    if getattr(layer, "running_mean", None) is not None:
        assert layer.running_mean.tolist() == [0] * 6  # type: ignore[attr-defined]


def test_running_statistics_may_be_kept_more_precisely_than_x() -> None:
    layer = nn.BatchNorm(3, affine=False)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean, layer.running_var = layer.running_mean.astype(float), layer.running_var.astype(float)
    x = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    assert layer(x).dtype == layer.eval()(x).dtype == np.float32
    with pytest.raises(TypeError, match="x has dtype float64; expected float32"):
        layer(x.astype(float))


def test_wrong_input_gets_the_functions_own_messages() -> None:
    f32 = np.float32
    w3, w7 = np.ones(3, f32), np.ones(7, f32)
    running = {"running_mean": np.zeros(3, f32), "running_var": np.ones(3, f32)}
    for bad in (np.ones((1, 3), f32), np.ones((4, 3), int), np.ones(3, f32)):
        layer = nn.BatchNorm(3)
        assert message(lambda x=bad, layer=layer: layer(x)) == message(
            lambda x=bad: fn.batch_norm_forward(x, w3, np.zeros(3, f32), **running)
        )
        assert layer.num_batches_tracked == 0
    for bad in ([[1, 2, 3, 4, 5, 6, 7]], np.ones((4, 7), complex)):
        assert message(lambda x=bad: nn.LayerNorm(7)(x)) == message(
            lambda x=bad: fn.layer_norm_forward(x, w7, np.zeros(7, f32))
        )
        assert message(lambda x=bad: nn.RMSNorm(7)(x)) == message(lambda x=bad: fn.rms_norm_forward(x, w7))
    for bad in (np.ones((4, 3, 2), bool), np.ones((4, 3), f32)):
        assert message(lambda x=bad: nn.InstanceNorm(3, affine=True)(x)) == message(
            lambda x=bad: fn.instance_norm_forward(x, w3, np.zeros(3, f32))
        )
    bad = np.ones(9, f32)
    assert message(lambda: nn.GroupNorm(3, 3)(bad)) == message(lambda: fn.group_norm_forward(bad, 3, w3, w3))
    assert message(lambda: nn.Dropout(rng=0)(np.ones(3, int))) == message(lambda: fn.dropout(np.ones(3, int), rng=0))
    layer = nn.BatchNorm(3)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(f32)
    layer(x)
    assert "dy has shape (4, 2)" in message(lambda: layer.backward(np.ones((4, 2), f32)))[1]
    assert layer.gradients() == {"weight": None, "bias": None}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nn.BatchNorm(3, affine=False)(np.ones((4, 5), np.float32)), "5 channels on axis 1; expected 3"),
        (lambda: nn.InstanceNorm(3)(np.ones((4, 5, 2), np.float32)), "5 channels on axis 1; expected 3"),
        (lambda: nn.GroupNorm(2, 4, affine=False)(np.ones((4, 6, 2), np.float32)), "6 channels on axis 1; expected 4"),
        (lambda: nn.LayerNorm(3, elementwise_affine=False)(np.ones((4, 5), np.float32)), "expected (..., 3)"),
        (lambda: nn.LayerNorm((2, 3))(np.ones(3, np.float32)), "expected (..., 2, 3)"),
        (lambda: nn.BatchNorm(0), "num_features is 0"),
        (lambda: nn.BatchNorm(2.5), "num_features is 2.5"),
        (lambda: nn.BatchNorm(3, eps=-1), "eps is -1"),
        (lambda: nn.BatchNorm(3, eps=float("inf")), "eps is inf"),
        (lambda: nn.BatchNorm(3, momentum=1.5), "momentum is 1.5"),
        (lambda: nn.BatchNorm(3, momentum=float("nan")), "momentum is nan"),
        (lambda: nn.BatchNorm(3, affine=1), "affine is 1"),
        (lambda: nn.BatchNorm(3, dtype=np.float16), "dtype is float16"),
        (lambda: nn.BatchNorm(3, dtype=None), "dtype is None"),
        (lambda: nn.BatchNorm(3, dtype="nonsense"), "dtype is 'nonsense'"),
        (lambda: nn.BatchNorm(3, channel_axis="1"), "channel_axis is '1'"),
        (lambda: nn.GroupNorm(3, 4), "num_groups is 3; expected a divisor of num_channels, 4"),
        (lambda: nn.GroupNorm(0, 4), "num_groups is 0"),
        (lambda: nn.LayerNorm(()), "normalized_shape is ()"),
        (lambda: nn.LayerNorm((3, 0)), "normalized_shape is 0"),
        (lambda: nn.LayerNorm("33"), "normalized_shape is '33'"),
        (lambda: nn.Dropout(1.5, rng=0), "p is 1.5"),
        (lambda: nn.Dropout(0.5, rng="x"), "rng is 'x'"),
        (lambda: nn.Dropout(0.5, rng=-1), "rng is -1"),
        (lambda: nn.Dropout(0.5, rng=0, shared_axes="2"), "shared_axes is '2'"),
        (lambda: nn.DropConnect(-0.1, rng=0), "p is -0.1"),
        (lambda: nn.Dropout(0.5), "rng"),
        (lambda: nn.LayerNorm(3).backward(np.ones(3, np.float32)), "LayerNorm.backward needs a forward"),
        (lambda: nn.BatchNorm(3).train("yes"), "mode is 'yes'"),
        (
            lambda: nn.InstanceNorm(3, track_running_stats=True)(np.ones((4, 3, 1), np.float32)),
            "one value per channel of a sample",
        ),
    ],
)
def test_what_is_refused_is_named(call: Callable[[], Any], words: str) -> None:
    assert words in message(call)[1]


def test_layers_can_be_copied_pickled_and_read() -> None:
    layer = nn.BatchNorm(3, momentum=None)
    layer(np.random.default_rng(0).normal(3, 1, (8, 3)).astype(np.float32))
    layer.backward(np.ones((8, 3), np.float32))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(np.array_equal(twin.state_dict()[k], v) for k, v in layer.state_dict().items())
        twin.weight[...] = 9
        assert layer.weight.tolist() == [1, 1, 1]
        with pytest.raises(ValueError, match="forward"):
            twin.backward(np.ones((8, 3), np.float32))
    assert repr(layer) == (
        "BatchNorm(3, eps=1e-05, momentum=None, affine=True, track_running_stats=True, channel_axis=1, dtype=float32)"
    )
    assert repr(nn.GroupNorm(2, 4)) == "GroupNorm(2, 4, eps=1e-05, affine=True, channel_axis=1, dtype=float32)"
    assert repr(nn.Dropout(rng=fn.Philox(3))) == "Dropout(p=0.5, rng=Philox(seed=3, offset=0))"


def test_modules_are_there_after_import_and_cost_nothing_before() -> None:
    code = """
    import sys
    import fastnorm as fn
    lazy = ("nn", "preprocessing", "regularization")
    early = [name for name in lazy if "fastnorm." + name in sys.modules]
    print(early, fn.nn.BatchNorm.__name__, fn.preprocessing.MinMaxScaler.__name__, fn.regularization.EarlyStopping)
    print(set(lazy) <= set(dir(fn)), hasattr(fn, "nonsense"), "sklearn" in sys.modules)
    """
    assert output_of(code).splitlines() == [
        "[] BatchNorm MinMaxScaler <class 'fastnorm.regularization.EarlyStopping'>",
        "True False False",
    ]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_small_network_trains_as_in_torch() -> None:
    """Dense, batch norm, rectifier, layer norm, dense: the same losses for ten steps of gradient descent."""
    torch = load_torch()
    rng = np.random.default_rng(8)
    x, target = rng.normal(size=(16, 5)), rng.normal(size=(16, 2))
    w1, w2 = rng.normal(size=(5, 7)), rng.normal(size=(7, 2))
    batch_norm, layer_norm = nn.BatchNorm(7, dtype=np.float64), nn.LayerNorm(7, dtype=np.float64)
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 7, bias=False),
        torch.nn.BatchNorm1d(7),
        torch.nn.ReLU(),
        torch.nn.LayerNorm(7),
        torch.nn.Linear(7, 2, bias=False),
    ).double()
    net[0].weight.data, net[4].weight.data = torch.tensor(w1.T.copy()), torch.tensor(w2.T.copy())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(10):
        z = batch_norm(x @ w1)
        h = layer_norm(np.maximum(z, 0))
        error = h @ w2 - target
        dz = layer_norm.backward(2 / error.size * error @ w2.T) * (z > 0)
        dw1 = x.T @ batch_norm.backward(dz)
        w2 -= 0.05 * h.T @ (2 / error.size * error)
        w1 -= 0.05 * dw1
        for layer in (batch_norm, layer_norm):
            for name, value in layer.parameters().items():
                value -= 0.05 * layer.gradients()[name]
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(net(torch.tensor(x)), torch.tensor(target))
        loss.backward()
        optimizer.step()
        assert float(np.square(error).mean()) == pytest.approx(loss.item(), rel=1e-10)
    assert all(np.allclose(v, net[1].state_dict()[k], rtol=1e-9) for k, v in batch_norm.state_dict().items())
