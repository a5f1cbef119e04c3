"""Every script in examples/ runs as a user would run it, in a fresh interpreter, with warnings as errors."""

from __future__ import annotations

import re

import pytest

from conftest import ROOT
from subprocess_python import output_of

FOLDER = ROOT / "examples"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the repository is not around the tests")


def run(name: str) -> str:
    return output_of(f"import runpy, warnings; warnings.simplefilter('error'); runpy.run_path({str(FOLDER / name)!r})")


def test_numpy_page() -> None:
    shown = run("numpy_page.py")
    assert re.findall(r": (?:True )?False", shown) == []
    messages = [line for line in shown.splitlines() if re.match(r"  (TypeError|ValueError): ", line)]
    assert len(messages) == 12
    assert any("x.astype(np.float32)" in message for message in messages)


def test_train_step_learns_the_spiral() -> None:
    shown = run("train_step.py")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", shown)]
    accuracy = float(re.findall(r"accuracy (\S+)%", shown)[-1])
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.1
    assert accuracy > 97


def test_dropout_statistics_stay_within_their_limit() -> None:
    code = f"""
    import runpy, sys, warnings
    warnings.simplefilter("error")
    sys.argv = ["dropout_statistics.py", "--elements", "300000"]
    try:
        runpy.run_path({str(FOLDER / "dropout_statistics.py")!r}, run_name="__main__")
    except SystemExit as stopped:
        print("status", stopped.code)
    """
    shown = output_of(code)
    assert len(re.findall(r"z = ", shown)) > 30
    assert shown.endswith("status 0")
