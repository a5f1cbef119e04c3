"""The benchmark cases: one file, every operation in it, every case runs, and all contenders do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastnorm
from fastnorm.cli import bench, main, peers, scores
from fastnorm.cli.calls import FUNCTIONS, make_arrays
from fastnorm.cli.cases import Case, load_cases, select_cases
from fastnorm.cli.screen import UsageError
from operations import OPERATIONS

CASES = load_cases()


def small(operation: str, shape: tuple[int, ...], layout: str = "C") -> Case:
    like = next(case for case in CASES if case.operation == operation)
    return Case("small", operation, shape, layout, "float64", like.moves, like.options)


def shape_of(operation: str) -> tuple[int, ...]:
    like = next(case for case in CASES if case.operation == operation)
    return (6, 16, 5, 3) if len(like.shape) == 4 else (6, 10)


def test_every_operation_has_a_case() -> None:
    assert set(OPERATIONS) == set(FUNCTIONS) == {case.operation for case in CASES}


def test_names_are_unique_and_say_what_they_are() -> None:
    keys = [(case.name, case.dtype) for case in CASES]
    assert len(set(keys)) == len(keys)
    for case in CASES:
        shape = "x".join(map(str, case.shape))
        layout = "" if case.layout == "C" else f"-{case.layout}"
        assert case.name == f"{case.operation}-{shape}{layout}"
        assert case.layout in ("C", "channels_last")
        assert case.dtype in ("float32", "float64")


def test_moved_bytes() -> None:
    assert small("layer_norm", (3, 5)).bytes_moved == 2 * 15 * 8
    assert small("apply_dropout_mask", (3, 5)).bytes_moved == 2 * 15 * 8 + 15


@pytest.mark.parametrize("operation", FUNCTIONS)
def test_every_operation_can_be_called_as_its_case_says(operation: str) -> None:
    case = small(operation, shape_of(operation))
    calls = bench.own_calls(case, bench.arrays_of(case))
    for call in calls.values():
        call()
    assert ("fastnorm out=" in calls) == (operation not in ("moments", "dropout_mask"))


def test_channels_last_keeps_the_values() -> None:
    case = small("batch_norm_forward", (2, 3, 4, 5), "channels_last")
    x = bench.arrays_of(case).x
    assert x.strides == (480, 8, 120, 24)
    np.testing.assert_array_equal(x, make_arrays("batch_norm_forward", case.shape, "float64", case.options).x)


def arrays_in(value: object) -> list[np.ndarray]:
    """The arrays of a result, whoever made it; what is no array (a cache) is left out."""
    if value is None or isinstance(value, float | int):
        return []
    if isinstance(value, tuple | list):
        return [array for item in value for array in arrays_in(item)]
    if hasattr(value, "detach"):
        value = value.detach()
    return [np.asarray(value)] if hasattr(value, "shape") else []


# Both layouts, planes long and short for the numba kernels, batches that are no multiple of the rows taken at once.
PLANES = (((6, 16, 5, 3), "C"), ((7, 16, 11, 13), "C"), ((7, 16, 5, 3), "channels_last"))
PEER_CASES = [
    *((operation, shape_of(operation), "C") for operation in FUNCTIONS),
    *((op, shape, layout) for op in FUNCTIONS if len(shape_of(op)) == 4 for shape, layout in PLANES),
    *((op, (11, 30), "C") for op in ("batch_norm", "batch_norm_forward", "batch_norm_backward")),
]


@pytest.mark.parametrize("peer", peers.installed())
@pytest.mark.parametrize(("operation", "shape", "layout"), dict.fromkeys(PEER_CASES))
def test_peers_do_the_same_work(peer: str, operation: str, shape: tuple[int, ...], layout: str) -> None:
    """A peer that computes something else would make the comparison worthless: its numbers must agree."""
    case = small(operation, shape, layout)
    arrays = bench.arrays_of(case)
    call = peers.load(peer).prepare(operation, arrays, case.options, 1)
    if call is None:
        assert peer != "numpy", "NumPy has an expression for everything"
        return
    found = arrays_in(call())
    if "drop" in operation and operation not in ("apply_dropout_mask", "dropout_inference"):
        # Another generator, another mask: shapes are all that can be the same.
        assert found[0].shape == case.shape
        return
    if operation == "gaussian_noise":
        assert 0.3 < (found[0] - arrays.x).std() < 0.7
        return
    if operation == "moments":
        assert any(np.allclose(arrays.x.mean(-1), array) for array in found)
        return
    ours = arrays_in(bench.own_calls(case, arrays)["fastnorm"]())
    for array in ours if operation.endswith("_backward") else ours[:1]:
        matching = [other for other in found if other.size == array.size]
        assert any(np.allclose(array.ravel(), other.ravel(), rtol=1e-6, atol=1e-6) for other in matching), array.shape


def test_selection() -> None:
    assert {case.operation for case in select_cases("layer_norm", "float32")} == {"layer_norm"}
    assert {case.dtype for case in select_cases("*8x64", "float32,float64")} == {"float32", "float64"}
    with pytest.raises(UsageError, match="no case matches"):
        select_cases("no_such_norm", "float32")


def test_run_table_json_and_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    arguments = ["bench", "--plain", "--cases", "layer_norm-8x64,rms_norm-8x64", "--seconds", "0", "--peers", "numpy"]
    assert main([*arguments, "--threads", "1", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "layer_norm-8x64" in shown
    assert "numpy" in shown
    content = json.loads(file.read_text("utf-8"))
    assert {entry["threads"] for entry in content["results"]} == {1}
    assert content["environment"]["numpy"] == np.__version__
    found = {entry["contender"] for entry in content["results"] if not entry["contender"].startswith("ceiling: ")}
    assert found == {"fastnorm", "fastnorm out=", "numpy"}
    assert all(0 < entry["seconds"] <= entry["median"] for entry in content["results"])

    for entry in content["results"]:
        entry["seconds"] *= 2
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(content), "utf-8")
    assert main(["bench", "--plain", "--compare", str(file), str(slower)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("layer_norm-8x64")]
    assert len(rows) == sum(entry["case"] == "layer_norm-8x64" for entry in content["results"]) >= 4
    assert all(row[-2:] == ["2.000", "1.000"] for row in rows)


def test_comparison_of_google_benchmark_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, times: list[float], unit: str) -> str:
        entries = [
            {"run_name": "k/float32/avx2", "run_type": "iteration", "real_time": t, "time_unit": unit} for t in times
        ]
        entries.append({"run_name": "k/float32/avx2", "run_type": "aggregate", "real_time": 1, "time_unit": unit})
        (tmp_path / name).write_text(json.dumps({"context": {}, "benchmarks": entries}), "utf-8")
        return str(tmp_path / name)

    before, after = write("before.json", [4.0, 6.0, 5.0], "us"), write("after.json", [3000.0, 2000.0, 3000.0], "ns")
    assert main(["bench", "--plain", "--compare", before, after]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == ["0.500", "0.600"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "no_such_norm"], "no case matches"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--threads", "1,many"], "--threads 1,many: expected numbers"),
        (["--peers", "cupy"], "--peers cupy: unknown"),
        (["--compare", "missing.json", "missing.json"], "missing.json"),
        (["--json", "no/such/folder/run.json"], "no folder"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--plain", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("cold", [False, True])
def test_several_thread_counts_in_one_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], cold: bool) -> None:
    file = tmp_path / "run.json"
    arguments = ["bench", "--plain", "--cases", "layer_norm-64x256", "--seconds", "0", "--peers", "numpy"]
    arguments += ["--cold"] * cold
    assert main([*arguments, "--threads", "1,2", "--json", str(file)]) == 0
    shown = capfd.readouterr().out
    assert ("single call" in shown) == cold
    assert "1 thread, fastest round" in shown
    assert "2 threads, fastest round" in shown
    assert shown.count("geometric mean against the best peer") == 2
    content, results = scores.read(file)
    assert content["environment"]["threads"].startswith("1, 2 of ")
    assert content["command"].endswith("--cold --seconds 0" if cold else "--seconds 0")
    assert [r.threads for r in results if r.contender == scores.OWN_OUT] == [1, 2]
    assert [r.threads for r in results if r.contender == scores.OWN_ONE] == [2]


def test_the_numba_kernels_agree_on_two_threads() -> None:
    """The parallel form is another program: work in pieces, partial sums for each."""
    pytest.importorskip("numba")
    for operation in ("layer_norm_backward", "batch_norm_forward"):
        shape, layout = ((7, 16), "C") if operation.startswith("layer") else ((5, 16, 3, 3), "channels_last")
        case = small(operation, shape, layout)
        arrays = bench.arrays_of(case)
        call = peers.load("numba").prepare(operation, arrays, case.options, 2)
        ours = bench.own_calls(case, arrays)["fastnorm"]()
        np.testing.assert_allclose(call()[0].reshape(shape), ours[0] if isinstance(ours, tuple) else ours, atol=1e-9)


def test_bench_leaves_the_thread_count_alone() -> None:
    fastnorm.set_num_threads(2)
    assert (
        main(["bench", "--plain", "--cases", "layer_norm-8x64", "--seconds", "0", "--threads", "1", "--peers", "numpy"])
        == 0
    )
    assert fastnorm.get_num_threads() == 2
