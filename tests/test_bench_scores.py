"""What bench does with its times: turns, ceilings, ratios, the summary, the pictures and the pages made from a run."""

from __future__ import annotations

import gc
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastnorm.cli import ceilings, markdown, measuring, peers, pictures, scores
from fastnorm.cli.screen import UsageError
from subprocess_python import run_python

ROOT = Path(__file__).resolve().parent.parent


def result(case: str, contender: str, microseconds: float, *, threads: int = 1, size: int = 1_000_000) -> scores.Result:
    operation = case.split("-", maxsplit=1)[0]
    times = (microseconds * 1e-6, 2 * microseconds * 1e-6, 7)
    return scores.Result(case, operation, "float32", threads, contender, *times, bytes=2 * size, input_bytes=size)


def small_run() -> list[scores.Result]:
    """Two contract cells and one small call, on one thread and two."""
    results = []
    for threads in (1, 2):
        for case, size, own, torch, numba in (
            ("layer_norm-512x768", 1_000_000, 100.0, 300.0, 150.0),
            ("rms_norm_backward-512x768", 1_000_000, 100.0, 200.0, 80.0),
            ("layer_norm-8x64", 2_048, 1.0, 2.0, 0.5),
        ):
            times = {
                scores.OWN: 2 * own, scores.OWN_OUT: own, "torch": torch, "numba": numba,
                "ceiling: NumPy": 0.5 * own, "ceiling: cached stores": (0.4 if threads == 1 else 0.32) * own,
            }  # fmt: skip
            if threads == 2:
                times[scores.OWN_ONE] = 1.8 * own
            results += [result(case, name, time, threads=threads, size=size) for name, time in times.items()]
    return results


def test_calls_with_new_arrays_stand_beside_our_own_with_new_arrays() -> None:
    """They are the best peer where that ratio is the smallest, not where their time is."""

    def ratio(fresh: float, torch: float) -> tuple[str, float]:
        times = {scores.OWN: 200.0, scores.OWN_OUT: 100.0, "fresh-calls": fresh, "torch": torch}
        cell = scores.Cell({name: result("dropout_add_rms_norm-512x768", name, time) for name, time in times.items()})
        best = cell.best_peer
        found = cell.ratio()
        assert best is not None
        assert found is not None
        return best.contender, found

    assert ratio(fresh=150.0, torch=120.0) == ("fresh-calls", pytest.approx(0.75))
    assert ratio(fresh=110.0, torch=50.0) == ("torch", pytest.approx(0.5))
    assert ratio(fresh=250.0, torch=120.0) == ("torch", pytest.approx(1.2))


def test_turns_are_shared_and_the_slow_have_few() -> None:
    calls = {"subject": 0, "fast": 0, "slow": 0}

    def contender(name: str, seconds: float) -> None:
        calls[name] += 1
        end = measuring.time.perf_counter() + seconds
        while measuring.time.perf_counter() < end:
            pass

    gc.enable()
    timings = measuring.take_turns(
        {name: lambda name=name, s=s: contender(name, s) for name, s in
         {"subject": 2e-4, "fast": 1e-4, "slow": 4e-3}.items()},
        0.1, subject="subject", pause=False,
    )  # fmt: skip
    assert gc.isenabled()
    assert timings["subject"].rounds == timings["fast"].rounds > timings["slow"].rounds >= 3
    assert all(0 < timing.fastest <= timing.median for timing in timings.values())
    assert timings["subject"].fastest >= 2e-4
    assert timings["slow"].fastest >= 4e-3


def test_cold_calls_come_one_by_one_after_something_else() -> None:
    seen: list[str] = []
    timings = measuring.take_turns(
        {name: lambda name=name: seen.append(name) for name in "abc"},
        0, subject="a", pause=False, spoil=lambda: seen.append("-"),
    )  # fmt: skip
    turns = "".join(seen[seen.index("-") :])
    assert turns[::2] == "-" * (len(turns) // 2)
    rounds = [turns[1::2][i : i + 3] for i in range(0, len(turns) // 2, 3)]
    assert all(sorted(letters) == ["a", "b", "c"] for letters in rounds)
    assert len(set(rounds)) > 1  # not always in one order
    assert {timing.rounds for timing in timings.values()} == {len(rounds)}


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ceilings_move_what_they_say(reads: int, threads: int, dtype: str) -> None:
    rng = np.random.default_rng(1)
    shape = (3, 5, 333, 431)  # odd, and large enough for the streaming form
    arrays = [np.moveaxis(rng.random(shape).astype(dtype), -1, 1) for _ in range(reads)]
    write = np.empty_like(arrays[0])
    with ThreadPoolExecutor(threads) as pool:
        calls = ceilings.ceilings(arrays, write, threads, pool)
        assert len(calls) == (3 if "numba" in peers.installed() else 1)
        for name, call in calls.items():
            assert name.startswith(ceilings.PREFIX)
            write.fill(-1)
            call()
            wrong = int((write != sum(arrays)).sum())
            # A streaming form leaves out less than a line of 64 bytes at either end.
            assert wrong <= (2 * 63 // write.itemsize if "streaming" in name else 0), name


def test_flat_is_a_view_in_memory_order() -> None:
    a = np.moveaxis(np.arange(24.0).reshape(2, 3, 4), -1, 1)
    assert ceilings.flat(a).tolist() == list(range(24))
    assert np.shares_memory(ceilings.flat(a), a)


def test_a_cell_is_judged_by_the_reused_result() -> None:
    cell = scores.cells(small_run())[0]
    assert cell.own.contender == scores.OWN_OUT
    assert cell.best_peer is not None
    assert cell.best_peer.contender == "numba"
    assert cell.ratio() == pytest.approx(1.5)
    assert cell.ratio("torch") == pytest.approx(3)
    assert cell.ratio("jax") is None
    assert cell.share == pytest.approx(0.4)
    assert cell.own.rate == pytest.approx(20)
    assert [cell.counts for cell in scores.cells(small_run())] == [True, True, False] * 2


def test_the_summary_counts_what_the_contract_counts() -> None:
    lines = scores.summary(small_run())
    assert lines[0] == "float32, 1 thread, 2 norm cells from 64 KB of input up"
    assert lines[1:5] == [
        f"  geometric mean against the best peer: {(1.5 * 0.8) ** 0.5:.2f}x",
        f"  geometric mean against PyTorch: {6**0.5:.2f}x",
        "  behind the best peer by more than 5 %: 1 of 2 (rms_norm_backward-512x768 0.80x)",
        "  median share of the ceiling from 0.5 MB up: 40%",
    ]
    assert "geometric mean 1.80x, least 1.80x" in lines[-2]
    assert lines[-1] == "  the same of the ceiling: geometric mean 1.25x"
    assert scores.summary([result("dropout-512x768", scores.OWN, 1)]) == []


def test_the_table_has_a_star_for_the_best_peer() -> None:
    header, rows = scores.table(scores.cells(small_run())[:1], ["torch", "jax", "numba"])
    row = dict(zip(header, rows[0], strict=True))
    assert row["time"] == "100 us"
    assert row["ceiling"] == "50.0"
    assert row["fresh"] == "2.00x"
    assert [row[name] for name in ("torch", "jax", "numba")] == ["3.00x", "-", "1.50x*"]


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    scores.write(tmp_path / "run.json", {"numpy": "2"}, "python -m fastnorm bench", small_run())
    content, results = scores.read(tmp_path / "run.json")
    assert content == {"environment": {"numpy": "2"}, "command": "python -m fastnorm bench"}
    assert results == small_run()


def test_two_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = pictures.draw(small_run(), tmp_path / "run.svg")
    assert [file.name for file in files] == ["run-ratio.svg", "run-roofline.svg"]
    assert all(file.stat().st_size > 5000 for file in files)
    assert pictures.draw([result("dropout-8x64", scores.OWN, 1), result("dropout-8x64", "ceiling: NumPy", 1)],
                         tmp_path / "other.png")  # fmt: skip


def test_sections_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- a: begin (why) -->\nold\n<!-- a: end -->\nbelow\n", "utf-8")
    markdown.replace_section(page, "a", r"new \1 text")
    assert page.read_text("utf-8") == "above\n<!-- a: begin (why) -->\nnew \\1 text\n<!-- a: end -->\nbelow\n"
    with pytest.raises(UsageError, match="no section between <!-- b: begin -->"):
        markdown.replace_section(page, "b", "new")
    assert markdown.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_the_pages_are_made_from_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = "python -m fastnorm bench --threads 1,2"
    scores.write(tmp_path / "run.json", {"CPU": "a processor"}, command, small_run())
    code = f"""
        import runpy, sys
        sys.argv = ["make_performance.py", {str(tmp_path / "run.json")!r}, "--root", {str(tmp_path)!r}]
        runpy.run_path({str(ROOT / "docs" / "make_performance.py")!r}, run_name="__main__")
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    page, readme = ((tmp_path / name).read_text("utf-8") for name in ("docs/performance.md", "README.md"))
    assert f"$ {command} --json run.json" in page
    assert "| layer_norm-512x768 | 100 us | 200 us | 20.0 | 50.0 | 40% | 2.00x | 3.00x | 1.50x\\* |" in page
    assert "| `layer_norm-512x768` | 100 us | 20 | 3.00x | **1.50x** |" in readme
    assert "1 thread of a processor" in " ".join(readme.split())
    assert all((tmp_path / "docs" / f"performance-{kind}.png").is_file() for kind in ("ratio", "roofline", "headlines"))


def test_a_run_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", "utf-8")
    done = run_python(
        f"""
        import runpy, sys
        sys.argv = ["make_performance.py", {str(tmp_path / "run.json")!r}]
        runpy.run_path({str(ROOT / "docs" / "make_performance.py")!r}, run_name="__main__")
        """
    )
    assert done.returncode == 2, sys.version
    assert "run.json" in done.stderr
