"""The demo keeps its promises: the data are what they claim, the network learns them, kernels and references agree."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import fastnorm
from fastnorm import reference
from fastnorm.cli import main
from fastnorm.cli.demo import Digits, load_digits, train
from fastnorm.cli.network import Network, cross_entropy


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The bits are the same, and the suite does not wait for a second core that somebody else is using."""
    with fastnorm.num_threads(1):
        yield


def few(digits: Digits, count: int) -> Digits:
    return Digits(
        digits.images[:count], digits.labels[:count], digits.held_out_images[:50], digits.held_out_labels[:50]
    )


def test_digits_are_the_uci_test_set() -> None:
    digits = load_digits()
    images = np.concatenate([digits.images, digits.held_out_images])
    labels = np.concatenate([digits.labels, digits.held_out_labels])
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.float32
    assert (images * 16 == np.round(images * 16)).all()
    assert (images.min(), images.max()) == (0, 1)
    # The class counts that the data set's own description gives.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(digits.images) == 1437


def test_digits_come_with_source_and_licence_in_less_than_100_kilobytes() -> None:
    data = files("fastnorm") / "data"
    assert len((data / "digits.npz").read_bytes()) < 100_000
    notes = (data / "README.md").read_text("utf-8")
    for words in ("Alpaydin", "Kaynak", "UCI Machine Learning Repository", "CC BY 4.0", "scikit-learn"):
        assert words in notes


def test_held_out_images_are_not_trained_on() -> None:
    one, other = load_digits(), load_digits()
    np.testing.assert_array_equal(one.images, other.images)
    trained = {image.tobytes() for image in one.images}
    # 4 images occur twice in the data set at most; a leak would be all 360.
    assert sum(image.tobytes() in trained for image in one.held_out_images) < 5


@pytest.mark.unverified("makes the calls of the shorter trainings below some thousand times more")
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_accuracy_is_at_least_97_percent(seed: int) -> None:
    result = train(fastnorm, load_digits(), epochs=15, seed=seed)
    assert result.accuracies[-1] >= 0.97
    assert result.losses[-1] < 0.05 < 0.5 < result.losses[0]


def test_kernels_and_references_give_the_same_curve() -> None:
    digits = few(load_digits(np.float64), 256)
    kernels, references = (train(module, digits, epochs=3, seed=3) for module in (fastnorm, reference))
    np.testing.assert_allclose(kernels.losses, references.losses, rtol=1e-9)
    assert kernels.accuracies == references.accuracies


def test_a_seed_names_a_run_and_another_seed_another_run() -> None:
    digits = few(load_digits(), 256)
    one, again, other = (train(fastnorm, digits, epochs=2, seed=seed).losses for seed in (5, 5, 6))
    assert one == again != other


def test_gradients_of_the_network_are_those_of_its_loss() -> None:
    digits = load_digits(np.float64)
    images, labels = digits.images[:16], digits.labels[:16]

    def network() -> Network:
        return Network(fastnorm, np.random.default_rng(0), np.float64)

    # A step from zero velocity moves each parameter by -rate * (gradient + weight decay).
    rate = 1e-6
    moved = network()
    moved.step(images, labels, rate)
    rng = np.random.default_rng(1)
    for name, value in network().parameters.items():
        place = tuple(int(rng.integers(n)) for n in value.shape)
        losses = []
        for change in (1e-6, -1e-6):
            probe = network()
            probe.parameters[name][place] += change
            losses.append(probe.step(images, labels, 0.0))
        numeric = (losses[0] - losses[1]) / 2e-6
        decay = 5e-4 * value[place] if value.ndim == 2 else 0.0
        gradient = (value[place] - moved.parameters[name][place]) / rate - decay
        assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-8), name


def test_cross_entropy_survives_large_scores() -> None:
    loss, dscores = cross_entropy(np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0]))
    assert loss == pytest.approx(5e3)
    np.testing.assert_allclose(dscores, [[0, 0], [-0.5, 0.5]], atol=1e-12)


def test_demo_shows_both_curves_their_difference_and_both_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--plain", "--epochs", "1", "--seed", "4"]) == 0
    shown = capsys.readouterr().out
    assert "loss, references" in shown
    assert "largest difference between the loss curves: " in shown
    assert "held-out accuracy: " in shown
    assert "s with the kernels" in shown
    assert "s with the references" in shown


def test_demo_draws_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.svg"
    assert main(["demo", "--plain", "--epochs", "1", "--no-reference", "--plot", str(picture)]) == 0
    assert "<svg" in picture.read_text("utf-8")
    assert "references" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "--epochs must be 1 or more, not 0"),
        (["--seed", "-1"], "--seed must be 0 or more, not -1"),
        (["--plot", "curves.txt"], "curves.txt"),
        (["--plot", "no/such/folder/curves.png"], "no folder"),
    ],
)
def test_wrong_use_is_told_before_any_work(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main(["demo", "--plain", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
