"""PyTorch's float64 autograd as a second oracle, for values and for the meaning of arguments that have its names.

Skipped where torch is not installed. Refuses speed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from contract import MODULES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
F = torch.nn.functional

# stem, shape, arguments of ours, the same call in torch
TABLE: list[tuple[str, tuple[int, ...], dict[str, Any], Any]] = [
    ("layer_norm", (5, 33), {}, lambda x, w, b: F.layer_norm(x, w.shape, w, b)),
    ("layer_norm", (5, 3, 7), {"axis": 1, "eps": 0.1}, lambda x, w, b: F.layer_norm(x, w.shape, w, b, 0.1)),
    ("layer_norm", (2, 3, 4, 5), {"axis": -3}, lambda x, w, b: F.layer_norm(x, w.shape, w, b)),
    ("rms_norm", (5, 33), {}, lambda x, w, b: F.rms_norm(x, w.shape, w, 1e-5)),
    ("rms_norm", (5, 3, 7), {"axis": 1, "eps": 0.1}, lambda x, w, b: F.rms_norm(x, w.shape, w, 0.1)),
    ("group_norm", (3, 6, 7), {"num_groups": 3}, lambda x, w, b: F.group_norm(x, 3, w, b)),
    ("group_norm", (3, 6, 5, 7), {"num_groups": 2, "eps": 0.1}, lambda x, w, b: F.group_norm(x, 2, w, b, 0.1)),
    ("instance_norm", (3, 6, 7), {}, lambda x, w, b: F.instance_norm(x, weight=w, bias=b)),
    ("instance_norm", (3, 2, 5, 7), {"eps": 0.1}, lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=0.1)),
    ("batch_norm", (9, 5), {}, lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True)),
    ("batch_norm", (3, 2, 5, 7), {"eps": 0.1}, lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 0.1)),
]


def parameter_shape(stem: str, shape: tuple[int, ...], arguments: dict[str, Any]) -> tuple[int, ...]:
    return shape[arguments.get("axis", -1) :] if stem in ("layer_norm", "rms_norm") else (shape[1],)


def leaf(a: np.ndarray) -> Any:
    return torch.from_numpy(a.copy()).requires_grad_()


def assert_same(ours: Any, theirs: Any) -> None:
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("stem", "shape", "arguments", "in_torch"), TABLE)
def test_values_and_gradients(
    stem: str, shape: tuple[int, ...], arguments: dict[str, Any], in_torch: Any, module: Any
) -> None:
    rng = np.random.default_rng(len(shape))
    x, dy = rng.normal(2, 3, shape), rng.normal(size=shape)
    weight, bias = rng.normal(size=(2, *parameter_shape(stem, shape, arguments)))
    given = {"weight": weight} if stem == "rms_norm" else {"weight": weight, "bias": bias}
    y, cache = getattr(module, f"{stem}_forward")(x, **given, **arguments)
    dx, dweight, dbias = getattr(module, f"{stem}_backward")(dy, cache)

    tx, tweight, tbias = leaf(x), leaf(weight), leaf(bias)
    ty = in_torch(tx, tweight, tbias)
    ty.backward(torch.from_numpy(dy))
    assert_same(y, ty)
    assert_same(dx, tx.grad)
    assert_same(dweight, tweight.grad)
    if dbias is not None:
        assert_same(dbias, tbias.grad)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics_mean_what_torch_means(module: Any, training: bool, momentum: float) -> None:
    rng = np.random.default_rng(5)
    x, dy = rng.normal(2, 3, (4, 3, 5)), rng.normal(size=(4, 3, 5))
    weight, bias, mean = rng.normal(size=(3, 3))
    var = rng.random(3) + 0.5
    tx, tweight, tbias, tmean, tvar = leaf(x), leaf(weight), leaf(bias), *map(torch.tensor, (mean, var))
    ty = F.batch_norm(tx, tmean, tvar, tweight, tbias, training, momentum)
    ty.backward(torch.from_numpy(dy))
    running = {"running_mean": mean, "running_var": var}
    y, cache = module.batch_norm_forward(x, weight, bias, **running, momentum=momentum, training=training)
    dx, dweight, dbias = module.batch_norm_backward(dy, cache)
    ours_and_theirs = [(y, ty), (mean, tmean), (var, tvar), (dx, tx.grad), (dweight, tweight.grad), (dbias, tbias.grad)]
    for ours, theirs in ours_and_theirs:
        assert_same(ours, theirs)
    if not training:
        assert_same(module.batch_norm(x, mean, var, weight, bias), ty)
