"""`python -m fastnorm accuracy`: it judges everybody alike, passes what is exact and names what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm
from fastnorm.cli import accuracy, main, peers
from fastnorm.cli.accuracy import INPUTS, SUBJECTS, Subject


def test_a_quick_run_passes_and_writes_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- comparison: begin -->\n<!-- comparison: end -->\n", "utf-8")
    assert main(["accuracy", "--plain", "--quick", "--peers", "numpy", "--markdown", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "fastnorm is within its contract" in shown
    text = page.read_text("utf-8")
    assert f"NumPy {np.__version__}" in text
    assert all(subject.stem in text for subject in SUBJECTS)
    assert all(f"| {name} |" in text for name in INPUTS)
    assert max(map(len, text.splitlines())) <= 120


def test_a_broken_kernel_is_a_miss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    function = fastnorm.layer_norm

    def folded(x: Any, *args: Any, **named: Any) -> Any:
        return function(x, *args, **named) * np.float32(1 + 2**-20)

    monkeypatch.setattr(fastnorm, "layer_norm", folded)
    assert main(["accuracy", "--plain", "--quick", "--peers", ""]) == 1
    shown = capsys.readouterr().out
    assert "MISS layer_norm 8x1024 forward, N(0, 1): " in shown
    assert "MISS rms_norm" not in shown


def test_what_the_usual_formulas_lose_is_seen() -> None:
    subject = Subject("layer_norm", (8, 1024), (8, 1024))
    forward, gradients = accuracy.judge(subject, "N(1e3, 1)", ["numpy"], quick=True)
    assert (forward.errors["fastnorm"] or 0) <= 4
    assert (gradients.errors["fastnorm"] or 0) <= 8
    assert (forward.errors["numpy"] or 0) > 100
    assert (gradients.errors["numpy"] or 0) > 100


@pytest.mark.parametrize("peer", peers.installed())
def test_everybody_is_right_on_easy_data(peer: str) -> None:
    """A peer whose results were read wrongly would show errors of millions here too."""
    for subject in SUBJECTS:
        small = Subject(subject.stem, subject.quick, subject.quick, options=subject.options)
        for row in accuracy.judge(small, "N(0, 1)", [peer], quick=True):
            error = row.errors[peer]
            assert error is None or error < 100, row
            assert peer != "numpy" or error is not None


def test_the_spacing_of_the_smallest_numbers_is_no_error() -> None:
    subject = Subject("rms_norm", (8, 1024), (8, 1024))
    _, gradients = accuracy.judge(subject, "1e37 N(0, 1)", [], quick=True)
    assert gradients.errors["fastnorm"] is not None
    assert gradients.errors["fastnorm"] <= 8


def test_how_errors_are_written() -> None:
    shown = accuracy.shown
    assert [shown(e) for e in (None, np.inf, 0.5, 1234.5, 1.234e6)] == ["-", "NaN", "0.50", "1,234", "1.2e+06"]


def test_a_page_without_a_section_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--plain", "--quick", "--markdown", str(tmp_path / "none.md")]) == 2
    assert "expected a file with <!-- comparison: begin -->" in capsys.readouterr().err
