"""The examples of the notes' claims: each runs in its quick form and reports, and what mathematics fixes holds.

What is empirical is only asked to be there: a claim that does not hold on the digits is a finding, no failure. The
layers, losses and optimisers that the examples share are tested against numeric gradients and PyTorch.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from subprocess_python import output_of

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the repository is not around the tests")

if EXAMPLES.is_dir():
    sys.path.insert(0, str(EXAMPLES))
    import small_net
    from claim_07_noisy_batch_norm import NoisyBatchNorm
    from claim_08_other_norms import LpNorm

    sys.path.remove(str(EXAMPLES))


def run(script: str, *arguments: str) -> str:
    """What a script prints in a fresh interpreter, where a warning is an error."""
    code = f"""
    import runpy, sys, warnings
    warnings.simplefilter("error")
    sys.argv[1:] = {list(arguments)!r}
    sys.path.insert(0, {str(EXAMPLES)!r})
    runpy.run_path({str(EXAMPLES / script)!r}, run_name="__main__")
    """
    return output_of(code, timeout=300)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """All claims in their quick form: what was printed, the numbers by claim, the page."""
    folder = tmp_path_factory.mktemp("claims")
    page, numbers = folder / "claims.md", folder / "numbers.json"
    code = f"""
    import sys, warnings
    warnings.simplefilter("error")
    sys.path.insert(0, {str(EXAMPLES)!r})
    import run_all
    sys.exit(run_all.main(["--quick", "--page", {str(page)!r}, "--json", {str(numbers)!r}]))
    """
    shown = output_of(code, timeout=300)
    return shown, json.loads(numbers.read_text("utf-8")), page


def test_every_claim_runs_and_reports_one_line(report: tuple[str, dict[str, Any], Path]) -> None:
    shown, numbers, _ = report
    lines = re.findall(r"^claim: (\d+)\. .+ \[[A-E, ]+\]  measured: .*\d.*  agrees: (yes|no)$", shown, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, 19))
    assert [answer == "yes" for _, answer in lines] == [numbers[number]["agrees"] for number, _ in lines]
    assert all(len(each) > 1 for each in numbers.values())
    assert all(np.isfinite(list(each.values())).all() for each in numbers.values())


def test_the_page_has_every_claim_and_every_picture(report: tuple[str, dict[str, Any], Path]) -> None:
    _, numbers, page = report
    text = page.read_text("utf-8")
    assert re.findall(r"^## (\d+)\. ", text, re.MULTILINE) == [str(n) for n in range(1, 19)]
    assert f"{sum(each['agrees'] for each in numbers.values())} of 18 agree." in text
    pytest.importorskip("matplotlib")
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(pictures) == 18
    assert all((page.parent / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_claim_1_noise_falls_as_one_over_m(report: Any) -> None:
    found = report[1]["1"]
    for kind in ("activations", "gradients"):
        assert abs(found[f"slope, {kind}"] + 1) < 0.1
        assert abs(found[f"slope from 64 on, {kind}"] + 1) < 0.02 + 3 * found["standard error"]


def test_claim_2_expected_gradient_of_dropout(report: Any) -> None:
    assert report[1]["2"]["worst z"] < 4.5
    assert report[1]["2"]["relative difference"] < 3 * report[1]["2"]["standard error"] < 0.1


def test_claim_3_penalty_of_the_generalised_linear_model(report: Any) -> None:
    found = report[1]["3"]
    assert abs(found["ratio at 0.01"] - 1) < 0.03 + 3 * found["standard error at 0.01"]
    assert found["confident over unsure"] < 1
    assert found["R, beta doubled"] == pytest.approx(4, rel=0.1)


def test_claim_4_weight_scaling_is_exact(report: Any) -> None:
    found = report[1]["4"]
    assert found["largest difference"] < 1e-13
    assert found["ratio without scaling, p = 0.5"] == pytest.approx(2, rel=1e-12)
    assert found["ratio without scaling, p = 0.2"] == pytest.approx(1.25, rel=1e-12)


def test_claim_13_weight_and_bias_undo_the_norm(report: Any) -> None:
    assert all(0 < report[1]["13"][f"largest difference in u, {dtype}"] <= 8 for dtype in ("float32", "float64"))


def test_claim_14_running_statistics_remove_the_batch(report: Any) -> None:
    found = report[1]["14"]
    assert found["spread, evaluation"] == found["changed, evaluation"] == 0
    assert found["spread, training"] > 0.001


def test_claim_15_variance_shift_is_that_of_the_formula(report: Any) -> None:
    found = report[1]["15"]
    assert found["worst z"] < 4
    for rate in (0.1, 0.3, 0.5, 0.7):
        assert found[f"ratio at {rate:g}"] == pytest.approx(found[f"formula at {rate:g}"], rel=0.01)


def test_claim_17_penalties_have_their_closed_forms(report: Any) -> None:
    found = report[1]["17"]
    assert found["off the formulas"] < 1e-6
    assert found["zeros, L1"] > 0.2 > 0.01 > found["zeros, L2"]
    assert found["norm, L2"] < found["norm, none"]
    assert abs(found["noise ratio"] - 1) < 0.02 + 3 * found["noise standard error"]


def test_a_script_runs_by_itself_and_draws(tmp_path: Path) -> None:
    arguments = ["--quick", "--seed", "3"]
    shown = run("claim_13_identity.py", *arguments)
    assert re.fullmatch(r"claim: 13\. .+  measured: .+  agrees: yes", shown)
    assert run("claim_13_identity.py", "--quick", "--seed", "3") == shown
    pytest.importorskip("matplotlib")
    run("claim_13_identity.py", *arguments, "--plot", str(tmp_path / "a.svg"))
    assert "<svg" in (tmp_path / "a.svg").read_text("utf-8")


def test_the_committed_page_is_about_these_claims(report: tuple[str, dict[str, Any], Path]) -> None:
    """docs/claims.md is a longer run's page; its claims, scripts and pictures are those of now."""
    committed = (ROOT / "docs" / "claims.md").read_text("utf-8")
    quick = report[2].read_text("utf-8")
    headings = r"^## .+$"
    assert re.findall(headings, committed, re.MULTILINE) == re.findall(headings, quick, re.MULTILINE)
    pictures = re.findall(r"!\[.+\]\((.+)\)", committed)
    assert len(pictures) == 18
    assert sum((ROOT / "docs" / picture).stat().st_size for picture in pictures) < 1_000_000


def numeric_gradient(loss: Any, value: np.ndarray, step: float = 1e-6) -> np.ndarray:
    found = np.empty_like(value)
    for place in np.ndindex(*value.shape):
        kept = value[place]
        value[place] = kept + step
        above = loss()
        value[place] = kept - step
        found[place] = (above - loss()) / (2 * step)
        value[place] = kept
    return found


LAYERS = ["dense", "convolution", "strided convolution", "L1", "Linf", "rectifier", "noisy BN", "flatten"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_examples_have_their_gradients(name: str) -> None:
    rng = np.random.default_rng(5)
    layer, shape = {
        "dense": lambda: (small_net.Dense(4, 3, rng), (5, 4)),
        "convolution": lambda: (small_net.Conv3x3(2, 3, rng), (2, 4, 6, 2)),
        "strided convolution": lambda: (small_net.Conv3x3(2, 3, rng, step=2), (2, 4, 6, 2)),
        "L1": lambda: (LpNorm(3, 1, 7), (7, 3)),
        "Linf": lambda: (LpNorm(3, np.inf, 7), (7, 3)),
        "rectifier": lambda: (small_net.Relu(), (5, 4)),
        "noisy BN": lambda: (NoisyBatchNorm(3, rng), (7, 3)),
        "flatten": lambda: (small_net.Flatten(), (3, 2, 2)),
    }[name]()
    for key, value in layer.parameters().items():
        setattr(layer, key, rng.normal(1, 0.5, value.shape))
    if name == "noisy BN":
        layer.running_mean, layer.running_var = None, None
        layer.num_batches_tracked = None
    x, rng_state = rng.normal(size=shape), rng.bit_generator.state

    def forward() -> np.ndarray:
        rng.bit_generator.state = rng_state  # the same noise each time
        return np.asarray(layer.forward(x))

    dy = np.random.default_rng(6).normal(size=forward().shape)
    dx = np.array(layer.backward(dy))
    gradients = {key: np.array(value) for key, value in layer.gradients().items()}
    np.testing.assert_allclose(dx, numeric_gradient(lambda: np.sum(forward() * dy), x), rtol=1e-5, atol=1e-6)
    for key, value in layer.parameters().items():
        expected = numeric_gradient(lambda: np.sum(forward() * dy), value)
        np.testing.assert_allclose(gradients[key], expected, rtol=1e-5, atol=1e-6)


def test_losses_of_the_examples_have_their_gradients() -> None:
    rng = np.random.default_rng(7)
    scores, targets = rng.normal(size=(4, 3)), small_net.softmax(rng.normal(size=(4, 3)))
    for loss in (small_net.soft_cross_entropy, small_net.squared_error):
        _, gradient = loss(scores, targets)
        numeric = numeric_gradient(lambda loss=loss: loss(scores, targets)[0], scores)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)
    one_hot = np.eye(3)[[0, 2, 1, 1]]
    soft, plain = small_net.soft_cross_entropy(scores, one_hot), small_net.cross_entropy(scores, np.array([0, 2, 1, 1]))
    assert soft[0] == pytest.approx(plain[0])
    np.testing.assert_allclose(soft[1], plain[1], rtol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_optimisers_of_the_examples_step_as_in_torch(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    net = small_net.Network(small_net.Dense(6, 4, rng, bias=False))
    weight = torch.nn.Parameter(torch.tensor(net.layers[0].weight))
    x = rng.normal(size=(9, 6)).astype(np.float32)
    target = rng.normal(size=(9, 4)).astype(np.float32)
    if kind == "sgd":
        ours = small_net.Sgd(net, 0.1, momentum=0.8)
        theirs = torch.optim.SGD([weight], lr=0.1, momentum=0.8)
    else:
        ours = small_net.Adam(net, 0.01, betas=(0.8, 0.9), weight_decay=0.3)
        theirs = torch.optim.AdamW([weight], lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    for _ in range(5):
        _, dy = small_net.squared_error(net.forward(x), target)
        net.backward(dy)
        ours.step()
        theirs.zero_grad()
        torch.nn.functional.mse_loss(torch.tensor(x) @ weight, torch.tensor(target)).backward()
        theirs.step()
        np.testing.assert_allclose(net.layers[0].weight, weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_network_goes_back_to_a_state() -> None:
    rng = np.random.default_rng(9)
    from fastnorm import nn

    net = small_net.mlp([6, 5, 3], rng, nn.BatchNorm, dropout=0.2)
    x, labels = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40)
    state, before = net.state_dict(), net.predict(x)
    small_net.fit(net, x, labels, small_net.Adam(net), rng, epochs=2, batch=10)
    assert np.abs(net.predict(x) - before).max() > 1e-3
    net.load_state_dict(state)
    np.testing.assert_array_equal(net.predict(x), before)
