"""The command line: what info tells, check finds faults and names them, plain text where rich is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm
from fastnorm import _core, reference
from fastnorm.cli import check, main, screen
from fastnorm.cli.calls import FUNCTIONS
from fastnorm.cli.info import machine
from operations import OPERATIONS
from subprocess_python import output_of, run_python


def test_info_tells_what_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    fastnorm.set_num_threads(2)
    assert main(["info", "--plain"]) == 0
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {label: value.strip() for label, value in facts.items()}
    assert facts["fastnorm"] == fastnorm.__version__
    assert facts["numpy"] == np.__version__
    assert facts["instruction set in use"].split()[0] == _core.isa()
    assert facts["instruction sets usable"] == ", ".join(_core.isa_levels())
    assert facts["threads"].startswith("2 of ")
    assert facts["verification"].split()[0] in ("on", "off")


def test_the_machine_is_described() -> None:
    found = machine()
    assert found["CPU"]
    assert found["system"]
    assert all(isinstance(value, str) and value for value in found.values())


def test_info_as_a_program_follows_the_environment() -> None:
    code = "import runpy, sys; sys.argv = ['fastnorm', 'info']; runpy.run_module('fastnorm', run_name='__main__')"
    done = run_python(code, FASTNORM_ISA="baseline", FASTNORM_NUM_THREADS="1", FASTNORM_VERIFY="1")
    assert done.returncode == 0, done.stderr
    assert "baseline (by FASTNORM_ISA=baseline)" in done.stdout
    assert "(by FASTNORM_NUM_THREADS=1)" in done.stdout
    assert "on (by FASTNORM_VERIFY=1)" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals are POSIX's")
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = """
        import os, sys
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        from fastnorm.cli import main
        sys.exit(main(["info", "--plain"]))
    """
    done = run_python(code)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("info", "check", "demo", "bench", "accuracy"))


def test_check_walks_every_public_function() -> None:
    assert set(FUNCTIONS) == set(OPERATIONS)
    assert all(list(check.trials(function)) for function in FUNCTIONS)


compares_itself = pytest.mark.unverified("the command compares every result with the references itself")


@compares_itself
def test_quick_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    threads, level = fastnorm.get_num_threads(), _core.isa()
    status = main(["check", "--plain", "--quick"])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "All results are within the contract." in shown
    assert all(function in shown for function in FUNCTIONS)
    assert (fastnorm.get_num_threads(), _core.isa()) == (threads, level)


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def off_in_one_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, out: Any = None, **named: Any) -> Any:
        y = np.array(function(*args, **named))
        # One element, by 32 u or more: several times what the contract allows.
        y.flat[y.size // 2] += 16 * np.finfo(y.dtype).eps
        return y

    return broken


def other_bits_on_another_level(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, **named: Any) -> Any:
        y = function(*args, **named)
        if _core.isa() != _core.isa_levels()[0]:
            y.flat[0] = np.nextafter(y.flat[0], np.inf)
        return y

    return broken


def other_bits_on_two_threads(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, **named: Any) -> Any:
        y = function(*args, **named)
        if fastnorm.get_num_threads() == 2:
            y.flat[0] = np.nextafter(y.flat[0], np.inf)
        return y

    return broken


def ignores_out(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, out: Any = None, **named: Any) -> Any:
        return function(*args, **named)

    return broken


def crashes(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, **named: Any) -> Any:
        raise RuntimeError("kernel on strike")

    return broken


@compares_itself
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (off_in_one_place, " u, allowed "),
        pytest.param(
            other_bits_on_another_level,
            f"other bits than {_core.isa_levels()[0]}",
            marks=pytest.mark.skipif(len(_core.isa_levels()) == 1, reason="this machine has one level"),
        ),
        (other_bits_on_two_threads, "other bits than 1 thread"),
        (ignores_out, "out=: another array came back"),
        (crashes, "RuntimeError: kernel on strike"),
    ],
)
def test_check_fails_and_names_a_broken_function(
    wrap: Wrap, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastnorm, "rms_norm", wrap(fastnorm.rms_norm))
    assert main(["check", "--plain", "--quick", "--functions", "layer_norm,rms_norm"]) == 1
    shown = capsys.readouterr().out
    assert words in shown
    assert "FAILED: rms_norm\n" in shown
    assert "MISS layer_norm" not in shown


def test_check_finds_a_wrong_gradient_and_a_wrong_mask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward, mask = fastnorm.layer_norm_backward, fastnorm.dropout_mask

    def no_bias_gradient(*args: Any, **named: Any) -> Any:
        return backward(*args, **named)._replace(dbias=None)

    def one_bit(*args: Any, **named: Any) -> Any:
        keep = mask(*args, **named)
        keep.flat[0] ^= True
        return keep

    monkeypatch.setattr(fastnorm, "layer_norm_backward", no_bias_gradient)
    monkeypatch.setattr(fastnorm, "dropout_mask", one_bit)
    assert main(["check", "--plain", "--quick", "--functions", "layer_norm_backward,dropout_mask"]) == 1
    shown = capsys.readouterr().out
    assert "dbias: got nothing" in shown
    assert "FAILED: layer_norm_backward, dropout_mask\n" in shown


def exact(value: list[float], scale: float = 1.0, u: float = 2.0**-24, units: float = 4.0) -> reference._norm.Exact:
    return reference._norm.Exact(np.array(value, np.longdouble), np.full(len(value), scale), u, units)


def test_error_in_units() -> None:
    error = check.error_in_units
    assert error(np.float32([1, 1 + 2**-23]), exact([1, 1])) == (2.0, (1,))
    assert error(np.float32([1, np.nan]), exact([1, np.nan])) == (0.0, (0,))
    assert error(np.float32([np.inf, np.nan]), exact([np.inf, 1])) == (np.inf, (1,))
    assert error(np.float32([-np.inf]), exact([np.inf])) == (np.inf, (0,))
    assert error(np.float32([-0.0]), exact([0.0], units=0)) == (np.inf, (0,))
    assert error(np.zeros(0, np.float32), exact([])) == (0.0, ())


def test_unknown_function_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--plain", "--functions", "no_such_norm"]) == 2
    assert "no_such_norm" in capsys.readouterr().err


def test_plain_text_where_rich_and_matplotlib_are_missing() -> None:
    shown = output_of(
        """
        import sys
        sys.modules["rich"] = sys.modules["matplotlib"] = None
        from fastnorm.cli import main
        assert main(["info"]) == 0
        assert main(["check", "--quick", "--functions", "dropout"]) == 0
        assert main(["demo", "--epochs", "1", "--no-reference"]) == 0
        assert main(["demo", "--plot", "curves.png"]) == 2
        """
    )
    assert "instruction set in use" in shown
    assert "All results are within the contract." in shown
    assert "held-out accuracy: " in shown


def test_only_numpy_is_imported() -> None:
    output_of(
        """
        import sys
        from fastnorm.cli import main
        assert main(["check", "--plain", "--quick", "--functions", "dropout"]) == 0
        heavy = {"rich", "matplotlib", "numba", "torch", "jax", "onnxruntime", "sklearn"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )


def test_plain_table_aligns_words_left_and_numbers_right(capsys: pytest.CaptureFixture[str]) -> None:
    screen.Screen(plain=True).table("Title", ["name", "n"], [["a", "1"], ["longer", "100"]])
    assert capsys.readouterr().out == "Title\nname      n\n------  ---\na         1\nlonger  100\n"


def test_progress_into_a_log_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.Screen(plain=True).progress("walk", 1000) as advance:
        for step in range(1000):
            advance(str(step))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("walk 1000/1000")


@pytest.mark.parametrize("plain", [True, False])
def test_a_terminal_gets_live_progress(plain: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if not plain:
        pytest.importorskip("rich")
    with (tmp_path / "terminal").open("w+") as terminal:
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        shown = screen.Screen(plain=plain)
        with shown.progress("walk", 3) as advance:
            for words in ("one", "two", "three"):
                advance(words)
        shown.table("Title", ["name", "n"], [["[red]", "1"]])
        terminal.seek(0)
        text = terminal.read()
    assert "three" in text
    assert "3/3" in text
    assert "[red]" in text
